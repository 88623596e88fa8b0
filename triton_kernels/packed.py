"""A request's part of ``DecodeState`` as kernels hold it: tuples of vectors, scalars and pointers.

Vectors are [LANES], one lane for each block position.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_refusion.triton_kernels.state_codes import (
    DROPPED,
    F_BLOCK_LENGTH,
    F_BLOCK_START,
    F_BUDGET,
    F_DRAW,
    F_KEPT,
    F_LIMIT,
    F_PASSED,
    F_PHASE,
    F_TESTED,
    H_GROUP_CONTEXT,
    H_ORDER,
    H_RESPONSE,
    P_CANVAS_ROW,
    P_CONFIDENCE,
    P_ORIGIN,
    P_PICK_ROW,
    P_RIDER_ROW,
    P_RIDER_WIDTH,
    P_ROUNDS,
    P_STATUS,
    P_STAYS,
    P_TEST_ROW,
    P_TESTED_TOKEN,
    P_TOKEN,
    R_CONTEXT,
    R_DRAW,
    R_OWN_START,
    R_POSITION,
    R_RUN_END,
    R_RUN_START,
    R_TARGET,
)


class Course(NamedTuple):
    """Where a request stands: scalars, see ``Field``; ``next_start`` is that of the next block."""

    phase: tl.tensor
    block_start: tl.tensor
    next_start: tl.tensor
    limit: tl.tensor
    draw: tl.tensor
    kept: tl.tensor
    tested: tl.tensor
    passed: tl.tensor


class Canvas(NamedTuple):
    """Pointers to the request's part of ``by_position``, ``by_row`` and ``canvas_token``."""

    positions: tl.tensor
    rows: tl.tensor
    tokens: tl.tensor
    length: tl.constexpr


class History(NamedTuple):
    """Pointers to the parts of the request's ``history``."""

    response: tl.tensor
    order: tl.tensor
    group_context: tl.tensor


class Memory(NamedTuple):
    """Pointers to the request's ``ints`` and ``floats``, to its ``history``, to ``counters``."""

    ints: tl.tensor
    floats: tl.tensor
    history: History
    counters: tl.tensor


class Block(NamedTuple):
    """What is known of the positions of a block, see ``PositionField``; confidence is float32.

    ``pick_row`` is that of the pass being decided.
    """

    status: tl.tensor
    token: tl.tensor
    confidence: tl.tensor
    rounds: tl.tensor
    origin: tl.tensor
    pick_row: tl.tensor


class Placed(NamedTuple):
    """Rows of the canvas that was fed, see ``PositionField``."""

    row: tl.tensor
    rider_row: tl.tensor
    rider_width: tl.tensor


class Statistics(NamedTuple):
    """Pointers to the statistics of a request's rows (``token_stats``)."""

    picked: tl.tensor
    picked_prob: tl.tensor
    given_prob: tl.tensor


class Verified(NamedTuple):
    """What was under verification, see ``PositionField``."""

    token: tl.tensor
    row: tl.tensor


class Row(NamedTuple):
    """What canvas rows [LANES] are to hold, see ``RowField``."""

    token: tl.tensor
    position: tl.tensor
    target: tl.tensor
    draw: tl.tensor
    context: tl.tensor
    run_start: tl.tensor
    run_end: tl.tensor
    own_start: tl.tensor


@triton.jit
def history_of(history_ptr, max_response):
    return History(
        history_ptr + H_RESPONSE * max_response,
        history_ptr + H_ORDER * max_response,
        history_ptr + H_GROUP_CONTEXT * max_response,
    )


@triton.jit
def load_course(ints):
    block_start = tl.load(ints + F_BLOCK_START)
    return Course(
        tl.load(ints + F_PHASE),
        block_start,
        block_start + tl.load(ints + F_BLOCK_LENGTH),
        tl.load(ints + F_LIMIT),
        tl.load(ints + F_DRAW),
        tl.load(ints + F_KEPT),
        tl.load(ints + F_TESTED),
        tl.load(ints + F_PASSED),
    )


