"""Benchmark results as one self-contained page: no network, no script."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from vllm_refusion.bench import report
from vllm_refusion.bench.report import Level, Result

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 16, 44
COLOURS = 8  # in the style sheet
MARKERS = ("circle", "square", "triangle", "diamond")
Series = dict[str, dict[int, float]]  # by engine and concurrency


class Chart(NamedTuple):
    """A figure over concurrency. ``one``: a line at 1, which is stock decoding."""

    heading: str
    key: str
    unit: str
    logarithmic: bool = False
    one: bool = False


CHARTS = (
    Chart("Output tokens per second", "tokens_per_s", "tokens/s", logarithmic=True),
    Chart("Times stock decoding", "speedup", "x stock", logarithmic=True, one=True),
    Chart("Time to first token", "ttft_ms", "ms", logarithmic=True),
    Chart("Tokens per forward pass", "tokens_per_forward", "tokens"),
)
MOVING_CHARTS = (
    CHARTS[0],
    Chart("Gap between deliveries, 99th percentile", "gap_ms_p99", "ms", logarithmic=True),
)


def page(results: Sequence[Result]) -> str:
    """The page of all results."""
    style = (files(__package__) / "report.css").read_text(encoding="utf-8")
    sections = "\n".join(_section(result, number) for number, result in enumerate(results))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>ReFusion against stock decoding</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>ReFusion against stock decoding</h1>
<p class="note">Measured by <code>vllm-refusion bench</code>: the same vLLM, GPU, prompts and
lengths on both sides; what differs is under “Settings”. Concurrency is the number of requests that
are decoded at once.</p>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _section(result: Result, number: int) -> str:
    levels = _named(level for level in report.levels_of(result) if level.get("canvas") is None)
    # stock decoding first, which everything is measured against
    names = list(
        dict.fromkeys(level["name"] for level in sorted(levels, key=lambda x: x["side"] != "stock"))
    )
    crossings = _crossovers(levels)
    heading = report.heading(result).strip("*")
    what, _, rest = heading.partition(" · ")
    charts = "".join(
        _figure(chart, found, names, crossings)
        for chart in CHARTS
        if (found := _series(levels, chart.key))
    )
    failed = "".join(
        f'<p class="failed">{escape(side["side"])} failed: {escape(str(side["error"]))}</p>'
        for side in result["sides"]
        if side.get("error")
    )
    return f"""<section aria-labelledby="result-{number}">
<h2 id="result-{number}">{escape(what)}</h2>
<p class="note">{escape(rest)}</p>
{_headline(levels, crossings)}{failed}
{_legend(names) if charts else ""}<div class="charts">{charts}</div>
{_table(levels, names)}
{_moving(result)}
{_settings(result)}
</section>"""


def _named(levels: Iterable[Level]) -> list[Level]:
    """Levels with a ``name`` of their series: of the same preset, each acceptance has one."""
    found = list(levels)
    kinds: dict[str, set[str]] = {}
    for level in found:
        kinds.setdefault(report.name_of(level), set()).add(level["acceptance"])
    named = []
    for level in found:
        name = report.name_of(level)
        if len(kinds[name]) > 1:
            name += f" {level['acceptance'].removeprefix('replayed acceptance ')}"
        named.append(level | {"name": name})
    return named


def _crossovers(levels: Sequence[Level]) -> dict[str, float | None]:
    """``report.crossover`` of each series but stock decoding's, if that was measured."""
    speeds = _series(levels, "tokens_per_s")
    sides = {level["name"]: level["side"] for level in levels}
    stock = next((speeds[name] for name in speeds if sides[name] == "stock"), None)
    if stock is None:
        return {}
    others = {name: speed for name, speed in speeds.items() if sides[name] != "stock"}
    return {name: report.crossover(stock, speed) for name, speed in others.items()}


def _headline(levels: Sequence[Level], crossings: Mapping[str, float | None]) -> str:
    """Of each preset, in words: its best speed, and where stock decoding is faster."""
    lines = []
    for name, at in crossings.items():
        own = [level for level in levels if level["name"] == name and "speedup" in level]
        if not own:
            continue
        first = min(own, key=lambda level: level["concurrency"])
        count = first["concurrency"]
        lines.append(
            f"<li><strong>{escape(name)}</strong>: {first['speedup']:.2f}× stock decoding with "
            f"{count} request{'s' if count > 1 else ''} at once; {escape(_where(at))}.</li>"
        )
    replayed = any("replayed" in str(level["acceptance"]) for level in levels)
    note = ""
    if replayed:
        note = (
            '<p class="note">Weights are dummies: what is accepted is drawn at random with the '
            "chances in the table (replayed acceptance); every pass, kernel and copy is real.</p>"
        )
    return (f'<ul class="headline">{"".join(lines)}</ul>' if lines else "") + note


