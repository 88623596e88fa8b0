"""Each patch of vLLM: it is in place once, and the reason for it still stands.

A test that fails under a later vLLM says that its patch in compat.py can go, or must change.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_refusion import register
from vllm_refusion.backbones import ARCHITECTURES
from vllm_refusion.decoding.state import DecodeState
from vllm_refusion.engine import compat
from vllm_refusion.engine.config_hook import ReFusionConfig
from vllm_refusion.engine.grammar_masks import GrammarMasks
from vllm_refusion.engine.pass_cost import ASSUMED_COST
from vllm_refusion.engine.plugin import SUPPORTED_VLLM
from vllm_refusion.engine.row_budget import RowBudget
from vllm_refusion.engine.step_cost import StepCost
from vllm_refusion.triton_kernels.dispatch import operations


@pytest.fixture(autouse=True)
def registered():
    register()
    register()  # vLLM may call it again


def test_routing_is_still_needed(tiny_checkpoint):
    from vllm.transformers_utils import config

    parser = config._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"]
    assert getattr(parser, compat._PATCHED)
    stock = parser.__mro__[1]
    assert not getattr(stock, compat._PATCHED, False), "patched twice"
    assert stock().parse(str(tiny_checkpoint), False)[1].architectures == ["Qwen3ForCausalLM"]
    ours = parser().parse(str(tiny_checkpoint), False)[1].architectures
    assert ours == ["ReFusionQwen3ForCausalLM"]


def test_models_are_still_exchanged_where_engines_are_configured():
    """Front ends go through it, and no hook before it sees the model and additional_config."""
    from vllm.engine import arg_utils
    from vllm.engine.arg_utils import EngineArgs
    from vllm.tokenizers import registry
    from vllm.v1.engine import async_llm, llm_engine

    tokenizers = registry.cached_resolve_tokenizer_args
    for patched in (arg_utils.get_model_path, EngineArgs.create_engine_config, tokenizers):
        assert getattr(patched, compat._PATCHED)
        assert not getattr(patched.__wrapped__, compat._PATCHED, False)
    source = inspect.getsource(EngineArgs.create_engine_config.__wrapped__)
    exchanged = source.index("maybe_override_with_speculators(")
    assert exchanged < source.index("self.create_model_config()")
    for module in (async_llm, llm_engine):
        assert "engine_args.create_engine_config(" in inspect.getsource(module)
    source = inspect.getsource(EngineArgs.__post_init__)
    assert source.index("load_general_plugins()") < source.index("get_model_path(self.model,")
    for function in (registry.get_tokenizer, registry.tokenizer_args_from_config):
        assert "cached_resolve_tokenizer_args(" in inspect.getsource(function)


def test_configurations_are_still_hooked_by_architecture():
    from vllm.config import VllmConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    assert {MODELS_CONFIG_MAP[name] for name in ARCHITECTURES.values()} == {ReFusionConfig}
    source = inspect.getsource(VllmConfig.try_verify_and_update_config)
    assert "MODELS_CONFIG_MAP" in source and "verify_and_update_config(self)" in source


def test_request_validation_is_still_needed():
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    assert getattr(InputProcessor.process_inputs, compat._PATCHED)
    assert not getattr(InputProcessor.process_inputs.__wrapped__, compat._PATCHED, False)
    # vLLM's hook sees neither the engine's configuration nor the prompt
    assert list(inspect.signature(LogitsProcessor.validate_params).parameters) == [
        "sampling_params"
    ]


def test_beam_search_still_resolves_watermarks_first():
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.v1.engine.input_processor import InputProcessor

    assert getattr(InputProcessor.resolve_watermarking, compat._PATCHED)
    assert not getattr(InputProcessor.resolve_watermarking.__wrapped__, compat._PATCHED, False)
    for mixin in (BeamSearchOnlineMixin, BeamSearchOfflineMixin):
        assert "input_processor.resolve_watermarking(params)" in inspect.getsource(mixin)


def test_adapters_of_requests_that_sit_out_have_no_places_in_0_32():
    """Where they have, ``loras_of_all_running`` does nothing; it can go with 0.32."""
    from vllm.v1.core.sched.scheduler import Scheduler

    assert compat._counts_loras_of_steps() == vllm.__version__.startswith("0.32")
    counted = "scheduled_running_reqs" if compat._counts_loras_of_steps() else "self.running"
    source = inspect.getsource(Scheduler.schedule)
    (found,) = re.findall(r"lora_int_id\s+for req in (\S+)", source)
    assert found == counted
    assert "assert len(scheduled_loras) <= self.lora_config.max_loras" in source
    assert "< request.next_decode_eligible_step" in source


@pytest.mark.parametrize("kind", compat._REQUESTS)
def test_malformed_bodies_still_pass_for_others(kind):
    """The stock check takes an object for granted."""
    protocol = importlib.import_module(f"vllm.entrypoints.openai.{kind}.protocol")
    request = getattr(protocol, compat._REQUESTS[kind])
    sent = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    bad = sent | {"structured_outputs": 5}
    with pytest.raises(AttributeError):
        getattr(request, compat._BODY_CHECK)(bad)
    compat.refuse_malformed_bodies()
    compat.refuse_malformed_bodies()
    with pytest.raises(VLLMValidationError, match="structured_outputs=5 is not supported: allowed"):
        request.model_validate(bad)
    fine = sent | {"structured_outputs": {"choice": ["a"]}}
    assert request.model_validate(fine).structured_outputs.choice == ["a"]


def test_infinite_biases_are_still_clamped_for_others():
    compat.refuse_malformed_bodies()
    patched = SamplingParams.from_optional
    assert not getattr(patched.__wrapped__, compat._PATCHED, False)
    for bias in (-math.inf, math.nan):
        assert patched.__wrapped__(logit_bias={"5": bias}).logit_bias == {5: -100.0}
        with pytest.raises(VLLMValidationError, match="logit_bias=.* allowed are finite numbers"):
            patched(logit_bias={"5": bias})
    assert patched(logit_bias={"5": 1}).logit_bias == {5: 1.0}


def test_streams_still_begin_before_their_requests_are_checked():
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    compat.refuse_malformed_bodies()
    for patched in (AsyncLLM.generate, OpenAIServingResponses._generate_with_builtin_tools):
        assert getattr(patched, compat._PATCHED)
        assert not getattr(patched.__wrapped__, compat._PATCHED, False)
        assert inspect.isasyncgenfunction(patched.__wrapped__)
    assert "await self.add_request(" in inspect.getsource(AsyncLLM.generate.__wrapped__)
    # neither expects a refusal in its stream
    source = inspect.getsource(OpenAIServingResponses.responses_stream_generator)
    assert "except GenerationError" in source and "Validation" not in source
    source = inspect.getsource(AnthropicServingMessages.message_stream_converter)
    # 0.32 takes every chunk for an answer; 0.33 passes a refusal on, after it answered HTTP 200
    assert ("model_validate_json" in source) != ("ErrorResponse" in source)


def test_engines_still_sleep_without_sleep_mode(monkeypatch):
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine

    assert "enable_sleep_mode" not in inspect.getsource(EngineCore.sleep)
    ours = SimpleNamespace(architectures=["ReFusionQwen3ForCausalLM"])
    for owner in (AsyncLLM, LLMEngine):
        engine = SimpleNamespace(model_config=ours)
        for name in ("sleep", "release_kv_cache_memory"):
            patched = getattr(owner, name)
            assert getattr(patched, compat._PATCHED)
            assert not getattr(patched.__wrapped__, compat._PATCHED, False)
            with pytest.raises(VLLMValidationError, match="no sleep mode"):
                patched(engine)


def test_figures_are_still_reported_where_vllm_logs_its_own():
    from vllm.v1.engine.async_llm import AsyncLLM

    assert getattr(AsyncLLM.do_log_stats, compat._PATCHED)
    assert not getattr(AsyncLLM.do_log_stats.__wrapped__, compat._PATCHED, False)
    assert "self.logger_manager.log()" in inspect.getsource(AsyncLLM.do_log_stats.__wrapped__)


def test_passes_still_travel_as_figures_of_speculative_decoding():
    from vllm.entrypoints.generate.base.protocol import PerRequestMetrics
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    assert getattr(OutputProcessor.process_outputs, compat._PATCHED)
    assert not getattr(OutputProcessor.process_outputs.__wrapped__, compat._PATCHED, False)
    request = SimpleNamespace()
    compat.count_passes(request, 4)
    for accepted in (0, 4, 3):
        request.spec_decode_metrics.observe(num_draft_tokens=4, num_accepted=accepted)
    compat.uncount_pass(request)
    assert sum(request.spec_decode_metrics.histogram) == 2
    # where the output's request finds its statistics
    assert "self.request_states[request_id] = req_state" in inspect.getsource(OutputProcessor)
    assert "stats" in inspect.signature(RequestState).parameters or "self.stats" in (
        inspect.getsource(RequestState)
    )
    # vLLM sets none of its own where its option is off, and ours refuses speculative decoding
    assert 'spec_decode_metrics_level != "none"' in inspect.getsource(Scheduler.add_request)
    for name in compat._RESPONSES:
        assert hasattr(importlib.import_module(name), "build_per_request_timing_metrics")
    stats = SimpleNamespace(forward_passes=4)
    shown = compat._with_passes(lambda *_: PerRequestMetrics(), stats, 30).model_dump()
    assert (shown["forward_passes"], shown["tokens_per_forward"]) == (4, 7.5)


def test_endpoints_are_still_warned_of_unless_named(monkeypatch):
    """Ours come on an engine option, without an entry point that every server would warn of."""
    from vllm import plugins
    from vllm.plugins.endpoint_plugins import interface

    load = plugins.load_endpoint_plugins
    assert getattr(load, compat._PATCHED)
    assert not getattr(load.__wrapped__, compat._PATCHED, False)
    assert "Endpoint plugins add HTTP routes" in inspect.getsource(load.__wrapped__)
    assert "import load_endpoint_plugins" in inspect.getsource(interface.attach_endpoint_plugins)
    (ours,) = load(("generate",))
    assert isinstance(ours, interface.EndpointPlugin)


def test_model_state_is_still_not_told_why_a_request_leaves():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    assert getattr(GPUModelRunner.finish_requests, compat._PATCHED)
    assert not getattr(GPUModelRunner.finish_requests.__wrapped__, compat._PATCHED, False)
    assert list(inspect.signature(ModelState.remove_request).parameters) == ["self", "req_id"]


def targets_of(method: str) -> int:
    """To how many names the runner assigns what ``method`` of its manager returns."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(GPUModelRunner)))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if getattr(node.value.func, "attr", None) == method:
                (target,) = node.targets
                return len(target.elts) if isinstance(target, ast.Tuple) else 1
    raise AssertionError(f"the runner does not use what {method} returns")