@triton.jit
def store_course(course, ints):
    tl.store(ints + F_PHASE, course.phase)
    tl.store(ints + F_BLOCK_START, course.block_start)
    tl.store(ints + F_LIMIT, course.limit)
    tl.store(ints + F_DRAW, course.draw)
    tl.store(ints + F_KEPT, course.kept)
    tl.store(ints + F_TESTED, course.tested)
    tl.store(ints + F_PASSED, course.passed)


@triton.jit
def with_phase(course, phase, draw):
    return Course(
        phase,
        course.block_start,
        course.next_start,
        course.limit,
        draw,
        course.kept,
        course.tested,
        course.passed,
    )


@triton.jit
def block_length_at(start, ints):
    """Positions of the block that starts at response position ``start``."""
    return tl.minimum(tl.load(ints + F_BLOCK_LENGTH), tl.load(ints + F_BUDGET) - start)


@triton.jit
def load_position(canvas, field: tl.constexpr, other, lanes):
    at = canvas.positions + field * canvas.length + lanes.p
    return tl.load(at, mask=lanes.p < canvas.length, other=other)


@triton.jit
def load_block(canvas, lanes):
    return Block(
        load_position(canvas, P_STATUS, DROPPED, lanes),
        load_position(canvas, P_TOKEN, 0, lanes),
        load_position(canvas, P_CONFIDENCE, 0, lanes).to(tl.float32, bitcast=True),
        load_position(canvas, P_ROUNDS, 0, lanes),
        load_position(canvas, P_ORIGIN, 0, lanes),
        tl.zeros_like(lanes.p) - 1,
    )


@triton.jit
def load_placed(canvas, lanes):
    return Placed(
        load_position(canvas, P_CANVAS_ROW, -1, lanes),
        load_position(canvas, P_RIDER_ROW, -1, lanes),
        load_position(canvas, P_RIDER_WIDTH, 0, lanes),
    )


@triton.jit
def store_block(block, canvas, lanes):
    at, mask = canvas.positions + lanes.p, lanes.p < canvas.length
    confidence = block.confidence.to(tl.int32, bitcast=True)
    tl.store(at + P_STATUS * canvas.length, block.status, mask=mask)
    tl.store(at + P_TOKEN * canvas.length, block.token, mask=mask)
    tl.store(at + P_CONFIDENCE * canvas.length, confidence, mask=mask)
    tl.store(at + P_ROUNDS * canvas.length, block.rounds, mask=mask)
    tl.store(at + P_ORIGIN * canvas.length, block.origin, mask=mask)


@triton.jit
def store_evidence(verified, stays, pick_row, canvas, lanes):
    at, mask = canvas.positions + lanes.p, lanes.p < canvas.length
    tl.store(at + P_TESTED_TOKEN * canvas.length, verified.token, mask=mask)
    tl.store(at + P_TEST_ROW * canvas.length, verified.row, mask=mask)
    tl.store(at + P_STAYS * canvas.length, stays.to(tl.int32), mask=mask)
    tl.store(at + P_PICK_ROW * canvas.length, pick_row, mask=mask)


@triton.jit
def with_status(block, status):
    return Block(status, block.token, block.confidence, block.rounds, block.origin, block.pick_row)


@triton.jit
def with_rounds(block, rounds):
    return Block(block.status, block.token, block.confidence, rounds, block.origin, block.pick_row)


@triton.jit
def with_origin(block, origin):
    return Block(block.status, block.token, block.confidence, block.rounds, origin, block.pick_row)


@triton.jit
def write_rows(canvas, where, row, value):
    """``value``, a ``Row``, into the canvas rows ``row`` [LANES]."""
    rows, length = canvas.rows, canvas.length
    tl.store(canvas.tokens + row, value.token.to(tl.int64), mask=where)
    tl.store(rows + R_POSITION * length + row, value.position, mask=where)
    tl.store(rows + R_DRAW * length + row, value.draw, mask=where)
    tl.store(rows + R_CONTEXT * length + row, value.context, mask=where)
    tl.store(rows + R_RUN_START * length + row, value.run_start, mask=where)
    tl.store(rows + R_RUN_END * length + row, value.run_end, mask=where)
    tl.store(rows + R_OWN_START * length + row, value.own_start, mask=where)
    tl.store(rows + R_TARGET * length + row, value.target, mask=where)
