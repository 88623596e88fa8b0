"""The next canvas of one request, written on the device; used by the transition kernel.

The twin is ``compose_twin``. One lane stands for each block position p; what the twin finds by
walking over rows is found by scans.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_refusion.decoding.speculation import (
    CERTAIN,
    LARGEST_COST,
    LEVELS,
    MAX_RIDERS,
    PRIOR_PASSED,
    PRIOR_TESTED,
)
from vllm_refusion.triton_kernels.decisions import waiting
from vllm_refusion.triton_kernels.lanes import (
    NOWHERE,
    at_lane,
    count,
    first,
    in_slot,
    infilled,
    opening,
    rows_of,
)
from vllm_refusion.triton_kernels.state_codes import (
    ACCEPTED,
    BLANK,
    CHOSEN,
    F_BLOCK_LENGTH,
    F_BUDGET,
    INFILL,
    MASKED,
    P_CANVAS_ROW,
    P_RIDER_ROW,
    P_RIDER_WIDTH,
    PLAN,
    R_CONTEXT,
    R_DRAW,
    R_OWN_START,
    R_POSITION,
    R_RUN_END,
    R_RUN_START,
    R_TARGET,
    VERIFY,
)

_CERTAIN = tl.constexpr(CERTAIN)
_LARGEST_COST = tl.constexpr(LARGEST_COST)
_LEVELS = tl.constexpr(LEVELS)
_MAX_RIDERS = tl.constexpr(MAX_RIDERS)
_PRIOR_PASSED = tl.constexpr(PRIOR_PASSED)
_PRIOR_TESTED = tl.constexpr(PRIOR_TESTED)
_FORCED = tl.constexpr(2**30)  # score of what belongs to the phase; riders' are below 2**25


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


class Prices(NamedTuple):
    """What rows are worth: ``Speculation``, ``device_table``, and how the request fares."""

    free_rows: tl.tensor
    pass_price: tl.tensor
    table: tl.tensor
    acceptance: tl.tensor
    speculates: tl.tensor


class Canvas(NamedTuple):
    """Pointers to the request's part of ``by_position``, ``by_row`` and ``canvas_token``."""

    positions: tl.tensor
    rows: tl.tensor
    tokens: tl.tensor
    length: tl.constexpr


class Members(NamedTuple):
    """The rows of the phase.

    Attributes:
        member: [LANES], whether a position takes part in the pass. row: [LANES] its row if it does.
        rows: their number. can_end: whether an infill can end with the pass.
        proposed: [LANES], proposals under test in the slot. opening: [LANES], where those without
            a proposal begin. width: the most masks of a predict.
    """

    member: tl.tensor
    row: tl.tensor
    rows: tl.tensor
    can_end: tl.tensor
    proposed: tl.tensor
    opening: tl.tensor
    width: tl.tensor


class Costs(NamedTuple):
    """Costs [LANES] of the tests: of one, of all up to it, of all before its slot."""

    cost: tl.tensor
    through: tl.tensor
    slot_before: tl.tensor


class Riders(NamedTuple):
    """The rider at each block position [LANES]; ``begin``: where its masks begin, of a predict."""

    score: tl.tensor  # 0: none
    chance: tl.tensor
    width: tl.tensor
    begin: tl.tensor


class Row(NamedTuple):
    """What canvas rows [LANES] are to hold, see ``RowField``."""

    token: tl.tensor
    position: tl.tensor
    draw: tl.tensor
    context: tl.tensor
    run_start: tl.tensor
    run_end: tl.tensor
    own_start: tl.tensor


@triton.jit
def block_length_at(start, ints):
    """Positions of the block that starts at response position ``start``."""
    return tl.minimum(tl.load(ints + F_BLOCK_LENGTH), tl.load(ints + F_BUDGET) - start)


@triton.jit
def _chance(cost, prices):
    return tl.load(prices.table + _LEVELS + 1 + tl.minimum(cost, _LARGEST_COST))


@triton.jit
def _test_costs(block, prices, lanes):
    """Nothing where there is no proposal or it takes no test."""
    level = block.confidence * _LEVELS
    level = tl.where(level > 0, tl.minimum(level, _LEVELS), 0.0).to(tl.int32)
    tested = (block.status == CHOSEN) & (block.origin != lanes.p)
    cost = tl.load(prices.table + level, mask=tested, other=0)
    through = tl.cumsum(cost, axis=0)
    return Costs(cost, through, tl.gather(through - cost, lanes.slot_start, axis=0))


