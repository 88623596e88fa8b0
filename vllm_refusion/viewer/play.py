"""The live page of a server: its routes, which vLLM attaches to its own application.

``/refusion/play`` is the page, which holds no secret; ``/v1/refusion/play`` says what the server is
and streams requests as server-sent events. vLLM guards all under ``/v1`` with ``--api-key``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from vllm import SamplingParams, TokensPrompt
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from vllm_refusion.backbones import is_refusion
from vllm_refusion.decoding.params import PRESET_NAMES, PRESETS
from vllm_refusion.decoding.trace import RawPass, describe
from vllm_refusion.engine.settings import (
    PLAY_OPTION,
    PlayOptions,
    canvas_length,
    has_adapter,
    play_options,
    server_defaults,
)
from vllm_refusion.engine.trace_channel import Listener
from vllm_refusion.viewer import page
from vllm_refusion.viewer.live import Live, token_change
from vllm_refusion.viewer.record import encode, piecewise

PAGE, API = "/refusion/play", "/v1/refusion/play"
STOCK_KEY_ENV = "REFUSION_STOCK_API_KEY"  # of the other server
LAST_PASSES_S = 2.0  # how long passes may come later than the output
ELSEWHERE = "The live page answers this machine only, unless the server is started with --host."


class Ask(BaseModel):
    """What the page asks to be decoded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    max_tokens: int = Field(512, ge=1)
    temperature: float = Field(0.0, ge=0)
    seed: int | None = None
    raw: bool = False  # no chat template
    stock: bool = False  # on the other server
    parameters: dict[str, Any] = {}  # what vllm_xargs may hold


class PlayEndpoints:
    """What vLLM calls an endpoint plugin."""

    name = "refusion-play"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        options = play_options(app.state.args.additional_config)
        if options is not None:
            app.include_router(_router())
            app.state.refusion_play = None

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        options = play_options(args.additional_config)
        if options is None:
            return
        if not is_refusion(engine_client.model_config):
            raise ValueError(
                f"additional_config has {PLAY_OPTION}, but {engine_client.model_config.model} is "
                "no ReFusion model: allowed is to leave it out."
            )
        listener = Listener()
        await listener.start(engine_client)
        state.refusion_play = Play(engine_client, options, listener)


class Play:
    """Requests whose decoding is watched."""

    def __init__(self, engine: Any, options: PlayOptions, listener: Listener) -> None:
        self._engine, self._options, self._listener = engine, options, listener
        self._defaults = server_defaults(engine.model_config)
        self._tokenizer = engine.get_tokenizer()

    def about(self) -> dict[str, Any]:
        config = self._engine.model_config
        return {
            "model": config.served_model_name,
            "device": current_platform.get_device_name(),
            "dtype": str(config.dtype).removeprefix("torch."),
            "modes": ["serial"] if has_adapter(config) else ["parallel", "serial"],
            "chat": self._tokenizer.chat_template is not None,
            "defaults": vars(self._defaults),
            "presets": {
                name: {part: getattr(preset, part) for part in PRESET_NAMES}
                for name, preset in PRESETS.items()
            },
            "max_model_len": config.max_model_len,
            "canvas_length": canvas_length(self._engine.vllm_config),
            "stock": self._options.stock_url,
        }

    def start(self, ask: Ask) -> AsyncIterator[str]:
        """The events of a request, which is admitted now.

        Raises:
            VLLMValidationError: a parameter is not supported; names it.
        """
        if ask.stock:
            return self._stock(ask)
        sampling = SamplingParams(
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            extra_args={**ask.parameters, "trace": True},
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = encode(self._tokenizer, ask.prompt, not ask.raw)
        (rendered,) = self._engine.renderer.render_cmpl([TokensPrompt(prompt_token_ids=prompt)])
        request_id = f"refusion-play-{uuid.uuid4().hex}"
        outputs = self._engine.generate(rendered, sampling, request_id)
        params = self._defaults.of_request(ask.parameters)
        return self._watch(request_id, outputs, params.slot_size, len(prompt))

    async def _watch(
        self, request_id: str, outputs: AsyncIterator[Any], slot_size: int, prompt: int
    ) -> AsyncIterator[str]:
        news: asyncio.Queue[Any] = asyncio.Queue()
        live = Live(
            slot_size, lambda token: self._tokenizer.decode([token]), piecewise(self._tokenizer)
        )
        with self._listener.watch(request_id, news):
            pump = asyncio.create_task(_pump(outputs, news))
            try:
                yield event("start", {"prompt_tokens": prompt, "slot_size": slot_size})
                async for line in _follow(news, live):
                    yield line
            finally:  # the page is gone, or all is told: aborts what still runs
                pump.cancel()
                with suppress(asyncio.CancelledError):
                    await pump

    async def _stock(self, ask: Ask) -> AsyncIterator[str]:
        """The same of another server's model, token by token as they arrive from there."""
        key = os.environ.get(STOCK_KEY_ENV)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self._options.stock_url}/v1"
        try:
            async with httpx.AsyncClient(headers=headers, timeout=60) as client:
                found = await client.get(f"{url}/models")
                found.raise_for_status()
                model = found.json()["data"][0]["id"]
                yield event("start", {"model": model, "slot_size": 1})
                async for line in _stream_stock(client, url, model, ask):
                    yield line
        except (httpx.HTTPError, ValueError, LookupError) as error:
            message = f"{self._options.stock_url}: {error or type(error).__name__}"
            yield event("error", {"message": message})


