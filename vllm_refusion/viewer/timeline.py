"""What a viewer shows of a trace: the history of every response position, pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vllm_refusion.files import read_json
from vllm_refusion.viewer.record import FORMAT, VERSION

NOT_DECODING = {"prefill", "replay", "idle"}


class Event(NamedTuple):
    """From the end of pass ``at`` (1 is the first) a position is in ``state``.

    States: ``draft`` (drafted or proposed), ``accepted``, ``refused`` (in serial mode: another
    token took its place, in the same pass), ``committed``, ``masked`` (put back), ``dropped``
    (behind the end), ``cut`` (committed, then dropped). ``probability`` is that of the pick for a
    draft, a correction and a token committed in serial mode, of the test for an accepted one; None
    for what had none.
    """

    at: int
    state: str
    text: str
    probability: float | None


@dataclass
class Pass:
    """One forward pass.

    ``end`` is its end in seconds; ``round`` counts the plans up to it, in serial mode the passes.
    """

    kinds: list[str]
    rows: int
    riders: int  # of the rows
    end: float
    round: int
    committed: list[int] = field(default_factory=list)  # positions, in KV order

    @property
    def decodes(self) -> bool:
        """Whether it counts among the passes per token: those of the prompt do not."""
        return not set(self.kinds) & NOT_DECODING


@dataclass
class Position:
    """A response position. ``round`` is the one that committed it, ``kv`` its KV index behind the
    prompt; both None if it never was committed."""

    events: list[Event] = field(default_factory=list)
    round: int | None = None
    kv: int | None = None

    def at(self, number: int) -> Event | None:
        """The last event up to the end of that pass; None while the position is masked."""
        return next((event for event in reversed(self.events) if event.at <= number), None)


@dataclass
class Timeline:
    """One request of a trace, ready to be shown."""

    model: str
    device: str
    prompt: str
    parameters: Mapping[str, Any]
    text: str
    passes: list[Pass]
    positions: list[Position]
    delivered: int  # tokens of the output; positions behind it are cut off
    autoregressive: Mapping[str, Any] | None

    @classmethod
    def of(cls, trace: Mapping[str, Any], request: Mapping[str, Any]) -> Timeline:
        """The timeline of one of the trace's requests."""
        tokens, pieces = request["output"]["tokens"], request["output"]["pieces"]

        def text(position: int, token: int) -> str:
            if position < len(tokens) and tokens[position] == token:
                return pieces[position]
            return trace["vocabulary"][str(token)]

        history = History(text, request["parameters"]["slot_size"])
        for entry in request["passes"]:
            history.play(entry)
        if request["parameters"]["mode"] == "serial":
            history.drop(len(history.passes), len(tokens))
        return cls(
            model=trace["model"],
            device=trace["device"],
            prompt=request["prompt"]["text"],
            parameters=request["parameters"],
            text=request["output"]["text"],
            passes=history.passes,
            positions=history.positions,
            delivered=len(tokens),
            autoregressive=request.get("autoregressive"),
        )

    @cached_property
    def decoding_passes(self) -> int:
        return sum(entry.decodes for entry in self.passes)

    @property
    def seconds(self) -> float:
        return self.passes[-1].end

    def summary(self) -> str:
        """Tokens, passes and time in one line; also the autoregressive twin's."""
        per_pass = self.delivered / self.decoding_passes
        line = (
            f"{self.delivered} tokens in {self.decoding_passes} forward passes "
            f"({per_pass:.1f} per pass), {self.seconds:.2f} s on {self.device}"
        )
        if self.autoregressive:
            seconds = self.autoregressive["seconds"]
            line += f"; autoregressive: {len(seconds)} tokens, {seconds[-1]:.2f} s"
        return line

    def data(self) -> dict[str, Any]:
        """Everything as JSON, short names for what comes thousands of times."""
        return {
            "model": self.model,
            "device": self.device,
            "prompt": self.prompt,
            "parameters": dict(self.parameters),
            "summary": self.summary(),
            "delivered": self.delivered,
            "passes": [vars(entry) | {"decodes": entry.decodes} for entry in self.passes],
            "positions": [{"r": p.round, "kv": p.kv, "e": p.events} for p in self.positions],
            "autoregressive": self.autoregressive,
        }


