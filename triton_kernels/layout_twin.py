"""PyTorch twin of the kernel in ``layout``."""

from __future__ import annotations

import torch

from vllm_refusion.decoding.state import DecodeState, Field, Phase

UNSEEN = 2**31 - 1  # own_start of a row that sees nothing
ASKED = 3


def layout_twin(
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
    """Places the rows of one pass: RoPE positions, visibility, KV writes, replayed tokens.

    Rows with statistics are the first ones of their request's canvas.

    Args:
        idx_mapping: [R] int64, request index of each batch row.
        query_start_loc: [R+1] int32. logits_start: [R+1] int32, of rows with statistics, M at most.
        num_computed: [max_requests] int32, KV entries of each request before this pass.
        input_ids: [N] int; rows that replay committed tokens are overwritten, others left alone.
        positions: [N] int64, out: RoPE positions.
        visibility: [N, 4] int32, out: see ``canvas_attention``.
        slot_mappings: [groups, N] int64: set to -1 for rows whose KV must not be written.
        asked: [ASKED, M] int32, out: what ``token_stats`` is to say of each row with statistics:
            the position that it picks for, the token of the row after it, the draw.
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
            # tokens that serial decoding knows are prompt, but for the last one
            prefill = prompt_len
            if ints[Field.RESUME] == Phase.SERIAL:
                prefill += max(ints[Field.EMITTED] - 1, 0)
            entry = (kv - prefill).long()
            # the first canvas may be fed with the end of the prompt
            begins = phase == Phase.PREFILL and ints[Field.RESUME] in (Phase.START, Phase.SERIAL)
            rides = begins and ints[Field.EMITTED] == 0
            rides = rides and context + length - prefill >= ints[Field.ROWS]
            replayed = (entry >= 0) & (entry < ints[Field.COMMITTED])
            ridden = (entry >= 0) & (entry < (ints[Field.CANVAS] if rides else 0))
            used = (entry < 0) | replayed | ridden
            row = entry.clamp(0, state.canvas_length - 1)
            entry = entry.clamp(0, state.max_response - 1)
            position = torch.where(replayed, state.order[req, entry], kv - prompt_len)
            group = torch.where(replayed, state.group_context[req, entry], -1)
            in_slot = position % max(ints[Field.SLOT_SIZE], 1)
            isolated = group >= 0
            see[:, 0] = torch.where(isolated, prompt_len + group, 0)
            see[:, 3] = torch.where(isolated, kv - in_slot, 0)
            see = torch.where(ridden[:, None], prefill + _sees(state, req)[row], see)
            position = torch.where(ridden, state.row_position[req, row], position)
            tokens = state.response[req, position.clamp_min(0).long()]
            input_ids[start:end][replayed] = tokens[replayed].to(input_ids.dtype)
        else:
            width = min(length, state.canvas_length)
            used = torch.zeros(length, dtype=torch.bool)
            position = torch.zeros(length, dtype=torch.int32)
            if phase not in (Phase.IDLE, Phase.DONE) and length >= ints[Field.ROWS]:
                position[:width] = state.row_position[req, :width]
                used[: ints[Field.CANVAS]] = True
            see[:width] = context + _sees(state, req)[:width]
        see[~used] = torch.tensor([0, 0, 0, UNSEEN], dtype=torch.int32)
        positions[start:end] = torch.where(used, prompt_len + position, 0)
        visibility[start:end] = see
        slot_mappings[:, start:end].masked_fill_(~used, -1)

    for index, req in enumerate(idx_mapping.tolist()):
        first, end = logits_start[index : index + 2].tolist()
        following = torch.arange(1, end - first + 1).clamp_max(state.canvas_length - 1)
        asked[0, first:end] = state.row_target[req, : end - first]
        asked[1, first:end] = state.canvas_token[req, following]
        asked[2, first:end] = state.row_draw[req, : end - first]


def _sees(state: DecodeState, req: int) -> torch.Tensor:
    """[W, 4] int32: what the canvas rows see, counted from the canvas."""
    columns = (state.row_context, state.row_run_start, state.row_run_end, state.row_own_start)
    return torch.stack([column[req] for column in columns], dim=1)
