"""Log-probabilities of response tokens, for the requests that ask for them.

The probability of a token is the one that accepted it: of the row that

* drafted it in the plan pass, for the first token of a slot (its certainty);
* stands before it in its slot in the verify pass that accepted it;
* proposed it in the last predict pass, where infill accepts it untested.

The most likely tokens are those of the same row. All are of the full softmax at temperature 1.

``record`` runs before the transition of a pass. It notes what each row says of its own position (a
mask's row) or of the next one (a token's row), and lets the latter, or the former where no test is
made, stand for the token, until it is accepted. What a failed test noted is overwritten later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_refusion.decoding import DecodeState, Field, Phase, Status

MAX_LOGPROBS = 20


@dataclass
class _Table:
    """Noted by response position, the last row being a dump: P + 1 rows, K most likely tokens.

    Attributes:
        ids: [P+1, 1+K] int32, the token itself first. logprobs: [P+1, 1+K] float32.
        rank: [P+1] int64, of the token among all, from 1.
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
        """Copies the rows of ``wanted`` [n] bool to the positions ``where`` [n]."""
        where = torch.where(wanted, where, len(self.rank) - 1).to(torch.int64)
        for mine, theirs in zip(self.columns, rows.columns, strict=True):
            mine[where] = theirs

    def read(self, where: torch.Tensor) -> _Table:
        where = where.clamp(0, len(self.rank) - 1).to(torch.int64)
        return _Table(*(column[where] for column in self.columns))


@dataclass
class Record:
    """What is noted of one request: of masks' rows, and what stands for each token so far."""

    own: _Table
    final: _Table

    @classmethod
    def empty(cls, length: int, count: int, device: torch.device) -> Record:
        """For ``length`` response positions and the ``count`` most likely tokens of each."""
        return cls(_Table.empty(length, count, device), _Table.empty(length, count, device))

    @property
    def count(self) -> int:
        return self.own.ids.shape[1] - 1

    def note(
        self,
        state: DecodeState,
        slot: int,
        start: int,
        logits: torch.Tensor,
        picked: torch.Tensor,
        given: torch.Tensor,
    ) -> None:
        """Notes some rows of the pass that is about to be decided; waits for nothing.

        Args:
            start: the canvas row of the first of the rows.
            logits: [n, V]. picked: [n] int32, the rows' picks. given: [n] int32, the token of the
                canvas row behind each.
        """
        ints = state.ints[slot]
        phase, size, block = ints[Field.PHASE], ints[Field.SLOT_SIZE], ints[Field.BLOCK_START]
        rows = slice(start, start + len(logits))
        position = state.row_position[slot, rows]
        decides = (phase >= int(Phase.PLAN)) & (phase <= int(Phase.INFILL_VERIFY)) & (position >= 0)
        is_mask = state.canvas_token[slot, rows] == state.mask_token_id
        noted = _describe(logits, torch.where(is_mask, picked, given), self.count)
        self.own.write(position, decides & is_mask, noted)

        following = (torch.arange(start, rows.stop, device=position.device) + 1).clamp(
            max=state.canvas_length - 1
        )
        tests_next = state.row_position[slot, following] == position + 1
        tests_next &= ((position + 1) % size != 0) & (given != state.mask_token_id)
        status = state.status[slot]
        here = status[(position - block).clamp(0, state.canvas_length - 1).long()]
        ahead = status[(position + 1 - block).clamp(0, state.canvas_length - 1).long()]
        before = status[(position - 1 - block).clamp(0, state.canvas_length - 1).long()]
        infill, accepted = phase == int(Phase.INFILL_VERIFY), int(Status.ACCEPTED)
        chosen = int(Status.CHOSEN)
        tested = decides & ~is_mask & tests_next & (ahead == chosen)
        self.final.write(position + 1, tested & ~(infill & (here == accepted)), noted)
        untested = (position % size == 0) | (infill & (before == accepted))
        untested &= decides & ~is_mask & (here == chosen)
        self.final.write(position, untested, self.own.read(position))

    def emitted(self, start: torch.Tensor, width: int) -> _Table:
        """What stands for ``width`` response tokens from ``start`` (a scalar tensor) on."""
        return self.final.read(start + torch.arange(width, device=start.device))


def _describe(logits: torch.Tensor, token: torch.Tensor, count: int) -> _Table:
    """What rows [n, V] of logits say of a token each, [n], and of the likeliest ones."""
    logits = logits.float()
    ids = token.clamp(0, logits.shape[1] - 1).long()[:, None]
    of_token = logits.gather(1, ids)
    rank = (logits >= of_token).sum(1)
    count = min(count, logits.shape[1])
    if count:
        ids = torch.cat([ids, logits.topk(count, dim=1).indices], dim=1)
    logprobs = logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)
    return _Table(ids.int(), logprobs, rank)
