"""The subcommand ``bench-report``: tables and plots of result files."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_refusion.bench import html_report, report
from vllm_refusion.files import read_json, write_text

HELP = "Render tables, plots or a page of benchmark results (JSON files of `bench`)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", help="JSON files, or folders of them")
    parser.add_argument("--out", help="path without suffix for .md and .png (default: print only)")
    parser.add_argument("--html", type=Path, help="also write all as one page to this .html file")


def run(arguments: argparse.Namespace) -> int:
    files: list[Path] = []
    for path in map(Path, arguments.paths):
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no JSON files in {', '.join(arguments.paths)}")
    if arguments.html is not None and arguments.html.suffix != ".html":
        raise ValueError(f"--html {arguments.html}: the page is an .html file")
    results = [_load(file) for file in files]
    print(report.table(results))
    if arguments.out:
        report.write(Path(arguments.out), results)
    if arguments.html:
        write_text(arguments.html, html_report.page(results))
        print(f"wrote {arguments.html}")
    return 0


def _load(file: Path) -> report.Result:
    """A result whose table can be made. Raises ValueError for other files; names them."""
    result = read_json(file)
    try:
        report.table([result])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{file}: not a result of `vllm-refusion bench`: {error!r}") from error
    return result
