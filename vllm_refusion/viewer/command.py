"""``vllm-refusion trace`` records how prompts are decoded, ``vllm-refusion view`` shows it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_refusion.config import PRESETS

SUFFIXES = (".html", ".gif", ".png")


def add_parser(subparsers: Any) -> None:
    """Adds the commands ``trace`` and ``view``."""
    trace = subparsers.add_parser(
        "trace",
        help="record how prompts are decoded",
        description="Decode prompts with a ReFusion model and write what every pass did as JSON.",
    )
    trace.add_argument("model", help="checkpoint: a path or a hub name")
    trace.add_argument("--prompt", action="append", required=True, help="may be repeated")
    trace.add_argument("--raw", action="store_true", help="do not apply the chat template")
    trace.add_argument("-o", "--output", type=Path, default=Path("trace.json"))
    trace.add_argument("--page", type=Path, help="also write the viewer's page to this .html file")
    trace.add_argument("--autoregressive", metavar="MODEL", help="decode with this model, too")
    trace.add_argument("--preset", choices=PRESETS)
    for name, kind in (
        *(("slot-size", int), ("block-length", int)),
        *(("slot-threshold", float), ("token-threshold", float)),
        *(("max-tokens", int), ("temperature", float), ("seed", int)),
    ):
        trace.add_argument(f"--{name}", type=kind)
    trace.add_argument("--dtype", default="auto")
    trace.add_argument(
        "--engine",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more options of vllm.LLM, for both models",
    )
    trace.set_defaults(run=run_trace)

    view = subparsers.add_parser(
        "view",
        help="show a trace",
        description="Show a trace in the terminal, or write it as a page or a picture.",
    )
    view.add_argument("trace", type=Path)
    view.add_argument(
        "-o", "--output", type=Path, help=f"file to write: {', '.join(SUFFIXES)}; else the terminal"
    )
    view.add_argument("--request", type=int, default=0, help="which request of the trace, from 0")
    view.add_argument("--pass", type=int, dest="until", help="only the state after this pass")
    view.add_argument("--speed", type=float, default=1.0, help="1 is the recorded speed")
    view.add_argument("--dark", action="store_true", help="pictures on a dark ground")
    view.add_argument("--font", type=Path, help="TrueType font of pictures, for other scripts")
    view.set_defaults(run=run_view)


def run_trace(args: argparse.Namespace) -> int:
    """Records, writes the trace, says what it holds."""
    # In-process: starts faster, and the first engine is gone when the second starts.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import SamplingParams

    from vllm_refusion.viewer import page, record
    from vllm_refusion.viewer.timeline import Timeline

    if args.page is not None and args.page.suffix != ".html":
        raise SystemExit(f"--page {args.page}: the page is an .html file")
    own = ("preset", "slot_size", "block_length", "slot_threshold", "token_threshold")
    chosen = {name: getattr(args, name) for name in own if getattr(args, name) is not None}
    sampling = SamplingParams(
        max_tokens=args.max_tokens if args.max_tokens is not None else 512,
        temperature=args.temperature if args.temperature is not None else 0.0,
        seed=args.seed,
        extra_args=chosen,
    )
    chat = not args.raw
    with _engine(args, args.model, record.TRACING) as llm:
        _warm_up(llm, args.prompt[0], sampling, chat)
        trace = record.record(llm, args.prompt, sampling, chat)
    if args.autoregressive:
        with _engine(args, args.autoregressive, record.stock(args.autoregressive)) as llm:
            _warm_up(llm, args.prompt[0], sampling, chat)
            record.add_autoregressive(trace, llm, sampling, chat)
    args.output.write_text(json.dumps(trace, ensure_ascii=False, separators=(",", ":")))
    print(f"wrote {args.output}")
    if args.page:
        args.page.write_text(page.html(trace))
        print(f"wrote {args.page}")
    for request in trace["requests"]:
        print(Timeline.of(trace, request).summary())
    return 0


def run_view(args: argparse.Namespace) -> int:
    """Shows a trace in the way the output's suffix asks for."""
    from vllm_refusion.viewer import page
    from vllm_refusion.viewer.timeline import Timeline, load

    trace = load(args.trace)
    if not 0 <= args.request < len(trace["requests"]):
        raise SystemExit(f"--request {args.request}: the trace has {len(trace['requests'])}")
    timeline = Timeline.of(trace, trace["requests"][args.request])
    last = len(timeline.passes)
    if args.until is not None and not 0 <= args.until <= last:
        raise SystemExit(f"--pass {args.until}: allowed is 0 to {last}")
    if not args.speed > 0:
        raise SystemExit(f"--speed {args.speed}: allowed is a number above 0")
    if args.output is None:
        from vllm_refusion.viewer import terminal

        terminal.show(timeline, args.until, args.speed)
        return 0
    if args.output.suffix not in SUFFIXES:
        raise SystemExit(f"-o {args.output}: allowed are files ending in {', '.join(SUFFIXES)}")
    if args.output.suffix == ".html":
        args.output.write_text(page.html(trace))
    else:
        from vllm_refusion.viewer import image

        style = image.Style(dark=args.dark, font=args.font)
        if args.output.suffix == ".png":
            image.write_png(
                args.output, timeline, last if args.until is None else args.until, style
            )
        else:
            image.write_gif(args.output, timeline, args.speed, style)
    print(f"wrote {args.output}", file=sys.stderr)
    return 0


@contextmanager
def _engine(args: argparse.Namespace, model: str, options: dict[str, Any]) -> Iterator[Any]:
    """An LLM for one request at a time, shut down at the end."""
    import torch
    from vllm import LLM

    defaults = {"dtype": args.dtype, "max_num_seqs": 1}
    if not torch.cuda.is_available():
        defaults["enforce_eager"] = True
    llm = LLM(model, **defaults | args.engine | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _warm_up(llm: Any, prompt: str, sampling: Any, chat: bool) -> None:
    """Compiles and allocates what the first request would pay for."""
    from vllm_refusion.viewer.record import encode

    prompt_ids = encode(llm.get_tokenizer(), prompt, chat)
    llm.generate({"prompt_token_ids": prompt_ids}, sampling, use_tqdm=False)
