"""``vllm-refusion convert``: the ReFusion form of an autoregressive checkpoint, to be trained."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_refusion.decoding.params import PRESETS, add_options, given_options

HELP = "make a ReFusion checkpoint, to be trained, from an autoregressive one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder, a name on the Hugging Face hub, or a GGUF file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--mask-token", help="default: the tokenizer's, else <|mask|>")
    parser.add_argument("--pad-token", help="for a tokenizer without one; default: <|pad|>")
    parser.add_argument("--dtype", default="auto", help="of the weights; default: as they are")
    parser.add_argument(
        "--plain", action="store_true", help="unpack a GGUF file, add nothing: for a mask adapter"
    )
    defaults = parser.add_argument_group("decoding defaults, for the generation config")
    defaults.add_argument("--preset", help=", ".join(PRESETS))
    add_options(defaults)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError if the source cannot be converted; says why."""
    from vllm_refusion.training.convert import DTYPES, convert

    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype}: allowed are {', '.join(DTYPES)}")
    made = convert(
        args.source,
        args.output,
        mask_token=args.mask_token,
        pad_token=args.pad_token,
        decoding=given_options(args),
        dtype=args.dtype,
        plain=args.plain,
    )
    for name in ("mask_token", "pad_token", "eos_token"):
        token, number = made[name]
        if number is not None:
            print(f"{name}: {token} ({number})", file=sys.stderr)
    old, new = made["embedding_rows"]
    print(f"embedding rows: {old} -> {new}", file=sys.stderr)
    if not made["chat_template"]:
        print("the tokenizer has no chat template: training wants one", file=sys.stderr)
    print(f"wrote {args.output}", file=sys.stderr)
