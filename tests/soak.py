"""Soak: minutes of mixed load on one server of its own, every answer compared with its like alone.

    python tests/soak.py --minutes 5

Starts ``python -m vllm.entrypoints.openai.api_server`` in a temporary folder and needs nothing but
what vLLM installs. First each distinct request is sent alone and its answer kept. Then, until the
time is up, bursts of them arrive, streamed and not; some clients hang up in mid-answer. Everything
that finishes must equal the answer kept, token for token (start it in float32; on a GPU set
TRITON_F32_DEFAULT=ieee). At the end no request may be left and all KV pages must be free again. The
figures are printed as one JSON object; the exit status is 1 if anything is wrong.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
START_SECONDS = 600
REQUEST_SECONDS = 300  # an answer that takes longer counts as starved
DECODING = [
    {"slot_size": 4, "block_length": 16, "slot_threshold": 0.6, "token_threshold": 0.3},
    {"slot_size": 8, "block_length": 32},
    {"slot_size": 16, "block_length": 128, "token_threshold": 0.2},
    {"slot_size": 32, "block_length": 128, "slot_threshold": 0.8},
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


def make_requests(count: int, draw: random.Random) -> list[dict[str, Any]]:
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
        kind = self.draw.choice(["plain", "plain", "stream", "stream", "hang up"])
        stay = self.draw.random() * 2
        started = time.monotonic()
        try:
            if kind == "plain":
                tokens, first = await self._plain(number), None
            elif kind == "stream":
                tokens, first = await self._stream(number)
            else:
                await asyncio.wait_for(self._stream(number), stay)
                return
        except (TimeoutError, httpx.ReadTimeout):
            if kind == "hang up":
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

    async def gauges(self) -> dict[str, float]:
        """Sums of vLLM's and our metrics by name."""
        text = (await self.client.get("/metrics")).text
        values: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("vllm:"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
        return values


def resident_mb(process: subprocess.Popen) -> tuple[int, int]:
    """Memory of the HTTP server, and of the processes of the engine."""
    server = psutil.Process(process.pid)
    engine = sum(part.memory_info().rss for part in server.children(recursive=True))
    return server.memory_info().rss >> 20, engine >> 20


async def soak(url: str, process: subprocess.Popen, options: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(options.seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=REQUEST_SECONDS, limits=limits, trust_env=False
    ) as client:
        await ready(client, process)
        made = Soak(client, make_requests(options.requests, draw), draw)
        await made.learn()
        # warm: every path has allocated what it keeps
        await made.load(min(20.0, 6.0 * options.minutes), options.clients)
        made.figures = Figures()
        before = await made.gauges()
        memory = [resident_mb(process)]
        started = time.monotonic()
        for _ in range(4):
            await made.load(15.0 * options.minutes, options.clients)
            memory.append(resident_mb(process))
        seconds = time.monotonic() - started
        await asyncio.sleep(3 * float(os.environ.get("VLLM_LOG_STATS_INTERVAL", 1)))
        after = await made.gauges()
    figures = made.figures

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    left = sum(after[f"vllm:num_requests_{state}"] for state in ("running", "waiting"))
    return vars(figures) | {
        "seconds": round(seconds, 1),
        "distinct_requests": len(made.bodies),
        "clients": options.clients,
        "output_tokens_per_s": round(figures.output_tokens / seconds, 1),
        "tokens_per_forward": round(
            grown("vllm:refusion_tokens_total") / max(1.0, grown("vllm:refusion_passes_total")),
            2,
        ),
        "preemptions": grown("vllm:num_preemptions_total"),
        "requests_left": left,
        "kv_cache_usage_left": after["vllm:kv_cache_usage_perc"],
        "memory_mb": [list(pair) for pair in memory],
    }


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


def start(options: argparse.Namespace, folder: str) -> tuple[subprocess.Popen, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(Path(options.model).resolve()), "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"),
        *("--no-enable-log-requests", "--disable-uvicorn-access-log"),
        *options.server_args,
    ]
    environment = dict(os.environ)
    environment.setdefault("VLLM_LOG_STATS_INTERVAL", "1")
    environment.setdefault("TRITON_F32_DEFAULT", "ieee")
    # Large tensors of a CPU go back to the system at once, so that more of what is left is held.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
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
    parser.add_argument("--log", help="file for what the server writes")
    parser.add_argument("server_args", nargs="*", help="behind --: further options of the server")
    options = parser.parse_args()
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
    # From the second reading on: a CPU's KV pages take memory when they are first written.
    _, first, *_, last = result["memory_mb"]
    faults = {
        "wrong answers": result["wrong"],
        "failed requests": result["failed"],
        "starved requests": result["starved"],
        "requests left": result["requests_left"],
        "KV pages left": result["kv_cache_usage_left"],
        "memory grown by more than 5 %": any(b > 1.05 * a for a, b in zip(first, last)),
        "nothing finished": not result["finished"],
    }
    bad = [name for name, fault in faults.items() if fault]
    print(f"FAILED: {', '.join(bad)}" if bad else "passed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
