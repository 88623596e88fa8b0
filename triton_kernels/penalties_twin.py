"""PyTorch twin of the kernels in ``penalties``, a row at a time."""

from __future__ import annotations

import torch

from vllm_refusion.decoding.penalties import Penalties
from vllm_refusion.decoding.state import DecodeState, Field


def apply_penalties_twin(
    logits: torch.Tensor,
    row_request: torch.Tensor,
    row: torch.Tensor,
    row_position: torch.Tensor,
    state: DecodeState,
    penalties: Penalties,
) -> None:
    """What ``penalties.apply_penalties`` does: same arguments, same results."""
    for i in (row_position >= 0).nonzero().flatten().tolist():
        req = int(row_request[i])
        table = int(penalties.index[req])
        if not table:
            continue
        known = int(state.ints[req, Field.EMITTED])
        drafts = state.canvas_token[req, 1 : 1 + _drafts_seen(state, req, int(row[i]))]
        response = torch.cat([state.response[req, :known], drafts.int()]).to(torch.int64)
        logits[i] = _penalised(logits[i] + penalties.bias[table], drafts, penalties, table)
        for start, length in zip(
            penalties.word_start[table].tolist(), penalties.word_length[table].tolist()
        ):
            *before, last = penalties.word_tokens[table, start : start + length].tolist() or [-1]
            if length and response[len(response) - len(before) :].tolist() == before:
                logits[i, last] = -torch.inf


def _drafts_seen(state: DecodeState, req: int, row: int) -> int:
    """Drafts before a canvas row: those that it sees of the rows of tokens behind the first."""
    if state.canvas_token[req, row] == state.mask_token_id:
        return max(0, int(state.row_run_end[req, row]) - 1)
    return row


def _penalised(
    scores: torch.Tensor, drafts: torch.Tensor, penalties: Penalties, table: int
) -> torch.Tensor:
    repetition, frequency, presence = penalties.factors[table]
    seen = penalties.seen[table]
    count = (seen >> 1) + torch.bincount(drafts, minlength=len(seen))
    scale = torch.where((seen & 1 > 0) | (count > 0), repetition, 1.0)
    scores = scores * torch.where(scores > 0, 1.0 / scale, scale)
    return scores - frequency * count - presence * (count > 0)
