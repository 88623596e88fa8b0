"""The subcommand ``bench``: settings from arguments, one child process per side, the report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_refusion.bench import report
from vllm_refusion.bench.settings import Preset, Settings, read_prompts
from vllm_refusion.bench.shapes import (
    SHAPES,
    shape_config,
    write_checkpoints,
    write_random_adapter,
)
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.engine.settings import BENCHMARK_ENV
from vllm_refusion.files import json_object, read_json, write_text
from vllm_refusion.stock import stock_environment

HELP = "Measure stock autoregressive decoding and ReFusion on the same vLLM."
DEFAULT_PRESET = "32/128/0.9/0.4"
# slot and token chances that give the plain schedule the published tokens/s over those of Qwen3-8B
# as tokens per pass, see docs/performance.md
CALIBRATED = {
    "32/128/0.9/0.4": (0.25, 0.802),
    "8/16/0.8/0.2": (0.25, 0.866),
    "16/128/0.9/0.4": (0.25, 0.632),
}
CANVAS_REPLAY = (0.5, 0.5)
LAST_LINES = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments; imports nothing heavy."""
    add = parser.add_argument
    add("--model", help="ReFusion checkpoint, or a mask adapter's folder")
    add("--stock-model", help="checkpoint of the stock side (default: --model, or its base)")
    add(
        "--adapter",
        help="mask adapter on the ReFusion side: a folder, or with --shape random:RANK",
    )
    add(
        "--shape",
        help=f"dummy weights and replayed acceptance instead: {', '.join(SHAPES)}, "
        "or a config.json with a mask_token_id",
    )
    add(
        "--sides",
        type=_words,
        default=("stock", "refusion"),
        help="of stock, plain (ReFusion without fused passes), refusion; default stock,refusion",
    )
    add(
        "--presets",
        nargs="+",
        type=parse_preset,
        metavar="SLOT/BLOCK/SLOT_THRESHOLD/TOKEN_THRESHOLD[/correct][@SLOT,TOKEN[,SHAPE[,FIRST]]]",
        help=f"ReFusion's decoding parameters (default {DEFAULT_PRESET}); behind @ the chances "
        "that replayed acceptance draws from",
    )
    add("--concurrency", type=_integers, default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    add(
        "--canvas",
        type=_integers,
        default=[],
        help="also measure steps that feed exactly this many tokens a request, e.g. 32,128",
    )
    add("--canvas-concurrency", type=_integers, default=[1])
    add("--canvas-output-len", type=int, default=256)
    add("--requests", type=int, help="per level (default: one wave, at low concurrency four)")
    add(
        "--moving-load",
        type=_phases,
        default=[],
        metavar="REQUESTS:SECONDS,...",
        help="behind the levels: keep so many requests in flight for so long, then so many, ...",
    )
    add(
        "--second-turn",
        type=int,
        default=0,
        metavar="CONVERSATIONS",
        help="measure first tokens of conversations of two turns instead, one after the other",
    )
    add("--input-len", type=int, default=128, help="tokens of a random prompt")
    add("--output-len", type=int, default=256)
    add("--warmup-tokens", type=int, default=32, help="output tokens of each level's warm-up")
    add("--prompts", help="data file with prompts (prompt or query) instead of random token ids")
    add("--stop-at-eos", action="store_true", help="let responses end before --output-len")
    add("--dtype", default="auto")
    add("--load-format", default="auto", help="of --model; --shape implies dummy")
    add("--max-num-batched-tokens", type=int, help="default: a canvas for every request")
    add("--gpu-memory-utilization", type=float)
    add("--tensor-parallel-size", type=int, default=1)
    add("--quantization", help="e.g. fp8")
    add(
        "--fast-start",
        action="store_true",
        help="FULL CUDA graphs without torch.compile on both sides: starts in seconds",
    )
    add("--speculative-config", type=json_object, help="JSON, for the stock side")
    add(
        "--engine-args",
        type=json_object,
        default={},
        help="JSON: vLLM engine arguments of both sides",
    )
    add("--stock-args", type=json_object, default={}, help="JSON: more of them for the stock side")
    add(
        "--refusion-args",
        type=json_object,
        default={},
        help="JSON: more of them for the ReFusion side",
    )
    add("--seed", type=int, default=0)
    add("--profile", metavar="DIR", help="write torch profiles of a few steps there")
    add("--profile-level", type=int, default=1, help="concurrency of the profiled steps")
    add("--base-url", help="measure a running ReFusion server instead, with `vllm bench serve`")
    add("--stock-base-url", help="measure a running stock server")
    add("--served-model", help="name of the model at the servers (default: --model)")
    add("--tokenizer", help="for the servers' random prompts (default: the model's)")
    add("--out", default="bench-results", help="folder for JSON, logs, table and plot")
    add("--name", help="name of the JSON file (default: the time)")
    add("--verbose", action="store_true", help="show the engines' logs, not only in files")


def parse_preset(text: str) -> Preset:
    """``32/128/0.9/0.4`` with ``@slot,token[,shape[,first]]`` behind it or not.

    With ``/correct`` before the ``@``, infills correct. In serial mode ``serial/8``, with
    ``@token[,shape]``.
    """
    values, _, chances = text.partition("@")
    try:
        if values.startswith("serial/"):
            return _serial_preset(int(values.removeprefix("serial/")), chances)
        slot, block, slot_threshold, token_threshold, *infill = values.split("/")
        if infill not in ([], ["correct"]):
            raise ValueError("behind the thresholds there may be /correct")
        names = ("slot", "token", "shape", "first")
        numbers = [float(chance) for chance in chances.split(",")] if chances else None
        if numbers is not None and not 2 <= len(numbers) <= len(names):
            raise ValueError("behind @ there must be two to four numbers")
        return Preset(
            int(slot),
            int(block),
            float(slot_threshold),
            float(token_threshold),
            None if numbers is None else dict(zip(names, numbers)),
            infill=infill[0] if infill else "propose",
        )
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no preset: {error}") from error


def _serial_preset(slot_size: int, chances: str) -> Preset:
    numbers = [float(chance) for chance in chances.split(",")] if chances else []
    if len(numbers) > 2:
        raise ValueError("behind @ there must be one or two numbers")
    drawn = dict(zip(("token", "shape"), numbers)) | {"slot": 1.0} if numbers else None
    defaults = DecodingParams(slot_size, 128 // slot_size * slot_size or slot_size)
    thresholds = (defaults.slot_threshold, defaults.token_threshold)
    return Preset(slot_size, defaults.block_length, *thresholds, drawn, "serial")


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _phases(text: str) -> list[tuple[int, float]]:
    try:
        pairs = [phase.split(":") for phase in text.split(",")]
        return [(int(requests), float(seconds)) for requests, seconds in pairs]
    except ValueError as error:
        message = f"{text!r}: allowed are phases REQUESTS:SECONDS, e.g. 1:3,64:4,1:3"
        raise argparse.ArgumentTypeError(message) from error


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def settings_from(arguments: argparse.Namespace, folder: Path) -> Settings:
    """The settings of an offline run; writes the checkpoints of a shape into ``folder``.

    Raises:
        ValueError: arguments contradict each other; says which.
    """
    if (arguments.model is None) == (arguments.shape is None):
        raise ValueError("give either --model (real weights) or --shape (dummy weights).")
    load_format = arguments.load_format
    if arguments.shape is not None:
        models = {
            side: str(path) for side, path in write_checkpoints(arguments.shape, folder).items()
        }
        load_format = "dummy"
    else:
        stock = arguments.stock_model or _base_of(arguments.model)
        models = {"refusion": arguments.model, "stock": stock}
    adapter = None
    if arguments.adapter is not None:
        if arguments.shape is not None:
            models["refusion"] = models["stock"]
        adapter = _adapter(arguments.adapter, arguments.shape, models["refusion"], folder)
    models["plain"] = models["refusion"]
    dummy = load_format == "dummy"
    if dummy and arguments.prompts:
        raise ValueError("--prompts needs real weights: with dummy ones there is no tokenizer.")
    if arguments.prompts:
        read_prompts(arguments.prompts)  # refused here rather than when an engine has started
    presets = [
        _with_chances(preset, dummy)
        for preset in arguments.presets or [parse_preset(DEFAULT_PRESET)]
    ]
    for canvas in arguments.canvas:
        chances = dict(zip(("slot", "token"), CANVAS_REPLAY)) if dummy else None
        presets.append(Preset(canvas, canvas, 0.9, 0.4, chances, canvas=True))
    others = [preset.name for preset in presets if preset.mode != "serial"]
    if adapter is not None and others:
        raise ValueError(f"--presets {others[0]}: with --adapter allowed are serial/SLOT.")
    both = arguments.engine_args
    return Settings(
        models=models,
        presets=presets,
        sides=arguments.sides,
        adapter=adapter,
        shape=arguments.shape,
        concurrency=arguments.concurrency,
        canvas_concurrency=arguments.canvas_concurrency if arguments.canvas else [1],
        requests=arguments.requests,
        phases=arguments.moving_load,
        conversations=arguments.second_turn,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        canvas_output_len=arguments.canvas_output_len,
        warmup_tokens=arguments.warmup_tokens,
        prompts=arguments.prompts and str(Path(arguments.prompts).resolve()),
        stop_at_eos=arguments.stop_at_eos,
        dtype=arguments.dtype,
        load_format=load_format,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        tensor_parallel_size=arguments.tensor_parallel_size,
        quantization=arguments.quantization,
        fast_start=arguments.fast_start,
        speculative_config=arguments.speculative_config,
        engine_args={
            "stock": both | arguments.stock_args,
            "plain": both | arguments.refusion_args,
            "refusion": both | arguments.refusion_args,
        },
        seed=arguments.seed,
        profile=arguments.profile and str(Path(arguments.profile).resolve()),
        profile_level=arguments.profile_level,
    )


def _base_of(model: str) -> str:
    """The base of a mask adapter; any other model itself."""
    from vllm_refusion.adapters import find_base, is_adapter, read_adapter

    return find_base(read_adapter(model)) if is_adapter(model) else model


def _adapter(named: str, shape: str | None, base: str, folder: Path) -> str:
    """The folder that --adapter names; a random one is written."""
    rank = named.removeprefix("random:")
    if rank == named:
        return str(Path(named).resolve())
    if shape is None or not rank.isdecimal() or int(rank) < 1:
        raise ValueError(f"--adapter {named}: allowed is a folder, or with --shape random:RANK.")
    target = folder / f"random-{rank}"
    import torch

    config = shape_config(shape)
    write_random_adapter(config, base, target, int(rank), dtype=torch.bfloat16, size=0.02)
    return str(target)


def _with_chances(preset: Preset, dummy: bool) -> Preset:
    if not dummy:
        if preset.chances is not None:
            raise ValueError(f"--presets {preset.name}: acceptance is replayed with --shape only.")
        return preset
    if preset.chances is not None:
        return preset
    if preset.name not in CALIBRATED:
        chances = "0.8" if preset.mode == "serial" else "0.25,0.8"
        raise ValueError(
            f"--presets {preset.name}: dummy weights need acceptance to draw from, e.g. "
            f"{preset.name}@{chances}; calibrated are {', '.join(CALIBRATED)}."
        )
    return replace(preset, chances=dict(zip(("slot", "token"), CALIBRATED[preset.name])))


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmark; 1 if a side failed, after reporting what the others measured."""
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    name = arguments.name or time.strftime("bench-%Y%m%d-%H%M%S")
    result: dict[str, Any] = {"format": 1, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.base_url or arguments.stock_base_url:
            from vllm_refusion.bench.server import run_servers

            presets = arguments.presets or [parse_preset(DEFAULT_PRESET)]
            result |= run_servers(arguments, presets, Path(folder), out / f"{name}.log")
        else:
            settings = settings_from(arguments, Path(folder))
            described = settings.to_json()
            if settings.shape is not None:
                described["models"] = {}  # a folder that will be gone
            result |= {"kind": "offline", "settings": described, "sides": []}
            result["bf16_tflops"] = bf16_tflops(Path(folder))
            for side in settings.sides:
                log = out / f"{name}-{side}.log"
                for measured in run_side(settings, side, Path(folder), log, arguments.verbose):
                    others = [other for other in result["sides"] if other["side"] != side]
                    result["sides"] = [*others, measured]
                    _write(out / f"{name}.json", result)  # what a run that is cut off leaves
    target = out / f"{name}.json"
    _write(target, result)
    print(report.table([result]))
    report.write(out / name, [result])
    print(f"wrote {target}")
    failed = [side for side in result["sides"] if side["error"] is not None]
    for side in failed:
        print(f"{side['side']} failed: {side['error']}", file=sys.stderr)
    return 1 if failed else 0


def _write(target: Path, result: dict[str, Any]) -> None:
    write_text(target, json.dumps(result, indent=1) + "\n")


def bf16_tflops(folder: Path) -> float | None:
    """See ``machine``; None without a GPU."""
    command = [sys.executable, "-P", "-m", "vllm_refusion.bench.machine"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ended.returncode:
        print(f"the GPU's bf16 rate is unknown: {ended.stderr[-500:]}", file=sys.stderr)
        return None
    return json.loads(ended.stdout.splitlines()[-1])


def run_side(
    settings: Settings, side: str, folder: Path, log: Path, verbose: bool
) -> Iterator[dict[str, Any]]:
    """What a child process has measured so far, again with each level; complete at last.

    ``error`` is None in the last one, or says how the child ended.
    """
    settings_file, result_file = folder / f"{side}-settings.json", folder / f"{side}.json"
    write_text(settings_file, json.dumps(settings.to_json()))
    # -P: a folder named triton_kernels in the working directory would shadow a package of vLLM's
    command = [sys.executable, "-P", "-m", "vllm_refusion.bench.child"]
    command += [side, str(settings_file), str(result_file)]
    last: deque[str] = deque(maxlen=LAST_LINES)

    def measured(error: str | None) -> dict[str, Any]:
        result: dict[str, Any] = {"side": side, "levels": []}
        if result_file.exists():
            result = read_json(result_file)
            if settings.shape is not None:
                result["engine_args"]["model"] = settings.shape
        return result | {"error": error}

    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            cwd=folder,
            env=child_environment(side),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                last.append(line.rstrip())
                if line.startswith("bench:"):
                    yield measured("not finished")
                if verbose or line.startswith("bench:"):
                    print(line.rstrip(), flush=True)
        except BaseException:
            process.terminate()
            raise
    error = None
    if process.returncode:
        error = f"exit status {process.returncode}, see {log.name}"
        print(f"{side} ended with {error}; the last lines:", *last, sep="\n  ")
    yield measured(error)


def child_environment(side: str) -> dict[str, str]:
    """Stock vLLM runs without this plugin, as if it were not installed."""
    if side == "stock":
        return stock_environment()
    return dict(os.environ, PYTHONUNBUFFERED="1", **{BENCHMARK_ENV: "1"})
