"""PyTorch twin of the kernel in ``grammar``; and which rows pick a token, in plain PyTorch."""

from __future__ import annotations

import torch

from vllm_refusion.decoding.state import DecodeState, Field


def picking_rows(
    state: DecodeState, requests: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which canvas rows of serial requests pick a token, and behind how many accepted drafts.

    All others are masks that draft (``serial_twin``). Nothing is read back.

    Args:
        requests: [N] int64. rows: [N], canvas rows.

    Returns:
        picks: [N] bool. accepted: [N] int64; 0 where it does not pick.
    """
    ints = state.ints[requests].long()
    accepted = state.row_target[requests, rows] - ints[:, Field.EMITTED]
    inside = (accepted >= 0) & (accepted <= ints[:, Field.TESTS])
    accepted = torch.where(inside, accepted, 0)
    at_start = (ints[:, Field.EMITTED] + accepted) % ints[:, Field.SLOT_SIZE].clamp_min(1) == 0
    at_start &= ints[:, Field.MASKED_STARTS] > 0
    row = torch.where(at_start, state.rider_row[requests, accepted].long(), accepted)
    return inside & (row == rows), accepted


def forbid_twin(logits: torch.Tensor, mask_row: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Sets the logits of tokens that a grammar refuses to -inf.

    Args:
        logits: [N, V], changed in place.
        mask_row: [N] int32, the row of ``bitmask`` that says what is allowed; -1 for everything.
        bitmask: [M, >= ceil(V / 32)] int32; bit t % 32 of word t // 32 is of token t.
    """
    rows = (mask_row >= 0).nonzero().flatten()
    words = bitmask[mask_row[rows].long()]
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    refused = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill(refused, -torch.inf)
