"""Which tokens a request may pick as drafts and proposals, beyond the mask token and min_tokens.

For a row of logits x of a request, the score of a token and the lowest score that may be picked:

    s[t]    = (x[t] + bias[t]) / T          a bias of -inf forbids the token; at T = 0, s = x + bias
    min_p   keeps  s >= max s + log(min_p)
    top_k   keeps  s >= the k-th largest s
    top_p   keeps  s >= the largest c with  mass{s >= c} >= top_p,  mass: the softmax over what
            min_p and top_k keep

Tokens of equal score are kept or left out together. The token picked is the largest s + noise among
those kept. Certainties and verification use neither bias nor cuts: they stay those of softmax(x).
At T = 0 the cuts change nothing, since the largest score is always kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from vllm_refusion.decoding.sending import sent


def lowest_kept_score(
    scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, log_min_p: torch.Tensor
) -> torch.Tensor:
    """The lowest score that min_p, then top_k, then top_p keep, of each row.

    Args:
        scores: [N, V] float32, no NaN; -inf for tokens that are not allowed, at least one is.
        top_k: [N] integers, 0 for all tokens.
        top_p: [N] float32, 1 for all tokens.
        log_min_p: [N] float32, -inf for all tokens.

    Returns:
        [N] float32.
    """
    vocab = scores.shape[1]
    ordered = scores.sort(dim=1, descending=True).values
    lowest = ordered[:, 0] + log_min_p
    last = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).to(torch.int64) - 1
    lowest = torch.maximum(lowest, ordered.gather(1, last[:, None])[:, 0])
    kept = torch.where(ordered >= lowest[:, None], ordered, -torch.inf)
    mass = kept.softmax(1).cumsum(1)
    first = (mass < top_p[:, None]).sum(1).clamp(max=vocab - 1)
    at_mass = torch.maximum(lowest, ordered.gather(1, first[:, None])[:, 0])
    return torch.where(top_p < 1, at_mass, lowest)


def bias_row(
    vocab: int,
    logit_bias: Mapping[int, float] | None = None,
    allowed_token_ids: Collection[int] | None = None,
    banned_token_ids: Collection[int] = (),
) -> torch.Tensor | None:
    """What is added to a row of logits, [V] float32 on the CPU; None for nothing."""
    if not logit_bias and not allowed_token_ids and not banned_token_ids:
        return None
    row = torch.full((vocab,), -math.inf if allowed_token_ids else 0.0)
    if allowed_token_ids:
        row[list(allowed_token_ids)] = 0.0
    for token, bias in (logit_bias or {}).items():
        row[token] += bias
    row[list(banned_token_ids)] = -math.inf
    return row


@dataclass(frozen=True)
class Processing:
    """A request's scores as its picks compare them, without noise; what they leave out is -inf.

    Attributes:
        mask_token_id: never picked. stop_ids: not picked below ``min_tokens``.
        bias: [V], as ``bias_row`` returns it, on the logits' device; None for none.
        temperature: 0 leaves scores as they are, uncut. top_k, top_p, min_p: 0, 1 and 0 for none.
    """

    mask_token_id: int
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    bias: torch.Tensor | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __call__(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scores [n, V] of logits [n, V], float32, that pick for ``positions`` [n]."""
        scores = logits.clone() if self.bias is None else logits + self.bias
        if self.mask_token_id < scores.shape[1]:
            scores[:, self.mask_token_id] = -torch.inf
        for token in self.stop_ids:
            held_back = positions < self.min_tokens
            scores[:, token] = torch.where(held_back, -torch.inf, scores[:, token])
        if self.temperature == 0:
            return scores
        scores /= self.temperature
        cuts = (
            torch.full_like(scores[:, 0], cut)
            for cut in (self.top_k, self.top_p, _float32_log(self.min_p))
        )
        lowest = lowest_kept_score(scores, *cuts)
        return scores.masked_fill(scores < lowest[:, None], -torch.inf)


class PickLimits:
    """The limits of up to ``max_requests`` requests, indexed by request slot.

    Attributes (device tensors; R = max_requests, B = biased requests at once so far, V = vocab):
        top_k: [R] int32, 0 for none. top_p: [R] float32, 1 for none.
        log_min_p: [R] float32, -inf for none.
        bias_index: [R] int32, the request's row of ``bias``.
        bias: [1 + B, V] float32; row 0 holds zeros, for requests without a bias. Grows when a
            request with a bias finds no row free.
    """

    def __init__(self, max_requests: int, vocab: int, device: torch.device | str) -> None:
        self.vocab, self.device = vocab, torch.device(device)

        def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((max_requests,), value, dtype=dtype, device=self.device)

        self.top_k = full(0, torch.int32)
        self.top_p = full(1.0)
        self.log_min_p = full(-math.inf)
        self.bias_index = full(0, torch.int32)
        self.bias = torch.zeros(1, vocab, device=self.device)
        self._cut: set[int] = set()
        self._bias_row_of: dict[int, int] = {}

    @property
    def cuts(self) -> bool:
        """Whether any request has a top_k, top_p or min_p."""
        return bool(self._cut)

    @property
    def biased(self) -> bool:
        """Whether any request has a bias."""
        return bool(self._bias_row_of)

    @property
    def used(self) -> PickLimits | None:
        """These limits, or None while no request has any: then nothing has to be read."""
        return self if self.cuts or self.biased else None

    def add(
        self,
        slot: int,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Sets the limits of the request that starts in ``slot``, which has none before.

        Args:
            bias: as ``bias_row`` returns it.
        """
        if 0 < top_k < self.vocab or top_p < 1 or min_p > 0:
            self._cut.add(slot)
            self.top_k[slot].fill_(top_k if 0 < top_k < self.vocab else 0)
            self.top_p[slot].fill_(top_p)
            self.log_min_p[slot].fill_(_float32_log(min_p))
        if bias is not None:
            taken = set(self._bias_row_of.values())
            row = next(r for r in range(1, len(self.bias) + 1) if r not in taken)
            if row == len(self.bias):  # doubled, so that growing is rare
                self.bias = torch.cat([self.bias, self.bias.new_zeros(row, self.vocab)])
            self._bias_row_of[slot] = row
            self.bias[row] = sent(bias, self.device)
            self.bias_index[slot].fill_(row)

    def remove(self, slot: int) -> None:
        """Ends the limits of the request in ``slot``, if it has any."""
        if slot in self._cut:
            self._cut.remove(slot)
            self.top_k[slot].fill_(0)
            self.top_p[slot].fill_(1.0)
            self.log_min_p[slot].fill_(-math.inf)
        if self._bias_row_of.pop(slot, None) is not None:
            self.bias_index[slot].fill_(0)


def _float32_log(value: float) -> float:
    """The logarithm that every implementation uses, so that they agree to the last bit."""
    return torch.tensor(value, dtype=torch.float32).log().item()
