"""Each patch of vLLM: it is in place once, and the reason for it still stands.

A test that fails under a later vLLM says that its patch in compat.py can go, or must change.
"""

from __future__ import annotations

import inspect

import pytest

from vllm_refusion import compat, register


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


def test_figures_are_still_reported_where_vllm_logs_its_own():
    from vllm.v1.engine.async_llm import AsyncLLM

    assert getattr(AsyncLLM.do_log_stats, compat._PATCHED)
    assert not getattr(AsyncLLM.do_log_stats.__wrapped__, compat._PATCHED, False)
    assert "self.logger_manager.log()" in inspect.getsource(AsyncLLM.do_log_stats.__wrapped__)


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