@triton.jit
def _worth_feeding(chance, again, prices):
    """Whether to feed a row at once that is needed with a chance."""
    later = _LEVELS + (_LEVELS - prices.acceptance) * (prices.pass_price + again)
    return chance.to(tl.int64) * later > _CERTAIN * _LEVELS


@triton.jit
def _predict_width(ints, canvas, prices, lanes):
    """The most masks of a predict."""
    cost = tl.load(prices.table + prices.acceptance) * (lanes.p - 1)
    worth = _worth_feeding(_chance(tl.maximum(cost, 0), prices), lanes.p, prices)
    width = first((lanes.p >= 1) & ((lanes.p >= lanes.size) | (worth == 0)), lanes)
    # an operation that goes on may take a slot's rows more than what is open in the block
    fits = tl.load(ints + F_BLOCK_LENGTH) + lanes.size <= canvas.length
    return tl.where(prices.speculates & fits, width, lanes.size)


@triton.jit
def _members(block, costs, course, width, prices, lanes):
    """Which positions take part in the pass."""
    chosen = block.status == CHOSEN
    blank = block.status == BLANK
    proposed = in_slot(chosen, lanes)
    opens_at = opening(blank, lanes)
    before = rows_of(chosen)
    opens = before == tl.gather(before, lanes.slot_start, axis=0)
    reached = _chance(costs.through - costs.cost - costs.slot_before, prices)
    # several slots under verification are tested as one run
    several = (course.phase == VERIFY) & (count(chosen) > lanes.size)
    whole = tl.where(prices.speculates & (several == 0), 0, 1) + tl.zeros_like(lanes.p)
    tested = chosen & (opens | _worth_feeding(reached, 1, prices) | (whole > 0))
    if course.phase == INFILL:
        begins = waiting(block, lanes) & (block.origin == opens_at)
        fed = tested | (begins & (lanes.p - opens_at < width))
        can_end = (count(blank | (chosen & (tested == 0))) == 0).to(tl.int32)
        accepted = block.status == ACCEPTED
        accepted = accepted & (rows_of(infilled(block.status)) >= course.kept)
        # unless it can end, nothing can be committed: complete slots stay out
        active = proposed + (opens_at < lanes.slot_start + lanes.size).to(tl.int32)
        member = fed | (accepted & (active + can_end > 0))
    else:
        verified = tl.where(course.phase == VERIFY, tested.to(tl.int32), 0)
        planned = tl.where(course.phase == PLAN, (block.status == MASKED).to(tl.int32), verified)
        member = planned > 0
        can_end = 0
    return Members(member, rows_of(member), count(member), can_end, proposed, opens_at, width)


@triton.jit
def _write_rows(canvas, where, row, value):
    """``value``, a ``Row``, into the canvas rows ``row`` [LANES]."""
    rows, length = canvas.rows, canvas.length
    tl.store(canvas.tokens + row, value.token.to(tl.int64), mask=where)
    tl.store(rows + R_POSITION * length + row, value.position, mask=where)
    tl.store(rows + R_DRAW * length + row, value.draw, mask=where)
    tl.store(rows + R_CONTEXT * length + row, value.context, mask=where)
    tl.store(rows + R_RUN_START * length + row, value.run_start, mask=where)
    tl.store(rows + R_RUN_END * length + row, value.run_end, mask=where)
    tl.store(rows + R_OWN_START * length + row, value.own_start, mask=where)
    tl.store(rows + R_TARGET * length + row, value.position, mask=where)


@triton.jit
def _write_phase_rows(block, members, course, canvas, mask_token_id, lanes):
    p, length, zero = lanes.p, canvas.length, tl.zeros_like(lanes.p)
    in_canvas = p < length
    row = tl.where(members.member, members.row, -1)
    tl.store(canvas.positions + P_CANVAS_ROW * length + p, row, mask=in_canvas)
    tl.store(canvas.positions + P_RIDER_ROW * length + p, zero - 1, mask=in_canvas)
    tl.store(canvas.positions + P_RIDER_WIDTH * length + p, zero, mask=in_canvas)
    tl.store(canvas.rows + R_POSITION * length + p, zero - 1, mask=in_canvas)
    tl.store(canvas.rows + R_TARGET * length + p, zero - 1, mask=in_canvas)
    tl.debug_barrier()
    is_mask = (block.status == MASKED) | (block.status == BLANK)
    infills = course.phase == INFILL
    value = Row(
        tl.where(is_mask, mask_token_id, block.token),
        course.block_start + p,
        course.draw + tl.where(infills, block.rounds, 0),
        zero - tl.where(infills, course.kept, 0),
        zero,
        zero,
        tl.where(infills, members.row - (p - lanes.slot_start), 0),
    )
    _write_rows(canvas, members.member, members.row, value)


