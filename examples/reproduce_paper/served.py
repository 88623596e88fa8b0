"""A server of the OpenAI API: started here or found, and what its counters say."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

START_SECONDS = 1800  # weights may have to be fetched
STOP_SECONDS = 60
SETTLING_SECONDS = 0.5  # of counters
DECODING = ("plan", "verify", "predict", "infill_verify", "serial")  # kinds of passes


class Counts(NamedTuple):
    """Since a server's start; differences of two say what was done between them.

    Attributes:
        tokens: generated.
        seconds: added up over the requests, each from its arrival to its end.
        passes: of decoding; those of a stock model are its tokens.
    """

    tokens: float
    seconds: float
    passes: float

    def since(self, before: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


class Served:
    """A model on a server.

    Attributes:
        url: without a path.
        model: what the server calls it.
    """

    def __init__(self, url: str) -> None:
        """Raises ValueError if nothing answers there."""
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            listed = _get(f"{self.url}/v1/models").json()
        except httpx.HTTPError as error:
            raise ValueError(f"no server answers at {self.url}: {error}") from error
        self.model: str = listed["data"][0]["id"]

    def counts(self) -> Counts:
        """Once they stand still: the last step's are reported after its answers."""
        before, now = None, self._counts()
        while now != before:
            time.sleep(SETTLING_SECONDS)
            before, now = now, self._counts()
        return now

    def _counts(self) -> Counts:
        text = _get(f"{self.url}/metrics").text

        def total(name: str, labels: str = "") -> float:
            pattern = rf"^{re.escape(name)}(?:\{{([^}}]*)\}})? (\S+)$"
            found = re.findall(pattern, text, re.MULTILINE)
            return sum(float(value) for given, value in found if labels in given)

        tokens = total("vllm:generation_tokens_total")
        kinds = [total("vllm:refusion_passes_total", f'kind="{kind}"') for kind in DECODING]
        is_stock = "vllm:refusion_passes_total" not in text
        seconds = total("vllm:e2e_request_latency_seconds_sum")
        return Counts(tokens, seconds, tokens if is_stock else sum(kinds))


def _get(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False, timeout=60).raise_for_status()


@contextmanager
def server(model: str, options: Sequence[str], log: Path) -> Iterator[Served]:
    """``model`` served on a free port, with options of ``vllm serve``; what it says is in ``log``.

    Raises:
        ValueError: it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if Path(model).is_dir():
        model = str(Path(model).resolve())
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with tempfile.TemporaryDirectory() as outside, log.open("wb") as output:
        # outside: vLLM imports another package that is called as a folder of the repository is
        process = subprocess.Popen(
            command, cwd=outside, stdout=output, stderr=output, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while (served := _ready(f"http://127.0.0.1:{port}")) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ValueError(f"the server of {model} did not start: see {log}")
                time.sleep(0.5)
            yield served
        finally:
            _stop(process)


def _ready(url: str) -> Served | None:
    try:
        _get(f"{url}/health")
        return Served(url)
    except (httpx.HTTPError, ValueError):
        return None


def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
