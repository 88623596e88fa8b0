"""What drafts bring in serial decoding, by what a row costs and by how often drafts are right.

Of one request whose canvases take every row that brings more than a price: tokens and rows of a
pass, in the long run. Made by ``python -m vllm_refusion.bench.draft_table`` with the twin of the
state machine; what drafting decides from it corrects itself by what passes really bring.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

# of a row, in tokens
PRICES = np.array((0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25))
# mean chance that a draft is right
ACCEPTANCES = np.array((0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98))

TOKENS = np.array(
    (
        (1.24, 1.24, 1.23, 1.22, 1.05, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00),
        (1.65, 1.62, 1.58, 1.56, 1.51, 1.45, 1.34, 1.04, 1.00, 1.00, 1.00, 1.00),
        (2.37, 2.28, 2.20, 2.12, 2.00, 1.88, 1.79, 1.72, 1.62, 1.10, 1.00, 1.00),
        (3.05, 2.93, 2.82, 2.65, 2.42, 2.27, 2.11, 1.99, 1.88, 1.71, 1.29, 1.03),
        (4.36, 4.09, 3.71, 3.57, 3.19, 3.01, 2.74, 2.56, 2.40, 2.23, 2.15, 1.77),
        (5.51, 4.97, 4.63, 4.41, 3.91, 3.55, 3.30, 3.13, 2.87, 2.68, 2.49, 2.34),
        (8.05, 7.22, 6.50, 5.96, 5.44, 4.84, 4.66, 4.18, 4.06, 3.59, 3.36, 3.11),
        (12.36, 12.08, 10.36, 10.67, 8.23, 7.60, 7.33, 7.01, 6.54, 6.09, 5.68, 5.49),
        (21.11, 20.90, 19.32, 17.54, 18.66, 17.43, 16.19, 15.11, 13.43, 12.58, 11.41, 10.36),
    )
)
ROWS = np.array(
    (
        (7.42, 6.59, 5.72, 5.06, 1.78, 1.02, 1.02, 1.02, 1.02, 1.02, 1.02, 1.02),
        (12.93, 10.45, 8.44, 7.31, 5.92, 4.98, 3.77, 1.31, 1.02, 1.02, 1.02, 1.02),
        (24.92, 18.23, 13.86, 11.20, 8.57, 6.89, 5.73, 4.96, 4.26, 1.52, 1.02, 1.02),
        (38.92, 27.51, 20.18, 15.43, 11.13, 8.82, 7.07, 5.88, 5.01, 4.06, 2.22, 1.14),
        (68.65, 45.30, 29.82, 23.07, 15.68, 12.25, 9.63, 7.95, 6.77, 5.83, 5.19, 3.79),
        (98.81, 61.23, 39.53, 29.83, 20.14, 15.05, 12.08, 10.00, 8.30, 7.14, 6.24, 5.53),
        (155.85, 96.49, 59.16, 41.60, 28.42, 20.63, 17.09, 13.94, 12.28, 10.19, 8.89, 7.77),
        (153.45, 140.93, 88.74, 64.69, 39.50, 31.01, 26.30, 23.10, 20.18, 17.94, 15.90, 14.39),
        (132.33, 128.32, 103.95, 81.13, 66.81, 56.73, 50.98, 46.37, 39.41, 35.37, 31.44, 27.34),
    )
)


def _monotone(table: np.ndarray) -> np.ndarray:
    """Less at higher prices, more at higher acceptance: what is drawn is noisy."""
    by_price = np.maximum.accumulate(table[:, ::-1], axis=1)[:, ::-1]
    return np.maximum.accumulate(by_price, axis=0)


_TOKENS, _ROWS = _monotone(TOKENS), _monotone(ROWS)


NOTHING_DRAFTED = 1.0  # rows of a pass, about
# The price where masks do not pay: too high for any, which would have to bring two rows' worth, and
# more than a row of a full batch costs. Drafts that are there anyway, as what a grammar forces, are
# fed if they are likely.
NO_MASKS = 0.75
START = 0.8  # acceptance before anything is known
LEAST_TOKENS = 1.1
FORGETS = 0.002  # share of a step by which acceptance goes back there while nothing is drafted
# A pass's tokens are known this many steps after the price that its canvas was composed at.
LAG = 4
PASSES_REMEMBERED = 32
LEARNS_EVERY = 4  # steps
# How much more than nothing drafts must promise before they begin, and less before another price.
BEGINS_AT = 1.02
STAYS_AT = 0.99


def rates(acceptance: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and rows of a pass at each of PRICES, both float64.

    At some price masks cease to pay, and a request without drafts gets none any more. Next to such
    a point in the table nothing is promised.
    """
    at = min(max(acceptance, ACCEPTANCES[0]), ACCEPTANCES[-1])
    lower = min(int(np.searchsorted(ACCEPTANCES, at, side="right")), len(ACCEPTANCES) - 1) - 1
    share = (at - ACCEPTANCES[lower]) / (ACCEPTANCES[lower + 1] - ACCEPTANCES[lower])
    tokens = _TOKENS[lower] + share * (_TOKENS[lower + 1] - _TOKENS[lower])
    rows = _ROWS[lower] * (_ROWS[lower + 1] / _ROWS[lower]) ** share
    return np.where(_TOKENS[lower] < LEAST_TOKENS, 1.0, tokens), rows


