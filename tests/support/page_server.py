"""A server with the live page's routes that decodes nothing: it plays synthetic traces."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from server import free_port
from synthetic_trace import synthetic_serial_trace, synthetic_trace

from vllm_refusion.decoding.params import PRESET_NAMES, PRESETS
from vllm_refusion.viewer import page
from vllm_refusion.viewer.live import Live, token_change
from vllm_refusion.viewer.play import API, PAGE, event

ABOUT: dict[str, Any] = {
    "model": "synthetic",
    "device": "no device",
    "dtype": "float32",
    "modes": ["parallel", "serial"],
    "chat": True,
    "defaults": {
        "mode": "parallel",
        "slot_size": 32,
        "block_length": 128,
        "slot_threshold": 0.9,
        "token_threshold": 0.4,
        "slot_start": "mask",
    },
    "presets": {
        name: {part: getattr(preset, part) for part in PRESET_NAMES}
        for name, preset in PRESETS.items()
    },
    "max_model_len": 8192,
    "canvas_length": 256,
    "stock": "http://stock.example:8000",
}


class PageServer:
    """Answers every prompt with ``pieces``, a pass each ``delay`` seconds.

    Attributes:
        asked: bodies of the requests so far.
        open: requests whose events are being sent.
        key: the API key that is asked for, or None.
    """

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.delay, self.open, self.key = 0.0, 0, None
        self.asked: list[dict[str, Any]] = []
        self.about = dict(ABOUT)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}{PAGE}"

    def start(self) -> None:
        config = uvicorn.Config(
            self._app(),
            "127.0.0.1",
            self.port,
            log_level="critical",
            lifespan="off",
            timeout_graceful_shutdown=0,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()

    def stop(self) -> None:
        """Breaks all connections off."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def check_key(request: Request, call_next: Any) -> Any:
            wanted = self.key and f"Bearer {self.key}"
            if (
                request.url.path == API
                and request.headers.get("Authorization") != wanted
                and wanted
            ):
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await call_next(request)

        @app.get(PAGE)
        async def play_page() -> Any:
            return HTMLResponse(page.live_html())

        @app.get(API)
        async def about() -> Any:
            return self.about

        @app.post(API)
        async def start(request: Request) -> Any:
            body = await request.json()
            self.asked.append(body)
            if body["prompt"] == "refuse me":
                return JSONResponse({"error": {"message": "prompt='refuse me' is refused"}}, 400)
            return StreamingResponse(self._events(body), media_type="text/event-stream")

        return app

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.open, left = self.open + 1, 1
        try:
            for name, data in self._changes(body):
                await asyncio.sleep(self.delay)
                if name == "end":
                    self.open, left = self.open - 1, 0
                yield event(name, data)
        finally:
            self.open -= left

    def _changes(self, body: dict[str, Any]) -> Any:
        slot_size = body.get("parameters", {}).get("slot_size", 1)
        yield "start", {"slot_size": slot_size}
        if body.get("stock"):
            for i, piece in enumerate(self.pieces):
                yield "change", token_change(i, piece, 0.01 * (i + 1))
            yield "end", {"positions": {}, "delivered": len(self.pieces), "finish_reason": "stop"}
            return
        parameters = body["parameters"]
        if parameters["mode"] == "serial":
            ahead = 0 if parameters.get("drafts") == 0 else 5
            trace = synthetic_serial_trace(self.pieces, slot_size, ahead)
        else:
            trace = synthetic_trace(self.pieces, slot_size, parameters["block_length"])
        (request,) = trace["requests"]
        texts = iter(request["output"]["pieces"])
        live = Live(slot_size, lambda t: trace["vocabulary"][str(t)], lambda _: next(texts))
        for entry in request["passes"]:
            yield "change", live.play(entry)
        yield "change", live.deliver(request["output"]["tokens"])
        yield "end", json.loads(json.dumps(live.end())) | {"finish_reason": "stop"}
