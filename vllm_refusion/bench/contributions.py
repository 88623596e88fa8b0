"""What each way of saving passes saves on its own, without a model or a GPU.

Drives the twin of the state machine (``triton_kernels/transition_twin.py``) with drawn
acceptance and prints a Markdown table:

    python -m vllm_refusion.bench.contributions
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import NamedTuple

import torch

from vllm_refusion.bench.command import CALIBRATED, parse_preset
from vllm_refusion.bench.draft_table import decode_serially
from vllm_refusion.bench.simulate import (
    CANVAS,
    MASK,
    PROMPT,
    VOCAB,
    Batch,
    Columns,
    run_passes,
    tokens_per_forward,
)
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.speculation import (
    ALL_DRAFTING,
    ALL_SAVINGS,
    NO_RIDERS,
    Drafting,
    Saving,
    Speculation,
)
from vllm_refusion.decoding.state import Counter, DecodeState
from vllm_refusion.engine.acceptance import Profile, build_tables, seed_of
from vllm_refusion.triton_kernels.transition_twin import transition_twin

PRESETS = ("32/128/0.9/0.4", "8/16/0.8/0.2")
CONCURRENCY = {"low": Speculation(128, 300), "high": Speculation(2, 8)}
SERIAL_PRICES = (0.02, 0.1, 0.2)  # about those of 1, 8 and 64 requests
SERIAL_CHANCE = 0.866
ALL_THAT_FIT = Speculation(CANVAS, 0)


RIDERS = ALL_SAVINGS - {Saving.PIECES}


class Counts(NamedTuple):
    """Of all requests; rows with those of a plan behind the prompt, prompts excluded.

    Attributes:
        responses: [requests, max_tokens] int32.
    """

    passes: int
    rows: int
    responses: torch.Tensor

    @property
    def figures(self) -> tuple[float, float]:
        """Tokens per pass, rows fed per token."""
        tokens = self.responses.numel()
        return tokens / self.passes, self.rows / tokens


def decode(
    params: DecodingParams,
    profile: Profile,
    speculation: Speculation,
    savings: Collection[Saving],
    *,
    max_tokens: int = 512,
    requests: int = 8,
) -> Counts:
    """Decodes requests with the twin, saving passes in the given ways only."""
    state = DecodeState(requests, CANVAS, params.budget(max_tokens), MASK, "cpu")
    tables = build_tables([profile], VOCAB, (), "cpu")
    for req in range(requests):
        state.add(req, PROMPT, params, max_tokens, None, seed=seed_of(0, req))
    plans_first = Saving.FIRST_PLAN in savings
    behind_prompts = params.first_rows(max_tokens) if plans_first else 0

    def transition(batch: Batch, statistics: Columns, results: Columns) -> None:
        emit_limit = torch.full_like(results[1], max_tokens)
        transition_twin(*batch, *statistics, emit_limit, *results, speculation, savings)

    run_passes(state, tables, transition, with_prompts=plans_first)
    counts = state.counters.tolist()
    kinds = (Counter.PLAN, Counter.VERIFY, Counter.PREDICT, Counter.INFILL_VERIFY)
    rows = counts[Counter.ROWS_FED] + requests * behind_prompts
    assert counts[Counter.IDLE] == 0 and counts[Counter.TOKENS] == requests * max_tokens
    return Counts(sum(counts[kind] for kind in kinds), rows, state.response[:, :max_tokens])


def table(max_tokens: int, requests: int, presets: Collection[str] = PRESETS) -> str:
    """A column per preset and concurrency: tokens per pass, rows per token, share of passes."""
    schedules: dict[str, Collection[Saving]] = {saving.value: {saving} for saving in Saving}
    schedules |= {"1 to 4": RIDERS, "1 to 5, the default": ALL_SAVINGS}
    head = ["schedule", *(f"{name}, {level}" for name in presets for level in CONCURRENCY)]
    lines: dict[str, list[str]] = {}
    size = {"max_tokens": max_tokens, "requests": requests}
    for name in presets:
        chances = Profile(*CALIBRATED[name])
        params = DecodingParams(**parse_preset(name).parameters)
        fed_again = tokens_per_forward(params, chances, keeps_accepted=False, **size)
        plain = decode(params, chances, NO_RIDERS, (), **size).figures
        every = decode(params, chances, ALL_THAT_FIT, RIDERS, **size).figures
        for speculation in CONCURRENCY.values():
            column = {"plain, accepted tokens fed again": fed_again, "plain": plain}
            for schedule, savings in schedules.items():
                column[schedule] = decode(params, chances, speculation, savings, **size).figures
            column["1 to 4, every rider that fits"] = every
            for schedule, (tokens, fed) in column.items():
                cell = f"{tokens:.2f}, {fed:.1f}, {plain[0] / tokens:.2f}"
                lines.setdefault(schedule, [schedule]).append(cell)
    rows = [head, ["---"] * len(head), *lines.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def serial_table(max_tokens: int, requests: int) -> str:
    """Serial decoding, a column per price of a row: tokens and rows per pass."""
    ways: dict[str, Collection[Drafting]] = {"all": ALL_DRAFTING}
    ways |= {f"without {way.value}": ALL_DRAFTING - {way} for way in Drafting}
    ways |= {f"only {Drafting.AHEAD.value}": {Drafting.AHEAD}, "none": ()}
    rows = [["drafts", *(f"at {price} tokens a row" for price in SERIAL_PRICES)]]
    rows.append(["---"] * len(rows[0]))
    params = DecodingParams(mode="serial", slot_size=8)
    for name, drafting in ways.items():
        cells = []
        for price in SERIAL_PRICES:
            tokens, fed = decode_serially(
                params,
                SERIAL_CHANCE,
                price,
                max_tokens=max_tokens,
                requests=requests,
                drafting=drafting,
            )
            cells.append(f"{tokens:.2f}, {fed:.1f}")
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--requests", type=int, default=8)
    size = vars(parser.parse_args())
    print(table(**size), serial_table(**size), sep="\n\n")
