"""Traces: what decoding did in every pass of a request, told from the device state.

An engine records only if it was started for it, and then only requests with ``trace`` in their
``extra_args``. What the transition is to do, and what it notes in the state of what it did
(``PositionField``), is copied to the host behind it; nothing waits for the device. Descriptions are
made of the copies elsewhere and later. ``docs/trace.md`` describes the format.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.state import DecodeState, Field, Phase, PositionField, Status

# ended requests whose recordings wait to be taken, and what they hold; older ones are dropped
MAX_KEPT = 256
MAX_KEPT_BYTES = 256 * 2**20

_BEFORE = (
    PositionField.TOKEN,
    PositionField.CONFIDENCE,
    PositionField.RIDER_ROW,
    PositionField.RIDER_WIDTH,
)
_AFTER = (
    PositionField.STATUS,
    PositionField.TOKEN,
    PositionField.CONFIDENCE,
    PositionField.PICK_ROW,
    PositionField.TESTED_TOKEN,
    PositionField.TEST_ROW,
    PositionField.STAYS,
)
_LISTS = ("order", "tokens", "sampled")  # by number: committed positions, their tokens; delivered
_BOUNDS = 5  # rows of the batch: from, to; those with statistics: from, to; tokens delivered
_HEAD = struct.Struct("<qdq")
_DECODING = (Phase.PLAN, Phase.VERIFY, Phase.INFILL, Phase.SERIAL)


@dataclass(frozen=True)
class RawPass:
    """One pass of a request, as copied from the device.

    Attributes:
        number: of the request's passes, from 0.
        seconds: wall time since the pass before, or since the request started.
        canvas_length: W below.
        block: int32: ints before and after the pass; ``_BEFORE`` [4, W]; ``_AFTER`` [7, W];
            ``_LISTS`` [3, W]; the bounds.
        probabilities: [2, rows] float32: ``picked_prob`` and ``given_prob`` of its rows.
    """

    number: int
    seconds: float
    canvas_length: int
    block: np.ndarray
    probabilities: np.ndarray

    def to_frames(self) -> list[bytes]:
        head = _HEAD.pack(self.number, self.seconds, self.canvas_length)
        return [head, self.block.tobytes(), self.probabilities.tobytes()]

    @classmethod
    def from_frames(cls, frames: Sequence[bytes]) -> RawPass:
        head, block, probabilities = frames
        rows = np.frombuffer(probabilities, np.float32).reshape(2, -1)
        number, seconds, canvas_length = _HEAD.unpack(head)
        return cls(number, seconds, canvas_length, np.frombuffer(block, np.int32), rows)


@dataclass(frozen=True)
class Before:
    """One request's state on the host, before a pass."""

    ints: list[int]
    token: list[int]
    confidence: list[float]
    rider_row: list[int]
    rider_width: list[int]


@dataclass(frozen=True)
class After:
    """The same after it. ``order`` and ``tokens`` are what it committed, and may be longer."""

    ints: list[int]
    status: list[int]
    token: list[int]
    confidence: list[float]
    pick_row: list[int]
    tested_token: list[int]
    test_row: list[int]
    stays: list[int]
    order: list[int]
    tokens: list[int]
    sampled: list[int]


@dataclass(frozen=True)
class Rows:
    """What was fed of a canvas, and its statistics (``token_stats``) by row."""

    fed: int
    picked_prob: list[float]
    given_prob: list[float]


def describe(raw: RawPass) -> dict[str, Any] | None:
    """A pass in the format of ``docs/trace.md``; None if the request was not decoding."""
    width, count = raw.canvas_length, len(Field)
    sizes = [count, count, len(_BEFORE) * width, len(_AFTER) * width, len(_LISTS) * width]
    parts = np.split(raw.block, np.cumsum(sizes))
    ints_before, ints_after = parts[0].tolist(), parts[1].tolist()
    before = Before(ints_before, *_columns(parts[2], width, _BEFORE))
    lists = parts[4].reshape(-1, width).tolist()
    after = After(ints_after, *_columns(parts[3], width, _AFTER), *lists)
    row_start, row_end, first, last, delivered = parts[5].tolist()
    phase = before.ints[Field.PHASE]
    if phase in (Phase.IDLE, Phase.DONE):
        return None
    decodes = phase not in (Phase.PREFILL, Phase.REPLAY)
    described: dict[str, Any] = {"operations": [{"kind": "idle"}]}
    fed = 0
    if not decodes or after.ints[Field.PASSES] != before.ints[Field.PASSES]:
        fed = row_end - row_start
        fed = min(fed, before.ints[Field.CANVAS]) if decodes else fed
        # the end of a prompt may be followed by masks, which alone have statistics
        shown = raw.probabilities[:, : min(last - first, fed)]
        described = describe_pass(before, after, Rows(fed, *shown.tolist()))
    return {
        "seconds": round(raw.seconds, 6),
        "rows": fed,
        **described,
        "delivered": delivered,
    }


