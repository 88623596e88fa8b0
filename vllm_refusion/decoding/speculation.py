"""What rows are worth: integer arithmetic that kernels and their twins do alike.

The chance that a drafted token passes verification is taken to be its *confidence*, the probability
it had when it was picked. Chances are in units of 2**-16, their products are sums of *costs*,
-log2 in units of 1/256.
"""

from __future__ import annotations

import math
from enum import Enum
from functools import cache
from typing import NamedTuple

import torch

MAX_RIDERS = 64  # of one canvas
CERTAIN = 65536
LEVELS = 64  # of confidence
MAX_PRICE = 8192
MAX_CHAIN = 64  # masks of consecutive positions behind one accept length (serial decoding)
# What a request's acceptance is taken to be before any of its tokens has been tested, in
# LEVELS-ths, and the number of tests that it outweighs.
PRIOR = 48
PRIOR_TESTED = 16


class Speculation(NamedTuple):
    """What rows are worth. The default is the schedule of the paper: an operation a pass, whole.

    Attributes:
        free_rows: a canvas may be this wide at no cost.
        pass_price: what a pass costs of one request besides its rows, in rows. Beyond the free rows
            a rider of w rows that saves a pass with chance P is taken if P * (w + pass_price) > w.
            Rows that are hardly needed are put off (``compose``).
        row_price: of serial decoding: what a row costs, in tokens, in units of 1/CERTAIN. A draft
            or mask is fed if it is expected to bring more. At CERTAIN none is.
        prior: of serial decoding: the acceptance that a request begins with, in LEVELS-ths.
    """

    free_rows: int = 0
    pass_price: int = 0
    row_price: int = CERTAIN
    prior: int = PRIOR

    @property
    def rides(self) -> bool:
        """Whether canvases of parallel decoding take riders."""
        return self.free_rows > 0 or self.pass_price > 0


NO_RIDERS = Speculation()


class Saving(Enum):
    """A way to save passes, or rows. Only the twins can be told to do without some."""

    PLAN = "1: verify + next plan"
    FIRST_PLAN = "2: prompt + first plan"
    PREDICT = "3: infill verify + next predict"
    FIRST_PREDICT = "4: failed verify straight on"
    PIECES = "5: operations piece by piece"


ALL_SAVINGS = frozenset(Saving)


class Drafting(Enum):
    """Where drafts of serial decoding come from. Only the twin can be told to do without some."""

    AHEAD = "masks behind all drafts under test"
    BRANCHES = "masks behind fewer of them"
    KEPT = "drafts kept where no masks were fed"


ALL_DRAFTING = frozenset(Drafting)


@cache
def cost_table() -> list[int]:
    """Cost of a token by its confidence in LEVELS-ths, 0 to LEVELS."""
    costs = [round(-256 * math.log2(max(level, 0.5) / LEVELS)) for level in range(LEVELS)]
    return [*costs, round(-256 * math.log2(1 - 0.25 / LEVELS))]


@cache
def chance_table() -> list[int]:
    """Chance by cost; 0 at and beyond the last."""
    return [round(CERTAIN * 2 ** (-cost / 256)) for cost in range(4096)] + [0]


@cache
def device_table(device: torch.device) -> torch.Tensor:
    """[LEVELS + 1 + LARGEST_COST + 1] int32: the cost table, then the chance table."""
    return torch.tensor([*cost_table(), *chance_table()], dtype=torch.int32, device=device)


LARGEST_COST = len(chance_table()) - 1


def chance_of(cost: int) -> int:
    return chance_table()[min(cost, LARGEST_COST)]


def cost_of(confidence: float) -> int:
    """Cost of a token that was picked with that probability; NaN is none."""
    level = confidence * LEVELS
    return cost_table()[min(max(int(level), 0), LEVELS) if level == level else 0]


def prior_of(share: float) -> int:
    """A share of tokens that pass as ``Speculation.prior``."""
    return min(round(LEVELS * share), LEVELS - 1)


def acceptance(passed: int, tested: int, prior: int = PRIOR) -> int:
    """Share of a request's tested tokens that passed, in LEVELS-ths, below LEVELS as ``prior``."""
    return (LEVELS * passed + PRIOR_TESTED * prior) // (tested + PRIOR_TESTED)
