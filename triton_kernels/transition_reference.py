"""PyTorch twins of the layout and transition kernels: one request at a time, plain Python.

The state and its fields are described in ``vllm_refusion.decoding``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_refusion.decoding import Counter, DecodeState, Field, Phase, Status

UNSEEN = 2**31 - 1  # own_start of a row that sees nothing
PASS_COUNTER = {
    Phase.PLAN: Counter.PLAN,
    Phase.VERIFY: Counter.VERIFY,
    Phase.PREDICT: Counter.PREDICT,
    Phase.INFILL_VERIFY: Counter.INFILL_VERIFY,
}


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
            used = entry < max(ints[Field.COMMITTED], 0)
            used |= ~replayed
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
                used[: ints[Field.ROWS]] = True
            see[:, 0] = context
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
    sampled: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
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
        sampled: [R, W] int, out: tokens newly contiguous in position order.
        num_sampled: [R] int32, out: their number.
        num_rejected: [R] int32, out: query rows whose KV is not kept.
    """
    starts = query_start_loc.tolist()
    first_logit = logits_start.tolist()
    for row, slot in enumerate(idx_mapping.tolist()):
        query_len = starts[row + 1] - starts[row]
        ints = state.ints[slot].tolist()
        if ints[Field.PHASE] == Phase.IDLE:
            num_sampled[row], num_rejected[row] = 0, query_len
            continue
        rows = slice(first_logit[row], first_logit[row] + ints[Field.ROWS])
        step = _Step(
            state=state,
            slot=slot,
            ints=ints,
            query_len=query_len,
            computed=int(num_computed[slot]),
            prefill_len=int(prefill_len[slot]),
            picked=picked[rows].tolist(),
            picked_prob=picked_prob[rows],
            given_prob=given_prob[rows],
        )
        decodes = ints[Field.PHASE] != Phase.PREFILL
        num_rejected[row] = query_len - step.run()
        tokens = step.emit() if decodes else []
        num_sampled[row] = len(tokens)
        sampled[row, : len(tokens)] = torch.tensor(tokens, dtype=sampled.dtype)
        state.ints[slot] = torch.tensor(step.ints, dtype=torch.int32)