async def _pump(outputs: AsyncIterator[Any], news: asyncio.Queue[Any]) -> None:
    """Puts outputs among the news, at last what ended them: None or an error."""
    try:
        async for output in outputs:
            news.put_nowait(output.outputs[0])
        news.put_nowait(None)
    except Exception as error:  # noqa: BLE001 - told to the page, whatever it is
        news.put_nowait(error)


async def _follow(news: asyncio.Queue[Any], live: Live) -> AsyncIterator[str]:
    """Events of passes and outputs as they come, until both are complete."""
    made, tokens, finish, ended = 0, 0, None, False
    while not (ended and live.delivered >= tokens):
        try:
            new = await asyncio.wait_for(news.get(), LAST_PASSES_S if ended else None)
        except TimeoutError:
            break
        if isinstance(new, RawPass):
            lost, made = new.number - made, new.number + 1
            if lost:
                yield event("error", {"message": f"{lost} passes were lost: the page was too slow"})
                return
            entry = describe(new)
            if entry is not None:
                yield event("change", live.play(entry))
        elif isinstance(new, Exception):
            yield event("error", {"message": str(new) or type(new).__name__})
            return
        elif new is None:
            ended = True
        else:
            tokens, finish = tokens + len(new.token_ids), new.finish_reason or finish
            yield event("change", live.deliver(new.token_ids))
    yield event("end", live.end() | {"finish_reason": finish})


async def _stream_stock(
    client: httpx.AsyncClient, url: str, model: str, ask: Ask
) -> AsyncIterator[str]:
    message = {"prompt": ask.prompt}
    if not ask.raw:
        message = {"messages": [{"role": "user", "content": ask.prompt}]}  # type: ignore[dict-item]
    body = {
        "model": model,
        "stream": True,
        "return_token_ids": True,
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        **({} if ask.seed is None else {"seed": ask.seed}),
        **message,
    }
    path = "completions" if ask.raw else "chat/completions"
    position, start = 0, time.perf_counter()
    async with client.stream("POST", f"{url}/{path}", json=body) as response:
        if response.is_error:
            raise ValueError((await response.aread()).decode(errors="replace")[:500])
        finish = None
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            took = time.perf_counter() - start
            for choice in json.loads(line[6:]).get("choices", ()):
                piece = (choice.get("delta") or choice).get("content", choice.get("text")) or ""
                finish = choice.get("finish_reason") or finish
                count = len(choice["token_ids"]) if choice.get("token_ids") else int(bool(piece))
                for number in range(count):
                    shown = "" if number else piece
                    yield event("change", token_change(position, shown, took))
                    position += 1
    done = {"positions": {}, "delivered": position, "forward_passes": position}
    yield event("end", done | {"finish_reason": finish})


def event(name: str, data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _router() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get(PAGE)
    async def play_page(request: Request) -> Response:
        if not _may_ask(request):
            return _refusal(403, ELSEWHERE)
        return HTMLResponse(page.live_html(), headers={"Cache-Control": "no-store"})

    @router.get(API)
    async def about(request: Request) -> Response:
        if not _may_ask(request):
            return _refusal(403, ELSEWHERE)
        return JSONResponse(request.app.state.refusion_play.about())

    @router.post(API)
    async def start(request: Request, ask: Ask) -> Response:
        if not _may_ask(request):
            return _refusal(403, ELSEWHERE)
        play: Play = request.app.state.refusion_play
        if ask.stock and play.about()["stock"] is None:
            return _refusal(400, "stock=True is not supported: the server knows no other one.")
        try:
            events = play.start(ask)
        except (VLLMValidationError, ValueError) as error:
            return _refusal(400, str(error))
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    return router


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)


def _may_ask(request: Request) -> bool:
    """Without --host vLLM listens to everyone; this page then answers its own machine only."""
    if request.app.state.args.host is not None:
        return True
    try:
        address = ipaddress.ip_address(request.client.host if request.client else "")
    except ValueError:  # a Unix socket has no address
        return True
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
