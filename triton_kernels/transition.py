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
from vllm_refusion.triton_kernels.layout import check, check_starts, layout
from vllm_refusion.triton_kernels.state_codes import (
    ACCEPTED,
    CHOSEN,
    CHOSEN_OR_ACCEPTED,
    COMMITTED,
    COUNT_IDLE,
    COUNT_INFILL_VERIFY,
    COUNT_PLAN,
    COUNT_PREDICT,
    COUNT_REPLAY,
    COUNT_ROWS_FED,
    COUNT_TOKENS,
    COUNT_VERIFY,
    DONE,
    DROPPED,
    F_BLOCK_LENGTH,
    F_BLOCK_START,
    F_BUDGET,
    F_COMMITTED,
    F_DRAW,
    F_EMITTED,
    F_EOS,
    F_LIMIT,
    F_MAX_TOKENS,
    F_PASSES,
    F_PHASE,
    F_PROMPT_LEN,
    F_RESUME,
    F_ROWS,
    F_SLOT_SIZE,
    IDLE,
    INFILL_VERIFY,
    MASKED,
    NUM_FIELDS,
    ONLY_CHOSEN,
    ONLY_MASKED,
    PLAN,
    PREDICT,
    PREFILL,
    REPLAY,
    START,
    VERIFY,
)

__all__ = ["layout", "transition"]

LANES_PER_WARP = 128


@triton.jit
def _is_member(status, phase, slot_start, size, LANES: tl.constexpr):
    """Whether positions of ``status`` [LANES] take part in the canvas of ``phase``."""
    statuses = tl.where(phase == PLAN, ONLY_MASKED, CHOSEN_OR_ACCEPTED)
    statuses = tl.where(phase == VERIFY, ONLY_CHOSEN, statuses)
    member = ((statuses >> status) & 1) == 1
    if phase == PREDICT:  # a complete slot has nothing to propose
        chosen = (status == CHOSEN).to(tl.int32)
        through = tl.cumsum(chosen, axis=0)
        slot_end = tl.minimum(slot_start + size, LANES) - 1
        before = tl.gather(through - chosen, slot_start, axis=0)
        member = member & (tl.gather(through, slot_end, axis=0) > before)
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
def _first(condition, p, none):
    """The lowest p where ``condition`` [LANES] holds, else ``none``."""
    return tl.min(tl.where(condition, p, none), axis=0)


@triton.jit
def _drop_after(status, p, cut):
    """EOS at ``cut``: what lies after it and is not committed is dropped."""
    return tl.where((p > cut) & (status != COMMITTED), DROPPED, status)


@triton.jit
def _plan(
    status, token, row, p, slot_start, picked_ptr, picked_prob_ptr, threshold, LANES: tl.constexpr
):  # fmt: skip
    """Section 3.1: chooses slots; their drafts become the tokens. Returns status, token."""
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
    draft = tl.load(picked_ptr + row, mask=chosen, other=0)
    return tl.where(chosen, CHOSEN, status), tl.where(chosen, draft, token)


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

    begun = tl.where(member & _intact(failed, slot_start), ACCEPTED, status)
    infill_eos = _first((begun == ACCEPTED) & (token == eos), p, LANES)
    back = tl.where(member & (row >= kept), MASKED, status)
    cut = tl.where(kept > 0, prefix_eos, infill_eos)
    return _drop_after(tl.where(kept > 0, back, begun), p, cut), kept, cut


@triton.jit
def _infill_verify(status, token, p, slot_start, passes, eos, LANES: tl.constexpr):
    """Section 3.3, verify. Returns status, the rows to commit (0: go on), where EOS cuts."""
    chosen = status == CHOSEN
    before = tl.gather(status, tl.maximum(p - 1, 0), axis=0)
    # the first proposal is accepted without a test
    tested = chosen & (p != slot_start) & (before != ACCEPTED)
    good = chosen & _intact(tested & (passes == 0), slot_start)
    status = tl.where(good, ACCEPTED, status)
    cut = _first((status == ACCEPTED) & (token == eos), p, LANES)
    status = _drop_after(status, p, cut)
    missing = tl.sum((status == CHOSEN).to(tl.int32), axis=0)
    accepted = tl.sum((status == ACCEPTED).to(tl.int32), axis=0)
    return status, tl.where(missing > 0, 0, accepted), cut


