"""The model state that vLLM's model runner drives.

One step, in the runner's order: ``add_request`` / ``remove_request``, ``prepare_attn`` (places the
canvas rows), ``prepare_inputs``, the forward pass, the sampler (statistics, then the transition,
which writes the next canvas).
Nothing here waits for the device or loops over requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention
from vllm.v1.structured_output.utils import strip_speculative_padding
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState

from vllm_refusion.decoding.logprobs import Record, ScoreKind
from vllm_refusion.decoding.penalties import Penalties
from vllm_refusion.decoding.picking import PickLimits, Processing, bias_row
from vllm_refusion.decoding.sending import sent
from vllm_refusion.decoding.speculation import NO_RIDERS
from vllm_refusion.decoding.state import DecodeState
from vllm_refusion.decoding.trace import Recorder, parameters_of
from vllm_refusion.engine import compat
from vllm_refusion.engine.adapter_option import adapter_of, chains_of
from vllm_refusion.engine.attention import PromptTail
from vllm_refusion.engine.grammar_masks import GrammarMasks
from vllm_refusion.engine.lora_rows import LoraRows
from vllm_refusion.engine.mask_adapter import apply_adapter
from vllm_refusion.engine.pass_cost import ASSUMED_COST, PassCost, measure_passes
from vllm_refusion.engine.prompt_scores import PromptScores
from vllm_refusion.engine.request import RequestSpec
from vllm_refusion.engine.row_budget import RowBudget
from vllm_refusion.engine.sampler import CanvasSampler
from vllm_refusion.engine.settings import (
    canvas_length,
    fuses_passes,
    play_options,
    position_slack,
    serial_rows,
    server_defaults,
    tracing_enabled,
)
from vllm_refusion.engine.step_cost import StepCost
from vllm_refusion.engine.trace_channel import Publisher
from vllm_refusion.triton_kernels.dispatch import operations


class ReFusionModelState(ModelState):
    """Per-request decoding state and per-step row placement."""

    num_new_sampled_tokens_per_step: int = 0

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: Any,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.operations = operations(device)
        if vllm_config.lora_config is not None:
            model.lora_rows = LoraRows(compat.LoraLayers(model.lora_manager), device)
        adapter = adapter_of(self.model_config)
        self.mask_rows = adapter and apply_adapter(model, adapter, vllm_config, device)
        self._chains = chains_of(adapter) if adapter else {}
        self.recorder: Recorder | None = None
        self.publisher: Publisher | None = None  # of what it records, to a live page
        self.defaults = server_defaults(self.model_config)
        self.slack = position_slack(vllm_config)
        # Addresses captured by CUDA graphs.
        self.positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)
        self.visibility = torch.zeros(self.max_num_tokens, 4, dtype=torch.int32, device=device)
        self.pass_cost: PassCost | None = None
        self.drafting_cost: PassCost | None = None  # where a mask adapter makes it another
        self._masks_are_set = False
        self._req_of: dict[str, int] = {}  # request id -> its index in all tables, a ``req``
        # by req: its prefill repeats committed tokens, which saw what their slots could see
        self._repeats_tokens = np.zeros(self.max_num_reqs, dtype=bool)
        self._preempting: set[str] = set()
        self._suspended: dict[str, dict[str, torch.Tensor]] = {}
        vocab = self.model_config.get_vocab_size()
        self.limits = PickLimits(self.max_num_reqs, vocab, device)
        self.penalties = Penalties(self.max_num_reqs, vocab, device)
        self.prompt_scores = PromptScores(vllm_config, model, device)
        self.records: dict[int, Record] = {}  # by req: logprobs, of who asks for them
        self._suspended_records: dict[str, Record] = {}
        self.serial: set[int] = set()  # the requests in serial mode, by req
        self.constrained: set[int] = set()  # of these, those that a grammar limits

    def get_supported_generation_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[CanvasSampler, None]:
        self.req_states: RequestState = sampler.req_states
        self.decode_state = DecodeState(
            self.max_num_reqs,
            canvas_length(self.vllm_config),
            self.max_model_len + self.slack,
            self.model_config.hf_text_config.mask_token_id,
            self.device,
            canvas_token=self.req_states.draft_tokens,  # what the runner feeds as draft tokens
        )
        self.decode_state.gathers_starts = True
        self.grammar_masks = GrammarMasks(self.decode_state, self.operations, self._req_of)
        self.sampler = CanvasSampler(
            self.vllm_config,
            self.model,
            self.operations,
            self.decode_state,
            self.req_states,
            self.limits,
            self.penalties,
            sampler.thinking_budget_state,
            self.records,
            self._req_of,
            self.serial,
            self.grammar_masks,
        )
        if tracing_enabled(self.vllm_config) and get_tensor_model_parallel_rank() == 0:
            if play_options(self.vllm_config.additional_config) is not None:
                self.publisher = Publisher()
            sink = self.publisher and self.publisher.send
            self.recorder = self.sampler.recorder = Recorder(self.decode_state, sink)
        return self.sampler, None

    def add_request(self, req: int, new_req_data: Any) -> None:
        prompt_len = len(new_req_data.prompt_token_ids)
        spec = RequestSpec.of(
            new_req_data.sampling_params, prompt_len, self.defaults, self.max_model_len
        )
        self._req_of[new_req_data.req_id] = req
        if self.recorder is not None and spec.trace:
            how = parameters_of(spec.decoding, spec.temperature, spec.seed, spec.max_tokens)
            self.recorder.add(req, new_req_data.req_id, new_req_data.prompt_token_ids, how)
        self._limit_picks(req, spec, prompt_len, new_req_data.prefill_token_ids)
        if spec.logprobs is not None:
            record = self._suspended_records.pop(new_req_data.req_id, None)
            self.records[req] = record or self._record(spec)
        if spec.serial:
            self._add_serial(req, spec, new_req_data)
            return
        saved = self._suspended.pop(new_req_data.req_id, None)
        self._repeats_tokens[req] = saved is not None
        if saved is not None:
            emitted = len(new_req_data.prefill_token_ids) - prompt_len
            self.req_states.prefill_len.np[req] = prompt_len + spec.decoding.whole_slots(emitted)
            self.decode_state.restore(req, saved, emitted)
            return
        self.decode_state.add(
            req,
            prompt_len,
            spec.decoding,
            spec.max_tokens,
            spec.eos_token_id,
            min_tokens=spec.min_tokens,
            stop_ids=spec.held_back,
            temperature=spec.temperature,
            seed=spec.seed,
        )

    def apply_staged_writes(self) -> None:
        """Called once all new requests of a step are added."""
        self.decode_state.write_starts()

    def _add_serial(self, req: int, spec: RequestSpec, new_req_data: Any) -> None:
        """Starts it, or goes on after a preemption: its tokens are computed again in order."""
        prompt_len, tokens = len(new_req_data.prompt_token_ids), new_req_data.prefill_token_ids
        known = len(tokens) - prompt_len
        drafting = {"most_tests": serial_rows(self.vllm_config) - 2, **self._chains}
        if not spec.drafts:
            drafting = {"most_tests": 0, "chain_length": 1}
        self.serial.add(req)
        if spec.constrained:
            self.constrained.add(req)
        self._repeats_tokens[req] = False
        self.req_states.prefill_len.np[req] = prompt_len + max(0, known - 1)
        self.decode_state.add_serial(
            req,
            prompt_len,
            spec.decoding,
            spec.max_tokens,
            spec.eos_token_id,
            last_token=tokens[-1],
            known=known,
            **drafting,
            min_tokens=spec.min_tokens,
            stop_ids=spec.held_back,
            temperature=spec.temperature,
            seed=spec.seed,
        )

    def take_drafts(self, scheduled: Mapping[str, list[int]]) -> None:
        """The drafts that the scheduler has for constrained requests of a step, by request id."""
        if self.constrained:
            drafts = {
                req: strip_speculative_padding(tokens)
                for request_id, tokens in scheduled.items()
                if (req := self._req_of[request_id]) in self.constrained
            }
            budget = self.sampler.row_budget
            speculation = budget.speculation if budget else NO_RIDERS
            self.grammar_masks.give_drafts(drafts, speculation)

    def measure_passes(self, run: Callable[[int], Any]) -> None:
        """Times ``run(rows)``, a forward pass, after the graphs are captured; see ``PassCost``.

        Then it compiles what the first request would have to wait for.
        """
        self.pass_cost = measure_passes(run, self.max_num_tokens, self.device)
        if self.mask_rows is not None:
            self.drafting_cost = self._measure_drafting(run, self.device)
        if self.device.type == "cuda":
            hidden = self.model_config.get_hidden_size()
            layer = next(iter(get_layers_from_vllm_config(self.vllm_config, Attention).values()))
            layer.impl.compile_for(
                layer, self.model_config.dtype, self.max_num_tokens, self.max_num_reqs
            )
            self.sampler.compile(
                torch.zeros(1, hidden, dtype=self.model_config.dtype, device=self.device)
            )
            starts = torch.zeros(2, dtype=torch.int32, device=self.device)
            self.start_row_budget(starts, []).compile()
            self.sampler.row_budget = None

    def _measure_drafting(self, run: Callable[[int], Any], device: torch.device) -> PassCost | None:
        """The same of passes with masks in seven of eight rows, about what drafting feeds."""

        def with_masks(rows: int) -> Any:
            self.mask_rows.spread(rows)
            return run(rows)

        self._masks_are_set = True
        try:
            return measure_passes(with_masks, self.max_num_tokens, device, "Those with masks")
        finally:
            self._masks_are_set = False

    def start_row_budget(self, query_start_loc: torch.Tensor, sizes: list[int]) -> RowBudget:
        """The row budget, in its beginning; see there."""
        self.sampler.row_budget = RowBudget(
            self.decode_state,
            self.operations,
            self.req_states,
            query_start_loc,
            sizes,
            StepCost(self.pass_cost or ASSUMED_COST, self._learns_cost(), self.drafting_cost),
            self._req_of,
            self.serial,
            fuses_passes(self.vllm_config),
        )
        return self.sampler.row_budget

    def _learns_cost(self) -> bool:
        alone = get_tensor_model_parallel_world_size() == 1
        ahead = self.scheduler_config.async_scheduling
        return self.device.type == "cuda" and alone and bool(ahead)

    def _limit_picks(self, req: int, spec: RequestSpec, prompt_len: int, tokens: list[int]) -> None:
        bias = self._bias(spec)
        if spec.penalised:
            self.penalties.add(
                req,
                tokens[:prompt_len],
                tokens[prompt_len:],
                repetition=spec.repetition_penalty,
                frequency=spec.frequency_penalty,
                presence=spec.presence_penalty,
                bad_words=spec.bad_words,
                bias=bias,  # comes first
            )
            self.decode_state.recall_response(req, tokens[prompt_len:])
            bias = None
        self.limits.add(req, top_k=spec.top_k, top_p=spec.top_p, min_p=spec.min_p, bias=bias)

    def _record(self, spec: RequestSpec) -> Record:
        kind = ScoreKind.of(self.model_config.logprobs_mode)
        asked = self.limits.vocab if spec.logprobs == -1 else spec.logprobs
        processing = self._processing(spec) if kind.processed else None
        length = spec.max_tokens if spec.serial else spec.budget
        shape = (length, self.decode_state.canvas_length, asked)
        return Record.empty(*shape, self.device, kind.logits, processing)

    def _processing(self, spec: RequestSpec) -> Processing:
        bias = None if spec.penalised else self._bias(spec)  # there penalties come behind it
        return Processing(
            self.decode_state.mask_token_id,
            spec.held_back,
            spec.min_tokens,
            None if bias is None else sent(bias, self.device),
            spec.temperature,
            spec.top_k,
            spec.top_p,
            spec.min_p,
        )

    def _bias(self, spec: RequestSpec) -> torch.Tensor | None:
        return bias_row(
            self.limits.vocab, spec.logit_bias, spec.allowed_token_ids, spec.banned_token_ids
        )

    def requests_leaving(self, finished: set[str], preempted: set[str]) -> None:
        """Announces why the next ``remove_request`` calls happen (see compat.py)."""
        self._preempting = preempted - finished
        for req_id in finished:
            self._suspended.pop(req_id, None)
            self._suspended_records.pop(req_id, None)

    def remove_request(self, req_id: str) -> None:
        req = self._req_of.pop(req_id, None)
        if req is None:
            return
        if req_id in self._preempting:
            if req not in self.serial:
                self._suspended[req_id] = self.decode_state.save(req)
            if req in self.records:
                self._suspended_records[req_id] = self.records[req]
        self.serial.discard(req)
        self.constrained.discard(req)
        self.records.pop(req, None)
        self.limits.remove(req)
        self.penalties.remove(req)
        self.decode_state.remove(req)
        if self.recorder is not None:
            self.recorder.remove(req, preempted=req_id in self._preempting)

    def prepare_inputs_embeds(self, *args: Any, **kwargs: Any) -> None:
        return None

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        return {"positions": self.positions[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {"positions": self.positions[:num_tokens]}

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        full = cudagraph_mode == CUDAGraphMode.FULL
        num_reqs = input_batch.num_reqs_after_padding if full else input_batch.num_reqs
        num_tokens = input_batch.num_tokens_after_padding if full else input_batch.num_tokens
        self.operations.layout(
            self.decode_state,
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            input_batch.cu_num_logits,
            self.req_states.num_computed_tokens.gpu,
            input_batch.input_ids,
            self.positions,
            self.visibility,
            slot_mappings,
            self.sampler.asked,
        )
        if self.mask_rows is not None and not self._masks_are_set:
            self.operations.find_masks(
                input_batch.input_ids,
                input_batch.num_tokens,
                self.decode_state.mask_token_id,
                self.mask_rows.rows,
                self.mask_rows.count,
            )
        metadata = build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            query_start_loc_gpu=input_batch.query_start_loc,
            query_start_loc_cpu=torch.from_numpy(input_batch.query_start_loc_np),
            max_query_len=int(input_batch.num_scheduled_tokens.max()),
            seq_lens=input_batch.seq_lens,
            max_seq_len=self.max_model_len + self.slack,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            for_cudagraph_capture=for_capture,
        )
        # a graph would replay the tail of the batch that it was captured with
        prompt_tail = None if full or for_capture else self._causal_tail(input_batch)
        # dummy batches, from which any graph may be captured, have no prompts
        prompts_alone = input_batch.has_prefill and not input_batch.num_draft_tokens
        visibility = self.visibility[:num_tokens]
        for shared in {id(of_layer): of_layer for of_layer in metadata.values()}.values():
            shared.visibility = visibility
            shared.prompt_tail = prompt_tail
            shared.feeds_masks = full or not prompts_alone
        if self.sampler.row_budget is not None and not for_capture:
            self.sampler.row_budget.cost.launch()
        return metadata

    def _causal_tail(self, input_batch: InputBatch) -> PromptTail | None:
        """The requests at the end whose rows are plainly causal.

        Those are prompts, and, if all of the batch are such, prompts with the first canvas of
        serial mode: masks in position order. Where other canvases come before them, the host does
        not know the row that they begin at.
        """
        requests = input_batch.idx_mapping_np
        is_prompt = input_batch.is_prefilling_np & ~self._repeats_tokens[requests]
        if not is_prompt.any():
            return None
        if input_batch.num_draft_tokens_per_req is not None:
            plain = input_batch.num_draft_tokens_per_req == 0
            starts_serial = np.isin(requests, list(self.serial)) if self.serial else plain
            if not (is_prompt & (plain | starts_serial)).all():
                is_prompt &= plain
        return PromptTail.of_batch(
            is_prompt,
            input_batch.query_start_loc_np,
            input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens,
        )
