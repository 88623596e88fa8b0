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
from dataclasses import dataclass
from typing import Any

import torch

from vllm_refusion.decoding import DecodeState, Field, Phase, Status

MAX_KEPT = 256  # ended requests whose recordings wait to be taken; older ones are dropped


@dataclass(frozen=True)
class Snapshot:
    """One request's part of ``DecodeState`` on the host."""

    ints: list[int]
    status: list[int]
    row_position: list[int]
    row_token: list[int]
    response: list[int]
    order: list[int]

    @classmethod
    def of(cls, state: DecodeState, slot: int) -> Snapshot:
        tensors = (
            state.ints,
            state.status,
            state.row_position,
            state.canvas_token,
            state.response,
            state.order,
        )
        return cls(*(tensor[slot].tolist() for tensor in tensors))

    def field(self, name: Field) -> int:
        return self.ints[name]

    def status_at(self, position: int) -> int:
        """Status of a response position, of any block."""
        in_block = position - self.field(Field.BLOCK_START)
        if in_block < 0:
            return Status.COMMITTED
        ahead = in_block >= self.field(Field.BLOCK_LENGTH)
        return Status.MASKED if ahead else self.status[in_block]


@dataclass(frozen=True)
class Rows:
    """Statistics of a request's canvas rows, see ``token_stats``."""

    picked: list[int]
    picked_prob: list[float]
    given_prob: list[float]


def describe_pass(
    before: Snapshot, after: Snapshot, rows: Rows, mask_token_id: int
) -> dict[str, Any]:
    """What one pass did to a request, from its state before and after.

    Operations are told by what was fed, whatever the schedule: masks at masked positions are a
    plan, masks at chosen ones a prediction, tokens at chosen positions are under verification. So
    a pass may carry several operations.
    """
    phase = before.field(Field.PHASE)
    if phase in (Phase.PREFILL, Phase.REPLAY):
        return {"operations": [{"kind": "replay" if phase == Phase.REPLAY else "prefill"}]}
    size = before.field(Field.SLOT_SIZE)
    done, now = before.field(Field.COMMITTED), after.field(Field.COMMITTED)
    committed = after.order[done:now]
    fed = [
        (row, position, before.row_token[row], before.status_at(position))
        for row, position in enumerate(before.row_position[: before.field(Field.ROWS)])
    ]
    same_block = before.field(Field.BLOCK_START) == after.field(Field.BLOCK_START)

    def accepted(position: int) -> bool:
        in_place = same_block and after.status_at(position) == Status.ACCEPTED
        return in_place or position in committed

    def chosen(position: int) -> bool:
        """Drafted by this pass: now waits for verification, or (fused) is already past it."""
        return after.status_at(position) in (Status.CHOSEN, Status.ACCEPTED)

    def picks(of: Sequence[tuple[int, int, int, int]]) -> list[list[Any]]:
        return [[p, rows.picked[r], _rounded(rows.picked_prob[r])] for r, p, _, _ in of]

    masks = [entry for entry in fed if entry[2] == mask_token_id]
    planned = [entry for entry in masks if entry[3] == Status.MASKED]
    predicted = [entry for entry in masks if entry[3] != Status.MASKED]
    tested = [e for e in fed if e[2] != mask_token_id and e[3] == Status.CHOSEN]
    operations: list[dict[str, Any]] = []
    if tested:
        isolated = any(status == Status.ACCEPTED for _, _, _, status in fed)
        tests = []
        for row, position, token, _ in tested:
            # accepted untested: a slot's first token, then its first proposal of each round
            first = position % size == 0 or before.status_at(position - 1) == Status.ACCEPTED
            probability = None if first else rows.given_prob[row - 1]
            tests.append([position, token, _rounded(probability), accepted(position)])
        operations.append({"kind": "infill_verify" if isolated else "verify", "tests": tests})
    if predicted:
        operations.append({"kind": "predict", "proposals": picks(predicted)})
    if planned:
        slots = [
            {"start": p, "certainty": _rounded(rows.picked_prob[r]), "chosen": chosen(p)}
            for r, p, _, _ in planned
            if p % size == 0
        ]
        drafts = picks([entry for entry in planned if chosen(entry[1])])
        operations.append({"kind": "plan", "slots": slots, "drafts": drafts})
    described: dict[str, Any] = {"operations": operations}
    if committed:
        described["committed"] = [[position, after.response[position]] for position in committed]
    if after.field(Field.LIMIT) < before.field(Field.LIMIT):
        described["end"] = after.field(Field.LIMIT)
    return described