class DraftPrice:
    """The price of a row that makes most tokens in a time, over all requests in serial mode.

    It compares whole courses, drafting at each price and not at all, since rows pay only in
    numbers: a first mask may draft nothing, and what the masks draft costs rows again. Acceptance
    is what makes the table's tokens those that passes really brought.
    """

    def __init__(self) -> None:
        self.acceptance = START
        self.index: int | None = None  # in PRICES; None: no masks draft
        self._chosen: deque[int | None] = deque(maxlen=LAG)
        self._passes: deque[tuple[int, int, int]] = deque(maxlen=PASSES_REMEMBERED)
        self._steps = self._requests = 0
        self._rows = NOTHING_DRAFTED

    @property
    def price(self) -> float:
        """Of a row, in tokens."""
        return NO_MASKS if self.index is None else float(PRICES[self.index])

    def learn(self, requests: int, tokens: int) -> None:
        """Takes a step's passes into account: of ``requests`` that made ``tokens`` in all."""
        self._steps += 1
        chosen = list(self._chosen)
        if not requests or len(chosen) < LAG:
            return
        drafted = [index for index in chosen if index is not None]
        if not drafted:
            self.acceptance += FORGETS * (START - self.acceptance)
            self._passes.clear()
        elif len(drafted) == LAG:
            self._passes.append((drafted[0], requests, tokens))
            if self._steps % LEARNS_EVERY == 0:
                at, of, made = np.array(self._passes).T
                expected = (_TOKENS[:, at] * of).sum(axis=1)  # by acceptance
                seen = float(np.interp(made.sum(), expected, ACCEPTANCES))
                self.acceptance += (seen - self.acceptance) / 2

    def choose(self, requests: int, cost: Callable[[np.ndarray], np.ndarray]) -> float:
        """Chooses for ``requests``, ``cost`` being the time of a step by their rows [K].

        Called in every step; between two lessons it stays with what it chose for as many.

        Returns:
            The rows of a pass at that price, by the table.
        """
        if requests != self._requests or self._steps % LEARNS_EVERY == 0:
            self._requests = requests
            tokens, rows = rates(self.acceptance)
            times = cost(requests * np.append(rows, NOTHING_DRAFTED))
            rate = np.append(tokens, 1.0) / times
            best = int(rate[:-1].argmax())
            if self.index is not None and rate[self.index] > STAYS_AT * rate[best]:
                best = self.index
            least = rate[-1] * (BEGINS_AT if self.index is None else 1.0)
            self.index = best if rate[best] > least else None
            self._rows = NOTHING_DRAFTED if self.index is None else float(rows[best])
        self._chosen.append(self.index)
        return self._rows
