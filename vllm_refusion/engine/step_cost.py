"""What a step costs by its rows: the forward pass, what is around it, and the host's own time."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from vllm_refusion.engine.pass_cost import PassCost

LEAST_STEP = 32  # rows over which the cost of one more is taken
FOLLOWS = 0.1  # share of a change that an estimate takes in a step
FORGETS = 0.01  # share of the host's time that is doubted in a step that it did not delay


class _Marks(NamedTuple):
    """Of a step: before its pass, after its last kernel; rows, 0 if some are of prompts.

    ``late``: whether the device had nothing left to do when the host launched the pass.
    """

    late: bool
    launched: torch.cuda.Event
    ended: torch.cuda.Event
    rows: int


class StepCost:
    """Milliseconds of a step by its rows, of late.

    ``passes`` is measured at start. How much more steps take (longer contexts, statistics, a clock
    that heat slows down) and what the host takes for one are learned from the steps that run: below
    the host's time rows cost nothing. Marks are read once they have passed: nothing waits for them.

    Args:
        learns: False where nothing can be learned: on a CPU, or in a tensor parallel group, whose
            workers must choose alike while their clocks differ; or where the host prepares a step
            after the one before, so that both their times count.
    """

    def __init__(self, passes: PassCost, learns: bool) -> None:
        self.passes = passes
        self.scale, self.host = 1.0, 0.0
        self._learns = learns
        self._launched: tuple[bool, torch.cuda.Event] | None = None
        self._steps: deque[_Marks] = deque()  # the last one learned from, and those after it

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Milliseconds of steps of so many rows each."""
        return np.maximum(self.passes.of(rows) * self.scale, self.host)

    def slope(self, rows: int) -> float:
        """Milliseconds of one more row where a step has so many.

        The larger of the slopes before and behind: costs have steps, as products have tiles, and a
        flat place behind a step shall not draw a load over it that would do better in front.
        """
        less, more = rows // 2, rows + max(LEAST_STEP, rows // 4)
        at_less, at, at_more = self.of(np.array([less, rows, more]))
        return max((at - at_less) / max(rows - less, 1), (at_more - at) / (more - rows))

    def launch(self) -> None:
        """Marks the beginning of a forward pass, in stream order."""
        if self._learns:
            late = bool(self._steps) and self._steps[-1].ended.query()
            launched = torch.cuda.Event(enable_timing=True)
            launched.record()
            self._launched = late, launched

    def end(self, rows: int) -> None:
        """Marks the end of a step, of ``rows``, or 0 if some are of prompts."""
        if self._launched is not None:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._steps.append(_Marks(*self._launched, ended, rows))
            self._launched = None

    def learn(self) -> None:
        """Takes the steps into account that have ended on the device."""
        while len(self._steps) > 1 and self._steps[1].ended.query():
            before, step = self._steps.popleft(), self._steps[0]
            if before.rows and step.rows:
                took = before.ended.elapsed_time(step.ended)
                self.observe(step.rows, took, step.launched.elapsed_time(step.ended), step.late)

    def observe(self, rows: int, took: float, busy: float, late: bool) -> None:
        """A step of ``rows``: ms since the end of the one before, ms since its pass began.

        The host's time is only seen where the device waits for it. Else the step says that it is
        no more than that, and time makes sure that it is asked again.
        """
        if late:
            self.host += FOLLOWS * (took - self.host)
        else:
            self.host = min(self.host, took) * (1 - FORGETS)
        worked = busy if late else took
        ratio = worked / float(self.passes.of(np.array(rows)))
        self.scale += FOLLOWS * (ratio - self.scale)