# Called where something speculates, or while graphs are captured: never on our manager.
OF_SPECULATION = {"batches_to_profile", "set_initial_cost_curves", "record_confidences"}


def test_row_manager_answers_what_the_runner_asks():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

    assert getattr(GPUModelRunner.add_requests, compat._PATCHED)
    assert not getattr(GPUModelRunner.add_requests.__wrapped__, compat._PATCHED, False)
    calls = set(re.findall(r"adaptive_verification\.(\w+)\(", inspect.getsource(GPUModelRunner)))
    answered = {name for name in vars(compat.RowManager) if not name.startswith("_")}
    assert answered == calls - OF_SPECULATION
    for name in answered:
        ours, theirs = (
            list(inspect.signature(getattr(manager, name)).parameters)
            for manager in (compat.RowManager, AdaptiveVerificationManager)
        )
        assert ours == theirs


@pytest.mark.parametrize("takes_drafts", [False, True], ids=["0.32", "0.33"])
def test_row_manager_lays_out_a_step(takes_drafts, monkeypatch):
    """A prompt of 5 tokens and a request in its decoding; the installed vLLM, and what differs."""
    from vllm.v1.worker.gpu.input_batch import InputBatch

    fields = dict(InputBatch.__dataclass_fields__)
    installed = "num_admitted_draft_tokens" in fields
    assert targets_of("reallocate_drafts") == 3 + installed
    assert (targets_of("compact_batch"), targets_of("get_num_tokens")) == (2, 1)
    fields.pop("num_admitted_draft_tokens", None)
    if takes_drafts:
        fields["num_admitted_draft_tokens"] = None
    monkeypatch.setattr(InputBatch, "__dataclass_fields__", fields)

    starts = torch.zeros(5, dtype=torch.int32)
    computed = SimpleNamespace(gpu=torch.zeros(4, dtype=torch.int32))
    state = DecodeState(4, 16, 64, 49, "cpu")
    budget = RowBudget(
        state,
        operations(state.device),
        SimpleNamespace(num_computed_tokens=computed),
        starts,
        sizes=[],
        cost=StepCost(ASSUMED_COST, learns=False),
        requests=["a", "b"],
        serial=[],
        riders=True,
    )
    manager = compat.RowManager(budget)
    manager.add_request(1)
    assert manager.get_num_tokens({"a": 5, "b": 8}, {"b": [-1] * 8}) == 13
    rows, decode_starts = manager.compact_batch(
        np.array([0, 8]), np.array([5, 8]), np.array([0, 0, 8], dtype=np.int32)
    )
    assert (rows.tolist(), decode_starts.tolist()) == ([5, 8], [0, 0, 8])
    assert rows.dtype == decode_starts.dtype == np.int32
    layout = manager.reallocate_drafts(["a", "b"], torch.tensor([0, 1]))
    assert layout[3:] == ((None,) if takes_drafts else ())
    decode_starts, query_starts, decode_rows = layout[:3]
    assert decode_starts.shape == (3,) and query_starts is starts
    assert decode_rows == 8 and query_starts.tolist() == [0, 5, 5, 13, 13]  # idle: nothing


