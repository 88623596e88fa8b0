"""PyTorch twin of the token statistics: float32, vectorised over rows, no Triton.

It is the oracle of the kernel's tests, and what a CPU-only install runs for small models.
"""

from __future__ import annotations

import torch

from vllm_refusion.decoding.noise import gumbel_noise
from vllm_refusion.decoding.picking import PickLimits, lowest_kept_score

Stats = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Value of an allowed token whose logit is -inf or NaN: below any finite one, above a token that
# is not allowed (-inf).
FLOOR = torch.finfo(torch.float32).min


def allocate_stats(logits: torch.Tensor) -> Stats:
    """Zeroed picked [N] int32, picked_prob and given_prob [N] float32 for [N, V] logits."""
    rows = len(logits)
    return (
        torch.zeros(rows, dtype=torch.int32, device=logits.device),
        torch.zeros(rows, dtype=torch.float32, device=logits.device),
        torch.zeros(rows, dtype=torch.float32, device=logits.device),
    )


def token_stats_twin(
    logits: torch.Tensor,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    row_given: torch.Tensor,
    row_draw: torch.Tensor,
    *,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    min_tokens: torch.Tensor,
    stop_ids: torch.Tensor,
    mask_token_id: int,
    limits: PickLimits | None = None,
    out: Stats | None = None,
) -> Stats:
    """The statistics of `token_stats.token_stats`: same arguments, same results.

    A row's results depend on that row alone. Reads back which rows are used and which are
    sampled, so on a GPU it waits for the device.
    """
    picked, picked_prob, given_prob = allocate_stats(logits) if out is None else out
    used = (row_position[: len(logits)] >= 0).nonzero().flatten()
    request, position, draw = row_request[used], row_position[used], row_draw[used]
    raw = logits[used].to(torch.float32)  # [n, V]
    vocab = raw.shape[1]

    value, forbidden = raw.clone(), torch.zeros_like(raw, dtype=torch.bool)
    if 0 <= mask_token_id < vocab:
        forbidden[:, mask_token_id] = True
    early = (position < min_tokens[request]).nonzero().flatten()
    banned = stop_ids[request[early]]  # [e, F]
    entry, column = ((banned >= 0) & (banned < vocab)).nonzero(as_tuple=True)
    forbidden[early[entry], banned[entry, column].to(torch.int64)] = True
    if limits is not None:
        bias = limits.bias[limits.bias_index[request].to(torch.int64)]  # [n, V]
        value += bias
        forbidden |= bias == -torch.inf
    sampled = (temperature[request] > 0).nonzero().flatten()
    if len(sampled):
        of = request[sampled]
        score = value[sampled] / temperature[of, None]
        if limits is not None and limits.cuts:
            score = torch.where(score > FLOOR, score, FLOOR).clamp(max=-FLOOR)
            allowed = score.masked_fill(forbidden[sampled], -torch.inf)
            cuts = (limits.top_k[of], limits.top_p[of], limits.log_min_p[of])
            forbidden[sampled] |= score < lowest_kept_score(allowed, *cuts)[:, None]
        value[sampled] = score + gumbel_noise(seed[of], draw[sampled], position[sampled], vocab)
    value = torch.where(value > FLOOR, value, FLOOR).masked_fill(forbidden, -torch.inf)
    # torch.argmax returns the first of equal maxima
    pick = value.argmax(dim=1)

    given = row_given[used].to(torch.int64)
    probability = torch.softmax(raw, dim=1)
    picked[used] = pick.to(torch.int32)
    picked_prob[used] = probability.gather(1, pick[:, None])[:, 0]
    of_given = probability.gather(1, given.clamp(0, vocab - 1)[:, None])[:, 0]
    given_prob[used] = torch.where((given >= 0) & (given < vocab), of_given, 0.0)
    return picked, picked_prob, given_prob