def _columns(part: np.ndarray, width: int, names: Sequence[PositionField]) -> Iterator[list]:
    for name, values in zip(names, part.reshape(-1, width), strict=True):
        is_float = name == PositionField.CONFIDENCE
        yield (values.view(np.float32) if is_float else values).tolist()


def describe_pass(before: Before, after: After, rows: Rows) -> dict[str, Any]:
    """What one pass did to a request."""
    phase = before.ints[Field.PHASE]
    operations: list[dict[str, Any]] = []
    if phase in (Phase.PREFILL, Phase.REPLAY):
        operations.append({"kind": Phase(phase).name.lower()})
    if before.ints[Field.RESUME] == Phase.SERIAL:
        if after.ints[Field.PASSES] > before.ints[Field.PASSES]:
            operations.append(_serial(before, after, rows))
        known = before.ints[Field.EMITTED]
        new = after.ints[Field.EMITTED] - known
        committed = [[known + i, token] for i, token in enumerate(after.sampled[:new])]
        ended = after.ints[Field.PHASE] == Phase.DONE
    else:
        tests, corrections, picks = _tests(after, rows), _corrections(after), _picks(after, rows)
        predicts = any(operation["kind"] == "predict" for operation in picks)
        # a pass that only feeds corrections tests nothing
        if tests or (phase == Phase.INFILL and not predicts):
            kind = "verify" if phase == Phase.VERIFY else "infill_verify"
            operation = {"kind": kind, "tests": tests}
            operations.append(operation | ({"corrections": corrections} if corrections else {}))
        operations += picks
        new = after.ints[Field.COMMITTED] - before.ints[Field.COMMITTED]
        committed = [[p, t] for p, t in zip(after.order[:new], after.tokens[:new])]
        ended = after.ints[Field.LIMIT] < before.ints[Field.LIMIT]
    described: dict[str, Any] = {"operations": operations}
    if phase in _DECODING and rows.fed > before.ints[Field.ROWS]:
        described["rider_rows"] = rows.fed - before.ints[Field.ROWS]
    if committed:
        described["committed"] = committed
    if ended:
        serial = before.ints[Field.RESUME] == Phase.SERIAL
        described["end"] = after.ints[Field.EMITTED if serial else Field.LIMIT]
    return described


def _serial(before: Before, after: After, rows: Rows) -> dict[str, Any]:
    """What a pass of serial decoding (section 7) decided, and the drafts that it leaves."""
    known, under_test = before.ints[Field.EMITTED], before.ints[Field.TESTS]
    new = after.ints[Field.EMITTED] - known
    fed = min(len(rows.picked_prob), before.ints[Field.CANVAS])
    tokens = after.sampled[:new]
    prob = [_rounded(rows.picked_prob[row]) for row in after.pick_row[:new]]
    drafts = before.token[: max(0, min(under_test, fed - 1))]
    accepted = 0
    while accepted < min(len(drafts), new) and drafts[accepted] == tokens[accepted]:
        accepted += 1
    tests: list[list[Any]] = [[known + i, drafts[i], prob[i], True] for i in range(accepted)]
    if accepted < min(len(drafts), new):
        # a token's row tells of the token fed behind it
        told = after.pick_row[accepted] == accepted
        chance = _rounded(rows.given_prob[accepted]) if told else None
        tests.append([known + accepted, drafts[accepted], chance, False])
    chains = [
        [count, min(width, fed - row)]
        for count, (row, width) in enumerate(zip(before.rider_row, before.rider_width))
        if count <= under_test and 0 <= row < fed and width > 0
    ]
    picks = [[known + i, token, prob[i]] for i, token in enumerate(tokens)]
    described = {"kind": "serial", "tests": tests, "picks": picks, "chains": chains}
    left = 0 if after.ints[Field.PHASE] == Phase.DONE else after.ints[Field.DRAFTS]
    at_hand = list(zip(after.token[:left], map(_rounded, after.confidence[:left])))
    old = zip(before.token[new : before.ints[Field.DRAFTS]], map(_rounded, before.confidence[new:]))
    if at_hand != list(old):
        position = known + new
        described["drafts"] = [[position + i, *draft] for i, draft in enumerate(at_hand)]
    return described


