"""Riders: masks behind the rows of the phase, of what comes next in some outcomes of the pass.

Used by ``compose``; what they are is described in ``vllm_refusion/decoding/state.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_refusion.decoding.speculation import CERTAIN, MAX_RIDERS
from vllm_refusion.triton_kernels.constant import Constant
from vllm_refusion.triton_kernels.lanes import (
    NOWHERE,
    at_lane,
    count,
    first,
    in_slot,
    infilled,
    rows_of,
)
from vllm_refusion.triton_kernels.packed import Row, write_rows
from vllm_refusion.triton_kernels.state_codes import (
    BLANK,
    CHOSEN,
    INFILL,
    MASKED,
    P_RIDER_ROW,
    P_RIDER_WIDTH,
    R_POSITION,
    VERIFY,
)
from vllm_refusion.triton_kernels.worth import chance_of

_CERTAIN = Constant(CERTAIN)
_MAX_RIDERS = Constant(MAX_RIDERS)
_FORCED = Constant(2**30)  # score of what belongs to the phase; riders' are below 2**25


class Riders(NamedTuple):
    """The rider at each block position [LANES]; ``begin``: where its masks begin, of a predict."""

    score: tl.tensor  # 0: none
    chance: tl.tensor
    width: tl.tensor
    begin: tl.tensor


@triton.jit
def riders_of(block, members, costs, course, canvas, corrects, next_length, prices, lanes):
    """All riders that could follow the rows of the phase."""
    p, size = lanes.p, lanes.size
    chosen = block.status == CHOSEN
    blank = block.status == BLANK
    unfed = chosen & (members.member == 0)
    through = costs.through - costs.slot_before

    # predict, if just what lies before p is accepted of its slot, and no correction stands at p
    leads = lanes.slot_start == first(chosen & (p == lanes.slot_start), lanes)
    alone = ((course.phase == INFILL) | leads) & (corrects == 0)
    predicts = members.member & chosen & (p != lanes.slot_start) & alone
    chance = chance_of(through - costs.cost, prices.table) - chance_of(through, prices.table)
    # more proposals of the same operation
    tails = blank & (p == members.opening) & (block.origin < p)
    forced = tails & (members.proposed == 0)
    tails = tails & (forced | (in_slot(unfed, lanes) == 0))
    chance = tl.where(tails, chance_of(through, prices.table), chance)
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
        chance = chance_of(tl.gather(by_row, end_row, axis=0), prices.table)
        next_chance = chance_of(tl.gather(by_row, next_end_row, axis=0), prices.table)
        chance -= tl.where(members.row + size < rows, next_chance, 0)
    else:
        last_slot = tl.max(tl.where(infilled(block.status), lanes.slot_start, -1), axis=0)
        plans = p == tl.where(members.can_end > 0, last_slot, NOWHERE)
        chance = chance_of(tl.max(costs.through, axis=0) + tl.zeros_like(p), prices.table)
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
    position = tl.where(anew, course.next_start, course.block_start) + p
    value = Row(
        zero + mask_token_id,
        position,
        position,
        zero + course.draw + tl.where(infills, most_rounds, 0),
        zero,
        zero,
        zero + tl.where(infills, members.rows, at_lane(members.row, lanes, at) + lanes.size),
        zero + end,
    )
    write_rows(canvas, where, end + tl.where(anew, p, rows_of(back)), value)


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
        course.block_start + p,
        zero + course.draw + rounds,
        zero - tl.where(infills, course.kept, 0),
        zero + run_start,
        zero + run_start + begin % lanes.size,
        zero + end,
    )
    write_rows(canvas, (p >= begin) & (p < begin + width), end + p - begin, value)


@triton.jit
def take_riders(block, members, riders, course, canvas, prices, mask_token_id, lanes):
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
