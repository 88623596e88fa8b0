"""Drawn acceptance: the kernel against its twin, and the promises made about the outcomes."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from device import DEVICE
from fuzzed_states import FUZZED, POISON, Fuzz
from twins import same

from vllm_refusion.decoding.state import Field, Phase
from vllm_refusion.engine.acceptance import (
    CONFIG_KEY,
    Profile,
    acceptance_tables,
    build_tables,
    seed_of,
    to_config,
)
from vllm_refusion.engine.settings import BENCHMARK_ENV
from vllm_refusion.triton_kernels.acceptance import acceptance_stats, replayed_rows
from vllm_refusion.triton_kernels.acceptance_twin import acceptance_stats_twin, replayed_rows_twin

IMPLEMENTATIONS = pytest.mark.parametrize(
    "stats", [acceptance_stats, acceptance_stats_twin], ids=["kernel", "twin"]
)
PROFILES = [Profile(0.3, 0.7), Profile(0.9, 0.4, shape=2.0, first=0.2)]
REQUESTS = 5
VOCAB, MASK, EOS = 1003, 400, 7
MODES = torch.tensor([Phase.START, Phase.SERIAL], dtype=torch.int32)


def per_request() -> dict:
    strided = torch.zeros(REQUESTS, 3, dtype=torch.int32)
    strided[:, 1] = torch.tensor([32, 8, 4, 1, 3])
    state = {
        "seed": torch.tensor([seed_of(0, 3), seed_of(1, 3), -5, seed_of(0, 2**32 - 1), 0]),
        "slot_size": strided.to(DEVICE)[:, 1],
        "slot_threshold": torch.tensor([0.9, 0.5, 0.0, 0.9, 0.99]),
        "resume": MODES[[0, 1, 0, 0, 1]],
    }
    return {name: tensor.to(DEVICE) for name, tensor in state.items()}


def one_request(profile_index: int, slot_size: int, serial: bool = False) -> dict:
    return {
        "seed": torch.tensor([seed_of(profile_index, 1)], device=DEVICE),
        "slot_size": torch.tensor([slot_size], dtype=torch.int32, device=DEVICE),
        "slot_threshold": torch.tensor([0.8], device=DEVICE),
        "resume": MODES[[int(serial)]].to(DEVICE),
    }


def random_rows(count: int, used: bool = True) -> list[torch.Tensor]:
    """Rows of all requests; unless all are ``used`` every seventh points at no request."""
    generator = torch.Generator().manual_seed(count)

    def integers(low: int, high: int, dtype=torch.int32) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator, dtype=dtype)

    rows = [integers(0, REQUESTS, torch.int64), integers(0, 600) * integers(0, 5).clamp_max(1)]
    rows += [integers(-1, VOCAB), integers(0, 600), integers(0, 50)]
    if not used:
        rows[0][::7], rows[1][::7] = 10**9, -1
    return [row.to(DEVICE) for row in rows]


def run(stats, rows, vocab=VOCAB, excluded=(MASK, EOS), profiles=PROFILES, state=None):
    count = len(rows[0])
    out = (
        torch.full((count,), -7, dtype=torch.int32, device=DEVICE),
        torch.full((count,), float("nan"), device=DEVICE),
        torch.full((count,), float("nan"), device=DEVICE),
    )
    tables = build_tables(profiles, vocab, excluded, DEVICE)
    stats(*rows, **(state or per_request()), tables=tables, out=out)
    return out


@pytest.mark.parametrize("count", [1, 129, 700])
@pytest.mark.parametrize("excluded", [(MASK, EOS), (EOS, None), (None, None), (VOCAB - 1, 0)])
def test_kernel_equals_twin_bit_for_bit(count, excluded):
    rows = random_rows(count, used=False)
    actual = run(acceptance_stats, rows, excluded=excluded)
    expected = run(acceptance_stats_twin, rows, excluded=excluded)
    used = rows[1] >= 0
    for ours, twins in zip(actual, expected, strict=True):
        assert torch.equal(ours[used], twins[used]) and not ours[used].isnan().any()
        rest = torch.cat([ours[~used], twins[~used]])
        assert (rest.isnan() | (rest == -7)).all()


def test_rows_are_replayed_as_by_the_twin():
    rng = random.Random(0)
    drafts = 0
    for _ in range(20):
        fuzz = Fuzz(rng, FUZZED, 48)
        state, rows = fuzz.state, rng.randint(1, 300)
        state.ints[::2, Field.RESUME] = int(Phase.SERIAL)
        state.ints[:, Field.SKIPS_KNOWN] %= 2
        state.row_own_start.remainder_(48)
        state.canvas_token[torch.rand(state.canvas_token.shape) < 0.5] = state.mask_token_id
        request = torch.tensor([rng.choice(fuzz.idx_mapping.tolist()) for _ in range(rows)])
        row = torch.tensor([rng.randrange(48) for _ in range(rows)], dtype=torch.int32)
        draw = torch.full((rows + rng.randint(0, 2),), -7, dtype=torch.int32)
        out = torch.full((2, rows + rng.randint(0, 2)), POISON, dtype=torch.int32)
        same(replayed_rows_twin, replayed_rows)(state, request, row, draw, out)
        drafts += int((out[1, :rows] != -7).sum())
    assert drafts


@IMPLEMENTATIONS
def test_results_do_not_depend_on_the_chunk_of_rows(stats):
    rows = random_rows(300)
    whole = run(stats, rows)
    for start, end in ((0, 1), (1, 130), (130, 300)):
        part = run(stats, [row[start:end].clone() for row in rows])
        assert all(torch.equal(a[start:end], b) for a, b in zip(whole, part, strict=True))


@IMPLEMENTATIONS
@pytest.mark.parametrize("vocab", [3, 4, 97])
def test_only_ordinary_tokens_are_picked_and_all_of_them(stats, vocab):
    picked = run(stats, random_rows(2000), vocab, excluded=(1, vocab - 1))[0]
    assert set(picked.tolist()) == set(range(vocab)) - {1, vocab - 1}


@IMPLEMENTATIONS
def test_asking_anywhere_gives_the_same_outcome(stats):
    """given_prob is a function of the given token, its position and the seed alone."""
    request, position, given, given_at, draw = random_rows(400)
    first = run(stats, [request, position, given, given_at, draw])[2]
    other = run(stats, [request, position + 3, given, given_at, draw + 17])[2]
    assert torch.equal(first, other) and set(first.tolist()) == {0.0, 1.0}
    assert not first[given < 0].any()


@IMPLEMENTATIONS
@pytest.mark.parametrize("index", [0, 1])
def test_rates_are_those_of_the_profile_and_picked_prob_is_calibrated(stats, index):
    count, size, profile = 16_000, 8, PROFILES[index]
    state = one_request(index, size)
    position = torch.arange(count, dtype=torch.int32, device=DEVICE) % 512 + size
    draw = torch.arange(count, dtype=torch.int32, device=DEVICE) // 512
    request = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    nothing = torch.full_like(draw, -1)
    rows = [request, position, nothing, position, draw]
    picked, probability, _ = run(stats, rows, state=state)
    passes = run(stats, [request, position - 1, picked, position, draw], state=state)[2]
    first = position % size == 0
    error = 4 * 0.5 / (first.sum().item() ** 0.5)
    assert abs((probability[first] > 0.8).float().mean().item() - profile.slot) < error
    rest = ~first
    assert abs(passes[rest].mean().item() - profile.token) < error
    for low in (0.0, 0.25, 0.5, 0.75):
        bin_ = rest & (probability >= low) & (probability < low + 0.25)
        if bin_.sum() > 500:
            gap = (passes[bin_].mean() - probability[bin_].mean()).abs().item()
            assert gap < 4 * 0.5 / bin_.sum().item() ** 0.5


@IMPLEMENTATIONS
@pytest.mark.parametrize("index", [0, 1])
def test_serial_drafts_are_what_is_picked_with_their_probability(stats, index):
    count, state = 16_000, one_request(index, 8, serial=True)
    position = torch.arange(count, dtype=torch.int32, device=DEVICE) % 512
    chain = torch.arange(count, dtype=torch.int32, device=DEVICE) // 512 + 1
    request = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    nothing = torch.full_like(chain, -1)
    rows = [request, position, nothing, position]
    draft, probability, _ = run(stats, [*rows, chain], state=state)
    picked = run(stats, [*rows, 0 * chain], state=state)[0]
    right = (draft == picked).float()
    assert abs(right.mean().item() - PROFILES[index].token) < 0.02
    for low in (0.0, 0.25, 0.5, 0.75):
        bin_ = (probability >= low) & (probability < low + 0.25)
        if bin_.sum() > 500:
            gap = (right[bin_].mean() - probability[bin_].mean()).abs().item()
            assert gap < 4 * 0.5 / bin_.sum().item() ** 0.5 + 1 / VOCAB
    assert torch.equal(picked[:512], picked[512:1024])  # whatever was drafted


@IMPLEMENTATIONS
@pytest.mark.parametrize("index, chance", [(0, 0.3), (1, 0.2)])
def test_the_first_slot_has_a_chance_of_its_own(stats, index, chance):
    state = one_request(index, 8)
    draw = torch.arange(8000, dtype=torch.int32, device=DEVICE)
    nothing = torch.full_like(draw, -1)
    certainty = run(stats, [draw.long() * 0, draw * 0, nothing, draw * 0, draw], state=state)[1]
    # as many outcomes as tokens
    assert abs((certainty > 0.8).float().mean().item() - chance) < 4 * 0.5 / VOCAB**0.5


@pytest.mark.parametrize("token", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [0.25, 0.5, 1.0, 5.0])
def test_quantiles_have_the_asked_mean(token, shape):
    quantiles = Profile(0.5, token, shape).quantiles()
    assert abs(quantiles.double().mean().item() - token) < 1e-5
    assert (quantiles.diff() >= 0).all() and quantiles.min() >= 0 and quantiles.max() <= 1


def vllm_config(load_format: str = "dummy", **additional) -> SimpleNamespace:
    text = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS)
    return SimpleNamespace(
        additional_config=additional,
        load_config=SimpleNamespace(load_format=load_format),
        model_config=SimpleNamespace(hf_text_config=text, get_vocab_size=lambda: VOCAB),
    )


def test_acceptance_is_drawn_only_if_asked_for():
    assert acceptance_tables(vllm_config(), torch.device("cpu")) is None


@pytest.mark.parametrize("load_format, marked", [("dummy", False), ("auto", True)])
def test_only_the_benchmark_may_have_it_drawn(monkeypatch, load_format, marked):
    monkeypatch.delenv(BENCHMARK_ENV, raising=False)
    if marked:
        monkeypatch.setenv(BENCHMARK_ENV, "1")
    with pytest.raises(ValueError, match=CONFIG_KEY):
        acceptance_tables(vllm_config(load_format, **to_config(PROFILES)), torch.device("cpu"))


def test_the_benchmark_has_it_drawn(monkeypatch):
    monkeypatch.setenv(BENCHMARK_ENV, "1")
    tables = acceptance_tables(vllm_config(**to_config(PROFILES)), torch.device("cpu"))
    assert tables.excluded == (EOS, MASK)
    assert tables.slot_chance.tolist() == pytest.approx([0.3, 0.9])
    assert tables.first_chance.tolist() == pytest.approx([0.3, 0.2])


@pytest.mark.parametrize(
    "values", [(1.2, 0.5, 0.5), (0.5, 1.0, 0.5), (0.5, 0.5, 0.0), (0.5, 0.5, 0.5, -0.1)]
)
def test_profiles_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="slot and first must lie"):
        Profile(*values)