def _tests(after: After, rows: Rows) -> list[list[Any]]:
    """[position, token, probability or None, accepted] of the tokens that were verified."""
    block = after.ints[Field.TEST_BLOCK]
    verified = zip(after.tested_token, after.test_row, after.stays, strict=True)
    return [
        [block + p, token, None if row < 0 else _rounded(rows.given_prob[row]), bool(stays)]
        for p, (token, row, stays) in enumerate(verified)
        if token >= 0
    ]


def _corrections(after: After) -> list[list[Any]]:
    """[position, token, probability] of the tokens accepted in place of those that failed."""
    block = after.ints[Field.BLOCK_START]
    return [
        [block + p, after.token[p], _rounded(after.confidence[p])]
        for p, row in enumerate(after.pick_row)
        if row >= 0 and after.status[p] == Status.ACCEPTED
    ]


def _picks(after: After, rows: Rows) -> list[dict[str, Any]]:
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


def _rounded(probability: float) -> float:
    # JSON has no NaN, which passes no threshold either
    return 0.0 if math.isnan(probability) else round(probability, 6)


def parameters_of(
    params: DecodingParams, temperature: float, seed: int, max_tokens: int
) -> dict[str, Any]:
    """How a request is decoded, as a trace says it: what its mode uses."""
    used: tuple[str, ...] = ("slot_size", "slot_start")
    if params.mode == "parallel":
        used = ("slot_size", "block_length", "slot_threshold", "token_threshold", "infill")
    return {
        "mode": params.mode,
        **{name: getattr(params, name) for name in used},
        "temperature": temperature,
        "seed": seed,
        "max_tokens": max_tokens,
    }


