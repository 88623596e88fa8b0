"""Every private part of vLLM that this project uses or patches, with the reason.

Nothing of ours is imported here: what vLLM is to call comes in as ``Hooks``.
tests/engine/test_compat.py fails once a patch is no longer needed or no longer fits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import math
import sys
from codecs import getincrementaldecoder
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from vllm import LLM
    from vllm.v1.core.sched.scheduler import Scheduler

_PATCHED = "_vllm_refusion_patched"


@dataclass(frozen=True)
class Hooks:
    """What of ours vLLM is to call.

    Attributes:
        architectures: those that serve as ReFusion.
        config_hook: vLLM's per-architecture configuration hook for them.
        route: names them in a checkpoint's configuration, given what overrides it.
        is_ours: whether a ``ModelConfig`` is of a ReFusion model.
        extends_texts: whether a response of a ``ModelConfig``'s may be made by requests of one
            token each.
        admit: checks a request under a ``VllmConfig``; raises VLLMValidationError.
        report: reports the figures of an ``AsyncLLM``.
        take_adapter: puts the base in the place of a mask adapter that ``EngineArgs`` name.
        published: what the Hugging Face Hub calls the checkpoint of a name, short or not.
        cpu_step: twins of the runner's kernels, by their names.
        endpoints: "module:class" of our endpoint plugin, which servers load; it adds routes only
            where an option asks for them.
    """

    architectures: Collection[str]
    config_hook: type
    route: Callable[[Any, Any], None]
    is_ours: Callable[[Any], bool]
    extends_texts: Callable[[Any], bool]
    admit: Callable[[Any, Any], None]
    report: Callable[[Any], Awaitable[None]]
    take_adapter: Callable[[Any], None]
    published: Callable[[str], str]
    cpu_step: Any
    endpoints: str


def _patch(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Puts the decorated function in place of a module's, or of a class's method or property, once.

    It is called with the original function before the arguments.
    """

    def install(function: Callable[..., Any]) -> None:
        found = inspect.getattr_static(owner, name)
        kind = type(found) if isinstance(found, property | staticmethod) else None
        original = found.fget if isinstance(found, property) else getattr(owner, name)
        before = getattr(original, _PATCHED, None)
        if before is not None:
            assert before == function.__qualname__, (before, function.__qualname__)
            return

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(patched, _PATCHED, function.__qualname__)
        setattr(owner, name, patched if kind is None else kind(patched))

    return install


def install(hooks: Hooks) -> None:
    """Routes checkpoints with a mask token to us and applies the process-wide patches, once."""
    import triton
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for architecture in hooks.architectures:
        MODELS_CONFIG_MAP[architecture] = hooks.config_hook
    _exchange_models(hooks)
    _route_checkpoints(hooks)
    _validate_requests(hooks)
    _validate_before_streams(hooks)
    _refuse_beam_search(hooks)
    _refuse_sleep(hooks)
    _report_figures(hooks)
    _report_passes_of_requests()
    _attach_endpoints(hooks)
    _tell_preempted_from_finished()
    _settle_rows_before_each_step()
    _replace_parts_of_the_runner()
    _return_drafts()
    _measure_passes_once_captured()
    _map_loras_on_the_device()
    if triton.knobs.runtime.interpret:
        _keep_stock_models_off_the_interpreter(hooks)
        _keep_steps_off_the_interpreter(hooks.cpu_step)


