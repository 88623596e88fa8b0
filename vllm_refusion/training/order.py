"""What is trained on when: a function of the seed and of how many examples came before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vllm_refusion.training.collator import Example, Sequenced, autoregressive, draw, sequence

OBJECTIVES = ("refusion", "autoregressive")
_SHUFFLES = 1 << 62  # keys of epochs' orders lie above those of examples


def generator(seed: int, number: int) -> np.random.Generator:
    """A stream of its own for each (seed, number)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


class Course:
    """All examples of a run, as a dataset: item i is the i-th example seen.

    Every epoch has an order of its own. An item depends on (seed, i) only, not on worker, device,
    or where a run was resumed.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        length: int,
        seed: int,
        slot_sizes: Sequence[int],
        mask_token_id: int | None,
        objective: str = "refusion",
    ) -> None:
        self._examples, self._length, self._seed = examples, length, seed
        self._slot_sizes, self._mask, self._objective = slot_sizes, mask_token_id, objective
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sequenced:
        example = self.example(index)
        if self._objective == "autoregressive":
            return autoregressive(example)
        drawn = draw(len(example.response), self._slot_sizes, generator(self._seed, index))
        return sequence(example, drawn, self._mask)

    def example(self, index: int) -> Example:
        """What item ``index`` is made of."""
        epoch, place = divmod(index, len(self._examples))
        return self._examples[self._order(epoch)[place]]

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return generator(self._seed, _SHUFFLES + epoch).permutation(len(self._examples))
