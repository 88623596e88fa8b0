"""Traces: what decoding did in every pass of a request, told from the device state.

An engine records only if it was started with ``additional_config={"refusion_trace": True}``, and
then only requests with ``trace`` in their ``extra_args``. The recorder wraps the transition, which
notes in the state what it does (``PositionField``): for traced requests that is copied to the host,
which waits for the device. The time that takes is kept out of the passes' durations.
``docs/trace.md`` describes the format.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm_refusion.decoding.params import INFILLS
from vllm_refusion.decoding.state import DecodeState, Field, Phase, Status

MAX_KEPT = 256  # ended requests whose recordings wait to be taken; older ones are dropped


@dataclass(frozen=True)
class Snapshot:
    """One request's part of ``DecodeState`` on the host, after a pass."""

    ints: list[int]
    status: list[int]
    token: list[int]
    confidence: list[float]
    pick_row: list[int]
    tested_token: list[int]
    test_row: list[int]
    stays: list[int]
    response: list[int]
    order: list[int]

    @classmethod
    def of(cls, state: DecodeState, req: int) -> Snapshot:
        names = [field.name for field in fields(cls)]
        return cls(*(getattr(state, name)[req].tolist() for name in names))


@dataclass(frozen=True)
class Rows:
    """What was fed of a canvas, and its statistics (``token_stats``) by row."""

    fed: int
    picked_prob: list[float]
    given_prob: list[float]


def describe_pass(before: Sequence[int], after: Snapshot, rows: Rows) -> dict[str, Any]:
    """What one pass did to a request.

    Args:
        before: its ``ints`` before the pass: what the pass was to do.
    """
    phase = before[Field.PHASE]
    operations: list[dict[str, Any]] = []
    if phase in (Phase.PREFILL, Phase.REPLAY):
        operations.append({"kind": Phase(phase).name.lower()})
    tests, corrections, picks = _tests(after, rows), _corrections(after), _picks(after, rows)
    predicts = any(operation["kind"] == "predict" for operation in picks)
    # a pass that only feeds corrections tests nothing
    if tests or (phase == Phase.INFILL and not predicts):
        kind = "verify" if phase == Phase.VERIFY else "infill_verify"
        operation = {"kind": kind, "tests": tests}
        operations.append(operation | ({"corrections": corrections} if corrections else {}))
    operations += picks
    described: dict[str, Any] = {"operations": operations}
    if phase in (Phase.PLAN, Phase.VERIFY, Phase.INFILL) and rows.fed > before[Field.ROWS]:
        described["rider_rows"] = rows.fed - before[Field.ROWS]
    committed = after.order[before[Field.COMMITTED] : after.ints[Field.COMMITTED]]
    if committed:
        described["committed"] = [[position, after.response[position]] for position in committed]
    if after.ints[Field.LIMIT] < before[Field.LIMIT]:
        described["end"] = after.ints[Field.LIMIT]
    return described


def _tests(after: Snapshot, rows: Rows) -> list[list[Any]]:
    """[position, token, probability or None, accepted] of the tokens that were verified."""
    block = after.ints[Field.TEST_BLOCK]
    verified = zip(after.tested_token, after.test_row, after.stays, strict=True)
    return [
        [block + p, token, None if row < 0 else _rounded(rows.given_prob[row]), bool(stays)]
        for p, (token, row, stays) in enumerate(verified)
        if token >= 0
    ]


def _corrections(after: Snapshot) -> list[list[Any]]:
    """[position, token, probability] of the tokens accepted in place of those that failed."""
    block = after.ints[Field.BLOCK_START]
    return [
        [block + p, after.token[p], _rounded(after.confidence[p])]
        for p, row in enumerate(after.pick_row)
        if row >= 0 and after.status[p] == Status.ACCEPTED
    ]


def _picks(after: Snapshot, rows: Rows) -> list[dict[str, Any]]:
    """The plan or the predict that the pass made, if any."""
    block, size = after.ints[Field.BLOCK_START], after.ints[Field.SLOT_SIZE]
    # what was picked for a slot that an end-of-sequence token dropped is nothing
    kept = (Status.CHOSEN, Status.MASKED)
    picked = {
        p: row for p, row in enumerate(after.pick_row) if row >= 0 and after.status[p] in kept
    }
    taken = [
        [block + p, after.token[p], _rounded(after.confidence[p])]
        for p in picked
        if after.status[p] == Status.CHOSEN
    ]
    if after.ints[Field.PHASE] != Phase.VERIFY:
        return [{"kind": "predict", "proposals": taken}] if taken else []
    slots = [
        {
            "start": block + p,
            "certainty": _rounded(rows.picked_prob[picked[p]]),
            "chosen": after.status[p] == Status.CHOSEN,
        }
        for p in list(picked)[::size]
    ]
    return [{"kind": "plan", "slots": slots, "drafts": taken}] if slots else []


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
            before = [self._state.ints[req].tolist() for _, req in traced]
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
        self, req: int, row: int, before: list[int], arguments: Mapping[str, Any], end: float
    ) -> None:
        recording = self._running[req]
        phase = before[Field.PHASE]
        if phase in (Phase.IDLE, Phase.DONE):
            return
        if "parameters" not in recording:
            recording["parameters"] = self._parameters(req, before)
            recording["mask_token_id"] = self._state.mask_token_id
        after = Snapshot.of(self._state, req)
        decodes = phase not in (Phase.PREFILL, Phase.REPLAY)
        described: dict[str, Any]
        if decodes and after.ints[Field.PASSES] == before[Field.PASSES]:
            described, rows_fed = {"operations": [{"kind": "idle"}]}, 0
        else:
            rows_fed = _length(arguments["query_start_loc"], row)
            rows_fed = min(rows_fed, before[Field.CANVAS]) if decodes else rows_fed
            # the end of a prompt may be followed by masks, which alone have statistics
            first, end_row = arguments["logits_start"][row : row + 2].tolist()
            window = slice(first, min(end_row, first + rows_fed))
            names = ("picked_prob", "given_prob")
            rows = Rows(rows_fed, *(arguments[name][window].tolist() for name in names))
            described = describe_pass(before, after, rows)
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

    def _parameters(self, req: int, ints: list[int]) -> dict[str, Any]:
        state = self._state
        values = {
            name: _rounded(float(getattr(state, name)[req]))
            for name in ("slot_threshold", "token_threshold", "temperature")
        }
        return {
            "slot_size": ints[Field.SLOT_SIZE],
            "block_length": ints[Field.BLOCK_LENGTH],
            **values,
            "infill": INFILLS[ints[Field.CORRECTS]],
            "seed": int(state.seed[req]),
            "max_tokens": ints[Field.MAX_TOKENS],
        }


def _length(starts: torch.Tensor, row: int) -> int:
    start, end = starts[row : row + 2].tolist()
    return end - start
