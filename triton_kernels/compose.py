"""The next canvas of one request, written on the device; used by the transition kernel.

The twin is ``compose_twin``. One lane stands for each block position p; what the twin finds by
walking over rows is found by scans.
"""

from __future__ import annotations

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
from vllm_refusion.triton_kernels.state_codes import (
    ACCEPTED,
    BLANK,
    CHOSEN,
    F_BLOCK_LENGTH,
    F_BUDGET,
    INFILL,
    MASKED,
    PLAN,
    VERIFY,
)

_CERTAIN = tl.constexpr(CERTAIN)
_LARGEST_COST = tl.constexpr(LARGEST_COST)
_LEVELS = tl.constexpr(LEVELS)
_MAX_RIDERS = tl.constexpr(MAX_RIDERS)
_PRIOR_PASSED = tl.constexpr(PRIOR_PASSED)
_PRIOR_TESTED = tl.constexpr(PRIOR_TESTED)
_FORCED = tl.constexpr(2**30)  # score of what belongs to the phase; riders' are below 2**25


@triton.jit
def in_slot(marked, slot_start, size, LANES: tl.constexpr):
    """How many positions of the slot of each lane are ``marked`` [LANES]."""
    marked = marked.to(tl.int32)
    through = tl.cumsum(marked, axis=0)
    slot_end = tl.minimum(slot_start + size, LANES) - 1
    return tl.gather(through, slot_end, axis=0) - tl.gather(through - marked, slot_start, axis=0)


@triton.jit
def infilled(status):
    """Whether positions of ``status`` [LANES] are of slots in infill."""
    return (status == CHOSEN) | (status == BLANK) | (status == ACCEPTED)


@triton.jit
def rows_of(member):
    """Canvas row [LANES] of each member: the members before it."""
    member = member.to(tl.int32)
    return tl.cumsum(member, axis=0) - member


@triton.jit
def first(condition, p, none):
    """The lowest p where ``condition`` [LANES] holds, else ``none``."""
    return tl.min(tl.where(condition, p, none), axis=0)


@triton.jit
def at_lane(values, p, lane):
    """The one of ``values`` [LANES] int32 at ``lane``; 0 if there is none."""
    return tl.sum(tl.where(p == lane, values, 0), axis=0)


@triton.jit
def block_length_at(start, ints):
    """Positions of the block that starts at response position ``start``."""
    return tl.minimum(tl.load(ints + F_BLOCK_LENGTH), tl.load(ints + F_BUDGET) - start)


@triton.jit
def _chance(cost, chance_table_ptr):
    return tl.load(chance_table_ptr + tl.minimum(cost, _LARGEST_COST))


@triton.jit
def _test_costs(status, origin, confidence, p, cost_table_ptr):
    """Cost [LANES] of the test of each proposal; 0 where there is none."""
    level = confidence * _LEVELS
    level = tl.where(level > 0, tl.minimum(level, _LEVELS), 0.0).to(tl.int32)
    return tl.load(cost_table_ptr + level, mask=(status == CHOSEN) & (origin != p), other=0)


@triton.jit
def _worth_feeding(chance, again, acceptance, pass_price):
    """Whether to feed a row at once that is needed with a chance."""
    later = _LEVELS + (_LEVELS - acceptance) * (pass_price + again)
    return chance.to(tl.int64) * later > _CERTAIN * _LEVELS


