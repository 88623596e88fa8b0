"""PyTorch twin of the kernel in ``transition``: one request at a time, plain Python.

Steps that both have are functions of the same names; rules are in ``vllm_refusion.decoding.rules``.

The state and its fields are described in ``vllm_refusion.decoding.state``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from vllm_refusion.decoding import rules
from vllm_refusion.decoding.speculation import ALL_SAVINGS, NO_RIDERS, Saving, Speculation
from vllm_refusion.decoding.state import (
    ACCEPTANCE_WINDOW,
    Counter,
    DecodeState,
    Field,
    Phase,
    Status,
)
from vllm_refusion.triton_kernels.compose_twin import INFILLED, OPEN, Request

EVIDENCE = ("pick_row", "tested_token", "test_row", "stays")


def transition_twin(
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
    savings: Collection[Saving] = ALL_SAVINGS,
) -> None:
    """Moves every request of a batch by one pass (algorithm section 3) and writes its next canvas.

    Args:
        idx_mapping: [R] int64, request index of each batch row.
        query_start_loc, logits_start: [R+1] int32, where a request's rows start among all query
            rows and among the rows of the statistics.
        num_computed, prefill_len: [max_requests] int32, KV entries before this pass, and KV
            entries that are prefill (prompt, after a preemption also emitted whole slots).
        picked, picked_prob, given_prob: [rows] statistics of the canvas rows (``token_stats``);
            the given token of a row is the token of the next canvas row.
        emit_limit: [R] int32, the most tokens that may be delivered.
        sampled: [R, W] int, out: tokens newly final in position order.
        num_sampled: [R] int32, out: their number.
        num_rejected: [R] int32, out: query rows whose KV is not kept.
        speculation: which rows the next canvas takes.
        savings: the ways in which it may save passes; the kernel takes all.
    """
    starts = query_start_loc.tolist()
    first_logit = logits_start.tolist()
    for row, req in enumerate(idx_mapping.tolist()):
        query_len = starts[row + 1] - starts[row]
        ints = state.ints[req].tolist()
        if ints[Field.PHASE] != Phase.IDLE and ints[Field.RESUME] == Phase.SERIAL:
            continue  # see ``serial_twin``
        if ints[Field.PHASE] == Phase.IDLE:
            num_sampled[row], num_rejected[row] = 0, query_len
            continue
        step = _Step.load(state, req, speculation, savings)
        step.query_len = query_len
        step.decode_rows = first_logit[row + 1] - first_logit[row]
        step.computed, step.prefill_len = int(num_computed[req]), int(prefill_len[req])
        step.fed = min(query_len, ints[Field.CANVAS])
        if ints[Field.PHASE] == Phase.PREFILL:
            step.fed = max(0, query_len - (step.prefill_len - step.computed))
        rows = slice(first_logit[row], first_logit[row] + step.fed)
        step.picked, step.picked_prob = picked[rows].tolist(), picked_prob[rows]
        step.given_prob = given_prob[rows]
        num_rejected[row] = query_len - step.run()
        # a prompt may have come with the first plan
        decodes = ints[Field.PHASE] != Phase.PREFILL or (
            ints[Field.RESUME] == Phase.START and step.ints[Field.PHASE] == Phase.VERIFY
        )
        tokens = step.emit(int(emit_limit[row])) if decodes else []
        num_sampled[row] = len(tokens)
        sampled[row, : len(tokens)] = torch.tensor(tokens, dtype=sampled.dtype)
        step.save()


@dataclass
class _Step(Request):
    """One pass of one request."""

    query_len: int = 0
    decode_rows: int = 0  # of query_len, those with statistics: the others are a prefill's
    fed: int = 0
    computed: int = 0
    prefill_len: int = 0
    picked: list[int] = field(default_factory=list)
    picked_prob: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    given_prob: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    passed: int = 0  # of the tokens tested
    tested: int = 0

    def run(self) -> int:
        """Decides, builds the next canvas; returns how many leading rows keep their KV."""
        ints, phase = self.ints, Phase(self.ints[Field.PHASE])
        self.canvas_row, self.rider_row, self.rider_width = (
            column[self.req].tolist()
            for column in (self.state.canvas_row, self.state.rider_row, self.state.rider_width)
        )
        self.first_rider = ints[Field.ROWS]
        ints[Field.TEST_BLOCK] = ints[Field.BLOCK_START]
        width = self.state.canvas_length
        self.pick_row, self.tested_token, self.test_row = ([-1] * width for _ in range(3))
        self.stays = [0] * width
        if phase == Phase.PREFILL:
            return self._prefill()
        if phase == Phase.REPLAY:
            return self._replay()
        if phase == Phase.DONE or self.decode_rows < max(self.query_len, ints[Field.ROWS]):
            self._count(Counter.IDLE)
            return 0
        return self._decide()

    def save(self) -> None:
        super().save()
        for name in EVIDENCE:
            values = torch.tensor(getattr(self, name), dtype=torch.int32)
            getattr(self.state, name)[self.req] = values

    def _prefill(self) -> int:
        if self.computed + self.query_len >= self.prefill_len:
            self._resume(self.prefill_len - self.ints[Field.PROMPT_LEN])
        return self.query_len - self.fed

    def _replay(self) -> int:
        done = self.computed - self.ints[Field.PROMPT_LEN]
        kept = min(self.query_len, self.ints[Field.COMMITTED] - done)
        self._count(Counter.REPLAY)
        self._count(Counter.ROWS_FED, kept)
        self._resume(done + kept)
        return kept

    def _decide(self) -> int:
        """A plan, a verification, or a pass of an infill, and what rode with it."""
        ints, phase = self.ints, self.ints[Field.PHASE]
        ints[Field.PASSES] += 1
        self._count(Counter.ROWS_FED, self.fed)
        self._count(Counter.RIDER_ROWS_FED, self.fed - ints[Field.ROWS])
        if phase == Phase.PLAN:
            self._count(Counter.PLAN)
            self._plan(0)
            kept = 0
        elif phase == Phase.VERIFY:
            self._count(Counter.VERIFY)
            kept = self._verify()
        else:
            self._count(Counter.PREDICT if self._waiting() else Counter.INFILL_VERIFY)
            kept = self._infill()
        self._ride_predicts()
        self._learn()
        self.compose()
        return kept

    def emit(self, limit: int) -> list[int]:
        """Tokens newly final in position order, at most ``limit``.

        The first slot not committed may have tokens that will not change any more. Its last one
        waits for the commit, so that whole slots emitted are slots committed.
        """
        ints = self.ints
        end = head = next(
            (p for p, s in enumerate(self.status) if s != Status.COMMITTED), len(self.status)
        )
        while end < min(head + ints[Field.SLOT_SIZE] - 1, len(self.status)) and (
            self.status[end] == Status.ACCEPTED
            or (self.status[end] == Status.CHOSEN and not self.takes_test(end))
        ):
            self.state.response[self.req, ints[Field.BLOCK_START] + end] = self.token[end]
            end += 1
        end = min(
            ints[Field.BLOCK_START] + end,
            ints[Field.LIMIT],
            ints[Field.MAX_TOKENS],
            ints[Field.EMITTED] + limit,
        )
        start = ints[Field.EMITTED]
        if end <= start:
            return []
        ints[Field.EMITTED] = end
        self._count(Counter.TOKENS, end - start)
        return self.state.response[self.req, start:end].tolist()

    def _plan(self, first_row: int) -> None:
        """3.1, the masks of the remaining slots being the rows from ``first_row`` on."""
        ints = self.ints
        size = ints[Field.SLOT_SIZE]
        ints[Field.DRAW] += 1
        rows = dict(enumerate(self.positions(Status.MASKED), first_row))
        opens = list(rows)[::size]
        certainties = [float(self.picked_prob[row]) for row in opens]
        chosen = rules.choose_slots(certainties, float(self.state.slot_threshold[self.req]))
        for row, position in rows.items():
            self.pick_row[position] = row
        for first in [opens[i] for i in chosen]:
            for row in range(first, first + size):
                self._pick(rows[row], row, origin=rows[first])
        self._count(Counter.SLOTS_CHOSEN, len(chosen))
        ints[Field.PHASE] = Phase.VERIFY

    def _pick(self, position: int, row: int, origin: int) -> None:
        self.status[position] = Status.CHOSEN
        self.token[position] = self.picked[row]
        self.confidence[position] = self.picked_prob[row]
        self.origin[position] = origin
        self.pick_row[position] = row

    def _verify(self) -> int:
        ints = self.ints
        size = ints[Field.SLOT_SIZE]
        fed = [p for p, row in enumerate(self.canvas_row) if row >= 0]
        slots = self.by_slot(self.positions(Status.CHOSEN))
        runs = [self._run_tests(positions) for positions in slots]
        for p in sum(slots, []):
            self.rounds[p] = 0
        drafts = [self.token[p] for p in fed]
        kept, ends = rules.committed_prefix(drafts, runs, size, ints[Field.EOS])
        if ends:
            self._commit(fed[:kept], isolated=False)
            self._cut_after(fed[kept - 1])
            self._after_commit(None)
            return kept
        if kept:
            self._commit(fed[:kept], isolated=False)
            for position in fed[kept:]:
                self.status[position] = Status.MASKED
            self._after_commit(fed[kept - size])
            return kept
        for positions, run in zip(slots, runs):
            # of other slots than the first the rows saw more than the slot
            self._accept(positions, run, corrects=positions is slots[0])
        self._accept_eos()
        ints[Field.PHASE] = Phase.INFILL
        ints[Field.KEPT] = self._keepable()
        return ints[Field.KEPT]

    def _infill(self) -> int:
        ints = self.ints
        waiting = self._waiting()
        for positions in self.by_slot(self.positions(Status.CHOSEN)):
            self._accept(positions, self._run_tests(positions), corrects=True)
        for blank in waiting:
            fed = sum(self.canvas_row[p] >= 0 for p in blank)
            if fed:
                self._propose(blank, fed, self.canvas_row[blank[0]])
        ends = self._accept_eos()
        kept = self._keepable()
        ints[Field.KEPT] += kept
        slots = self.positions(*INFILLED)
        if ints[Field.KEPT] >= len(slots):
            rounds = max(self.rounds[p] for p in slots)
            ints[Field.DRAW] += rounds
            self._count(Counter.INFILLS)
            self._count(Counter.INFILL_ROUNDS, rounds)
            self._commit(slots, isolated=True)
            ints[Field.KEPT] = 0
            last_slot = slots[-1] - slots[-1] % ints[Field.SLOT_SIZE]
            self._after_commit(None if ends else last_slot)
        return kept

    def _run_tests(self, proposals: list[int]) -> int:
        """How many of a slot's proposals are accepted in this pass."""
        fed = [p for p in proposals if self.canvas_row[p] >= 0]
        for p in fed:
            self.tested_token[p] = self.token[p]
            if self.takes_test(p):
                self.test_row[p] = self.canvas_row[p] - 1
        given = [self._given(p) for p in fed]
        run = rules.accepted_run(given, float(self.state.token_threshold[self.req]))
        self.tested += sum(probability is not None for probability in given[: run + 1])
        self.passed += sum(probability is not None for probability in given[:run])
        return run

    def _given(self, proposal: int) -> float | None:
        """The probability that the row before a proposal's gives to it; None: not asked for."""
        if not self.takes_test(proposal):
            return None
        row = self.canvas_row[proposal]
        return float(self.given_prob[row - 1]) if row > 0 else -1.0

    def _learn(self) -> None:
        """Counts the tokens tested and passed, those of late for the request itself."""
        ints = self.ints
        self._count(Counter.TOKENS_TESTED, self.tested)
        self._count(Counter.TOKENS_PASSED, self.passed)
        ints[Field.TESTED] += self.tested
        ints[Field.PASSED] += self.passed
        if ints[Field.TESTED] >= ACCEPTANCE_WINDOW:
            ints[Field.TESTED] //= 2
            ints[Field.PASSED] //= 2

    def _accept(self, proposals: list[int], run: int, corrects: bool) -> None:
        """Accepts the first of a slot's proposals; where one failed, an operation starts.

        Behind it, if ``corrects`` and the request does: then another token takes its place.
        """
        for p in proposals[:run]:
            self.status[p] = Status.ACCEPTED
        if run == len(proposals) or self.canvas_row[proposals[run]] < 0:
            return  # the others are not tested yet
        size, begin = self.ints[Field.SLOT_SIZE], proposals[run]
        slot_end = begin - begin % size + size
        if corrects and self.ints[Field.CORRECTS]:
            self._correct(begin)
            begin += 1
        for p in range(begin, slot_end):
            if self.status[p] in OPEN:
                self.status[p] = Status.BLANK
                self.origin[p] = begin

    def _correct(self, position: int) -> None:
        """Accepts, in place of a token that failed, the one that the row before it picked."""
        self._pick(position, self.canvas_row[position] - 1, self.origin[position])
        self.status[position] = Status.ACCEPTED
        self.canvas_row[position] = -1  # that row held the token that failed

    def _propose(self, blank: list[int], count: int, first_row: int) -> None:
        """Takes ``count`` proposals for the blank positions of a slot."""
        if self.origin[blank[0]] == blank[0]:  # the operation begins
            for p in blank:
                self.rounds[p] += 1
        for row, p in enumerate(blank[:count], first_row):
            self._pick(p, row, self.origin[p])

    def _ride_predicts(self) -> None:
        """Takes the proposals for slots whose rider is in the canvas."""
        for blank in self._waiting():
            row, width = self.rider_row[blank[0]], self.rider_width[blank[0]]
            if row < 0 or row + width > self.fed:
                continue
            if self.ints[Field.CORRECTS] and self.origin[blank[0]] == blank[0]:
                continue  # a correction has ended the operation that would have gone on
            if row >= self.first_rider:
                self._count(Counter.PREDICTS_RIDDEN)
            self._propose(blank, width, row)

    def _keepable(self) -> int:
        """Leading canvas rows that hold accepted tokens and are the next in commit order."""
        following = self.positions(*INFILLED)[self.ints[Field.KEPT] :]
        for row, p in enumerate(following):
            final = self.status[p] == Status.ACCEPTED and self.canvas_row[p] == row
            if not final or self._is_asked(p):
                return row
        return len(following)

    def _is_asked(self, position: int) -> bool:
        """Whether the token's row will be asked about the token behind it."""
        behind = position + 1
        if behind % self.ints[Field.SLOT_SIZE] == 0 or self.status[behind] not in OPEN:
            return False
        return self.takes_test(behind)

    def _accept_eos(self) -> bool:
        """Cuts the infill after the first accepted EOS, if there is one."""
        accepted = self.positions(Status.ACCEPTED)
        end = rules.until_eos([self.token[p] for p in accepted], self.ints[Field.EOS])
        if end:
            self._cut_after(accepted[end - 1])
        self._stay(self.positions(Status.ACCEPTED))
        return end > 0

    def _stay(self, positions: list[int]) -> None:
        """Notes of tokens under verification that they are accepted, for infill or for good."""
        for p in positions:
            self.stays[p] = int(self.tested_token[p] >= 0 > self.pick_row[p])

    def _cut_after(self, position: int) -> None:
        """EOS at a block position: everything after it that is not committed is dropped."""
        ints = self.ints
        for p in range(position + 1, len(self.status)):
            if self.status[p] != Status.COMMITTED:
                self.status[p] = Status.DROPPED
        ints[Field.LIMIT] = min(ints[Field.LIMIT], ints[Field.BLOCK_START] + position + 1)

    def _commit(self, positions: list[int], isolated: bool) -> None:
        """Commits tokens whose KV is final, in this order."""
        ints, state, req = self.ints, self.state, self.req
        committed = ints[Field.COMMITTED]
        self._stay(positions)
        for row, position in enumerate(positions):
            response_position = ints[Field.BLOCK_START] + position
            self.status[position] = Status.COMMITTED
            state.response[req, response_position] = self.token[position]
            state.order[req, committed + row] = response_position
            state.group_context[req, committed + row] = committed if isolated else -1
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
        if first_row >= 0 and first_row + len(self.positions(Status.MASKED)) <= self.fed:
            self._count(Counter.PLANS_RIDDEN)
            self._plan(first_row)

    def _start_block(self, start: int) -> None:
        ints = self.ints
        ints[Field.BLOCK_START] = start
        length = self.block_length_at(start)
        width = self.state.canvas_length
        self.status = [Status.MASKED if p < length else Status.DROPPED for p in range(width)]
        self.token = [0] * width
        ints[Field.PHASE] = Phase.PLAN

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

    def _count(self, counter: Counter, amount: int = 1) -> None:
        self.state.counters[counter] += amount
