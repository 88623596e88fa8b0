"""What a forward pass costs by its rows, measured at start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_refusion.decoding.speculation import MAX_PRICE

logger = logging.getLogger("vllm.refusion")

MEASURED_ROWS = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 1024, 2048)
REPETITIONS = 3
# The cheapest pass may be exceeded by this much and still count as free.
FREE_SLACK = 1.15


@dataclass(frozen=True)
class PassCost:
    """Time of a forward pass by its rows, in ms: points in ascending order, straight lines between.

    Attributes:
        free_rows: the most rows that cost as good as nothing.
        rows_per_pass: what the fixed cost of a pass is worth in rows.
    """

    rows: tuple[int, ...]
    milliseconds: tuple[float, ...]

    @cached_property
    def free_rows(self) -> int:
        base = self.milliseconds[0] * FREE_SLACK
        free = [rows for rows, ms in zip(self.rows, self.milliseconds) if ms <= base]
        return free[-1]

    @cached_property
    def rows_per_pass(self) -> float:
        more_rows = self.rows[-1] - self.free_rows
        slope = (self.milliseconds[-1] - self.milliseconds[0]) / max(more_rows, 1)
        return self.milliseconds[0] / slope if slope > 0 else MAX_PRICE

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Milliseconds of passes of so many rows; the last line goes on beyond the last point."""
        within = np.interp(rows, self.rows, self.milliseconds)
        slope = self.milliseconds[-1] / self.rows[-1]
        return within + slope * np.maximum(rows - self.rows[-1], 0)


# Where nothing is measured, on a CPU.
ASSUMED_COST = PassCost((1, 128, 1024), (1.0, 1.0, 3.0))


def measure_passes(
    run: Callable[[int], Any], most_rows: int, device: torch.device, label: str = "Forward passes"
) -> PassCost | None:
    """Times ``run(rows)``, a forward pass of at most ``most_rows``; None on a CPU.

    All workers of a tensor parallel group take the first one's times, as they must choose alike.
    """
    if device.type != "cuda":
        return None
    sizes = [size for size in MEASURED_ROWS if size <= most_rows] or [most_rows]
    fastest = []
    for size in sizes:
        times = []
        for _ in range(REPETITIONS + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(size)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        fastest.append(min(times[1:]))
    # a disturbance only ever adds: no pass takes longer than a wider one
    smooth = tuple(float(ms) for ms in np.minimum.accumulate(fastest[::-1])[::-1])
    cost = get_tp_group().broadcast_object(PassCost(tuple(sizes), smooth), src=0)
    logger.info(
        "%s, rows: ms: %s",
        label,
        ", ".join(f"{rows}: {ms:.2f}" for rows, ms in zip(cost.rows, cost.milliseconds)),
    )
    return cost
