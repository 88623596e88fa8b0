"""Places the rows of a pass on the device: positions, visibility, KV writes, replayed tokens; and
says what decode rows are asked.

What a pass feeds is described in ``vllm_refusion.decoding.state``, the twin is ``layout_twin``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_refusion.decoding.state import DecodeState
from vllm_refusion.triton_kernels.checks import check, check_starts
from vllm_refusion.triton_kernels.constant import Constant
from vllm_refusion.triton_kernels.layout_twin import ASKED, UNSEEN
from vllm_refusion.triton_kernels.state_codes import (
    DONE,
    F_CANVAS,
    F_COMMITTED,
    F_EMITTED,
    F_PHASE,
    F_PROMPT_LEN,
    F_RESUME,
    F_ROWS,
    F_SLOT_SIZE,
    H_GROUP_CONTEXT,
    H_ORDER,
    H_RESPONSE,
    IDLE,
    NUM_FIELDS,
    NUM_HISTORY_FIELDS,
    NUM_ROW_FIELDS,
    PREFILL,
    R_CONTEXT,
    R_DRAW,
    R_OWN_START,
    R_POSITION,
    R_RUN_END,
    R_RUN_START,
    R_TARGET,
    REPLAY,
    SERIAL,
    START,
)

_UNSEEN = Constant(UNSEEN)
ROWS_PER_TILE = 1024


class Sees(NamedTuple):
    """What rows see, as indices of the KV cache; see ``canvas_attention``."""

    context_end: tl.tensor
    run_start: tl.tensor
    run_end: tl.tensor
    own_start: tl.tensor


@triton.jit
def _of_canvas(at, begin, mask, canvas_length):
    """Response positions of canvas rows, and what they see; the canvas begins at KV ``begin``."""
    position = tl.load(at + R_POSITION * canvas_length, mask=mask, other=0)
    sees = Sees(
        begin + tl.load(at + R_CONTEXT * canvas_length, mask=mask, other=0),
        begin + tl.load(at + R_RUN_START * canvas_length, mask=mask, other=0),
        begin + tl.load(at + R_RUN_END * canvas_length, mask=mask, other=0),
        begin + tl.load(at + R_OWN_START * canvas_length, mask=mask, other=0),
    )
    return position, sees


@triton.jit
def _layout_kernel(
    ints_ptr,  # [max_reqs, NUM_FIELDS] int32
    by_row_ptr,  # [max_reqs, NUM_ROW_FIELDS, W] int32
    history_ptr,  # [max_reqs, NUM_HISTORY_FIELDS, P] int32
    canvas_token_ptr,  # [max_reqs, W] int64
    idx_mapping_ptr,  # [R] int64
    query_start_loc_ptr,  # [R+1] int32
    logits_start_ptr,  # [R+1] int32
    num_computed_ptr,  # [max_reqs] int32
    input_ids_ptr,  # [N]
    positions_ptr,  # [N] int64
    visibility_ptr,  # [N, 4] int32
    slot_mappings_ptr,  # [groups, N] int64
    asked_ptr,  # [ASKED, M] int32
    slot_mappings_stride,
    asked_stride,
    num_groups,
    canvas_length,
    max_response,
    BLOCK: tl.constexpr,
):
    req = tl.load(idx_mapping_ptr + tl.program_id(0)).to(tl.int64)
    start = tl.load(query_start_loc_ptr + tl.program_id(0))
    length = tl.load(query_start_loc_ptr + tl.program_id(0) + 1) - start
    context = tl.load(num_computed_ptr + req)
    ints = ints_ptr + req * NUM_FIELDS
    of_rows = by_row_ptr + req * NUM_ROW_FIELDS * canvas_length
    history = history_ptr + req * NUM_HISTORY_FIELDS * max_response
    phase = tl.load(ints + F_PHASE)
    prompt_len = tl.load(ints + F_PROMPT_LEN)
    size = tl.maximum(tl.load(ints + F_SLOT_SIZE), 1)
    committed = tl.load(ints + F_COMMITTED)
    rows = tl.load(ints + F_ROWS)
    emitted = tl.load(ints + F_EMITTED)
    resume = tl.load(ints + F_RESUME)
    # a truncated canvas is not fed at all
    unfed = (phase == IDLE) | (phase == DONE) | (length < rows)
    canvas = tl.where(unfed, 0, tl.load(ints + F_CANVAS))

    for first in range(0, length, BLOCK):
        row = first + tl.arange(0, BLOCK)
        exists = row < length
        kv = context + row
        if (phase == PREFILL) | (phase == REPLAY):
            # tokens that serial decoding knows are prompt, but for the last one
            serial = resume == SERIAL
            prefill = prompt_len + tl.where(serial, tl.maximum(emitted - 1, 0), 0)
            entry = kv - prefill
            # the first canvas may be fed with the end of the prompt
            rides = (phase == PREFILL) & (serial | (resume == START)) & (emitted == 0)
            rides = rides & (context + length - prefill >= rows)
            replayed = exists & (entry >= 0) & (entry < committed)
            ridden = exists & (entry >= 0) & (entry < tl.where(rides, tl.load(ints + F_CANVAS), 0))
            used = replayed | ridden | (exists & (entry < 0))
            at = of_rows + entry
            of_entry = history + entry
            position = tl.load(of_entry + H_ORDER * max_response, mask=replayed, other=0)
            group = tl.load(of_entry + H_GROUP_CONTEXT * max_response, mask=replayed, other=-1)
            of_position = history + H_RESPONSE * max_response + position
            token = tl.load(of_position, mask=replayed, other=0)
            tl.store(input_ids_ptr + start + row, token, mask=replayed)
            isolated = group >= 0
            canvas_position, sees = _of_canvas(at, prefill, ridden, canvas_length)
            context_end = tl.where(isolated, prompt_len + group, 0)
            context_end = tl.where(ridden, sees.context_end, context_end)
            run_start = tl.where(ridden, sees.run_start, 0)
            run_end = tl.where(ridden, sees.run_end, 0)
            own_start = tl.where(isolated, kv - position % size, 0)
            own_start = tl.where(ridden, sees.own_start, own_start)
            rope = tl.where(replayed, prompt_len + position, kv)
            rope = tl.where(ridden, prompt_len + canvas_position, rope)
        else:
            used = exists & (row < canvas)
            position, sees = _of_canvas(of_rows + row, context, used, canvas_length)
            rope = prompt_len + position
            context_end = sees.context_end
            run_start = sees.run_start
            run_end = sees.run_end
            own_start = sees.own_start

        tl.store(positions_ptr + start + row, tl.where(used, rope, 0), mask=exists)
        sees = visibility_ptr + (start + row).to(tl.int64) * 4
        tl.store(sees, tl.where(used, context_end, 0), mask=exists)
        tl.store(sees + 1, tl.where(used, run_start, 0), mask=exists)
        tl.store(sees + 2, tl.where(used, run_end, 0), mask=exists)
        tl.store(sees + 3, tl.where(used, own_start, _UNSEEN), mask=exists)
        unused = exists & (used == 0)
        for group_index in range(num_groups):
            mapping = slot_mappings_ptr + group_index * slot_mappings_stride
            tl.store(mapping + start + row, tl.full([BLOCK], -1, tl.int64), mask=unused)

    first_row = tl.load(logits_start_ptr + tl.program_id(0))
    decode_rows = tl.load(logits_start_ptr + tl.program_id(0) + 1) - first_row
    tokens = canvas_token_ptr + req * canvas_length
    for first in range(0, decode_rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        exists = row < decode_rows
        following = tl.minimum(row + 1, canvas_length - 1)
        target = tl.load(of_rows + R_TARGET * canvas_length + row, mask=exists)
        given = tl.load(tokens + following, mask=exists).to(tl.int32)
        draw = tl.load(of_rows + R_DRAW * canvas_length + row, mask=exists)
        asked = asked_ptr + first_row + row
        tl.store(asked, target, mask=exists)
        tl.store(asked + asked_stride, given, mask=exists)
        tl.store(asked + 2 * asked_stride, draw, mask=exists)


def layout(
    state: DecodeState,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    logits_start: torch.Tensor,
    num_computed: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    visibility: torch.Tensor,
    slot_mappings: torch.Tensor,
    asked: torch.Tensor,
) -> None:
    """Same arguments and effects as ``layout_twin``, as one kernel."""
    requests = len(idx_mapping)
    for starts in (query_start_loc, logits_start):
        check_starts(starts, requests)
    check(num_computed, (state.max_requests,), torch.int32)
    check(positions, positions.shape, torch.int64)
    check(visibility, (len(visibility), 4), torch.int32)
    assert input_ids.is_contiguous() and idx_mapping.is_contiguous()
    assert slot_mappings.dtype == torch.int64 and slot_mappings.stride(1) == 1
    check(asked, (ASKED, asked.shape[1]), torch.int32)
    _layout_kernel[(requests,)](
        state.ints,
        state.by_row,
        state.history,
        state.canvas_token,
        idx_mapping,
        query_start_loc,
        logits_start,
        num_computed,
        input_ids,
        positions,
        visibility,
        slot_mappings,
        asked,
        slot_mappings.stride(0),
        asked.stride(0),
        len(slot_mappings),
        state.canvas_length,
        state.max_response,
        BLOCK=ROWS_PER_TILE,
    )
