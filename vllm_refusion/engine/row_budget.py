"""How many rows each step feeds, and how many of them riders may take.

The engine's scheduler gives every decoding request as many rows as its next pass could need. Before
a step the model runner asks for the size of the batch and then for its layout on the device (see
``compat.RowManager``). Nothing here waits for the step that is running.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection

import numpy as np
import torch
from vllm.v1.worker.gpu.states import RequestState

from vllm_refusion.decoding.draft_price import NOTHING_DRAFTED, DraftPrice
from vllm_refusion.decoding.speculation import (
    CERTAIN,
    MAX_PRICE,
    NO_RIDERS,
    Speculation,
    prior_of,
)
from vllm_refusion.decoding.state import DecodeState
from vllm_refusion.engine.config_hook import CAPTURE_SIZES
from vllm_refusion.engine.step_cost import StepCost
from vllm_refusion.triton_kernels.allocation_twin import TOTALS
from vllm_refusion.triton_kernels.dispatch import Operations

STEPS_REMEMBERED = 64
ROWS_APART = 64  # sizes of a step beyond those of the graphs
# Riders are worth a few rows even where rows are all that counts: a saved pass saves its sampling.
LEAST_PRICE = 4
RIDERS_WORTH = 0.5  # of a pass of parallel decoding
FEW_REQUESTS = 16
STEPS_FOLLOWED = 8  # the size of a step of serial decoding goes by so many before


class RowBudget:
    """Chooses the rows of a step on the host and deals them out on the device.

    ``settle``, ``assume`` and ``deal`` are called in this order in each step that decodes, with
    what the scheduler scheduled. ``speculation`` then says which riders the canvases after this
    step take.

    Args:
        query_start_loc: [R+1] int32, where the runner reads the layout of every step.
        sizes: numbers of rows that CUDA graphs were captured for, ascending; empty for none.
        cost: of steps, by their rows.
        requests, serial: all there are, and those in serial mode.
        riders: whether passes may carry riders.
    """

    def __init__(
        self,
        state: DecodeState,
        operations: Operations,
        req_states: RequestState,
        query_start_loc: torch.Tensor,
        sizes: list[int],
        cost: StepCost,
        requests: Collection[str],
        serial: Collection[int],
        riders: bool,
    ) -> None:
        self.state = state
        self.operations = operations
        self.req_states = req_states
        self.query_start_loc = query_start_loc
        self.sizes = sizes or list(CAPTURE_SIZES)
        self.cost = cost
        self.requests, self.serial = requests, serial
        self.riders = riders
        self.speculation = NO_RIDERS
        device, requests = state.device, state.max_requests
        # Most decode rows and prompt rows of each request in this step. The host's are written
        # again once that step's totals are there, which come behind their copy.
        pinned = {"pin_memory": device.type == "cuda"}
        self._dealt_host = torch.zeros(2, requests, dtype=torch.int32, **pinned)
        self._dealt_np = self._dealt_host.numpy()
        self._dealt = torch.zeros(2, requests, dtype=torch.int32, device=device)
        self.scheduled, self._prompt_rows = self._dealt
        self.logits_start = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        self._totals = torch.zeros(TOTALS, dtype=torch.int32, device=device)
        self._totals_host = torch.zeros(TOTALS, dtype=torch.int32, **pinned)
        self._totals_np = self._totals_host.numpy()
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._decoding = 0  # requests that the totals on the host are of; 0: no totals
        # In the last steps, of a request: rows needed, rows with riders, what riders were worth,
        # and rows with riders over those expected.
        self._past = np.zeros((4, STEPS_REMEMBERED))
        self._remembered = 0  # steps; they are the last ones
        self.drafts = DraftPrice()
        # of a request in serial mode: the canvases of this step, and those that are composed in it
        self._expected = self._expected_next = NOTHING_DRAFTED
        self._step = 0
        self._rows = 0
        self.rows_run = 0  # of all steps, with those that nothing used

    def compile(self) -> None:
        """Deals no rows to an index without a request."""
        self._rows = 0
        nothing = np.zeros(1, np.int32)
        self.assume(nothing, nothing)
        self._num_decoding = 1
        self.deal(torch.zeros(1, dtype=torch.int64, device=self.state.device))

    def settle(self, decoding: int, scheduled: int) -> int:
        """Decode rows of a step in which so many requests decode, of so many scheduled rows."""
        self._learn()
        self._expected = self._expected_next
        serial_alone = bool(self.serial) and len(self.serial) == len(self.requests)
        if serial_alone and self._remembered:
            self._rows = self._follow(decoding, scheduled)
        else:
            self._rows = self._choose(decoding, scheduled)
        self.speculation = self._speculate(decoding) if self.riders else NO_RIDERS
        return self._rows

    def assume(
        self, decode_rows: np.ndarray, prompt_rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A layout of the settled size for the host, which does not know the device's.

        Args:
            decode_rows: [R], scheduled, before they are settled.
            prompt_rows: [R].

        Returns:
            Rows of each request [R] int32, and where its decode rows start among all [R+1] int32.
        """
        requests = len(decode_rows)
        self._dealt_np[0, :requests] = decode_rows
        self._dealt_np[1, :requests] = prompt_rows
        self._num_decoding = int(np.count_nonzero(decode_rows))
        starts = np.zeros(requests + 1, np.int32)
        np.minimum(decode_rows.cumsum(), self._rows, out=starts[1:], casting="unsafe")
        return (prompt_rows + starts[1:] - starts[:-1]).astype(np.int32, copy=False), starts

    def deal(self, req_of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Deals the rows out on the device.

        Args:
            req_of: [R], the batch's requests.

        Returns:
            Where each one's decode rows start [R+1], ``query_start_loc``, and all decode rows.
        """
        decoding = self._num_decoding
        self._dealt.copy_(self._dealt_host, non_blocking=True)
        logits_start = self.logits_start[: len(req_of) + 1]
        self.operations.allocate(
            self.state,
            self.req_states.num_computed_tokens.gpu,
            req_of,
            self.scheduled,
            self._prompt_rows,
            self.query_start_loc,
            logits_start,
            self._totals,
            decoding,
            self._rows,
            self._step % decoding,
        )
        self._step += 1
        self.rows_run += self._rows
        self._totals_host.copy_(self._totals, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._decoding = decoding
        return logits_start, self.query_start_loc, self._rows

    def end_step(self, rows: int, tokens: int) -> None:
        """Marks the end of a step with so many decode rows among its tokens, for its cost.

        What is asked is what steps of decode rows take in a graph.
        """
        in_a_graph = rows == tokens <= self.sizes[-1]
        self.cost.end(rows if in_a_graph else 0, self._expected != NOTHING_DRAFTED)

    def _learn(self) -> None:
        """Takes the rows that the last step needed into account.

        That is a fixed step back, so that all workers of a tensor parallel group agree. The copy is
        queued in front of that step's forward pass: waiting for it costs nothing.
        """
        if not self._decoding:
            return
        if self._copied is not None:
            self._copied.synchronize()
        self.cost.learn()
        needed, wanted, serial, tokens = self._totals_np.tolist()
        self.drafts.learn(serial, tokens)
        worth = RIDERS_WORTH * (self._decoding - serial) + max(0, tokens - serial)
        self._past[:, :-1] = self._past[:, 1:]
        self._past[:, -1] = needed, wanted, worth, wanted / self._expected
        self._past[:, -1] /= self._decoding
        self._remembered = min(self._remembered + 1, STEPS_REMEMBERED)

    def _follow(self, decoding: int, scheduled: int) -> int:
        """The size for what canvases hold: what they hold has been found worth its rows.

        They hold what is expected at the price they were composed at, times what was right for
        those of late. Where no masks draft, a request that gets less than it needs waits: the size
        that brings most in a time, a likely draft being as good as a token. No drafts are fed
        beyond the graphs, where the host launches every kernel.
        """
        least = decoding + int(decoding <= FEW_REQUESTS)
        most = min(scheduled, max(self.sizes[-1], least))
        if self._expected == NOTHING_DRAFTED:
            needed, _, _, wanted = self._recent()[:, -STEPS_FOLLOWED:]
            drafted = np.maximum(wanted - needed, 0)
            # room for a mask behind every last token, and for the drafts
            widest = min(most, self._size_of(decoding * (2 + drafted.max())))
            rows = self._best_size(decoding, widest, needed, needed + drafted, drafted)
        else:
            rows = decoding * self._expected * self._recent()[3, -STEPS_FOLLOWED:].mean()
        return min(self._size_of(min(max(rows, least), most)), scheduled)

    def _recent(self) -> np.ndarray:
        """[4, steps], the last step last."""
        return self._past[:, STEPS_REMEMBERED - self._remembered :]

    def _size_of(self, rows: float) -> int:
        """The smallest size that holds ``rows``."""
        largest = self.sizes[-1]
        if rows > largest:
            return largest + math.ceil((rows - largest) / ROWS_APART) * ROWS_APART
        return self.sizes[bisect_left(self.sizes, rows - 1e-6)]

    def _choose(self, decoding: int, scheduled: int) -> int:
        """The size that would have served requests of late best for its time."""
        if not self._remembered or decoding == 0:
            return scheduled
        return self._best_size(decoding, scheduled, *self._recent()[:3])

    def _best_size(
        self,
        decoding: int,
        scheduled: int,
        needed: np.ndarray,
        wanted: np.ndarray,
        worth: np.ndarray,
    ) -> int:
        """The size that brings most in a time, a request without its riders less than one with.

        Args: of a request, by step [S]: rows that it needs, and with riders, and their worth.
        """
        wide = range(self.sizes[-1] + ROWS_APART, scheduled, ROWS_APART)
        sizes = np.array([*(n for n in (*self.sizes, *wide) if n < scheduled), scheduled])
        needed, wanted = decoding * np.maximum(needed, 1e-3), decoding * np.maximum(wanted, 1e-3)
        served = np.floor(decoding * np.minimum(1, sizes[:, None] / needed) + 1e-6) / decoding
        riders = np.clip((sizes[:, None] - needed) / np.maximum(wanted - needed, 1), 0, 1)
        value = (served * (1 + worth * riders)).mean(axis=1)
        cost = self.cost.of(sizes)
        return int(sizes[np.argmin(cost / np.maximum(value, 1e-9))])

    def _speculate(self, decoding: int) -> Speculation:
        passes, requests = self.cost.passes, max(decoding, 1)
        price = min(max(passes.rows_per_pass / requests, LEAST_PRICE), MAX_PRICE)
        free = passes.free_rows // requests
        if not self.serial:
            return Speculation(free, int(price))
        self._price_drafts(decoding)
        prior = prior_of(self.drafts.acceptance)
        return Speculation(free, int(price), int(CERTAIN * self.drafts.price), prior)

    def _price_drafts(self, decoding: int) -> None:
        """Of the requests in serial mode; the others' rows are there in any case."""
        serial = min(decoding, len(self.serial))
        if not serial:
            return
        others = (decoding - serial) * float(self._past[1, -1])

        def cost(rows: np.ndarray) -> np.ndarray:
            sizes = np.array([self._size_of(others + each) for each in rows])
            drafts = rows > serial * NOTHING_DRAFTED
            beyond = (sizes > self.sizes[-1]) & drafts
            return np.where(beyond, np.inf, self.cost.of(sizes, drafts))

        self._expected_next = self.drafts.choose(serial, cost)
