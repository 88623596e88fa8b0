"""Dealing rows out to requests: the kernel against its twin, and what must hold for both."""

from __future__ import annotations

import random

import pytest
import torch
from fuzzed_states import DECODING, FUZZED, POISON, Fuzz
from twins import same

from vllm_refusion.decoding.state import Field, Phase
from vllm_refusion.triton_kernels.allocation import allocate
from vllm_refusion.triton_kernels.allocation_twin import TOTALS, allocate_twin


def make_serial(ints: torch.Tensor, rng: random.Random) -> None:
    """Makes a request one in serial mode, at its prompt or past it."""
    rows = rng.randint(1, 8)
    for field, value in {
        Field.PHASE: rng.choice((Phase.PREFILL, Phase.SERIAL, Phase.DONE)),
        Field.RESUME: Phase.SERIAL,
        Field.EMITTED: rng.choice((0, 3)),
        Field.COMMITTED: 0,
        Field.ROWS: rows,
        Field.CANVAS: rows + rng.randint(0, 30),
        Field.LAST_TOKENS: rng.randint(1, 9),
    }.items():
        ints[field] = int(value)


@pytest.mark.parametrize("phases", [DECODING, FUZZED], ids=["decoding", "all"])
def test_rows_are_dealt_out(phases: tuple[Phase, ...]):
    rng = random.Random(f"{phases}")
    served = waited = ridden = 0
    for _ in range(30):
        fuzz = Fuzz(rng, phases, 48)
        state, requests = fuzz.state, len(fuzz.idx_mapping)
        decoding = rng.randint(1, requests)
        for req in fuzz.idx_mapping.tolist():
            if rng.random() < 0.3:
                make_serial(state.ints[req], rng)
        before = state.ints[fuzz.idx_mapping].clone()
        scheduled = torch.tensor([rng.randint(1, 96) for _ in range(requests)]).int()
        scheduled[decoding:] = 0
        prompts = torch.tensor([rng.choice((0, rng.randint(1, 70))) for _ in range(requests)]).int()
        rows = rng.randint(0, int(scheduled.sum()))
        inputs = (fuzz.num_computed, fuzz.idx_mapping, scheduled, prompts)
        outputs = [
            torch.full((n,), POISON, dtype=torch.int32)
            for n in (requests + 3, requests + 1, TOTALS)
        ]
        scalars = (decoding, rows, rng.randrange(decoding))
        same(allocate_twin, allocate)(state, *inputs, *outputs, *scalars)

        query_start_loc, logits_start, totals = outputs
        given = logits_start.diff()
        assert given.sum() == rows and (given <= scheduled).all() and (given >= 0).all()
        assert (query_start_loc[: requests + 1].diff() == given + prompts).all()
        assert (query_start_loc[requests:] == rows + prompts.sum()).all()
        assert totals[0] <= totals[1]
        for index in range(decoding):
            if before[index, Field.PHASE] in DECODING:
                needed = before[index, Field.ROWS]
                served += bool(given[index] >= needed)
                waited += bool(given[index] < needed)
                ridden += bool(given[index] > needed)
                size, emitted = before[index, [Field.SLOT_SIZE, Field.EMITTED]]
                room = scheduled[index] + emitted - emitted % size
                room -= before[index, Field.COMMITTED] + before[index, Field.KEPT]
                # the engine's scheduler always leaves room for what a phase needs
                if given[index] >= needed and needed <= room:
                    assert state.ints[fuzz.idx_mapping[index], Field.CANVAS] <= room
    assert served and waited and ridden