@triton.jit
def _riders(block, members, costs, course, canvas, next_length, prices, lanes):
    """All riders that could follow the rows of the phase."""
    p, size = lanes.p, lanes.size
    chosen = block.status == CHOSEN
    blank = block.status == BLANK
    unfed = chosen & (members.member == 0)
    through = costs.through - costs.slot_before

    # predict, if just what lies before p is accepted of its slot
    leads = lanes.slot_start == first(chosen & (p == lanes.slot_start), lanes)
    alone = (course.phase == INFILL) | leads
    predicts = members.member & chosen & (p != lanes.slot_start) & alone
    chance = _chance(through - costs.cost, prices) - _chance(through, prices)
    # more proposals of the same operation
    tails = blank & (p == members.opening) & (block.origin < p)
    forced = tails & (members.proposed == 0)
    tails = tails & (forced | (in_slot(unfed, lanes) == 0))
    chance = tl.where(tails, _chance(through, prices), chance)
    begin = tl.where(tails, block.origin, p)
    end = tl.minimum(p + members.width, lanes.slot_start + size)
    width = tl.where(predicts | tails, end - begin, 0)

    # plan, if the slot that starts at p is the last one committed
    plans, plan_chance, masks = _plan_riders(block, members, costs, course, canvas, prices, lanes)
    masks = tl.where(masks > 0, masks, next_length)
    chance = tl.where(plans, plan_chance, chance)
    width = tl.where(plans, masks, width)
    score = tl.where(width > 0, chance * 256 // tl.maximum(width, 1), 0)
    return Riders(tl.where(forced, _FORCED, score), chance, width, begin)


@triton.jit
def _plan_riders(block, members, costs, course, canvas, prices, lanes):
    """Where plans could ride, their chances, and how many masks of this block they have."""
    p, size, rows = lanes.p, lanes.size, members.rows
    masks = count(block.status == MASKED) + tl.zeros_like(p)
    if course.phase == VERIFY:
        chosen = block.status == CHOSEN
        all_fed = count(chosen & (members.member == 0)) == 0
        plans = chosen & (p == lanes.slot_start) & all_fed
        masks += rows - members.row - size
        position = canvas.rows + R_POSITION * canvas.length + p
        start = course.block_start
        lane = tl.load(position, mask=p < rows, other=start) - start
        by_row = tl.gather(costs.through, lane, axis=0)
        end_row = tl.minimum(members.row + size - 1, lanes.last)
        next_end_row = tl.minimum(members.row + 2 * size - 1, lanes.last)
        chance = _chance(tl.gather(by_row, end_row, axis=0), prices)
        next_chance = _chance(tl.gather(by_row, next_end_row, axis=0), prices)
        chance -= tl.where(members.row + size < rows, next_chance, 0)
    else:
        last_slot = tl.max(tl.where(infilled(block.status), lanes.slot_start, -1), axis=0)
        plans = p == tl.where(members.can_end > 0, last_slot, NOWHERE)
        chance = _chance(tl.max(costs.through, axis=0) + tl.zeros_like(p), prices)
    return plans, chance, masks


@triton.jit
def _write_plan_rider(block, members, course, canvas, at, end, width, mask_token_id, lanes):
    """The masks of the plan that follows if the slot at lane ``at`` is the last committed."""
    p, zero = lanes.p, tl.zeros_like(lanes.p)
    infills = course.phase == INFILL
    again = tl.where(infills, NOWHERE, at + lanes.size)
    back = (block.status == MASKED) | ((block.status == CHOSEN) & (p >= again))
    anew = count(back) == 0  # of the next block
    where = back | (p < tl.where(anew, width, 0))
    most_rounds = tl.max(tl.where(infilled(block.status), block.rounds, 0), axis=0)
    value = Row(
        zero + mask_token_id,
        tl.where(anew, course.next_start, course.block_start) + p,
        zero + course.draw + tl.where(infills, most_rounds, 0),
        zero,
        zero,
        zero + tl.where(infills, members.rows, at_lane(members.row, lanes, at) + lanes.size),
        zero + end,
    )
    _write_rows(canvas, where, end + tl.where(anew, p, rows_of(back)), value)


@triton.jit
def _write_predict_rider(
    block, members, course, canvas, at, begin, end, width, mask_token_id, lanes
):
    """The masks from lane ``begin`` on of the predict of a slot if ``at`` is not accepted."""
    p, zero = lanes.p, tl.zeros_like(lanes.p)
    infills = course.phase == INFILL
    # an operation that goes on is counted already
    begun = (begin < at).to(tl.int32)
    rounds = tl.where(infills, at_lane(block.rounds, lanes, at) - begun, 0)
    fed_at = at - begun
    run_start = at_lane(members.row, lanes, fed_at) - fed_at % lanes.size
    value = Row(
        zero + mask_token_id,
        course.block_start + p,
        zero + course.draw + rounds,
        zero - tl.where(infills, course.kept, 0),
        zero + run_start,
        zero + run_start + begin % lanes.size,
        zero + end,
    )
    _write_rows(canvas, (p >= begin) & (p < begin + width), end + p - begin, value)


@triton.jit
def _take_riders(block, members, riders, course, canvas, prices, mask_token_id, lanes):
    """Adds riders while they pay; returns the rows of the phase and of the canvas."""
    rows = members.rows
    end = members.rows
    length = canvas.length
    open_ = infilled(block.status) | (block.status == MASKED)
    guaranteed = tl.minimum(count(open_) - course.kept + lanes.size, length)
    score = tl.where(riders.score < tl.where(prices.speculates, 1, _FORCED), 0, riders.score)
    best = tl.max(score, axis=0)
    tried = 0
    while (best > 0) & (tried < _MAX_RIDERS):
        at = first(score == best, lanes)
        forced = best == _FORCED
        width = at_lane(riders.width, lanes, at)
        pays = at_lane(riders.chance, lanes, at) * (width + prices.pass_price) > width * _CERTAIN
        most = tl.where(forced, guaranteed, length)
        taken = end + width
        if (forced | (taken <= prices.free_rows) | pays) & (taken <= most):
            begin = at_lane(riders.begin, lanes, at)
            if at % lanes.size == 0:
                _write_plan_rider(
                    block, members, course, canvas, at, end, width, mask_token_id, lanes
                )
            else:
                _write_predict_rider(
                    block, members, course, canvas, at, begin, end, width, mask_token_id, lanes
                )
            tl.store(canvas.positions + P_RIDER_ROW * length + at, end + at - begin)
            tl.store(canvas.positions + P_RIDER_WIDTH * length + at, width - (at - begin))
            end = taken
            rows = tl.where(forced, end, rows)
        score = tl.where(lanes.p == at, 0, score)
        best = tl.max(score, axis=0)
        tried += tl.where(forced, 0, 1)
    return rows, end


@triton.jit
def compose(block, course, ints, canvas, table_ptr, free_rows, pass_price, mask_token_id, lanes):
    """Writes the canvas of the next pass; returns its rows without and with riders."""
    speculates = (free_rows > 0) | (pass_price > 0)
    acceptance = _LEVELS * (course.passed + _PRIOR_PASSED) // (course.tested + _PRIOR_TESTED)
    prices = Prices(free_rows, pass_price, table_ptr, acceptance, speculates)
    costs = _test_costs(block, prices, lanes)
    width = _predict_width(ints, canvas, prices, lanes)
    members = _members(block, costs, course, width, prices, lanes)
    _write_phase_rows(block, members, course, canvas, mask_token_id, lanes)
    rows = members.rows
    end = members.rows
    if (course.phase == INFILL) | (speculates & (course.phase == VERIFY)):
        tl.debug_barrier()
        next_start = course.next_start
        next_length = tl.where(next_start < course.limit, block_length_at(next_start, ints), 0)
        riders = _riders(block, members, costs, course, canvas, next_length, prices, lanes)
        rows, end = _take_riders(
            block, members, riders, course, canvas, prices, mask_token_id, lanes
        )
    return rows, end