class _Clock:
    """Moments on the device's own time line, which reading does not wait for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def wait(self, moment: Any) -> None:
        if self._on_gpu:
            moment.synchronize()

    def between(self, start: Any, end: Any) -> float:
        """Seconds; both moments have come."""
        return start.elapsed_time(end) / 1000 if self._on_gpu else end - start


@dataclass
class Recording:
    """A traced request. ``passes`` are those that were settled and not handed on, of ``made``."""

    request_id: str
    prompt: list[int]
    parameters: dict[str, Any]
    last: Any  # the moment of its last pass, or of its start
    made: int = 0
    passes: list[RawPass] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(p.block.nbytes + p.probabilities.nbytes for p in self.passes)


class Copy:
    """A pass of the traced requests of a batch, on its way to the host."""

    def __init__(
        self,
        traced: Sequence[tuple[int, Recording]],
        clock: _Clock,
        canvas_length: int,
        parts: Sequence[torch.Tensor],
    ) -> None:
        self._traced, self._clock, self._canvas_length = traced, clock, canvas_length
        self._shapes = [tuple(part.shape) for part in parts]
        device = torch.cat([part.reshape(-1) for part in parts])
        self._host = device.to("cpu", non_blocking=True)  # pinned
        self._moment = clock.now()

    def settle(self) -> Iterator[tuple[Recording, RawPass]]:
        """Waits for the copy; the pass of each request. To be called once, in order."""
        self._clock.wait(self._moment)
        sizes = [math.prod(shape) for shape in self._shapes]
        flat = np.split(self._host.numpy(), np.cumsum(sizes)[:-1])
        *by_request, starts, first_logit, delivered, picked, given = (
            part.reshape(shape) for part, shape in zip(flat, self._shapes)
        )
        for number, (row, recording) in enumerate(self._traced):
            rows = slice(first_logit[row], first_logit[row + 1])
            bounds = (*starts[row : row + 2], rows.start, rows.stop, delivered[row])
            block = [part[number].reshape(-1) for part in by_request]
            raw = RawPass(
                recording.made,
                self._clock.between(recording.last, self._moment),
                self._canvas_length,
                np.concatenate([*block, np.array(bounds, np.int32)]),
                np.stack((picked[rows], given[rows])).view(np.float32),
            )
            recording.last, recording.made = self._moment, recording.made + 1
            yield recording, raw


class Recorder:
    """Recordings of the traced requests of one engine.

    Args:
        sink: takes each step's copy and settles it, in order, on a thread of its own; without one,
            passes are kept for ``take``.
    """

    def __init__(self, state: DecodeState, sink: Callable[[Copy], None] | None = None) -> None:
        self._state, self._clock = state, _Clock(state.device)
        self._keeps = sink is None
        self._sink = sink or self._keep
        self._running: dict[int, Recording] = {}  # by request index
        self._by_id: dict[str, Recording] = {}
        self._copies: list[Copy] = []
        self._index: tuple[Any, torch.Tensor, torch.Tensor] | None = None
        device = state.device
        self._lanes = torch.arange(state.canvas_length, dtype=torch.int32, device=device)
        self._before = torch.tensor(_BEFORE, device=device)
        self._after = torch.tensor(_AFTER, device=device)

    def add(
        self, req: int, request_id: str, prompt: Sequence[int], parameters: dict[str, Any]
    ) -> None:
        """A traced request starts at ``req``, or goes on there after a preemption."""
        if request_id not in self._by_id:
            start = self._clock.now()
            self._by_id[request_id] = Recording(request_id, list(prompt), parameters, start)
        self._running[req] = self._by_id[request_id]

    def remove(self, req: int, preempted: bool = False) -> None:
        """The request at ``req``, traced or not, leaves."""
        recording = self._running.pop(req, None)
        if self._keeps:
            self._drop_oldest()
        elif recording is not None and not preempted:
            del self._by_id[recording.request_id]

    def take(self) -> list[dict[str, Any]]:
        """All recordings kept, in the order their requests came; they are forgotten here.

        Returns:
            dicts of ``id``, ``prompt``, ``parameters``, ``passes``.
        """
        self._settle(0)
        taken = []
        for recording in self._by_id.values():
            passes = [entry for raw in recording.passes if (entry := describe(raw)) is not None]
            if passes:
                taken.append(
                    {
                        "id": recording.request_id,
                        "prompt": recording.prompt,
                        "parameters": recording.parameters,
                        "passes": passes,
                    }
                )
        self._by_id.clear()
        self._running.clear()
        return taken

    def begin(self, reqs: Sequence[int]) -> tuple[Any, ...] | None:
        """Called before the transition of a batch with those request indices.

        Returns:
            what ``end`` takes; None where no request of the batch is traced.
        """
        traced = [(row, self._running[req]) for row, req in enumerate(reqs) if req in self._running]
        if not traced:
            return None
        key = tuple((row, reqs[row]) for row, _ in traced)
        if self._index is None or self._index[0] != key:
            rows, indices = torch.tensor(key, device=self._state.device).T
            self._index = (key, rows, indices)
        _, rows, indices = self._index
        by_position = self._state.by_position[indices[:, None], self._before]
        return traced, rows, indices, self._state.ints[indices], by_position

    def end(
        self,
        begun: tuple[Any, ...],
        query_start_loc: torch.Tensor,
        logits_start: torch.Tensor,
        picked_prob: torch.Tensor,
        given_prob: torch.Tensor,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
    ) -> None:
        """Called behind the transition, with its arguments; ``*_prob`` are of the rows in use."""
        state = self._state
        traced, rows, reqs, ints_before, before = begun
        requests = num_sampled.shape[0]
        first = ints_before[:, Field.COMMITTED, None]
        at = (first + self._lanes).clamp_(max=state.max_response - 1)
        order = state.order[reqs[:, None], at]
        parts = [
            ints_before,
            state.ints[reqs],
            before,
            state.by_position[reqs[:, None], self._after],
            order,
            state.response[reqs[:, None], order],
            sampled[rows],
            query_start_loc[: requests + 1].int(),
            logits_start[: requests + 1].int(),
            num_sampled,
            picked_prob.view(torch.int32),
            given_prob.view(torch.int32),
        ]
        self._sink(Copy(traced, self._clock, state.canvas_length, parts))

    def _keep(self, copy: Copy) -> None:
        self._copies.append(copy)
        self._settle(4)  # these have arrived by now

    def _settle(self, left: int) -> None:
        """Settles all copies kept but the last ones, which may be under way."""
        while len(self._copies) > left:
            for recording, raw in self._copies.pop(0).settle():
                recording.passes.append(raw)

    def _drop_oldest(self) -> None:
        running = {recording.request_id for recording in self._running.values()}
        size = sum(recording.size for recording in self._by_id.values())
        for request_id in list(self._by_id):
            if len(self._by_id) <= MAX_KEPT and size <= MAX_KEPT_BYTES:
                return
            if request_id not in running:
                size -= self._by_id.pop(request_id).size
