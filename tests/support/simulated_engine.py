"""An engine without vLLM: drives the decoding state of many requests pass by pass.

It schedules like the plugin's scheduler and calls layout, token statistics and transition like the
plugin's model state, so that the whole step logic can be tested alone. A request's KV cache is a
list of entries (token, RoPE position, visibility); every pass recomputes all of them.
"""

from __future__ import annotations

import random
from collections import Counter as Tally
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.speculation import CERTAIN, MAX_CHAIN, Speculation
from vllm_refusion.decoding.state import DecodeState, Field, Phase
from vllm_refusion.triton_kernels.layout_twin import ASKED
from vllm_refusion.triton_kernels.serial_twin import serial_transition_twin

# What nobody may look at: outputs before they are written, rows that are not used.
POISON = 1_000_003
MAX_STEPS = 5000


class Operations(NamedTuple):
    """The device operations of a step."""

    layout: Callable[..., None]
    token_stats: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    transition: Callable[..., None]
    serial_transition: Callable[..., None] = serial_transition_twin


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    prompt: list[int]
    params: DecodingParams
    max_tokens: int
    eos_token_id: int | None = None
    temperature: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Weather:
    """What goes wrong; chances are per request and step.

    Attributes:
        chunk: largest number of prefill tokens in a step; a random number up to it if ``ragged``.
        truncate: chance that fewer rows than the canvas has are scheduled.
        preempt: chance that a request is preempted and continues at another index.
        preempt_at: every request is preempted once when it first is in this phase.
        lose: chance that the tokens of a step are lost since its request is preempted at once.
        abort: chance that a request is aborted.
        strangers: chance that an index without a request takes part in a step.
        riders: chance that canvases take riders, of a random choice, and get rows for them.
        speculation: what rows are worth where they do; drawn anew in each step if None. With it
            they get no more rows than is guaranteed.
    """

    chunk: int = 64
    ragged: bool = False
    truncate: float = 0.0
    preempt: float = 0.0
    preempt_at: Phase | None = None
    lose: float = 0.0
    abort: float = 0.0
    strangers: float = 0.0
    riders: float = 0.0
    speculation: Speculation | None = None


@dataclass(frozen=True)
class Outcome:
    """What a request gave, in the terms of ``reference.Decoded``; the order as far as it got."""

    tokens: list[int]
    commit_order: list[int]
    passes: int


@dataclass
class _Job:
    """One request inside the engine."""

    request: Request
    index: int
    output: list[int] = field(default_factory=list)
    req: int = -1
    prefill: list[int] = field(default_factory=list)
    unfed: int = 0  # of it, as the scheduler counts
    finished: bool = False
    kv: list[tuple[int, int, list[int]]] = field(default_factory=list)
    saved: dict[str, torch.Tensor] | None = None
    preempted_once: bool = False


