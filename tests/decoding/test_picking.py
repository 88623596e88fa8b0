"""Limits on what is picked: the kernel against its twin, and both against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from device import DEVICE
from kernel_inputs import random_logits

from vllm_refusion.decoding.noise import gumbel_noise
from vllm_refusion.decoding.picking import PickLimits, bias_row, lowest_kept_score
from vllm_refusion.triton_kernels import token_stats as kernel_module
from vllm_refusion.triton_kernels.token_stats import token_stats
from vllm_refusion.triton_kernels.token_stats_twin import token_stats_twin

IMPLEMENTATIONS = pytest.mark.parametrize(
    "stats", [token_stats, token_stats_twin], ids=["kernel", "twin"]
)
# Cuts of the requests, one request each: top_k, top_p, min_p.
CUTS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (5, 1.0, 0.0),
    (10**6, 1.0, 0.0),
    (0, 1e-9, 0.0),
    (0, 0.7, 0.0),
    (0, 1 - 2**-24, 0.0),
    (0, 1.0, 1.0),
    (0, 1.0, 0.03),
    (20, 0.9, 0.01),
    (3, 0.5, 0.9),
]


def kept_by_definition(scores, top_k, top_p, min_p):
    """The tokens kept of a row of finite scores (a list), token by token in float64."""
    kept = {t for t, s in enumerate(scores) if s >= max(scores) + math.log(min_p or 1e-300)}
    if top_k:
        kth = sorted((scores[t] for t in kept), reverse=True)[:top_k][-1]
        kept = {t for t in kept if scores[t] >= kth}
    total = sum(math.exp(scores[t] - max(scores)) for t in kept)

    def above(t):
        return sum(math.exp(scores[u] - max(scores)) for u in kept if scores[u] > scores[t])

    return {t for t in kept if top_p == 1 or above(t) < top_p * total}


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 40])
def test_lowest_kept_score(cuts, vocab):
    scores = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    scores[0, vocab // 2 :] = scores[0, : vocab - vocab // 2].clone()  # every score twice
    rows = [torch.tensor([value]) for value in (cuts[0], cuts[1], cuts[2])]
    lowest = lowest_kept_score(scores, rows[0], rows[1], rows[2].log())
    kept = set((scores[0] >= lowest).nonzero().flatten().tolist())
    assert kept == kept_by_definition(scores[0].tolist(), *cuts)


def test_the_cuts_are_vllms():
    """Where no scores are equal; of equal ones vLLM keeps some, by their order in a sort."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    scores = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 3
    top_k, top_p = torch.arange(1, 51), torch.linspace(0.05, 0.99, 50)
    lowest = lowest_kept_score(scores, top_k, top_p, torch.full((50,), -math.inf))
    theirs = apply_top_k_top_p_pytorch(scores.clone(), top_k, top_p) > -math.inf
    assert torch.equal(scores >= lowest[:, None], theirs)


def limits_of(vocab: int, cuts=CUTS, biases=()) -> PickLimits:
    limits = PickLimits(len(cuts), vocab, DEVICE)
    biases = [*biases, *[None] * (len(cuts) - len(biases))]
    for slot, ((top_k, top_p, min_p), bias) in enumerate(zip(cuts, biases, strict=True)):
        limits.add(slot, top_k=top_k, top_p=top_p, min_p=min_p, bias=bias)
    return limits


def requests_state(count: int, **changes) -> dict:
    state = {
        "temperature": torch.full((count,), 0.8),
        "seed": torch.arange(count),
        "min_tokens": torch.zeros(count, dtype=torch.int32),
        "stop_ids": torch.full((count, 2), -1, dtype=torch.int32),
    } | changes
    return {name: tensor.to(DEVICE) for name, tensor in state.items()}


def rows_of(requests: list[int], per_request: int) -> tuple:
    """``per_request`` rows of each request, at the positions 0, 1, ..; the last row is unused.

    Request r is at its r-th draw.
    """
    request = torch.tensor(requests).repeat_interleave(per_request)
    position = torch.arange(per_request, dtype=torch.int32).repeat(len(requests))
    request[-1], position[-1] = 10**9, -1
    given = torch.full_like(position, -1)
    return tuple(rows.to(DEVICE) for rows in (request, position, given, request.int()))


