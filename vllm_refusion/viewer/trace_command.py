"""``vllm-refusion trace``: records how prompts are decoded."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_refusion.decoding.params import PRESETS, add_options, given_options
from vllm_refusion.engine import compat
from vllm_refusion.files import json_object, write_text

HELP = "record how prompts are decoded, pass by pass, as JSON"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="ReFusion checkpoint: a path or a hub name")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--raw", action="store_true", help="do not apply the chat template")
    parser.add_argument("-o", "--output", type=Path, default=Path("trace.json"))
    parser.add_argument("--page", type=Path, help="also write the viewer's page to this .html file")
    parser.add_argument("--autoregressive", metavar="MODEL", help="decode with this model, too")
    parser.add_argument("--preset", choices=PRESETS)
    add_options(parser)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--engine",
        type=json_object,
        default={},
        metavar="JSON",
        help="more options of vllm.LLM, for both models",
    )


def run(args: argparse.Namespace) -> None:
    """Records, writes the trace, says what it holds.

    Raises:
        ValueError: an argument is out of range.
    """
    # In-process: starts faster, and the first engine is gone when the second starts.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import SamplingParams

    from vllm_refusion.viewer import page, record
    from vllm_refusion.viewer.timeline import Timeline

    if args.page is not None and args.page.suffix != ".html":
        raise ValueError(f"--page {args.page}: the page is an .html file")
    sampling = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        extra_args=given_options(args),
    )
    chat = not args.raw
    with _engine(args, args.model, record.TRACING) as llm:
        _warm_up(llm, args.prompt[0], sampling, chat)
        trace = record.record(llm, args.prompt, sampling, chat)
    if args.autoregressive:
        with _engine(args, args.autoregressive, record.stock(args.autoregressive)) as llm:
            _warm_up(llm, args.prompt[0], sampling, chat)
            record.add_autoregressive(trace, llm, sampling, chat)
    write_text(args.output, json.dumps(trace, ensure_ascii=False, separators=(",", ":")))
    print(f"wrote {args.output}")
    if args.page:
        write_text(args.page, page.html(trace))
        print(f"wrote {args.page}")
    for request in trace["requests"]:
        print(Timeline.of(trace, request).summary())


@contextmanager
def _engine(args: argparse.Namespace, model: str, options: dict[str, Any]) -> Iterator[Any]:
    """An LLM for one request at a time, shut down at the end."""
    import torch
    from vllm import LLM

    defaults = {"dtype": args.dtype, "max_num_seqs": 1}
    if not torch.cuda.is_available():
        defaults["enforce_eager"] = True
    settings = defaults | args.engine | options
    additional = args.engine.get("additional_config", {}) | options.get("additional_config", {})
    if additional:
        settings["additional_config"] = additional
    llm = LLM(model, **settings)
    try:
        yield llm
    finally:
        compat.shut_down(llm)


def _warm_up(llm: Any, prompt: str, sampling: Any, chat: bool) -> None:
    """Compiles and allocates what the first request would pay for."""
    from vllm_refusion.viewer.record import encode

    prompt_ids = encode(llm.get_tokenizer(), prompt, chat)
    llm.generate({"prompt_token_ids": prompt_ids}, sampling, use_tqdm=False)