def _exchange_models(hooks: Hooks) -> None:
    """A short name stands for a published checkpoint, a mask adapter's folder for its base.

    ``create_engine_config``, through which every front end goes, is where vLLM itself exchanges the
    model of a speculator's folder, and the last place where the model, its overrides and
    ``additional_config`` are seen together and may still be changed. Clients use the name that the
    user typed; a folder of that name goes first.

    vLLM's own redirection, by a file of names, comes after the Hub was asked for the name typed.
    Without the Hub vLLM looks into its cache before that: within the call that loads this plugin,
    from which a short name has to come back as it was. Clients such as ``vllm bench serve``, which
    make no such configuration, ask for the tokenizer of the model they name.
    """
    import huggingface_hub
    from vllm.engine import arg_utils
    from vllm.tokenizers import registry

    look_up = arg_utils.get_model_path

    def is_short(model: Any) -> bool:
        return hooks.published(model) != model

    @_patch(arg_utils, "get_model_path")
    def get_model_path(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return model if is_short(model) else original(model, *args, **kwargs)

    def found(model: str, revision: str | None) -> str:
        model = hooks.published(model)
        return look_up(model, revision) if huggingface_hub.constants.HF_HUB_OFFLINE else model

    @_patch(arg_utils.EngineArgs, "create_engine_config")
    def create_engine_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_short(self.model):
            self.served_model_name = self.served_model_name or self.model
            self.model = found(self.model, self.revision)
        if is_short(self.tokenizer):
            self.tokenizer = found(self.tokenizer, self.tokenizer_revision)
        if is_short(self.hf_config_path):
            self.hf_config_path = found(self.hf_config_path, self.revision)
        hooks.take_adapter(self)
        return original(self, *args, **kwargs)

    @_patch(registry, "cached_resolve_tokenizer_args")
    def cached_resolve_tokenizer_args(
        original: Any, tokenizer_name: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return original(hooks.published(tokenizer_name), *args, **kwargs)


def _route_checkpoints(hooks: Hooks) -> None:
    """The published checkpoints say e.g. ``Qwen3ForCausalLM`` and differ only in mask_token_id.

    vLLM offers no hook between reading config.json and choosing the model class other than the
    config parser of the format, so ours extends the one found. vLLM applies ``--hf-overrides`` to
    what the parser returns.
    """
    from vllm.transformers_utils import config as transformers_config

    parsers = transformers_config._CONFIG_FORMAT_TO_CONFIG_PARSER
    base = parsers["hf"]
    if getattr(base, _PATCHED, False):
        return

    class ReFusionConfigParser(base):
        def parse(self, *args: Any, **kwargs: Any) -> tuple[dict, Any]:
            config_dict, config = super().parse(*args, **kwargs)
            hooks.route(config, kwargs.get("hf_overrides") or {})
            return config_dict, config

    setattr(ReFusionConfigParser, _PATCHED, True)
    parsers["hf"] = ReFusionConfigParser


def _validate_requests(hooks: Hooks) -> None:
    """Admission checks that need the engine's configuration and the prompt.

    vLLM's own hook (``LogitsProcessor.validate_params``) is a class method that sees neither. Every
    front end (LLM, AsyncLLM, the OpenAI server) goes through ``process_inputs``, whose
    ``VLLMValidationError`` becomes an HTTP 400.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    @_patch(InputProcessor, "process_inputs")
    def process_inputs(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if hooks.is_ours(self.model_config):
            hooks.admit(request, self.vllm_config)
            _settle_grammars(request.sampling_params, self.vllm_config)
        return request


def _settle_grammars(params: Any, vllm_config: Any) -> None:
    """What an engine's first grammar is made with is from then on not "auto", but that.

    Else a later grammar that only another backend takes passes the front end and fails in the
    engine, which has one backend: an HTTP 500 up to vLLM 0.32.
    """
    outputs = params.structured_outputs
    if outputs is not None:
        vllm_config.structured_outputs_config.backend = outputs._backend


def _validate_before_streams(hooks: Hooks) -> None:
    """A request that streams is refused like any other: with HTTP 400, in its endpoint's format.

    vLLM checks a request when its first output is waited for. A stream has begun by then:
    ``/v1/responses`` breaks it off, ``/v1/messages`` shows how parsing the error fails.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    @_patch(AsyncLLM, "generate")
    def generate(
        original: Any, self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if hooks.is_ours(self.model_config):
            _validate_now(self, prompt, sampling_params, kwargs)
        return original(self, prompt, sampling_params, *args, **kwargs)


def _validate_now(
    engine: Any, prompt: Any, sampling_params: Any, others: Mapping[str, Any]
) -> None:
    """Raises what ``process_inputs`` of an ``AsyncLLM`` would raise later; keeps the parameters.

    ``others`` join the request behind it, and must fit the message to the engine.
    """
    import msgspec

    for name, value in others.items():
        if isinstance(value, dict):
            try:
                msgspec.msgpack.encode(value, enc_hook=str)
            except OverflowError as error:
                raise _unsupported(name, value, "are 64-bit integers") from error
    if isinstance(prompt, dict) and "type" in prompt:  # rendered, as the server does it
        params = copy.copy(sampling_params)
        params.skip_clone = False
        engine.input_processor.process_inputs("", prompt, params, supported_tasks=("generate",))


def _refuse_sleep(hooks: Hooks) -> None:
    """Without sleep mode, which is refused at start, a sleeping engine would not wake up whole.

    vLLM does not look: it stops scheduling, so that the next request waits for ever.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    def refuse(engine: Any, parameter: str, value: Any, allowed: str) -> None:
        if hooks.is_ours(engine.model_config):
            raise _unsupported(parameter, value, allowed)

    for owner in (AsyncLLM, LLMEngine):

        @_patch(owner, "sleep")
        def sleep(original: Any, self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
            if level > 0:
                refuse(self, "level", level, "is 0: ReFusion has no sleep mode")
            return original(self, level, *args, **kwargs)

        @_patch(owner, "release_kv_cache_memory")
        def release_kv_cache_memory(original: Any, self: Any) -> Any:
            refuse(self, "release_kv_cache_memory", True, "is to leave it: there is no sleep mode")
            return original(self)


def _unsupported(parameter: str, value: Any, allowed: str) -> Exception:
    """What vLLM's front ends answer with HTTP 400, naming the parameter."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(
        f"{parameter}={value!r} is not supported: allowed {allowed}.",
        parameter=parameter,
        value=value,
    )


def _refuse_beam_search(hooks: Hooks) -> None:
    """vLLM's beam search sends requests of one token each, which look like any other.

    The one method of the engine that it calls with its own parameters, on every front end, is
    ``resolve_watermarking``, before the first of them.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    @_patch(InputProcessor, "resolve_watermarking")
    def resolve_watermarking(original: Any, self: Any, params: Any) -> bool:
        from vllm.sampling_params import BeamSearchParams

        model = self.model_config
        searches = isinstance(params, BeamSearchParams) and hooks.is_ours(model)
        if searches and not hooks.extends_texts(model):
            allowed = (
                "is False, or a model with a mask adapter: to others a request of one token is the "
                "start of a slot, and the mask token a token"
            )
            raise _unsupported("use_beam_search", True, allowed)
        return original(self, params)


_REQUESTS = {"chat_completion": "ChatCompletionRequest", "completion": "CompletionRequest"}
_RESPONSES_PROTOCOL = "vllm.entrypoints.openai.responses.protocol"
_BODY_CHECK = "check_structured_outputs_count"  # sees the body first, and fails on other types


def refuse_malformed_bodies() -> None:
    """What vLLM's API would answer with a 500, or change before admission sees it.

    Its check of ``structured_outputs`` takes an object for granted, and biases that are no finite
    numbers are clamped to -100 or 100. Called when a server of ReFusion sets itself up, before its
    routes take the schemas of these classes over; a process without them is no server.
    """
    _refuse_infinite_biases()
    if _RESPONSES_PROTOCOL in sys.modules:
        _validate_responses_before_streams()
    for kind, name in _REQUESTS.items():
        module = sys.modules.get(f"vllm.entrypoints.openai.{kind}.protocol")
        if module is None:
            continue
        request = getattr(module, name)
        validator = request.__pydantic_decorators__.model_validators[_BODY_CHECK]
        if not getattr(validator.func, _PATCHED, False):
            validator.func = _with_body_checked(validator.func)
            request.model_rebuild(force=True)


def _with_body_checked(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    from vllm.sampling_params import StructuredOutputsParams

    def check(data: Any) -> Any:
        if isinstance(data, dict):
            outputs = data.get("structured_outputs")
            if not isinstance(outputs, dict | StructuredOutputsParams | None):
                raise _unsupported("structured_outputs", outputs, "is an object")
        return original(data)

    setattr(check, _PATCHED, True)
    return check


def _refuse_infinite_biases() -> None:
    """All endpoints make their parameters with ``from_optional``, which does the clamping."""
    from vllm.sampling_params import SamplingParams

    @_patch(SamplingParams, "from_optional")
    def from_optional(original: Any, *args: Any, **kwargs: Any) -> Any:
        for token, bias in (kwargs.get("logit_bias") or {}).items():
            if not math.isfinite(bias):
                raise _unsupported("logit_bias", {token: bias}, "are finite numbers")
        return original(*args, **kwargs)


def _validate_responses_before_streams() -> None:
    """``/v1/responses`` calls ``AsyncLLM.generate`` in its stream only."""
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    @_patch(OpenAIServingResponses, "_generate_with_builtin_tools")
    def generate(
        original: Any, self: Any, *, engine_input: Any, sampling_params: Any, **kwargs: Any
    ) -> Any:
        _validate_now(self.engine_client, engine_input, sampling_params, kwargs)
        return original(self, engine_input=engine_input, sampling_params=sampling_params, **kwargs)


def _report_figures(hooks: Hooks) -> None:
    """Counters of the device in the server's log and among its Prometheus metrics.

    A stat logger plugin would see vLLM's own figures only: what the worker counts reaches the front
    end through a call to it. vLLM's ``do_log_stats``, every VLLM_LOG_STATS_INTERVAL seconds (10),
    is the place where a front end may wait for one. Steps carry nothing for it.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    @_patch(AsyncLLM, "do_log_stats")
    async def do_log_stats(original: Any, self: Any) -> None:
        # of several front ends one reports
        first = getattr(self.engine_core, "client_index", 0) == 0
        if first and self.logger_manager and hooks.is_ours(self.model_config) and not self.errored:
            await hooks.report(self)
        await original(self)


async def call_workers(engine: Any, method: str) -> list[list[Any]]:
    """Of each engine behind an ``AsyncLLM`` what the method gives on its workers.

    ``AsyncLLM.collective_rpc`` gives what the first of several data parallel engines says.
    """
    client = engine.engine_core
    return await client.call_utility_all_async("collective_rpc", method, None, (), None)


def _report_passes_of_requests() -> None:
    """Forward passes among the figures of a request's output, offline and over HTTP.

    What ``count_passes`` counts would appear as figures of speculative decoding, so it moves to
    ``RequestOutput.metrics`` before an output is made of it.
    """
    from vllm.v1.engine.output_processor import OutputProcessor

    @_patch(OutputProcessor, "process_outputs")
    def process_outputs(
        original: Any, self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for output in engine_core_outputs:
            count = output.spec_decode_metrics
            if count is None or count.num_spec_tokens:
                continue
            output.spec_decode_metrics = None
            state = self.request_states.get(output.request_id)
            if state is not None and state.stats is not None:
                state.stats.forward_passes = sum(count.histogram)
                _show_passes_in_responses()
        return original(self, engine_core_outputs, *args, **kwargs)


_RESPONSES = tuple(f"vllm.entrypoints.openai.{kind}.serving" for kind in _REQUESTS)


@functools.cache
def _show_passes_in_responses() -> None:
    """``metrics`` of a response, given under --enable-per-request-metrics, takes extra fields.

    Called when the first request ends: a server has loaded these modules by then, and what is no
    server need not.
    """
    for name in _RESPONSES:
        module = sys.modules.get(name)
        if module is not None:
            _patch(module, "build_per_request_timing_metrics")(_with_passes)


def _with_passes(original: Callable[..., Any], metrics: Any, num_generation_tokens: int) -> Any:
    shown = original(metrics, num_generation_tokens)
    passes = getattr(metrics, "forward_passes", 0)
    if passes:
        shown.forward_passes = passes
        shown.tokens_per_forward = num_generation_tokens / passes
    return shown


def _attach_endpoints(hooks: Hooks) -> None:
    """Our routes, which an engine option asks for, beside those of vLLM's endpoint plugins.

    vLLM loads the plugins that VLLM_PLUGINS names, and warns every server of each one installed
    that it does not name.
    """
    from vllm import plugins

    @_patch(plugins, "load_endpoint_plugins")
    def load_endpoint_plugins(original: Any, *args: Any, **kwargs: Any) -> list[Any]:
        module, name = hooks.endpoints.split(":")
        ours = getattr(importlib.import_module(module), name)
        return [*original(*args, **kwargs), ours()]


def _keep_stock_models_off_the_interpreter(hooks: Hooks) -> None:
    """On the CPU build Triton is there for ReFusion only: stock models run as without it.

    Two kernels do not run in the interpreter, and that ends the engine: top-k/top-p sampling
    (PyTorch does it instead) and Model Runner V2's mask of structured outputs (stock models get
    Model Runner V1, as without Triton).
    """
    from vllm import envs
    from vllm.config import VllmConfig
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False

    @_patch(VllmConfig, "use_v2_model_runner")
    def use_v2_model_runner(original: Any, self: Any) -> bool:
        ours = self.model_config is not None and hooks.is_ours(self.model_config)
        if ours or envs.VLLM_USE_V2_MODEL_RUNNER is not None:  # the user's choice
            return original(self)
        return False


def _keep_steps_off_the_interpreter(twins: Any) -> None:
    """On a CPU the runner's own kernels take most of a small model's step: PyTorch is faster.

    What ReFusion models never ask of them stays with the kernels.
    """
    from vllm.v1.attention.backends.utils import PAD_SLOT_ID
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

    for twin in (
        twins.prepare_prefill_inputs,
        twins.prepare_pos_seq_lens,
        twins.expand_idx_mapping,
    ):
        _patch(model_runner, twin.__name__)(
            lambda original, *args, twin=twin, **named: twin(*args, **named)
        )

    @_patch(model_runner, "combine_sampled_and_draft_tokens")
    def combine(original: Any, *args: Any, **named: Any) -> Any:
        given = inspect.signature(original).bind(*args, **named).arguments
        if given.pop("num_new_sampled_tokens", 1):
            return original(*args, **named)
        return twins.combine_sampled_and_draft_tokens(**given)

    @_patch(model_runner, "post_update")
    def post_update(original: Any, *args: Any, **named: Any) -> None:
        given = inspect.signature(original).bind(*args, **named).arguments
        drafts = (
            given.pop("draft_tokens", None),
            given.pop("draft_tokens_out", None),
        )  # from 0.33 on
        if given.pop("output_bin_counts") is None and drafts[0] is None:
            twins.post_update(**given)
        else:
            original(*args, **named)

    @_patch(StagedWriteTensor, "apply_write")
    def apply_write(original: Any, self: Any) -> None:
        twins.apply_write(
            self.gpu,
            self._staged_write_indices,
            self._staged_write_starts,
            self._staged_write_contents,
            self._staged_write_cu_lens,
        )
        self.clear_staged_writes()

    @_patch(BlockTables, "gather_block_tables")
    def gather_block_tables(
        original: Any, self: Any, idx_mapping: Any, num_reqs_padded: int, *args: Any, **more: Any
    ) -> Any:
        ours = not args and more.keys() <= {"num_computed_tokens"}  # of sliding windows
        if not ours or getattr(self, "has_sliding_window_groups", False):
            return original(self, idx_mapping, num_reqs_padded, *args, **more)
        out = self.input_block_tables
        twins.gather_block_tables(idx_mapping, [table.gpu for table in self.block_tables], out)
        return tuple(table[:num_reqs_padded] for table in out)

    @_patch(BlockTables, "compute_slot_mappings")
    def compute_slot_mappings(
        original: Any,
        self: Any,
        idx_mapping: Any,
        query_start_loc: Any,
        positions: Any,
        num_tokens_padded: int,
        out: Any = None,
    ) -> Any:
        if out is not None or self.cp_size > 1 or not all(self._slot_mapping_enabled):
            more = (positions, num_tokens_padded, out)
            return original(self, idx_mapping, query_start_loc, *more)
        twins.compute_slot_mappings(
            idx_mapping,
            query_start_loc,
            positions,
            [table.gpu for table in self.block_tables],
            self.block_sizes,
            PAD_SLOT_ID,
            self.slot_mappings,
        )
        return self.slot_mappings[:, :num_tokens_padded]


def _tell_preempted_from_finished() -> None:
    """``ModelState.remove_request`` is not told why a request leaves.

    A preempted one comes back and must go on exactly where it was, so its state is kept.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    @_patch(GPUModelRunner, "finish_requests")
    def finish_requests(original: Any, self: Any, scheduler_output: Any) -> None:
        leaving = getattr(self.model_state, "requests_leaving", None)
        if leaving is not None:
            leaving(scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or set())
        original(self, scheduler_output)


def _settle_rows_before_each_step() -> None:
    """Puts our row budget where vLLM's manager for adaptive verification would be.

    That one exists for speculative decoding only, and wants graphs of its own; the runner asks it
    how many rows a step has, and whose. ``add_requests`` is the first call of a step that would use
    it; vLLM's warm-up drops what it finds at its end, so that serving starts with a new one.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    @_patch(GPUModelRunner, "add_requests")
    def add_requests(original: Any, self: Any, scheduler_output: Any) -> None:
        start = getattr(self.model_state, "start_row_budget", None)
        if start is not None and self.adaptive_verification is None:
            graphs = self.cudagraph_manager
            sizes = [] if graphs is None else graphs.captured_token_counts()
            budget = start(self.input_buffers.query_start_loc, sizes)
            self.adaptive_verification = RowManager(budget)
        original(self, scheduler_output)
        if start is not None:
            self.model_state.take_drafts(scheduler_output.scheduled_spec_decode_tokens)


def _replace_parts_of_the_runner() -> None:
    """Puts our own where the runner made vLLM's while it loaded the model; no hook replaces them.

    For the log-probabilities of prompts, where vLLM's part takes the host's layout of a step for
    the device's; and for structured outputs, where it takes what it has for logits, and room for a
    mask of every row of every canvas: a GB for 256 requests and a vocabulary of 150,000.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    @_patch(GPUModelRunner, "load_model")
    def load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if hasattr(self.model_state, "grammar_masks"):
            self.prompt_logprobs_worker = self.model_state.prompt_scores
            self.structured_outputs_worker = self.model_state.grammar_masks


class RowManager:
    """vLLM's ``AdaptiveVerificationManager``, as far as the runner calls it, on our row budget.

    In each step that decodes the runner calls ``get_num_tokens``, ``compact_batch`` and
    ``reallocate_drafts``, in this order.

    Args:
        budget: see ``row_budget.RowBudget``, which says how many rows there are, and whose.
    """

    def __init__(self, budget: Any) -> None:
        self._budget = budget

    def add_request(self, req_idx: int) -> None:
        """Nothing is kept by request."""

    def get_num_tokens(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> int:
        """Rows of the step in all: those of prompts, and the decode rows."""
        scheduled = sum(map(len, draft_tokens.values()))
        rows = self._budget.settle(len(draft_tokens), scheduled)
        return sum(num_tokens_per_req.values()) - scheduled + rows

    def compact_batch(
        self,
        num_draft_tokens_per_req: np.ndarray,
        num_scheduled_tokens: np.ndarray,
        cu_num_logits_np: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """A layout of the same size for the host: rows [R], starts of the decode rows [R+1]."""
        prompt_rows = num_scheduled_tokens - num_draft_tokens_per_req
        return self._budget.assume(num_draft_tokens_per_req, prompt_rows)

    def reallocate_drafts(self, req_ids: list[str], idx_mapping: torch.Tensor) -> tuple[Any, ...]:
        """The device's layout: cu_num_logits [R+1], query_start_loc, decode rows.

        vLLM 0.33 takes the admitted drafts of each request besides. Only batch-sharded sampling,
        which is refused, reads them.
        """
        from vllm.v1.worker.gpu.input_batch import InputBatch

        layout = self._budget.deal(idx_mapping)
        takes_drafts = "num_admitted_draft_tokens" in InputBatch.__dataclass_fields__
        return (*layout, None) if takes_drafts else layout


def _return_drafts() -> None:
    """A step's output carries, behind the tokens of some requests, -1 and the request's drafts.

    An output has no place for them; ``take_drafts`` takes them out again before vLLM sees them.
    """
    from vllm.v1.structured_output.utils import strip_speculative_padding
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    @_patch(AsyncOutput, "get_output")
    def get_output(original: Any, self: Any) -> Any:
        output = original(self)
        for row in getattr(self.sampler_output, "drafted", ()):
            behind = self.sampled_token_ids[row, len(output.sampled_token_ids[row]) :].tolist()
            output.sampled_token_ids[row] += [-1, *strip_speculative_padding(behind)]
        return output


def take_drafts(output: Any) -> dict[str, list[int]]:
    """Takes the drafts by request id out of a ``ModelRunnerOutput``, see ``_return_drafts``."""
    from vllm.v1.structured_output.utils import strip_speculative_padding

    drafts = {}
    for req_id, row in output.req_id_to_index.items():
        tokens = output.sampled_token_ids[row] if output.sampled_token_ids else []
        known = strip_speculative_padding(tokens)
        if len(known) < len(tokens):
            drafts[req_id] = tokens[len(known) + 1 :]
            output.sampled_token_ids[row] = known
    return drafts


def grammar_output(manager: Any, requests: Any, drafts: dict[str, list[int]]) -> Any:
    """vLLM's ``GrammarOutput``: what is allowed behind the known tokens and behind each draft.

    Its manager fills a table with room for every row of every canvas otherwise, in 0.33 with as
    many rows of each request; asked for one request at a time, it fills the first few. The runner
    would refuse drafts behind the acceptable ones: all of ours are acceptable.
    """
    import numpy as np
    from vllm.v1.core.sched.output import GrammarOutput

    rows = 1 + max(map(len, drafts.values()))
    if manager._grammar_bitmask is None or len(manager._grammar_bitmask) < rows:
        manager._grammar_bitmask = manager.backend.allocate_token_bitmask(rows)
    filled = [
        manager.grammar_bitmask(requests, [name], {name: tokens})[: 1 + len(tokens)].copy()
        for name, tokens in drafts.items()
    ]
    return GrammarOutput(list(drafts), np.concatenate(filled), [2**31 - 1] * len(drafts))


def forced_tokens(manager: Any, request: Any, drafts: list[int], tokenizer: Any) -> list[int]:
    """What a request's grammar leaves no choice about, behind ``drafts`` that it allows.

    vLLM does not ask for it; the backends know the text that must follow, or the only token.
    """
    if manager._get_constraint_bounds(request, drafts).grammar_start > 0:
        return []
    grammar = request.structured_output_request.grammar
    grammar.accept_tokens(request.request_id, drafts)
    try:
        if grammar.is_terminated():
            return []
        text = _forced_text(grammar)
        if text:
            return tokenizer.encode(text, add_special_tokens=False)
        mask = manager.backend.allocate_token_bitmask(1)
        grammar.fill_bitmask(mask, 0)
        words = mask[0].nonzero().flatten().tolist()
        word = int(mask[0, words[0]]) & (2**32 - 1) if len(words) == 1 else 0
        return [32 * words[0] + word.bit_length() - 1] if word.bit_count() == 1 else []
    finally:
        grammar.rollback(len(drafts))


def _forced_text(grammar: Any) -> str:
    try:
        if hasattr(grammar, "matcher"):
            return grammar.matcher.find_jump_forward_string()
        if hasattr(grammar, "ll_matcher"):
            return getincrementaldecoder("utf-8")().decode(grammar.ll_matcher.compute_ff_bytes())
    except UnicodeDecodeError:
        pass  # it begins within a character
    return ""


def _measure_passes_once_captured() -> None:
    """How long passes of various sizes take, measured where vLLM calibrates its own cost models.

    Its own way to run a pass of so many made-up tokens is the runner's ``_dummy_run``.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    @_patch(GPUModelRunner, "capture_model")
    def capture_model(original: Any, self: Any, *, profile_only: bool = False) -> int:
        captured = original(self, profile_only=profile_only)
        if not profile_only and hasattr(self.model_state, "measure_passes"):
            self.model_state.measure_passes(self._dummy_run)
        return captured


def _map_loras_on_the_device() -> None:
    """Rows get the LoRA of the request that they were dealt to on the device.

    vLLM repeats each request's by the host's layout of the step, and only where that is another
    than in the step before. Its adapters are loaded as it does it.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    @_patch(GPUModelRunner, "_set_active_loras")
    def set_active_loras(
        original: Any,
        self: Any,
        prompt_lora_mapping: Any,
        token_lora_mapping: Any,
        lora_requests: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        rows = getattr(self.model, "lora_rows", None)
        if rows is None:
            original(self, prompt_lora_mapping, token_lora_mapping, lora_requests, *args, **kwargs)
            return
        self.lora_manager.set_active_adapters(lora_requests, None)
        starts = self.input_buffers.query_start_loc
        rows.start_step(prompt_lora_mapping, self.lora_state.lora_ids, starts)


class LoraLayers:
    """vLLM's LoRA layers of a model, told of each row which adapter acts on it.

    Its own way computes the tables of their kernels on the host, or waits for the device to.

    Args:
        manager: the model's ``LoRAModelManager``.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        (self._wrapper,) = manager.punica_wrapper_mapping.values()
        self._wrapper.is_prefill = False  # without kernels: row by row
        if not hasattr(self._wrapper, "token_mapping_meta"):
            _leave_plain_rows(self._wrapper)

    def slots(self) -> dict[int, int]:
        """Where each loaded adapter's weights are, by its id."""
        held = enumerate(self._manager.lora_index_to_id)
        return {adapter: slot for slot, adapter in held if adapter is not None}

    @property
    def most_active(self) -> int:
        """Adapters that may act in one step."""
        return self._manager.lora_slots

    @property
    def most_rows(self) -> int:
        return len(self._wrapper._token_lora_indices)

    def set_rows(self, slots: torch.Tensor, active: list[int], listed: torch.Tensor) -> None:
        """The adapters of all rows of a step.

        Args:
            slots: [most_rows] int32, -1 for none.
            active: those among them, ascending.
            listed: [most_active + 1] int32, the same on the device, and then -1.
        """
        wrapper = self._wrapper
        wrapper._token_lora_indices.copy_(slots)
        wrapper._embeddings_indices.copy_(slots.clamp_min(0) * self._manager.vocab_size)
        if hasattr(wrapper, "token_mapping_meta"):
            fill_lora_tables(wrapper.token_mapping_meta, slots, active, listed)

    def set_logit_rows(self, slots: torch.Tensor, active: list[int], listed: torch.Tensor) -> None:
        """As ``set_rows``, of the rows that logits are computed of next."""
        wrapper, rows = self._wrapper, len(slots)
        wrapper._sampler_indices[:rows] = slots
        wrapper.indices_len[1] = rows
        if hasattr(wrapper, "prompt_mapping_meta"):
            fill_lora_tables(wrapper.prompt_mapping_meta, slots, active, listed)


def fill_lora_tables(
    meta: Any, slots: torch.Tensor, active: list[int], listed: torch.Tensor
) -> None:
    """What ``LoRAKernelMeta.prepare_tensors`` fills, without waiting for ``slots``.

    Rows without an adapter are sorted behind the others, and none is listed for them: vLLM lists
    theirs, so that where it counts the adapters for its graphs, the last one may have no programs.
    """
    import torch

    rows, most = len(slots), len(listed)
    counts = [count for count in meta.captured_lora_counts if count >= len(active)]
    meta.no_lora_flag_cpu[0] = not active
    meta.num_active_loras_cpu[0] = min(counts, default=len(active)) if active else 0
    meta.active_lora_ids.copy_(listed)
    meta.token_lora_mapping[:rows] = slots
    order = torch.where(slots < 0, most, slots).argsort(stable=True)
    meta.token_indices_sorted_by_lora_ids[:rows] = order
    is_of = slots == listed[:, None]
    torch.sum(is_of & (slots >= 0), dim=1, dtype=torch.int32, out=meta.num_tokens_per_lora)
    meta.lora_token_start_loc[1:] = meta.num_tokens_per_lora.cumsum(0)


def _leave_plain_rows(wrapper: Any) -> None:
    """In the PyTorch operations of vLLM 0.32 a row of no adapter, -1, is one of the last slot's.

    Later ones leave it alone. All take as many rows as are listed: those of the tensors at hand.
    """

    def around(name: str, adapts: Callable[[int], Any]) -> None:
        original = getattr(wrapper, name)

        def on_adapted_rows(y: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            return original(y, x * adapts(len(x))[:, None], *args, **kwargs)

        setattr(wrapper, name, on_adapted_rows)

    def rows(count: int) -> Any:
        wrapper.indices_len[0] = count
        return wrapper.token_lora_indices >= 0

    for name in ("_shrink_decode", "_expand_decode", "_expand_slice_decode"):
        around(name, rows)
    around("add_lora_logits", lambda count: wrapper.sampler_indices >= 0)


@contextlib.contextmanager
def attention_backend(backend: type) -> Iterator[None]:
    """Attention layers built inside use ``backend``.

    Stock model classes do not pass a backend to their ``Attention`` layers, and the CPU platform
    ignores the configured one.
    """
    from vllm.model_executor.layers.attention import attention

    original = attention.get_attn_backend
    attention.get_attn_backend = lambda *args, **kwargs: backend
    try:
        yield
    finally:
        attention.get_attn_backend = original


def adapt_scheduler(scheduler: Scheduler, slack: int, lookahead: Any, cacheable: Any) -> None:
    """Adapts a stock scheduler object to a device whose KV is in commit order.

    * It takes a model for a diffusion model, which samples no token after the prompt, only if the
      config carries ``canvas_length``; but then vLLM refuses temperature and seed.
    * ``slack``: positions past max_model_len that may be scheduled; front ends keep the limit.
    * ``lookahead(request, scheduled_end)``: tokens to reserve past ``scheduled_end``, may be
      negative. vLLM has one number for all requests.
    * ``cacheable(request)``: how many of its tokens may enter the prefix cache, which hashes blocks
      in position order and takes the KV of all tokens for written.
    """
    scheduler.num_sampled_tokens_per_step = 0
    scheduler.max_model_len += slack
    manager = scheduler.kv_cache_manager
    manager.max_model_len += slack
    allocate_slots = manager.allocate_slots
    cache_blocks = manager.coordinator.cache_blocks

    def allocate(request: Any, num_new_tokens: int, **kwargs: Any) -> Any:
        end = request.num_computed_tokens + num_new_tokens
        end += kwargs.get("num_new_computed_tokens", 0)
        ahead = lookahead(request, end)
        if kwargs.keys() == _OF_RUNNING and _holds(manager, request, end + ahead):
            manager.cache_blocks(request, min(end, request.num_tokens))
            return manager.empty_kv_cache_blocks
        kwargs["num_lookahead_tokens"] = ahead
        return allocate_slots(request, num_new_tokens, **kwargs)

    def cache_in_order(request: Any, num_computed_tokens: int) -> None:
        cache_blocks(request, min(num_computed_tokens, cacheable(request)))

    manager.allocate_slots = allocate
    manager.coordinator.cache_blocks = cache_in_order


_OF_RUNNING = {"num_lookahead_tokens"}  # what the scheduler says of a running request's slots


@functools.cache
def _counts_loras_of_steps() -> bool:
    from vllm.v1.core.sched.scheduler import Scheduler

    return "for req in scheduled_running_reqs" in inspect.getsource(Scheduler.schedule)


@contextlib.contextmanager
def loras_of_all_running(scheduler: Scheduler, not_yet: int) -> Iterator[None]:
    """The step that is scheduled meanwhile leaves adapters of requests that sit out their places.

    vLLM 0.32 admits requests by the adapters of those that the step has, and asserts that the next
    one, with those that sat out, has no more than there are places: ours sit out, by ``not_yet`` as
    ``next_decode_eligible_step``. Later versions count all running requests.
    """
    config = scheduler.lora_config
    if not config or not _counts_loras_of_steps():
        yield
        return
    present: set[int] = set()  # of the step
    absent: set[int] = set()
    # without a place: vLLM lets requests sit out steps that may reach their limits as well
    surplus: dict[Any, int] = {}
    for request in scheduler.running:
        if not request.lora_request:
            continue
        adapter = request.lora_request.lora_int_id
        if request.next_decode_eligible_step == not_yet:
            absent.add(adapter)
        elif adapter in present or len(present) < config.max_loras:
            present.add(adapter)
        else:
            surplus[request] = request.next_decode_eligible_step
            request.next_decode_eligible_step = not_yet
            absent.add(adapter)
    taken = min(len(absent - present), config.max_loras - len(present))
    if taken:
        scheduler.lora_config = copy.copy(config)
        object.__setattr__(scheduler.lora_config, "max_loras", config.max_loras - taken)
    try:
        yield
    finally:
        scheduler.lora_config = config
        for request, step in surplus.items():
            request.next_decode_eligible_step = step


def _holds(manager: Any, request: Any, end: int) -> bool:
    """Whether a running request has pages up to ``end``: most steps, and vLLM's way there is long.

    Full attention frees no pages behind a window, so there is nothing else to do.
    """
    end = min(end, manager.max_model_len)
    return all(
        len(group.req_to_blocks.get(request.request_id, ())) * group.block_size >= end
        for group in manager.coordinator.single_type_managers
    )


def count_passes(request: Any, canvas_length: int) -> None:
    """vLLM's scheduler then counts the passes of a request that may decide something.

    Its figures of speculative decoding are kept for each request that has them, and go to the front
    end with its last output. No tokens to speculate mark ours, see ``_report_passes_of_requests``.
    """
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

    request.spec_decode_metrics = RequestSpecDecodeMetrics(
        num_spec_tokens=0, histogram=[0] * (canvas_length + 1)
    )


def uncount_pass(request: Any) -> None:
    """Makes up for a pass that is counted, but should not be."""
    request.spec_decode_metrics.histogram[0] -= 1


def stop_hashing_output(request: Any) -> None:
    """Block hashes of a request then cover its prompt only, whatever is appended."""
    request._block_hasher = None


def flash_attention_3(head_size: int) -> Callable[..., Any] | None:
    """vLLM's FlashAttention 3, where it is what vLLM itself would use: on Hopper, 16-bit types.

    A plain function of paged K and V. vLLM's own backend around it would need its metadata.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda() or head_size % 8 or head_size > 256:
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if get_flash_attn_version(head_size=head_size) != 3:
        return None
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    return functools.partial(flash_attn_varlen_func, fa_version=3)


def engine_core_of(llm: LLM) -> Any:
    """The engine core, with its scheduler and its workers, of an LLM that runs it in this process.

    For what looks at single steps, the benchmark and tests: vLLM's statistics do not.
    """
    return llm.llm_engine.engine_core.engine_core


def shut_down(llm: LLM) -> None:
    """Ends an LLM's engine now, so that another finds its memory free; LLM has no method for it."""
    llm.llm_engine.engine_core.shutdown()


class ScheduleWatch:
    """What an engine in this process schedules; vLLM's statistics do not say it per step.

    Attributes:
        requests: requests of the last step that has any.
        steps_since_prompt: steps scheduled since the last one with prompt tokens.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.requests = self.steps_since_prompt = 0
        self._prefilling: set[str] = set()
        self._known = scheduler.requests
        schedule = scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                self._note(output)
            return output

        scheduler.schedule = watched

    def _note(self, output: Any) -> None:
        self.requests = len(output.num_scheduled_tokens)
        # a resumed request feeds its prompt again
        self._prefilling.update(output.scheduled_cached_reqs.resumed_req_ids)
        self._prefilling.update(new.req_id for new in output.scheduled_new_reqs)
        self.steps_since_prompt = 0 if self._prefilling else self.steps_since_prompt + 1
        self._prefilling = {
            name
            for name in self._prefilling
            if name in self._known and self._known[name].is_prefill_chunk
        }
