"""Structured outputs in the worker: what grammars refuse, and the drafts that travel for it.

A grammar is walked on the host (``grammar_drafts``), so a constrained request is scheduled once its
last output is there: its drafts go to the scheduler with that output, and come back, as far as the
grammar allows them, with the next step. With them comes a mask of the tokens allowed behind each.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_refusion.decoding.speculation import NO_RIDERS, Speculation
from vllm_refusion.decoding.state import DecodeState, Field
from vllm_refusion.triton_kernels.dispatch import Operations
from vllm_refusion.triton_kernels.grammar_twin import picking_rows


class GrammarMasks:
    """Takes the place of vLLM's ``StructuredOutputsWorker``.

    That one masks the logits of a step as a whole, and has room for a mask of every row there may
    be. Here logits are computed in chunks and most rows pick nothing.

    Args:
        req_of: request id to its index in all tables.
    """

    def __init__(
        self, state: DecodeState, operations: Operations, req_of: Mapping[str, int]
    ) -> None:
        self.state = state
        self.operations = operations
        self.req_of = req_of
        self._numbers: dict[int, int] = {}  # by req: drafts given for this step
        self._bitmask: torch.Tensor | None = None  # [M, words] int32, of this step
        self._first: torch.Tensor | None = None  # [max_requests] int32: its rows begin; -1 for none

    def give_drafts(self, drafts: Mapping[int, Sequence[int]], speculation: Speculation) -> None:
        """The drafts by req that this step's canvases are to have, for all constrained requests."""
        self._numbers = {req: len(tokens) for req, tokens in drafts.items()}
        if not drafts:
            return
        host = np.full((len(drafts), self.state.canvas_length), -1, np.int32)
        for row, tokens in zip(host, drafts.values()):
            row[: len(tokens)] = tokens
        reqs = self._to_device(np.fromiter(drafts, np.int64))
        self.operations.give_drafts(self.state, reqs, self._to_device(host), speculation)

    def apply_grammar_bitmask(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        grammar_req_ids: list[str],
        grammar_bitmask: np.ndarray,
    ) -> None:
        """Keeps the masks for the sampler, which has this step's logits.

        Args:
            logits: hidden states here.
            grammar_bitmask: [M, words] int32, of each request a row for the position behind its
                known tokens and one behind each draft given.
        """
        first = np.full(self.state.max_requests, -1, np.int32)
        start = 0
        for req_id in grammar_req_ids:
            req = self.req_of[req_id]
            first[req] = start
            start += 1 + self._numbers.get(req, 0)
        self._first = self._to_device(first)
        self._bitmask = self._to_device(grammar_bitmask)

    def mask_rows(self, requests: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """For each row of logits the row [N] int32 of the bitmask, -1 for none; or None at all.

        Args:
            requests: [N] int64. rows: [N], of their canvases.
        """
        if self._first is None:
            return None
        picks, accepted = picking_rows(self.state, requests, rows)
        first = self._first[requests]
        return torch.where(picks & (first >= 0), first + accepted, -1).int()

    def forbid(self, logits: torch.Tensor, mask_row: torch.Tensor) -> None:
        """Takes what grammars refuse out of rows of logits; see ``forbid_twin``."""
        assert self._bitmask is not None
        self.operations.forbid(logits, mask_row, self._bitmask)

    def end_step(
        self, sampled: torch.Tensor, num_sampled: torch.Tensor, batch: InputBatch
    ) -> list[int]:
        """Writes the drafts at hand behind the tokens of constrained requests, and -1 behind them.

        Args:
            sampled: [R, W] int32, the tokens of this step. num_sampled: [R] int32.

        Returns:
            The rows of these requests in the batch.
        """
        numbers, self._numbers = self._numbers, {}
        if self._first is None:
            return []
        state, reqs = self.state, batch.idx_mapping[: batch.num_reqs].long()
        lane = torch.arange(state.canvas_length, device=state.device)
        behind = lane - num_sampled[:, None]
        drafts = state.token[reqs].gather(1, behind.clamp_min(0))
        drafts = torch.where(behind < state.ints[reqs, Field.DRAFTS, None], drafts, -1)
        constrained = (self._first[reqs] >= 0)[:, None] & (behind >= 0)
        sampled.copy_(torch.where(constrained, drafts, sampled))
        self._first = self._bitmask = None
        return np.flatnonzero(np.isin(batch.idx_mapping_np, list(numbers))).tolist()

    def compile(self, logits: torch.Tensor) -> None:
        """Gives no drafts to an index without a request, and leaves a row [1, V] as it is."""
        self.give_drafts({0: []}, NO_RIDERS)
        self._numbers.clear()
        nothing = torch.full((1,), -1, dtype=torch.int32, device=logits.device)
        words = nothing.expand(1, -(-logits.shape[1] // 32)).contiguous()
        self.operations.forbid(logits, nothing, words)

    def _to_device(self, host: np.ndarray) -> torch.Tensor:
        """A copy: the host's is written again while the step runs."""
        tensor = torch.from_numpy(host)
        if self.state.device.type == "cpu":
            return tensor.clone()
        return tensor.pin_memory().to(self.state.device, non_blocking=True)