def _where(at: float | None) -> str:
    if at is None:
        return "at no measured concurrency slower"
    return f"stock is faster from {at:.0f} on" if at else "slower at every measured concurrency"


def _series(levels: Sequence[Level], key: str) -> Series:
    found: Series = {}
    for level in levels:
        value = level.get(key)
        if isinstance(value, int | float) and math.isfinite(value) and value > 0:
            found.setdefault(level["name"], {})[level["concurrency"]] = value
    return found


def _legend(names: Sequence[str]) -> str:
    entries = "".join(
        f'<li><svg width="30" height="14" aria-hidden="true" class="c{number % COLOURS}">'
        f'<path class="line" d="M2 7H28"/>{_marker(15, 7, number)}</svg>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{entries}</ul>'


def _figure(
    chart: Chart, found: Series, names: Sequence[str], crossings: Mapping[str, float | None]
) -> str:
    """An SVG of the series over concurrency; the table below has its numbers."""
    counts = sorted({count for series in found.values() for count in series})
    values = [value for series in found.values() for value in series.values()]
    if chart.one:
        values.append(1.0)
    x = _scale([float(c) for c in counts], LEFT, WIDTH - RIGHT, True)
    parts, y = _axes(chart, values, x, counts, "concurrent requests")
    if chart.one:
        parts.append(f'<path class="one" d="M{LEFT} {y(1):.1f}H{WIDTH - RIGHT}"/>')
    if chart.key in ("tokens_per_s", "speedup"):
        parts += _marks(crossings, names, x)
    for number, name in enumerate(names):
        if name in found:
            parts.append(_line(found[name], x, y, number, f"{name}: {{}} {chart.unit}"))
    return _svg(chart, f"{chart.heading} over concurrency; the table has the numbers", parts)


def _moving(result: Result) -> str:
    """Figures over time of a load that moves."""
    runs = report.moving_of(result)
    if not runs:
        return ""
    figures = []
    for chart in MOVING_CHARTS:
        found: dict[str, dict[float, float]] = {
            name: {at["at_s"]: value for at in bins if (value := at[chart.key])}
            for name, bins in runs.items()
        }
        last = max(at for series in found.values() for at in series)
        ticks = _ticks(0, last, False)
        x = _scale([0.0, ticks[-1]], LEFT, WIDTH - RIGHT, False)
        values = [value for series in found.values() for value in series.values()]
        parts, y = _axes(chart, values, x, ticks, "seconds")
        for number, series in enumerate(found.values()):
            path = "M" + "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value in series.items())
            parts.append(f'<g class="c{number % COLOURS}"><path class="line" d="{path}"/></g>')
        figures.append(_svg(chart, f"{chart.heading} over time", parts))
    phases = ", then ".join(f"{count} for {s:g} s" for count, s in result["settings"]["phases"])
    return f"""<h3>A load that moves</h3>
<p class="note">Requests at once: {phases}.</p>
{_legend(list(runs))}<div class="charts">{"".join(figures)}</div>"""


def _axes(
    chart: Chart,
    values: Sequence[float],
    x: Callable[[float], float],
    x_ticks: Sequence[float],
    x_label: str,
) -> tuple[list[str], Callable[[float], float]]:
    """Grid and labels, and the scale of values."""
    ticks = _ticks(min(values), max(values), chart.logarithmic)
    y = _scale([ticks[0], ticks[-1]], HEIGHT - BOTTOM, TOP, chart.logarithmic)
    parts = [
        f'<path class="grid" d="M{LEFT} {y(t):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{_short(t)}</text>'
        for t in ticks
    ]
    parts += [
        f'<text x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{t:g}</text>'
        for t in x_ticks
    ]
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{x_label}</text>"
    )
    return parts, y


def _svg(chart: Chart, label: str, parts: Sequence[str]) -> str:
    return (
        f"<figure><figcaption>{escape(chart.heading)} "
        f'<span class="note">{escape(chart.unit)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _line(
    series: Mapping[int, float],
    x: Callable[[float], float],
    y: Callable[[float], float],
    number: int,
    title: str,
) -> str:
    points = [(x(count), y(value), count, value) for count, value in sorted(series.items())]
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py, *_ in points)
    marks = "".join(
        f"<g>{_marker(px, py, number)}<title>{escape(title.format(_short(value)))} at {count}"
        "</title></g>"
        for px, py, count, value in points
    )
    return f'<g class="c{number % COLOURS}"><path class="line" d="{path}"/>{marks}</g>'


