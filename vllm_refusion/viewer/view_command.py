"""``vllm-refusion view``: shows a trace in the terminal, or writes it as a page or a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_refusion.files import write_text

HELP = "show a trace in the terminal, or write it as a page or a picture"
SUFFIXES = (".html", ".gif", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path)
    parser.add_argument(
        "-o", "--output", type=Path, help=f"file to write: {', '.join(SUFFIXES)}; else the terminal"
    )
    parser.add_argument("--request", type=int, default=0, help="which request, from 0")
    parser.add_argument("--pass", type=int, dest="until", help="only the state after this pass")
    parser.add_argument("--speed", type=float, default=1.0, help="1 is the recorded speed")
    parser.add_argument("--dark", action="store_true", help="pictures on a dark ground")
    parser.add_argument("--font", type=Path, help="TrueType font of pictures, for other scripts")


def run(args: argparse.Namespace) -> None:
    """Shows the trace in the way the output's suffix asks for.

    Raises:
        ValueError: the file is no trace, or an argument does not fit it.
    """
    from vllm_refusion.viewer.timeline import Timeline, load

    if args.output is not None and args.output.suffix not in SUFFIXES:
        raise ValueError(f"-o {args.output}: allowed are files ending in {', '.join(SUFFIXES)}")
    if not args.speed > 0:
        raise ValueError(f"--speed {args.speed}: allowed is a number above 0")
    trace = load(args.trace)
    if not 0 <= args.request < len(trace["requests"]):
        raise ValueError(f"--request {args.request}: the trace has {len(trace['requests'])}")
    timeline = Timeline.of(trace, trace["requests"][args.request])
    last = len(timeline.passes)
    if args.until is not None and not 0 <= args.until <= last:
        raise ValueError(f"--pass {args.until}: allowed is 0 to {last}")
    if args.output is None:
        from vllm_refusion.viewer import terminal

        terminal.show(timeline, args.until, args.speed)
        return
    if args.output.suffix == ".html":
        from vllm_refusion.viewer import page

        write_text(args.output, page.html(trace))
    else:
        from vllm_refusion.viewer import image

        style = image.Style(dark=args.dark, font=args.font)
        if args.output.suffix == ".png":
            number = last if args.until is None else args.until
            image.write_png(args.output, timeline, number, style)
        else:
            image.write_gif(args.output, timeline, args.speed, style)
    print(f"wrote {args.output}", file=sys.stderr)
