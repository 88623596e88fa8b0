"""Layout of a pass and the state transition after it, decided on the device.

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

from vllm_refusion.decoding import Counter, DecodeState, Field, Phase, Status
from vllm_refusion.triton_kernels.transition_reference import UNSEEN

_UNSEEN = tl.constexpr(UNSEEN)
_NUM_FIELDS = tl.constexpr(len(Field))

_PHASE = tl.constexpr(int(Field.PHASE))
_RESUME = tl.constexpr(int(Field.RESUME))
_PROMPT_LEN = tl.constexpr(int(Field.PROMPT_LEN))
_SLOT_SIZE = tl.constexpr(int(Field.SLOT_SIZE))
_BLOCK_LENGTH = tl.constexpr(int(Field.BLOCK_LENGTH))
_BUDGET = tl.constexpr(int(Field.BUDGET))
_MAX_TOKENS = tl.constexpr(int(Field.MAX_TOKENS))
_EOS = tl.constexpr(int(Field.EOS))
_BLOCK_START = tl.constexpr(int(Field.BLOCK_START))
_LIMIT = tl.constexpr(int(Field.LIMIT))
_EMITTED = tl.constexpr(int(Field.EMITTED))
_TOTAL_COMMITTED = tl.constexpr(int(Field.COMMITTED))
_ROWS = tl.constexpr(int(Field.ROWS))
_DRAW = tl.constexpr(int(Field.DRAW))
_PASSES = tl.constexpr(int(Field.PASSES))

_IDLE = tl.constexpr(int(Phase.IDLE))
_PREFILL = tl.constexpr(int(Phase.PREFILL))
_PLAN = tl.constexpr(int(Phase.PLAN))
_VERIFY = tl.constexpr(int(Phase.VERIFY))
_PREDICT = tl.constexpr(int(Phase.PREDICT))
_INFILL_VERIFY = tl.constexpr(int(Phase.INFILL_VERIFY))
_REPLAY = tl.constexpr(int(Phase.REPLAY))
_DONE = tl.constexpr(int(Phase.DONE))
_START = tl.constexpr(int(Phase.START))

_MASKED = tl.constexpr(int(Status.MASKED))
_CHOSEN = tl.constexpr(int(Status.CHOSEN))
_ACCEPTED = tl.constexpr(int(Status.ACCEPTED))
_COMMITTED = tl.constexpr(int(Status.COMMITTED))
_DROPPED = tl.constexpr(int(Status.DROPPED))

# sets of statuses, one bit each
_ONLY_MASKED = tl.constexpr(1 << Status.MASKED)
_ONLY_CHOSEN = tl.constexpr(1 << Status.CHOSEN)
_CHOSEN_OR_ACCEPTED = tl.constexpr(1 << Status.CHOSEN | 1 << Status.ACCEPTED)

_COUNT_PLAN = tl.constexpr(int(Counter.PLAN))
_COUNT_VERIFY = tl.constexpr(int(Counter.VERIFY))
_COUNT_PREDICT = tl.constexpr(int(Counter.PREDICT))
_COUNT_INFILL_VERIFY = tl.constexpr(int(Counter.INFILL_VERIFY))
_COUNT_REPLAY = tl.constexpr(int(Counter.REPLAY))
_COUNT_IDLE = tl.constexpr(int(Counter.IDLE))
_COUNT_ROWS_FED = tl.constexpr(int(Counter.ROWS_FED))
_COUNT_TOKENS = tl.constexpr(int(Counter.TOKENS))

LAYOUT_BLOCK = 1024
LANES_PER_WARP = 128


@triton.jit
def _layout_kernel(
    ints_ptr,  # [max_reqs, NUM_FIELDS] int32
    row_position_ptr,  # [max_reqs, W] int32
    row_own_start_ptr,  # [max_reqs, W] int32
    response_ptr,  # [max_reqs, P] int32
    order_ptr,  # [max_reqs, P] int32
    group_context_ptr,  # [max_reqs, P] int32
    idx_mapping_ptr,  # [R] int64
    query_start_loc_ptr,  # [R+1] int32
    num_computed_ptr,  # [max_reqs] int32
    input_ids_ptr,  # [N]
    positions_ptr,  # [N] int64
    visibility_ptr,  # [N, 4] int32
    slot_mappings_ptr,  # [groups, N] int64
    slot_mappings_stride,
    num_groups,
    canvas_length,
    max_response,
    BLOCK: tl.constexpr,
):
    slot = tl.load(idx_mapping_ptr + tl.program_id(0)).to(tl.int64)
    start = tl.load(query_start_loc_ptr + tl.program_id(0))
    length = tl.load(query_start_loc_ptr + tl.program_id(0) + 1) - start
    context = tl.load(num_computed_ptr + slot)
    ints = ints_ptr + slot * _NUM_FIELDS
    phase = tl.load(ints + _PHASE)
    prompt_len = tl.load(ints + _PROMPT_LEN)
    size = tl.maximum(tl.load(ints + _SLOT_SIZE), 1)
    committed = tl.load(ints + _TOTAL_COMMITTED)
    rows = tl.load(ints + _ROWS)
    # a truncated canvas is not fed at all
    rows = tl.where((phase == _IDLE) | (phase == _DONE) | (length < rows), 0, rows)

    for first in range(0, length, BLOCK):
        row = first + tl.arange(0, BLOCK)
        exists = row < length
        kv = context + row
        if (phase == _PREFILL) | (phase == _REPLAY):
            entry = kv - prompt_len
            used = exists & (entry < committed)
            replayed = used & (entry >= 0)
            at = slot * max_response + entry
            position = tl.load(order_ptr + at, mask=replayed, other=0)
            group = tl.load(group_context_ptr + at, mask=replayed, other=-1)
            token = tl.load(response_ptr + slot * max_response + position, mask=replayed, other=0)
            tl.store(input_ids_ptr + start + row, token, mask=replayed)
            isolated = group >= 0
            context_end = tl.where(isolated, prompt_len + group, 0)
            own_start = tl.where(isolated, kv - position % size, 0)
            rope = tl.where(replayed, prompt_len + position, kv)
        else:
            used = row < rows
            at = slot * canvas_length + row
            rope = prompt_len + tl.load(row_position_ptr + at, mask=used, other=0)
            own_start = context + tl.load(row_own_start_ptr + at, mask=used, other=0)
            context_end = tl.zeros([BLOCK], dtype=tl.int32) + context

        tl.store(positions_ptr + start + row, tl.where(used, rope, 0), mask=exists)
        sees = visibility_ptr + (start + row).to(tl.int64) * 4
        tl.store(sees, tl.where(used, context_end, 0), mask=exists)
        tl.store(sees + 1, tl.zeros([BLOCK], dtype=tl.int32), mask=exists)
        tl.store(sees + 2, tl.zeros([BLOCK], dtype=tl.int32), mask=exists)
        tl.store(sees + 3, tl.where(used, own_start, _UNSEEN), mask=exists)
        unused = exists & (used == 0)
        for group_index in range(num_groups):
            slots = slot_mappings_ptr + group_index * slot_mappings_stride
            tl.store(slots + start + row, tl.full([BLOCK], -1, tl.int64), mask=unused)


@triton.jit
def _is_member(status, phase):
    """Whether positions of ``status`` [LANES] take part in the canvas of ``phase``."""
    statuses = tl.where(phase == _PLAN, _ONLY_MASKED, _CHOSEN_OR_ACCEPTED)
    statuses = tl.where(phase == _VERIFY, _ONLY_CHOSEN, statuses)
    return ((statuses >> status) & 1) == 1


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
    return tl.where((p > cut) & (status != _COMMITTED), _DROPPED, status)


@triton.jit
def _plan(status, token, row, p, slot_start, picked_ptr, picked_prob_ptr, threshold, LANES: tl.constexpr):
    """Section 3.1: chooses slots; their drafts become the tokens. Returns status, token."""
    masked = status == _MASKED
    opens = masked & (p == slot_start)
    certainty = tl.load(picked_prob_ptr + row, mask=opens, other=-1.0)
    # below every probability, also for NaN: then the first slot is chosen and decoding goes on
    certainty = tl.where(certainty >= 0, certainty, -1.0)
    best = _first(opens & (certainty == tl.max(certainty, axis=0)), p, LANES)
    sure = opens & (certainty > threshold)
    sure = tl.where(tl.max(sure.to(tl.int32), axis=0) > 0, sure.to(tl.int32), (p == best).to(tl.int32))
    chosen = masked & (tl.gather(sure, slot_start, axis=0) == 1)
    draft = tl.load(picked_ptr + row, mask=chosen, other=0)
    return tl.where(chosen, _CHOSEN, status), tl.where(chosen, draft, token)


@triton.jit
def _verify(status, token, row, p, slot_start, size, passes, eos, LANES: tl.constexpr):
    """Section 3.2. Returns status, the rows to commit (0: go on to infill), where EOS cuts."""
    member = status == _CHOSEN
    failed = member & (p != slot_start) & (passes == 0)
    reached = member & (p < _first(failed, p, LANES))
    prefix_eos = _first(reached & (token == eos), p, LANES)
    ends = reached & (p <= prefix_eos)
    accepted = tl.sum(ends.to(tl.int32), axis=0)
    # with EOS the last slot is cut right after it, else only whole slots count
    kept = tl.where(prefix_eos < LANES, accepted, accepted // size * size)

    begun = tl.where(member & _intact(failed, slot_start), _ACCEPTED, status)
    infill_eos = _first((begun == _ACCEPTED) & (token == eos), p, LANES)
    back = tl.where(member & (row >= kept), _MASKED, status)
    cut = tl.where(kept > 0, prefix_eos, infill_eos)
    return _drop_after(tl.where(kept > 0, back, begun), p, cut), kept, cut


@triton.jit
def _infill_verify(status, token, p, slot_start, passes, eos, LANES: tl.constexpr):
    """Section 3.3, verify. Returns status, the rows to commit (0: go on), where EOS cuts."""
    chosen = status == _CHOSEN
    before = tl.gather(status, tl.maximum(p - 1, 0), axis=0)
    # the first proposal is accepted without a test
    tested = chosen & (p != slot_start) & (before != _ACCEPTED)
    good = chosen & _intact(tested & (passes == 0), slot_start)
    status = tl.where(good, _ACCEPTED, status)
    cut = _first((status == _ACCEPTED) & (token == eos), p, LANES)
    status = _drop_after(status, p, cut)
    missing = tl.sum((status == _CHOSEN).to(tl.int32), axis=0)
    accepted = tl.sum((status == _ACCEPTED).to(tl.int32), axis=0)
    return status, tl.where(missing > 0, 0, accepted), cut


@triton.jit
def _write_canvas(
    status, token, p, slot_start, phase, block_start, mask_token_id,
    canvas_token_ptr, row_position_ptr, row_own_start_ptr, CANVAS: tl.constexpr,
):  # fmt: skip
    """Writes the canvas of the next pass, ``phase``, and returns its number of rows."""
    member = _is_member(status, phase)
    row = _rows_of(member)
    rows = tl.sum(member.to(tl.int32), axis=0)
    fed_as_mask = tl.where(phase == _PREDICT, _CHOSEN, _MASKED)  # no other phase has such members
    fed_as_mask = tl.where(phase == _INFILL_VERIFY, -1, tl.where(phase == _VERIFY, -1, fed_as_mask))
    fed = tl.where(status == fed_as_mask, mask_token_id, token)
    isolated = (phase == _PREDICT) | (phase == _INFILL_VERIFY)
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
    ints = ints_ptr + slot * _NUM_FIELDS
    phase = tl.load(ints + _PHASE)
    if phase == _IDLE:
        tl.store(num_sampled_ptr + request, 0)
        tl.store(num_rejected_ptr + request, query_len)
        return

    prompt_len = tl.load(ints + _PROMPT_LEN)
    size = tl.load(ints + _SLOT_SIZE)
    block_start = tl.load(ints + _BLOCK_START)
    limit = tl.load(ints + _LIMIT)
    emitted = tl.load(ints + _EMITTED)
    committed = tl.load(ints + _TOTAL_COMMITTED)
    rows = tl.load(ints + _ROWS)
    draw = tl.load(ints + _DRAW)
    passes_made = tl.load(ints + _PASSES)
    computed = tl.load(num_computed_ptr + slot)

    p = tl.arange(0, LANES)
    status = tl.load(status_ptr + slot * CANVAS + p, mask=p < CANVAS, other=_DROPPED)
    token = tl.load(token_ptr + slot * CANVAS + p, mask=p < CANVAS, other=0)
    member = _is_member(status, phase)
    row = _rows_of(member)
    slot_start = p - p % size

    # Decide. What follows a commit is either a plan, or START of the block at next_start, or DONE.
    next_phase = phase
    next_start = 0
    kept = 0
    decided = 0
    counter = -1
    fed = 0
    if phase == _PREFILL:
        kept = query_len
        if computed + query_len >= tl.load(prefill_len_ptr + slot):
            replayed = tl.load(prefill_len_ptr + slot) - prompt_len
            next_phase = tl.where(replayed < committed, _REPLAY, tl.load(ints + _RESUME))
    elif phase == _REPLAY:
        counter = _COUNT_REPLAY
        replayed = computed - prompt_len
        kept = tl.minimum(query_len, committed - replayed)
        fed = kept
        next_phase = tl.where(replayed + kept < committed, _REPLAY, tl.load(ints + _RESUME))
    elif (phase == _DONE) | (query_len < rows):
        counter = _COUNT_IDLE
    else:
        decided = 1
        fed = rows
        passes_made += 1
        first_row = tl.load(logits_start_ptr + request).to(tl.int64)
        cut = LANES
        if phase == _PLAN:
            counter = _COUNT_PLAN
            draw += 1
            threshold = tl.load(slot_threshold_ptr + slot)
            status, token = _plan(
                status, token, row, p, slot_start,
                picked_ptr + first_row, picked_prob_ptr + first_row, threshold, LANES,
            )  # fmt: skip
            next_phase = _VERIFY
        elif phase == _PREDICT:
            counter = _COUNT_PREDICT
            draw += 1
            proposed = status == _CHOSEN
            proposal = tl.load(picked_ptr + first_row + row, mask=proposed, other=0)
            token = tl.where(proposed, proposal, token)
            next_phase = _INFILL_VERIFY
        else:
            # the row before gives this row's token its probability
            tested = member & (row > 0)
            given = tl.load(given_prob_ptr + first_row + row - 1, mask=tested, other=-1.0)
            passes = given > tl.load(token_threshold_ptr + slot)
            eos = tl.load(ints + _EOS)
            if phase == _VERIFY:
                counter = _COUNT_VERIFY
                status, kept, cut = _verify(
                    status, token, row, p, slot_start, size, passes, eos, LANES
                )
            else:
                counter = _COUNT_INFILL_VERIFY
                status, kept, cut = _infill_verify(
                    status, token, p, slot_start, passes, eos, LANES
                )
            limit = tl.minimum(limit, tl.where(cut < LANES, block_start + cut + 1, limit))
            next_phase = _PREDICT

    # Every load of the old state comes before every store of the new one: the threads of a
    # program share the state of its request.
    tl.debug_barrier()

    if counter >= 0:
        tl.atomic_add(counters_ptr + counter, 1)
        tl.atomic_add(counters_ptr + _COUNT_ROWS_FED, fed)

    if (decided == 1) & (kept > 0):
        now = member & (row < kept)
        at = slot * max_response + committed + row
        group = tl.where(phase == _INFILL_VERIFY, committed, -1)
        tl.store(response_ptr + slot * max_response + block_start + p, token, mask=now)
        tl.store(order_ptr + at, block_start + p, mask=now)
        tl.store(group_context_ptr + at, tl.zeros([LANES], dtype=tl.int32) + group, mask=now)
        committed += kept
        status = tl.where(now, _COMMITTED, status)
        next_start = block_start + tl.load(ints + _BLOCK_LENGTH)
        following = tl.where(next_start >= limit, _DONE, _START)
        masked = tl.sum((status == _MASKED).to(tl.int32), axis=0)
        next_phase = tl.where(masked > 0, _PLAN, following)

    if next_phase == _START:
        decided = 1
        next_phase = _PLAN
        block_start = next_start
        length = tl.minimum(tl.load(ints + _BLOCK_LENGTH), tl.load(ints + _BUDGET) - block_start)
        status = tl.where(p < length, _MASKED, _DROPPED)
        token = tl.zeros([LANES], dtype=tl.int32)

    if decided == 1:
        tl.store(status_ptr + slot * CANVAS + p, status, mask=p < CANVAS)
        tl.store(token_ptr + slot * CANVAS + p, token, mask=p < CANVAS)
        rows = _write_canvas(
            status, token, p, slot_start, next_phase, block_start, mask_token_id,
            canvas_token_ptr + slot * canvas_token_stride,
            row_position_ptr + slot * CANVAS,
            row_own_start_ptr + slot * CANVAS,
            CANVAS,
        )  # fmt: skip

    # Tokens newly contiguous in position order, at most one per scheduled row.
    count = 0
    if phase != _PREFILL:
        contiguous = tl.minimum(_first(status != _COMMITTED, p, CANVAS), CANVAS)
        end = tl.minimum(block_start + contiguous, limit)
        end = tl.minimum(end, tl.load(ints + _MAX_TOKENS))
        end = tl.minimum(end, emitted + query_len)
        count = tl.maximum(end - emitted, 0)
        tl.debug_barrier()  # some of them are committed in this pass
        source = response_ptr + slot * max_response + emitted + p
        tl.store(sampled_ptr + request * sampled_stride + p, tl.load(source, mask=p < count), mask=p < count)
        tl.atomic_add(counters_ptr + _COUNT_TOKENS, count)

    tl.store(num_sampled_ptr + request, count)
    tl.store(num_rejected_ptr + request, query_len - kept)
    tl.store(ints + _PHASE, next_phase)
    tl.store(ints + _BLOCK_START, block_start)
    tl.store(ints + _LIMIT, limit)
    tl.store(ints + _EMITTED, emitted + count)
    tl.store(ints + _TOTAL_COMMITTED, committed)
    tl.store(ints + _ROWS, rows)
    tl.store(ints + _DRAW, draw)
    tl.store(ints + _PASSES, passes_made)


def layout(
    state: DecodeState,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    visibility: torch.Tensor,
    slot_mappings: torch.Tensor,
) -> None:
    """Same arguments and effects as ``layout_reference``, as one kernel."""
    requests = len(idx_mapping)
    _check_starts(query_start_loc, requests)
    _check(num_computed, (state.max_requests,), torch.int32)
    _check(positions, positions.shape, torch.int64)
    _check(visibility, (len(visibility), 4), torch.int32)
    assert input_ids.is_contiguous() and idx_mapping.is_contiguous()
    assert slot_mappings.dtype == torch.int64 and slot_mappings.stride(1) == 1
    _layout_kernel[(requests,)](
        state.ints,
        state.row_position,
        state.row_own_start,
        state.response,
        state.order,
        state.group_context,
        idx_mapping,
        query_start_loc,
        num_computed,
        input_ids,
        positions,
        visibility,
        slot_mappings,
        slot_mappings.stride(0),
        len(slot_mappings),
        state.canvas_length,
        state.max_response,
        BLOCK=LAYOUT_BLOCK,
    )


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
        _check_starts(starts, requests)
    for per_slot in (num_computed, prefill_len):
        _check(per_slot, (state.max_requests,), torch.int32)
    _check(picked, picked.shape, torch.int32)
    for probability in (picked_prob, given_prob):
        _check(probability, picked.shape, torch.float32)
    for count in (num_sampled, num_rejected):
        _check(count, (requests,), torch.int32)
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


def _check_starts(starts: torch.Tensor, requests: int) -> None:
    # a padded batch has more entries than its requests need
    assert len(starts) > requests and starts.dtype == torch.int32 and starts.is_contiguous()


def _check(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous(), (
        f"expected a contiguous {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}"
    )