def _rounded(probability: float | None) -> float | None:
    if probability is None:
        return None
    # JSON has no NaN, which passes no threshold either
    return 0.0 if math.isnan(probability) else round(probability, 6)


class Recorder:
    """Recordings of the traced requests of one engine."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state
        self._running: dict[int, dict[str, Any]] = {}  # by request slot
        self._by_id: dict[str, dict[str, Any]] = {}
        self._overhead = 0.0  # seconds spent here

    def add(self, slot: int, request_id: str, prompt: Sequence[int]) -> None:
        """A traced request starts in ``slot``, or goes on there after a preemption."""
        recording = self._by_id.setdefault(
            request_id,
            {"id": request_id, "prompt": list(prompt), "passes": [], "last": self._clock()},
        )
        self._running[slot] = recording

    def remove(self, slot: int) -> None:
        """The request in ``slot``, traced or not, leaves it."""
        self._running.pop(slot, None)
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
        """``transition`` (see ``transition_reference``), recording what it does."""
        signature = inspect.signature(transition)

        def recorded(*args: Any, **kwargs: Any) -> None:
            slots = signature.bind(*args, **kwargs).arguments["idx_mapping"]
            if not self._running:
                return transition(*args, **kwargs)
            traced = [(r, s) for r, s in enumerate(slots.tolist()) if s in self._running]
            start = time.perf_counter()  # tolist() has waited for the forward pass
            before = [Snapshot.of(self._state, slot) for _, slot in traced]
            self._overhead += time.perf_counter() - start
            transition(*args, **kwargs)
            if self._state.device.type == "cuda":
                torch.cuda.synchronize(self._state.device)
            end = self._clock()
            start = time.perf_counter()
            arguments = signature.bind(*args, **kwargs).arguments
            for (row, slot), earlier in zip(traced, before):
                self._append(slot, row, earlier, arguments, end)
            self._overhead += time.perf_counter() - start

        return recorded

    def _clock(self) -> float:
        """Seconds, without those spent here."""
        return time.perf_counter() - self._overhead

    def _append(
        self, slot: int, row: int, before: Snapshot, arguments: Mapping[str, Any], end: float
    ) -> None:
        recording = self._running[slot]
        phase = before.field(Field.PHASE)
        if phase in (Phase.IDLE, Phase.DONE):
            return
        if "parameters" not in recording:
            recording["parameters"] = self._parameters(slot, before)
            recording["mask_token_id"] = self._state.mask_token_id
        query_len = _length(arguments["query_start_loc"], row)
        decodes = phase not in (Phase.PREFILL, Phase.REPLAY)
        described: dict[str, Any]
        if decodes and query_len < before.field(Field.ROWS):
            described, rows_fed = {"operations": [{"kind": "idle"}]}, 0
        else:
            first = int(arguments["logits_start"][row]) if decodes else 0
            rows_fed = before.field(Field.ROWS) if decodes else query_len
            window = slice(first, first + (rows_fed if decodes else 0))
            names = ("picked", "picked_prob", "given_prob")
            rows = Rows(*(arguments[name][window].tolist() for name in names))
            after = Snapshot.of(self._state, slot)
            described = describe_pass(before, after, rows, self._state.mask_token_id)
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

    def _parameters(self, slot: int, snapshot: Snapshot) -> dict[str, Any]:
        state = self._state
        values = {
            name: _rounded(float(getattr(state, name)[slot]))
            for name in ("slot_threshold", "token_threshold", "temperature")
        }
        return {
            "slot_size": snapshot.field(Field.SLOT_SIZE),
            "block_length": snapshot.field(Field.BLOCK_LENGTH),
            **values,
            "seed": int(state.seed[slot]),
            "max_tokens": snapshot.field(Field.MAX_TOKENS),
        }


def _length(starts: torch.Tensor, row: int) -> int:
    start, end = starts[row : row + 2].tolist()
    return end - start
