"""PyTorch twin of the kernel in ``serial``: serial decoding (section 7), one request at a time.

Of a serial request the state knows its response tokens up to the last one, t, whose KV is not
written yet, and *drafts* of the positions behind it. Its canvas holds, in this order:

1. t and the drafts under test, each seeing all tokens before it: rows whose KV is kept are the
   first ones, in position order. The row of a token picks the token behind it.
2. *Chains*: masks of consecutive positions. Chain a is what follows if just the first a drafts are
   accepted: it sees the context and a + 1 tokens of the canvas. Its first mask has the position
   whose token that pass picks in any case: where a slot starts there it is the row which picks it.
   The others draft the positions behind it. Where masks are trained to do without (``SKIPS_KNOWN``)
   a chain has that mask at the start of a slot only.

While no token is known there is none to feed: the masks of chain 0 stand alone behind the prompt,
or, where a token's row picks a slot's first token too, behind the prompt's last token fed again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate

import torch

from vllm_refusion.decoding.speculation import (
    ALL_DRAFTING,
    CERTAIN,
    LARGEST_COST,
    LEVELS,
    Drafting,
    Speculation,
    acceptance,
    chance_of,
    chance_table,
    cost_of,
    cost_table,
)
from vllm_refusion.decoding.state import ACCEPTANCE_WINDOW, Counter, DecodeState, Field, Phase
from vllm_refusion.triton_kernels.compose_twin import Row, write_canvas

GIVEN = 0.9375  # confidence in a draft that is not the model's own


def serial_transition_twin(
    state: DecodeState,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    logits_start: torch.Tensor,
    num_computed: torch.Tensor,
    prefill_len: torch.Tensor,
    picked: torch.Tensor,
    picked_prob: torch.Tensor,
    sampled: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    speculation: Speculation,
    drafting: Collection[Drafting] = ALL_DRAFTING,
) -> None:
    """Moves every serial request of a batch by one pass and writes its next canvas.

    Arguments are those of ``transition_twin``; of other requests nothing is touched. ``drafting``:
    where drafts may come from.
    """
    starts, first_logit = query_start_loc.tolist(), logits_start.tolist()
    for row, req in enumerate(idx_mapping.tolist()):
        ints = state.ints[req].tolist()
        if ints[Field.RESUME] != Phase.SERIAL or ints[Field.PHASE] == Phase.IDLE:
            continue
        request = _Request.load(state, req, speculation, drafting)
        query_len = starts[row + 1] - starts[row]
        decode_rows = first_logit[row + 1] - first_logit[row]
        kept, fed = 0, min(query_len, ints[Field.CANVAS])
        known = ints[Field.EMITTED]
        # rows without statistics are of a prefill: tokens that it need not feed
        decides = ints[Field.PHASE] == Phase.SERIAL and decode_rows >= query_len
        if ints[Field.PHASE] == Phase.PREFILL:
            kept = min(query_len, int(prefill_len[req]) - int(num_computed[req]))
            fed = min(query_len - kept, ints[Field.CANVAS])
            if int(num_computed[req]) + query_len >= int(prefill_len[req]):
                request.ints[Field.PHASE] = Phase.SERIAL
                decides = known == 0
        tokens: list[int] = []
        state.pick_row[req] = state.test_row[req] = -1
        if decides and ints[Field.ROWS] <= min(fed, decode_rows):
            rows = slice(first_logit[row], first_logit[row] + fed)
            tokens = request.decide(picked[rows].tolist(), picked_prob[rows])
            # the token that was picked last is fed by the next pass
            kept += len(tokens) if known else 0
        elif ints[Field.PHASE] == Phase.SERIAL or ints[Field.PHASE] == Phase.DONE:
            state.counters[Counter.IDLE] += 1
        sampled[row, : len(tokens)] = torch.tensor(tokens, dtype=sampled.dtype)
        num_sampled[row], num_rejected[row] = len(tokens), query_len - kept
        state.ints[req] = torch.tensor(request.ints, dtype=torch.int32)


def give_drafts_twin(
    state: DecodeState, reqs: torch.Tensor, drafts: torch.Tensor, speculation: Speculation
) -> None:
    """Puts other drafts in the place of those at hand and writes the canvases anew.

    Requests whose canvas begins with no known token, as the first one does, keep what they have.

    Args:
        reqs: [K] int64, requests in serial mode.
        drafts: [K, W] int32, of each the tokens behind the known ones; padded with -1. A draft that
            the request has at this place keeps its confidence; others have ``GIVEN``.
    """
    for req, given in zip(reqs.tolist(), drafts.tolist(), strict=True):
        request = _Request.load(state, req, speculation, ALL_DRAFTING)
        if request.ints[Field.PHASE] != Phase.SERIAL or request.ints[Field.EMITTED] == 0:
            continue
        number = given.index(-1) if -1 in given else len(given)
        confidence = torch.full((number,), GIVEN)
        for i, (token, old) in enumerate(zip(given[:number], request.token)):
            confidence[i] = request.confidence[i] if token == old else GIVEN
        request.token, request.confidence = given[:number], confidence
        request.compose(int(state.canvas_token[req, 0]))
        state.ints[req] = torch.tensor(request.ints, dtype=torch.int32)


@dataclass
class _Request:
    """A serial request; ``token`` and ``confidence`` are its drafts, of the next positions."""

    state: DecodeState
    req: int
    price: int
    prior: int
    drafting: Collection[Drafting]
    ints: list[int]
    token: list[int]
    confidence: torch.Tensor

    @classmethod
    def load(
        cls,
        state: DecodeState,
        req: int,
        speculation: Speculation,
        drafting: Collection[Drafting],
    ) -> _Request:
        drafts = int(state.ints[req, Field.DRAFTS])
        return cls(
            state,
            req,
            speculation.row_price,
            speculation.prior,
            drafting,
            state.ints[req].tolist(),
            state.token[req, :drafts].tolist(),
            state.confidence[req, :drafts].clone(),
        )

    def starts_slot(self, position: int) -> bool:
        """Whether the token there is picked in the row of a mask."""
        return bool(self.ints[Field.MASKED_STARTS]) and position % self.ints[Field.SLOT_SIZE] == 0

    def leads(self, position: int) -> int:
        """Masks of a chain from that position on that draft nothing: 1 or 0."""
        return int(not self.ints[Field.SKIPS_KNOWN] or self.starts_slot(position))

    def decide(self, picked: list[int], picked_prob: torch.Tensor) -> list[int]:
        """Accepts drafts while they are what is picked; returns the tokens newly known."""
        ints, known, fed = self.ints, self.ints[Field.EMITTED], len(picked)
        chain_row = self.state.rider_row[self.req].tolist()
        under_test = max(0, min(ints[Field.TESTS], fed - 1))

        def row_of(accepted: int) -> int:
            """The row that picks the token behind so many accepted drafts."""
            return chain_row[accepted] if self.starts_slot(known + accepted) else accepted

        def pick(accepted: int) -> int | None:
            """That token; None where the row was not fed."""
            row = row_of(accepted)
            return picked[row] if 0 <= row < fed else None

        accepted = 0
        while accepted < under_test and pick(accepted) == self.token[accepted]:
            accepted += 1
        last = pick(accepted)
        tokens = self.token[:accepted] + ([] if last is None else [last])
        refused = accepted < len(self.token) and last is not None and last != self.token[accepted]
        self._learn(accepted, accepted + int(refused and accepted < under_test), fed)
        del tokens[ints[Field.MAX_TOKENS] - known :]
        ends = known + len(tokens) == ints[Field.MAX_TOKENS]
        if ints[Field.EOS] >= 0 and ints[Field.EOS] in tokens:
            del tokens[tokens.index(ints[Field.EOS]) + 1 :]
            ends = True
        ints[Field.BLOCK_START] = known
        self.state.pick_row[self.req, : len(tokens)] = torch.tensor(
            [row_of(accepted) for accepted in range(len(tokens))], dtype=torch.int32
        )
        ints[Field.EMITTED] += len(tokens)
        ints[Field.LAST_TOKENS] = len(tokens)
        self.state.counters[Counter.TOKENS] += len(tokens)
        self.state.response[self.req, known : known + len(tokens)] = torch.tensor(tokens).int()
        if ends:
            ints[Field.PHASE] = Phase.DONE
            return tokens
        lead = self.leads(known + accepted)
        self._take_drafts(accepted, len(tokens), lead, refused, picked, picked_prob)
        self.compose(tokens[-1])
        return tokens

    def _learn(self, passed: int, tested: int, fed: int) -> None:
        """Counts the pass, and what became of the drafts, also those of late for the request."""
        ints, counters = self.ints, self.state.counters
        ints[Field.PASSES] += 1
        for counter, amount in (
            (Counter.SERIAL, 1),
            (Counter.ROWS_FED, fed),
            (Counter.RIDER_ROWS_FED, fed - ints[Field.ROWS]),
            (Counter.DRAFTS_TESTED, tested),
            (Counter.DRAFTS_PASSED, passed),
        ):
            counters[counter] += amount
        ints[Field.TESTED] += tested
        ints[Field.PASSED] += passed
        if ints[Field.TESTED] >= ACCEPTANCE_WINDOW:
            ints[Field.TESTED] //= 2
            ints[Field.PASSED] //= 2

    def _take_drafts(
        self,
        accepted: int,
        advance: int,
        lead: int,
        refused: bool,
        picked: list[int],
        prob: torch.Tensor,
    ) -> None:
        """The drafts from now on: those of the chain that came true, else old ones that may."""
        row = int(self.state.rider_row[self.req, accepted])
        end = min(row + int(self.state.rider_width[self.req, accepted]), len(picked))
        if row >= 0 and end - row > lead:
            self.token, self.confidence = picked[row + lead : end], prob[row + lead : end]
        elif refused or Drafting.KEPT not in self.drafting:
            self.token, self.confidence = [], prob[:0]
        else:
            self.token, self.confidence = self.token[advance:], self.confidence[advance:]

    def compose(self, last: int) -> None:
        """Writes the drafts and the next canvas behind ``last``, the last token known."""
        ints, state = self.ints, self.state
        drafts = ints[Field.DRAFTS] = len(self.token)
        state.token[self.req, :drafts] = torch.tensor(self.token, dtype=torch.int32)
        state.confidence[self.req, :drafts] = self.confidence
        known, mask = ints[Field.EMITTED], state.mask_token_id
        costs = [0, *accumulate(map(cost_of, self.confidence.tolist()))]
        tests = self._worth_testing(costs)
        widths = self._chain_widths(costs, tests)
        rows = [
            Row(token, known - 1 + i, known + i)
            for i, token in enumerate([last, *self.token[:tests]])
        ]
        chain_row, chain_width = [-1] * state.canvas_length, [0] * state.canvas_length
        chain_at = [-1] * state.canvas_length
        ints[Field.ROWS] = 1
        # that of the first position is needed where a slot starts, the others by their worth
        for accepted in [0, *range(tests, 0, -1)]:
            width, start = widths[accepted], len(rows)
            if width == 0:
                continue
            chain_row[accepted], chain_width[accepted], chain_at[start] = start, width, accepted
            first = known + accepted + 1 - self.leads(known + accepted)
            rows += [
                Row(mask, at, at, run_end=accepted + 1, own_start=start)
                for at in range(first, first + width)
            ]
            if accepted == 0 and self.starts_slot(known):
                ints[Field.ROWS] = start + 1
        ints[Field.TESTS], ints[Field.CANVAS] = tests, len(rows)
        write_canvas(
            state,
            self.req,
            rows,
            rider_row=chain_row,
            rider_width=chain_width,
            canvas_row=chain_at,
        )

    def _worth_testing(self, costs: list[int]) -> int:
        """How many drafts to feed: while what one brings exceeds the price of its rows."""
        ints = self.ints
        known = ints[Field.EMITTED]
        most = min(len(self.token), ints[Field.MAX_TOKENS] - known - 1, ints[Field.MOST_TESTS])
        tests = 0
        while tests < most:
            rows = 1 + int(self.starts_slot(known + tests + 1))
            if chance_of(costs[tests + 1]) <= rows * self.price:
                break
            tests += 1
        return tests

    def _chain_widths(self, costs: list[int], tests: int) -> list[int]:
        """Masks of each chain: those worth their price, which is raised until all fit."""
        room = self.state.canvas_length - 1 - tests
        price = self.price
        while True:
            widths = [self._chain_width(costs, tests, a, price) for a in range(tests + 1)]
            if sum(widths) <= room:
                return widths
            price = 2 * price + LEVELS

    def _chain_width(self, costs: list[int], tests: int, accepted: int, price: int) -> int:
        """Masks behind so many accepted drafts, at a price of a row in tokens.

        Mask i drafts a token that is fed, at that price, and passes with the chance of i drafts of
        the request's acceptance; it is worth something if the chain comes true. A first mask that
        picks nothing is a cost of the others.
        """
        position = self.ints[Field.EMITTED] + accepted
        starts, lead = int(self.starts_slot(position)), self.leads(position)
        comes_true = chance_of(costs[accepted])
        comes_true -= chance_of(costs[accepted + 1]) if accepted < tests else 0
        kind = Drafting.AHEAD if accepted == tests else Drafting.BRANCHES
        if comes_true <= 0 or kind not in self.drafting:
            return starts
        passes = acceptance(self.ints[Field.PASSED], self.ints[Field.TESTED], self.prior)
        each = cost_table()[passes]
        least = price + price * CERTAIN // comes_true
        # drafts whose chance exceeds the least one
        count = max(0, (_cost_of(least) - 1) // each)
        count = min(count, self.ints[Field.MOST_MASKS] - lead)
        count = min(count, self.ints[Field.MAX_TOKENS] - 2 - position)
        if count <= 0:
            return starts
        through = chance_of(each) - chance_of(min(each * (count + 1), LARGEST_COST))
        drafted = through * CERTAIN // (CERTAIN - chance_of(each))
        gain = comes_true * (drafted - count * price) // CERTAIN - price * (count + lead - starts)
        return count + lead if gain > 0 else starts


def _cost_of(chance: int) -> int:
    """The lowest cost whose chance is at most that."""
    low, high = 0, LARGEST_COST
    while low < high:
        middle = (low + high) // 2
        if chance_table()[middle] > chance:
            low = middle + 1
        else:
            high = middle
    return low
