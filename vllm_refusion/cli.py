"""The command ``vllm-refusion``."""

from __future__ import annotations

import argparse
import sys

from vllm_refusion.viewer import command as viewer


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vllm-refusion", description="Tools for ReFusion models.")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    viewer.add_parser(subparsers)
    args = parser.parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
