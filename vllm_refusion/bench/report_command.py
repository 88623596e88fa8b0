"""The subcommand ``bench-report``: tables and plots of result files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm_refusion.bench import report

HELP = "Render the table and the plot of benchmark results (JSON files of `bench`)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", help="JSON files, or folders of them")
    parser.add_argument("--out", help="path without suffix for .md and .png (default: print only)")


def run(arguments: argparse.Namespace) -> int:
    files: list[Path] = []
    for path in map(Path, arguments.paths):
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no JSON files in {', '.join(arguments.paths)}")
    results = [json.loads(file.read_text()) for file in files]
    strangers = [str(file) for file, result in zip(files, results) if "sides" not in result]
    if strangers:
        raise ValueError(f"not results of `vllm-refusion bench`: {', '.join(strangers)}")
    print(report.table(results))
    if arguments.out:
        report.write(Path(arguments.out), results)
    return 0
