"""The state transition after a pass, decided on the device.

One program moves one request. It thinks in block positions p = 0 .. canvas_length - 1, one lane
each; what the twin in ``transition_reference`` finds by walking over rows is found by scans:

    row(p)    = number of canvas members before p         row of p's statistics and of its KV
    fails(p)  = failed tests among the positions <= p
    intact(p) = fails(p) - fails(before p's slot) == 0    p and all before it in its slot passed

The grid and the shapes never depend on values, and nothing is read back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_refusion.decoding import DecodeState
from vllm_refusion.riders import (
    CERTAIN,
    LARGEST_COST,
    LEVELS,
    MAX_PRICE,
    MAX_RIDERS,
    NO_RIDERS,
    Speculation,
    device_tables,
)
from vllm_refusion.triton_kernels.layout import check, check_starts, layout
from vllm_refusion.triton_kernels.state_codes import (
    ACCEPTED,
    BLANK,
    CHOSEN,
    COMMITTED,
    COUNT_IDLE,
    COUNT_INFILL_VERIFY,
    COUNT_PLAN,
    COUNT_PLANS_RIDDEN,
    COUNT_PREDICT,
    COUNT_PREDICTS_RIDDEN,
    COUNT_REPLAY,
    COUNT_RIDER_ROWS_FED,
    COUNT_ROWS_FED,
    COUNT_TOKENS,
    COUNT_VERIFY,
    DONE,
    DROPPED,
    F_BLOCK_LENGTH,
    F_BLOCK_START,
    F_BUDGET,
    F_CANVAS,
    F_COMMITTED,
    F_DRAW,
    F_EMITTED,
    F_EOS,
    F_KEPT,
    F_LIMIT,
    F_MAX_TOKENS,
    F_PASSES,
    F_PHASE,
    F_PROMPT_LEN,
    F_RESUME,
    F_ROWS,
    F_SLOT_SIZE,
    IDLE,
    INFILL,
    MASKED,
    NUM_FIELDS,
    PLAN,
    PREFILL,
    REPLAY,
    START,
    VERIFY,
)

__all__ = ["layout", "transition"]

LANES_PER_WARP = 128
_CERTAIN = tl.constexpr(CERTAIN)
_LARGEST_COST = tl.constexpr(LARGEST_COST)
_LEVELS = tl.constexpr(LEVELS)
_MAX_RIDERS = tl.constexpr(MAX_RIDERS)


@triton.jit
def _in_slot(marked, slot_start, size, LANES: tl.constexpr):
    """How many positions of the slot of each lane are ``marked`` [LANES]."""
    marked = marked.to(tl.int32)
    through = tl.cumsum(marked, axis=0)
    slot_end = tl.minimum(slot_start + size, LANES) - 1
    return tl.gather(through, slot_end, axis=0) - tl.gather(through - marked, slot_start, axis=0)


@triton.jit
def _infilled(status):
    """Whether positions of ``status`` [LANES] are of slots in infill."""
    return (status == CHOSEN) | (status == BLANK) | (status == ACCEPTED)


@triton.jit
def _is_member(status, phase, kept, slot_start, size, LANES: tl.constexpr):
    """Whether positions of ``status`` [LANES] take part in the canvas of ``phase``.

    ``kept``: how many tokens of an infill have their KV already.
    """
    open_ = (status == CHOSEN) | (status == BLANK)
    if phase == INFILL:
        member = _infilled(status)
        member = member & (_rows_of(member) >= kept)
        # nothing can be committed while a slot lacks proposals: complete slots stay out
        if tl.max((status == BLANK).to(tl.int32), axis=0) > 0:
            member = member & (_in_slot(open_, slot_start, size, LANES) > 0)
    else:
        member = status == tl.where(phase == PLAN, MASKED, CHOSEN)
    return member


@triton.jit
def _rows_of(member):
    """Canvas row [LANES] of each member: the members before it."""
    member = member.to(tl.int32)
    return tl.cumsum(member, axis=0) - member


@triton.jit
def _intact(failed, slot_start):
    """Whether no position from the slot's start up to this one has failed; [LANES] each."""
    failed = failed.to(tl.int32)
    fails = tl.cumsum(failed, axis=0)
    return fails == tl.gather(fails - failed, slot_start, axis=0)