def test_runner_still_has_what_the_row_budget_is_made_of():
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
    from vllm.v1.worker.gpu.input_batch import InputBuffers
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    runner = inspect.getsource(GPUModelRunner)
    for name in ("adaptive_verification", "cudagraph_manager", "input_buffers", "model_state"):
        assert re.search(rf"self\.{name}(: .*)? = ", runner), name
    graphs = [SimpleNamespace(num_tokens=n, num_active_loras=0) for n in (8, 2, 8)]
    sizes = ModelCudaGraphManager.captured_token_counts(SimpleNamespace(graphs=graphs))
    assert sizes == [2, 8]
    starts = InputBuffers(4, 16, torch.device("cpu")).query_start_loc
    assert (starts.shape, starts.dtype) == ((5,), torch.int32)


def test_passes_can_still_be_run_for_their_time():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    assert getattr(GPUModelRunner.capture_model, compat._PATCHED)
    assert not getattr(GPUModelRunner.capture_model.__wrapped__, compat._PATCHED, False)
    assert "profile_only" in inspect.signature(GPUModelRunner.capture_model).parameters
    inspect.signature(GPUModelRunner._dummy_run).bind(None, 128)


def test_runner_still_keeps_requests_as_decoding_reads_them(monkeypatch):
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.states import RequestState

    monkeypatch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)  # as in vLLM's CPU worker
    states = RequestState(2, 64, 64, 16, 100, torch.device("cpu"))
    assert states.draft_tokens.shape == (2, 16)
    assert states.num_computed_tokens.gpu.shape == (2,)
    states.prefill_len.np[1] = 7
    assert states.prefill_len.copy_to_uva().tolist() == [0, 7]


