"""``vllm-refusion train``: a ReFusion checkpoint, an autoregressive twin, or a mask adapter."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm_refusion.decoding.params import DecodingParams, add_options, given_options
from vllm_refusion.files import json_object

ADAPTER_RATE = 1e-3  # the learning rate of an adapter
HELP = "train a ReFusion checkpoint (see convert) on (query, response) pairs"


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint: a folder or a name on the hub")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help=".jsonl or .json files, or .gz of them"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    what = parser.add_argument_group("what is trained")
    what.add_argument("--objective", help="refusion (default) or autoregressive")
    what.add_argument("--from-scratch", action="store_true", default=None, help="random weights")
    what.add_argument("--epochs", type=float, help="default: 4")
    what.add_argument("--steps", type=int, help="optimiser steps, instead of --epochs")
    what.add_argument("--batch-size", type=int, help="examples a step, all devices; default: 64")
    what.add_argument("--max-length", type=int, help="longer rows are left out; default: 4096")
    what.add_argument("--slot-sizes", type=_sizes, help="default: 4,8,16,32")
    what.add_argument(
        "--block-share", type=float, help="examples shown as decoded in blocks; default: 0"
    )
    what.add_argument(
        "--ordered-share", type=float, help="examples shown as decoded in order; default: 0"
    )
    what.add_argument(
        "--joined-slots",
        action="store_true",
        default=None,
        help="tokens before a slot predict its first one, for serial decoding with slot_start next",
    )
    what.add_argument("--ar-weight", type=float, help="default: 1")
    what.add_argument("--mdm-weight", type=float, help="default: 1")
    what.add_argument(
        "--infill-weight", type=float, help="of masks that follow part of a slot; default: 0"
    )
    what.add_argument(
        "--slot-certainty",
        type=float,
        help="first masks learn how sure so many whole slots are; default: 0, their own token",
    )
    what.add_argument("--learning-rate", type=float, help="default: 2e-5, of an adapter 1e-3")
    what.add_argument("--schedule", help="cosine (default), linear or constant_with_warmup")
    what.add_argument("--warmup-steps", type=int, help="default: 0")
    what.add_argument("--weight-decay", type=float, help="default: 0")
    what.add_argument("--adam-beta2", type=float, help="default: 0.999")
    what.add_argument("--max-grad-norm", type=float, help="default: 1")
    what.add_argument("--bf16", action="store_true", default=None, help="mixed precision")
    what.add_argument("--seed", type=int, help="of data order and masking; default: 0")
    what.add_argument("--plain-prompt", action="store_true", default=None, help="no chat template")
    what.add_argument("--template-options", type=json_object, help="JSON, for the chat template")
    adapter = parser.add_argument_group("a mask adapter, the model itself is frozen")
    adapter.add_argument("--mask-adapter", action="store_true", help="train one")
    adapter.add_argument("--rank", type=int, help="default: 64")
    adapter.add_argument("--adapter-layers", help="all (default), upper-half or N-M")
    adapter.add_argument("--adapter-modules", help="all (default), or e.g. o_proj,down_proj")
    adapter.add_argument("--chain-length", type=int, help="masks behind a cut; default: 16")
    adapter.add_argument("--chains-per-row", type=int, help="cuts of an example; default: 8")
    adapter.add_argument("--labels", help="response (default) or kl, the model's distribution")
    adapter.add_argument(
        "--on-policy",
        type=float,
        nargs="?",
        const=0.0,
        metavar="TEMPERATURE",
        help="the model itself writes the responses first, through vLLM; default: greedily",
    )
    adapter.add_argument(
        "--skips-known",
        action=argparse.BooleanOptionalAction,
        help="no mask where the next token is known anyway (default)",
    )
    how = parser.add_argument_group("how it is carried out")
    how.add_argument("--micro-batch-size", type=int, help="examples per device; default: 8")
    how.add_argument("--gradient-checkpointing", action="store_true", default=None)
    how.add_argument("--compile", action="store_true", default=None, help="use torch.compile")
    how.add_argument("--workers", type=int, help="processes that prepare batches; default: 0")
    how.add_argument("--log-every", type=int, help="steps; default: 10")
    how.add_argument("--save-every", type=int, help="steps; default: 500")
    how.add_argument("--dev", type=Path, nargs="+", help="files as for --data")
    how.add_argument("--eval-every", type=int, help="steps; default: 500")
    how.add_argument("--dev-decoded", type=int, help="dev problems decoded; default: 20")
    how.add_argument("--dev-preset", help="how they are decoded; default: gsm8k")
    add_options(how, "dev_")
    how.add_argument("--max-tokens", type=int, help="of an answer; default: 512")
    how.add_argument("--quiet", action="store_true", help="no progress bars")


def settings_from(args: argparse.Namespace) -> tuple[Any, Any]:
    """(Recipe, Execution). Raises ValueError on values that are not allowed."""
    from vllm_refusion.training.recipe import HYBRID, AdapterRecipe, Execution, Recipe

    def given(kind: type) -> dict[str, Any]:
        values = {field.name: getattr(args, field.name, None) for field in fields(kind)}
        return {name: value for name, value in values.items() if value is not None}

    if args.steps is not None and args.epochs is not None:
        raise ValueError("either --steps or --epochs")
    dev_options = given_options(args, "dev_")
    recipe, adapter, execution = given(Recipe), given(AdapterRecipe), given(Execution)
    if args.mask_adapter:
        idle = [n for n in (*HYBRID, "dev_decoded") if getattr(args, n, None) is not None]
        idle += [f"dev_{name}" for name in dev_options]
        for name in idle:
            raise ValueError(f"--{name.replace('_', '-')}: has no use with --mask-adapter")
        if args.on_policy is None and args.max_tokens is not None:
            raise ValueError("--max-tokens: has no use with --mask-adapter but --on-policy")
        recipe = {"learning_rate": ADAPTER_RATE, **recipe, "adapter": AdapterRecipe(**adapter)}
    else:
        adapter.pop("max_tokens", None)
        for name in adapter:
            raise ValueError(f"--{name.replace('_', '-')}: needs --mask-adapter")
    execution |= {
        "dev_params": DecodingParams().updated(dev_options),
        "progress": not args.quiet,
        "dev": tuple(args.dev or ()),
    }
    return Recipe(**recipe), Execution(**execution)


def run(args: argparse.Namespace) -> int:
    """Raises ValueError if settings, data or folder do not fit; says what."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ValueError('training needs: pip install "vllm-refusion[train]"') from error
    from vllm_refusion.training.run import train

    recipe, execution = settings_from(args)
    if train(recipe, execution, args.data, args.output, args.resume):
        print(f"wrote {args.output}/{'adapter' if recipe.adapter else 'model'}", file=sys.stderr)
        return 0
    print(f"interrupted; go on with --resume -o {args.output}", file=sys.stderr)
    return 1
