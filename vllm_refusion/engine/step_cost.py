"""What a step costs by its rows: the forward pass, what is around it, and the host's own time."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from vllm_refusion.engine.pass_cost import PassCost

FOLLOWS = 0.1  # share of a change that an estimate takes in a step
FORGETS = 0.01  # share of the host's time that is doubted in a step that it did not delay


class _Marks(NamedTuple):
    """Of a step: its end on the device; rows, 0 if some are of prompts.

    ``late``: whether the device had nothing left to do when the host launched the pass.
    ``drafts``: whether masks of drafts were among the rows.
    """

    late: bool
    ended: torch.cuda.Event
    rows: int
    drafts: bool


class StepCost:
    """Milliseconds of a step by its rows, of late.

    ``passes`` is measured at start. How much more steps take (longer contexts, statistics, a clock
    that heat slows down) and what the host takes for one are learned from the steps that run: below
    the host's time rows cost nothing. Marks are read once they have passed: nothing waits for them.

    Args:
        drafting: of passes with as many masks as drafts need, where an adapter makes masks dearer
            than tokens; None: ``passes``.
        learns: False where nothing can be learned: on a CPU, or in a tensor parallel group, whose
            workers must choose alike while their clocks differ; or where the host prepares a step
            after the one before, so that both their times count.
    """

    def __init__(self, passes: PassCost, learns: bool, drafting: PassCost | None = None) -> None:
        self.passes, self.drafting = passes, drafting
        self.scale, self.host = 1.0, 0.0
        self._learns = learns
        # milliseconds by rows and whether there are drafts, as far as asked
        self._known: dict[tuple[int, bool], float] = {}
        self._late: bool | None = None  # of the step that is being launched
        self._steps: deque[_Marks] = deque()  # the last one learned from, and those after it

    def of(self, rows: np.ndarray, drafts: np.ndarray | bool = False) -> np.ndarray:
        """Milliseconds of steps of so many rows each, with masks of drafts or without."""
        return np.maximum(self._of_passes(rows, drafts) * self.scale, self.host)

    def _of_passes(self, rows: np.ndarray, drafts: np.ndarray | bool) -> np.ndarray:
        passes = self.passes.of(rows)
        if self.drafting is None:
            return passes
        return np.where(drafts, self.drafting.of(rows), passes)

    def launch(self) -> None:
        """Called before a forward pass is launched."""
        if self._learns:
            self._late = bool(self._steps) and self._steps[-1].ended.query()

    def end(self, rows: int, drafts: bool) -> None:
        """Marks the end of a step, of ``rows``, or 0 if some are of prompts."""
        if self._late is not None:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._steps.append(_Marks(self._late, ended, rows, drafts))
            self._late = None

    def learn(self) -> None:
        """Takes the steps into account that have ended on the device."""
        while len(self._steps) > 1 and self._steps[1].ended.query():
            before, step = self._steps.popleft(), self._steps[0]
            if before.rows and step.rows:
                took = before.ended.elapsed_time(step.ended)
                self.observe(step.rows, took, step.late, step.drafts)

    def observe(self, rows: int, took: float, late: bool, drafts: bool = False) -> None:
        """A step of ``rows`` that ended ``took`` ms after the one before.

        The host's time is only seen where the device waits for it. Else the step says what the
        device takes, and that the host takes no more: time makes sure that it is asked again.
        """
        if late:
            self.host += FOLLOWS * (took - self.host)
            return
        self.host = min(self.host, took) * (1 - FORGETS)
        kind = rows, drafts
        if kind not in self._known:
            self._known[kind] = float(self._of_passes(np.array(rows), drafts))
        self.scale += FOLLOWS * (took / self._known[kind] - self.scale)