@triton.jit
def _keepable(status, member, masked, row, kept, LANES: tl.constexpr):
    """How many leading canvas rows hold accepted tokens that are the next in commit order.

    ``member``, ``masked`` [LANES]: what was in the canvas, and what of it as a mask.
    """
    order = _rows_of(_infilled(status)) - kept
    final = member & (masked == 0) & (status == ACCEPTED) & (order == row)
    first_other = tl.min(tl.where(member & (final == 0), row, LANES), axis=0)
    return tl.sum((final & (row < first_other)).to(tl.int32), axis=0)


@triton.jit
def _first(condition, p, none):
    """The lowest p where ``condition`` [LANES] holds, else ``none``."""
    return tl.min(tl.where(condition, p, none), axis=0)


@triton.jit
def _at(values, p, lane):
    """The one of ``values`` [LANES] int32 at ``lane``; 0 if there is none."""
    return tl.sum(tl.where(p == lane, values, 0), axis=0)


@triton.jit
def _drop_after(status, p, cut):
    """EOS at ``cut``: what lies after it and is not committed is dropped."""
    return tl.where((p > cut) & (status != COMMITTED), DROPPED, status)


@triton.jit
def _pick(takes, row, token, confidence, picked_ptr, picked_prob_ptr):
    """Where ``takes`` [LANES], the token picked in ``row`` and its probability."""
    token = tl.where(takes, tl.load(picked_ptr + row, mask=takes, other=0), token)
    probability = tl.load(picked_prob_ptr + row, mask=takes, other=0.0)
    return token, tl.where(takes, probability, confidence)


@triton.jit
def _plan(
    status, token, confidence, row, p, slot_start, picked_ptr, picked_prob_ptr, threshold,
    LANES: tl.constexpr,
):  # fmt: skip
    """Section 3.1: chooses slots; their drafts become the tokens."""
    masked = status == MASKED
    opens = masked & (p == slot_start)
    certainty = tl.load(picked_prob_ptr + row, mask=opens, other=-1.0)
    # below every probability, also for NaN: then the first slot is chosen and decoding goes on
    certainty = tl.where(certainty >= 0, certainty, -1.0)
    largest = tl.max(certainty, axis=0)
    sure = opens & (certainty > threshold)
    best = p == _first(opens & (certainty == largest), p, LANES)
    opens_chosen = tl.where(largest > threshold, sure.to(tl.int32), best.to(tl.int32))
    chosen = masked & (tl.gather(opens_chosen, slot_start, axis=0) == 1)
    token, confidence = _pick(chosen, row, token, confidence, picked_ptr, picked_prob_ptr)
    return tl.where(chosen, CHOSEN, status), token, confidence


