"""Traces: what decoding did in every pass of a request, told from the device state.

An engine records only if it was started with ``additional_config={"refusion_trace": True}``, and
then only requests with ``trace`` in their ``extra_args``. The recorder wraps the transition: for
traced requests it copies their state to the host before and after, which waits for the device.
The time that takes is kept out of the passes' durations. ``docs/trace.md`` describes the format.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm_refusion.decoding.state import DecodeState, Field, Phase, Status

MAX_KEPT = 256  # ended requests whose recordings wait to be taken; older ones are dropped


@dataclass(frozen=True)
class Snapshot:
    """One request's part of ``DecodeState`` on the host."""

    ints: list[int]
    status: list[int]
    token: list[int]
    confidence: list[float]
    origin: list[int]
    canvas_row: list[int]
    rider_row: list[int]
    response: list[int]
    order: list[int]

    @classmethod
    def of(cls, state: DecodeState, req: int) -> Snapshot:
        names = [field.name for field in fields(cls)]
        return cls(*(getattr(state, name)[req].tolist() for name in names))

    def field(self, name: Field) -> int:
        return self.ints[name]

    def in_block(self, status: Status) -> list[int]:
        """Response positions of the current block in that state."""
        start = self.field(Field.BLOCK_START)
        return [start + p for p, found in enumerate(self.status) if found == status]

    def picks(self, positions: Sequence[int]) -> list[list[Any]]:
        """[position, token, probability of the pick] of positions of the current block."""
        start = self.field(Field.BLOCK_START)
        return [[p, self.token[p - start], _rounded(self.confidence[p - start])] for p in positions]


@dataclass(frozen=True)
class Rows:
    """What was fed of a canvas, and its statistics (``token_stats``) by row."""

    fed: int
    picked_prob: list[float]
    given_prob: list[float]


