"""The command ``vllm-refusion``. A subcommand is a module with HELP, add_arguments and run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "bench": "vllm_refusion.bench.command",
    "bench-report": "vllm_refusion.bench.report_command",
    "convert": "vllm_refusion.training.convert_command",
    "doctor": "vllm_refusion.doctor",
    "play": "vllm_refusion.viewer.play_command",
    "train": "vllm_refusion.training.train_command",
    "trace": "vllm_refusion.viewer.trace_command",
    "view": "vllm_refusion.viewer.view_command",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; importing their modules must be cheap."""
    parser = argparse.ArgumentParser(prog="vllm-refusion", description="ReFusion on vLLM: tools.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand; exits with 2 on bad arguments and 1 on failures that it reports."""
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    try:
        code = chosen.run(chosen)
    except ValueError as error:
        parser.exit(2, f"vllm-refusion {chosen.command}: {error}\n")
    except OSError as error:  # a full disk, a folder that cannot be written
        parser.exit(1, f"vllm-refusion {chosen.command}: {error}\n")
    sys.exit(code or 0)
