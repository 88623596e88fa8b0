"""PyTorch twins of the layout and transition kernels: one request at a time, plain Python.

The state and its fields are described in ``vllm_refusion.decoding``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_refusion.decoding import Counter, DecodeState, Field, Phase, Status
from vllm_refusion.riders import (
    CERTAIN,
    LARGEST_COST,
    LEVELS,
    MAX_RIDERS,
    NO_RIDERS,
    Speculation,
    chance_table,
    cost_table,
)

INFILLED = (Status.CHOSEN, Status.BLANK, Status.ACCEPTED)  # positions of slots in infill
UNSEEN = 2**31 - 1  # own_start of a row that sees nothing


def layout_reference(
    state: DecodeState,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    visibility: torch.Tensor,
    slot_mappings: torch.Tensor,
) -> None:
    """Places the rows of one pass: RoPE positions, visibility, KV writes, replayed tokens.

    Args:
        idx_mapping: [R] int64, request slot of each batch row.
        query_start_loc: [R+1] int32.
        num_computed: [max_requests] int32, KV entries of each request before this pass.
        input_ids: [N] int; rows that replay committed tokens are overwritten, others left alone.
        positions: [N] int64, out: RoPE positions.
        visibility: [N, 4] int32, out: see ``canvas_attention``.
        slot_mappings: [groups, N] int64: set to -1 for rows whose KV must not be written.
    """
    starts = query_start_loc.tolist()
    for row, slot in enumerate(idx_mapping.tolist()):
        start, end = starts[row], starts[row + 1]
        ints = state.ints[slot].tolist()
        prompt_len, context = ints[Field.PROMPT_LEN], int(num_computed[slot])
        phase = ints[Field.PHASE]
        length = end - start
        kv = torch.arange(context, context + length, dtype=torch.int32)
        see = torch.zeros(length, 4, dtype=torch.int32)
        if phase in (Phase.PREFILL, Phase.REPLAY):
            entry = (kv - prompt_len).long()
            replayed = entry >= 0
            # the first plan may be fed with the end of the prompt
            plans = phase == Phase.PREFILL and ints[Field.RESUME] == Phase.START
            plans &= context + length - prompt_len >= ints[Field.ROWS]
            used = entry < (ints[Field.ROWS] if plans else ints[Field.COMMITTED])
            used |= ~replayed
            replayed &= entry < ints[Field.COMMITTED]
            entry = entry.clamp(0, state.max_response - 1)
            position = torch.where(replayed, state.order[slot, entry], kv - prompt_len)
            group = torch.where(replayed, state.group_context[slot, entry], -1)
            in_slot = position % max(ints[Field.SLOT_SIZE], 1)
            isolated = group >= 0
            see[:, 0] = torch.where(isolated, prompt_len + group, 0)
            see[:, 3] = torch.where(isolated, kv - in_slot, 0)
            tokens = state.response[slot, position.clamp_min(0).long()]
            rewrite = replayed & used
            input_ids[start:end][rewrite] = tokens[rewrite].to(input_ids.dtype)
        else:
            width = min(length, state.canvas_length)
            used = torch.zeros(length, dtype=torch.bool)
            position = torch.zeros(length, dtype=torch.int32)
            if phase not in (Phase.IDLE, Phase.DONE) and length >= ints[Field.ROWS]:
                position[:width] = state.row_position[slot, :width]
                used[: ints[Field.CANVAS]] = True
            see[:width, 0] = context + state.row_context[slot, :width]
            see[:width, 1] = context + state.row_run_start[slot, :width]
            see[:width, 2] = context + state.row_run_end[slot, :width]
            see[:width, 3] = context + state.row_own_start[slot, :width]
        see[~used] = torch.tensor([0, 0, 0, UNSEEN], dtype=torch.int32)
        positions[start:end] = torch.where(used, prompt_len + position, 0)
        visibility[start:end] = see
        slot_mappings[:, start:end].masked_fill_(~used, -1)


def transition_reference(
    state: DecodeState,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    logits_start: torch.Tensor,
    num_computed: torch.Tensor,
    prefill_len: torch.Tensor,
    picked: torch.Tensor,
    picked_prob: torch.Tensor,
    given_prob: torch.Tensor,
    emit_limit: torch.Tensor,
    sampled: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    speculation: Speculation = NO_RIDERS,
) -> None:
    """Moves every request of a batch by one pass (algorithm section 3) and writes its next canvas.

    Args:
        idx_mapping: [R] int64, request slot of each batch row.
        query_start_loc, logits_start: [R+1] int32, where a request's rows start among all query
            rows and among the rows of the statistics.
        num_computed, prefill_len: [max_requests] int32, KV entries before this pass, and KV
            entries that are prefill (prompt, after a preemption also emitted tokens).
        picked, picked_prob, given_prob: [rows] statistics of the canvas rows (``token_stats``);
            the given token of a row is the token of the next canvas row.
        emit_limit: [R] int32, the most tokens that may be delivered.
        sampled: [R, W] int, out: tokens newly contiguous in position order.
        num_sampled: [R] int32, out: their number.
        num_rejected: [R] int32, out: query rows whose KV is not kept.
        speculation: which riders the next canvas takes.
    """
    starts = query_start_loc.tolist()
    first_logit = logits_start.tolist()
    for row, slot in enumerate(idx_mapping.tolist()):
        query_len = starts[row + 1] - starts[row]
        ints = state.ints[slot].tolist()
        if ints[Field.PHASE] == Phase.IDLE:
            num_sampled[row], num_rejected[row] = 0, query_len
            continue
        step = _Step.load(state, slot, speculation)
        step.query_len = query_len
        step.computed, step.prefill_len = int(num_computed[slot]), int(prefill_len[slot])
        step.fed = min(query_len, ints[Field.CANVAS])
        if ints[Field.PHASE] == Phase.PREFILL:
            step.fed = max(0, query_len - (step.prefill_len - step.computed))
        rows = slice(first_logit[row], first_logit[row] + step.fed)
        step.picked, step.picked_prob = picked[rows].tolist(), picked_prob[rows]
        step.given_prob = given_prob[rows]
        decodes = ints[Field.PHASE] != Phase.PREFILL
        num_rejected[row] = query_len - step.run()
        tokens = step.emit(int(emit_limit[row])) if decodes else []
        num_sampled[row] = len(tokens)
        sampled[row, : len(tokens)] = torch.tensor(tokens, dtype=sampled.dtype)
        step.save()


def compose_reference(state: DecodeState, slot: int, speculation: Speculation) -> None:
    """Writes the canvas of one request, whose other fields are set, and ROWS and CANVAS."""
    step = _Step.load(state, slot, speculation)
    step.compose()
    step.save()


class _Row(NamedTuple):
    """A canvas row, see ``DecodeState``."""

    token: int
    position: int
    draw: int
    context: int = 0
    run_start: int = 0
    run_end: int = 0
    own_start: int = 0


class _Rider(NamedTuple):
    """A rider that the canvas could take, at block position ``at``; see ``rider_row``."""

    at: int
    chance: int
    positions: list[int]  # response positions of its masks
    draw: int
    run: tuple[int, int]
    context: int = 0

    @property
    def score(self) -> int:
        return self.chance * 256 // len(self.positions)


@dataclass
class _Step:
    """One pass of one request. Fields are updated in place and written back by ``save``."""

    state: DecodeState
    slot: int
    speculation: Speculation
    ints: list[int]
    status: list[int]
    token: list[int]
    rounds: list[int]
    confidence: torch.Tensor
    query_len: int = 0
    fed: int = 0
    computed: int = 0
    prefill_len: int = 0
    picked: list[int] | None = None
    picked_prob: torch.Tensor | None = None
    given_prob: torch.Tensor | None = None

    @classmethod
    def load(cls, state: DecodeState, slot: int, speculation: Speculation) -> _Step:
        names = ("ints", "status", "token", "rounds")
        lists = [getattr(state, name)[slot].tolist() for name in names]
        return cls(state, slot, speculation, *lists, state.confidence[slot].clone())

    def run(self) -> int:
        """Decides, builds the next canvas; returns how many leading rows keep their KV."""
        ints, phase = self.ints, Phase(self.ints[Field.PHASE])
        if phase == Phase.PREFILL:
            if self.computed + self.query_len >= self.prefill_len:
                self._resume(self.prefill_len - ints[Field.PROMPT_LEN])
            return self.query_len - self.fed
        if phase == Phase.REPLAY:
            done = self.computed - ints[Field.PROMPT_LEN]
            kept = min(self.query_len, ints[Field.COMMITTED] - done)
            self._count(Counter.REPLAY)
            self._count(Counter.ROWS_FED, kept)
            self._resume(done + kept)
            return kept
        if phase == Phase.DONE or self.query_len < ints[Field.ROWS]:
            self._count(Counter.IDLE)
            return 0
        ints[Field.PASSES] += 1
        self._count(Counter.ROWS_FED, self.fed)
        self._count(Counter.RIDER_ROWS_FED, self.fed - ints[Field.ROWS])
        self.members = [
            p - ints[Field.BLOCK_START]
            for p in self.state.row_position[self.slot, : ints[Field.ROWS]].tolist()
        ]
        self.rider_row = self.state.rider_row[self.slot].tolist()
        if phase == Phase.PLAN:
            self._count(Counter.PLAN)
            self._plan(0)
            kept = 0
        elif phase == Phase.VERIFY:
            self._count(Counter.VERIFY)
            kept = self._verify()
        else:
            blank = Status.BLANK in self.status
            self._count(Counter.PREDICT if blank else Counter.INFILL_VERIFY)
            kept = self._infill(blank)
        self._ride_predicts()
        self.compose()
        return kept

    def save(self) -> None:
        state, slot = self.state, self.slot
        for name in ("ints", "status", "token", "rounds"):
            getattr(state, name)[slot] = torch.tensor(getattr(self, name), dtype=torch.int32)
        state.confidence[slot] = self.confidence

    def emit(self, limit: int) -> list[int]:
        """Tokens newly contiguous in position order, at most ``limit``."""
        ints = self.ints
        contiguous = next(
            (p for p, s in enumerate(self.status) if s != Status.COMMITTED), len(self.status)
        )
        end = min(
            ints[Field.BLOCK_START] + contiguous,
            ints[Field.LIMIT],
            ints[Field.MAX_TOKENS],
            ints[Field.EMITTED] + limit,
        )
        start = ints[Field.EMITTED]
        if end <= start:
            return []
        ints[Field.EMITTED] = end
        self._count(Counter.TOKENS, end - start)
        return self.state.response[self.slot, start:end].tolist()

    def _plan(self, first_row: int) -> None:
        """3.1, the masks of the remaining slots being the rows from ``first_row`` on."""
        ints = self.ints
        size = ints[Field.SLOT_SIZE]
        ints[Field.DRAW] += 1
        rows = dict(enumerate(self._positions(Status.MASKED), first_row))
        certainty = {row: float(self.picked_prob[row]) for row in list(rows)[::size]}
        threshold = float(self.state.slot_threshold[self.slot])
        chosen = [row for row in certainty if certainty[row] > threshold]
        if not chosen:
            chosen = [max(certainty, key=lambda row: (certainty[row], -row))]
        for first in chosen:
            for row in range(first, first + size):
                self._pick(rows[row], row)
        ints[Field.PHASE] = Phase.VERIFY

    def _pick(self, position: int, row: int) -> None:
        self.status[position] = Status.CHOSEN
        self.token[position] = self.picked[row]
        self.confidence[position] = self.picked_prob[row]

    def _verify(self) -> int:
        ints, members = self.ints, self.members
        size, count = ints[Field.SLOT_SIZE], len(members)
        for position in members:
            self.rounds[position] = 0
        passed = [self._passes(row) or members[row] % size == 0 for row in range(count)]
        accepted = next((row for row in range(count) if not passed[row]), count)
        eos = self._first_eos(members[:accepted])
        if eos is not None:
            kept = members.index(eos) + 1
            self._commit(members[:kept], isolated=False)
            self._cut_after(eos)
        else:
            kept = accepted // size * size
            if not kept:
                for row, position in enumerate(members):
                    slot_rows = range(row - position % size, row + 1)
                    whole = all(passed[r] for r in slot_rows)
                    self.status[position] = Status.ACCEPTED if whole else Status.BLANK
                self._accept_eos()
                ints[Field.PHASE] = Phase.INFILL
                ints[Field.KEPT] = self._keepable(set(members))
                return ints[Field.KEPT]
            self._commit(members[:kept], isolated=False)
            for position in members[kept:]:
                self.status[position] = Status.MASKED
        self._after_commit(None if eos is not None else members[kept - size])
        return kept

    def _infill(self, blank: bool) -> int:
        ints, size = self.ints, self.ints[Field.SLOT_SIZE]
        before = list(self.status)
        for row, position in enumerate(self.members):
            if before[position] == Status.BLANK:
                self._pick(position, row)
                self.rounds[position] += 1
            if before[position] != Status.CHOSEN:
                continue
            # the row before it in its slot is accepted: always so for the first proposal
            is_first = position % size == 0 or before[position - 1] == Status.ACCEPTED
            reached = is_first or self.status[position - 1] == Status.ACCEPTED
            passed = is_first or (reached and self._passes(row))
            self.status[position] = Status.ACCEPTED if passed else Status.BLANK
        eos = self._accept_eos()
        kept = self._keepable({p for p in self.members if before[p] != Status.BLANK})
        ints[Field.KEPT] += kept
        slots = self._positions(*INFILLED)
        if ints[Field.KEPT] >= len(slots):
            ints[Field.DRAW] += max(self.rounds[p] for p in slots)
            self._commit(slots, isolated=True)
            ints[Field.KEPT] = 0
            last_slot = slots[-1] - slots[-1] % size
            self._after_commit(None if eos is not None else last_slot)
        return kept

    def _keepable(self, fed_as_tokens: set[int]) -> int:
        """Leading canvas rows that hold accepted tokens and are the next in commit order."""
        following = self._positions(*INFILLED)[self.ints[Field.KEPT] :]
        for row, (position, expected) in enumerate(zip(self.members, following)):
            final = position in fed_as_tokens and self.status[position] == Status.ACCEPTED
            if position != expected or not final:
                return row
        return min(len(self.members), len(following))

    def _passes(self, row: int) -> bool:
        """Whether the row before gives this row's token more than the token threshold."""
        return row > 0 and bool(self.given_prob[row - 1] > self.state.token_threshold[self.slot])

    def _positions(self, *statuses: Status) -> list[int]:
        return [p for p, status in enumerate(self.status) if status in statuses]

    def _first_eos(self, positions: list[int]) -> int | None:
        eos = self.ints[Field.EOS]
        return next((p for p in positions if self.token[p] == eos), None) if eos >= 0 else None

    def _accept_eos(self) -> int | None:
        """Cuts the infill after the first accepted EOS, if there is one."""
        eos = self._first_eos(self._positions(Status.ACCEPTED))
        if eos is not None:
            self._cut_after(eos)
        return eos

    def _cut_after(self, position: int) -> None:
        """EOS at a block position: everything after it that is not committed is dropped."""
        ints = self.ints
        for p in range(position + 1, len(self.status)):
            if self.status[p] != Status.COMMITTED:
                self.status[p] = Status.DROPPED
        ints[Field.LIMIT] = min(ints[Field.LIMIT], ints[Field.BLOCK_START] + position + 1)

    def _commit(self, positions: list[int], isolated: bool) -> None:
        """Commits tokens whose KV is final, in this order."""
        ints, state, slot = self.ints, self.state, self.slot
        committed = ints[Field.COMMITTED]
        for row, position in enumerate(positions):
            response_position = ints[Field.BLOCK_START] + position
            self.status[position] = Status.COMMITTED
            state.response[slot, response_position] = self.token[position]
            state.order[slot, committed + row] = response_position
            state.group_context[slot, committed + row] = committed if isolated else -1
        ints[Field.COMMITTED] += len(positions)

    def _after_commit(self, last_slot: int | None) -> None:
        """What follows a commit, done at once if its rider is in the canvas.

        ``last_slot``: the block position where the last committed slot starts; None after an EOS.
        """
        ints = self.ints
        ints[Field.PHASE] = Phase.PLAN
        if Status.MASKED not in self.status:
            start = ints[Field.BLOCK_START] + ints[Field.BLOCK_LENGTH]
            if start >= ints[Field.LIMIT]:
                ints[Field.PHASE] = Phase.DONE
                return
            self._start_block(start)
        first_row = -1 if last_slot is None else self.rider_row[last_slot]
        if first_row >= 0 and first_row + len(self._positions(Status.MASKED)) <= self.fed:
            self._count(Counter.PLANS_RIDDEN)
            self._plan(first_row)

    def _ride_predicts(self) -> None:
        """Takes the proposals for slots whose rider is in the canvas."""
        size = self.ints[Field.SLOT_SIZE]
        slots: dict[int, list[int]] = {}
        for position in self._positions(Status.BLANK):
            slots.setdefault(position // size, []).append(position)
        for positions in slots.values():
            first_row = self.rider_row[positions[0]]
            if first_row < 0 or first_row + len(positions) > self.fed:
                continue
            self._count(Counter.PREDICTS_RIDDEN)
            for row, position in enumerate(positions, first_row):
                self._pick(position, row)
                self.rounds[position] += 1

    def _start_block(self, start: int) -> None:
        ints = self.ints
        ints[Field.BLOCK_START] = start
        length = self._block_length_at(start)
        width = self.state.canvas_length
        self.status = [Status.MASKED if p < length else Status.DROPPED for p in range(width)]
        self.token = [0] * width
        ints[Field.PHASE] = Phase.PLAN

    def _block_length_at(self, start: int) -> int:
        return min(self.ints[Field.BLOCK_LENGTH], self.ints[Field.BUDGET] - start)

    def _resume(self, done: int) -> None:
        """After ``done`` committed tokens have been fed again: replay the rest, or go on."""
        ints = self.ints
        if done < ints[Field.COMMITTED]:
            ints[Field.PHASE] = Phase.REPLAY
        elif ints[Field.RESUME] == Phase.START:
            self._start_block(0)
            if self.fed >= ints[Field.ROWS] and ints[Field.COMMITTED] == 0:
                self._count(Counter.PLANS_RIDDEN)
                self._plan(0)
            self.compose()
        else:
            ints[Field.PHASE] = ints[Field.RESUME]
            if ints[Field.PHASE] == Phase.INFILL:  # no accepted token is kept any more
                self.compose()

    def compose(self) -> None:
        """Writes the next canvas: the rows that the phase needs, then riders while they pay."""
        ints, state, slot = self.ints, self.state, self.slot
        rows = self._phase_rows()
        ints[Field.ROWS] = len(rows)
        rider_row = [-1] * state.canvas_length
        candidates = self._riders(rows) if self.speculation != NO_RIDERS else []
        candidates.sort(key=lambda rider: (-rider.score, rider.at))
        free, price = self.speculation
        for rider in candidates[:MAX_RIDERS]:
            width, start = len(rider.positions), len(rows)
            pays = start + width <= free or rider.chance * (width + price) > width * CERTAIN
            if rider.score <= 0 or not pays or start + width > state.canvas_length:
                continue
            rider_row[rider.at] = start
            rows += [
                _Row(state.mask_token_id, position, rider.draw, rider.context, *rider.run, start)
                for position in rider.positions
            ]
        ints[Field.CANVAS] = len(rows)
        state.rider_row[slot] = torch.tensor(rider_row, dtype=torch.int32)
        state.row_position[slot] = -1
        for name, values in zip(_Row._fields, zip(*rows)):
            target = state.canvas_token if name == "token" else getattr(state, f"row_{name}")
            target[slot, : len(rows)] = torch.tensor(values, dtype=target.dtype)

    def _phase_rows(self) -> list[_Row]:
        ints, mask = self.ints, self.state.mask_token_id
        start, draw, size = ints[Field.BLOCK_START], ints[Field.DRAW], ints[Field.SLOT_SIZE]
        if ints[Field.PHASE] == Phase.PLAN:
            return [_Row(mask, start + p, draw) for p in self._positions(Status.MASKED)]
        if ints[Field.PHASE] == Phase.VERIFY:
            return [_Row(self.token[p], start + p, draw) for p in self._positions(Status.CHOSEN)]
        if ints[Field.PHASE] != Phase.INFILL:
            return []
        members = self._positions(*INFILLED)[ints[Field.KEPT] :]
        if Status.BLANK in self.status:  # nothing can be committed: complete slots stay out
            active = {p // size for p in self._positions(Status.CHOSEN, Status.BLANK)}
            members = [p for p in members if p // size in active]
        return [
            _Row(
                mask if self.status[p] == Status.BLANK else self.token[p],
                start + p,
                draw + self.rounds[p],
                context=-ints[Field.KEPT],
                own_start=row - p % size,
            )
            for row, p in enumerate(members)
        ]

    def _riders(self, rows: list[_Row]) -> list[_Rider]:
        """All riders that could follow the rows of the phase, with their chances."""
        ints, status = self.ints, self.status
        size, start, draw = ints[Field.SLOT_SIZE], ints[Field.BLOCK_START], ints[Field.DRAW]
        verifies = ints[Field.PHASE] == Phase.VERIFY
        if not verifies and ints[Field.PHASE] != Phase.INFILL:
            return []
        members = [row.position - start for row in rows]
        costs, total = [], 0  # before each row and after the last
        for p in members:
            costs.append(total)
            untested = p % size == 0 or status[p - 1] == Status.ACCEPTED
            if status[p] == Status.CHOSEN and not untested:
                total += self._cost(p)
        costs.append(total)
        opens = [row for row, p in enumerate(members) if not row or p % size == 0]
        closes = [*opens[1:], len(members)]

        riders = []
        for opening, closing in zip(opens, closes):
            first = members[opening]
            if verifies:
                following = costs[min(closing + size, len(members))]
                chance = _chance(costs[closing])
                chance -= _chance(following) if closing < len(members) else 0
                riders.append(self._plan_rider(first, chance, closing, draw))
            if opening > 0 and verifies:
                continue
            for row in range(opening + 1, closing):
                if status[members[row]] != Status.CHOSEN:
                    continue
                chance = _chance(costs[row] - costs[opening])
                chance -= _chance(costs[row + 1] - costs[opening])
                positions = [row.position for row in rows[row:closing]]
                at = members[row]
                run = (row - at % size, row)
                rider_draw = draw if verifies else draw + self.rounds[at]
                riders.append(_Rider(at, chance, positions, rider_draw, run, -ints[Field.KEPT]))
        if not verifies and Status.BLANK not in status:
            draw += max(self.rounds[p] for p in self._positions(*INFILLED))
            last = members[-1] - members[-1] % size
            riders.append(self._plan_rider(last, _chance(total), len(members), draw))
        return [rider for rider in riders if rider.positions]

    def _plan_rider(self, last_slot: int, chance: int, committed: int, draw: int) -> _Rider:
        """The plan if ``last_slot`` is the last one committed, with so many rows in all."""
        ints = self.ints
        start, size = ints[Field.BLOCK_START], ints[Field.SLOT_SIZE]
        back = [p for p in self._positions(Status.CHOSEN) if p >= last_slot + size]
        back = back if ints[Field.PHASE] == Phase.VERIFY else []
        positions = [start + p for p in sorted(self._positions(Status.MASKED) + back)]
        if not positions:
            start += ints[Field.BLOCK_LENGTH]
            if start < ints[Field.LIMIT]:
                positions = list(range(start, start + self._block_length_at(start)))
        return _Rider(last_slot, chance, positions, draw, (0, committed))

    def _cost(self, position: int) -> int:
        """See ``riders.py``."""
        level = float(self.confidence[position]) * LEVELS
        return cost_table()[min(max(int(level), 0), LEVELS) if level == level else 0]

    def _count(self, counter: Counter, amount: int = 1) -> None:
        self.state.counters[counter] += amount


def _chance(cost: int) -> int:
    return chance_table()[min(cost, LARGEST_COST)]
