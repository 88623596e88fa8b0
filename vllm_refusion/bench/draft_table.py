"""What serial decoding makes of rows at a price, without a model or a GPU.

Drives the twin of the state machine (``triton_kernels/serial_twin.py``) with drawn acceptance, and
prints the table of ``decoding/draft_price.py``:

    python -m vllm_refusion.bench.draft_table
"""

from __future__ import annotations

import argparse
from collections.abc import Collection

from vllm_refusion.bench.simulate import CANVAS, MASK, PROMPT, VOCAB, Batch, Columns, run_passes
from vllm_refusion.decoding.draft_price import ACCEPTANCES, PRICES
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.speculation import (
    ALL_DRAFTING,
    CERTAIN,
    Drafting,
    Speculation,
    prior_of,
)
from vllm_refusion.decoding.state import Counter, DecodeState
from vllm_refusion.engine.acceptance import Profile, build_tables, seed_of
from vllm_refusion.triton_kernels.serial_twin import serial_transition_twin


def decode_serially(
    params: DecodingParams,
    acceptance: float,
    price: float,
    *,
    max_tokens: int = 512,
    requests: int = 8,
    skips_known: bool = False,
    drafting: Collection[Drafting] = ALL_DRAFTING,
) -> tuple[float, float]:
    """Tokens of a pass and rows of a pass, drafts being right with a mean chance.

    Args:
        price: of a row, in tokens.
        skips_known: see ``DecodeState.add_serial``.
        drafting: where drafts may come from.
    """
    state = DecodeState(requests, CANVAS, params.budget(max_tokens), MASK, "cpu")
    tables = build_tables([Profile(slot=1.0, token=acceptance)], VOCAB, (), "cpu")
    for req in range(requests):
        state.add_serial(
            req, PROMPT, params, max_tokens, None,
            last_token=1, seed=seed_of(0, req), skips_known=skips_known,
        )  # fmt: skip
    speculation = Speculation(row_price=round(CERTAIN * price), prior=prior_of(acceptance))

    def transition(batch: Batch, statistics: Columns, results: Columns) -> None:
        serial_transition_twin(*batch, *statistics[:2], *results, speculation, drafting)

    run_passes(state, tables, transition)
    counts = state.counters
    passes = int(counts[Counter.SERIAL])
    return int(counts[Counter.TOKENS]) / passes, int(counts[Counter.ROWS_FED]) / passes


def table(max_tokens: int, requests: int) -> str:
    """The constants TOKENS and ROWS: a line for each acceptance, a value for each price."""
    params = DecodingParams(mode="serial", slot_start="next")
    points = [
        [decode_serially(params, a, p, max_tokens=max_tokens, requests=requests) for p in PRICES]
        for a in ACCEPTANCES
    ]
    lines = []
    for name, part in (("TOKENS", 0), ("ROWS", 1)):
        values = [", ".join(f"{point[part]:.2f}" for point in of_price) for of_price in points]
        lines += [
            f"{name} = np.array(",
            "    (",
            *(f"        ({line})," for line in values),
            "    )",
            ")",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--requests", type=int, default=16)
    print(table(**vars(parser.parse_args())))