def biases_of(vocab: int) -> list:
    """Of the first requests: none, some, and only a few tokens allowed."""
    every_third = range(0, vocab, 3)
    return [
        None,
        bias_row(vocab, {0: 3.5, vocab - 1: -100.0}),
        None,
        bias_row(vocab, allowed_token_ids=every_third),
        bias_row(vocab, {vocab // 2: 2.0}, every_third, [0]),
        bias_row(vocab, banned_token_ids=list(every_third)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [5, 33, 1000])
@pytest.mark.parametrize("kind", ["cuts", "biases", "both"])
def test_kernel_equals_twin(vocab, dtype, kind, monkeypatch):
    monkeypatch.setattr(kernel_module, "CPU_TILE", 512)
    monkeypatch.setattr(kernel_module, "GPU_TILE", 512)
    requests = range(len(CUTS))
    none = [(0, 1.0, 0.0)] * len(CUTS)
    limits = limits_of(
        vocab, none if kind == "biases" else CUTS, () if kind == "cuts" else biases_of(vocab)
    )
    state = requests_state(len(CUTS), min_tokens=torch.tensor([0, 2] * 5 + [0], dtype=torch.int32))
    state["stop_ids"][:, 1] = vocab - 2
    state["temperature"][2::4] = 0.0
    rows = rows_of(list(requests), 3)
    logits = random_logits(len(rows[0]), vocab, dtype, seed=vocab)
    options = state | {"mask_token_id": 1, "limits": limits}
    actual = token_stats(logits, *rows, **options)
    expected = token_stats_twin(logits, *rows, **options)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])
    # the limits have no say in a token's probability
    exact = logits[:-1].float().softmax(1).gather(1, expected[0][:-1, None].long())[:, 0]
    torch.testing.assert_close(expected[1][:-1], exact)


@IMPLEMENTATIONS
def test_limits_of_others_change_nothing(stats):
    """Bit for bit: a request without limits, and one with limits that keep everything."""
    logits = random_logits(20, 257, seed=257)
    rows = rows_of([0, 3], 10)
    state = requests_state(len(CUTS))
    without = stats(logits, *rows, **state, mask_token_id=1)
    limits = limits_of(257, biases=[None, bias_row(257, {5: 1.0})])
    for a, b in zip(without, stats(logits, *rows, **state, mask_token_id=1, limits=limits)):
        assert torch.equal(a, b)


@IMPLEMENTATIONS
@pytest.mark.parametrize("temperature", [0.0, 1.5], ids=["greedy", "sampled"])
def test_forbidden_tokens_are_never_picked(stats, temperature):
    vocab, allowed = 100, [7, 30, 31, 98]
    bias = bias_row(vocab, {3: 100.0, 30: -5.0}, allowed, banned_token_ids=[7])
    limits = limits_of(vocab, [(0, 1.0, 0.0)], [bias])
    state = requests_state(1, temperature=torch.tensor([temperature]))
    rows = rows_of([0], 200)
    logits = random_logits(200, vocab, seed=vocab)
    picked = stats(logits, *rows, **state, mask_token_id=31, limits=limits)[0]
    assert set(picked[:-1].tolist()) == {30, 98}


@IMPLEMENTATIONS
def test_a_pick_is_the_best_perturbed_score_of_those_kept(stats):
    vocab = 60
    logits = random_logits(40, vocab, seed=vocab)
    rows = rows_of(list(range(len(CUTS) - 1)), 4)
    bias = bias_row(vocab, {2: 1.5, 9: -2.0})
    limits = limits_of(vocab, biases=[bias] * len(CUTS))
    picked = stats(logits, *rows, **requests_state(len(CUTS)), mask_token_id=0, limits=limits)[0]
    for row in range(39):
        request, position = row // 4, row % 4
        scores = (logits[row] + bias.to(DEVICE)) / 0.8
        scores = scores[1:].tolist()  # the mask token is token 0
        kept = kept_by_definition(scores, *CUTS[request])
        where = torch.tensor([position], device=DEVICE)
        noise = gumbel_noise(request, request, where, vocab)[0].tolist()
        best = max(kept, key=lambda t: scores[t] + noise[t + 1])
        assert picked[row] == best + 1, (row, CUTS[request])


def test_rows_of_biases_are_reused():
    limits = PickLimits(8, 10, "cpu")
    assert limits.used is None
    for slot in range(5):
        limits.add(slot, bias=torch.full((10,), float(slot + 1)))
    assert limits.used is limits and limits.biased and not limits.cuts
    size = len(limits.bias)
    for slot in range(5):
        assert limits.bias[limits.bias_index[slot]].tolist() == [slot + 1.0] * 10
    limits.remove(2)
    limits.add(6, bias=torch.full((10,), 9.0), top_k=3)
    assert len(limits.bias) == size and limits.cuts
    assert limits.bias_index[2] == 0 and not limits.bias[0].any()
    assert limits.bias[limits.bias_index[6]].tolist() == [9.0] * 10
    for slot in range(8):
        limits.remove(slot)
    assert limits.used is None and not limits.bias_index.any() and not limits.top_k.any()