def _marks(
    crossings: Mapping[str, float | None], names: Sequence[str], x: Callable[[float], float]
) -> list[str]:
    """Where stock decoding becomes faster, as upright lines."""
    marks: list[str] = []
    for name, at in crossings.items():
        if at and name in names:
            place, number = x(at), names.index(name)
            near = place > WIDTH - RIGHT - 40
            side, anchor = (-4, "end") if near else (4, "start")
            down = TOP + 12 + 14 * (len(marks) % 4)
            marks.append(
                f'<g class="c{number % COLOURS}"><path class="crossing" '
                f'd="M{place:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
                f'<text x="{place + side:.1f}" y="{down}" text-anchor="{anchor}" '
                f'class="strong">{at:.0f}</text></g>'
            )
    return marks


def _marker(x: float, y: float, number: int) -> str:
    kind = MARKERS[number % len(MARKERS)]
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if kind == "square":
        return f'<path d="M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2z"/>'
    if kind == "triangle":
        return f'<path d="M{x:.1f} {y - 5:.1f}l4.6 8.4h-9.2z"/>'
    return f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"/>'


def _scale(
    values: Sequence[float], start: float, end: float, logarithmic: bool
) -> Callable[[float], float]:
    of: Callable[[float], float] = math.log if logarithmic else float
    low, high = of(min(values)), of(max(values))
    span = (high - low) or 1.0
    middle = 0.5 if high == low else 0.0
    return lambda value: start + (end - start) * ((of(value) - low) / span + middle)


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``; without logarithms from 0."""
    if logarithmic:
        steps = [m * 10.0**e for e in range(-4, 9) for m in (1, 2, 5)]
        first = max(i for i, step in enumerate(steps) if step <= low)
        last = min(i for i, step in enumerate(steps) if step >= high)
        return steps[first : max(last, first + 1) + 1]
    size = 10.0 ** math.floor(math.log10(high))
    step = next(size * m for m in (0.2, 0.5, 1, 2) if high / (size * m) <= 6)
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}"


def _table(levels: Sequence[Level], names: Sequence[str]) -> str:
    used = [c for c in report.COLUMNS if any(level.get(c[1]) is not None for level in levels)]
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading, *_ in used)
    rows = []
    for level in sorted(
        levels, key=lambda level: (level["concurrency"], names.index(level["name"]))
    ):
        cells = "".join(
            f"<td>{text.format(level[key]) if level.get(key) is not None else ''}</td>"
            for _, key, text in used
        )
        stock = ' class="stock"' if level["side"] == "stock" else ""
        rows.append(
            f"<tr{stock}><td>{level['concurrency']}</td>"
            f'<th scope="row">{escape(level["name"])}</th>{cells}'
            f'<td class="words">{escape(str(level["acceptance"]))}</td></tr>'
        )
    return (
        '<div class="table" tabindex="0" role="region" aria-label="All levels"><table><thead><tr>'
        f'<th scope="col">concurrency</th><th scope="col">engine</th>{head}'
        f'<th scope="col">acceptance</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _settings(result: Result) -> str:
    """All that the result says of how it was measured, as it stands there."""
    sides = "".join(
        f"<h3>{escape(side['side'])}</h3><pre>"
        f"{escape(_pretty({k: v for k, v in side.items() if k not in ('levels', 'moving')}))}</pre>"
        for side in result["sides"]
    )
    about = {key: value for key, value in result.items() if key != "sides"}
    return (
        f"<details><summary>Settings</summary><pre>{escape(_pretty(about))}</pre>{sides}</details>"
    )


def _pretty(value: Any) -> str:
    """JSON, short lists on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    for numbers in [v for v in _lists(value) if len(v) > 1]:
        long = json.dumps(numbers, indent=1, ensure_ascii=False).split("\n")
        for indent in range(1, 8):
            block = "\n".join([long[0], *(" " * indent + line for line in long[1:])])
            text = text.replace(block, json.dumps(numbers))
    return text


def _lists(value: Any) -> list[list[Any]]:
    """The lists of plain numbers and words in it."""
    if isinstance(value, dict):
        return [found for one in value.values() for found in _lists(one)]
    if isinstance(value, list):
        if not any(isinstance(one, dict | list) for one in value):
            return [value]
        return [found for one in value for found in _lists(one)]
    return []
