"""Decoding without a model: counts the passes that the plain schedule makes for given outcomes.

It calibrates the profiles of acceptance replay and says what an engine that replays one must count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import Pass
from vllm_refusion.engine.acceptance import Profile, build_tables, seed_of
from vllm_refusion.triton_kernels.acceptance_twin import (
    AcceptanceTables,
    acceptance_stats_twin,
)


class Outcomes(Protocol):
    """What a model would decide."""

    def draft(self, positions: Sequence[int], draw: int) -> tuple[list[int], list[float]]:
        """Tokens proposed at response positions by a draw, and their probabilities."""

    def passes(self, tokens: Sequence[int], positions: Sequence[int]) -> list[bool]:
        """Whether tokens at response positions pass verification."""


class ReplayedOutcomes:
    """What ``acceptance_stats`` decides for one request."""

    def __init__(self, tables: AcceptanceTables, seed: int, params: DecodingParams) -> None:
        self._tables = tables
        self._request = {
            "seed": torch.tensor([seed]),
            "slot_size": torch.tensor([params.slot_size], dtype=torch.int32),
            "slot_threshold": torch.tensor([params.slot_threshold]),
        }

    def draft(self, positions: Sequence[int], draw: int) -> tuple[list[int], list[float]]:
        nothing = [-1] * len(positions)
        picked, probability, _ = self._rows(positions, nothing, draw)
        return picked.tolist(), probability.tolist()

    def passes(self, tokens: Sequence[int], positions: Sequence[int]) -> list[bool]:
        # asked in the row before; position 0 is a slot's first, which nobody asks about
        before = [max(position - 1, 0) for position in positions]
        return (self._rows(before, tokens, 0)[2] > 0.5).tolist()

    def _rows(self, positions: Sequence[int], given: Sequence[int], draw: int) -> tuple:
        count = len(positions)
        out = (torch.zeros(count, dtype=torch.int32), torch.zeros(count), torch.zeros(count))
        acceptance_stats_twin(
            torch.zeros(count, dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int32),
            torch.tensor(given, dtype=torch.int32),
            torch.full((count,), draw, dtype=torch.int32),
            **self._request,
            tables=self._tables,
            out=out,
        )
        return out


def simulate(
    params: DecodingParams, outcomes: Outcomes, max_tokens: int, *, keeps_accepted: bool = True
) -> list[Pass]:
    """The forward passes (algorithm section 3, no EOS) that decode one request.

    Unless ``keeps_accepted``, an infill feeds all accepted tokens of a slot in each of its passes,
    as the paper says, also those whose KV is final and next in commit order.
    """
    size, budget = params.slot_size, params.budget(max_tokens)
    slot_threshold = torch.tensor(params.slot_threshold).item()  # compared in float32
    passes: list[Pass] = []
    draws = 0

    def draft(kind: str, positions: list[int], rows: int) -> tuple[list[int], list[float]]:
        nonlocal draws
        passes.append(Pass(kind, rows))
        draws += 1
        return outcomes.draft(positions, draws - 1)

    for block in range(0, budget, params.block_length):
        left = list(range(block, min(block + params.block_length, budget), size))
        while left:
            positions = [start + i for start in left for i in range(size)]
            tokens, probabilities = draft("plan", positions, len(positions))
            token = dict(zip(positions, tokens))
            certainty = dict(zip(left, probabilities[::size]))
            chosen = [start for start in left if certainty[start] > slot_threshold]
            chosen = chosen or [max(left, key=lambda start: certainty[start])]

            # 3.2: the run of each slot, its first token accepted without a test
            accepted: dict[int, int] = {}
            passes.append(Pass("verify", len(chosen) * size))
            for start in chosen:
                accepted[start] = _run(outcomes, token, start, 1, size)
            whole = next((i for i, s in enumerate(chosen) if accepted[s] < size), len(chosen))
            if not whole:
                # 3.3: all chosen slots side by side until the last is complete
                while incomplete := [s for s in chosen if accepted[s] < size]:
                    first = incomplete[0]  # what lies before its masks is kept
                    done = accepted[first] if keeps_accepted else 0
                    kept = chosen.index(first) * size + done if keeps_accepted else 0
                    blanks = [s + i for s in incomplete for i in range(accepted[s], size)]
                    tokens, _ = draft("predict", blanks, len(incomplete) * size - done)
                    token.update(zip(blanks, tokens))
                    passes.append(Pass("infill_verify", len(chosen) * size - kept))
                    for start in incomplete:
                        accepted[start] = _run(outcomes, token, start, accepted[start] + 1, size)
                whole = len(chosen)
            left = [start for start in left if start not in chosen[:whole]]
    return passes


def _run(outcomes: Outcomes, token: dict[int, int], start: int, accepted: int, size: int) -> int:
    """Tokens of a slot accepted when ``accepted`` are without a test."""
    positions = list(range(start + accepted, start + size))
    passed = outcomes.passes([token[p] for p in positions], positions)
    return accepted + next((i for i, ok in enumerate(passed) if not ok), len(passed))


def tokens_per_forward(
    params: DecodingParams,
    profile: Profile,
    *,
    max_tokens: int = 512,
    requests: int = 32,
    vocab: int = 151936,
    keeps_accepted: bool = True,
) -> tuple[float, float]:
    """Of the plain schedule with replayed outcomes: tokens per pass, rows fed per token."""
    tables = build_tables([profile], vocab, (), "cpu")
    passes = [
        made
        for index in range(requests)
        for made in simulate(
            params,
            ReplayedOutcomes(tables, seed_of(0, index), params),
            max_tokens,
            keeps_accepted=keeps_accepted,
        )
    ]
    tokens = requests * max_tokens
    return tokens / len(passes), sum(made.width for made in passes) / tokens
