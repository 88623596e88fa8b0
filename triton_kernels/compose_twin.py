"""PyTorch twin of ``compose``: the next canvas of one request, in plain Python.

The state and its fields are described in ``vllm_refusion.decoding.state``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Self

import torch

from vllm_refusion.decoding.speculation import (
    ALL_SAVINGS,
    CERTAIN,
    LEVELS,
    MAX_RIDERS,
    Saving,
    Speculation,
    acceptance,
    chance_of,
    cost_of,
    cost_table,
)
from vllm_refusion.decoding.state import DecodeState, Field, Phase, Status

INFILLED = (Status.CHOSEN, Status.BLANK, Status.ACCEPTED)  # positions of slots in infill
OPEN = (Status.CHOSEN, Status.BLANK)
MASKS = (Status.MASKED, Status.BLANK)
LISTS = ("ints", "status", "token", "rounds", "origin")


def compose_twin(state: DecodeState, req: int, speculation: Speculation) -> None:
    """Writes the canvas of one request, whose other fields are set, and ROWS and CANVAS."""
    request = Request.load(state, req, speculation, ALL_SAVINGS)
    request.compose()
    request.save()


class Row(NamedTuple):
    """A canvas row, see ``DecodeState``."""

    token: int
    position: int
    target: int
    draw: int = 0
    context: int = 0
    run_start: int = 0
    run_end: int = 0
    own_start: int = 0


def write_canvas(
    state: DecodeState, req: int, rows: Sequence[Row], **by_position: Sequence[int]
) -> None:
    """Stores the rows of a request's canvas, and fields that say where what is."""
    for name, values in by_position.items():
        getattr(state, name)[req] = torch.tensor(values, dtype=torch.int32)
    state.row_position[req] = state.row_target[req] = -1
    for name, column in zip(Row._fields, zip(*rows)):
        target = state.canvas_token if name == "token" else getattr(state, f"row_{name}")
        target[req, : len(rows)] = torch.tensor(column, dtype=target.dtype)


class _Rider(NamedTuple):
    """A rider that the canvas could take, at block position ``at``; see ``rider_row``."""

    at: int
    chance: int
    positions: list[int]  # response positions of its masks
    draw: int
    run: tuple[int, int]
    context: int = 0
    lead: int = 0  # its masks before ``at``, whose tokens are accepted already

    @property
    def score(self) -> int:
        return self.chance * 256 // len(self.positions)


