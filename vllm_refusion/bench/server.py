"""Levels of concurrency against running servers, measured by ``vllm bench serve``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_refusion.backbones import published
from vllm_refusion.bench.environment import environment, gpu_memory_mib
from vllm_refusion.bench.settings import Preset
from vllm_refusion.files import read_json

# The CPU build of vLLM has no working `vllm` command, so its module is run.
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
# figure here -> field of vLLM's result
FIELDS = {
    "requests_done": "completed",
    "output_tokens": "total_output_tokens",
    "prompt_tokens": "total_input_tokens",
    "wall_s": "duration",
    "tokens_per_s": "output_throughput",
    "ttft_ms": "mean_ttft_ms",
    "ttft_ms_p50": "median_ttft_ms",
    "ttft_ms_p99": "p99_ttft_ms",
    "gap_ms_p50": "median_itl_ms",
    "gap_ms_p99": "p99_itl_ms",
    "time_per_token_ms": "mean_tpot_ms",
}


def run_servers(
    arguments: argparse.Namespace, presets: list[Preset], folder: Path, log: Path
) -> dict[str, Any]:
    """The result of all levels on the servers named in the arguments.

    Raises:
        ValueError: no model name.
    """
    model = arguments.served_model or arguments.model
    if model is None:
        raise ValueError("--base-url needs --served-model, or --model.")
    settings = {
        "shape": None,
        "models": {"served": model},
        "dtype": "as served",
        **{name: getattr(arguments, name) for name in ("input_len", "output_len", "concurrency")},
        "requests": arguments.requests,
        "stop_at_eos": arguments.stop_at_eos,
    }
    urls = {"stock": arguments.stock_base_url, "refusion": arguments.base_url}
    sides = []
    log.write_text("")
    for side, url in urls.items():
        if url is None:
            continue
        result: dict[str, Any] = {
            "side": side,
            "environment": environment(),  # of this machine, the client
            "levels": [],
            "error": None,
        }
        sides.append(result)
        for preset in presets if side == "refusion" else [None]:
            for concurrency in arguments.concurrency:
                error = _measure(
                    arguments, side, url, model, preset, concurrency, folder, log, result
                )
                if error is not None:
                    result["error"] = error
                    break
    return {"kind": "server", "settings": settings, "sides": sides}


def serve_command(
    arguments: argparse.Namespace, url: str, model: str, preset: Preset | None, concurrency: int
) -> list[str]:
    """Arguments of ``vllm bench serve`` for one level, where to put the result left out."""
    count = arguments.requests or max(concurrency, min(4 * concurrency, 16))
    body: dict[str, Any] = {"temperature": 0.0}
    if preset is not None:
        body["vllm_xargs"] = preset.parameters
    command = ["--backend", "openai", "--base-url", url, "--model", model]
    command += ["--tokenizer", published(arguments.tokenizer or model)]
    command += ["--dataset-name", "random", "--random-input-len", str(arguments.input_len)]
    command += ["--random-output-len", str(arguments.output_len), "--seed", str(arguments.seed)]
    command += ["--num-prompts", str(count), "--max-concurrency", str(concurrency)]
    command += ["--num-warmups", str(concurrency), "--percentile-metrics", "ttft,tpot,itl"]
    command += ["--extra-body", json.dumps(body), "--disable-tqdm"]
    return command + ([] if arguments.stop_at_eos else ["--ignore-eos"])


def _measure(
    arguments: argparse.Namespace,
    side: str,
    url: str,
    model: str,
    preset: Preset | None,
    concurrency: int,
    folder: Path,
    log: Path,
    result: dict[str, Any],
) -> str | None:
    """Appends one level to ``result``; an error if ``vllm bench serve`` failed."""
    label = f"{side}{'' if preset is None else ' ' + preset.name} x{concurrency}"
    options = serve_command(arguments, url, model, preset, concurrency)
    options += ["--save-result", "--result-dir", str(folder), "--result-filename", "level.json"]
    target = folder / "level.json"
    target.unlink(missing_ok=True)
    with log.open("a") as file:
        code = subprocess.run(
            [sys.executable, "-P", "-c", BENCH_SERVE, *options],
            cwd=folder,
            env=dict(os.environ, PYTHONUNBUFFERED="1"),
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if code or not target.exists():
        error = f"{label}: vllm bench serve ended with exit status {code}, see {log.name}"
        print(error, *log.read_text().splitlines()[-40:], sep="\n  ")
        return error
    found = read_json(target)
    level = {name: found.get(field) for name, field in FIELDS.items()}
    level |= {
        "side": side,
        "preset": None if preset is None else preset.name,
        "canvas": None,
        "acceptance": "-" if preset is None else "as served",
        "concurrency": concurrency,
        "requests": found.get("num_prompts"),
        "max_tokens": arguments.output_len,
        "gpu_memory_mib": gpu_memory_mib(),
    }
    if level["requests_done"] != level["requests"]:
        return f"{label}: {level['requests_done']} of {level['requests']} requests succeeded"
    result["levels"].append(level)
    print(f"bench: {label}: {level['tokens_per_s']:.0f} tokens/s", flush=True)
    return None
