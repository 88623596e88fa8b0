"""The tables: what was measured, the paper's figures beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import BENCHMARKS, STOCK, VARIANTS, Benchmark

Cells = Mapping[tuple[str, str], Mapping[str, Any]]  # by variant and task


def merged(cells: Cells, variant: str, benchmark: Benchmark) -> dict[str, float] | None:
    """All tasks of a benchmark as one; None if one is missing."""
    parts = [cells.get((variant, task)) for task in benchmark.tasks]
    if not all(parts):
        return None
    names = ("problems", "tokens", "seconds", "passes")
    sums: dict[str, float] = {name: sum(part[name] for part in parts) for name in names}  # type: ignore[index]
    right = sum(part["score"] * part["problems"] for part in parts)  # type: ignore[index]
    return {**sums, "score": right / sums["problems"]}


def _score(cell: Mapping[str, float]) -> str:
    share, problems = cell["score"], cell["problems"]
    error = math.sqrt(share * (1 - share) / problems)
    return f"{100 * share:.2f} ± {100 * error:.1f}"


def _speed(cell: Mapping[str, float]) -> str:
    return f"{cell['tokens'] / cell['seconds']:.1f}" if cell["seconds"] else "-"


def _per_forward(cell: Mapping[str, float]) -> str:
    return f"{cell['tokens'] / cell['passes']:.2f}" if cell["passes"] else "-"


def tables(cells: Cells, variants: Sequence[str], presets: Sequence[str], about: str) -> str:
    """Markdown; what is not measured yet is a dash."""
    columns = [BENCHMARKS[preset] for preset in presets]
    head = [" | ".join(["|", *(b.title for b in columns), ""]).strip()]
    head.append("|" + "---|" * (len(columns) + 1))

    def row(name: str, values: Sequence[str]) -> str:
        return f"| {name} | " + " | ".join(values) + " |"

    def measured(show: Callable[[Mapping[str, float]], str]) -> list[str]:
        lines = []
        for variant in variants:
            found = [merged(cells, variant, benchmark) for benchmark in columns]
            lines.append(row(VARIANTS[variant], [show(cell) if cell else "-" for cell in found]))
        return lines

    paper, stock = f"*paper*, {VARIANTS['propose']}", f"*paper*, {VARIANTS[STOCK]}"
    parts = [
        *("Score, %, and its standard error:", "", *head, *measured(_score)),
        row(paper, [f"{b.score:.2f}" for b in columns]),
        *("", "Tokens/s of a request, from its arrival to its end:", "", *head, *measured(_speed)),
        row(paper, [f"{b.speed:.2f}" for b in columns]),
        row(stock, [f"{b.stock_speed:.2f}" for b in columns]),
        *("", "Tokens per forward pass:", "", *head, *measured(_per_forward)),
        *("", about, ""),
    ]
    return "\n".join(parts)
