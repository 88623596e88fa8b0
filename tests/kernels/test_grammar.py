"""What a grammar refuses: the kernel against its twin, and which rows pick a token."""

from __future__ import annotations

import random

import pytest
import torch
from device import DEVICE
from simulated_engine import SimulatedEngine
from test_serial import REQUESTS, STARTS, serial_request
from test_transition import MASK_TOKEN_ID, TWINS, WEATHERS, tiny_model

from vllm_refusion.decoding.reference import decode
from vllm_refusion.triton_kernels.grammar import forbid
from vllm_refusion.triton_kernels.grammar_twin import forbid_twin, picking_rows
from vllm_refusion.triton_kernels.token_stats_twin import token_stats_twin


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_twin(vocab: int, dtype: torch.dtype):
    torch.manual_seed(vocab)
    logits = torch.randn(7, vocab + 3).to(dtype)[:, :vocab]
    bitmask = torch.randint(-(2**31), 2**31, (4, vocab // 32 + 2), dtype=torch.int32)
    mask_row = torch.tensor([-1, 3, 0, 0, -1, 2, 1], dtype=torch.int32)
    expected = logits.clone()
    forbid_twin(expected, mask_row, bitmask)
    for row, mask in enumerate(mask_row.tolist()):
        for token in range(vocab):
            bit = 1 if mask < 0 else int(bitmask[mask, token // 32]) >> (token % 32) & 1
            assert expected[row, token] == (logits[row, token] if bit else -torch.inf)
    moved = logits.to(DEVICE)
    forbid(moved, mask_row.to(DEVICE), bitmask.to(DEVICE))
    assert torch.equal(moved.cpu(), expected)
    forbid(moved[:0], mask_row[:0].to(DEVICE), bitmask.to(DEVICE))


def allowed(prefix: list[int], vocab: int) -> torch.Tensor:
    """A grammar of its own: about half of the vocabulary, another half behind each prefix."""
    draw = random.Random(str(prefix))
    return torch.tensor([draw.random() < 0.5 for _ in range(vocab)])


@pytest.mark.parametrize("weather", ["calm", "sometimes_riders"])
def test_picks_are_of_what_is_allowed_behind_accepted_drafts(weather: str):
    """The rows that pick are limited as ``picking_rows`` says; tokens are the reference's."""

    def limited(logits, row_request, row_position, *args, **options):
        state, logits = engine.state, logits.clone()
        begins = torch.ones(len(row_request), dtype=torch.bool)
        begins[1:] = row_request[1:] != row_request[:-1]
        rows = torch.arange(len(row_request))
        local = rows - torch.where(begins, rows, 0).cummax(0).values
        picks, accepted = picking_rows(state, row_request, local)
        known = {job.req: job.output for job in engine._running}
        for row in (picks & (row_position >= 0)).nonzero().flatten().tolist():
            req = int(row_request[row])
            prefix = known[req] + state.token[req, : int(accepted[row])].tolist()
            logits[row, ~allowed(prefix, logits.shape[1])] = -torch.inf
        return token_stats_twin(logits, row_request, row_position, *args, **options)

    operations = TWINS._replace(token_stats=limited)
    engine = SimulatedEngine(tiny_model(), operations, weather=WEATHERS[weather], seed=5)
    names = [(name, start) for name in REQUESTS for start in STARTS]
    outcomes = engine.decode([serial_request(*name) for name in names])
    for name, outcome in zip(names, outcomes, strict=True):
        options = dict(vars(serial_request(*name)))
        expected = decode(
            tiny_model(),
            options.pop("prompt"),
            **options,
            mask_token_id=MASK_TOKEN_ID,
            allowed=lambda prefix: allowed(prefix, tiny_model().config.vocab_size),
        )
        assert outcome.tokens == expected.tokens, name