@triton.jit
def _write_canvas(
    status, token, p, slot_start, size, phase, block_start, mask_token_id,
    canvas_token_ptr, row_position_ptr, row_own_start_ptr,
    CANVAS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes the canvas of the next pass, ``phase``, and returns its number of rows."""
    member = _is_member(status, phase, slot_start, size, LANES)
    row = _rows_of(member)
    rows = tl.sum(member.to(tl.int32), axis=0)
    # only a plan has members that are MASKED
    fed_as_mask = tl.where(phase == PREDICT, CHOSEN, MASKED)
    fed = tl.where(status == fed_as_mask, mask_token_id, token)
    isolated = (phase == PREDICT) | (phase == INFILL_VERIFY)
    own_start = tl.where(isolated, row - (p - slot_start), 0)
    tl.store(canvas_token_ptr + row, fed.to(tl.int64), mask=member)
    tl.store(row_own_start_ptr + row, own_start, mask=member)
    tl.store(row_position_ptr + row, block_start + p, mask=member)
    tl.store(row_position_ptr + p, tl.zeros_like(p) - 1, mask=(p >= rows) & (p < CANVAS))
    return rows


@triton.jit
def _transition_kernel(
    ints_ptr,  # [max_reqs, NUM_FIELDS] int32
    slot_threshold_ptr,  # [max_reqs] float32
    token_threshold_ptr,  # [max_reqs] float32
    status_ptr,  # [max_reqs, W] int32
    token_ptr,  # [max_reqs, W] int32
    canvas_token_ptr,  # [max_reqs, W] int64
    row_position_ptr,  # [max_reqs, W] int32
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
    sampled_ptr,  # [R, W] int32
    num_sampled_ptr,  # [R] int32
    num_rejected_ptr,  # [R] int32
    canvas_token_stride,
    sampled_stride,
    max_response,
    mask_token_id,
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
    draw = tl.load(ints + F_DRAW)
    passes_made = tl.load(ints + F_PASSES)
    computed = tl.load(num_computed_ptr + slot)

    p = tl.arange(0, LANES)
    status = tl.load(status_ptr + slot * CANVAS + p, mask=p < CANVAS, other=DROPPED)
    token = tl.load(token_ptr + slot * CANVAS + p, mask=p < CANVAS, other=0)
    slot_start = p - p % size
    member = _is_member(status, phase, slot_start, size, LANES)
    row = _rows_of(member)

    # Decide. What follows a commit is either a plan, or START of the block at next_start, or DONE.
    next_phase = phase
    next_start = 0
    kept = 0
    decided = 0
    counter = -1
    fed = 0
    if phase == PREFILL:
        kept = query_len
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
        fed = rows
        passes_made += 1
        first_row = tl.load(logits_start_ptr + request).to(tl.int64)
        cut = LANES
        if phase == PLAN:
            counter = COUNT_PLAN
            draw += 1
            threshold = tl.load(slot_threshold_ptr + slot)
            status, token = _plan(
                status, token, row, p, slot_start,
                picked_ptr + first_row, picked_prob_ptr + first_row, threshold, LANES,
            )  # fmt: skip
            next_phase = VERIFY
        elif phase == PREDICT:
            counter = COUNT_PREDICT
            draw += 1
            proposed = status == CHOSEN
            proposal = tl.load(picked_ptr + first_row + row, mask=proposed, other=0)
            token = tl.where(proposed, proposal, token)
            next_phase = INFILL_VERIFY
        else:
            # the row before gives this row's token its probability
            tested = member & (row > 0)
            given = tl.load(given_prob_ptr + first_row + row - 1, mask=tested, other=-1.0)
            passes = given > tl.load(token_threshold_ptr + slot)
            eos = tl.load(ints + F_EOS)
            if phase == VERIFY:
                counter = COUNT_VERIFY
                status, kept, cut = _verify(
                    status, token, row, p, slot_start, size, passes, eos, LANES
                )
            else:
                counter = COUNT_INFILL_VERIFY
                status, kept, cut = _infill_verify(status, token, p, slot_start, passes, eos, LANES)
            limit = tl.minimum(limit, tl.where(cut < LANES, block_start + cut + 1, limit))
            next_phase = PREDICT

    # Every load of the old state comes before every store of the new one: the threads of a
    # program share the state of its request.
    tl.debug_barrier()

    if counter >= 0:
        tl.atomic_add(counters_ptr + counter, 1)
        tl.atomic_add(counters_ptr + COUNT_ROWS_FED, fed)

    if (decided == 1) & (kept > 0):
        now = member & (row < kept)
        at = slot * max_response + committed + row
        group = tl.where(phase == INFILL_VERIFY, committed, -1)
        tl.store(response_ptr + slot * max_response + block_start + p, token, mask=now)
        tl.store(order_ptr + at, block_start + p, mask=now)
        tl.store(group_context_ptr + at, tl.zeros([LANES], dtype=tl.int32) + group, mask=now)
        committed += kept
        status = tl.where(now, COMMITTED, status)
        next_start = block_start + tl.load(ints + F_BLOCK_LENGTH)
        following = tl.where(next_start >= limit, DONE, START)
        masked = tl.sum((status == MASKED).to(tl.int32), axis=0)
        next_phase = tl.where(masked > 0, PLAN, following)

    if next_phase == START:
        decided = 1
        next_phase = PLAN
        block_start = next_start
        length = tl.minimum(tl.load(ints + F_BLOCK_LENGTH), tl.load(ints + F_BUDGET) - block_start)
        status = tl.where(p < length, MASKED, DROPPED)
        token = tl.zeros([LANES], dtype=tl.int32)

    if decided == 1:
        tl.store(status_ptr + slot * CANVAS + p, status, mask=p < CANVAS)
        tl.store(token_ptr + slot * CANVAS + p, token, mask=p < CANVAS)
        rows = _write_canvas(
            status, token, p, slot_start, size, next_phase, block_start, mask_token_id,
            canvas_token_ptr + slot * canvas_token_stride,
            row_position_ptr + slot * CANVAS,
            row_own_start_ptr + slot * CANVAS,
            CANVAS, LANES,
        )  # fmt: skip

    # Tokens newly contiguous in position order, at most one per scheduled row.
    count = 0
    if phase != PREFILL:
        contiguous = tl.minimum(_first(status != COMMITTED, p, CANVAS), CANVAS)
        end = tl.minimum(block_start + contiguous, limit)
        end = tl.minimum(end, tl.load(ints + F_MAX_TOKENS))
        end = tl.minimum(end, emitted + query_len)
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
    tl.store(ints + F_DRAW, draw)
    tl.store(ints + F_PASSES, passes_made)


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
    sampled: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
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
    for count in (num_sampled, num_rejected):
        check(count, (requests,), torch.int32)
    assert idx_mapping.is_contiguous() and state.canvas_token.stride(1) == 1
    assert sampled.shape == (requests, state.canvas_length) and sampled.stride(1) == 1
    lanes = triton.next_power_of_2(state.canvas_length)
    _transition_kernel[(requests,)](
        state.ints,
        state.slot_threshold,
        state.token_threshold,
        state.status,
        state.token,
        state.canvas_token,
        state.row_position,
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
        sampled,
        num_sampled,
        num_rejected,
        state.canvas_token.stride(0),
        sampled.stride(0),
        state.max_response,
        state.mask_token_id,
        CANVAS=state.canvas_length,
        LANES=lanes,
        num_warps=max(1, lanes // LANES_PER_WARP),
    )
