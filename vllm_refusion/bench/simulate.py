"""Decoding without a model: counts the passes that the plain schedule makes for given outcomes.

It calibrates the profiles of drawn acceptance and says what an engine that has one must count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import Pass
from vllm_refusion.decoding.rules import accepted_run, choose_slots, committed_prefix
from vllm_refusion.decoding.state import DecodeState, Field, Phase
from vllm_refusion.engine.acceptance import Profile, build_tables, seed_of
from vllm_refusion.triton_kernels.acceptance_twin import (
    AcceptanceTables,
    acceptance_stats_twin,
    replayed_rows_twin,
)

NO_EOS = -1  # no token
CANVAS, VOCAB, MASK = 256, 151936, 0  # what masks are called does not matter to drawn outcomes
PROMPT = 1  # tokens

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Batch = tuple[DecodeState, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def starts_of(counts: torch.Tensor) -> torch.Tensor:
    """Where each of consecutive parts of so many rows starts, and where the last one ends."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def drawn_statistics(
    state: DecodeState, running: torch.Tensor, widths: torch.Tensor, tables: AcceptanceTables
) -> Columns:
    """picked, picked_prob, given_prob of all canvas rows of a pass.

    Args:
        running: [R] int64, requests. widths: [R], their canvas rows.
    """
    request = running.repeat_interleave(widths)
    row = torch.cat([torch.arange(width) for width in widths.tolist()])
    replayed = torch.zeros(2, len(row), dtype=torch.int32)
    replayed_rows_twin(state, request, row, state.row_draw[request, row], replayed)
    out = (torch.zeros(len(row), dtype=torch.int32), torch.zeros(len(row)), torch.zeros(len(row)))
    acceptance_stats_twin(
        request,
        state.row_target[request, row],
        state.canvas_token[request, (row + 1).clamp_max(CANVAS - 1)].int(),
        *replayed,
        seed=state.seed,
        slot_size=state.ints[:, Field.SLOT_SIZE],
        slot_threshold=state.slot_threshold,
        resume=state.ints[:, Field.RESUME],
        tables=tables,
        out=out,
    )
    return out


def run_passes(
    state: DecodeState,
    tables: AcceptanceTables,
    transition: Callable[[Batch, Columns, Columns], None],
    with_prompts: bool = True,
) -> None:
    """Decodes all requests of ``state``, whose prompts are of PROMPT tokens.

    Args:
        transition: takes a pass: its batch, the statistics, and where the results go, in the order
            of ``transition_twin``.
        with_prompts: whether a canvas is fed behind a prompt.
    """
    num_computed = torch.zeros(state.max_requests, dtype=torch.int32)
    prompts = torch.full_like(num_computed, PROMPT)
    phase, width = state.ints[:, Field.PHASE], state.ints[:, Field.CANVAS]
    while len(running := (phase != Phase.DONE).nonzero().flatten()):
        prefills = phase[running] == Phase.PREFILL
        decode_rows = width[running] * (with_prompts | ~prefills)
        fed = decode_rows + prefills * PROMPT
        sampled = torch.zeros(len(running), state.canvas_length, dtype=torch.int32)
        results = (sampled, torch.zeros_like(fed), torch.zeros_like(fed))
        batch = (state, running, starts_of(fed), starts_of(decode_rows), num_computed, prompts)
        transition(batch, drawn_statistics(state, running, decode_rows, tables), results)
        num_computed[running] += fed - results[-1]


class Outcomes(Protocol):
    """What a model would decide."""

    def draft(self, positions: Sequence[int], draw: int) -> tuple[list[int], list[float]]:
        """Tokens proposed at response positions by a draw, and their probabilities."""

    def given(self, tokens: Sequence[int], positions: Sequence[int]) -> list[float]:
        """The probability that the token before gives to each token, at response positions."""


class DrawnOutcomes:
    """What ``acceptance_stats`` decides for one request."""

    def __init__(self, tables: AcceptanceTables, seed: int, params: DecodingParams) -> None:
        self._tables = tables
        self._request = {
            "seed": torch.tensor([seed]),
            "slot_size": torch.tensor([params.slot_size], dtype=torch.int32),
            "slot_threshold": torch.tensor([params.slot_threshold]),
            "resume": torch.tensor([Phase.START], dtype=torch.int32),
        }

    def draft(self, positions: Sequence[int], draw: int) -> tuple[list[int], list[float]]:
        nothing = [-1] * len(positions)
        picked, probability, _ = self._rows(positions, nothing, draw)
        return picked.tolist(), probability.tolist()

    def given(self, tokens: Sequence[int], positions: Sequence[int]) -> list[float]:
        return self._rows(positions, tokens, 0)[2].tolist()

    def _rows(self, positions: Sequence[int], given: Sequence[int], draw: int) -> tuple:
        count = len(positions)
        out = (torch.zeros(count, dtype=torch.int32), torch.zeros(count), torch.zeros(count))
        acceptance_stats_twin(
            torch.zeros(count, dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int32),
            torch.tensor(given, dtype=torch.int32),
            torch.tensor(positions, dtype=torch.int32),
            torch.full((count,), draw, dtype=torch.int32),
            **self._request,
            tables=self._tables,
            out=out,
        )
        return out


