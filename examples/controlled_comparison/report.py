"""Tables (Markdown, JSON) and a plot of what a folder of results holds so far."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from variants import MAIN, RECOMPUTED, SAME_TEXT, SIZES

Row = dict[str, Any]


def read_lines(paths: Iterable[Path]) -> list[Row]:
    return [json.loads(line) for path in sorted(paths) for line in path.read_text().splitlines()]


def collect(folder: Path) -> dict[str, Any]:
    """Everything the tables say. Variants are compared on the problems that all of a table had."""
    decoded = defaultdict(dict)  # (variant, seed) -> problem -> line
    for line in read_lines(folder.glob("decoded-*.jsonl")):
        decoded[line["variant"], line["seed"]][line["problem"]] = line
    path = folder / "about.json"
    about = json.loads(path.read_text()) if path.exists() else {}
    for name, source in SAME_TEXT.items():
        for seed in {seed for variant, seed in decoded if variant == source}:
            whole = {"passes": about["longest response"]}  # one token a pass, all of them
            decoded[name, seed] = {n: v | whole for n, v in decoded[source, seed].items()}
    timed = defaultdict(list)
    for line in read_lines(folder.glob("timed.jsonl")):
        timed[line["variant"]].append(line["seconds"])
    trained = [json.loads(path.read_text()) for path in sorted(folder.glob("trained-*.json"))]
    return {
        "about": about,
        "trained": trained,
        "main": _table(decoded, MAIN, timed),
        "slot size and block length": _table(decoded, SIZES, {}),
        "KV reuse": _table(
            decoded, [n for name in RECOMPUTED for n in (name.split(",")[0], name)], timed
        ),
    }


def _table(decoded: dict, names: Iterable[str], timed: dict[str, list[float]]) -> dict[str, Any]:
    names = list(names)
    runs = {key: lines for key, lines in decoded.items() if key[0] in names}
    common = set.intersection(*map(set, runs.values())) if runs else set()
    rows = {}
    for name in names:
        seeds = sorted(seed for variant, seed in runs if variant == name)
        if not seeds and name not in timed:
            continue
        lines = {seed: [runs[name, seed][n] for n in common] for seed in seeds}
        row: Row = {"seeds": seeds}
        if common and seeds:
            row["right"] = [mean(line["right"] for line in lines[s]) for s in seeds]
            row["tokens_per_forward"] = [
                sum(line["tokens"] for line in lines[s]) / sum(line["passes"] for line in lines[s])
                for s in seeds
            ]
        if name in timed:
            row["seconds"] = mean(timed[name])
            row["problems_timed"] = len(timed[name])
        rows[name] = row
    return {"problems": len(common), "rows": rows}


def _spread(values: Sequence[float] | None, pattern: str, scale: float = 1) -> str:
    if not values:
        return "-"
    each = ", ".join(pattern.format(scale * value) for value in values)
    return f"{pattern.format(scale * mean(values))} ({each})" if len(values) > 1 else each


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _decoding_table(table: dict[str, Any], notes: bool) -> str:
    baseline = table["rows"].get("autoregressive", {}).get("seconds")
    head = ["", "right, % (by seed)", "tokens per forward (by seed)", "seconds a problem"]
    rows = []
    for name, row in table["rows"].items():
        seconds = f"{row['seconds']:.3f}" if "seconds" in row else "-"
        if baseline and "seconds" in row:
            seconds += f" ({baseline / row['seconds']:.2f}x)"
        note = MAIN[name].note if notes and name in MAIN else ""
        rows.append(
            [
                f"{name} ({note})" if note else name,
                _spread(row.get("right"), "{:.0f}", 100),
                _spread(row.get("tokens_per_forward"), "{:.2f}"),
                seconds,
            ]
        )
    return f"{table['problems']} problems.\n\n{_markdown_table(head, rows)}"


def _training_table(trained: Sequence[Row]) -> str:
    head = ["", "seed", "steps", "data tokens", "positions fed", "seconds", "last loss"]
    rows = []
    for run in trained:
        steps = f"{run['steps']}"
        if run["steps"] != run["steps_wanted"]:
            steps += f" of {run['steps_wanted']}: out of time"
        counts = [f"{run[key] / 1e6:.1f}M" for key in ("data_tokens", "positions")]
        last = f"{run['losses'][-1][1]:.3f}" if run["losses"] else "-"
        rows.append(
            [run["method"], str(run["seed"]), steps, *counts, f"{run['seconds']:.0f}", last]
        )
    return _markdown_table(head, rows)


def _beyond_main(table: dict[str, Any]) -> bool:
    return not set(table["rows"]) <= set(MAIN)


def markdown(results: dict[str, Any]) -> str:
    about = ", ".join(f"{key}: {value}" for key, value in results["about"].items())
    parts = [about, "## Decoding", _decoding_table(results["main"], notes=True)]
    titles = {
        "slot size and block length": "Slot size / block length of ReFusion (thresholds 0.9/0.4)",
        "KV reuse": "KV reuse against recomputation with full context",
    }
    for key, title in titles.items():
        if _beyond_main(results[key]):
            parts += [f"## {title}", _decoding_table(results[key], notes=False)]
    return "\n\n".join([*parts, "## Training", _training_table(results["trained"]), ""])


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy over tokens per forward: methods left, slot sizes and block lengths right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = ["main", "slot size and block length"]
    keys = [key for key in keys if key == "main" or _beyond_main(results[key])]
    figure, axes = pyplot.subplots(
        1, len(keys), figsize=(9 * len(keys), 4.8), sharey=True, layout="constrained", squeeze=False
    )
    for axis, key in zip(axes[0], keys):
        for number, (name, row) in enumerate(results[key]["rows"].items(), 1):
            if not row.get("right"):
                continue
            x, y = row["tokens_per_forward"], [100 * value for value in row["right"]]
            label = name if key == "main" else name.removeprefix("ReFusion ")
            (line,) = axis.plot(x, y, "o", markersize=4, label=f"{number} {label}")
            at = mean(x), mean(y)
            axis.plot(*at, "_", markersize=14, color=line.get_color())
            axis.annotate(str(number), at, (4, 4), textcoords="offset points", size=7)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:.2g}" if key == "main" else "{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.set_xlabel("tokens per forward pass")
        axis.set_title(key if key != "main" else "decoders", size=10)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("problems right, %")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(folder: Path, output: Path) -> None:
    """results.json, results.md and results.png in ``output``."""
    results = collect(folder)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "results.md").write_text(markdown(results))
    plot(results, output / "results.png")
