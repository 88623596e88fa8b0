"""The next canvas of one request, written on the device; used by the transition kernel.

The twin is ``compose_twin``. One lane stands for each block position p; what the twin finds by
walking over rows is found by scans.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_refusion.triton_kernels.decisions import waiting
from vllm_refusion.triton_kernels.lanes import count, in_slot, infilled, opening, rows_of
from vllm_refusion.triton_kernels.packed import Row, block_length_at, write_rows
from vllm_refusion.triton_kernels.riders import riders_of, take_riders
from vllm_refusion.triton_kernels.state_codes import (
    ACCEPTED,
    BLANK,
    CHOSEN,
    F_CORRECTS,
    INFILL,
    MASKED,
    P_CANVAS_ROW,
    P_RIDER_ROW,
    P_RIDER_WIDTH,
    PLAN,
    R_POSITION,
    R_TARGET,
    VERIFY,
)
from vllm_refusion.triton_kernels.worth import chance_of, predict_width, test_costs, worth_feeding


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


@triton.jit
def _members(block, costs, course, width, prices, lanes):
    """Which positions take part in the pass."""
    chosen = block.status == CHOSEN
    blank = block.status == BLANK
    proposed = in_slot(chosen, lanes)
    opens_at = opening(blank, lanes)
    before = rows_of(chosen)
    opens = before == tl.gather(before, lanes.slot_start, axis=0)
    reached = chance_of(costs.through - costs.cost - costs.slot_before, prices.table)
    # several slots under verification are tested as one run
    several = (course.phase == VERIFY) & (count(chosen) > lanes.size)
    whole = tl.where(prices.speculates & (several == 0), 0, 1) + tl.zeros_like(lanes.p)
    tested = chosen & (opens | worth_feeding(reached, 1, prices) | (whole > 0))
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
def _write_phase_rows(block, members, course, canvas, corrects, mask_token_id, lanes):
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
    # the position that a row picks a token for: the next, where it may have to correct
    tells_next = (corrects > 0) & (is_mask == 0) & (p + 1 < lanes.slot_start + lanes.size)
    told = tl.minimum(p + tells_next.to(tl.int32), lanes.last)
    value = Row(
        tl.where(is_mask, mask_token_id, block.token),
        course.block_start + p,
        course.block_start + told,
        course.draw + tl.where(infills, tl.gather(block.rounds, told, axis=0), 0),
        zero - tl.where(infills, course.kept, 0),
        zero,
        zero,
        tl.where(infills, members.row - (p - lanes.slot_start), 0),
    )
    write_rows(canvas, members.member, members.row, value)


@triton.jit
def compose(block, course, ints, canvas, prices, mask_token_id, lanes):
    """Writes the canvas of the next pass; returns its rows without and with riders."""
    corrects = tl.load(ints + F_CORRECTS)
    costs = test_costs(block, corrects, prices, lanes)
    width = predict_width(ints, canvas, prices, lanes)
    members = _members(block, costs, course, width, prices, lanes)
    _write_phase_rows(block, members, course, canvas, corrects, mask_token_id, lanes)
    rows = members.rows
    end = members.rows
    if (course.phase == INFILL) | (prices.speculates & (course.phase == VERIFY)):
        tl.debug_barrier()
        next_start = course.next_start
        next_length = tl.where(next_start < course.limit, block_length_at(next_start, ints), 0)
        candidates = riders_of(
            block, members, costs, course, canvas, corrects, next_length, prices, lanes
        )
        rows, end = take_riders(
            block, members, candidates, course, canvas, prices, mask_token_id, lanes
        )
    return rows, end