def test_engines_of_this_process_are_still_reached_and_ended_the_same_way():
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.engine.llm_engine import LLMEngine

    assert not hasattr(LLM, "shutdown")
    assert "self.engine_core = " in inspect.getsource(LLMEngine)
    assert "self.engine_core = EngineCore(" in inspect.getsource(InprocClient)
    inspect.signature(InprocClient.shutdown).bind(None)
    assert "self.scheduler" in inspect.getsource(EngineCore)


def test_cpu_platform_still_ignores_the_attention_backend():
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    config = AttentionSelectorConfig(
        head_size=64, dtype="bfloat16", kv_cache_dtype="auto", block_size=16
    )
    chosen = CpuPlatform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, config)
    assert chosen == AttentionBackendEnum.CPU_ATTN.get_path()


def test_attention_backend_is_restored():
    from vllm.model_executor.layers.attention import attention

    stock = attention.get_attn_backend
    with pytest.raises(KeyError), compat.attention_backend(object):
        assert attention.get_attn_backend(1, 2, x=3) is object
        raise KeyError
    assert attention.get_attn_backend is stock


def test_diffusion_models_still_lack_temperature_and_seed():
    """Why ReFusion does not set canvas_length in the config, and adapts the scheduler instead."""
    model_config = SimpleNamespace(is_diffusion=True)
    for params in (SamplingParams(temperature=0.5), SamplingParams(seed=1)):
        with pytest.raises(VLLMValidationError, match="with diffusion models"):
            params._validate_diffusion(model_config)


