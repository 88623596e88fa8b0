"""The token statistics kernel against its PyTorch twin, and both against the definition."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE
from kernel_inputs import random_logits

from vllm_refusion.decoding.noise import gumbel_noise, philox_4x32
from vllm_refusion.triton_kernels import token_stats as kernel_module
from vllm_refusion.triton_kernels.token_stats import token_stats
from vllm_refusion.triton_kernels.token_stats_twin import token_stats_twin

IMPLEMENTATIONS = pytest.mark.parametrize(
    "stats", [token_stats, token_stats_twin], ids=["kernel", "twin"]
)
POISON_TOKEN = -7
# Requests of every kind: greedy and sampled, with and without stop tokens and a minimum length.
TEMPERATURES = [0.0, 0.7, 1.0, 0.0, 2.5, 0.01]
SEEDS = [0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1]
DRAWS = [0, 0, 3, 1, 200, 7]
MIN_TOKENS = [0, 0, 6, 6, 1000, 0]
REQUESTS = len(TEMPERATURES)


def requests_state(vocab: int, **changes) -> dict:
    """Per-request tensors of the six requests above; stop tokens are ids that exist or padding."""
    stop = torch.full((REQUESTS, 3), -1, dtype=torch.int32)
    stop[1:, 0] = torch.arange(REQUESTS - 1) * 5 % vocab
    stop[2:, 2] = vocab - 1
    state = {
        "temperature": torch.tensor(TEMPERATURES),
        "seed": torch.tensor(SEEDS),
        "min_tokens": torch.tensor(MIN_TOKENS, dtype=torch.int32),
        "stop_ids": stop,
    }
    state |= changes
    return {name: tensor.to(DEVICE) for name, tensor in state.items()}


def rows_of(requests: list[int], positions: list[int], given: list[int]) -> tuple:
    return (
        torch.tensor(requests, dtype=torch.int64, device=DEVICE),
        torch.tensor(positions, dtype=torch.int32, device=DEVICE),
        torch.tensor(given, dtype=torch.int32, device=DEVICE),
        torch.tensor([DRAWS[r % REQUESTS] for r in requests], dtype=torch.int32, device=DEVICE),
    )


def random_rows(count: int, vocab: int, seed: int = 0) -> tuple:
    """Rows of all requests; every fifth is unused and points at a request that does not exist."""
    generator = torch.Generator().manual_seed(seed)
    given = torch.randint(-1, vocab, (count,), generator=generator).tolist()
    unused = [row % 5 == 3 for row in range(count)]
    return rows_of(
        [10**9 if skip else row % REQUESTS for row, skip in enumerate(unused)],
        [-1 if skip else row // 3 for row, skip in enumerate(unused)],
        given,
    )


def poisoned(count: int) -> tuple:
    return (
        torch.full((count,), POISON_TOKEN, dtype=torch.int32, device=DEVICE),
        torch.full((count,), float("nan"), device=DEVICE),
        torch.full((count,), float("nan"), device=DEVICE),
    )


def probability_errors(logits: torch.Tensor, token: torch.Tensor, probability: torch.Tensor):
    """Largest errors of ``probability`` and of PyTorch's float32 softmax against float64."""
    index = token.to(torch.int64).clamp(min=0)[:, None]
    exact = logits.double().softmax(1).gather(1, index)[:, 0]
    plain = logits.float().softmax(1).gather(1, index)[:, 0]
    return (probability - exact).abs().max(), (plain - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 33, 1000, 3328, 5003])
