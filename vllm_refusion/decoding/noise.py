"""Gumbel noise as a pure function of (seed, draw, position, token): no generator state anywhere.

    r     = word 0 of Philox-4x32-10 with key (seed low, seed high)
                                     and counter (token, position, draw, 0)
    u     = min(((r >> 8) + 0.5) * 2**-24, 1 - 2**-24)
    noise = -log(-log(u))                                              all in float32

argmax(logits / T + noise) then is a sample of softmax(logits / T). Since no state is carried, the
noise of a token does not depend on what else is in the batch, on the order of passes, or on
preemption. `triton_kernels/token_stats.py` computes the same words on the device.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_PIECE_ELEMENTS = 2**18

# Above 2**23 the addition of 0.5 rounds to an even integer, so that the largest word would give
# u = 1 and infinite noise: once in 2**24 tokens, i.e. about once in 128 rows of a vocabulary of
# 128k, a token would be picked whatever its logit. The largest float32 below 1 is used instead.
LARGEST_UNIFORM = 1.0 - 2.0**-24
# -log(-log(LARGEST_UNIFORM)) is 16.6355; rounded up so that no implementation's log exceeds it.
NOISE_BOUND = 16.7


def philox_4x32(counter: tuple, key: tuple) -> tuple[torch.Tensor, ...]:
    """Philox-4x32 with 10 rounds (Salmon et al., SC 2011).

    Args:
        counter: four int64 tensors of broadcastable shapes, values in [0, 2**32).
        key: two int64 tensors (or ints), broadcastable likewise, values in [0, 2**32).

    Returns:
        The four output words, int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps all bits of the unsigned product; the sign
        # that the shift drags in is cut off by the word mask
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) & _WORD) ^ c1 ^ k0, ((product0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def gumbel_noise(
    seed: int | torch.Tensor, draw: int | torch.Tensor, positions: torch.Tensor, vocab: int
) -> torch.Tensor:
    """Standard Gumbel noise of every token at some response positions.

    Args:
        seed: 64-bit seed, of all rows or [N] int64; a negative one stands for its two's complement.
        draw: how many plan and predict operations the request has made before, or [N] integers.
        positions: [N] integers, response positions, not negative.
        vocab: number of tokens V.

    Returns:
        [N, V] float32 on the device of ``positions``, every value finite.
    """
    count, device = len(positions), positions.device
    token = torch.arange(vocab, device=device)[None, :]
    position = positions.to(torch.int64)[:, None]
    seed_rows = _as_rows(seed, count, device)
    key_low, key_high = seed_rows & _WORD, (seed_rows >> 32) & _WORD
    draw_rows = _as_rows(draw, count, device)
    noise = torch.empty((count, vocab), dtype=torch.float32, device=device)
    # a CPU is several times faster on pieces whose int64 temporaries stay in its cache
    piece = max(1, _PIECE_ELEMENTS // max(1, vocab))
    for start in range(0, count, piece):
        rows = slice(start, start + piece)
        counter = (token, position[rows], draw_rows[rows], torch.zeros_like(position[rows]))
        word = philox_4x32(counter, (key_low[rows], key_high[rows]))[0]
        uniform = ((word >> 8).to(torch.float32) + 0.5) * 2.0**-24
        noise[rows] = uniform.clamp_(max=LARGEST_UNIFORM).log_().neg_().log_().neg_()
    return noise


def _as_rows(value: int | torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    """An integer or [N] integers as an int64 column [N, 1]."""
    if not isinstance(value, torch.Tensor):
        # a seed in [2**63, 2**64) has the bits of a negative int64
        signed = (value + 2**63) % 2**64 - 2**63
        value = torch.full((count,), signed, dtype=torch.int64)
    return value.to(device=device, dtype=torch.int64)[:, None]