def test_scheduler_still_has_one_lookahead_for_all_requests():
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    parameters = inspect.signature(KVCacheManager.allocate_slots).parameters
    assert {"num_lookahead_tokens", "num_new_computed_tokens"} <= set(parameters)
    assert list(parameters)[:3] == ["self", "request", "num_new_tokens"]


def test_scheduler_still_has_what_is_adapted():
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    source = inspect.getsource(Scheduler.__init__)
    for name in ("num_sampled_tokens_per_step", "max_model_len", "kv_cache_manager"):
        assert f"self.{name} = " in source
    source = inspect.getsource(KVCacheManager)
    assert "self.max_model_len = " in source
    assert "self.coordinator.cache_blocks(" in source
    parameters = inspect.signature(KVCacheCoordinator.cache_blocks).parameters
    assert list(parameters) == ["self", "request", "num_computed_tokens"]
    assert "if self._block_hasher is not None" in inspect.getsource(Request)
    # what our schedulers override
    for scheduler in (Scheduler, AsyncScheduler):
        parameters = inspect.signature(scheduler._update_after_schedule).parameters
        assert list(parameters) == ["self", "scheduler_output"]
    assert "make_spec_decoding_stats(" in inspect.getsource(Scheduler)


def test_stock_models_on_a_cpu_still_break_in_the_interpreter():
    """What the interpreter cannot run: a kernel that samples top-k and top-p."""
    import triton
    from vllm.config import VllmConfig
    from vllm.v1.sample.ops import topk_topp_sampler, topk_topp_triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("only where Triton's interpreter is on")
    assert topk_topp_sampler.HAS_TRITON is False
    assert getattr(VllmConfig.use_v2_model_runner.fget, compat._PATCHED)
    logits, k = torch.randn(2, 64), torch.tensor([5, 5], dtype=torch.int32)
    with pytest.raises(Exception, match="'int' object has no attribute 'to'"):
        topk_topp_triton.apply_top_k_top_p_triton(logits, k, torch.tensor([0.9, 0.9]))


def test_flash_attention_still_takes_our_arguments():
    import vllm
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides  # noqa: F401
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    # its package cannot be imported without the CUDA extensions
    file = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    functions = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(functions["flash_attn_varlen_func"]) >= {
        *("q", "k", "v", "out", "cu_seqlens_q", "max_seqlen_q", "seqused_k", "max_seqlen_k"),
        *("block_table", "softmax_scale", "causal", "fa_version"),
    }
    assert "head_size" in inspect.signature(get_flash_attn_version).parameters


