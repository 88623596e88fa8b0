"""PyTorch twin of drawn acceptance: outcomes of decoding drawn from a seed, not from logits.

Meaning and formulas are in ``acceptance.py``, the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_refusion.decoding.noise import philox_4x32
from vllm_refusion.decoding.state import DecodeState, Field, Phase

PICK, OUTCOME = 1, 2  # last word of the Philox counter; sampling noise uses 0
QUANTILES = 1024
QUANTILE_BITS = 10
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class AcceptanceTables:
    """What outcomes are drawn from; all requests share it.

    Attributes:
        quantiles: [F, QUANTILES] float32, per profile the probabilities that a token passes.
        slot_chance: [F] float32, per profile the chance that a slot is certain enough.
        first_chance: [F] float32, the same of the response's first slot.
        vocab: number of tokens.
        excluded: two token ids in ascending order that are never picked; ``vocab`` for none.
    """

    quantiles: torch.Tensor
    slot_chance: torch.Tensor
    first_chance: torch.Tensor
    vocab: int
    excluded: tuple[int, int]


def acceptance_stats_twin(
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    row_given: torch.Tensor,
    row_given_at: torch.Tensor,
    row_draw: torch.Tensor,
    *,
    seed: torch.Tensor,
    slot_size: torch.Tensor,
    slot_threshold: torch.Tensor,
    resume: torch.Tensor,
    tables: AcceptanceTables,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """The results of ``acceptance.acceptance_stats``: same arguments, same values, bit for bit."""
    picked, picked_prob, given_prob = out
    used = (row_position[: len(row_request)] >= 0).nonzero().flatten()
    request = row_request[used]
    position = row_position[used].to(torch.int64)
    keys = seed[request]
    draw = row_draw[used].to(torch.int64)
    token = pick_tokens(keys, position, draw, tables)
    passing, right, chosen, level = outcomes(keys, token, position, tables)
    in_order = resume[request] == Phase.SERIAL
    right = right & in_order & (draw > 0)
    token = torch.where(right, pick_tokens(keys, position, 0 * draw, tables), token)
    threshold = slot_threshold[request]
    certainty = torch.where(chosen, 1.0, threshold * level)
    is_first = (position % slot_size[request] == 0) & ~in_order
    picked[used] = token.to(torch.int32)
    picked_prob[used] = torch.where(is_first, certainty, passing)
    given = row_given[used].to(torch.int64)
    given_at = row_given_at[used].to(torch.int64)
    _, passes, _, _ = outcomes(keys, given.clamp_min(0), given_at, tables)
    given_prob[used] = (passes & (given >= 0)).to(torch.float32)


def replayed_rows_twin(
    state: DecodeState,
    row_request: torch.Tensor,
    canvas_row: torch.Tensor,
    row_draw: torch.Tensor,
    replayed: torch.Tensor,
) -> None:
    """What ``acceptance_stats`` is asked about canvas rows.

    The draw of a serial draft says where its chain began: made anew, it is right or wrong anew.

    Args:
        row_request: [N] int64. canvas_row: [N] int32, of its canvas. row_draw: [>= N] int32.
        replayed: [2, >= N] int32, out: where the token after the row stands, and its draw.
    """
    rows = len(row_request)
    behind = canvas_row - state.row_own_start[row_request, canvas_row]
    lead = 1 - state.ints[:, Field.SKIPS_KNOWN]
    is_draft = (state.ints[:, Field.RESUME] == Phase.SERIAL)[row_request]
    is_draft &= (behind >= lead[row_request]) & (
        state.canvas_token[row_request, canvas_row] == state.mask_token_id
    )
    target = state.row_target[row_request, canvas_row]
    replayed[0, :rows] = state.row_position[row_request, canvas_row] + 1
    replayed[1, :rows] = torch.where(is_draft, target - behind + 1, row_draw[:rows])


def pick_tokens(
    seed: torch.Tensor, position: torch.Tensor, draw: torch.Tensor, tables: AcceptanceTables
) -> torch.Tensor:
    """[N] int64 tokens that draws propose at positions; all arguments [N] int64."""
    zero = torch.zeros_like(position)
    word = philox_4x32((zero, position, draw, zero + PICK), _key(seed))[0]
    low, high = tables.excluded
    ordinary = tables.vocab - (low < tables.vocab) - (high < tables.vocab)
    token = word % ordinary
    token = token + (token >= low)
    return token + (token >= high)


def outcomes(
    seed: torch.Tensor, token: torch.Tensor, position: torch.Tensor, tables: AcceptanceTables
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What becomes of tokens at positions; all arguments [N] int64.

    Returns:
        probability that the token passes [N] float32; whether it does [N] bool; whether its slot
        is chosen if it is a slot's first [N] bool; a uniform number [N] float32.
    """
    zero = torch.zeros_like(position)
    words = philox_4x32((token, position, zero, zero + OUTCOME), _key(seed))
    profile = ((seed >> 32) & _WORD).clamp_max(len(tables.slot_chance) - 1)
    probability = tables.quantiles[profile, words[0] >> (32 - QUANTILE_BITS)]
    passes = _uniform(words[1]) < probability
    first, other = tables.first_chance[profile], tables.slot_chance[profile]
    chosen = _uniform(words[2]) < torch.where(position == 0, first, other)
    return probability, passes, chosen, _uniform(words[3])


def _key(seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return seed & _WORD, (seed >> 32) & _WORD


def _uniform(word: torch.Tensor) -> torch.Tensor:
    return (word >> 8).to(torch.float32) * 2.0**-24
