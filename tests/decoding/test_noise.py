"""The noise is Philox-4x32-10 bit for bit, finite everywhere, and Gumbel distributed."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_refusion.decoding.noise import LARGEST_UNIFORM, NOISE_BOUND, gumbel_noise, philox_4x32

WORD = 0xFFFFFFFF


def philox_scalar(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox-4x32-10 in Python integers, which never overflow."""
    a, b, c, d = counter
    for step in range(10):
        k0, k1 = (key[0] + step * 0x9E3779B9) & WORD, (key[1] + step * 0xBB67AE85) & WORD
        high_a, low_a = divmod(0xD2511F53 * a, 2**32)
        high_c, low_c = divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
    return a, b, c, d


def philox_words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    words = philox_4x32(tuple(torch.tensor([c]) for c in counter), key)
    return tuple(int(word) for word in words)


# counter, key and output of philox4x32 with 10 rounds as published with Random123
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words):
    assert philox_scalar(counter, key) == words
    assert philox_words(counter, key) == words


def test_philox_equals_the_scalar_one_on_random_counters():
    generator = torch.Generator().manual_seed(0)
    for row in torch.randint(0, 2**32, (50, 6), generator=generator).tolist():
        assert philox_words(tuple(row[:4]), (row[4], row[5])) == philox_scalar(row[:4], row[4:])


@pytest.mark.parametrize("seed", [0, 7, -1, -(2**63), 2**63 - 1, 2**64 - 5])
def test_noise_follows_its_definition(seed):
    positions = torch.tensor([0, 5, 2**31 - 1], dtype=torch.int32)
    noise = gumbel_noise(seed, 11, positions, 33)
    assert noise.shape == (3, 33) and noise.dtype == torch.float32
    for row, position in enumerate(positions.tolist()):
        for token in range(33):
            key = (seed & WORD, (seed >> 32) & WORD)
            word = philox_scalar((token, position, 11, 0), key)[0]
            exact = -math.log(-math.log(((word >> 8) + 0.5) * 2**-24))
            # u is rounded to float32, by 2**-25 near 1; that moves the noise by exp(noise) times it
            tolerance = 1e-6 * max(1.0, abs(exact)) + math.exp(exact) * 2**-24
            assert abs(float(noise[row, token]) - exact) <= tolerance


def test_the_largest_word_gives_the_largest_noise_and_not_infinity():
    # found by search: word >> 8 is 2**24 - 1, whose u rounds to 1 in float32
    word = philox_scalar((74943, 25, 0, 0), (2, 0))[0]
    assert word >> 8 == 2**24 - 1
    noise = gumbel_noise(2, 0, torch.tensor([25]), 74944)
    assert torch.isfinite(noise).all()
    assert float(noise.max()) == float(noise[0, 74943])
    assert math.isclose(float(noise.max()), -math.log(-math.log(LARGEST_UNIFORM)), rel_tol=1e-6)
    assert float(noise.max()) < NOISE_BOUND


def test_one_seed_and_draw_per_row_equal_separate_calls():
    positions = torch.tensor([3, 3, 90, 0])
    seeds = torch.tensor([1, -1, 2**40 + 1, 1])
    draws = torch.tensor([0, 4, 0, 2], dtype=torch.int32)
    noise = gumbel_noise(seeds, draws, positions, 1000)
    for row in range(4):
        alone = gumbel_noise(int(seeds[row]), int(draws[row]), positions[row : row + 1], 1000)
        assert torch.equal(noise[row], alone[0])


def test_a_vocabulary_cut_short_keeps_its_noise():
    positions = torch.arange(150)
    whole = gumbel_noise(5, 1, positions, 2000)
    assert torch.equal(gumbel_noise(5, 1, positions, 77), whole[:, :77])


@pytest.mark.parametrize("rows, vocab", [(0, 5), (3, 0), (1, 1)])
def test_smallest_shapes(rows, vocab):
    assert gumbel_noise(0, 0, torch.arange(rows), vocab).shape == (rows, vocab)


def test_noise_is_gumbel_distributed():
    noise = gumbel_noise(123, 0, torch.arange(64), 4096).double().flatten()
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    count = len(uniform)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = torch.maximum((steps - uniform).abs(), (uniform - steps + 1 / count).abs()).max()
    # Kolmogorov-Smirnov: exceeded with probability 0.001
    assert float(distance) < 1.95 / math.sqrt(count)


@pytest.mark.parametrize("name", ["token", "position", "draw", "seed low", "seed high"])
def test_noise_of_neighbours_is_independent(name):
    positions = torch.arange(128)
    base = gumbel_noise(9, 3, positions, 513)
    others = {
        "token": lambda: base.roll(1, dims=1),
        "position": lambda: gumbel_noise(9, 3, positions + 1, 513),
        "draw": lambda: gumbel_noise(9, 4, positions, 513),
        "seed low": lambda: gumbel_noise(8, 3, positions, 513),
        "seed high": lambda: gumbel_noise(9 + 2**32, 3, positions, 513),
    }
    pair = torch.stack([base.flatten(), others[name]().flatten()])
    correlation = torch.corrcoef(pair)[0, 1]
    # four standard deviations of the correlation of independent samples
    assert abs(float(correlation)) < 4 / math.sqrt(base.numel())
    assert not (pair[0] == pair[1]).float().mean() > 1e-3
