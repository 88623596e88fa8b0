"""What a step costs by its rows: the forward pass, what is around it, and the host's own time."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from vllm_refusion.engine.pass_cost import PassCost

# The device's work between the end of a step and the next forward pass, in ms. Where it takes
# longer, the device waits for the host.
PREPARATION = 0.3
LEAST_STEP = 32  # rows over which the cost of one more is taken
FOLLOWS = 0.1  # share of a change that an estimate takes in a step


class _Marks(NamedTuple):
    """Of a step: before its pass, after its last kernel; rows, 0 if some are of prompts."""

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
            workers must choose alike while their clocks differ.
    """

    def __init__(self, passes: PassCost, learns: bool) -> None:
        self.passes = passes
        self.scale, self.host = 1.0, 0.0
        self._learns = learns
        self._launched: torch.cuda.Event | None = None
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
            self._launched = torch.cuda.Event(enable_timing=True)
            self._launched.record()

    def end(self, rows: int) -> None:
        """Marks the end of a step, of ``rows``, or 0 if some are of prompts."""
        if self._launched is not None:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._steps.append(_Marks(self._launched, ended, rows))
            self._launched = None

    def learn(self) -> None:
        """Takes the steps into account that have ended on the device."""
        while len(self._steps) > 1 and self._steps[1].ended.query():
            before, step = self._steps.popleft(), self._steps[0]
            if before.rows and step.rows:
                waited = before.ended.elapsed_time(step.launched)
                self.observe(step.rows, waited, step.launched.elapsed_time(step.ended))

    def observe(self, rows: int, waited: float, busy: float) -> None:
        """A step of ``rows``: ms from the end of the one before to its pass, and from there on."""
        took = waited + busy
        if waited > PREPARATION and took > self.host:
            self.host += FOLLOWS * (took - self.host)
        elif took < self.host:
            self.host = took
        ratio = (min(waited, PREPARATION) + busy) / float(self.passes.of(np.array(rows)))
        self.scale += FOLLOWS * (ratio - self.scale)
