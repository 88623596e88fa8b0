"""A response as it is decoded: what a page that is watching has to be told with each pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from vllm_refusion.viewer.timeline import History, Pass


class Live:
    """Turns passes and delivered tokens into changes of a page, which are plain JSON.

    A change has ``pass`` (as in ``Timeline.data``) and ``positions``: by number, what is new of
    each: ``e`` its events, ``r`` and ``kv``, and ``text`` once it is known what the token adds to
    the text before it.

    Args:
        alone: the text of a token that is decoded alone.
        piece: the text that the next token of the output adds to those before it.
    """

    def __init__(
        self, slot_size: int, alone: Callable[[int], str], piece: Callable[[int], str]
    ) -> None:
        self._alone, self._piece = cache(alone), piece
        self._history = History(self._text, slot_size)
        self._output: list[int] = []
        self._pieces: list[str] = []
        self._told: dict[int, int] = {}  # events of each position
        self.delivered = 0  # tokens, according to the passes

    def play(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The change that a pass makes."""
        self._history.play(entry)
        self.delivered += entry["delivered"]
        made = self._history.passes[-1]
        return {"pass": _pass(made), "positions": self._changes()}

    def deliver(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The change that further tokens of the output make."""
        first = len(self._output)
        self._output += tokens
        self._pieces += map(self._piece, tokens)
        return {
            "positions": {p: {"text": self._pieces[p]} for p in range(first, len(self._output))}
        }

    def end(self) -> dict[str, Any]:
        """The change once the output is complete: nothing stays open behind it."""
        self._history.drop(len(self._history.passes), len(self._output))
        decoding = sum(made.decodes for made in self._history.passes)
        return {
            "positions": self._changes(),
            "delivered": len(self._output),
            "forward_passes": decoding,
        }

    def _text(self, position: int, token: int) -> str:
        if position < len(self._output) and self._output[position] == token:
            return self._pieces[position]
        return self._alone(token)

    def _changes(self) -> dict[int, dict[str, Any]]:
        changes = {}
        for number in sorted(self._history.take_touched()):
            position, told = self._history.positions[number], self._told.get(number, 0)
            changes[number] = {"r": position.round, "kv": position.kv, "e": position.events[told:]}
            self._told[number] = len(position.events)
        return changes


def token_change(position: int, text: str, seconds: float) -> dict[str, Any]:
    """The change that a token of a model makes which decodes one after another."""
    made = Pass(["token"], 1, 0, round(seconds, 6), position + 1, [position])
    event = (position + 1, "committed", text, None)
    place = {"r": position + 1, "kv": position, "e": [event], "text": text}
    return {"pass": _pass(made), "positions": {position: place}}


def _pass(made: Pass) -> dict[str, Any]:
    return vars(made) | {"decodes": made.decodes}
