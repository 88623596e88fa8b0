"""``vllm-refusion play``: a server with the live page, for this machine unless told otherwise."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from importlib import metadata
from typing import Any

from vllm_refusion.engine.settings import PLAY_OPTION, play_options
from vllm_refusion.files import json_object

HELP = "serve a model with a page where its responses fill in live"
CONFIG = "--additional-config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="as of vllm serve: a checkpoint, or a mask adapter's folder")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--stock-url",
        metavar="URL",
        help="of a running server of the OpenAI API, whose model answers beside this one",
    )
    parser.add_argument(
        "--serve-args",
        type=shlex.split,
        default=[],
        metavar="ARGS",
        help="more arguments of vllm serve, in quotes",
    )


def run(args: argparse.Namespace) -> None:
    """Becomes the server.

    Raises:
        ValueError: an argument does not fit.
    """
    command = serve_command(args)
    print(f"The page will be at http://{args.host}:{args.port}/refusion/play", flush=True)
    os.execv(command[0], command)


def serve_command(args: argparse.Namespace) -> list[str]:
    """``vllm serve`` with the page, or on a build without that command its equal."""
    rest: list[str] = []
    config: dict[str, Any] = {}
    given = iter(args.serve_args)
    for word in given:
        name, equals, value = word.partition("=")
        if name != CONFIG:
            rest.append(word)
            continue
        try:
            config |= json_object(value if equals else next(given, ""))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--serve-args {CONFIG}: {error}") from error
    config[PLAY_OPTION] = True if args.stock_url is None else {"stock_url": args.stock_url}
    play_options(config)  # checks it
    address = ["--host", args.host, "--port", str(args.port)]
    return [*_vllm_serve(), args.model, *address, CONFIG, json.dumps(config), *rest]


def _vllm_serve() -> list[str]:
    # vLLM's command asks for the version of a distribution of its name, which its CPU build lacks
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
