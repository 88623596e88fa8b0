"""Each patch of vLLM: it is in place once, and the reason for it still stands.

A test that fails under a later vLLM says that its patch in compat.py can go, or must change.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_refusion import register
from vllm_refusion.engine import compat


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
    assert "model_validate_json" in source and "ErrorResponse" not in source


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
    from vllm.v1.engine.output_processor import OutputProcessor

    assert getattr(OutputProcessor.process_outputs, compat._PATCHED)
    assert not getattr(OutputProcessor.process_outputs.__wrapped__, compat._PATCHED, False)
    request = SimpleNamespace()
    compat.count_passes(request, 4)
    for accepted in (0, 4, 3):
        request.spec_decode_metrics.observe(num_draft_tokens=4, num_accepted=accepted)
    compat.uncount_pass(request)
    assert sum(request.spec_decode_metrics.histogram) == 2
    # vLLM sets none of its own where its option is off, and ours refuses speculative decoding
    assert 'spec_decode_metrics_level != "none"' in inspect.getsource(Scheduler.add_request)
    for name in compat._RESPONSES:
        assert hasattr(importlib.import_module(name), "build_per_request_timing_metrics")
    stats = SimpleNamespace(forward_passes=4)
    shown = compat._with_passes(lambda *_: PerRequestMetrics(), stats, 30).model_dump()
    assert (shown["forward_passes"], shown["tokens_per_forward"]) == (4, 7.5)


def test_model_state_is_still_not_told_why_a_request_leaves():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    assert getattr(GPUModelRunner.finish_requests, compat._PATCHED)
    assert not getattr(GPUModelRunner.finish_requests.__wrapped__, compat._PATCHED, False)
    assert list(inspect.signature(ModelState.remove_request).parameters) == ["self", "req_id"]


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
    from types import SimpleNamespace

    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    model_config = SimpleNamespace(is_diffusion=True)
    for params in (SamplingParams(temperature=0.5), SamplingParams(seed=1)):
        with pytest.raises(VLLMValidationError, match="with diffusion models"):
            params._validate_diffusion(model_config)


def test_scheduler_still_has_one_lookahead_for_all_requests():
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    parameters = inspect.signature(KVCacheManager.allocate_slots).parameters
    assert {"num_lookahead_tokens", "num_new_computed_tokens"} <= set(parameters)
    assert list(parameters)[:3] == ["self", "request", "num_new_tokens"]


def test_stock_models_on_a_cpu_still_break_in_the_interpreter():
    """What the interpreter cannot run: a kernel that samples top-k and top-p."""
    import torch
    import triton
    from vllm.v1.sample.ops import topk_topp_sampler, topk_topp_triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("only where Triton's interpreter is on")
    assert topk_topp_sampler.HAS_TRITON is False
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
    from types import SimpleNamespace

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
