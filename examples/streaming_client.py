"""Stream an answer over HTTP with the OpenAI client: tokens arrive slot by slot, in order.

Without --url this starts a server of the tiny model on a free port, and stops it at the end.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from openai import OpenAI

FOLDER = Path(__file__).resolve().parent
START_SECONDS = 300


@contextmanager
def own_server() -> Iterator[str]:
    """A server of the tiny model; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(FOLDER / "refusion-tiny"), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "1024", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "256M"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    with tempfile.TemporaryDirectory() as outside:  # vLLM imports another "triton_kernels"
        server = subprocess.Popen(command, cwd=outside)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not healthy(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the server did not start")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def healthy(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


def stream(url: str, question: str) -> None:
    """Prints the answer as it comes, with the time and size of each piece at the end."""
    local = httpx.Client(trust_env=False)
    client = OpenAI(base_url=url, api_key="none", http_client=local)
    model = client.models.list().data[0].id
    start = time.perf_counter()
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=256,
        stream=True,
        extra_body={"vllm_xargs": {"preset": "gpqa"}},
    )
    arrivals = []
    for chunk in chunks:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            print(text, end="", flush=True)
            arrivals.append((time.perf_counter() - start, len(text)))
    print("\n\n" + "\n".join(f"{seconds:6.2f} s  {size} characters" for seconds, size in arrivals))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server, such as http://localhost:8000/v1")
    parser.add_argument("--question", help="default: the first of the word problems")
    args = parser.parse_args()
    question = args.question
    if question is None:
        with open(FOLDER / "dev_problems.jsonl") as lines:
            question = json.loads(lines.readline())["query"]
    if args.url:
        stream(args.url, question)
        return
    with own_server() as url:
        stream(url, question)


if __name__ == "__main__":
    main()