def describe_pass(before: Snapshot, after: Snapshot, rows: Rows) -> dict[str, Any]:
    """What one pass did to a request, from its state before and after.

    A pass does what its phase says, and beyond that what its riders made possible. What took place
    shows in the state after it: proposals of an infill that goes on, drafts where a plan followed.
    """
    phase, next_phase = before.field(Field.PHASE), after.field(Field.PHASE)
    committed = after.order[before.field(Field.COMMITTED) : after.field(Field.COMMITTED)]
    operations: list[dict[str, Any]] = []
    first_plan_row = None
    if phase == Phase.REPLAY:
        operations.append({"kind": "replay"})
    elif phase == Phase.PREFILL:
        operations.append({"kind": "prefill"})
        if before.field(Field.RESUME) == Phase.START and next_phase == Phase.VERIFY:
            first_plan_row = 0
    elif phase == Phase.PLAN:
        first_plan_row = 0
    else:
        tests = _tests(before, after, rows, committed)
        if tests:
            kind = "verify" if phase == Phase.VERIFY else "infill_verify"
            operations.append({"kind": kind, "tests": tests})
        if next_phase == Phase.INFILL and (proposed := _proposed(before, after)):
            operations.append({"kind": "predict", "proposals": after.picks(proposed)})
        if next_phase == Phase.VERIFY:  # a plan rode behind the last slot that was committed
            block, size = before.field(Field.BLOCK_START), before.field(Field.SLOT_SIZE)
            first_plan_row = before.rider_row[(committed[-1] - block) // size * size]
    if first_plan_row is not None:
        operations.append(_plan(after, rows, first_plan_row))
    described: dict[str, Any] = {"operations": operations}
    if phase in (Phase.PLAN, Phase.VERIFY, Phase.INFILL) and rows.fed > before.field(Field.ROWS):
        described["rider_rows"] = rows.fed - before.field(Field.ROWS)
    if committed:
        described["committed"] = [[position, after.response[position]] for position in committed]
    if after.field(Field.LIMIT) < before.field(Field.LIMIT):
        described["end"] = after.field(Field.LIMIT)
    return described


def _tests(
    before: Snapshot, after: Snapshot, rows: Rows, committed: Sequence[int]
) -> list[list[Any]]:
    """[position, token, probability or None, accepted] of the tokens that were verified."""
    block = before.field(Field.BLOCK_START)
    stays = after.field(Field.BLOCK_START) == block
    accepted = {*committed, *(after.in_block(Status.ACCEPTED) if stays else ())}
    tests = []
    for position in before.in_block(Status.CHOSEN):
        row = before.canvas_row[position - block]
        if row < 0:
            continue
        untested = before.origin[position - block] == position - block
        probability = None if untested else _rounded(rows.given_prob[row - 1])
        token = before.token[position - block]
        tests.append([position, token, probability, position in accepted])
    return tests


def _proposed(before: Snapshot, after: Snapshot) -> list[int]:
    """Positions with a new proposal. Others wait for their test."""
    start = after.field(Field.BLOCK_START)
    return [
        position
        for position in after.in_block(Status.CHOSEN)
        if before.status[position - start] == Status.BLANK
        or before.origin[position - start] != after.origin[position - start]
    ]


def _plan(after: Snapshot, rows: Rows, first_row: int) -> dict[str, Any]:
    """The plan that led to the state ``after``, its masks being the rows from ``first_row`` on."""
    size = after.field(Field.SLOT_SIZE)
    chosen = after.in_block(Status.CHOSEN)
    planned = sorted(chosen + after.in_block(Status.MASKED))
    slots = [
        {
            "start": start,
            "certainty": _rounded(rows.picked_prob[first_row + index * size]),
            "chosen": start in chosen,
        }
        for index, start in enumerate(planned[::size])
    ]
    return {"kind": "plan", "slots": slots, "drafts": after.picks(chosen)}


def _rounded(probability: float | None) -> float | None:
    if probability is None:
        return None
    # JSON has no NaN, which passes no threshold either
    return 0.0 if math.isnan(probability) else round(probability, 6)


class Recorder:
    """Recordings of the traced requests of one engine."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state
        self._running: dict[int, dict[str, Any]] = {}  # by request index
        self._by_id: dict[str, dict[str, Any]] = {}
        self._overhead = 0.0  # seconds spent here

    def add(self, req: int, request_id: str, prompt: Sequence[int]) -> None:
        """A traced request starts at ``req``, or goes on there after a preemption."""
        recording = self._by_id.setdefault(
            request_id,
            {"id": request_id, "prompt": list(prompt), "passes": [], "last": self._clock()},
        )
        self._running[req] = recording

    def remove(self, req: int) -> None:
        """The request at ``req``, traced or not, leaves."""
        self._running.pop(req, None)
        for request_id in list(self._by_id)[: max(0, len(self._by_id) - MAX_KEPT)]:
            del self._by_id[request_id]

    def take(self) -> list[dict[str, Any]]:
        """All recordings, in the order their requests came; they are forgotten here.

        Returns:
            dicts of ``id``, ``prompt``, ``parameters``, ``mask_token_id``, ``passes``.
        """
        taken = [
            {key: value for key, value in recording.items() if key != "last"}
            for recording in self._by_id.values()
            if recording["passes"]
        ]
        self._by_id.clear()
        self._running.clear()
        return taken

    def around(self, transition: Callable[..., None]) -> Callable[..., None]:
        """``transition`` (see ``transition_twin``), recording what it does."""
        signature = inspect.signature(transition)

        def recorded(*args: Any, **kwargs: Any) -> None:
            reqs = signature.bind(*args, **kwargs).arguments["idx_mapping"]
            if not self._running:
                return transition(*args, **kwargs)
            traced = [(row, req) for row, req in enumerate(reqs.tolist()) if req in self._running]
            start = time.perf_counter()  # tolist() has waited for the forward pass
            before = [Snapshot.of(self._state, req) for _, req in traced]
            self._overhead += time.perf_counter() - start
            transition(*args, **kwargs)
            if self._state.device.type == "cuda":
                torch.cuda.synchronize(self._state.device)
            end = self._clock()
            start = time.perf_counter()
            arguments = signature.bind(*args, **kwargs).arguments
            for (row, req), earlier in zip(traced, before):
                self._append(req, row, earlier, arguments, end)
            self._overhead += time.perf_counter() - start

        return recorded

    def _clock(self) -> float:
        """Seconds, without those spent here."""
        return time.perf_counter() - self._overhead

    def _append(
        self, req: int, row: int, before: Snapshot, arguments: Mapping[str, Any], end: float
    ) -> None:
        recording = self._running[req]
        phase = before.field(Field.PHASE)
        if phase in (Phase.IDLE, Phase.DONE):
            return
        if "parameters" not in recording:
            recording["parameters"] = self._parameters(req, before)
            recording["mask_token_id"] = self._state.mask_token_id
        query_len = _length(arguments["query_start_loc"], row)
        decodes = phase not in (Phase.PREFILL, Phase.REPLAY)
        described: dict[str, Any]
        # the end of a prompt may be followed by masks, which alone have statistics
        first, end_row = arguments["logits_start"][row : row + 2].tolist()
        if decodes and end_row - first < max(query_len, before.field(Field.ROWS)):
            described, rows_fed = {"operations": [{"kind": "idle"}]}, 0
        else:
            rows_fed = min(query_len, before.field(Field.CANVAS)) if decodes else query_len
            window = slice(first, min(end_row, first + rows_fed))
            names = ("picked_prob", "given_prob")
            rows = Rows(rows_fed, *(arguments[name][window].tolist() for name in names))
            described = describe_pass(before, Snapshot.of(self._state, req), rows)
        # the clock stands still while recordings are written
        seconds = end - recording["last"]
        recording["last"] = end
        recording["passes"].append(
            {
                "seconds": round(seconds, 6),
                "rows": rows_fed,
                **described,
                "delivered": int(arguments["num_sampled"][row]),
            }
        )

    def _parameters(self, req: int, snapshot: Snapshot) -> dict[str, Any]:
        state = self._state
        values = {
            name: _rounded(float(getattr(state, name)[req]))
            for name in ("slot_threshold", "token_threshold", "temperature")
        }
        return {
            "slot_size": snapshot.field(Field.SLOT_SIZE),
            "block_length": snapshot.field(Field.BLOCK_LENGTH),
            **values,
            "seed": int(state.seed[req]),
            "max_tokens": snapshot.field(Field.MAX_TOKENS),
        }


def _length(starts: torch.Tensor, row: int) -> int:
    start, end = starts[row : row + 2].tolist()
    return end - start
