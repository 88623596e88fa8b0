"""PyTorch twin of the kernel in ``layout``."""

from __future__ import annotations

import torch

from vllm_refusion.decoding.state import DecodeState, Field, Phase

UNSEEN = 2**31 - 1  # own_start of a row that sees nothing


def layout_twin(
    state: DecodeState,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    visibility: torch.Tensor,
    slot_mappings: torch.Tensor,
) -> None:
    """Places the rows of one pass: RoPE positions, visibility, KV writes, replayed tokens.

    Args:
        idx_mapping: [R] int64, request index of each batch row.
        query_start_loc: [R+1] int32.
        num_computed: [max_requests] int32, KV entries of each request before this pass.
        input_ids: [N] int; rows that replay committed tokens are overwritten, others left alone.
        positions: [N] int64, out: RoPE positions.
        visibility: [N, 4] int32, out: see ``canvas_attention``.
        slot_mappings: [groups, N] int64: set to -1 for rows whose KV must not be written.
    """
    starts = query_start_loc.tolist()
    for row, req in enumerate(idx_mapping.tolist()):
        start, end = starts[row], starts[row + 1]
        ints = state.ints[req].tolist()
        prompt_len, context = ints[Field.PROMPT_LEN], int(num_computed[req])
        phase = ints[Field.PHASE]
        length = end - start
        kv = torch.arange(context, context + length, dtype=torch.int32)
        see = torch.zeros(length, 4, dtype=torch.int32)
        if phase in (Phase.PREFILL, Phase.REPLAY):
            entry = (kv - prompt_len).long()
            replayed = entry >= 0
            # the first plan may be fed with the end of the prompt
            plans = phase == Phase.PREFILL and ints[Field.RESUME] == Phase.START
            plans &= context + length - prompt_len >= ints[Field.ROWS]
            used = entry < (ints[Field.ROWS] if plans else ints[Field.COMMITTED])
            used |= ~replayed
            replayed &= entry < ints[Field.COMMITTED]
            entry = entry.clamp(0, state.max_response - 1)
            position = torch.where(replayed, state.order[req, entry], kv - prompt_len)
            group = torch.where(replayed, state.group_context[req, entry], -1)
            in_slot = position % max(ints[Field.SLOT_SIZE], 1)
            isolated = group >= 0
            see[:, 0] = torch.where(isolated, prompt_len + group, 0)
            see[:, 3] = torch.where(isolated, kv - in_slot, 0)
            tokens = state.response[req, position.clamp_min(0).long()]
            rewrite = replayed & used
            input_ids[start:end][rewrite] = tokens[rewrite].to(input_ids.dtype)
        else:
            width = min(length, state.canvas_length)
            used = torch.zeros(length, dtype=torch.bool)
            position = torch.zeros(length, dtype=torch.int32)
            if phase not in (Phase.IDLE, Phase.DONE) and length >= ints[Field.ROWS]:
                position[:width] = state.row_position[req, :width]
                used[: ints[Field.CANVAS]] = True
            see[:width, 0] = context + state.row_context[req, :width]
            see[:width, 1] = context + state.row_run_start[req, :width]
            see[:width, 2] = context + state.row_run_end[req, :width]
            see[:width, 3] = context + state.row_own_start[req, :width]
        see[~used] = torch.tensor([0, 0, 0, UNSEEN], dtype=torch.int32)
        positions[start:end] = torch.where(used, prompt_len + position, 0)
        visibility[start:end] = see
        slot_mappings[:, start:end].masked_fill_(~used, -1)