@dataclass
class _Step:
    """One pass of one request. ``ints`` is updated in place and written back by the caller."""

    state: DecodeState
    slot: int
    ints: list[int]
    query_len: int
    computed: int
    prefill_len: int
    picked: list[int]
    picked_prob: torch.Tensor
    given_prob: torch.Tensor

    def run(self) -> int:
        """Decides, builds the next canvas; returns how many leading rows keep their KV."""
        ints, phase = self.ints, Phase(self.ints[Field.PHASE])
        if phase == Phase.PREFILL:
            if self.computed + self.query_len >= self.prefill_len:
                self._resume(self.prefill_len - ints[Field.PROMPT_LEN])
            return self.query_len
        if phase == Phase.REPLAY:
            done = self.computed - ints[Field.PROMPT_LEN]
            kept = min(self.query_len, ints[Field.COMMITTED] - done)
            self._count(Counter.REPLAY, kept)
            self._resume(done + kept)
            return kept
        if phase == Phase.DONE or self.query_len < ints[Field.ROWS]:
            self._count(Counter.IDLE, 0)
            return 0
        self._count(PASS_COUNTER[phase], ints[Field.ROWS])
        ints[Field.PASSES] += 1
        self.status = self.state.status[self.slot].tolist()
        self.token = self.state.token[self.slot].tolist()
        self.members = [
            p - ints[Field.BLOCK_START]
            for p in self.state.row_position[self.slot, : ints[Field.ROWS]].tolist()
        ]
        kept = {
            Phase.PLAN: self._plan,
            Phase.VERIFY: self._verify,
            Phase.PREDICT: self._predict,
            Phase.INFILL_VERIFY: self._infill_verify,
        }[phase]()
        self.state.status[self.slot] = torch.tensor(self.status, dtype=torch.int32)
        self.state.token[self.slot] = torch.tensor(self.token, dtype=torch.int32)
        return kept

    def emit(self) -> list[int]:
        """Tokens newly contiguous in position order, at most one per scheduled row."""
        ints = self.ints
        status = self.state.status[self.slot].tolist()
        contiguous = next((p for p, s in enumerate(status) if s != Status.COMMITTED), len(status))
        end = min(
            ints[Field.BLOCK_START] + contiguous,
            ints[Field.LIMIT],
            ints[Field.MAX_TOKENS],
            ints[Field.EMITTED] + self.query_len,
        )
        start = ints[Field.EMITTED]
        if end <= start:
            return []
        ints[Field.EMITTED] = end
        self._count(Counter.TOKENS, 0, end - start)
        return self.state.response[self.slot, start:end].tolist()

    def _plan(self) -> int:
        ints = self.ints
        size = ints[Field.SLOT_SIZE]
        ints[Field.DRAW] += 1
        first_rows = range(0, len(self.members), size)
        certainty = {row: float(self.picked_prob[row]) for row in first_rows}
        threshold = float(self.state.slot_threshold[self.slot])
        chosen = [row for row in first_rows if certainty[row] > threshold]
        if not chosen:
            chosen = [max(first_rows, key=lambda row: (certainty[row], -row))]
        for first in chosen:
            for row in range(first, first + size):
                self.status[self.members[row]] = Status.CHOSEN
                self.token[self.members[row]] = self.picked[row]
        self._next(Phase.VERIFY, {Status.CHOSEN}, isolated=False)
        return 0

    def _verify(self) -> int:
        ints, members = self.ints, self.members
        size, count = ints[Field.SLOT_SIZE], len(members)
        passed = [self._passes(row) or members[row] % size == 0 for row in range(count)]
        accepted = next((row for row in range(count) if not passed[row]), count)
        eos = self._first_eos(members[:accepted])
        if eos is not None:
            kept = members.index(eos) + 1
            self._commit(kept, isolated=False)
            self._cut_after(eos)
        else:
            kept = accepted // size * size
            if not kept:
                for row, position in enumerate(members):
                    slot_rows = range(row - position % size, row + 1)
                    if all(passed[r] for r in slot_rows):
                        self.status[position] = Status.ACCEPTED
                self._accept_eos()
                self._next(Phase.PREDICT, {Status.CHOSEN, Status.ACCEPTED}, isolated=True)
                return 0
            self._commit(kept, isolated=False)
            for position in members[kept:]:
                self.status[position] = Status.MASKED
        self._after_commit()
        return kept

    def _predict(self) -> int:
        self.ints[Field.DRAW] += 1
        for row, position in enumerate(self.members):
            if self.status[position] == Status.CHOSEN:
                self.token[position] = self.picked[row]
        self._next(Phase.INFILL_VERIFY, {Status.CHOSEN, Status.ACCEPTED}, isolated=True)
        return 0

    def _infill_verify(self) -> int:
        size = self.ints[Field.SLOT_SIZE]
        before = list(self.status)
        for row, position in enumerate(self.members):
            if before[position] != Status.CHOSEN:
                continue
            # the row before it in its slot is accepted: always so for the first proposal
            is_first = position % size == 0 or before[position - 1] == Status.ACCEPTED
            reached = is_first or self.status[position - 1] == Status.ACCEPTED
            if is_first or (reached and self._passes(row)):
                self.status[position] = Status.ACCEPTED
        self._accept_eos()
        if any(self.status[position] == Status.CHOSEN for position in self.members):
            self._next(Phase.PREDICT, {Status.CHOSEN, Status.ACCEPTED}, isolated=True)
            return 0
        kept = sum(self.status[position] == Status.ACCEPTED for position in self.members)
        self._commit(kept, isolated=True)
        self._after_commit()
        return kept

    def _passes(self, row: int) -> bool:
        """Whether the row before gives this row's token more than the token threshold."""
        return row > 0 and bool(self.given_prob[row - 1] > self.state.token_threshold[self.slot])

    def _first_eos(self, positions: list[int]) -> int | None:
        eos = self.ints[Field.EOS]
        return next((p for p in positions if self.token[p] == eos), None) if eos >= 0 else None

    def _accept_eos(self) -> None:
        """Cuts the infill after the first accepted EOS, if there is one."""
        accepted = [p for p in self.members if self.status[p] == Status.ACCEPTED]
        eos = self._first_eos(accepted)
        if eos is not None:
            self._cut_after(eos)

    def _cut_after(self, position: int) -> None:
        """EOS at a block position: everything after it that is not committed is dropped."""
        ints = self.ints
        for p in range(position + 1, len(self.status)):
            if self.status[p] != Status.COMMITTED:
                self.status[p] = Status.DROPPED
        ints[Field.LIMIT] = min(ints[Field.LIMIT], ints[Field.BLOCK_START] + position + 1)

    def _commit(self, count: int, isolated: bool) -> None:
        """Commits the first ``count`` canvas rows; their KV is final."""
        ints, state, slot = self.ints, self.state, self.slot
        committed = ints[Field.COMMITTED]
        for row, position in enumerate(self.members[:count]):
            response_position = ints[Field.BLOCK_START] + position
            self.status[position] = Status.COMMITTED
            state.response[slot, response_position] = self.token[position]
            state.order[slot, committed + row] = response_position
            state.group_context[slot, committed + row] = committed if isolated else -1
        ints[Field.COMMITTED] += count

    def _after_commit(self) -> None:
        ints = self.ints
        if Status.MASKED in self.status:
            self._next(Phase.PLAN, {Status.MASKED}, isolated=False)
            return
        start = ints[Field.BLOCK_START] + ints[Field.BLOCK_LENGTH]
        if start >= ints[Field.LIMIT]:
            ints[Field.PHASE] = Phase.DONE
            ints[Field.ROWS] = 0
            self.state.row_position[self.slot] = -1
        else:
            self._start_block(start)

    def _start_block(self, start: int) -> None:
        ints = self.ints
        ints[Field.BLOCK_START] = start
        length = min(ints[Field.BLOCK_LENGTH], ints[Field.BUDGET] - start)
        width = self.state.canvas_length
        self.status = [Status.MASKED if p < length else Status.DROPPED for p in range(width)]
        self.token = [0] * width
        self._next(Phase.PLAN, {Status.MASKED}, isolated=False)

    def _resume(self, done: int) -> None:
        """After ``done`` committed tokens have been fed again: replay the rest, or go on."""
        ints = self.ints
        if done < ints[Field.COMMITTED]:
            ints[Field.PHASE] = Phase.REPLAY
        elif ints[Field.RESUME] == Phase.START:
            self._start_block(0)
            self.state.status[self.slot] = torch.tensor(self.status, dtype=torch.int32)
            self.state.token[self.slot] = torch.tensor(self.token, dtype=torch.int32)
        else:
            ints[Field.PHASE] = ints[Field.RESUME]

    def _next(self, phase: Phase, member: set[Status], isolated: bool) -> None:
        """Writes the canvas of the next pass: the positions of the given status, in order."""
        ints, state, slot = self.ints, self.state, self.slot
        members = [p for p, status in enumerate(self.status) if status in member]
        if phase == Phase.PREDICT:  # a complete slot has nothing to propose
            size = ints[Field.SLOT_SIZE]
            incomplete = {p // size for p in members if self.status[p] == Status.CHOSEN}
            members = [p for p in members if p // size in incomplete]
        masked = {Phase.PLAN: Status.MASKED, Phase.PREDICT: Status.CHOSEN}.get(phase)
        ints[Field.PHASE], ints[Field.ROWS] = phase, len(members)
        tokens, positions, own_starts = [], [], []
        for row, position in enumerate(members):
            is_mask = self.status[position] == masked
            tokens.append(state.mask_token_id if is_mask else self.token[position])
            positions.append(ints[Field.BLOCK_START] + position)
            own_starts.append(row - position % ints[Field.SLOT_SIZE] if isolated else 0)
        state.row_position[slot] = -1
        rows = slice(0, len(members))
        state.canvas_token[slot, rows] = torch.tensor(tokens, dtype=torch.int64)
        state.row_position[slot, rows] = torch.tensor(positions, dtype=torch.int32)
        state.row_own_start[slot, rows] = torch.tensor(own_starts, dtype=torch.int32)

    def _count(self, counter: Counter, rows: int, amount: int = 1) -> None:
        self.state.counters[counter] += amount
        self.state.counters[Counter.ROWS_FED] += rows