def simulate(
    params: DecodingParams, outcomes: Outcomes, max_tokens: int, *, keeps_accepted: bool = True
) -> list[Pass]:
    """The forward passes (algorithm sections 3 and 8, no EOS) that decode one request.

    Unless ``keeps_accepted``, an infill feeds all accepted tokens of a slot in each of its passes,
    as the paper says, also those whose KV is final and next in commit order.
    """
    size, budget = params.slot_size, params.budget(max_tokens)
    # compared in float32
    slot_threshold = torch.tensor(params.slot_threshold).item()
    token_threshold = torch.tensor(params.token_threshold).item()
    corrects = params.infill == "correct"
    passes: list[Pass] = []
    draws = 0

    def draft(kind: str, positions: list[int], rows: int) -> tuple[list[int], list[float]]:
        nonlocal draws
        passes.append(Pass(kind, rows))
        draws += 1
        return outcomes.draft(positions, draws - 1)

    def accept(start: int, untested: int) -> int:
        """Tokens of the slot accepted when the first ``untested`` take no test."""
        tested = list(range(start + untested, start + size))
        given = outcomes.given([token[p] for p in tested], tested)
        return accepted_run([*[None] * untested, *given], token_threshold)

    def correct(failed: list[int]) -> list[int]:
        """Section 8: accepts a correction in each slot; those that it ends."""
        failed = [start for start in failed if corrects and accepted[start] < size]
        for start in failed:
            (token[start + accepted[start]],), _ = outcomes.draft([start + accepted[start]], draws)
            accepted[start] += 1
        return [start for start in failed if accepted[start] == size]

    def kept_of(chosen: list[int], unfed: list[int]) -> int:
        """Rows that an infill need not feed again: the first ones, up to one that is asked."""
        kept = 0
        for start in chosen if keeps_accepted else []:
            asked = corrects and accepted[start] < size
            final = accepted[start] - (asked or start in unfed)
            kept += final
            if final < size:
                break
        return kept

    for block in range(0, budget, params.block_length):
        left = list(range(block, min(block + params.block_length, budget), size))
        while left:
            positions = [start + i for start in left for i in range(size)]
            tokens, probabilities = draft("plan", positions, len(positions))
            token = dict(zip(positions, tokens))
            chosen = [left[i] for i in choose_slots(probabilities[::size], slot_threshold)]

            # 3.2: the run of each slot, its first token accepted without a test
            passes.append(Pass("verify", len(chosen) * size))
            accepted = {start: accept(start, 1) for start in chosen}
            drafts = [token[start + i] for start in chosen for i in range(size)]
            whole = committed_prefix(drafts, list(accepted.values()), size, NO_EOS)[0] // size
            if not whole:
                # 3.3: all chosen slots side by side until the last is complete
                unfed = correct(chosen[:1])
                while incomplete := [s for s in chosen if accepted[s] < size]:
                    kept = kept_of(chosen, unfed)
                    first = incomplete[0]
                    done = max(0, kept - chosen.index(first) * size)
                    blanks = [s + i for s in incomplete for i in range(accepted[s], size)]
                    tokens, _ = draft("predict", blanks, len(incomplete) * size - done)
                    token.update(zip(blanks, tokens))
                    passes.append(Pass("infill_verify", len(chosen) * size - kept))
                    for start in incomplete:
                        accepted[start] = accept(start, accepted[start] + (not corrects))
                    unfed = correct(incomplete)
                if unfed:
                    rows = len(chosen) * size - kept_of(chosen, unfed)
                    passes.append(Pass("infill_verify", rows))
                whole = len(chosen)
            left = [start for start in left if start not in chosen[:whole]]
    return passes


def tokens_per_forward(
    params: DecodingParams,
    profile: Profile,
    *,
    max_tokens: int = 512,
    requests: int = 32,
    vocab: int = 151936,
    keeps_accepted: bool = True,
) -> tuple[float, float]:
    """Of the plain schedule with drawn outcomes: tokens per pass, rows fed per token."""
    tables = build_tables([profile], vocab, (), "cpu")
    passes = [
        made
        for index in range(requests)
        for made in simulate(
            params,
            DrawnOutcomes(tables, seed_of(0, index), params),
            max_tokens,
            keeps_accepted=keeps_accepted,
        )
    ]
    tokens = requests * max_tokens
    return tokens / len(passes), sum(made.width for made in passes) / tokens
