"""Passes of traced requests on their way from a worker to the servers that show them live.

The worker publishes each pass as it was copied from the device, from a thread of its own, on a
socket that only this machine and user can reach; where nobody listens it is dropped. All
descriptions are made by those who listen.
"""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import zmq
import zmq.asyncio

from vllm_refusion.decoding.trace import Copy, RawPass

MESSAGES_KEPT = 20_000  # for a listener that does not read; what comes then is dropped
HELLO_MS = 100
HELLOS = 100


class Publisher:
    """A worker's end."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="refusion-")  # of this user only
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.address = f"ipc://{folder}/passes"
        self._queue: SimpleQueue[Copy | None] = SimpleQueue()
        self._socket = zmq.Context().socket(zmq.PUB)
        self._socket.set_hwm(MESSAGES_KEPT)
        self._socket.linger = 0
        self._socket.bind(self.address)
        threading.Thread(target=self._run, name="refusion-passes", daemon=True).start()

    def send(self, copy: Copy) -> None:
        """Publishes passes once they have arrived on the host."""
        self._queue.put(copy)

    def hello(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while True:
            copy = self._queue.get()
            if copy is None:
                self._socket.send_multipart([b""])
                continue
            for recording, raw in copy.settle():
                self._socket.send_multipart([recording.request_id.encode(), *raw.to_frames()])


class Listener:
    """A server's end: hands passes to who watches their request."""

    def __init__(self) -> None:
        self._watched: dict[str, asyncio.Queue[Any]] = {}
        self._socket = zmq.asyncio.Context().socket(zmq.SUB)
        self._socket.set_hwm(MESSAGES_KEPT)
        self._socket.linger = 0
        self._socket.subscribe(b"")

    async def start(self, engine: Any) -> None:
        """Connects to the first worker of an ``AsyncLLM``.

        Raises:
            RuntimeError: nothing comes from there; it must be on this machine.
        """
        address = (await engine.collective_rpc("refusion_listen"))[0]
        self._socket.connect(address)
        for _ in range(HELLOS):
            await engine.collective_rpc("refusion_listen")
            if await self._socket.poll(HELLO_MS):
                self._task = asyncio.create_task(self._run())
                return
        raise RuntimeError(
            f"the live page hears nothing from the worker at {address}: it must run on this machine"
        )

    @contextmanager
    def watch(self, request_id: str, queue: asyncio.Queue[Any]) -> Iterator[None]:
        """Puts each ``RawPass`` of the request into ``queue`` meanwhile."""
        self._watched[request_id] = queue
        try:
            yield
        finally:
            del self._watched[request_id]

    async def _run(self) -> None:
        while True:
            name, *frames = await self._socket.recv_multipart()
            request_id = name.decode()
            if request_id not in self._watched:  # vLLM adds a random part to what it is given
                request_id = request_id.rpartition("-")[0]
            queue = self._watched.get(request_id)
            if queue is not None:
                queue.put_nowait(RawPass.from_frames(frames))