def test_kernel_equals_twin(vocab, dtype):
    count = 27
    logits = random_logits(count, vocab, dtype)
    rows = random_rows(count, vocab)
    state = requests_state(vocab) | {"mask_token_id": vocab // 2}
    expected = token_stats_twin(logits, *rows, **state, out=poisoned(count))
    actual = token_stats(logits, *rows, **state, out=poisoned(count))

    used = rows[1] >= 0
    for unwritten in (*actual, *expected):
        rest = unwritten[~used]
        assert ((rest == POISON_TOKEN) | rest.isnan()).all()
    picked, picked_prob, given_prob = (tensor[used] for tensor in actual)
    assert torch.equal(picked, expected[0][used])
    assert ((picked >= 0) & (picked < vocab)).all()
    given = rows[2][used]
    assert (given_prob[given < 0] == 0).all()
    for token, probability in ((picked, picked_prob), (given, given_prob)):
        asked = token >= 0
        error, plain = probability_errors(logits[used][asked], token[asked], probability[asked])
        # twice what PyTorch's own float32 softmax loses, which may be nothing: then one rounding
        assert error <= 2 * max(plain, torch.finfo(torch.float32).eps)


@IMPLEMENTATIONS
@pytest.mark.parametrize("count", [0, 1])
def test_few_rows_and_allocated_results(stats, count):
    logits = random_logits(count, 33)
    rows = rows_of([0] * count, [0] * count, [-1] * count)
    picked, picked_prob, given_prob = stats(logits, *rows, **requests_state(33), mask_token_id=-1)
    assert picked.dtype == torch.int32 and picked_prob.dtype == given_prob.dtype == torch.float32
    assert torch.equal(picked, logits.argmax(1).to(torch.int32))
    assert picked_prob.shape == given_prob.shape == (count,)


@IMPLEMENTATIONS
def test_allocated_results_of_unused_rows_are_zero(stats):
    rows = rows_of([10**9] * 2, [-1, -1], [3, -1])
    for result in stats(random_logits(2, 33), *rows, **requests_state(33), mask_token_id=0):
        assert torch.equal(result, torch.zeros_like(result))


@IMPLEMENTATIONS
def test_ties_go_to_the_lowest_token(stats, monkeypatch):
    monkeypatch.setattr(kernel_module, "CPU_TILE", 16)
    monkeypatch.setattr(kernel_module, "GPU_TILE", 16)
    logits = torch.zeros(4, 100, device=DEVICE)
    logits[0, [70, 71, 99]] = 5.0  # two of one tile and one of another
    logits[1, [15, 16]] = 5.0  # the neighbours of a tile's border
    logits[2, [3, 49]] = 5.0  # the second one in the tile of the mask token, which stands out
    logits[2, 50] = 6.0
    rows = rows_of([0] * 4, [0] * 4, [-1] * 4)
    picked, probability, _ = stats(logits, *rows, **requests_state(100), mask_token_id=50)
    assert picked.tolist() == [70, 15, 3, 0]
    expected = logits.softmax(1).gather(1, picked.to(torch.int64)[:, None])[:, 0]
    assert torch.allclose(probability, expected)


@IMPLEMENTATIONS
@pytest.mark.parametrize("request_slot", [0, 1], ids=["greedy", "sampled"])
def test_the_mask_token_is_never_picked_but_counts_as_probability(stats, request_slot):
    logits = random_logits(1, 1000)
    logits[0, 17] = 60.0
    state = requests_state(1000) | {"mask_token_id": 17}
    picked, picked_prob, given_prob = stats(logits, *rows_of([request_slot], [2], [17]), **state)
    assert picked.item() != 17
    assert given_prob.item() == 1.0 and 0 < picked_prob.item() < 1e-15


@IMPLEMENTATIONS
def test_stop_tokens_are_banned_below_min_tokens_only(stats):
    logits = random_logits(1, 40).repeat(4, 1)
    logits[:, 8], logits[:, 9], logits[:, 3] = 30.0, 29.0, 28.0
    stop_ids = torch.full((REQUESTS, 3), 3, dtype=torch.int32)
    stop_ids[2] = torch.tensor([9, -1, 8])
    state = requests_state(40, temperature=torch.zeros(REQUESTS), stop_ids=stop_ids)
    rows = rows_of([2, 2, 2, 0], [0, 5, 6, 0], [8, 9, -1, 3])
    picked, _, given_prob = stats(logits, *rows, **state, mask_token_id=39)
    assert picked.tolist() == [3, 3, 8, 8]
    assert (given_prob[:2] > 0).all() and given_prob[2] == 0


@IMPLEMENTATIONS
def test_no_stop_tokens_at_all(stats):
    state = requests_state(33, stop_ids=torch.empty(REQUESTS, 0, dtype=torch.int32))
    logits = random_logits(1, 33)
    picked = stats(logits, *rows_of([3], [0], [-1]), **state, mask_token_id=-1)[0]
    assert picked.item() == logits.argmax().item()


@IMPLEMENTATIONS
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("request_slot", [0, 1], ids=["greedy", "sampled"])
def test_excluded_logits_have_probability_zero_and_are_not_picked(stats, request_slot, monkeypatch):
    monkeypatch.setattr(kernel_module, "CPU_TILE", 16)
    monkeypatch.setattr(kernel_module, "GPU_TILE", 16)
    logits = torch.full((3, 50), -torch.inf, device=DEVICE)
    logits[0, 40] = -3.0
    logits[1, [4, 44]] = torch.tensor([1e-3, -90.0], device=DEVICE)
    logits[2, 7] = 2.0
    rows = rows_of([request_slot] * 3, [0] * 3, [39, 44, 7])
    results = stats(logits, *rows, **requests_state(50), mask_token_id=7)
    # of row 2 nothing but the mask token is finite: the lowest allowed id
    assert results[0].tolist() == [40, 4, 0]
    assert results[1].tolist() == [1, 1, 0]
    assert results[2][[0, 2]].tolist() == [0, 1] and 0 <= results[2][1].item() < 1e-38


@IMPLEMENTATIONS
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("request_slot", [0, 1], ids=["greedy", "sampled"])
def test_rows_that_are_no_numbers_pick_a_real_token(stats, request_slot):
    logits = random_logits(4, 50)
    logits[0] = torch.nan
    logits[1, ::2] = torch.nan
    logits[2] = -torch.inf
    logits[3, 30] = torch.inf
    rows = rows_of([request_slot] * 4, [0] * 4, [1] * 4)
    picked, picked_prob, given_prob = stats(logits, *rows, **requests_state(50), mask_token_id=0)
    assert picked[0].item() == 1 and picked[2].item() == 1 and picked[3].item() == 30
    assert picked[1].item() % 2 == 1 and picked[1].item() < 50
    assert picked_prob.isnan().all() and given_prob.isnan().all()


@IMPLEMENTATIONS
def test_where_no_token_is_allowed_token_0_is_picked(stats):
    state = requests_state(3, stop_ids=torch.tensor([[0, 2]] * REQUESTS, dtype=torch.int32))
    rows = rows_of([3, 4], [0, 0], [0, 1])
    assert stats(random_logits(2, 3), *rows, **state, mask_token_id=1)[0].tolist() == [0, 0]


@IMPLEMENTATIONS
@pytest.mark.parametrize("vocab", [33, 1000])
def test_row_strides(stats, vocab):
    count = 12
    wide = random_logits(3 * count, vocab + 7)
    view = wide[::3, 2 : 2 + vocab]
    rows = random_rows(count, vocab)
    state = requests_state(vocab) | {"mask_token_id": 0}
    for strided, dense in zip(
        stats(view, *rows, **state), stats(view.contiguous(), *rows, **state), strict=True
    ):
        assert torch.equal(strided, dense)


@IMPLEMENTATIONS
def test_a_row_does_not_depend_on_its_batch(stats):
    count, vocab = 18, 1000
    logits = random_logits(count, vocab)
    rows = random_rows(count, vocab)
    state = requests_state(vocab) | {"mask_token_id": 999}
    together = stats(logits, *rows, **state)
    out = poisoned(2 * count)
    for row in range(count):
        # results land in the middle of larger buffers, as when rows are processed in chunks
        views = tuple(tensor[2 * row : 2 * row + 1] for tensor in out)
        one_row = [tensor[row : row + 1] for tensor in (logits, *rows)]
        stats(*one_row, **state, out=views)
    used = rows[1] >= 0
    for whole, single in zip(together, out, strict=True):
        assert torch.equal(whole[used], single[::2][used])


@pytest.mark.parametrize("tile", [64, 256, 2048])
def test_the_tile_changes_no_pick(tile, monkeypatch):
    count, vocab = 12, 1000
    # coarse logits, so that many tokens tie where nothing is sampled
    logits = random_logits(count, vocab).round()
    rows = random_rows(count, vocab)
    state = requests_state(vocab) | {"mask_token_id": 3}
    expected = token_stats_twin(logits, *rows, **state)
    monkeypatch.setattr(kernel_module, "CPU_TILE", tile)
    monkeypatch.setattr(kernel_module, "GPU_TILE", tile)
    picked, picked_prob, given_prob = token_stats(logits, *rows, **state)
    assert torch.equal(picked, expected[0])
    torch.testing.assert_close(picked_prob, expected[1])
    torch.testing.assert_close(given_prob, expected[2])


def test_cutting_rows_into_parts_changes_no_bit(monkeypatch):
    count, vocab = 6, 1000
    logits = random_logits(count, vocab).round()
    rows = random_rows(count, vocab)
    state = requests_state(vocab) | {"mask_token_id": 3}
    for name in ("CPU_TILE", "GPU_TILE"):
        monkeypatch.setattr(kernel_module, name, 64)
    results = []
    for programs in (1, 20, 10**6):  # 16 tiles a row: 1 part, 4 parts, 16 parts
        for name in ("CPU_PROGRAMS", "GPU_PROGRAMS"):
            monkeypatch.setattr(kernel_module, name, programs)
        results.append(token_stats(logits, *rows, **state))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@IMPLEMENTATIONS
def test_a_sampled_pick_is_the_argmax_of_perturbed_logits(stats):
    logits = random_logits(20, 257)
    rows = rows_of([4] * 20, list(range(20)), [-1] * 20)
    state = requests_state(257, min_tokens=torch.zeros(REQUESTS, dtype=torch.int32))
    noise = gumbel_noise(SEEDS[4], DRAWS[4], rows[1], 257)
    picked = stats(logits, *rows, **state, mask_token_id=-1)[0]
    assert torch.equal(picked, (logits / TEMPERATURES[4] + noise).argmax(1).to(torch.int32))


@pytest.mark.parametrize(
    "stats, count", [(token_stats, 200), (token_stats_twin, 20000)], ids=["kernel", "twin"]
)
def test_sampled_picks_follow_the_softmax(stats, count):
    vocab, temperature = 8, TEMPERATURES[1]
    logits = 0.2 * torch.arange(vocab, device=DEVICE)[None, :]
    rows = rows_of([1] * count, list(range(count)), [-1] * count)
    state = requests_state(vocab) | {"mask_token_id": 2}
    picked = stats(logits.expand(count, vocab), *rows, **state)[0]
    allowed = logits[0].double()
    allowed[2] = -torch.inf
    expected = (allowed / temperature).softmax(0) * count
    observed = picked.long().bincount(minlength=vocab).double()
    kept = expected > 0
    assert expected[kept].min() > 5 and observed[~kept].sum() == 0
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    # 6 degrees of freedom: exceeded with probability 0.001
    assert chi_square < 22.46


@triton.jit
def _words_and_noise_kernel(
    seed_ptr, draw, position, words_ptr, noise_ptr, vocab, BLOCK: tl.constexpr
):
    token = tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    word, _, _, _ = tl.philox(seed, token, position, draw, 0)
    noise = kernel_module.gumbel(seed, draw, position, token)
    tl.store(words_ptr + token, word.to(tl.int64), mask=token < vocab)
    tl.store(noise_ptr + token, noise, mask=token < vocab)


@pytest.mark.parametrize("seed", SEEDS)
def test_words_of_the_kernel_are_those_of_the_twin(seed):
    vocab, position, draw = 1000, 77, 13
    words = torch.empty(vocab, dtype=torch.int64, device=DEVICE)
    noise = torch.empty(vocab, device=DEVICE)
    bits = torch.tensor([seed], device=DEVICE)
    _words_and_noise_kernel[(1,)](bits, draw, position, words, noise, vocab, BLOCK=1024)
    counter = tuple(torch.tensor([value]) for value in (position, draw, 0))
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    assert torch.equal(words.cpu(), philox_4x32((torch.arange(vocab), *counter), key)[0])
    expected = gumbel_noise(seed, draw, torch.tensor([position]), vocab)[0]
    torch.testing.assert_close(noise.cpu(), expected, rtol=2e-6, atol=2e-6)


@IMPLEMENTATIONS
def test_the_largest_noise_does_not_beat_every_logit(stats):
    # the token whose noise would be infinite without the bound (see test_noise.py)
    logits = torch.zeros(1, 74944, device=DEVICE)
    logits[0, 74000] = 40.0
    state = requests_state(
        74944,
        temperature=torch.ones(REQUESTS),
        seed=torch.full((REQUESTS,), 2),
    )
    picked = stats(logits, *rows_of([0], [25], [-1]), **state, mask_token_id=-1)[0]
    assert picked.item() == 74000


def test_the_launcher_refuses_wrong_types_and_strides():
    logits = random_logits(2, 33)
    rows = rows_of([0, 0], [0, 0], [-1, -1])
    state = requests_state(33) | {"mask_token_id": 0}
    with pytest.raises(AssertionError, match="contiguous"):
        token_stats(random_logits(33, 2).T, *rows, **state)
    with pytest.raises(AssertionError, match="int64"):
        token_stats(logits, rows[0].int(), *rows[1:], **state)
    with pytest.raises(AssertionError, match="float64"):
        token_stats(logits.double(), *rows, **state)
