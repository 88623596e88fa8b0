"""What is trained on when: a function of the seed and of how many examples came before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from vllm_refusion.training.collator import (
    Draw,
    Example,
    autoregressive,
    draw,
    sequence,
)

OBJECTIVES = ("refusion", "autoregressive")
_SHUFFLES = 1 << 62  # keys of epochs' orders lie above those of examples


def generator(seed: int, number: int) -> np.random.Generator:
    """A stream of its own for each (seed, number)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


class Examples(Protocol):
    """What a course is made of: a list, or a ``TokenStore``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Course:
    """All examples of a run, as a dataset: item i is the i-th example seen.

    Every epoch has an order of its own; within a step it may be by length. An item depends on
    (seed, i) only, not on worker, device, or where a run was resumed.
    """

    def __init__(
        self,
        examples: Examples,
        length: int,
        seed: int,
        slot_sizes: Sequence[int],
        mask_token_id: int | None,
        batch_size: int = 1,
        lengths: Sequence[int] = (),
        block_share: float = 0.0,
        infill: bool = False,
        certainty: bool = False,
        ordered_share: float = 0.0,
        joined: bool = False,
    ) -> None:
        """Without ``mask_token_id`` items are those of an autoregressive twin.

        ``lengths`` of the examples, if given, sort what each step of ``batch_size`` sees.

        Both shares go to ``draw``; ``infill``, ``certainty`` and ``joined`` to ``sequence``.
        """
        self._shares = block_share, ordered_share
        self._infill, self._certainty, self._joined = infill, certainty, joined
        self._batch_size, self._lengths = batch_size, lengths
        self._examples, self._length, self._seed = examples, length, seed
        self._slot_sizes, self._mask = slot_sizes, mask_token_id
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)
        self._step = lru_cache(maxsize=8)(self._sorted_step)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._row(self._number(index), self.example(index))

    def _row(self, number: int, example: Example) -> Any:
        """Item ``number``: a ``Sequenced``; other courses make others."""
        if self._mask is None:
            return autoregressive(example)
        drawn = self._drawn(number, example)
        return sequence(example, drawn, self._mask, self._infill, self._certainty, self._joined)

    def _drawn(self, number: int, example: Example) -> Draw:
        chance = generator(self._seed, number)
        return draw(len(example.response), self._slot_sizes, chance, *self._shares)

    def example(self, index: int) -> Example:
        """What item ``index`` is made of."""
        return self._examples[self._example_at(self._number(index))]

    def _number(self, index: int) -> int:
        """How many examples came before item ``index``, unless for the order within its step."""
        if not self._lengths:
            return index
        step, place = divmod(index, self._batch_size)
        return self._step(step)[place]

    def _example_at(self, index: int) -> int:
        epoch, place = divmod(index, len(self._examples))
        return self._order(epoch)[place]

    def _sorted_step(self, step: int) -> list[int]:
        """The numbers of what a step sees, longest first: micro batches then need little padding.

        Longest first also shows at once whether memory suffices.
        """
        first = step * self._batch_size
        seen = range(first, min(first + self._batch_size, self._length))
        return sorted(seen, key=self._fed, reverse=True)

    def _fed(self, number: int) -> int:
        """How many tokens are fed: ``infill`` and ``certainty`` feed some of the response twice."""
        place = self._example_at(number)
        once = self._lengths[place]
        if not (self._infill or self._certainty):
            return once
        example = self._examples[place]
        response = len(example.response)
        if self._infill and self._certainty:  # all of it, whatever is drawn
            return once + response
        drawn = self._drawn(number, example)
        size = drawn.slot_size
        clean = sum(min(size, response - n * size) for n in drawn.clean)
        return once + (clean if self._infill else response - clean)

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return generator(self._seed, _SHUFFLES + epoch).permutation(len(self._examples))