@triton.jit
def _predict_width(
    p, size, acceptance, pass_price, speculates, cost_table_ptr, chance_table_ptr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The most masks of a predict."""
    cost = tl.load(cost_table_ptr + acceptance) * (p - 1)
    worth = _worth_feeding(
        _chance(tl.maximum(cost, 0), chance_table_ptr), p, acceptance, pass_price
    )
    width = first((p >= 1) & ((p >= size) | (worth == 0)), p, LANES)
    return tl.where(speculates, width, size)


@triton.jit
def _members(
    status, origin, cost_before, proposed, opening, p, slot_start, size, phase, kept, width,
    acceptance, pass_price, speculates, chance_table_ptr, LANES: tl.constexpr,
):  # fmt: skip
    """Which positions [LANES] take part in the pass; whether an infill can end with it."""
    chosen = status == CHOSEN
    blank = status == BLANK
    before = rows_of(chosen)
    opens = before == tl.gather(before, slot_start, axis=0)
    worth = _worth_feeding(_chance(cost_before, chance_table_ptr), 1, acceptance, pass_price)
    # several slots under verification are tested as one run
    several = (phase == VERIFY) & (tl.sum(chosen.to(tl.int32), axis=0) > size)
    whole = tl.where(speculates & (several == 0), 0, 1)
    tested = chosen & (opens | worth | (p >= tl.where(whole > 0, 0, LANES)))
    if phase == INFILL:
        waiting = blank & (proposed == 0)
        fed = tested | (waiting & (origin == opening) & (p - opening < width))
        left = tl.max((blank | (chosen & (tested == 0))).to(tl.int32), axis=0)
        can_end = 1 - left
        accepted = (status == ACCEPTED) & (rows_of(infilled(status)) >= kept)
        # unless it can end, nothing can be committed: complete slots stay out
        active = proposed + (opening < slot_start + size).to(tl.int32)
        member = fed | (accepted & (active + can_end > 0))
    else:
        verified = tl.where(phase == VERIFY, tested.to(tl.int32), 0)
        member = tl.where(phase == PLAN, (status == MASKED).to(tl.int32), verified) > 0
        can_end = 0
    return member, can_end


@triton.jit
def _write_rows(
    where, row, token, position, draw, context, run_start, run_end, own_start,
    canvas_token_ptr, row_position_ptr, row_draw_ptr, row_context_ptr, row_run_start_ptr,
    row_run_end_ptr, row_own_start_ptr,
):  # fmt: skip
    tl.store(canvas_token_ptr + row, token.to(tl.int64), mask=where)
    tl.store(row_position_ptr + row, position, mask=where)
    tl.store(row_draw_ptr + row, draw, mask=where)
    tl.store(row_context_ptr + row, context, mask=where)
    tl.store(row_run_start_ptr + row, run_start, mask=where)
    tl.store(row_run_end_ptr + row, run_end, mask=where)
    tl.store(row_own_start_ptr + row, own_start, mask=where)


@triton.jit
def _riders(
    status, origin, member, row, rows, cost, through, slot_before, proposed, opening, p, slot_start,
    size, phase, can_end, block_start, next_length, predict_width, row_position_ptr,
    chance_table_ptr, LANES: tl.constexpr,
):  # fmt: skip
    """Of the rider at each block position [LANES]: score (0 for none), chance, width, begin.

    ``begin``: the block position of its first mask, where it is a predict.
    """
    chosen = status == CHOSEN
    blank = status == BLANK
    slot_end = slot_start + size
    unfed = in_slot(chosen & (member == 0), slot_start, size, LANES) > 0

    # predict, if just what lies before p is accepted of its slot
    alone = (phase == INFILL) | (slot_start == first(chosen & (p == slot_start), p, LANES))
    predicts = member & chosen & (p != slot_start) & alone
    chance = _chance(through - cost - slot_before, chance_table_ptr)
    chance -= _chance(through - slot_before, chance_table_ptr)
    # more proposals of the same operation
    tails = blank & (p == opening) & (origin < p)
    forced = tails & (proposed == 0)
    tails = tails & (forced | (unfed == 0))
    chance = tl.where(tails, _chance(through - slot_before, chance_table_ptr), chance)
    begin = tl.where(tails, origin, p)
    width = tl.where(predicts | tails, tl.minimum(p + predict_width, slot_end) - begin, 0)

    # plan, if the slot that starts at p is the last one committed
    masks = tl.sum((status == MASKED).to(tl.int32), axis=0) + tl.zeros([LANES], dtype=tl.int32)
    if phase == VERIFY:
        plans = chosen & (p == slot_start) & (tl.max(unfed.to(tl.int32), axis=0) == 0)
        masks += rows - row - size
        lane = tl.load(row_position_ptr + p, mask=p < rows, other=block_start) - block_start
        by_row = tl.gather(through, lane, axis=0)
        end_row = tl.minimum(row + size, LANES) - 1
        next_end_row = tl.minimum(row + 2 * size, LANES) - 1
        plan_chance = _chance(tl.gather(by_row, end_row, axis=0), chance_table_ptr)
        next_chance = _chance(tl.gather(by_row, next_end_row, axis=0), chance_table_ptr)
        plan_chance -= tl.where(row + size < rows, next_chance, 0)
    else:
        last_slot = tl.max(tl.where(infilled(status), slot_start, -1), axis=0)
        plans = p == tl.where(can_end > 0, last_slot, LANES)
        plan_chance = _chance(tl.max(through, axis=0) + tl.zeros_like(p), chance_table_ptr)
    masks = tl.where(masks > 0, masks, next_length)
    chance = tl.where(plans, plan_chance, chance)
    width = tl.where(plans, masks, width)
    score = tl.where(width > 0, chance * 256 // tl.maximum(width, 1), 0)
    return tl.where(forced, _FORCED, score), chance, width, begin


@triton.jit
def compose(
    status, origin, token, confidence, rounds, p, slot_start, size, phase, block_start, next_start,
    limit, draw, kept, tested, passed, mask_token_id, free_rows, pass_price, ints,
    canvas_row_ptr, rider_row_ptr, rider_width_ptr,
    canvas_token_ptr, row_position_ptr, row_draw_ptr, row_context_ptr, row_run_start_ptr,
    row_run_end_ptr, row_own_start_ptr, cost_table_ptr, chance_table_ptr,
    CANVAS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes the canvas of the next pass; returns its rows without and with riders."""
    in_infill = phase == INFILL
    speculates = (free_rows > 0) | (pass_price > 0)
    acceptance = _LEVELS * (passed + _PRIOR_PASSED) // (tested + _PRIOR_TESTED)
    cost = _test_costs(status, origin, confidence, p, cost_table_ptr)
    through = tl.cumsum(cost, axis=0)
    slot_before = tl.gather(through - cost, slot_start, axis=0)
    # an operation that goes on may take a slot's rows more than what is open in the block
    fits = tl.load(ints + F_BLOCK_LENGTH) + size <= CANVAS
    predict_width = _predict_width(
        p, size, acceptance, pass_price, speculates & fits, cost_table_ptr, chance_table_ptr, LANES
    )
    # of each lane's slot: proposals under test, and where the positions without one begin
    proposed = in_slot(status == CHOSEN, slot_start, size, LANES)
    opening = slot_start + size - in_slot(status == BLANK, slot_start, size, LANES)
    member, can_end = _members(
        status, origin, through - cost - slot_before, proposed, opening, p, slot_start, size, phase,
        kept, predict_width, acceptance, pass_price, speculates, chance_table_ptr, LANES,
    )  # fmt: skip
    row = rows_of(member)
    rows = tl.sum(member.to(tl.int32), axis=0)
    fed = tl.where((status == MASKED) | (status == BLANK), mask_token_id, token)
    zero = tl.zeros_like(p)
    tl.store(canvas_row_ptr + p, tl.where(member, row, -1), mask=p < CANVAS)
    tl.store(rider_row_ptr + p, zero - 1, mask=p < CANVAS)
    tl.store(rider_width_ptr + p, zero, mask=p < CANVAS)
    tl.store(row_position_ptr + p, zero - 1, mask=p < CANVAS)
    tl.debug_barrier()
    context = tl.where(in_infill, -kept, 0)
    _write_rows(
        member, row, fed, block_start + p, draw + tl.where(in_infill, rounds, 0), zero + context,
        zero, zero, tl.where(in_infill, row - (p - slot_start), 0),
        canvas_token_ptr, row_position_ptr, row_draw_ptr, row_context_ptr, row_run_start_ptr,
        row_run_end_ptr, row_own_start_ptr,
    )  # fmt: skip

    canvas = rows
    if in_infill | (speculates & (phase == VERIFY)):
        tl.debug_barrier()
        next_length = tl.where(next_start < limit, block_length_at(next_start, ints), 0)
        score, chance, width, begin = _riders(
            status, origin, member, row, rows, cost, through, slot_before, proposed, opening, p,
            slot_start, size, phase, can_end, block_start, next_length, predict_width,
            row_position_ptr, chance_table_ptr, LANES,
        )  # fmt: skip
        score = tl.where(score < tl.where(speculates, 1, _FORCED), 0, score)
        phase_rows = rows
        open_ = infilled(status) | (status == MASKED)
        guaranteed = tl.sum(open_.to(tl.int32), axis=0) - kept + size
        best = tl.max(score, axis=0)
        tried = 0
        while (best > 0) & (tried < _MAX_RIDERS):
            at = first(score == best, p, LANES)
            forced = best == _FORCED
            w = at_lane(width, p, at)
            end = canvas + w
            worth = at_lane(chance, p, at) * (w + pass_price) > w * _CERTAIN
            most = tl.where(forced, tl.minimum(guaranteed, CANVAS), CANVAS)
            if (forced | (end <= free_rows) | worth) & (end <= most):
                at_begin = at_lane(begin, p, at)
                if at % size == 0:  # a plan
                    again = tl.where(in_infill, LANES, at + size)
                    back = (status == MASKED) | ((status == CHOSEN) & (p >= again))
                    anew = tl.max(back.to(tl.int32), axis=0) == 0  # of the next block
                    where = back | (p < tl.where(anew, w, 0))
                    offset = tl.where(anew, p, rows_of(back))
                    position = tl.where(anew, next_start, block_start) + p
                    most = tl.max(tl.where(infilled(status), rounds, 0), axis=0)
                    rider_context = 0
                    rider_draw = draw + tl.where(in_infill, most, 0)
                    run_start = 0
                    run_end = tl.where(in_infill, phase_rows, at_lane(row, p, at) + size)
                else:  # a predict
                    where = (p >= at_begin) & (p < at_begin + w)
                    offset = p - at_begin
                    position = block_start + p
                    # an operation that goes on is counted already
                    begun = (at_begin < at).to(tl.int32)
                    rider_draw = draw + tl.where(in_infill, at_lane(rounds, p, at) - begun, 0)
                    rider_context = context
                    fed_at = at - begun
                    run_start = at_lane(row, p, fed_at) - fed_at % size
                    run_end = run_start + at_begin % size
                _write_rows(
                    where, canvas + offset, zero + mask_token_id, position, zero + rider_draw,
                    zero + rider_context, zero + run_start, zero + run_end, zero + canvas,
                    canvas_token_ptr, row_position_ptr, row_draw_ptr, row_context_ptr,
                    row_run_start_ptr, row_run_end_ptr, row_own_start_ptr,
                )  # fmt: skip
                tl.store(rider_row_ptr + at, canvas + at - at_begin)
                tl.store(rider_width_ptr + at, w - (at - at_begin))
                canvas = end
                rows = tl.where(forced, end, rows)
            score = tl.where(p == at, 0, score)
            best = tl.max(score, axis=0)
            tried += tl.where(forced, 0, 1)
    return rows, canvas