@triton.jit
def _verify(status, token, row, p, slot_start, size, passes, eos, LANES: tl.constexpr):
    """Section 3.2. Returns status, the rows to commit (0: go on to infill), where EOS cuts."""
    member = status == CHOSEN
    failed = member & (p != slot_start) & (passes == 0)
    reached = member & (p < _first(failed, p, LANES))
    prefix_eos = _first(reached & (token == eos), p, LANES)
    ends = reached & (p <= prefix_eos)
    accepted = tl.sum(ends.to(tl.int32), axis=0)
    # with EOS the last slot is cut right after it, else only whole slots count
    kept = tl.where(prefix_eos < LANES, accepted, accepted // size * size)

    begun = tl.where(member, tl.where(_intact(failed, slot_start), ACCEPTED, BLANK), status)
    infill_eos = _first((begun == ACCEPTED) & (token == eos), p, LANES)
    back = tl.where(member & (row >= kept), MASKED, status)
    cut = tl.where(kept > 0, prefix_eos, infill_eos)
    return _drop_after(tl.where(kept > 0, back, begun), p, cut), kept, cut


@triton.jit
def _infill(status, token, p, slot_start, passes, eos, LANES: tl.constexpr):
    """Section 3.3. Returns status and where EOS cuts.

    Slots with proposals (CHOSEN) are verified; those of BLANK ones have just been picked.
    """
    chosen = status == CHOSEN
    blank = status == BLANK
    before = tl.gather(status, tl.maximum(p - 1, 0), axis=0)
    # the first proposal is accepted without a test
    tested = chosen & (p != slot_start) & (before != ACCEPTED)
    good = _intact(tested & (passes == 0), slot_start)
    status = tl.where(chosen, tl.where(good, ACCEPTED, BLANK), status)
    status = tl.where(blank, CHOSEN, status)
    cut = _first((status == ACCEPTED) & (token == eos), p, LANES)
    return _drop_after(status, p, cut), cut


@triton.jit
def _block_statuses(p, start, ints):
    """Statuses [LANES] of a block that starts now at response position ``start``."""
    length = tl.minimum(tl.load(ints + F_BLOCK_LENGTH), tl.load(ints + F_BUDGET) - start)
    return tl.where(p < length, MASKED, DROPPED)


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
def _chance(cost, chance_table_ptr):
    return tl.load(chance_table_ptr + tl.minimum(cost, _LARGEST_COST))


@triton.jit
def _riders(
    status, confidence, member, row, rows, p, slot_start, size, phase, block_start, next_length,
    row_position_ptr, cost_table_ptr, chance_table_ptr, LANES: tl.constexpr,
):  # fmt: skip
    """Chance and width [LANES] of the rider at each block position; width 0 for none."""
    opens = member & (p == slot_start)
    before = tl.gather(status, tl.maximum(p - 1, 0), axis=0)
    tested = member & (status == CHOSEN) & (p != slot_start) & (before != ACCEPTED)
    level = confidence * _LEVELS
    level = tl.where(level > 0, tl.minimum(level, _LEVELS), 0.0).to(tl.int32)
    cost = tl.load(cost_table_ptr + level, mask=tested, other=0)
    through = tl.cumsum(cost, axis=0)
    slot_before = tl.gather(through - cost, slot_start, axis=0)

    # predict, if just what lies before p is accepted of its slot
    alone = (phase == INFILL) | (slot_start == _first(opens, p, LANES))
    predicts = member & (status == CHOSEN) & (p != slot_start) & alone
    chance = _chance(through - cost - slot_before, chance_table_ptr)
    chance -= _chance(through - slot_before, chance_table_ptr)
    width = tl.where(predicts, slot_start + size - p, 0)

    # plan, if the slot that starts at p is the last one committed
    masks = tl.sum((status == MASKED).to(tl.int32), axis=0) + tl.zeros([LANES], dtype=tl.int32)
    if phase == VERIFY:
        plans = opens
        masks += rows - row - size
        lane = tl.load(row_position_ptr + p, mask=p < rows, other=block_start) - block_start
        by_row = tl.gather(through, lane, axis=0)
        end_row = tl.minimum(row + size, LANES) - 1
        next_end_row = tl.minimum(row + 2 * size, LANES) - 1
        plan_chance = _chance(tl.gather(by_row, end_row, axis=0), chance_table_ptr)
        next_chance = _chance(tl.gather(by_row, next_end_row, axis=0), chance_table_ptr)
        plan_chance -= tl.where(row + size < rows, next_chance, 0)
    else:
        last_slot = tl.max(tl.where(member, slot_start, -1), axis=0)
        any_blank = tl.max((status == BLANK).to(tl.int32), axis=0)
        plans = p == tl.where(any_blank > 0, LANES, last_slot)
        plan_chance = _chance(tl.max(through, axis=0) + tl.zeros_like(p), chance_table_ptr)
    masks = tl.where(masks > 0, masks, next_length)
    return tl.where(plans, plan_chance, chance), tl.where(plans, masks, width)


@triton.jit
def _compose(
    status, token, confidence, rounds, p, slot_start, size, phase, block_start, next_start, limit,
    draw, kept, mask_token_id, free_rows, pass_price, ints, rider_row_ptr,
    canvas_token_ptr, row_position_ptr, row_draw_ptr, row_context_ptr, row_run_start_ptr,
    row_run_end_ptr, row_own_start_ptr, cost_table_ptr, chance_table_ptr,
    CANVAS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes the canvas of the next pass; returns its rows without and with riders."""
    member = _is_member(status, phase, kept, slot_start, size, LANES)
    row = _rows_of(member)
    rows = tl.sum(member.to(tl.int32), axis=0)
    in_infill = phase == INFILL
    fed = tl.where((status == MASKED) | (status == BLANK), mask_token_id, token)
    zero = tl.zeros_like(p)
    tl.store(row_position_ptr + p, zero - 1, mask=p < CANVAS)
    tl.store(rider_row_ptr + p, zero - 1, mask=p < CANVAS)
    tl.debug_barrier()
    _write_rows(
        member, row, fed, block_start + p, draw + tl.where(in_infill, rounds, 0), zero - kept,
        zero, zero, tl.where(in_infill, row - (p - slot_start), 0),
        canvas_token_ptr, row_position_ptr, row_draw_ptr, row_context_ptr, row_run_start_ptr,
        row_run_end_ptr, row_own_start_ptr,
    )  # fmt: skip

    canvas = rows
    speculates = (free_rows > 0) | (pass_price > 0)
    if speculates & ((phase == VERIFY) | in_infill):
        tl.debug_barrier()
        length = tl.minimum(tl.load(ints + F_BLOCK_LENGTH), tl.load(ints + F_BUDGET) - next_start)
        chance, width = _riders(
            status, confidence, member, row, rows, p, slot_start, size, phase, block_start,
            tl.where(next_start < limit, length, 0),
            row_position_ptr, cost_table_ptr, chance_table_ptr, LANES,
        )  # fmt: skip
        score = tl.where(width > 0, chance * 256 // tl.maximum(width, 1), 0)
        best = tl.max(score, axis=0)
        tried = 0
        while (best > 0) & (tried < _MAX_RIDERS):
            at = _first(score == best, p, LANES)
            w = _at(width, p, at)
            end = canvas + w
            worth = _at(chance, p, at) * (w + pass_price) > w * _CERTAIN
            if ((end <= free_rows) | worth) & (end <= CANVAS):
                at_row = _at(row, p, at)
                if at % size == 0:  # a plan
                    again = tl.where(in_infill, LANES, at + size)
                    back = (status == MASKED) | ((status == CHOSEN) & (p >= again))
                    anew = tl.max(back.to(tl.int32), axis=0) == 0  # of the next block
                    where = back | (p < tl.where(anew, w, 0))
                    offset = tl.where(anew, p, _rows_of(back))
                    position = tl.where(anew, next_start, block_start) + p
                    most = tl.max(tl.where(_infilled(status), rounds, 0), axis=0)
                    context = 0
                    rider_draw = draw + tl.where(in_infill, most, 0)
                    run_start = 0
                    run_end = tl.where(in_infill, rows, at_row + size)
                else:  # a predict
                    where = (p >= at) & (p < at + w)
                    offset = p - at
                    position = block_start + p
                    rider_draw = draw + tl.where(in_infill, _at(rounds, p, at), 0)
                    context = -kept
                    run_start = at_row - at % size
                    run_end = at_row
                _write_rows(
                    where, canvas + offset, zero + mask_token_id, position, zero + rider_draw,
                    zero + context, zero + run_start, zero + run_end, zero + canvas,
                    canvas_token_ptr, row_position_ptr, row_draw_ptr, row_context_ptr,
                    row_run_start_ptr, row_run_end_ptr, row_own_start_ptr,
                )  # fmt: skip
                tl.store(rider_row_ptr + at, canvas)
                canvas = end
            score = tl.where(p == at, 0, score)
            best = tl.max(score, axis=0)
            tried += 1
    return rows, canvas


@triton.jit(do_not_specialize=["free_rows", "pass_price"])
def _transition_kernel(
    ints_ptr,  # [max_reqs, NUM_FIELDS] int32
    slot_threshold_ptr,  # [max_reqs] float32
    token_threshold_ptr,  # [max_reqs] float32
    status_ptr,  # [max_reqs, W] int32
    token_ptr,  # [max_reqs, W] int32
    confidence_ptr,  # [max_reqs, W] float32
    rounds_ptr,  # [max_reqs, W] int32
    rider_row_ptr,  # [max_reqs, W] int32
    canvas_token_ptr,  # [max_reqs, W] int64
    row_position_ptr,  # [max_reqs, W] int32
    row_draw_ptr,  # [max_reqs, W] int32
    row_context_ptr,  # [max_reqs, W] int32
    row_run_start_ptr,  # [max_reqs, W] int32
    row_run_end_ptr,  # [max_reqs, W] int32
    row_own_start_ptr,  # [max_reqs, W] int32
    response_ptr,  # [max_reqs, P] int32
    order_ptr,  # [max_reqs, P] int32
    group_context_ptr,  # [max_reqs, P] int32
    counters_ptr,  # [NUM_COUNTERS] int64
    idx_mapping_ptr,  # [R] int64
    query_start_loc_ptr,  # [R+1] int32
    logits_start_ptr,  # [R+1] int32
    num_computed_ptr,  # [max_reqs] int32
    prefill_len_ptr,  # [max_reqs] int32
    picked_ptr,  # [rows] int32
    picked_prob_ptr,  # [rows] float32
    given_prob_ptr,  # [rows] float32
    emit_limit_ptr,  # [R] int32
    sampled_ptr,  # [R, W] int32
    num_sampled_ptr,  # [R] int32
    num_rejected_ptr,  # [R] int32
    cost_table_ptr,  # [LEVELS+1] int32
    chance_table_ptr,  # [LARGEST_COST+1] int32
    canvas_token_stride,
    sampled_stride,
    max_response,
    mask_token_id,
    free_rows,
    pass_price,
    CANVAS: tl.constexpr,
    LANES: tl.constexpr,
):
    request = tl.program_id(0)
    slot = tl.load(idx_mapping_ptr + request).to(tl.int64)
    query_len = tl.load(query_start_loc_ptr + request + 1) - tl.load(query_start_loc_ptr + request)
    ints = ints_ptr + slot * NUM_FIELDS
    phase = tl.load(ints + F_PHASE)
    if phase == IDLE:
        tl.store(num_sampled_ptr + request, 0)
        tl.store(num_rejected_ptr + request, query_len)
        return

    prompt_len = tl.load(ints + F_PROMPT_LEN)
    size = tl.load(ints + F_SLOT_SIZE)
    block_start = tl.load(ints + F_BLOCK_START)
    limit = tl.load(ints + F_LIMIT)
    emitted = tl.load(ints + F_EMITTED)
    committed = tl.load(ints + F_COMMITTED)
    rows = tl.load(ints + F_ROWS)
    canvas = tl.load(ints + F_CANVAS)
    draw = tl.load(ints + F_DRAW)
    passes_made = tl.load(ints + F_PASSES)
    infill_kept = tl.load(ints + F_KEPT)
    computed = tl.load(num_computed_ptr + slot)

    p = tl.arange(0, LANES)
    of_block = slot * CANVAS + p
    status = tl.load(status_ptr + of_block, mask=p < CANVAS, other=DROPPED)
    token = tl.load(token_ptr + of_block, mask=p < CANVAS, other=0)
    confidence = tl.load(confidence_ptr + of_block, mask=p < CANVAS, other=0.0)
    rounds = tl.load(rounds_ptr + of_block, mask=p < CANVAS, other=0)
    rider_row = tl.load(rider_row_ptr + of_block, mask=p < CANVAS, other=-1)
    slot_start = p - p % size
    member = _is_member(status, phase, infill_kept, slot_start, size, LANES)
    row = _rows_of(member)

    # Decide. What follows a commit is either a plan, or START of the block at next_start, or DONE.
    next_phase = phase
    next_start = block_start + tl.load(ints + F_BLOCK_LENGTH)
    kept = 0
    commits = 0  # tokens
    decided = 0
    counter = -1
    fed = 0
    cut = LANES
    first_row = tl.load(logits_start_ptr + request).to(tl.int64)
    picks = picked_ptr + first_row
    pick_probs = picked_prob_ptr + first_row
    slot_threshold = tl.load(slot_threshold_ptr + slot)
    if phase == PREFILL:
        kept = tl.minimum(query_len, tl.load(prefill_len_ptr + slot) - computed)
        fed = query_len - kept  # the first plan
        if computed + query_len >= tl.load(prefill_len_ptr + slot):
            replayed = tl.load(prefill_len_ptr + slot) - prompt_len
            next_phase = tl.where(replayed < committed, REPLAY, tl.load(ints + F_RESUME))
    elif phase == REPLAY:
        counter = COUNT_REPLAY
        replayed = computed - prompt_len
        kept = tl.minimum(query_len, committed - replayed)
        fed = kept
        next_phase = tl.where(replayed + kept < committed, REPLAY, tl.load(ints + F_RESUME))
    elif (phase == DONE) | (query_len < rows):
        counter = COUNT_IDLE
    else:
        decided = 1
        fed = tl.minimum(query_len, canvas)
        tl.atomic_add(counters_ptr + COUNT_RIDER_ROWS_FED, fed - rows)
        passes_made += 1
        if phase == PLAN:
            counter = COUNT_PLAN
            draw += 1
            status, token, confidence = _plan(
                status, token, confidence, row, p, slot_start, picks, pick_probs,
                slot_threshold, LANES,
            )  # fmt: skip
            next_phase = VERIFY
        else:
            # the row before gives this row's token its probability
            tested = member & (row > 0)
            given = tl.load(given_prob_ptr + first_row + row - 1, mask=tested, other=-1.0)
            passes = given > tl.load(token_threshold_ptr + slot)
            eos = tl.load(ints + F_EOS)
            if phase == VERIFY:
                counter = COUNT_VERIFY
                rounds = tl.where(member, 0, rounds)
                status, commits, cut = _verify(
                    status, token, row, p, slot_start, size, passes, eos, LANES
                )
                kept = commits
                if commits == 0:
                    kept = _keepable(status, member, status == MASKED, row, 0, LANES)
                    infill_kept = kept
            else:
                blank = status == BLANK
                any_blank = tl.max(blank.to(tl.int32), axis=0) > 0
                counter = tl.where(any_blank, COUNT_PREDICT, COUNT_INFILL_VERIFY)
                token, confidence = _pick(blank, row, token, confidence, picks, pick_probs)
                rounds += blank.to(tl.int32)
                status, cut = _infill(status, token, p, slot_start, passes, eos, LANES)
                kept = _keepable(status, member, blank, row, infill_kept, LANES)
                infill_kept += kept
                total = tl.sum(_infilled(status).to(tl.int32), axis=0)
                commits = tl.where(infill_kept >= total, total, 0)
            limit = tl.minimum(limit, tl.where(cut < LANES, block_start + cut + 1, limit))
            next_phase = INFILL

    # Every load of the old state comes before every store of the new one: the threads of a
    # program share the state of its request.
    tl.debug_barrier()

    if counter >= 0:
        tl.atomic_add(counters_ptr + counter, 1)
        tl.atomic_add(counters_ptr + COUNT_ROWS_FED, fed)

    if commits > 0:
        slots = _infilled(status)
        rank = tl.where(phase == INFILL, tl.where(slots, _rows_of(slots), commits), row)
        now = (slots | member) & (rank < commits)
        at = slot * max_response + committed + rank
        group = tl.where(phase == INFILL, committed, -1)
        tl.store(response_ptr + slot * max_response + block_start + p, token, mask=now)
        tl.store(order_ptr + at, block_start + p, mask=now)
        tl.store(group_context_ptr + at, tl.zeros([LANES], dtype=tl.int32) + group, mask=now)
        committed += commits
        infill_kept = 0
        draw += tl.where(phase == INFILL, tl.max(tl.where(now, rounds, 0), axis=0), 0)
        last_slot = tl.max(tl.where(now, slot_start, -1), axis=0)
        status = tl.where(now, COMMITTED, status)
        following = tl.where(next_start >= limit, DONE, START)
        masked = tl.sum((status == MASKED).to(tl.int32), axis=0)
        next_phase = tl.where(masked > 0, PLAN, following)
    else:
        # after the prompt the first block starts; its plan may have been fed with the prompt
        last_slot = tl.where((next_phase == START) & (phase == PREFILL) & (fed >= rows), -1, LANES)
        next_start = tl.where(next_phase == START, 0, next_start)

    if next_phase == START:
        decided = 1
        next_phase = PLAN
        block_start = next_start
        next_start = block_start + tl.load(ints + F_BLOCK_LENGTH)
        status = _block_statuses(p, block_start, ints)
        token = tl.zeros([LANES], dtype=tl.int32)

    # What comes next is done at once where its rows were in this canvas.
    if (next_phase == PLAN) & (last_slot < LANES) & (cut == LANES):
        masked = status == MASKED
        rider = tl.where(phase == PREFILL, 0, _at(rider_row + 1, p, last_slot) - 1)
        if (rider >= 0) & (rider + tl.sum(masked.to(tl.int32), axis=0) <= fed):
            draw += 1
            status, token, confidence = _plan(
                status, token, confidence, rider + _rows_of(masked), p, slot_start, picks,
                pick_probs, slot_threshold, LANES,
            )  # fmt: skip
            next_phase = VERIFY
            tl.atomic_add(counters_ptr + COUNT_PLANS_RIDDEN, 1)
    if (next_phase == INFILL) & (decided == 0) & (phase != INFILL):
        decided = 1  # resumed: no accepted token is kept any more
    elif (next_phase == INFILL) & (decided == 1):
        blank = status == BLANK
        width = _in_slot(blank, slot_start, size, LANES)
        opening = slot_start + size - width
        rider = tl.gather(rider_row, tl.minimum(opening, LANES - 1), axis=0)
        rides = blank & (rider >= 0) & (rider + width <= fed)
        token, confidence = _pick(rides, rider + p - opening, token, confidence, picks, pick_probs)
        status = tl.where(rides, CHOSEN, status)
        rounds += rides.to(tl.int32)
        ridden = tl.sum((rides & (p == opening)).to(tl.int32), axis=0)
        tl.atomic_add(counters_ptr + COUNT_PREDICTS_RIDDEN, ridden)

    if decided == 1:
        tl.store(status_ptr + of_block, status, mask=p < CANVAS)
        tl.store(token_ptr + of_block, token, mask=p < CANVAS)
        tl.store(confidence_ptr + of_block, confidence, mask=p < CANVAS)
        tl.store(rounds_ptr + of_block, rounds, mask=p < CANVAS)
        rows, canvas = _compose(
            status, token, confidence, rounds, p, slot_start, size, next_phase, block_start,
            next_start, limit, draw, infill_kept, mask_token_id, free_rows, pass_price, ints,
            rider_row_ptr + slot * CANVAS,
            canvas_token_ptr + slot * canvas_token_stride,
            row_position_ptr + slot * CANVAS,
            row_draw_ptr + slot * CANVAS,
            row_context_ptr + slot * CANVAS,
            row_run_start_ptr + slot * CANVAS,
            row_run_end_ptr + slot * CANVAS,
            row_own_start_ptr + slot * CANVAS,
            cost_table_ptr,
            chance_table_ptr,
            CANVAS, LANES,
        )  # fmt: skip

    # Tokens newly contiguous in position order.
    count = 0
    if phase != PREFILL:
        contiguous = tl.minimum(_first(status != COMMITTED, p, CANVAS), CANVAS)
        end = tl.minimum(block_start + contiguous, limit)
        end = tl.minimum(end, tl.load(ints + F_MAX_TOKENS))
        end = tl.minimum(end, emitted + tl.load(emit_limit_ptr + request))
        count = tl.maximum(end - emitted, 0)
        tl.debug_barrier()  # some of them are committed in this pass
        source = response_ptr + slot * max_response + emitted
        tokens = tl.load(source + p, mask=p < count)
        tl.store(sampled_ptr + request * sampled_stride + p, tokens, mask=p < count)
        tl.atomic_add(counters_ptr + COUNT_TOKENS, count)

    tl.store(num_sampled_ptr + request, count)
    tl.store(num_rejected_ptr + request, query_len - kept)
    tl.store(ints + F_PHASE, next_phase)
    tl.store(ints + F_BLOCK_START, block_start)
    tl.store(ints + F_LIMIT, limit)
    tl.store(ints + F_EMITTED, emitted + count)
    tl.store(ints + F_COMMITTED, committed)
    tl.store(ints + F_ROWS, rows)
    tl.store(ints + F_CANVAS, canvas)
    tl.store(ints + F_DRAW, draw)
    tl.store(ints + F_PASSES, passes_made)
    tl.store(ints + F_KEPT, infill_kept)


def transition(
    state: DecodeState,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    logits_start: torch.Tensor,
    num_computed: torch.Tensor,
    prefill_len: torch.Tensor,
    picked: torch.Tensor,
    picked_prob: torch.Tensor,
    given_prob: torch.Tensor,
    emit_limit: torch.Tensor,
    sampled: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    speculation: Speculation = NO_RIDERS,
) -> None:
    """Same arguments and effects as ``transition_reference``, as one kernel."""
    requests = len(idx_mapping)
    for starts in (query_start_loc, logits_start):
        check_starts(starts, requests)
    for per_slot in (num_computed, prefill_len):
        check(per_slot, (state.max_requests,), torch.int32)
    check(picked, picked.shape, torch.int32)
    for probability in (picked_prob, given_prob):
        check(probability, picked.shape, torch.float32)
    for count in (emit_limit, num_sampled, num_rejected):
        check(count, (requests,), torch.int32)
    assert idx_mapping.is_contiguous() and state.canvas_token.stride(1) == 1
    assert sampled.shape == (requests, state.canvas_length) and sampled.stride(1) == 1
    assert 0 <= speculation.pass_price <= MAX_PRICE, speculation
    lanes = triton.next_power_of_2(state.canvas_length)
    _transition_kernel[(requests,)](
        state.ints,
        state.slot_threshold,
        state.token_threshold,
        state.status,
        state.token,
        state.confidence,
        state.rounds,
        state.rider_row,
        state.canvas_token,
        state.row_position,
        state.row_draw,
        state.row_context,
        state.row_run_start,
        state.row_run_end,
        state.row_own_start,
        state.response,
        state.order,
        state.group_context,
        state.counters,
        idx_mapping,
        query_start_loc,
        logits_start,
        num_computed,
        prefill_len,
        picked,
        picked_prob,
        given_prob,
        emit_limit,
        sampled,
        num_sampled,
        num_rejected,
        *device_tables(state.device),
        state.canvas_token.stride(0),
        sampled.stride(0),
        state.max_response,
        state.mask_token_id,
        speculation.free_rows,
        speculation.pass_price,
        CANVAS=state.canvas_length,
        LANES=lanes,
        num_warps=max(1, lanes // LANES_PER_WARP),
    )