@dataclass
class Request:
    """One request, its fields as lists that are updated in place and written back by ``save``."""

    state: DecodeState
    req: int
    speculation: Speculation
    savings: Collection[Saving]
    ints: list[int]
    status: list[int]
    token: list[int]
    rounds: list[int]
    origin: list[int]
    confidence: torch.Tensor
    canvas_row: list[int] = field(default_factory=list)

    @classmethod
    def load(
        cls,
        state: DecodeState,
        req: int,
        speculation: Speculation,
        savings: Collection[Saving],
    ) -> Self:
        lists = (getattr(state, name)[req].tolist() for name in LISTS)
        ints, status, token, rounds, origin = lists
        confidence = state.confidence[req].clone()
        return cls(
            state, req, speculation, savings, ints, status, token, rounds, origin, confidence
        )

    def save(self) -> None:
        state, req = self.state, self.req
        for name in LISTS:
            getattr(state, name)[req] = torch.tensor(getattr(self, name), dtype=torch.int32)
        state.confidence[req] = self.confidence

    def compose(self) -> None:
        """Writes the next canvas: the rows that the phase needs, then riders while they pay."""
        ints, state, req = self.ints, self.state, self.req
        rows = self._phase_rows()
        rider_row, rider_width = [-1] * state.canvas_length, [0] * state.canvas_length

        def add(rider: _Rider) -> None:
            start, width = len(rows), len(rider.positions)
            rider_row[rider.at], rider_width[rider.at] = start + rider.lead, width - rider.lead
            for position in rider.positions:
                mask = state.mask_token_id
                row = Row(mask, position, position, rider.draw, rider.context, *rider.run, start)
                rows.append(row)

        most = min(state.canvas_length, self._guaranteed_rows())
        for rider in self._tails():
            if len(rows) + len(rider.positions) <= most:
                add(rider)
        ints[Field.ROWS] = len(rows)
        candidates = self._riders() if self.speculation.rides else []
        candidates = [rider for rider in candidates if self._saving(rider) in self.savings]
        candidates.sort(key=lambda rider: (-rider.score, rider.at))
        free, price = self.speculation.free_rows, self.speculation.pass_price
        for rider in candidates[:MAX_RIDERS]:
            width, end = len(rider.positions), len(rows) + len(rider.positions)
            pays = end <= free or rider.chance * (width + price) > width * CERTAIN
            if rider.score > 0 and pays and end <= state.canvas_length:
                add(rider)
        ints[Field.CANVAS] = len(rows)
        write_canvas(
            state,
            req,
            rows,
            rider_row=rider_row,
            rider_width=rider_width,
            canvas_row=self.canvas_row,
        )

    def positions(self, *statuses: Status) -> list[int]:
        return [p for p, status in enumerate(self.status) if status in statuses]

    def takes_test(self, proposal: int) -> bool:
        """Whether it is not accepted without one."""
        if self.ints[Field.CORRECTS]:
            return proposal % self.ints[Field.SLOT_SIZE] != 0
        return self.origin[proposal] != proposal

    def by_slot(self, positions: list[int]) -> list[list[int]]:
        """Ascending positions, those of each slot."""
        size = self.ints[Field.SLOT_SIZE]
        return [list(group) for _, group in groupby(positions, lambda p: p // size)]

    def block_length_at(self, start: int) -> int:
        return min(self.ints[Field.BLOCK_LENGTH], self.ints[Field.BUDGET] - start)

    def _phase_rows(self) -> list[Row]:
        """The first rows of the canvas; fills ``canvas_row``."""
        ints, mask = self.ints, self.state.mask_token_id
        start, draw, size = ints[Field.BLOCK_START], ints[Field.DRAW], ints[Field.SLOT_SIZE]
        infills = ints[Field.PHASE] == Phase.INFILL
        members = self._members()
        self.canvas_row = [-1] * self.state.canvas_length
        for row, p in enumerate(members):
            self.canvas_row[p] = row
        return [
            Row(
                mask if self.status[p] in MASKS else self.token[p],
                start + p,
                start + (told := self._told(p)),
                draw + self.rounds[told] if infills else draw,
                context=-ints[Field.KEPT] if infills else 0,
                own_start=row - p % size if infills else 0,
            )
            for row, p in enumerate(members)
        ]

    def _told(self, position: int) -> int:
        """The position that its row picks a token for: the next, where it may have to correct."""
        ints = self.ints
        tells_next = ints[Field.CORRECTS] and self.status[position] not in MASKS
        return position + (tells_next and (position + 1) % ints[Field.SLOT_SIZE] != 0)

    def _members(self) -> list[int]:
        """Block positions that take part in the pass."""
        phase = self.ints[Field.PHASE]
        if phase == Phase.PLAN:
            return self.positions(Status.MASKED)
        chosen = self.by_slot(self.positions(Status.CHOSEN))
        if phase == Phase.VERIFY:
            # several slots are tested as one run
            return self._worth_testing(chosen[0]) if len(chosen) == 1 else sum(chosen, [])
        if phase != Phase.INFILL:
            return []
        fed = {p for proposals in chosen for p in self._worth_testing(proposals)}
        for blank in self._waiting():
            if self.origin[blank[0]] == blank[0]:
                fed.update(blank[: self._predict_width()])
        following = self.positions(*INFILLED)[self.ints[Field.KEPT] :]
        accepted = [p for p in following if self.status[p] == Status.ACCEPTED]
        if not self._can_end(fed):  # then nothing can be committed: complete slots stay out
            active = {self._slot(p) for p in self.positions(*OPEN)}
            accepted = [p for p in accepted if self._slot(p) in active]
        return sorted(fed.union(accepted))

    def _slot(self, position: int) -> int:
        return position // self.ints[Field.SLOT_SIZE]

    def _can_end(self, fed: set[int]) -> bool:
        """Whether the infill is over if a pass accepts all the tokens fed."""
        all_fed = fed.issuperset(self.positions(Status.CHOSEN))
        return all_fed and Status.BLANK not in self.status

    def _waiting(self) -> list[list[int]]:
        """By slot, the positions that wait for proposals, where none is left to be tested."""
        proposed = {self._slot(p) for p in self.positions(Status.CHOSEN)}
        blanks = self.by_slot(self.positions(Status.BLANK))
        return [blank for blank in blanks if self._slot(blank[0]) not in proposed]

    # How much of an operation is fed at once

    def _cuts_operations(self) -> bool:
        return self.speculation.rides and Saving.PIECES in self.savings

    def _worth_testing(self, proposals: list[int]) -> list[int]:
        """The first of a slot's proposals, up to one that is hardly reached."""
        if not self._cuts_operations():
            return proposals
        cost = 0
        for count, p in enumerate(proposals):
            if count and not self._worth_feeding(chance_of(cost), 1):
                return proposals[:count]
            cost += self._test_cost(p)
        return proposals

    def _guaranteed_rows(self) -> int:
        """Rows that a pass of an infill gets in any case: what is open in the block, and a slot.

        The first of ``_tails`` fits, unless tokens before it take its place: then they are kept.
        """
        not_committed = self.positions(Status.MASKED, *INFILLED)
        return len(not_committed) - self.ints[Field.KEPT] + self.ints[Field.SLOT_SIZE]

    def _predict_width(self) -> int:
        """The most masks of a predict."""
        size = self.ints[Field.SLOT_SIZE]
        fits = self.ints[Field.BLOCK_LENGTH] + size <= self.state.canvas_length
        if not self._cuts_operations() or not fits:
            return size
        width, each = 1, cost_table()[acceptance(self.ints[Field.PASSED], self.ints[Field.TESTED])]
        while width < size and self._worth_feeding(chance_of(each * (width - 1)), width):
            width += 1
        return width

    def _worth_feeding(self, chance: int, again: int) -> bool:
        """Whether to feed a row at once that is needed with a chance.

        Later, it takes a pass and ``again`` more rows. The sum of rows and passes is least where
        the chance that this is the first row needed later is worth as much as the row.
        """
        missing = LEVELS - acceptance(self.ints[Field.PASSED], self.ints[Field.TESTED])
        later = LEVELS + missing * (self.speculation.pass_price + again)
        return chance * later > CERTAIN * LEVELS

    # Masks behind the rows of the phase

    def _tails(self) -> list[_Rider]:
        """What has to come next where a slot needs more proposals of an operation.

        The operation's masks before them are fed again: they are what its other masks see.
        """
        if self.ints[Field.PHASE] != Phase.INFILL:
            return []
        blanks = [blank[0] for blank in self._waiting()]
        return [self._tail(at, CERTAIN) for at in blanks if self.origin[at] < at]

    def _tail(self, at: int, chance: int) -> _Rider:
        return self._predict_rider(at, self.origin[at], chance, self.rounds[at] - 1)

    def _predict_rider(self, at: int, origin: int, chance: int, rounds: int) -> _Rider:
        """Masks of the operation that began at ``origin``, for proposals from ``at`` on."""
        ints, size = self.ints, self.ints[Field.SLOT_SIZE]
        slot_start = at - at % size
        end = min(at + self._predict_width(), slot_start + size)
        member = next(p for p in range(slot_start, at + 1) if self.canvas_row[p] >= 0)
        opens = self.canvas_row[member] - (member - slot_start)  # below 0 where tokens are kept
        return _Rider(
            at,
            chance,
            [ints[Field.BLOCK_START] + p for p in range(origin, end)],
            ints[Field.DRAW] + rounds,
            (opens, opens + origin - slot_start),
            -ints[Field.KEPT],
            at - origin,
        )

    def _plan_rider(self, last_slot: int, chance: int, committed: int, draw: int) -> _Rider:
        """The plan if ``last_slot`` is the last one committed, with so many rows in all."""
        ints = self.ints
        start, size = ints[Field.BLOCK_START], ints[Field.SLOT_SIZE]
        back = [p for p in self.positions(Status.CHOSEN) if p >= last_slot + size]
        back = back if ints[Field.PHASE] == Phase.VERIFY else []
        positions = [start + p for p in sorted(self.positions(Status.MASKED) + back)]
        if not positions:
            start += ints[Field.BLOCK_LENGTH]
            if start < ints[Field.LIMIT]:
                positions = list(range(start, start + self.block_length_at(start)))
        return _Rider(last_slot, chance, positions, draw, (0, committed))

    def _riders(self) -> list[_Rider]:
        """All riders that could follow the rows of the phase, with their chances."""
        ints, size = self.ints, self.ints[Field.SLOT_SIZE]
        verifies = ints[Field.PHASE] == Phase.VERIFY
        if not verifies and ints[Field.PHASE] != Phase.INFILL:
            return []
        fed = {p for p, row in enumerate(self.canvas_row) if row >= 0}
        proposed = self.by_slot(self.positions(Status.CHOSEN))
        sums = [0]  # of costs, before each slot and after the last
        riders = []
        for proposals in proposed:
            cost = 0
            for p in proposals:
                before, cost = cost, cost + self._test_cost(p)
                alone = not verifies or proposals is proposed[0]
                if p in fed and p % size and alone and not ints[Field.CORRECTS]:
                    rounds = 0 if verifies else self.rounds[p]
                    chance = chance_of(before) - chance_of(cost)
                    riders.append(self._predict_rider(p, p, chance, rounds))
            after = proposals[-1] + 1
            if after % size and self.status[after] == Status.BLANK and fed.issuperset(proposals):
                riders.append(self._tail(after, chance_of(cost)))
            sums.append(sums[-1] + cost)

        if verifies and fed.issuperset(sum(proposed, [])):
            for proposals, total, following in zip(proposed, sums[1:], [*sums[2:], None]):
                chance = chance_of(total) - (0 if following is None else chance_of(following))
                committed = self.canvas_row[proposals[-1]] + 1
                rider = self._plan_rider(proposals[0], chance, committed, ints[Field.DRAW])
                riders.append(rider)
        elif not verifies and self._can_end(fed):
            slots = self.positions(*INFILLED)
            draw = ints[Field.DRAW] + max(self.rounds[p] for p in slots)
            last_slot = slots[-1] - slots[-1] % size
            riders.append(self._plan_rider(last_slot, chance_of(sums[-1]), len(fed), draw))
        return [rider for rider in riders if rider.positions]

    def _saving(self, rider: _Rider) -> Saving:
        if rider.at % self.ints[Field.SLOT_SIZE] == 0:
            return Saving.PLAN
        verifies = self.ints[Field.PHASE] == Phase.VERIFY
        return Saving.FIRST_PREDICT if verifies else Saving.PREDICT

    def _test_cost(self, position: int) -> int:
        """See ``speculation.py``; nothing where a proposal is accepted without a test."""
        if not self.takes_test(position):
            return 0
        return cost_of(float(self.confidence[position]))
