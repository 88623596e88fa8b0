"""Deals the decode rows of a step out to its requests, on the device.

How many rows a request's next pass needs is known on the device only, while the size of the batch
must be known when it is launched. So the host fixes the size from what it knows of earlier steps,
and this kernel decides who gets the rows:

1. a request gets the rows its phase needs, or none: then its pass waits for the next step. The
   first in line changes from step to step;
2. what is left goes to riders, then to rows that are not used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_refusion.decoding.state import DecodeState
from vllm_refusion.triton_kernels.allocation_twin import TOTALS
from vllm_refusion.triton_kernels.checks import check
from vllm_refusion.triton_kernels.sizes import next_power_of_2
from vllm_refusion.triton_kernels.state_codes import (
    DONE,
    F_CANVAS,
    F_COMMITTED,
    F_EMITTED,
    F_KEPT,
    F_LAST_TOKENS,
    F_PHASE,
    F_PROMPT_LEN,
    F_RESUME,
    F_ROWS,
    F_SLOT_SIZE,
    IDLE,
    NUM_FIELDS,
    PREFILL,
    REPLAY,
    SERIAL,
    START,
)


@triton.jit
def _deal(wanted, left):
    """What of ``wanted`` [LANES] is served in order out of ``left``."""
    before = tl.cumsum(wanted, axis=0) - wanted
    return tl.minimum(tl.maximum(left - before, 0), wanted)


# Compiled once: batches come in all sizes, and their parts begin anywhere.
@triton.jit(
    do_not_specialize=["num_requests", "num_starts", "num_decoding", "rows", "first"],
    do_not_specialize_on_alignment=["idx_mapping_ptr", "scheduled_ptr", "prompt_rows_ptr"],
)
def _allocate_kernel(
    ints_ptr,  # [max_reqs, NUM_FIELDS] int32
    num_computed_ptr,  # [max_reqs] int32
    idx_mapping_ptr,  # [R] int64
    scheduled_ptr,  # [>= R] int32
    prompt_rows_ptr,  # [>= R] int32
    query_start_loc_ptr,  # [S] int32
    logits_start_ptr,  # [R+1] int32
    totals_ptr,  # [TOTALS] int32
    num_requests,
    num_starts,
    num_decoding,
    rows,
    first,
    LANES: tl.constexpr,
):
    lane = tl.arange(0, LANES)
    request = lane + first
    request = tl.where(request < num_decoding, request, request - num_decoding)
    exists = lane < num_decoding
    scheduled = tl.load(scheduled_ptr + request, mask=exists, other=0)
    req = tl.load(idx_mapping_ptr + request, mask=exists, other=0)
    ints = ints_ptr + req * NUM_FIELDS
    phase = tl.load(ints + F_PHASE, mask=exists, other=IDLE)
    committed = tl.load(ints + F_COMMITTED, mask=exists, other=0)
    # pages are reserved behind the whole slots that have been delivered
    kept = tl.load(ints + F_KEPT, mask=exists, other=0)
    emitted = tl.load(ints + F_EMITTED, mask=exists, other=0)
    delivered = emitted - emitted % tl.maximum(tl.load(ints + F_SLOT_SIZE, mask=exists, other=1), 1)
    room = scheduled - tl.where(phase == SERIAL, 0, committed + kept - delivered)
    needed = tl.load(ints + F_ROWS, mask=exists, other=0)
    canvas = tl.load(ints + F_CANVAS, mask=exists, other=0)
    prompt_len = tl.load(ints + F_PROMPT_LEN, mask=exists, other=0)
    replayed = tl.load(num_computed_ptr + req, mask=exists, other=0) - prompt_len
    replaying = phase == REPLAY
    idle = (phase == IDLE) | (phase == DONE)
    resume = tl.load(ints + F_RESUME, mask=exists, other=IDLE)
    fresh = ((resume == START) | (resume == SERIAL)) & (emitted == 0)
    idle = idle | ((phase == PREFILL) & (fresh == 0))
    room = tl.where(phase == PREFILL, scheduled, room)
    needed = tl.where(replaying, tl.minimum(committed - replayed, scheduled), needed)
    needed = tl.where(idle | ((replaying == 0) & (needed > room)), 0, needed)
    whole = replaying | idle | (needed == 0)
    canvas = tl.where(whole, needed, tl.maximum(tl.minimum(canvas, room), needed))

    through = tl.cumsum(needed, axis=0)
    given = tl.where(through <= rows, needed, 0)
    served = exists & (replaying == 0) & (idle == 0) & (phase != PREFILL)
    tl.store(ints + F_CANVAS, canvas, mask=served & (needed > 0))
    extra = tl.where(given > 0, canvas - needed, 0)
    given += _deal(extra, rows - tl.sum(given, axis=0))
    given += _deal(scheduled - given, rows - tl.sum(given, axis=0))
    tl.store(logits_start_ptr + request, given, mask=exists)
    tl.store(totals_ptr, tl.sum(needed, axis=0))
    tl.store(totals_ptr + 1, tl.sum(canvas, axis=0))
    serial = (needed > 0) & (phase == SERIAL)
    tokens = tl.load(ints + F_LAST_TOKENS, mask=serial, other=0)
    tl.store(totals_ptr + 2, tl.sum(serial.to(tl.int32), axis=0))
    tl.store(totals_ptr + 3, tl.sum(tokens, axis=0))
    tl.debug_barrier()

    # in the order of the batch: decoding requests, then prompts
    given = tl.load(logits_start_ptr + lane, mask=exists, other=0)
    prompt_rows = tl.load(prompt_rows_ptr + lane, mask=lane < num_requests, other=0)
    tl.debug_barrier()
    tl.store(logits_start_ptr, 0)
    tl.store(query_start_loc_ptr, 0)
    tl.store(logits_start_ptr + 1 + lane, tl.cumsum(given, axis=0), mask=lane < num_requests)
    ends = tl.cumsum(given + prompt_rows, axis=0)
    # all rows come before the requests that are not there
    ends = tl.where(lane < num_requests, ends, tl.sum(prompt_rows, axis=0) + rows)
    tl.store(query_start_loc_ptr + 1 + lane, ends, mask=lane + 1 < num_starts)


def allocate(
    state: DecodeState,
    num_computed: torch.Tensor,
    idx_mapping: torch.Tensor,
    scheduled: torch.Tensor,
    prompt_rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    logits_start: torch.Tensor,
    totals: torch.Tensor,
    num_decoding: int,
    rows: int,
    first: int,
) -> None:
    """Same arguments and effects as ``allocate_twin``, as one kernel."""
    requests, starts = len(idx_mapping), len(query_start_loc)
    for per_request in (scheduled, prompt_rows):
        check(per_request, (len(scheduled),), torch.int32)
    check(logits_start, (requests + 1,), torch.int32)
    check(totals, (TOTALS,), torch.int32)
    assert query_start_loc.is_contiguous() and requests < starts
    assert 0 <= first < max(num_decoding, 1) and num_decoding <= requests <= len(scheduled)
    lanes = max(16, next_power_of_2(state.max_requests))
    assert starts <= lanes + 1, (starts, lanes)
    _allocate_kernel[(1,)](
        state.ints,
        num_computed,
        idx_mapping,
        scheduled,
        prompt_rows,
        query_start_loc,
        logits_start,
        totals,
        requests,
        starts,
        num_decoding,
        rows,
        first,
        LANES=lanes,
        num_warps=max(1, min(8, lanes // 64)),
    )
