"""Inputs that tests of several kernels share."""

from __future__ import annotations

import torch
from device import DEVICE


def random_logits(
    count: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(count, vocab, generator=generator)).to(dtype).to(DEVICE)
