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
from vllm_refusion.triton_kernels.checks import check_pass
from vllm_refusion.triton_kernels.compose import compose
from vllm_refusion.triton_kernels.constant import Constant
from vllm_refusion.triton_kernels.decisions import (
    Decision,
    decide,
    pick,
    plan,
    takes_test,
    waiting,
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
from vllm_refusion.triton_kernels.packed import (
    Block,
    Canvas,
    Course,
    Memory,
    Statistics,
    Verified,
    block_length_at,
    history_of,
    load_block,
    load_course,
    load_placed,
    store_block,
    store_course,
    store_evidence,
    with_phase,
    with_rounds,
    with_status,
)
from vllm_refusion.triton_kernels.sizes import lanes_of_canvas
from vllm_refusion.triton_kernels.state_codes import (
    ACCEPTED,
    CHOSEN,
    COMMITTED,
    COUNT_IDLE,
    COUNT_INFILL_ROUNDS,
    COUNT_INFILLS,
    COUNT_PLANS_RIDDEN,
    COUNT_PREDICTS_RIDDEN,
    COUNT_REPLAY,
    COUNT_RIDER_ROWS_FED,
    COUNT_ROWS_FED,
    COUNT_TOKENS,
    COUNT_TOKENS_PASSED,
    COUNT_TOKENS_TESTED,
    DONE,
    DROPPED,
    F_BLOCK_LENGTH,
    F_CANVAS,
    F_COMMITTED,
    F_CORRECTS,
    F_EMITTED,
    F_MAX_TOKENS,
    F_PASSES,
    F_PROMPT_LEN,
    F_RESUME,
    F_ROWS,
    F_SLOT_SIZE,
    F_TEST_BLOCK,
    FLOAT_SLOT_THRESHOLD,
    IDLE,
    INFILL,
    MASKED,
    NUM_FIELDS,
    NUM_FLOAT_FIELDS,
    NUM_HISTORY_FIELDS,
    NUM_POSITION_FIELDS,
    NUM_ROW_FIELDS,
    PLAN,
    PREFILL,
    REPLAY,
    SERIAL,
    START,
    VERIFY,
)
from vllm_refusion.triton_kernels.worth import prices_of

_ACCEPTANCE_WINDOW = Constant(ACCEPTANCE_WINDOW)


class Fed(NamedTuple):
    """What the pass fed: query rows, those of them with statistics, and KV entries.

    ``computed``, ``prefill_len``: entries before the pass, entries that are prefill.
    """

    rows: tl.tensor
    decode_rows: tl.tensor
    computed: tl.tensor
    prefill_len: tl.tensor


class Before(NamedTuple):
    """Of ``ints``, what the pass found."""

    emitted: tl.tensor
    committed: tl.tensor
    rows: tl.tensor
    resume: tl.tensor
    passes: tl.tensor


class Outcome(NamedTuple):
    """What is left to do after a decision.

    Attributes:
        commits: tokens to commit. kept: rows whose KV stays. cut: see ``Decision``.
        fed: rows fed that count. decided: 1 if the pass was one of the request's.
    """

    commits: tl.tensor
    kept: tl.tensor
    cut: tl.tensor
    fed: tl.tensor
    decided: tl.tensor


@triton.jit
def _load_before(ints):
    return Before(
        tl.load(ints + F_EMITTED),
        tl.load(ints + F_COMMITTED),
        tl.load(ints + F_ROWS),
        tl.load(ints + F_RESUME),
        tl.load(ints + F_PASSES),
    )


@triton.jit
def _prefill(ints, fed):
    """Rows kept, rows fed of the first plan, the next phase."""
    kept = tl.minimum(fed.rows, fed.prefill_len - fed.computed)
    next_phase = PREFILL
    if fed.computed + fed.rows >= fed.prefill_len:
        replayed = fed.prefill_len - tl.load(ints + F_PROMPT_LEN)
        ended = replayed >= tl.load(ints + F_COMMITTED)
        next_phase = tl.where(ended, tl.load(ints + F_RESUME), REPLAY)
    return kept, fed.rows - kept, next_phase


@triton.jit
def _replay(ints, fed):
    """Rows kept, the next phase."""
    left = tl.load(ints + F_COMMITTED) - (fed.computed - tl.load(ints + F_PROMPT_LEN))
    kept = tl.minimum(fed.rows, left)
    return kept, tl.where(kept < left, REPLAY, tl.load(ints + F_RESUME))


@triton.jit
def _run(block, row, stats, course, fed, memory, lanes):
    """What the pass makes of its phase; stores nothing of the state.

    Returns the block, what was under verification, the course, the outcome.
    """
    phase = course.phase
    ints, counters_ptr = memory.ints, memory.counters
    nothing = tl.zeros_like(lanes.p) - 1
    verified = Verified(nothing, nothing)
    counted = 0
    decided = 0
    decision = Decision(phase, 0, 0, course.kept, NOWHERE, 0, 0, -1)
    if phase == PREFILL:
        kept, counted, next_phase = _prefill(ints, fed)
        decision = Decision(next_phase, 0, kept, course.kept, NOWHERE, 0, 0, -1)
    elif phase == REPLAY:
        kept, next_phase = _replay(ints, fed)
        counted = kept
        decision = Decision(next_phase, 0, kept, course.kept, NOWHERE, 0, 0, COUNT_REPLAY)
    elif (phase == DONE) | (fed.rows < tl.load(ints + F_ROWS)) | (fed.decode_rows < fed.rows):
        # rows without statistics are of a prefill: delivered tokens that it need not feed
        decision = Decision(phase, 0, 0, course.kept, NOWHERE, 0, 0, COUNT_IDLE)
    else:
        decided = 1
        counted = tl.minimum(fed.rows, tl.load(ints + F_CANVAS))
        tl.atomic_add(counters_ptr + COUNT_RIDER_ROWS_FED, counted - tl.load(ints + F_ROWS))
        block, decision, verified = decide(
            block, row, stats, phase, ints, memory.floats, counters_ptr, lanes
        )
    cut, limit = decision.cut, course.limit
    limit = tl.minimum(limit, tl.where(cut < NOWHERE, course.block_start + cut + 1, limit))
    tested, passed = _learn(course, decision)
    course = Course(
        decision.next_phase,
        course.block_start,
        course.next_start,
        limit,
        course.draw + (phase == PLAN).to(tl.int32) * decided,
        decision.infill_kept,
        tested,
        passed,
    )
    if decision.counter >= 0:
        tl.atomic_add(counters_ptr + decision.counter, 1)
        tl.atomic_add(counters_ptr + COUNT_ROWS_FED, counted)
        tl.atomic_add(counters_ptr + COUNT_TOKENS_TESTED, decision.tested)
        tl.atomic_add(counters_ptr + COUNT_TOKENS_PASSED, decision.passed)
    outcome = Outcome(decision.commits, decision.kept, cut, counted, decided)
    return block, verified, course, outcome


@triton.jit
def _learn(course, decision):
    """Tokens tested and passed of late."""
    tested = course.tested + decision.tested
    passed = course.passed + decision.passed
    halves = (tested >= _ACCEPTANCE_WINDOW).to(tl.int32)
    return tested >> halves, passed >> halves


@triton.jit
def _commit(block, row, course, commits, phase, committed, memory, lanes):
    """Commits tokens, in the order of their KV.

    Returns the block, the course: a plan, START of the next block, or DONE follows; the lane where
    the last slot committed begins.
    """
    history = memory.history
    slots = infilled(block.status)
    in_infill = phase == INFILL
    rank = tl.where(in_infill, tl.where(slots, rows_of(slots), commits), row)
    now = (slots | (row >= 0)) & (rank < commits)
    position = course.block_start + lanes.p
    entry = committed + rank
    group = tl.zeros_like(lanes.p) + tl.where(in_infill, committed, -1)
    tl.store(history.response + position, block.token, mask=now)
    tl.store(history.order + entry, position, mask=now)
    tl.store(history.group_context + entry, group, mask=now)
    block = with_status(block, tl.where(now, COMMITTED, block.status))

    rounds = tl.where(in_infill, tl.max(tl.where(now, block.rounds, 0), axis=0), 0)
    tl.atomic_add(memory.counters + COUNT_INFILLS, in_infill.to(tl.int32))
    tl.atomic_add(memory.counters + COUNT_INFILL_ROUNDS, rounds)
    following = tl.where(course.next_start >= course.limit, DONE, START)
    course = Course(
        tl.where(count(block.status == MASKED) > 0, PLAN, following),
        course.block_start,
        course.next_start,
        course.limit,
        course.draw + rounds,
        0,
        course.tested,
        course.passed,
    )
    return block, course, tl.max(tl.where(now, lanes.slot_start, -1), axis=0)


@triton.jit
def _start_block(block, course, start, ints, lanes):
    """A block that starts now at response position ``start``."""
    block = Block(
        tl.where(lanes.p < block_length_at(start, ints), MASKED, DROPPED),
        tl.zeros_like(lanes.p),
        block.confidence,
        block.rounds,
        block.origin,
        block.pick_row,
    )
    course = Course(
        PLAN,
        start,
        start + tl.load(ints + F_BLOCK_LENGTH),
        course.limit,
        course.draw,
        course.kept,
        course.tested,
        course.passed,
    )
    return block, course


@triton.jit
def _ride_predicts(block, placed, rows, counted, corrects, stats, counters_ptr, lanes):
    """Takes the proposals for slots whose rider is in the canvas."""
    waits = waiting(block, lanes)
    begin = opening(waits, lanes)
    at_begin = tl.minimum(begin, lanes.last)
    rider = tl.gather(placed.rider_row, at_begin, axis=0)
    width = tl.gather(placed.rider_width, at_begin, axis=0)
    # a correction ends the operation that would have gone on
    goes_on = tl.where(corrects > 0, block.origin, -1) < begin
    rides = waits & goes_on & (rider >= 0) & (rider + width <= counted)
    ridden = count(rides & (lanes.p == begin) & (rider >= rows))
    tl.atomic_add(counters_ptr + COUNT_PREDICTS_RIDDEN, ridden)
    # an operation that goes on is counted already
    block = with_rounds(block, block.rounds + (rides & (block.origin == begin)).to(tl.int32))
    return pick(block, rides & (lanes.p - begin < width), rider + lanes.p - begin, stats)


@triton.jit
def _ride(block, course, placed, last_slot, rows, counted, stats, memory, lanes):
    """Does at once what comes next, where its rows were in the canvas.

    ``last_slot``: the lane where the last slot committed begins, -1 for the prompt's end.
    """
    if (course.phase == PLAN) & (last_slot < NOWHERE):
        masked = block.status == MASKED
        rider = tl.where(last_slot < 0, 0, at_lane(placed.rider_row + 1, lanes, last_slot) - 1)
        if (rider >= 0) & (rider + count(masked) <= counted):
            threshold = tl.load(memory.floats + FLOAT_SLOT_THRESHOLD)
            row = rider + rows_of(masked)
            block = plan(block, row, stats, threshold, memory.counters, lanes)
            course = with_phase(course, VERIFY, course.draw + 1)
            tl.atomic_add(memory.counters + COUNT_PLANS_RIDDEN, 1)
    elif course.phase == INFILL:
        corrects = tl.load(memory.ints + F_CORRECTS)
        block = _ride_predicts(
            block, placed, rows, counted, corrects, stats, memory.counters, lanes
        )
    return block, course


@triton.jit
def _go_on(block, course, placed, verified, outcome, phase, before, stats, memory, lanes):
    """Commits and does what comes next.

    Returns the block, the course, which tokens under verification stay, and whether there is a new
    canvas to compose.
    """
    composes = outcome.decided
    # after the prompt the first block starts; its plan may have been fed with the prompt
    with_prompt = (phase == PREFILL) & (course.phase == START) & (outcome.fed >= before.rows)
    last_slot = tl.where(with_prompt, -1, NOWHERE)
    next_start = 0
    if outcome.commits > 0:
        next_start = course.next_start
        block, course, last_slot = _commit(
            block, placed.row, course, outcome.commits, phase, before.committed, memory, lanes
        )
    stays = (verified.token >= 0) & ((block.status == ACCEPTED) | (block.status == COMMITTED))
    stays = stays & (block.pick_row < 0)  # not corrected
    if course.phase == START:
        composes = 1
        block, course = _start_block(block, course, next_start, memory.ints, lanes)
    if composes == 1:
        last_slot = tl.where(outcome.cut < NOWHERE, NOWHERE, last_slot)
        block, course = _ride(
            block, course, placed, last_slot, before.rows, outcome.fed, stats, memory, lanes
        )
    elif (course.phase == INFILL) & (phase != INFILL):
        composes = 1  # resumed: no accepted token is kept any more
    return block, course, stays, composes


@triton.jit
def _emit(block, course, corrects, most, emitted, history, sampled, lanes):
    """Hands out tokens newly final in position order, before position ``most``; their number.

    Also those of the first slot not committed that will not change any more. Its last one waits:
    whole slots delivered are slots committed.
    """
    p, start = lanes.p, course.block_start
    head = first(block.status != COMMITTED, lanes)
    untested = (block.status == CHOSEN) & (takes_test(block, corrects, lanes) == 0)
    final = ((block.status == ACCEPTED) | untested) & (p < head + lanes.size - 1)
    end = tl.minimum(first((p >= head) & (final == 0), lanes), lanes.last + 1)
    tl.store(history.response + start + p, block.token, mask=(p >= head) & (p < end))
    number = tl.maximum(tl.minimum(start + end, most) - emitted, 0)
    tl.debug_barrier()  # some of them are committed in this pass
    tokens = tl.load(history.response + emitted + p, mask=p < number)
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
    course = load_course(ints)
    phase = course.phase
    if (phase != IDLE) & (tl.load(ints + F_RESUME) == SERIAL):
        return  # see ``serial``
    if phase == IDLE:
        tl.store(num_sampled_ptr + index, 0)
        tl.store(num_rejected_ptr + index, query_len)
        return

    memory = Memory(
        ints,
        floats_ptr + req * NUM_FLOAT_FIELDS,
        history_of(history_ptr + req * NUM_HISTORY_FIELDS * max_response, max_response),
        counters_ptr,
    )
    canvas = Canvas(
        by_position_ptr + req * NUM_POSITION_FIELDS * CANVAS,
        by_row_ptr + req * NUM_ROW_FIELDS * CANVAS,
        canvas_token_ptr + req * CANVAS,
        CANVAS,
    )
    first_row = tl.load(logits_start_ptr + index).to(tl.int64)
    decode_rows = tl.load(logits_start_ptr + index + 1) - first_row
    stats = Statistics(
        picked_ptr + first_row, picked_prob_ptr + first_row, given_prob_ptr + first_row
    )
    lanes = lanes_of(tl.load(ints + F_SLOT_SIZE), LANES)
    block = load_block(canvas, lanes)
    placed = load_placed(canvas, lanes)
    before = _load_before(ints)
    fed = Fed(
        query_len, decode_rows, tl.load(num_computed_ptr + req), tl.load(prefill_len_ptr + req)
    )
    block, verified, course, outcome = _run(block, placed.row, stats, course, fed, memory, lanes)

    # Every load of the old state comes before every store of the new one: the threads of a
    # program share the state of its request.
    tl.debug_barrier()

    tl.store(ints + F_PASSES, before.passes + outcome.decided)
    tl.store(ints + F_TEST_BLOCK, course.block_start)
    tl.store(ints + F_COMMITTED, before.committed + outcome.commits)
    block, course, stays, composes = _go_on(
        block, course, placed, verified, outcome, phase, before, stats, memory, lanes
    )
    store_evidence(verified, stays, block.pick_row, canvas, lanes)
    if composes == 1:
        store_block(block, canvas, lanes)
        prices = prices_of(course, table_ptr, free_rows, pass_price)
        rows, end = compose(block, course, ints, canvas, prices, mask_token_id, lanes)
        tl.store(ints + F_ROWS, rows)
        tl.store(ints + F_CANVAS, end)

    number = 0
    if (phase != PREFILL) | ((before.resume == START) & (course.phase == VERIFY)):
        most = tl.minimum(course.limit, tl.load(ints + F_MAX_TOKENS))
        most = tl.minimum(most, before.emitted + tl.load(emit_limit_ptr + index))
        sampled = sampled_ptr + index * CANVAS
        corrects = tl.load(ints + F_CORRECTS)
        number = _emit(
            block, course, corrects, most, before.emitted, memory.history, sampled, lanes
        )
        tl.store(ints + F_EMITTED, before.emitted + number)
        tl.atomic_add(counters_ptr + COUNT_TOKENS, number)
    tl.store(num_sampled_ptr + index, number)
    tl.store(num_rejected_ptr + index, query_len - outcome.kept)
    store_course(course, ints)


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
    check_pass(
        state,
        idx_mapping,
        (query_start_loc, logits_start),
        (num_computed, prefill_len),
        picked,
        (picked_prob, given_prob),
        sampled,
        (emit_limit, num_sampled, num_rejected),
    )
    assert 0 <= speculation.pass_price <= MAX_PRICE, speculation
    _transition_kernel[(len(idx_mapping),)](
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
        **lanes_of_canvas(state.canvas_length),
    )
