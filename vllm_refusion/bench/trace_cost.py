"""What recording a request for the live page costs: ``python -m vllm_refusion.bench.trace_cost``.

One engine decodes the same requests again and again, in turn without and with a trace that is
published to another process, as a server's is. Prints a line of JSON for each concurrency.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_refusion.bench.environment import environment
from vllm_refusion.bench.shapes import write_checkpoints
from vllm_refusion.engine.settings import PLAY_OPTION
from vllm_refusion.files import json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="ReFusion checkpoint or mask adapter")
    what.add_argument("--shape", help="dummy weights of this shape, as of bench")
    parser.add_argument("--mode", choices=("parallel", "serial"), default="parallel")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=10, help="of each kind, after one that warms")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--engine", type=json_object, default={}, help="more options of vllm.LLM")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # steps are timed one by one
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "model": args.model,
            "skip_tokenizer_init": True,
            "max_model_len": args.input_len + args.output_len,
            "max_num_seqs": max(args.concurrency),
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": False,
            "additional_config": {PLAY_OPTION: True},
        }
        if args.shape:
            options["model"] = str(write_checkpoints(args.shape, Path(folder))["refusion"])
            options["load_format"] = "dummy"
        llm = LLM(**options | args.engine)
        with _listening(llm):
            for concurrency in args.concurrency:
                print(json.dumps(_measure(llm, args, concurrency)), flush=True)


def _measure(llm: Any, args: argparse.Namespace, concurrency: int) -> dict[str, Any]:
    """Of a step without and with traces of all requests: the least wall time, as disturbances only
    add, and the median of the processor time of all threads of this process."""
    chance, vocabulary = random.Random(0), llm.llm_engine.model_config.get_vocab_size()
    prompts = [
        chance.choices(range(3, vocabulary - 8), k=args.input_len) for _ in range(concurrency)
    ]
    wall: dict[bool, list[float]] = {False: [], True: []}
    processor: dict[bool, list[float]] = {False: [], True: []}
    for number in range(args.rounds + 1):
        for traced in (number % 2 == 0, number % 2 == 1):
            times = _round(llm, args, prompts, traced)
            if number:
                wall[traced].append(times[0])
                processor[traced].append(times[1])
    found: dict[str, Any] = {
        "device": environment()["gpu"] or "CPU",
        "model": args.shape or args.model,
        "mode": args.mode,
        "traced_requests": concurrency,
    }
    kinds: tuple[tuple[str, Any, Callable[[list[float]], float]], ...] = (
        ("wall", wall, min),
        ("processor", processor, statistics.median),
    )
    for name, times, choose in kinds:
        plain, with_trace = choose(times[False]), choose(times[True])
        found[f"{name}_ms"] = round(plain, 4)
        found[f"{name}_ms_traced"] = round(with_trace, 4)
        found[f"{name}_cost"] = round(with_trace / plain - 1, 4)
    return found


def _round(
    llm: Any, args: argparse.Namespace, prompts: list[list[int]], traced: bool
) -> tuple[float, float]:
    """Milliseconds a step takes, wall and processor time, over all steps of the requests."""
    from vllm import SamplingParams, TokensPrompt

    extra = {"mode": args.mode, "trace": traced}
    sampling = SamplingParams(
        max_tokens=args.output_len, ignore_eos=True, detokenize=False, extra_args=extra
    )
    engine, steps = llm.llm_engine, 0
    for number, prompt in enumerate(prompts):
        (rendered,) = llm.renderer.render_cmpl([TokensPrompt(prompt_token_ids=prompt)])
        engine.add_request(str(number), rendered, sampling)
    start = time.perf_counter(), time.process_time()
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
    wall, processor = time.perf_counter() - start[0], time.process_time() - start[1]
    return 1000 * wall / steps, 1000 * processor / steps


@contextmanager
def _listening(llm: Any) -> Iterator[None]:
    """Another process takes what is published."""
    address = llm.collective_rpc("refusion_listen")[0]
    context = multiprocessing.get_context("spawn")
    heard = context.Event()
    process = context.Process(target=_listen, args=(address, heard), daemon=True)
    process.start()
    while not heard.wait(0.05):
        llm.collective_rpc("refusion_listen")
    try:
        yield
    finally:
        process.kill()


def _listen(address: str, heard: Any) -> None:
    import zmq

    socket = zmq.Context().socket(zmq.SUB)
    socket.subscribe(b"")
    socket.connect(address)
    while True:
        socket.recv_multipart()
        heard.set()


if __name__ == "__main__":
    main()