class SimulatedEngine:
    """Decodes requests, several per step.

    Attributes:
        preempted_in: how often a request was preempted, by phase.

    Args:
        model: a transformers causal LM whose config has a ``mask_token_id``.
        weather: disturbances, drawn from ``seed``.
        drafts: whether requests in serial mode have any.
    """

    def __init__(
        self,
        model: Any,
        operations: Operations,
        *,
        canvas_length: int = 32,
        max_response: int = 128,
        max_requests: int = 4,
        weather: Weather | None = None,
        seed: int = 0,
        drafts: bool = True,
    ) -> None:
        self.model = model
        self.drafts = drafts
        self.operations = operations
        self.weather = weather or Weather()
        self.random = random.Random(seed)
        self.prices = random.Random(seed)  # of rows of serial decoding
        self.state = DecodeState(
            max_requests, canvas_length, max_response, model.config.mask_token_id, "cpu"
        )
        self.num_computed = torch.zeros(max_requests, dtype=torch.int32)
        self.prefill_len = torch.zeros(max_requests, dtype=torch.int32)
        self.preempted_in: Tally[Phase] = Tally()
        self._free = list(range(max_requests))
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []

    def decode(self, requests: list[Request]) -> list[Outcome | None]:
        """The outcome of each request, None where it was aborted."""
        self._outcomes: list[Outcome | None] = [None] * len(requests)
        self._waiting = [_Job(request, index) for index, request in enumerate(requests)]
        for _ in range(MAX_STEPS):
            self._admit()
            self._disturb()
            if self._running:
                self._step()
            elif not self._waiting:
                return self._outcomes
        raise AssertionError(f"not decoded after {MAX_STEPS} steps: {self._running[:1]}")

    def _chance(self, chance: float) -> bool:
        return chance > 0 and self.random.random() < chance

    def _admit(self) -> None:
        while self._waiting and self._free:
            job = self._waiting.pop(0)
            request = job.request
            job.req = self._free.pop(self.random.randrange(len(self._free)))
            job.prefill = request.prompt + job.output
            job.kv = []
            job.unfed = len(job.prefill)
            self.num_computed[job.req] = 0
            delivered = request.params.whole_slots(len(job.output))
            if serial := request.params.mode == "serial":
                delivered = max(0, len(job.output) - 1)
            self.prefill_len[job.req] = len(request.prompt) + delivered
            if job.saved is not None and not serial:
                self.state.restore(job.req, job.saved, len(job.output))
            else:
                eos = () if request.eos_token_id is None else (request.eos_token_id,)
                add: Callable[..., None] = self.state.add
                more: dict[str, int] = {}
                if serial:
                    add = self.state.add_serial
                    more = {
                        "last_token": job.prefill[-1],
                        "known": len(job.output),
                        "chain_length": self.random.choice((2, 5, MAX_CHAIN)),
                        "skips_known": self._chance(0.5),
                    }
                    if not self.drafts:
                        more |= {"most_tests": 0, "chain_length": 1, "skips_known": False}
                add(
                    job.req,
                    len(request.prompt),
                    request.params,
                    request.max_tokens,
                    request.eos_token_id,
                    **more,
                    min_tokens=request.min_tokens,
                    stop_ids=sorted({*request.stop_token_ids, *eos}) if request.min_tokens else (),
                    temperature=request.temperature,
                    seed=request.seed,
                )
            self._running.append(job)

    def _disturb(self) -> None:
        for job in list(self._running):
            at = self._field(job, Field.PHASE) == self.weather.preempt_at
            if self._chance(self.weather.abort):
                self._leave(job)
            elif self._chance(self.weather.preempt) or (at and not job.preempted_once):
                self._preempt(job)

    def _preempt(self, job: _Job) -> None:
        self.preempted_in[Phase(self._field(job, Field.PHASE))] += 1
        job.preempted_once = True
        job.saved = self.state.save(job.req)
        self._leave(job)
        self._waiting.append(job)

    def _leave(self, job: _Job) -> None:
        self.state.remove(job.req)
        self._free.append(job.req)
        self._running.remove(job)

    def _field(self, job: _Job, name: Field) -> int:
        return int(self.state.ints[job.req, name])

    def _width(self, job: _Job) -> int:
        """Rows scheduled for a request, as the scheduler decides without knowing the canvas."""
        if job.unfed > 0:
            chunk = self.weather.chunk
            width = min(job.unfed, self.random.randint(1, chunk) if self.weather.ragged else chunk)
            if width == job.unfed and self._chance(self.weather.riders):
                width += self.random.randint(1, self.state.canvas_length)
            return width
        if job.request.params.mode == "serial":
            width = self._field(job, Field.CANVAS)
            least = 1 if self._chance(self.weather.truncate) else self._field(job, Field.ROWS)
            most = min(width + self.random.choice((0, 4)), self.state.canvas_length)
            return self.random.randint(min(least, width), most)
        params = job.request.params
        delivered = params.whole_slots(len(job.output))
        width = min(params.block_length, params.budget(job.request.max_tokens) - delivered)
        if self.weather.speculation is not None:
            # what is reserved at least, from the slots that are delivered on
            width = min(width, params.block_length - delivered % params.block_length)
            committed, kept = (self._field(job, field) for field in (Field.COMMITTED, Field.KEPT))
            width += params.slot_size - (committed + kept - delivered)
        elif self.weather.riders > 0:
            width = min(width + params.slot_size, self.state.canvas_length)
        if self.weather.speculation is None and self._chance(self.weather.riders):
            width = self.random.randint(width, self.state.canvas_length)
        return self.random.randint(1, width) if self._chance(self.weather.truncate) else width

    def _step(self) -> None:
        state, canvas_length = self.state, self.state.canvas_length
        batch: list[tuple[int, _Job | None, int]] = [
            (job.req, job, self._width(job)) for job in self._running
        ]
        batch += [
            (req, None, self.random.randint(0, canvas_length))
            for req in self._free
            if self._chance(self.weather.strangers)
        ]
        self.random.shuffle(batch)
        idx_mapping = torch.tensor([req for req, _, _ in batch])
        query_start_loc = _starts([width for _, _, width in batch])
        rows = int(query_start_loc[-1])

        input_ids = torch.full((rows,), POISON, dtype=torch.int32)
        slot_mappings = torch.zeros(2, rows, dtype=torch.int64)
        logit_rows = []
        for (req, job, width), start in zip(batch, query_start_loc[:-1].tolist(), strict=True):
            computed = int(self.num_computed[req])
            tokens = state.canvas_token[req, :width].int()
            prompt_rows = 0 if job is None else min(job.unfed, width)
            if prompt_rows:
                job.unfed -= prompt_rows
                prefill = job.prefill[computed : computed + prompt_rows]
                prefill += [POISON] * (prompt_rows - len(prefill))
                beyond = state.canvas_token[req, : width - prompt_rows]
                tokens = torch.cat((torch.tensor(prefill), beyond))
            input_ids[start : start + width] = tokens
            slot_mappings[:, start : start + width] = torch.arange(computed, computed + width)
            logit_rows.append(width - prompt_rows)
        logits_start = _starts(logit_rows)

        positions = torch.full((rows,), POISON, dtype=torch.int64)
        visibility = torch.full((rows, 4), POISON, dtype=torch.int32)
        asked = torch.full((ASKED, int(logits_start[-1])), POISON, dtype=torch.int32)
        self.operations.layout(
            state,
            idx_mapping,
            query_start_loc,
            logits_start,
            self.num_computed,
            input_ids,
            positions,
            visibility,
            slot_mappings,
            asked,
        )

        fed = []
        logits = torch.zeros(int(logits_start[-1]), self.model.config.vocab_size)
        for row, (_, job, _) in enumerate(batch):
            of_request = slice(int(query_start_loc[row]), int(query_start_loc[row + 1]))
            entries = list(
                zip(
                    input_ids[of_request].tolist(),
                    positions[of_request].tolist(),
                    visibility[of_request].tolist(),
                    strict=True,
                )
            )
            written = (slot_mappings[:, of_request] >= 0).all(dim=0).tolist()
            assert written == sorted(written, reverse=True), "rows in use are the first ones"
            fed.append(entries[: sum(written)])
            if job is not None and logit_rows[row] and fed[row]:
                first = int(logits_start[row])
                decoded = fed[row][len(entries) - logit_rows[row] :]
                if decoded:
                    rows_logits = self._forward(job.kv, fed[row])[-len(decoded) :]
                    logits[first : first + len(decoded)] = rows_logits

        sampled = torch.full((len(batch), canvas_length), POISON, dtype=torch.int32)
        num_sampled = torch.full((len(batch),), POISON, dtype=torch.int32)
        num_rejected = torch.full((len(batch),), POISON, dtype=torch.int32)
        batch_of_state = (
            state, idx_mapping, query_start_loc, logits_start, self.num_computed, self.prefill_len
        )  # fmt: skip
        row_request = idx_mapping.repeat_interleave(torch.tensor(logit_rows))
        picked, picked_prob, given_prob = self._statistics(logits, row_request, asked)
        results = sampled, num_sampled, num_rejected
        speculation = self._speculation()
        self.operations.transition(
            *batch_of_state,
            picked,
            picked_prob,
            given_prob,
            torch.tensor(logit_rows, dtype=torch.int32),
            *results,
            speculation,
        )
        self.operations.serial_transition(
            *batch_of_state, picked, picked_prob, *results, speculation
        )
        for row, (_, job, width) in enumerate(batch):
            count, kept = int(num_sampled[row]), width - int(num_rejected[row])
            assert count <= logit_rows[row] and kept <= len(fed[row])
            if job is None:
                assert count == kept == 0
                continue
            job.kv += fed[row][:kept]
            self.num_computed[job.req] += kept
            self._deliver(job, sampled[row, :count].tolist())

    def _speculation(self) -> Speculation:
        if not self._chance(self.weather.riders):
            prices = (CERTAIN, 0, 100, 5000, 30000)
            return Speculation(
                row_price=self.prices.choice(prices), prior=self.prices.choice((48, 1, 63))
            )
        if self.weather.speculation is not None:
            return self.weather.speculation
        free = self.random.choice((0, self.state.canvas_length, self.random.randint(0, 200)))
        price = self.prices.choice((0, 100, 5000, 30000))
        return Speculation(free, self.random.choice((0, 3, 30, 300)), price)

    def _deliver(self, job: _Job, tokens: list[int]) -> None:
        if self._chance(self.weather.lose):
            self._preempt(job)
            return
        request, stops = job.request, False
        assert not (job.finished and tokens)
        for token in tokens:
            job.output.append(token)
            stops = token in request.stop_token_ids
            if stops or token == request.eos_token_id or len(job.output) == request.max_tokens:
                job.finished = True
                break
        # An engine drops a finished request; here all is committed that would have been.
        if stops or (job.finished and self._field(job, Field.PHASE) == Phase.DONE):
            order = self.state.order[job.req, : self._field(job, Field.COMMITTED)].tolist()
            passes = self._field(job, Field.PASSES)
            self._outcomes[job.index] = Outcome(job.output, order, passes)
            self._leave(job)

    def _statistics(
        self, logits: torch.Tensor, row_request: torch.Tensor, asked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """picked, picked_prob, given_prob of the logit rows; poison where no row is in use."""
        state = self.state
        out = (
            torch.full((len(logits),), POISON, dtype=torch.int32),
            torch.full((len(logits),), torch.nan),
            torch.full((len(logits),), torch.nan),
        )
        return self.operations.token_stats(
            logits,
            row_request,
            *asked,
            temperature=state.temperature,
            seed=state.seed,
            min_tokens=state.min_tokens,
            stop_ids=state.stop_ids,
            mask_token_id=state.mask_token_id,
            out=out,
        )

    def _forward(
        self,
        kv: list[tuple[int, int, list[int]]],
        fed: list[tuple[int, int, list[int]]],
    ) -> torch.Tensor:
        """Logits [rows fed, vocabulary] of rows behind the KV entries, all computed anew."""
        entries = kv + fed
        tokens, positions, sees = zip(*entries, strict=True)
        index = torch.arange(len(entries))
        context_end, run_start, run_end, own_start = (
            torch.tensor(sees)[:, column, None] for column in range(4)
        )
        visible = (index < context_end) | ((index >= run_start) & (index < run_end))
        visible |= (index >= own_start) & (index <= index[:, None])
        assert not visible.triu(1).any() and visible.diagonal().all()
        mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            logits = self.model(
                input_ids=torch.tensor([tokens]),
                position_ids=torch.tensor([positions]),
                attention_mask=mask[None, None],
                use_cache=False,
            ).logits
        return logits[0, len(kv) :].float()


def _starts(lengths: list[int]) -> torch.Tensor:
    """[R+1] int32: where each of R runs of these lengths starts, and the end."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
