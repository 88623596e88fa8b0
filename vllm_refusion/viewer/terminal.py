"""A trace in the terminal, with rich: the response filling in, then one line a pass."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_refusion.viewer.timeline import Timeline

ROUND_STYLES = ("green", "magenta", "yellow", "cyan", "red", "blue")
STYLES = {"draft": "italic dim", "accepted": "underline", "cut": "strike dim"}


def show(
    timeline: Timeline, until: int | None, speed: float, console: Console | None = None
) -> None:
    """Plays the timeline where there is a terminal, then prints its end and all passes.

    Args:
        until: print the state after this pass instead.
        speed: 1 is the recorded speed.
    """
    console = console or Console()
    if until is not None:
        console.print(frame(timeline, until))
        return
    last = len(timeline.passes)
    if console.is_terminal:
        with Live(frame(timeline, 0), console=console, transient=True) as live:
            before = 0.0
            for number, entry in enumerate(timeline.passes, 1):
                time.sleep((entry.end - before) / speed)
                before = entry.end
                live.update(frame(timeline, number), refresh=True)
    console.print(frame(timeline, last))
    console.print(_passes(timeline))
    console.print(timeline.summary())


def frame(timeline: Timeline, number: int) -> Group:
    """The response after pass ``number``, 0 for before the first."""
    text = Text()
    for index, position in enumerate(timeline.positions):
        event = position.at(number)
        if event is None or event.state == "masked":
            text.append("░")
        elif event.state == "committed":
            cut = " strike" if index >= timeline.delivered else ""
            text.append(event.text, f"{_round_style(position.round)}{cut}")
        elif event.state != "dropped":
            text.append(event.text, STYLES[event.state])
    entry = timeline.passes[number - 1] if number else None
    title = f"pass {number} of {len(timeline.passes)}"
    if entry:
        title += f": {' + '.join(entry.kinds)}, {entry.rows} rows, {entry.end:.2f} s"
    return Group(Panel(text, title=title, title_align="left"))


def _round_style(number: int | None) -> str:
    return ROUND_STYLES[((number or 1) - 1) % len(ROUND_STYLES)]


def _passes(timeline: Timeline) -> Table:
    table = Table("pass", "what", "rows", "committed", "", "until", box=None, pad_edge=False)
    most = max(len(entry.committed) for entry in timeline.passes) or 1
    for number, entry in enumerate(timeline.passes, 1):
        count = len(entry.committed)
        position = timeline.positions[entry.committed[0]] if count else None
        bar = Text("█" * -(-24 * count // most), _round_style(position.round if position else None))
        kinds = " + ".join(entry.kinds)
        table.add_row(str(number), kinds, str(entry.rows), str(count), bar, f"{entry.end:.2f} s")
    return table