def test_schedules_still_say_which_requests_and_prompts_they_hold():
    """ScheduleWatch on a made-up scheduler whose outputs and requests have vLLM's fields."""
    from dataclasses import fields

    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    names = {field.name for field in fields(SchedulerOutput)}
    assert {"scheduled_new_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens"} <= names
    assert "resumed_req_ids" in {field.name for field in fields(CachedRequestData)}
    assert "is_prefill_chunk" in inspect.getsource(Scheduler._update_after_schedule)

    requests = {name: SimpleNamespace(is_prefill_chunk=False) for name in "ab"}
    steps = iter(
        [
            # tokens by request, new ones, resumed ones, prompts that go on afterwards
            ({"a": 8}, "a", "", "a"),
            ({"a": 4, "b": 1}, "b", "", ""),
            ({}, "", "", ""),
            ({"a": 2, "b": 2}, "", "", ""),
            ({"a": 2, "b": 2}, "", "", ""),
            ({"b": 2}, "", "b", ""),
        ]
    )

    def schedule():
        tokens, new, resumed, unfinished = next(steps)
        for name, request in requests.items():
            request.is_prefill_chunk = name in unfinished
        return SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
            scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in new],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(resumed)),
        )

    scheduler = SimpleNamespace(requests=requests, schedule=schedule)
    watch = compat.ScheduleWatch(scheduler)
    seen = []
    for _ in range(6):
        scheduler.schedule()
        seen.append((watch.requests, watch.steps_since_prompt))
    assert seen == [(1, 0), (2, 0), (2, 0), (2, 1), (2, 2), (1, 0)]


def test_a_running_request_that_holds_its_pages_is_asked_for_none():
    from vllm.v1.core.sched.scheduler import Scheduler

    group = SimpleNamespace(req_to_blocks={"a": [3, 4]}, block_size=16)
    coordinator = SimpleNamespace(single_type_managers=[group])
    manager = SimpleNamespace(max_model_len=40, coordinator=coordinator)
    known, unknown = SimpleNamespace(request_id="a"), SimpleNamespace(request_id="b")
    assert [compat._holds(manager, known, end) for end in (0, 32, 33, 99)] == [True, True] + [
        False
    ] * 2
    assert not compat._holds(manager, unknown, 1)
    manager.max_model_len = 32
    assert compat._holds(manager, known, 99)  # nobody has pages behind the last position
    (call,) = re.findall(
        r"allocate_slots\(\s*request,\s*num_new_tokens,\s*(\w+)=self.num_lookahead_tokens,\s*\)",
        inspect.getsource(Scheduler.schedule),
    )
    assert {call} == compat._OF_RUNNING


def test_runner_still_masks_what_it_takes_for_logits():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    assert getattr(GPUModelRunner.load_model, compat._PATCHED)
    assert not getattr(GPUModelRunner.load_model.__wrapped__, compat._PATCHED, False)
    source = inspect.getsource(GPUModelRunner.load_model.__wrapped__)
    assert source.index("custom_sampler(") < source.index("= StructuredOutputsWorker(")
    source = inspect.getsource(GPUModelRunner.sample)
    assert source.index("self.structured_outputs_worker.apply_grammar_bitmask(") < source.index(
        "self.sampler("
    )
    stock, ours = (
        list(inspect.signature(owner.apply_grammar_bitmask).parameters)
        for owner in (StructuredOutputsWorker, GrammarMasks)
    )
    assert stock == ours


