"""Soak: minutes of mixed load on one server of its own, every answer compared with its like alone.

    python tests/support/soak.py --minutes 5

Starts ``python -m vllm.entrypoints.openai.api_server`` in a temporary folder and needs nothing but
what vLLM installs. Requests of both modes, some with penalties, limits, grammars or one of two LoRA
adapters, are mixed. First each distinct request is sent alone and its answer kept. Then, until the
time is up, bursts of them arrive, streamed and not; some clients hang up in mid-answer. Everything
that finishes must equal the answer kept, token for token. The time is cut into windows; at the end
of each the server is idle, no request may be left, all KV pages and decoding states must be free,
and memory is read: see ``leaks``.

vLLM's LoRA kernels for GPUs take 16-bit models only: there, run it once with ``--without-lora`` and
once with ``--dtype bfloat16``, where answers that differ are counted and no fault: batches of
another size round differently.
The figures are printed as one JSON object; the exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from loras import write_lora

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
START_SECONDS = 600
REQUEST_SECONDS = 300  # an answer that takes longer counts as starved
WINDOWS = 8  # of the load, after each of which memory is read
WARM = 3  # windows that leaks are not looked for in: all paths allocate what they keep
# What may be added in a window before it counts as a leak: readings of an idle process differ by a
# MB, those of its Python objects by one or two.
SPARE_BYTES, SPARE_OBJECTS = 2 * 2**20, 10
DECODING_PASSES = ("plan", "verify", "predict", "infill_verify", "serial")
DECODING = [
    {"slot_size": 4, "block_length": 16, "slot_threshold": 0.6, "token_threshold": 0.3},
    {"slot_size": 8, "block_length": 32},
    {"slot_size": 16, "block_length": 128, "token_threshold": 0.2},
    {"slot_size": 32, "block_length": 128, "slot_threshold": 0.8, "infill": "correct"},
    {"slot_size": 8, "mode": "serial"},
    {"slot_size": 32, "mode": "serial"},
]
PENALTIES: list[dict[str, Any]] = [  # of serial mode
    {},
    {"repetition_penalty": 1.2},
    {"frequency_penalty": 0.5, "presence_penalty": -0.3, "prompt_logprobs": 1},
    {"bad_words": ["the", "of the", "will be a"], "presence_penalty": 0.5},
]
LORAS = ("first", "second")  # random adapters, the models of a third of the requests
# of requests in serial mode
CONSTRAINTS: list[dict[str, Any]] = [
    {"regex": r"(The|A) (boy|girl) has [0-9]{1,3} apples(, [a-z ]{2,30}){0,4}\."},
    {"choice": ["yes", "no", "maybe not"]},
    {
        "json": {
            "type": "object",
            "properties": {
                "number_of_apples": {"type": "integer", "minimum": 0, "maximum": 999},
                "explanation": {"type": "string", "maxLength": 60},
            },
            "required": ["number_of_apples", "explanation"],
        }
    },
    {"json_object": True},
]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "min_tokens": 12},
    {"temperature": 0, "ignore_eos": True},
    {"temperature": 0, "logit_bias": {"226": 1.5}, "logprobs": 2},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
    {"temperature": 0, "stop": ["."]},
]


def make_requests(count: int, draw: random.Random, loras: Sequence[str]) -> list[dict[str, Any]]:
    """Distinct bodies for the completions endpoint, of all kinds and lengths."""
    lines = (EXAMPLES / "dev_problems.jsonl").read_text().splitlines()
    questions = [json.loads(line)["query"] for line in lines]
    bodies = []
    for i in range(count):
        body = {
            "prompt": " ".join(draw.choices(questions, k=draw.choice([1, 1, 1, 2, 4]))),
            "max_tokens": draw.choice([1, 7, 32, 60, 100, 150, 200]),
            "seed": draw.randrange(2**31),
            "vllm_xargs": DECODING[i % len(DECODING)],
            "return_token_ids": True,
            **SAMPLING[i // len(DECODING) % len(SAMPLING)],
        }
        if "mode" in body["vllm_xargs"]:
            body |= PENALTIES[i // len(DECODING) % len(PENALTIES)]
            if draw.random() < 0.5:
                body["structured_outputs"] = draw.choice(CONSTRAINTS)
        if draw.random() < 1 / 3 and loras:
            body["model"] = draw.choice(loras)
        body["min_tokens"] = min(body.get("min_tokens", 0), body["max_tokens"])
        bodies.append(body)
    return bodies


@dataclass
class Figures:
    """What happened."""

    finished: int = 0
    wrong: int = 0
    failed: int = 0
    hung_up: int = 0
    starved: int = 0
    output_tokens: int = 0
    longest_wait_s: float = 0.0  # to the first token; the whole answer if not streamed
    longest_answer_s: float = 0.0
    examples: list[str] = field(default_factory=list)


class Soak:
    """Sends requests and compares their answers."""

    def __init__(self, client: httpx.AsyncClient, bodies: list[dict], draw: random.Random) -> None:
        self.client, self.bodies, self.draw = client, bodies, draw
        self.expected: list[list[int]] = []
        self.figures = Figures()

    async def learn(self) -> None:
        """Sends every distinct request alone."""
        for body in self.bodies:
            response = await self.client.post("/v1/completions", json=body)
            response.raise_for_status()
            self.expected.append(response.json()["choices"][0]["token_ids"])

    async def one(self, number: int) -> None:
        """One request of a random kind of client."""
        # vLLM does not stream scores of prompts
        streams = self.draw.random() < 0.5 and "prompt_logprobs" not in self.bodies[number]
        stay = self.draw.random() * 2 if self.draw.random() < 0.2 else None
        started = time.monotonic()
        first = None
        try:
            async with asyncio.timeout(stay):
                if streams:
                    tokens, first = await self._stream(number)
                else:
                    tokens = await self._plain(number)
        except (TimeoutError, httpx.ReadTimeout):
            if stay is not None:
                self.figures.hung_up += 1
            else:
                self.figures.starved += 1
            return
        except (httpx.HTTPError, KeyError, ValueError) as error:
            self.figures.failed += 1
            self.figures.examples.append(f"{self.bodies[number]}: {error!r}")
            return
        done = time.monotonic()
        self.figures.finished += 1
        self.figures.output_tokens += len(tokens)
        self.figures.longest_answer_s = max(self.figures.longest_answer_s, done - started)
        wait = (first or done) - started
        self.figures.longest_wait_s = max(self.figures.longest_wait_s, wait)
        if tokens != self.expected[number]:
            self.figures.wrong += 1
            self.figures.examples.append(
                f"{self.bodies[number]}: {tokens} instead of {self.expected[number]}"
            )

    async def _plain(self, number: int) -> list[int]:
        response = await self.client.post("/v1/completions", json=self.bodies[number])
        response.raise_for_status()
        return response.json()["choices"][0]["token_ids"]

    async def _stream(self, number: int) -> tuple[list[int], float | None]:
        tokens: list[int] = []
        first = None
        body = self.bodies[number] | {"stream": True}
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                (choice,) = json.loads(line[6:])["choices"]
                if choice["token_ids"]:
                    first = first or time.monotonic()
                    tokens += choice["token_ids"]
        return tokens, first

    async def load(self, seconds: float, clients: int) -> None:
        """Bursts of requests, at most ``clients`` at once, for that long; waits for the last."""
        until = time.monotonic() + seconds
        running: set[asyncio.Task] = set()
        while time.monotonic() < until:
            for _ in range(self.draw.choice([1, 2, clients // 4, clients])):
                if len(running) >= clients:
                    break
                number = self.draw.randrange(len(self.bodies))
                task = asyncio.create_task(self.one(number))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.sleep(self.draw.choice([0.0, 0.05, 0.3]))
            if len(running) >= clients:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*running)

    async def counters(self) -> dict[str, float]:
        """vLLM's and our metrics by name, those of passes by name and kind; once they are current.

        What the labels tell apart otherwise is summed.
        """
        await asyncio.sleep(3 * float(os.environ.get("VLLM_LOG_STATS_INTERVAL", 1)))
        text = (await self.client.get("/metrics")).text
        values: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("vllm:"):
                name, value = line.rsplit(" ", 1)
                name, _, labels = name.partition("{")
                if 'kind="' in labels:
                    name += " " + labels.split('kind="')[1].split('"')[0]
                values[name] = values.get(name, 0.0) + float(value)
        return values

    async def held(self) -> dict[str, int]:
        """What the first worker holds, see ``worker.WorkerExtension.refusion_held``."""
        response = await self.client.post("/collective_rpc", json={"method": "refusion_held"})
        response.raise_for_status()
        return response.json()["results"][0]


@dataclass
class Reading:
    """Of an idle server.

    Attributes:
        requests: sent so far.
        sizes: bytes by process; bytes on the device and Python objects of the worker.
        held: what the worker keeps of requests, by kind.
    """

    requests: int
    sizes: dict[str, int]
    held: dict[str, int]

    @classmethod
    async def of(cls, soak: Soak, server: psutil.Process) -> Reading:
        figures = soak.figures
        sent = figures.finished + figures.failed + figures.hung_up + figures.starved
        held = await soak.held()
        sizes = {"server": server.memory_info().rss}
        for process in server.children(recursive=True):
            sizes[f"{process.name()} {process.pid}"] = process.memory_info().rss
        for name in ("device_bytes", "objects"):
            sizes[name] = held.pop(name)
        return cls(sent, sizes, held)


def growth(values: Sequence[float]) -> float:
    """From one value to the next: the median. A single step, as when a cache doubles, is none."""
    return median(last - first for first, last in pairwise(values))


def leaks(readings: Sequence[Reading]) -> list[str]:
    """What an idle server keeps of requests, and what keeps growing once it is warm."""
    found = [f"{count} {kind} left" for kind, count in readings[-1].held.items() if count]
    warm = readings[WARM:]
    for name in warm[0].sizes if len(warm) > 1 else ():
        grown = growth([reading.sizes.get(name, 0) for reading in warm])
        if grown > (SPARE_OBJECTS if name == "objects" else SPARE_BYTES):
            found.append(f"{name} grows by {grown:.0f} a window")
    return found


def memory_figures(readings: Sequence[Reading]) -> dict[str, Any]:
    """The readings by name, in MB but for objects, and growth per 1,000 requests once warm."""
    warm = readings[WARM:]
    requests = growth([reading.requests for reading in warm]) if len(warm) > 1 else 0
    read, grown = {}, {}
    for name in readings[0].sizes:
        unit = 1 if name == "objects" else 2**20
        values = [reading.sizes.get(name, 0) / unit for reading in readings]
        read[name] = [round(value) for value in values]
        if requests:
            grown[name] = round(growth(values[WARM:]) / requests * 1000, 1)
    return {"memory_mb": read, "grown_per_1000_requests": grown, "held": readings[-1].held}


async def soak(url: str, process: subprocess.Popen, options: argparse.Namespace) -> dict[str, Any]:
    """The whole run; after every window what is known by then goes to ``options.output``."""
    draw = random.Random(options.seed)
    # connections that the server, after 5 s, is not about to close
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
    async with httpx.AsyncClient(
        base_url=url, timeout=REQUEST_SECONDS, limits=limits, trust_env=False
    ) as client:
        await ready(client, process)
        made = Soak(client, make_requests(options.requests, draw, options.loras), draw)
        await made.learn()
        before = await made.counters()
        server = psutil.Process(process.pid)
        readings = [await Reading.of(made, server)]
        seconds = 0.0
        for _ in range(WINDOWS):
            started = time.monotonic()
            await made.load(60.0 * options.minutes / WINDOWS, options.clients)
            seconds += time.monotonic() - started
            after = await made.counters()
            readings.append(await Reading.of(made, server))
            grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
            result = {
                **vars(made.figures),
                "seconds": round(seconds, 1),
                "windows": len(readings) - 1,
                "distinct_requests": len(made.bodies),
                "kinds": kinds(made.bodies),
                "clients": options.clients,
                "output_tokens_per_s": round(made.figures.output_tokens / seconds, 1),
                "tokens_per_forward": round(tokens_per_forward(grown), 2),
                "preemptions": grown["vllm:num_preemptions_total"],
                "requests_left": after["vllm:num_requests_running"]
                + after["vllm:num_requests_waiting"],
                "kv_cache_usage_left": after["vllm:kv_cache_usage_perc"],
                **memory_figures(readings),
                "leaks": leaks(readings),
            }
            if options.output:
                Path(options.output).write_text(json.dumps(result, indent=1))
    return result


def tokens_per_forward(grown: dict[str, float]) -> float:
    """Tokens delivered over forward passes, prompts and replays excluded: algorithm section 5."""
    passes = sum(grown.get(f"vllm:refusion_passes_total {kind}", 0.0) for kind in DECODING_PASSES)
    return grown.get("vllm:refusion_tokens_total", 0.0) / max(1.0, passes)


async def ready(client: httpx.AsyncClient, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            if (await client.get("/health")).is_success:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.3)
    raise TimeoutError(f"the server was not ready after {START_SECONDS} s")


def kinds(bodies: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many requests are of each kind; one may be of several."""
    serial = ["mode" in body["vllm_xargs"] for body in bodies]
    penalties = {name for some in PENALTIES for name in some} - {"prompt_logprobs"}
    return {
        "serial": sum(serial),
        "parallel": len(bodies) - sum(serial),
        "with a grammar": sum("structured_outputs" in body for body in bodies),
        "with penalties": sum(bool(penalties & body.keys()) for body in bodies),
        "with LoRA": sum("model" in body for body in bodies),
    }