class History:
    """Plays the passes of a request and notes what becomes of every position."""

    def __init__(self, text: Callable[[int, int], str], slot_size: int) -> None:
        """Args: text: of a token at a position."""
        self._text, self._slot_size = text, slot_size
        self.passes: list[Pass] = []
        self.positions: list[Position] = []
        self._drafted: set[int] = set()  # of serial mode
        self._touched: set[int] = set()
        self._round = self._committed = 0
        self._end = 0.0

    def play(self, entry: Mapping[str, Any]) -> None:
        self._end += entry["seconds"]
        operations = entry["operations"]
        number = len(self.passes) + 1
        committed = entry.get("committed", [])
        chances = {}
        for operation in operations:
            if operation["kind"] == "serial":
                self._round += 1
                chances = {position: chance for position, _, chance in operation["picks"]}
                self._test_serially(number, operation)
            elif "tests" in operation:
                self._verify(number, operation, [position for position, _ in committed])
        for position, token in committed:
            self._commit(number, position, token, chances.get(position))
        if "end" in entry:
            self.drop(number, entry["end"])
        for operation in operations:
            if operation["kind"] == "serial":
                self._redraft(number, operation)
                continue
            self._round += any(slot["chosen"] for slot in operation.get("slots", ()))
            for slot in operation.get("slots", ()):
                self._place(slot["start"] + self._slot_size - 1)
            self._draft(number, (*operation.get("drafts", ()), *operation.get("proposals", ())))
        self.passes.append(
            Pass(
                kinds=[operation["kind"] for operation in operations],
                rows=entry["rows"],
                riders=entry.get("rider_rows", 0),
                end=round(self._end, 6),
                round=max(self._round, 1),
                committed=[position for position, _ in committed],
            )
        )

    def drop(self, number: int, end: int) -> None:
        """From pass ``number`` on nothing is wanted from position ``end`` on."""
        for position, place in enumerate(self.positions[end:], end):
            state = "cut" if place.kv is not None else "dropped"
            last = place.events[-1] if place.events else None
            if last is None or last.state not in ("cut", "dropped"):
                text = last.text if last else ""
                place.events.append(Event(number, state, text, None))
                self._touched.add(position)

    def take_touched(self) -> set[int]:
        """The positions with events since the last call, and those that came up."""
        touched, self._touched = self._touched, set()
        return touched

    def _commit(self, number: int, position: int, token: int, chance: float | None) -> None:
        place = self._place(position)
        place.round = self._round
        if place.kv is None:  # a preempted request in serial mode may decide a token twice
            place.kv = self._committed
            self._committed += 1
        place.events.append(Event(number, "committed", self._text(position, token), chance))
        self._drafted.discard(position)

    def _verify(self, number: int, operation: Mapping[str, Any], committed: list[int]) -> None:
        tests = operation["tests"]
        kept = any(accepted and position not in committed for position, *_, accepted in tests)
        for position, token, probability, accepted in tests:
            event = Event(number, "accepted", self._text(position, token), probability)
            if accepted:
                self._place(position).events.append(event)
            elif operation["kind"] == "verify" and not kept:
                # whole slots were committed: the others are masked again
                self._place(position).events.append(Event(number, "masked", "", probability))
        for position, token, probability in operation.get("corrections", ()):
            event = Event(number, "accepted", self._text(position, token), probability)
            self._place(position).events.append(event)

    def _test_serially(self, number: int, operation: Mapping[str, Any]) -> None:
        for position, token, probability, accepted in operation["tests"]:
            state = "accepted" if accepted else "refused"
            event = Event(number, state, self._text(position, token), probability)
            self._place(position).events.append(event)

    def _redraft(self, number: int, operation: Mapping[str, Any]) -> None:
        """A pass of serial mode that says what drafts there are leaves no others."""
        drafts = operation.get("drafts")
        if drafts is None:
            return
        for position in sorted(self._drafted - {position for position, *_ in drafts}):
            self._place(position).events.append(Event(number, "masked", "", None))
        self._draft(number, drafts)
        self._drafted = {position for position, *_ in drafts}

    def _draft(self, number: int, drafts: Sequence[Sequence[Any]]) -> None:
        for position, token, probability in drafts:
            event = Event(number, "draft", self._text(position, token), probability)
            self._place(position).events.append(event)

    def _place(self, position: int) -> Position:
        while len(self.positions) <= position:
            self._touched.add(len(self.positions))
            self.positions.append(Position())
        self._touched.add(position)
        return self.positions[position]


def load(path: Path) -> dict[str, Any]:
    """Reads a trace.

    Raises:
        ValueError: the file is not a trace of this version.
    """
    trace = read_json(path)
    found = (trace.get("format"), trace.get("version")) if isinstance(trace, dict) else None
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} is not a {FORMAT} of version {VERSION}")
    try:
        for request in trace["requests"]:
            Timeline.of(trace, request)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no whole trace: {error!r}: record it again") from error
    return trace
