"""The state transition after a pass, decided on the device.

One program moves one request. It thinks in block positions p = 0 .. canvas_length - 1, one lane
each; what the twin in ``transition_twin`` finds by walking over rows is found by scans
(``lanes.py``). Steps that both have are functions of the same names, here and in ``decisions.py``.

The grid and the shapes never depend on values, and nothing is read back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_refusion.decoding.speculation import MAX_PRICE, NO_RIDERS, Speculation, device_table
from vllm_refusion.decoding.state import ACCEPTANCE_WINDOW, DecodeState
from vllm_refusion.triton_kernels.compose import Canvas, Course, block_length_at, compose
from vllm_refusion.triton_kernels.decisions import (
    Block,
    Statistics,
    infill,
    keepable,
    pick,
    plan,
    run_tests,
    verify,
    waiting,
    with_rounds,
    with_status,
)
from vllm_refusion.triton_kernels.lanes import (
    NOWHERE,
    at_lane,
    count,
    first,
    infilled,
    lanes_of,
    opening,
    rows_of,
)
from vllm_refusion.triton_kernels.layout import check, check_starts
from vllm_refusion.triton_kernels.state_codes import (
    ACCEPTED,
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
    F_TEST_BLOCK,
    F_TESTED,
    FLOAT_SLOT_THRESHOLD,
    FLOAT_TOKEN_THRESHOLD,
    H_GROUP_CONTEXT,
    H_ORDER,
    H_RESPONSE,
    IDLE,
    INFILL,
    MASKED,
    NUM_FIELDS,
    NUM_FLOAT_FIELDS,
    NUM_HISTORY_FIELDS,
    NUM_POSITION_FIELDS,
    NUM_ROW_FIELDS,
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
    PLAN,
    PREFILL,
    REPLAY,
    SERIAL,
    START,
    VERIFY,
)

LANES_PER_WARP = 128
_ACCEPTANCE_WINDOW = tl.constexpr(ACCEPTANCE_WINDOW)


class Decision(NamedTuple):
    """What a pass made of its phase.

    Attributes:
        next_phase: INFILL also where tokens are committed: ``commit`` says what follows then.
        commits: tokens to commit. kept: rows whose KV stays. infill_kept: see ``Field.KEPT``.
        cut: the lane after which EOS ends the response, or NOWHERE.
        tested, passed: tokens. counter: of the pass.
    """

    next_phase: tl.tensor
    commits: tl.tensor
    kept: tl.tensor
    infill_kept: tl.tensor
    cut: tl.tensor
    tested: tl.tensor
    passed: tl.tensor
    counter: tl.tensor


class Verified(NamedTuple):
    """What was under verification, see ``PositionField``."""

    token: tl.tensor
    row: tl.tensor


@triton.jit
def _position(positions, field: tl.constexpr, other, lanes, CANVAS: tl.constexpr):
    return tl.load(positions + field * CANVAS + lanes.p, mask=lanes.p < CANVAS, other=other)


@triton.jit
def _load_block(positions, lanes, CANVAS: tl.constexpr):
    return Block(
        _position(positions, P_STATUS, DROPPED, lanes, CANVAS),
        _position(positions, P_TOKEN, 0, lanes, CANVAS),
        _position(positions, P_CONFIDENCE, 0, lanes, CANVAS).to(tl.float32, bitcast=True),
        _position(positions, P_ROUNDS, 0, lanes, CANVAS),
        _position(positions, P_ORIGIN, 0, lanes, CANVAS),
        tl.zeros_like(lanes.p) - 1,
    )


@triton.jit
def _store_block(block, positions, lanes, CANVAS: tl.constexpr):
    at, mask = positions + lanes.p, lanes.p < CANVAS
    confidence = block.confidence.to(tl.int32, bitcast=True)
    tl.store(at + P_STATUS * CANVAS, block.status, mask=mask)
    tl.store(at + P_TOKEN * CANVAS, block.token, mask=mask)
    tl.store(at + P_CONFIDENCE * CANVAS, confidence, mask=mask)
    tl.store(at + P_ROUNDS * CANVAS, block.rounds, mask=mask)
    tl.store(at + P_ORIGIN * CANVAS, block.origin, mask=mask)


@triton.jit
def _store_evidence(verified, stays, pick_row, positions, lanes, CANVAS: tl.constexpr):
    at, mask = positions + lanes.p, lanes.p < CANVAS
    tl.store(at + P_TESTED_TOKEN * CANVAS, verified.token, mask=mask)
    tl.store(at + P_TEST_ROW * CANVAS, verified.row, mask=mask)
    tl.store(at + P_STAYS * CANVAS, stays.to(tl.int32), mask=mask)
    tl.store(at + P_PICK_ROW * CANVAS, pick_row, mask=mask)


@triton.jit
def _prefill(ints, query_len, computed, prefill_len):
    """Rows kept, rows fed of the first plan, the next phase."""
    kept = tl.minimum(query_len, prefill_len - computed)
    next_phase = PREFILL
    if computed + query_len >= prefill_len:
        replayed = prefill_len - tl.load(ints + F_PROMPT_LEN)
        ended = replayed >= tl.load(ints + F_COMMITTED)
        next_phase = tl.where(ended, tl.load(ints + F_RESUME), REPLAY)
    return kept, query_len - kept, next_phase


@triton.jit
def _replay(ints, query_len, computed):
    """Rows kept, the next phase."""
    left = tl.load(ints + F_COMMITTED) - (computed - tl.load(ints + F_PROMPT_LEN))
    kept = tl.minimum(query_len, left)
    return kept, tl.where(kept < left, REPLAY, tl.load(ints + F_RESUME))


@triton.jit
def _decide(block, row, stats, phase, ints, floats, counters_ptr, lanes):
    """What the rows of the phase decide: a plan, a verification, or a pass of an infill."""
    nothing = tl.zeros_like(lanes.p) - 1
    verified = Verified(nothing, nothing)
    if phase == PLAN:
        threshold = tl.load(floats + FLOAT_SLOT_THRESHOLD)
        block = plan(block, row, stats, threshold, counters_ptr, lanes)
        decision = Decision(VERIFY, 0, 0, 0, NOWHERE, 0, 0, COUNT_PLAN)
    else:
        eos = tl.load(ints + F_EOS)
        kept = tl.load(ints + F_KEPT)
        tests = run_tests(block, row, stats, tl.load(floats + FLOAT_TOKEN_THRESHOLD), lanes)
        verified = Verified(
            tl.where(tests.proposed, block.token, -1), tl.where(tests.tested, row - 1, -1)
        )
        tested = count(tests.tested & tests.reached)
        passed = count(tests.tested & tests.good)
        if phase == VERIFY:
            counter = COUNT_VERIFY
            block, commits, cut = verify(block, row, tests, eos, lanes)
            final = tl.where(commits > 0, commits, keepable(block, row, 0, lanes))
            kept = tl.where(commits > 0, 0, final)
        else:
            predicts = count(waiting(block, lanes)) > 0
            counter = tl.where(predicts, COUNT_PREDICT, COUNT_INFILL_VERIFY)
            block, cut = infill(block, row, tests, stats, eos, lanes)
            final = keepable(block, row, kept, lanes)
            kept += final
            total = count(infilled(block.status))
            commits = tl.where(kept >= total, total, 0)
        decision = Decision(INFILL, commits, final, kept, cut, tested, passed, counter)
    return block, decision, verified


@triton.jit
def _learn(ints, tested, passed):
    """Tokens tested and passed of late."""
    tested += tl.load(ints + F_TESTED)
    passed += tl.load(ints + F_PASSED)
    halves = (tested >= _ACCEPTANCE_WINDOW).to(tl.int32)
    return tested >> halves, passed >> halves


@triton.jit
def _commit(block, row, commits, phase, start, committed, history, max_response, lanes):
    """Commits tokens, in the order of their KV; and which [LANES]."""
    slots = infilled(block.status)
    in_infill = phase == INFILL
    rank = tl.where(in_infill, tl.where(slots, rows_of(slots), commits), row)
    now = (slots | (row >= 0)) & (rank < commits)
    position = start + lanes.p
    group = tl.zeros_like(lanes.p) + tl.where(in_infill, committed, -1)
    entry = history + committed + rank
    tl.store(history + H_RESPONSE * max_response + position, block.token, mask=now)
    tl.store(entry + H_ORDER * max_response, position, mask=now)
    tl.store(entry + H_GROUP_CONTEXT * max_response, group, mask=now)
    return with_status(block, tl.where(now, COMMITTED, block.status)), now


@triton.jit
def _start_block(block, start, ints, lanes):
    """A block that starts now at response position ``start``."""
    status = tl.where(lanes.p < block_length_at(start, ints), MASKED, DROPPED)
    token = tl.zeros_like(lanes.p)
    return Block(status, token, block.confidence, block.rounds, block.origin, block.pick_row)


@triton.jit
def _ride_predicts(block, rider_row, rider_width, rows, fed, stats, counters_ptr, lanes):
    """Takes the proposals for slots whose rider is in the canvas."""
    waits = waiting(block, lanes)
    begin = opening(waits, lanes)
    at_begin = tl.minimum(begin, lanes.last)
    rider = tl.gather(rider_row, at_begin, axis=0)
    width = tl.gather(rider_width, at_begin, axis=0)
    rides = waits & (rider >= 0) & (rider + width <= fed)
    ridden = count(rides & (lanes.p == begin) & (rider >= rows))
    tl.atomic_add(counters_ptr + COUNT_PREDICTS_RIDDEN, ridden)
    # an operation that goes on is counted already
    block = with_rounds(block, block.rounds + (rides & (block.origin == begin)).to(tl.int32))
    return pick(block, rides & (lanes.p - begin < width), rider + lanes.p - begin, stats)


@triton.jit
def _emit(block, start, limit, emitted, history, max_response, sampled, lanes):
    """Hands out tokens newly final in position order; their number.

    Also those of the first slot not committed that will not change any more. Its last one waits:
    whole slots delivered are slots committed.
    """
    p, response = lanes.p, history + H_RESPONSE * max_response
    head = first(block.status != COMMITTED, lanes)
    chosen_untested = (block.status == CHOSEN) & (block.origin == p)
    final = ((block.status == ACCEPTED) | chosen_untested) & (p < head + lanes.size - 1)
    end = tl.minimum(first((p >= head) & (final == 0), lanes), lanes.last + 1)
    tl.store(response + start + p, block.token, mask=(p >= head) & (p < end))
    number = tl.maximum(tl.minimum(start + end, limit) - emitted, 0)
    tl.debug_barrier()  # some of them are committed in this pass
    tokens = tl.load(response + emitted + p, mask=p < number)
    tl.store(sampled + p, tokens, mask=p < number)
    return number


@triton.jit(do_not_specialize=["free_rows", "pass_price"])
def _transition_kernel(
    ints_ptr,  # [max_reqs, NUM_FIELDS] int32
    floats_ptr,  # [max_reqs, NUM_FLOAT_FIELDS] float32
    by_position_ptr,  # [max_reqs, NUM_POSITION_FIELDS, W] int32
    by_row_ptr,  # [max_reqs, NUM_ROW_FIELDS, W] int32
    history_ptr,  # [max_reqs, NUM_HISTORY_FIELDS, P] int32
    canvas_token_ptr,  # [max_reqs, W] int64
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
    table_ptr,  # see device_table
    max_response,
    mask_token_id,
    free_rows,
    pass_price,
    CANVAS: tl.constexpr,
    LANES: tl.constexpr,
):
    index = tl.program_id(0)
    req = tl.load(idx_mapping_ptr + index).to(tl.int64)
    query_len = tl.load(query_start_loc_ptr + index + 1) - tl.load(query_start_loc_ptr + index)
    ints = ints_ptr + req * NUM_FIELDS
    phase = tl.load(ints + F_PHASE)
    if (phase != IDLE) & (tl.load(ints + F_RESUME) == SERIAL):
        return  # see ``serial``
    if phase == IDLE:
        tl.store(num_sampled_ptr + index, 0)
        tl.store(num_rejected_ptr + index, query_len)
        return

    floats = floats_ptr + req * NUM_FLOAT_FIELDS
    positions = by_position_ptr + req * NUM_POSITION_FIELDS * CANVAS
    history = history_ptr + req * NUM_HISTORY_FIELDS * max_response
    lanes = lanes_of(tl.load(ints + F_SLOT_SIZE), LANES)
    block = _load_block(positions, lanes, CANVAS)
    row = _position(positions, P_CANVAS_ROW, -1, lanes, CANVAS)
    rider_row = _position(positions, P_RIDER_ROW, -1, lanes, CANVAS)
    rider_width = _position(positions, P_RIDER_WIDTH, 0, lanes, CANVAS)
    first_row = tl.load(logits_start_ptr + index).to(tl.int64)
    decode_rows = tl.load(logits_start_ptr + index + 1) - first_row
    stats = Statistics(
        picked_ptr + first_row, picked_prob_ptr + first_row, given_prob_ptr + first_row
    )
    block_start = tl.load(ints + F_BLOCK_START)
    limit = tl.load(ints + F_LIMIT)
    emitted = tl.load(ints + F_EMITTED)
    committed = tl.load(ints + F_COMMITTED)
    rows = tl.load(ints + F_ROWS)
    canvas_rows = tl.load(ints + F_CANVAS)
    resume = tl.load(ints + F_RESUME)
    draw = tl.load(ints + F_DRAW)
    passes = tl.load(ints + F_PASSES)
    computed = tl.load(num_computed_ptr + req)
    next_start = block_start + tl.load(ints + F_BLOCK_LENGTH)

    # Decide.
    fed = 0
    decided = 0
    decision = Decision(phase, 0, 0, tl.load(ints + F_KEPT), NOWHERE, 0, 0, -1)
    verified = Verified(block.pick_row, block.pick_row)  # none yet
    if phase == PREFILL:
        prefill_len = tl.load(prefill_len_ptr + req)
        kept, fed, next_phase = _prefill(ints, query_len, computed, prefill_len)
        decision = Decision(next_phase, 0, kept, decision.infill_kept, NOWHERE, 0, 0, -1)
    elif phase == REPLAY:
        kept, next_phase = _replay(ints, query_len, computed)
        fed = kept
        decision = Decision(next_phase, 0, kept, decision.infill_kept, NOWHERE, 0, 0, COUNT_REPLAY)
    elif (phase == DONE) | (query_len < rows) | (decode_rows < query_len):
        # rows without statistics are of a prefill: delivered tokens that it need not feed
        decision = Decision(phase, 0, 0, decision.infill_kept, NOWHERE, 0, 0, COUNT_IDLE)
    else:
        decided = 1
        fed = tl.minimum(query_len, canvas_rows)
        passes += 1
        tl.atomic_add(counters_ptr + COUNT_RIDER_ROWS_FED, fed - rows)
        block, decision, verified = _decide(
            block, row, stats, phase, ints, floats, counters_ptr, lanes
        )
    next_phase = decision.next_phase
    commits = decision.commits
    infill_kept = decision.infill_kept
    cut = decision.cut
    draw += (phase == PLAN).to(tl.int32) * decided
    limit = tl.minimum(limit, tl.where(cut < NOWHERE, block_start + cut + 1, limit))
    tested, passed = _learn(ints, decision.tested, decision.passed)

    # Every load of the old state comes before every store of the new one: the threads of a
    # program share the state of its request.
    tl.debug_barrier()

    if decision.counter >= 0:
        tl.atomic_add(counters_ptr + decision.counter, 1)
        tl.atomic_add(counters_ptr + COUNT_ROWS_FED, fed)
        tl.atomic_add(counters_ptr + COUNT_TOKENS_TESTED, decision.tested)
        tl.atomic_add(counters_ptr + COUNT_TOKENS_PASSED, decision.passed)

    # What follows a commit is either a plan, or START of the block at next_start, or DONE.
    if commits > 0:
        block, now = _commit(
            block, row, commits, phase, block_start, committed, history, max_response, lanes
        )
        committed += commits
        infill_kept = 0
        if phase == INFILL:
            most = tl.max(tl.where(now, block.rounds, 0), axis=0)
            draw += most
            tl.atomic_add(counters_ptr + COUNT_INFILLS, 1)
            tl.atomic_add(counters_ptr + COUNT_INFILL_ROUNDS, most)
        last_slot = tl.max(tl.where(now, lanes.slot_start, -1), axis=0)
        following = tl.where(next_start >= limit, DONE, START)
        next_phase = tl.where(count(block.status == MASKED) > 0, PLAN, following)
    else:
        # after the prompt the first block starts; its plan may have been fed with the prompt
        with_prompt = (next_phase == START) & (phase == PREFILL) & (fed >= rows)
        last_slot = tl.where(with_prompt, -1, NOWHERE)
        next_start = tl.where(next_phase == START, 0, next_start)
    stays = (verified.token >= 0) & ((block.status == ACCEPTED) | (block.status == COMMITTED))
    tl.store(ints + F_TEST_BLOCK, block_start)
    if next_phase == START:
        decided = 1
        next_phase = PLAN
        block_start = next_start
        next_start = block_start + tl.load(ints + F_BLOCK_LENGTH)
        block = _start_block(block, block_start, ints, lanes)

    # What comes next is done at once where its rows were in this canvas.
    if (next_phase == PLAN) & (last_slot < NOWHERE) & (cut == NOWHERE):
        masked = block.status == MASKED
        rider = tl.where(phase == PREFILL, 0, at_lane(rider_row + 1, lanes, last_slot) - 1)
        if (rider >= 0) & (rider + count(masked) <= fed):
            threshold = tl.load(floats + FLOAT_SLOT_THRESHOLD)
            block = plan(block, rider + rows_of(masked), stats, threshold, counters_ptr, lanes)
            draw += 1
            next_phase = VERIFY
            tl.atomic_add(counters_ptr + COUNT_PLANS_RIDDEN, 1)
    if (next_phase == INFILL) & (decided == 0) & (phase != INFILL):
        decided = 1  # resumed: no accepted token is kept any more
    elif (next_phase == INFILL) & (decided == 1):
        block = _ride_predicts(block, rider_row, rider_width, rows, fed, stats, counters_ptr, lanes)

    _store_evidence(verified, stays, block.pick_row, positions, lanes, CANVAS)
    if decided == 1:
        _store_block(block, positions, lanes, CANVAS)
        course = Course(
            next_phase, block_start, next_start, limit, draw, infill_kept, tested, passed
        )
        canvas = Canvas(
            positions,
            by_row_ptr + req * NUM_ROW_FIELDS * CANVAS,
            canvas_token_ptr + req * CANVAS,
            CANVAS,
        )
        rows, canvas_rows = compose(
            block, course, ints, canvas, table_ptr, free_rows, pass_price, mask_token_id, lanes
        )

    number = 0
    if (phase != PREFILL) | ((resume == START) & (next_phase == VERIFY)):
        most = tl.minimum(limit, tl.load(ints + F_MAX_TOKENS))
        most = tl.minimum(most, emitted + tl.load(emit_limit_ptr + index))
        sampled = sampled_ptr + index * CANVAS
        number = _emit(block, block_start, most, emitted, history, max_response, sampled, lanes)
        tl.atomic_add(counters_ptr + COUNT_TOKENS, number)

    tl.store(num_sampled_ptr + index, number)
    tl.store(num_rejected_ptr + index, query_len - decision.kept)
    tl.store(ints + F_PHASE, next_phase)
    tl.store(ints + F_BLOCK_START, block_start)
    tl.store(ints + F_LIMIT, limit)
    tl.store(ints + F_EMITTED, emitted + number)
    tl.store(ints + F_COMMITTED, committed)
    tl.store(ints + F_ROWS, rows)
    tl.store(ints + F_CANVAS, canvas_rows)
    tl.store(ints + F_DRAW, draw)
    tl.store(ints + F_PASSES, passes)
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
    for number in (emit_limit, num_sampled, num_rejected):
        check(number, (requests,), torch.int32)
    check(sampled, (requests, state.canvas_length), torch.int32)
    assert idx_mapping.is_contiguous()
    assert 0 <= speculation.pass_price <= MAX_PRICE, speculation
    lanes = triton.next_power_of_2(state.canvas_length)
    _transition_kernel[(requests,)](
        state.ints,
        state.floats,
        state.by_position,
        state.by_row,
        state.history,
        state.canvas_token,
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
        device_table(state.device),
        state.max_response,
        state.mask_token_id,
        speculation.free_rows,
        speculation.pass_price,
        CANVAS=state.canvas_length,
        LANES=lanes,
        num_warps=max(1, lanes // LANES_PER_WARP),
    )
