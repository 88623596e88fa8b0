"""Penalties and bad words: worked by hand, and the kernel against its twin."""

from __future__ import annotations

import random

import pytest
import torch
from device import DEVICE
from kernel_inputs import random_logits

from vllm_refusion.decoding.penalties import Penalties
from vllm_refusion.decoding.state import DecodeState, Field
from vllm_refusion.triton_kernels import penalties as kernel_module
from vllm_refusion.triton_kernels.penalties import apply_penalties
from vllm_refusion.triton_kernels.penalties_twin import apply_penalties_twin

IMPLEMENTATIONS = pytest.mark.parametrize(
    "apply", [apply_penalties, apply_penalties_twin], ids=["kernel", "twin"]
)
CANVAS, MASK = 8, 31


def state_of(responses: list[list[int]], canvases: list[list[int]]) -> DecodeState:
    """Serial requests; a mask of a canvas belongs to the chain behind all drafts before it."""
    state = DecodeState(len(responses), CANVAS, 40, MASK, "cpu")
    for req, (response, canvas) in enumerate(zip(responses, canvases, strict=True)):
        state.ints[req, Field.EMITTED] = len(response)
        state.response[req, : len(response)] = torch.tensor(response, dtype=torch.int32)
        state.canvas_token[req, : len(canvas)] = torch.tensor(canvas)
        for row, token in enumerate(canvas):
            if token == MASK:
                state.row_run_end[req, row] = sum(t != MASK for t in canvas[:row])
    return to_device(state)


def to_device(state: DecodeState) -> DecodeState:
    moved = DecodeState(state.max_requests, CANVAS, 40, MASK, DEVICE)
    for name in ("ints", "history", "by_row", "canvas_token"):
        getattr(moved, name).copy_(getattr(state, name))
    return moved


def rows_of(requests: list[int], rows: list[int], positions: list[int]) -> tuple:
    return (
        torch.tensor(requests, device=DEVICE),
        torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        torch.tensor(positions, dtype=torch.int32, device=DEVICE),
    )


@IMPLEMENTATIONS
def test_by_hand(apply):
    state = state_of([[4, 4], [4, 4], [3]], [[4, 5, 6, MASK], [4], [3, MASK]])
    penalties = Penalties(3, 32, DEVICE)
    bias = torch.zeros(32)
    bias[7] = -8.0
    words = ([4, 5], [9, 4, 10], [5, 6, 11], [6, 12], [4, 4, 4, 13], [4, 4, 8])
    factors = {"repetition": 2.0, "frequency": 0.5, "presence": 0.25}
    penalties.add(0, [1, 2, 4], [4, 4], **factors, bad_words=words, bias=bias)
    penalties.add(2, [1], [], presence=1.0)
    penalties.count(
        torch.tensor([1, 2, 0], device=DEVICE),
        torch.tensor([[4, 4], [3, 9], [4, 4]], dtype=torch.int32, device=DEVICE),
        torch.tensor([2, 1, 0], dtype=torch.int32, device=DEVICE),
    )
    logits = torch.full((7, 32), 6.0, device=DEVICE)
    # three tokens and a mask of the first request, an unused row, requests with nothing and little
    rows = rows_of([0, 0, 0, 0, 10**6, 1, 2], [0, 1, 2, 3, 0, 0, 1], [2, 3, 4, 4, -1, 2, 1])
    apply(logits, *rows, state, penalties)

    expected = torch.full((7, 32), 6.0)
    expected[:4, [1, 2]] = 3.0  # of the prompt
    expected[:4, 4] = 6 / 2 - 2 * 0.5 - 0.25
    expected[1:4, 5] = expected[2:4, 6] = 6 / 2 - 0.5 - 0.25  # drafts that the row sees
    expected[:4, 7] = -2.0  # bias first; not said
    expected[0, [5, 8]] = expected[2:4, [11, 12]] = -torch.inf
    expected[6, 3] = 5.0
    assert torch.equal(logits.cpu(), expected)

    penalties.remove(0)
    penalties.remove(2)
    assert penalties.used is None and not penalties.index.any()


@pytest.mark.parametrize("vocab", [33, 100, 5003])
def test_kernel_equals_twin(vocab, monkeypatch):
    monkeypatch.setattr(kernel_module, "CPU_TILE", 1024)
    rng = random.Random(vocab)
    words = [token for token in range(vocab) if token != MASK]
    few = words[:4]  # so that bad words come up

    def some(least: int, most: int, of=words) -> list[int]:
        return rng.choices(of, k=rng.randint(least, most))

    responses = [some(0, 30, few) for _ in range(9)]
    canvases = [[*(r[-1:] or [0]), *some(0, 4, few), MASK, MASK] for r in responses]
    state = state_of(responses, canvases)
    penalties = Penalties(9, vocab, DEVICE)
    for req in range(9):
        if req % 3:
            penalties.add(
                req,
                some(1, 60),
                responses[req],
                repetition=rng.choice([1.0, 0.7, 1.3]),
                frequency=rng.uniform(-2, 2),
                presence=rng.choice([0.0, 1.5]),
                bad_words=[some(2, 5, few) for _ in range(rng.choice([0, 128]))],
                bias=torch.randn(vocab) if req % 2 else None,
            )
    rows = [(req, row, row) for req, canvas in enumerate(canvases) for row in range(len(canvas))]
    rows = rows_of(*map(list, zip(*rows)))
    kernel = random_logits(len(rows[0]), vocab)
    twin, before = kernel.clone(), kernel.clone()
    apply_penalties(kernel, *rows, state, penalties)
    apply_penalties_twin(twin, *rows, state, penalties)
    torch.testing.assert_close(kernel, twin, rtol=1e-6, atol=1e-5)
    assert (kernel.isinf() == twin.isinf()).all() and twin.isinf().any()
    plain = rows[0] % 3 == 0
    assert torch.equal(kernel[plain], before[plain])
