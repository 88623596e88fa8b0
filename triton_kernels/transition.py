"""The state transition after a pass, decided on the device.

One program moves one request. It thinks in block positions p = 0 .. canvas_length - 1, one lane
each; what the twin in ``transition_twin`` finds by walking over rows is found by scans
(``decisions.py``).

The grid and the shapes never depend on values, and nothing is read back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_refusion.decoding.speculation import MAX_PRICE, NO_RIDERS, Speculation, device_tables
from vllm_refusion.decoding.state import ACCEPTANCE_WINDOW, DecodeState
from vllm_refusion.triton_kernels.compose import (
    at_lane,
    compose,
    first,
    in_slot,
    infilled,
    rows_of,
)
from vllm_refusion.triton_kernels.decisions import (
    accept,
    block_statuses,
    choose,
    drop_after,
    intact,
    keepable,
    take,
    verify_drafts,
)
from vllm_refusion.triton_kernels.layout import check, check_starts
from vllm_refusion.triton_kernels.state_codes import (
    ACCEPTED,
    BLANK,
    CHOSEN,
    COMMITTED,
    COUNT_IDLE,
    COUNT_INFILL_ROUNDS,
    COUNT_INFILL_VERIFY,
    COUNT_INFILLS,
    COUNT_PLAN,
    COUNT_PLANS_RIDDEN,
    COUNT_PREDICT,
    COUNT_PREDICTS_RIDDEN,
    COUNT_REPLAY,
    COUNT_RIDER_ROWS_FED,
    COUNT_ROWS_FED,
    COUNT_TOKENS,
    COUNT_TOKENS_PASSED,
    COUNT_TOKENS_TESTED,
    COUNT_VERIFY,
    DONE,
    DROPPED,
    F_BLOCK_LENGTH,
    F_BLOCK_START,
    F_CANVAS,
    F_COMMITTED,
    F_DRAW,
    F_EMITTED,
    F_EOS,
    F_KEPT,
    F_LIMIT,
    F_MAX_TOKENS,
    F_PASSED,
    F_PASSES,
    F_PHASE,
    F_PROMPT_LEN,
    F_RESUME,
    F_ROWS,
    F_SLOT_SIZE,
    F_TESTED,
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

LANES_PER_WARP = 128
_ACCEPTANCE_WINDOW = tl.constexpr(ACCEPTANCE_WINDOW)


@triton.jit(do_not_specialize=["free_rows", "pass_price"])
def _transition_kernel(
    ints_ptr,  # [max_reqs, NUM_FIELDS] int32
    slot_threshold_ptr,  # [max_reqs] float32
    token_threshold_ptr,  # [max_reqs] float32
    status_ptr,  # [max_reqs, W] int32
    token_ptr,  # [max_reqs, W] int32
    confidence_ptr,  # [max_reqs, W] float32
    rounds_ptr,  # [max_reqs, W] int32
    origin_ptr,  # [max_reqs, W] int32
    canvas_row_ptr,  # [max_reqs, W] int32
    rider_row_ptr,  # [max_reqs, W] int32
    rider_width_ptr,  # [max_reqs, W] int32
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
    req = tl.load(idx_mapping_ptr + request).to(tl.int64)
    query_len = tl.load(query_start_loc_ptr + request + 1) - tl.load(query_start_loc_ptr + request)
    ints = ints_ptr + req * NUM_FIELDS
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
    resume = tl.load(ints + F_RESUME)
    draw = tl.load(ints + F_DRAW)
    passes_made = tl.load(ints + F_PASSES)
    infill_kept = tl.load(ints + F_KEPT)
    computed = tl.load(num_computed_ptr + req)

    p = tl.arange(0, LANES)
    of_block = req * CANVAS + p
    status = tl.load(status_ptr + of_block, mask=p < CANVAS, other=DROPPED)
    token = tl.load(token_ptr + of_block, mask=p < CANVAS, other=0)
    confidence = tl.load(confidence_ptr + of_block, mask=p < CANVAS, other=0.0)
    rounds = tl.load(rounds_ptr + of_block, mask=p < CANVAS, other=0)
    origin = tl.load(origin_ptr + of_block, mask=p < CANVAS, other=0)
    row = tl.load(canvas_row_ptr + of_block, mask=p < CANVAS, other=-1)
    rider_row = tl.load(rider_row_ptr + of_block, mask=p < CANVAS, other=-1)
    rider_width = tl.load(rider_width_ptr + of_block, mask=p < CANVAS, other=0)
    slot_start = p - p % size

    # Decide. What follows a commit is either a plan, or START of the block at next_start, or DONE.
    next_phase = phase
    next_start = block_start + tl.load(ints + F_BLOCK_LENGTH)
    kept = 0
    commits = 0  # tokens
    decided = 0
    counter = -1
    fed = 0
    tested = 0  # tokens
    passed = 0
    cut = LANES
    first_row = tl.load(logits_start_ptr + request).to(tl.int64)
    decode_rows = tl.load(logits_start_ptr + request + 1) - first_row
    picks = picked_ptr + first_row
    pick_probs = picked_prob_ptr + first_row
    slot_threshold = tl.load(slot_threshold_ptr + req)
    if phase == PREFILL:
        kept = tl.minimum(query_len, tl.load(prefill_len_ptr + req) - computed)
        fed = query_len - kept  # the first plan
        if computed + query_len >= tl.load(prefill_len_ptr + req):
            replayed = tl.load(prefill_len_ptr + req) - prompt_len
            next_phase = tl.where(replayed < committed, REPLAY, resume)
    elif phase == REPLAY:
        counter = COUNT_REPLAY
        replayed = computed - prompt_len
        kept = tl.minimum(query_len, committed - replayed)
        fed = kept
        next_phase = tl.where(replayed + kept < committed, REPLAY, resume)
    elif (phase == DONE) | (query_len < rows) | (decode_rows < query_len):
        # rows without statistics are of a prefill: delivered tokens that it need not feed
        counter = COUNT_IDLE
    else:
        decided = 1
        fed = tl.minimum(query_len, canvas)
        tl.atomic_add(counters_ptr + COUNT_RIDER_ROWS_FED, fed - rows)
        passes_made += 1
        if phase == PLAN:
            counter = COUNT_PLAN
            draw += 1
            status, origin, token, confidence = choose(
                status, origin, token, confidence, row, p, slot_start, picks, pick_probs,
                slot_threshold, counters_ptr, LANES,
            )  # fmt: skip
            next_phase = VERIFY
        else:
            # the row before gives this row's token its probability
            member = row >= 0
            proposed = member & (status == CHOSEN)
            tests = proposed & (origin != p)
            asked = tests & (row > 0)
            given = tl.load(given_prob_ptr + first_row + row - 1, mask=asked, other=-1.0)
            failed = tests & ((given > tl.load(token_threshold_ptr + req)) == 0)
            good, reached = intact(failed, slot_start)
            tested = tl.sum((tests & reached).to(tl.int32), axis=0)
            passed = tl.sum((tests & good).to(tl.int32), axis=0)
            eos = tl.load(ints + F_EOS)
            if phase == VERIFY:
                counter = COUNT_VERIFY
                rounds = tl.where(status == CHOSEN, 0, rounds)
                status, origin, commits, cut = verify_drafts(
                    status, origin, token, row, proposed, failed, good, p, slot_start, size, eos,
                    LANES,
                )  # fmt: skip
                kept = commits
                if commits == 0:
                    kept = keepable(status, origin, row, p, slot_start, size, 0, LANES)
                    infill_kept = kept
            else:
                blank = status == BLANK
                lacking = blank & (in_slot(status == CHOSEN, slot_start, size, LANES) == 0)
                any_lacking = tl.max(lacking.to(tl.int32), axis=0) > 0
                counter = tl.where(any_lacking, COUNT_PREDICT, COUNT_INFILL_VERIFY)
                takes = blank & member
                begins = in_slot(takes, slot_start, size, LANES) > 0
                status, origin = accept(
                    status, origin, proposed, failed, good, slot_start, size, LANES
                )
                token, confidence = take(takes, row, token, confidence, picks, pick_probs)
                rounds += (blank & begins).to(tl.int32)
                status = tl.where(takes, CHOSEN, status)
                cut = first((status == ACCEPTED) & (token == eos), p, LANES)
                status = drop_after(status, p, cut)
                kept = keepable(status, origin, row, p, slot_start, size, infill_kept, LANES)
                infill_kept += kept
                total = tl.sum(infilled(status).to(tl.int32), axis=0)
                commits = tl.where(infill_kept >= total, total, 0)
            limit = tl.minimum(limit, tl.where(cut < LANES, block_start + cut + 1, limit))
            next_phase = INFILL

    # Every load of the old state comes before every store of the new one: the threads of a
    # program share the state of its request.
    tl.debug_barrier()

    if counter >= 0:
        tl.atomic_add(counters_ptr + counter, 1)
        tl.atomic_add(counters_ptr + COUNT_ROWS_FED, fed)
        tl.atomic_add(counters_ptr + COUNT_TOKENS_TESTED, tested)
        tl.atomic_add(counters_ptr + COUNT_TOKENS_PASSED, passed)
    tested += tl.load(ints + F_TESTED)
    passed += tl.load(ints + F_PASSED)
    halves = (tested >= _ACCEPTANCE_WINDOW).to(tl.int32)
    tested = tested >> halves
    passed = passed >> halves

    if commits > 0:
        slots = infilled(status)
        rank = tl.where(phase == INFILL, tl.where(slots, rows_of(slots), commits), row)
        now = (slots | (row >= 0)) & (rank < commits)
        at = req * max_response + committed + rank
        group = tl.where(phase == INFILL, committed, -1)
        tl.store(response_ptr + req * max_response + block_start + p, token, mask=now)
        tl.store(order_ptr + at, block_start + p, mask=now)
        tl.store(group_context_ptr + at, tl.zeros([LANES], dtype=tl.int32) + group, mask=now)
        committed += commits
        infill_kept = 0
        if phase == INFILL:
            most = tl.max(tl.where(now, rounds, 0), axis=0)
            draw += most
            tl.atomic_add(counters_ptr + COUNT_INFILLS, 1)
            tl.atomic_add(counters_ptr + COUNT_INFILL_ROUNDS, most)
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
        status = block_statuses(p, block_start, ints)
        token = tl.zeros([LANES], dtype=tl.int32)

    # What comes next is done at once where its rows were in this canvas.
    if (next_phase == PLAN) & (last_slot < LANES) & (cut == LANES):
        masked = status == MASKED
        rider = tl.where(phase == PREFILL, 0, at_lane(rider_row + 1, p, last_slot) - 1)
        if (rider >= 0) & (rider + tl.sum(masked.to(tl.int32), axis=0) <= fed):
            draw += 1
            status, origin, token, confidence = choose(
                status, origin, token, confidence, rider + rows_of(masked), p, slot_start, picks,
                pick_probs, slot_threshold, counters_ptr, LANES,
            )  # fmt: skip
            next_phase = VERIFY
            tl.atomic_add(counters_ptr + COUNT_PLANS_RIDDEN, 1)
    if (next_phase == INFILL) & (decided == 0) & (phase != INFILL):
        decided = 1  # resumed: no accepted token is kept any more
    elif (next_phase == INFILL) & (decided == 1):
        blank = status == BLANK
        blank = blank & (in_slot(status == CHOSEN, slot_start, size, LANES) == 0)
        opening = slot_start + size - in_slot(blank, slot_start, size, LANES)
        at_opening = tl.minimum(opening, LANES - 1)
        rider = tl.gather(rider_row, at_opening, axis=0)
        width = tl.gather(rider_width, at_opening, axis=0)
        rides = blank & (rider >= 0) & (rider + width <= fed)
        takes = rides & (p - opening < width)
        token, confidence = take(takes, rider + p - opening, token, confidence, picks, pick_probs)
        status = tl.where(takes, CHOSEN, status)
        rounds += (rides & (origin == opening)).to(tl.int32)
        ridden = tl.sum((rides & (p == opening) & (rider >= rows)).to(tl.int32), axis=0)
        tl.atomic_add(counters_ptr + COUNT_PREDICTS_RIDDEN, ridden)

    if decided == 1:
        tl.store(status_ptr + of_block, status, mask=p < CANVAS)
        tl.store(token_ptr + of_block, token, mask=p < CANVAS)
        tl.store(confidence_ptr + of_block, confidence, mask=p < CANVAS)
        tl.store(rounds_ptr + of_block, rounds, mask=p < CANVAS)
        tl.store(origin_ptr + of_block, origin, mask=p < CANVAS)
        rows, canvas = compose(
            status, origin, token, confidence, rounds, p, slot_start, size, next_phase, block_start,
            next_start, limit, draw, infill_kept, tested, passed, mask_token_id, free_rows,
            pass_price, ints,
            canvas_row_ptr + req * CANVAS,
            rider_row_ptr + req * CANVAS,
            rider_width_ptr + req * CANVAS,
            canvas_token_ptr + req * canvas_token_stride,
            row_position_ptr + req * CANVAS,
            row_draw_ptr + req * CANVAS,
            row_context_ptr + req * CANVAS,
            row_run_start_ptr + req * CANVAS,
            row_run_end_ptr + req * CANVAS,
            row_own_start_ptr + req * CANVAS,
            cost_table_ptr,
            chance_table_ptr,
            CANVAS, LANES,
        )  # fmt: skip

    # Tokens newly final in position order: also those of the first slot not committed that will
    # not change any more. Its last one waits: whole slots delivered are slots committed.
    count = 0
    if (phase != PREFILL) | ((resume == START) & (next_phase == VERIFY)):
        head = tl.minimum(first(status != COMMITTED, p, CANVAS), CANVAS)
        final = (status == ACCEPTED) | ((status == CHOSEN) & (origin == p))
        final = final & (p >= head) & (p < head + size - 1)
        contiguous = tl.minimum(first((p >= head) & (final == 0), p, CANVAS), CANVAS)
        early = (p >= head) & (p < contiguous)
        tl.store(response_ptr + req * max_response + block_start + p, token, mask=early)
        end = tl.minimum(block_start + contiguous, limit)
        end = tl.minimum(end, tl.load(ints + F_MAX_TOKENS))
        end = tl.minimum(end, emitted + tl.load(emit_limit_ptr + request))
        count = tl.maximum(end - emitted, 0)
        tl.debug_barrier()  # some of them are committed in this pass
        source = response_ptr + req * max_response + emitted
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
    tl.store(ints + F_TESTED, tested)
    tl.store(ints + F_PASSED, passed)


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
    """Same arguments and effects as ``transition_twin``, as one kernel."""
    requests = len(idx_mapping)
    for starts in (query_start_loc, logits_start):
        check_starts(starts, requests)
    for per_request in (num_computed, prefill_len):
        check(per_request, (state.max_requests,), torch.int32)
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
        state.origin,
        state.canvas_row,
        state.rider_row,
        state.rider_width,
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