def test_outputs_still_have_no_place_for_drafts():
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    assert getattr(AsyncOutput.get_output, compat._PATCHED)
    assert not getattr(AsyncOutput.get_output.__wrapped__, compat._PATCHED, False)
    assert not [name for name in ModelRunnerOutput.__dataclass_fields__ if "draft" in name]
    assert "del token_ids[num_tokens:]" in inspect.getsource(AsyncOutput.get_output.__wrapped__)

    tokens = np.array([[5, 6, 7, 8, -1], [5, 9, 9, 9, 9], [-1, 9, 9, 9, 9]])
    counts = np.array([2, 1, 0])
    output = SimpleNamespace(
        copy_event=SimpleNamespace(synchronize=lambda: None),
        sampled_token_ids=tokens,
        num_sampled_tokens_np=counts,
        model_runner_output=ModelRunnerOutput(["a", "b", "c"], {"a": 0, "b": 1, "c": 2}),
        sampler_output=SimpleNamespace(drafted=[0, 2]),
        sampling_mask_tensors=None,
        num_nans=None,
        logprobs_tensors=None,
        prompt_logprobs_dict={},
        prompt_token_id_logprobs_dict={},
        pending_aux_output=None,
        _has_fault=None,
    )
    returned = AsyncOutput.get_output(output)
    assert compat.take_drafts(returned) == {"a": [7, 8], "c": []}
    assert returned.sampled_token_ids == [[5, 6], [5], []]
    assert compat.take_drafts(returned) == {}


def test_scheduler_still_asks_when_a_request_is_eligible():
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    assert "if self.current_step < request.next_decode_eligible_step:" in source
    source = inspect.getsource(Scheduler.get_grammar_bitmask)
    assert "self.structured_output_manager.grammar_bitmask(" in source


def test_grammars_still_do_not_say_what_they_force():
    """And the manager still makes room for all rows, of which it is asked for few."""
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    assert set(StructuredOutputGrammar.__abstractmethods__) == {
        *("accept_tokens", "validate_tokens", "rollback"),
        *("fill_bitmask", "is_terminated", "reset"),
    }
    assert "matcher" in XgrammarGrammar.__dataclass_fields__
    assert "ll_matcher" in GuidanceGrammar.__dataclass_fields__
    source = inspect.getsource(StructuredOutputManager.grammar_bitmask)
    assert "if self._grammar_bitmask is None:" in source
    assert "max_batch_size * (1 + max_num_spec_tokens)" in source
    bounds = inspect.signature(StructuredOutputManager._get_constraint_bounds)
    assert list(bounds.parameters)[:3] == ["self", "request", "spec_tokens"]


def test_rows_still_get_their_lora_by_the_layout_of_the_host():
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    state = LoraState(3)
    state.lora_ids[:] = (0, 7, 4)
    of_request, of_row, _ = state.make_lora_inputs(["a", "b"], np.array([2, 1]), np.array([2, 1]))
    assert (of_request, of_row) == ((4, 7), (4, 4, 7))
    step = inspect.getsource(GPUModelRunner.execute_model)
    dealt, mapped = (step.index(call) for call in ("self.prepare_inputs(", "_set_active_loras("))
    assert dealt < mapped


def test_rows_without_a_lora_are_the_last_slots_in_the_first_version_without_a_gpu():
    """Once that is not supported, ``_leave_plain_rows`` need not mask them any more."""
    from vllm.lora.ops.torch_ops import bgmv_expand

    y, b = torch.zeros(1, 2), torch.ones(3, 2, 4)
    bgmv_expand(torch.ones(1, 4), b, y, torch.tensor([-1]))
    first = vllm.__version__.startswith(f"{SUPPORTED_VLLM[0]}.")
    assert y.tolist() == ([[4, 4]] if first else [[0, 0]])
    assert SUPPORTED_VLLM[0] == "0.32"


def test_tables_of_lora_kernels_still_have_what_is_filled():
    from dataclasses import fields

    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    filled = inspect.getsource(compat.fill_lora_tables)
    names = {field.name for field in fields(LoRAKernelMeta)}
    assert {name for name in names if name not in filled} == {"default_num_active_loras_cpu"}


def test_a_call_to_workers_still_gives_what_the_first_engine_says():
    from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient

    first = inspect.getsource(DPLBAsyncMPClient.call_utility_async)
    assert "(await self.call_utility_all_async(method, *args))[0]" in first
    call = inspect.getsource(AsyncMPClient.collective_rpc_async)
    assert re.search(r'"collective_rpc", method, timeout, args, kwargs\b', call)
