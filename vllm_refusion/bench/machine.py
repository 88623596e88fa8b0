"""The GPU's bf16 matrix rate, for the arithmetic bound of a step; run in a process of its own.

Usage: python -P -m vllm_refusion.bench.machine

Prints a number in TFLOP/s, or ``null`` without a GPU.
"""

from __future__ import annotations

import json

import torch

SIZE = 8192
REPEATS = 20


def bf16_tflops() -> float | None:
    """Rate of an 8192 x 8192 x 8192 product of random bf16 matrices, a mean after warming up."""
    if not torch.cuda.is_available():
        return None
    left, right = torch.randn(2, SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        left @ right
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPEATS):
        left @ right
    end.record()
    torch.cuda.synchronize()
    return 2 * SIZE**3 * REPEATS / begin.elapsed_time(end) / 1e9


if __name__ == "__main__":
    print(json.dumps(bf16_tflops()))
