"""The sampler that vLLM's model runner drives: statistics of the rows, transition, output."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.thinking_budget import ThinkingBudgetState
from vllm.v1.worker.gpu.states import RequestState

from vllm_refusion.decoding.logprobs import Record, ScoreKind
from vllm_refusion.decoding.penalties import Penalties
from vllm_refusion.decoding.picking import PickLimits
from vllm_refusion.decoding.speculation import NO_RIDERS
from vllm_refusion.decoding.state import DecodeState, Field
from vllm_refusion.decoding.trace import Recorder
from vllm_refusion.engine.acceptance import acceptance_tables
from vllm_refusion.engine.grammar_masks import GrammarMasks
from vllm_refusion.engine.row_budget import RowBudget
from vllm_refusion.triton_kernels.dispatch import Operations
from vllm_refusion.triton_kernels.layout_twin import ASKED

# Logits of one step are computed and read in chunks of rows of about this size.
LOGITS_CHUNK_BYTES = 512 * 2**20


@dataclass
class CanvasOutput(SamplerOutput):
    """Of requests in the rows ``drafted``, drafts follow the tokens: ``GrammarMasks.end_step``."""

    drafted: Sequence[int] = ()


class CanvasSampler:
    """Takes the place of vLLM's sampler: hidden states of canvas rows in, ordered tokens out."""

    # The runner would keep counts for penalties there; ``Penalties`` has them.
    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        operations: Operations,
        state: DecodeState,
        req_states: RequestState,
        limits: PickLimits,
        penalties: Penalties,
        thinking: ThinkingBudgetState,
        records: Mapping[int, Record],
        requests: Collection[str],
        serial: Collection[int],
        grammar_masks: GrammarMasks,
    ) -> None:
        self.model = model
        self.operations = operations
        self.state = state
        self.req_states = req_states
        self.limits = limits
        self.penalties = penalties
        self.thinking = thinking
        self.records = records
        self.requests = requests  # all there are
        self.serial = serial  # those in serial mode, by req
        self.describes = ScoreKind.of(vllm_config.model_config.logprobs_mode)
        self.grammar_masks = grammar_masks
        self.row_budget: RowBudget | None = None  # starts with the first request
        self.recorder: Recorder | None = None
        rows = state.max_requests * state.canvas_length
        most_rows = min(rows, vllm_config.scheduler_config.max_num_batched_tokens)
        row_bytes = limits.vocab * vllm_config.model_config.dtype.itemsize
        self.chunk_rows = max(1, min(most_rows, LOGITS_CHUNK_BYTES // row_bytes))

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=state.device)

        # What ``layout`` asks of each row: a position, the token behind the row, a draw.
        self.asked = buffer(ASKED, rows)
        self.asked_of_rows = self.positions, self.given, self.draws = self.asked.unbind()
        self.picked = buffer(rows)
        self.picked_prob = buffer(rows, dtype=torch.float32)
        self.given_prob = buffer(rows, dtype=torch.float32)
        self.acceptance = acceptance_tables(vllm_config, state.device)  # benchmarks only
        if self.acceptance is not None:
            self.replayed = buffer(2, rows)
            self.replayed_of_rows = self.replayed.unbind()
            self.replays = {
                "seed": state.seed,
                "slot_size": state.ints[:, Field.SLOT_SIZE],
                "slot_threshold": state.slot_threshold,
                "resume": state.ints[:, Field.RESUME],
                "tables": self.acceptance,
                "out": (self.picked, self.picked_prob, self.given_prob),
            }

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """The model state holds the other parameters."""
        self.thinking.add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        self.thinking.apply_staged_writes()

    def __call__(self, hidden_states: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        """Args: hidden_states: [canvas rows of the batch, hidden], see ``compute_logits``."""
        num_reqs, rows = input_batch.num_reqs, hidden_states.shape[0]
        budget = self.row_budget
        if rows and not input_batch.num_draft_tokens:
            # Memory profiling: pay for the widest chunk a step can have.
            self.model.row_logits(hidden_states[:1].expand(self.chunk_rows, -1).contiguous())
        elif rows:
            self._row_statistics(hidden_states, input_batch)

        def output_buffer(*shape: int) -> torch.Tensor:
            # a new one each step: the runner copies it while the next step already runs
            return torch.empty(*shape, dtype=torch.int32, device=self.state.device)

        output = CanvasOutput(
            sampled_token_ids=output_buffer(num_reqs, self.state.canvas_length),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=output_buffer(num_reqs),
            num_rejected=output_buffer(num_reqs),
        )
        batch = (
            self.state,
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            input_batch.cu_num_logits,
            self.req_states.num_computed_tokens.gpu,
            self.req_states.prefill_len.gpu,
            self.picked,
            self.picked_prob,
        )
        results = (
            output.sampled_token_ids,
            output.num_sampled,
            output.num_rejected,
            budget.speculation if budget else NO_RIDERS,
        )
        traced = None
        if self.recorder is not None:
            traced = self.recorder.begin(input_batch.idx_mapping_np.tolist())
        # without any requests both, so that both are compiled before the first one
        if len(self.serial) < len(self.requests) or not self.requests:
            emit_limit = self._emit_limit(input_batch)
            self.operations.transition(*batch, self.given_prob, emit_limit, *results)
        if self.serial or not self.requests:
            self.operations.serial_transition(*batch, *results)
        output.drafted = self.grammar_masks.end_step(
            output.sampled_token_ids, output.num_sampled, input_batch
        )
        if self.penalties.used:
            self.penalties.count(batch[1], output.sampled_token_ids, output.num_sampled)
        if traced is not None:
            self.recorder.end(
                traced,
                input_batch.query_start_loc,
                input_batch.cu_num_logits,
                self.picked_prob[:rows],
                self.given_prob[:rows],
                output.sampled_token_ids,
                output.num_sampled,
            )
        if input_batch.num_draft_tokens:
            # the runner makes Python lists of them: hardly wider than what can be in them, but of
            # few widths, as kernels are compiled for widths of whole sixteens and for others
            most = -(-int(input_batch.num_draft_tokens_per_req.max()) // 16) * 16
            if most < self.state.canvas_length:
                output.sampled_token_ids = output.sampled_token_ids[:, :most].contiguous()
        if budget is not None:
            budget.end_step(rows, input_batch.num_tokens)
        if self.records:
            output.logprobs_tensors = self._emitted_logprobs(input_batch, output.num_sampled)
        return output

    def _emit_limit(self, input_batch: InputBatch) -> torch.Tensor:
        """The most tokens [R] int32 that the scheduler takes from each request."""
        budget, requests = self.row_budget, input_batch.num_reqs
        if not input_batch.num_draft_tokens:
            return torch.zeros(requests, dtype=torch.int32, device=self.state.device)
        if budget is not None:
            return budget.scheduled[:requests]
        return input_batch.query_start_loc[: requests + 1].diff()

    def _emitted_logprobs(
        self, input_batch: InputBatch, num_sampled: torch.Tensor
    ) -> LogprobsTensors | None:
        """Of the requests that ask for them, a canvas's number of rows each."""
        width, start, starts, tables = self.state.canvas_length, 0, [], []
        for row, req in enumerate(input_batch.idx_mapping_np.tolist()):
            starts.append(start)
            if req in self.records:
                self.records[req].take(self.state, req)
                first = self.state.ints[req, Field.EMITTED] - num_sampled[row]
                tables.append(self.records[req].emitted(first, width))
                start += width
        if not tables:
            return None
        columns = max(table.ids.shape[1] for table in tables)

        def joined(parts: list[torch.Tensor], fill: float) -> torch.Tensor:
            return torch.cat(
                [functional.pad(p, (0, columns - p.shape[1]), value=fill) for p in parts]
            )

        return LogprobsTensors(
            joined([table.ids for table in tables], 0),
            joined([table.logprobs for table in tables], -torch.inf),
            torch.cat([table.rank for table in tables]),
            starts,
        )

    def compile(self, hidden_states: torch.Tensor) -> None:
        """Asks nothing of a row [1, hidden]."""
        nothing = torch.full((1,), -1, dtype=torch.int32, device=hidden_states.device)
        requests = torch.zeros(1, dtype=torch.int64, device=hidden_states.device)
        logits = self.model.row_logits(hidden_states)
        self.grammar_masks.compile(logits)
        self.asked[:, :1] = -1
        bias = torch.zeros(self.limits.vocab)
        for limit in ({}, {"top_p": 0.5}, {"bias": bias}, {"top_p": 0.5, "bias": bias}):
            self.limits.add(0, **limit)
            self._token_stats(logits, requests, 0)
            self.limits.remove(0)
        # so that the first request with penalties does not hold the others up
        self.operations.apply_penalties(
            logits.to(torch.float32, copy=True),
            requests,
            nothing,
            nothing,
            self.state,
            self.penalties,
        )

    def _token_stats(
        self,
        logits: torch.Tensor,
        requests: torch.Tensor,
        start: int,
    ) -> None:
        """Of the step's rows from ``start`` on; requests: [rows], whose they are."""
        state = self.state
        columns = (*self.asked_of_rows, self.picked, self.picked_prob, self.given_prob)
        if start:
            columns = tuple(column[start:] for column in columns)
        positions, given, draws, *out = columns
        self.operations.token_stats(
            logits,
            requests,
            positions,
            given,
            draws,
            temperature=state.temperature,
            seed=state.seed,
            min_tokens=state.min_tokens,
            stop_ids=state.stop_ids,
            mask_token_id=state.mask_token_id,
            limits=self.limits.used,
            out=tuple(out),
        )

    def _row_statistics(self, hidden_states: torch.Tensor, input_batch: InputBatch) -> None:
        penalties = self.penalties.used
        mask_row = self.grammar_masks.mask_rows(
            input_batch.expanded_idx_mapping, input_batch.expanded_local_pos
        )
        # with penalties there is a copy of the logits, in float32
        chunk = max(1, self.chunk_rows // 4) if penalties else self.chunk_rows
        for start in range(0, hidden_states.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden_states.shape[0]))
            requests = input_batch.expanded_idx_mapping[rows]
            logits = scores = self.model.row_logits(hidden_states[rows], requests)
            if mask_row is not None:
                self.grammar_masks.forbid(logits, mask_row[rows])
            if penalties:
                scores = logits.to(torch.float32, copy=True)
                self.operations.apply_penalties(
                    scores,
                    requests,
                    input_batch.expanded_local_pos[rows],
                    self.positions[rows],
                    self.state,
                    penalties,
                )
                self._end_thinking(scores, input_batch, rows)
            self._token_stats(scores, requests, start)
            if self.records:
                described = scores if self.describes.processed else logits
                self._describe_rows(input_batch, described, start)
        if self.acceptance is not None:
            self._replay_acceptance(input_batch)

    def _replay_acceptance(self, input_batch: InputBatch) -> None:
        """Draws what the benchmark has decided in place of the statistics."""
        requests = input_batch.expanded_idx_mapping
        self.operations.replayed_rows(
            self.state, requests, input_batch.expanded_local_pos, self.draws, self.replayed
        )
        self.operations.acceptance_stats(
            requests, self.positions, self.given, *self.replayed_of_rows, **self.replays
        )

    def _end_thinking(self, scores: torch.Tensor, input_batch: InputBatch, rows: slice) -> None:
        """Forces the end of thinking on some ``rows`` of the step, where a budget is used up.

        vLLM's kernel takes the tokens before a row for those of its request's rows before it, of
        this chunk or the one before. So they are, of rows that pick a token; those of masks, for
        which they are not, draft.
        """
        thinking = self.thinking
        if not thinking.enabled:
            return
        requests = input_batch.idx_mapping_np
        if not thinking.use_thinking_budget[requests].any():
            return
        thinking.apply(
            scores,
            LogitsContext(
                expanded_idx_mapping=input_batch.expanded_idx_mapping[rows],
                idx_mapping=input_batch.idx_mapping,
                idx_mapping_np=requests,
                expanded_local_pos=input_batch.expanded_local_pos[rows],
                input_ids=input_batch.input_ids[input_batch.logits_indices][rows],
                pos=input_batch.positions[input_batch.logits_indices][rows],
                seq_lens_upper_bound_np=input_batch.seq_lens_cpu_upper_bound.numpy(),
            ),
        )

    def _describe_rows(self, input_batch: InputBatch, logits: torch.Tensor, start: int) -> None:
        """Hands ``logits``, of the rows from ``start`` on, to the requests that want logprobs.

        Which rows a request has is known on the device only; on the host, the most it may have.
        """
        most = input_batch.num_draft_tokens_per_req.tolist()
        for row, req in enumerate(input_batch.idx_mapping_np.tolist()):
            if req in self.records and most[row]:
                self.records[req].describe(
                    self.state,
                    req,
                    input_batch.cu_num_logits[row : row + 2],
                    most[row],
                    logits,
                    start,
                    self.picked,
                    self.given,
                    self.given_prob,
                )
