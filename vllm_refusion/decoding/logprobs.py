"""Log-probabilities of response tokens, for the requests that ask for them.

In serial mode that of the row that picked it. In parallel mode the probability of a token is the
one that accepted it: of the row that

* drafted it in the plan, for the first token of a slot (its certainty);
* stands before it in its slot in the verify pass that accepted it;
* proposed it in the last predict, where infill accepts it untested;
* picked it in place of a token that failed its test there (section 8).

The most likely tokens are those of the same row; a request may name other tokens instead. All are
of the full softmax at temperature 1, or what an engine's ``ScoreKind`` says.

So each token that is picked or tested in a pass takes the row that did it. The last that it took
before it was committed is the one that accepted it: a token that fails its test is picked anew. The
transition records the row (``PositionField``). ``describe``, before it, notes what each row of the
canvas says: a mask's row of its own position, a token's row of the next one, or of what it picks in
place of that. ``take``, after it, hands that on to the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_refusion.decoding.picking import Processing
from vllm_refusion.decoding.sending import sent
from vllm_refusion.decoding.state import DecodeState, Field, Phase

ROWS_AT_ONCE = 64  # of logits in float32


class ScoreKind(NamedTuple):
    """What is reported of tokens, vLLM's ``logprobs_mode``.

    Attributes:
        processed: whether of logits after everything that acts on picks but noise.
        logits: the logits themselves, not log-probabilities.
    """

    processed: bool = False
    logits: bool = False

    @classmethod
    def of(cls, mode: str) -> ScoreKind:
        """Of ``raw_logprobs``, ``processed_logprobs``, ``raw_logits`` or ``processed_logits``."""
        return cls(mode.startswith("processed"), mode.endswith("logits"))


@dataclass
class _Table:
    """What is said of N tokens, with the K most likely ones. The last row is a dump: N + 1 rows.

    Attributes:
        ids: [N+1, 1+K] int32, the token itself first. logprobs: [N+1, 1+K] float32.
        rank: [N+1] int64, of the token among all, from 1.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    rank: torch.Tensor

    @classmethod
    def empty(cls, length: int, count: int, device: torch.device) -> _Table:
        shape = (length + 1, 1 + count)
        return cls(
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.zeros(length + 1, dtype=torch.int64, device=device),
        )

    @property
    def columns(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.logprobs, self.rank

    def write(self, where: torch.Tensor, wanted: torch.Tensor, rows: _Table) -> None:
        """Copies the rows of ``wanted`` [n] bool, the first n, to the places ``where`` [n]."""
        last = len(self.rank) - 1
        where = torch.where(wanted & (where < last), where, last).to(torch.int64)
        for mine, theirs in zip(self.columns, rows.columns, strict=True):
            mine[where] = theirs[: len(where)]

    def read(self, where: torch.Tensor) -> _Table:
        where = where.clamp(0, len(self.rank) - 1).to(torch.int64)
        return _Table(*(column[where] for column in self.columns))


@dataclass
class Record:
    """What is noted of one request.

    Attributes:
        said: by canvas row, in this pass.
        taken: by response position, what stands for each token so far.
        token_ids: [K] int64, those to report; None for the most likely ones.
        in_logits: whether logits are reported.
        processing: what acts on logits before they are reported; None for nothing.
    """

    said: _Table
    taken: _Table
    token_ids: torch.Tensor | None = None
    in_logits: bool = False
    processing: Processing | None = None

    @classmethod
    def empty(
        cls,
        length: int,
        canvas_length: int,
        asked: int | Sequence[int],
        device: torch.device,
        in_logits: bool = False,
        processing: Processing | None = None,
    ) -> Record:
        """For ``length`` response positions and, of each, so many likely tokens or those named."""
        named = None if isinstance(asked, int) else sent(torch.tensor(asked), device)
        count = asked if isinstance(asked, int) else len(asked)
        said, taken = (_Table.empty(rows, count, device) for rows in (canvas_length, length))
        return cls(said, taken, named, in_logits, processing)

    def describe(
        self,
        state: DecodeState,
        req: int,
        bounds: torch.Tensor,
        most: int,
        logits: torch.Tensor,
        start: int,
        picked: torch.Tensor,
        given: torch.Tensor,
        given_prob: torch.Tensor,
    ) -> None:
        """Notes what some rows say in the pass that is about to be decided; waits for nothing.

        Args:
            bounds: [2] int32, the request's rows among all rows of the step.
            most: at least their number.
            logits: [n, V], of the rows of the step from ``start`` on; with penalties where
                they are to be processed.
            picked, given: [rows of the step] int32, picks, and tokens of the rows behind.
            given_prob: [rows of the step] float32, probabilities of those.
        """
        # in serial decoding every row picks, that of a token the next one
        picks = state.canvas_token[req] == state.mask_token_id
        picks = picks | (state.ints[req, Field.RESUME] == Phase.SERIAL)
        # a correction is picked where a token fails; where none is made, nobody takes the row
        corrects = state.ints[req, Field.CORRECTS] > 0
        width = min(most, state.canvas_length)
        for first in range(0, width, ROWS_AT_ONCE):
            row = torch.arange(first, min(first + ROWS_AT_ONCE, width), device=logits.device)
            step_row = bounds[0] + row
            here = (step_row < bounds[1]) & (step_row >= start) & (step_row < start + len(logits))
            step_row = step_row.clamp(start, start + len(logits) - 1)
            passes = given_prob[step_row] > state.token_threshold[req]
            picks_here = picks[row] | (corrects & ~passes)
            token = torch.where(picks_here, picked[step_row], given[step_row])
            rows = logits[step_row - start].float()
            if self.processing is not None:
                rows = self.processing(rows, state.row_target[req, row])
            self.said.write(row, here, self._describe(rows, token))

    def take(self, state: DecodeState, req: int) -> None:
        """Hands on what the rows said, once the pass is decided; waits for nothing."""
        p = torch.arange(state.canvas_length, device=state.device)
        for block, row in (
            (Field.TEST_BLOCK, state.test_row[req]),
            (Field.BLOCK_START, state.pick_row[req]),
        ):
            self.taken.write(state.ints[req, block] + p, row >= 0, self.said.read(row))

    def _describe(self, logits: torch.Tensor, token: torch.Tensor) -> _Table:
        """What rows [n, V] of logits, float32, say of a token each, [n], and of others."""
        ids = token.clamp(0, logits.shape[1] - 1).long()[:, None]
        of_token = logits.gather(1, ids)
        rank = (logits >= of_token).sum(1)
        if self.token_ids is not None:
            ids = torch.cat([ids, self.token_ids.expand(len(ids), -1)], dim=1)
        elif count := self.said.ids.shape[1] - 1:
            ids = torch.cat([ids, logits.topk(count, dim=1).indices], dim=1)
        scores = logits.gather(1, ids)
        if not self.in_logits:
            scores = scores - logits.logsumexp(1, keepdim=True)
        return _Table(ids.int(), scores, rank)

    def emitted(self, start: torch.Tensor, width: int) -> _Table:
        """What stands for ``width`` response tokens from ``start`` (a scalar tensor) on."""
        return self.taken.read(start + torch.arange(width, device=start.device))