def start(options: argparse.Namespace, folder: str) -> tuple[subprocess.Popen, str]:
    model = Path(options.model).resolve()
    loras = [
        f"{name}={write_lora(Path(folder) / name, model, seed)}"
        for seed, name in enumerate(options.loras)
    ]
    if loras:
        loras = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", *loras]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--dtype", options.dtype),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"),
        *("--no-enable-log-requests", "--disable-uvicorn-access-log"),
        *loras,
        *options.server_args,
    ]
    environment = dict(os.environ)
    environment.setdefault("VLLM_LOG_STATS_INTERVAL", "1")
    environment.setdefault("TRITON_F32_DEFAULT", "ieee")
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /collective_rpc
    # What grows must be held by somebody. Large tensors of a CPU go back to the system at once, and
    # oneDNN keeps less than its 1024 compiled matrix products, of which each number of rows in a
    # step of vLLM's CPU build wants its own: hundreds of MB, stock models included.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    log = open(options.log, "w") if options.log else subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, stdout=log, stderr=log
    )
    return process, f"http://127.0.0.1:{port}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EXAMPLES / "refusion-tiny")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--requests", type=int, default=64, help="distinct requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--without-lora", dest="loras", action="store_const", const=(), default=LORAS
    )
    parser.add_argument("--output", help="file for the figures, written after every window")
    parser.add_argument("--log", help="file for what the server writes")
    parser.add_argument("server_args", nargs="*", help="behind --: further options of the server")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # stops the server, too
    with tempfile.TemporaryDirectory() as folder:  # outside the tree, see the Makefile
        process, url = start(options, folder)
        try:
            result = asyncio.run(soak(url, process, options))
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    examples = result.pop("examples")
    print(json.dumps(result, indent=1))
    for example in examples[:5]:
        print(example)
    faults = {
        "wrong answers": result["wrong"] if options.dtype == "float32" else 0,
        "failed requests": result["failed"],
        "starved requests": result["starved"],
        "requests left": result["requests_left"],
        "KV pages left": result["kv_cache_usage_left"],
        "leaks": result["leaks"],
        "nothing finished": not result["finished"],
    }
    bad = [name for name, fault in faults.items() if fault]
    print(f"FAILED: {', '.join(bad)}" if bad else "passed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
