"""Routing of checkpoints and the configuration an engine gets."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm
from packaging.requirements import Requirement
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_refusion import backbones
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.engine import options as engine_options
from vllm_refusion.engine import plugin, settings

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """Builds a copy of the tiny checkpoint with changed config and generation config."""

    def build(generation_config=None, **changes):
        for file in tiny_checkpoint.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for name, value in changes.items():
            if value is None:
                config.pop(name, None)
            else:
                config[name] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation_config is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
        return str(tmp_path)

    return build


def vllm_config(model, **options):
    return EngineArgs(model=model, enforce_eager=True, **options).create_engine_config()


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("Qwen3ForCausalLM", "qwen3"), ("Qwen2ForCausalLM", "qwen2"), ("LlamaForCausalLM", "llama")],
)
def test_checkpoints_with_a_mask_token_are_ours(checkpoint, architecture, model_type):
    model = checkpoint(architectures=[architecture], model_type=model_type)
    config = vllm_config(model)
    assert config.model_config.architecture == backbones.ARCHITECTURES[architecture]
    assert backbones.is_refusion(config.model_config)


def test_checkpoints_without_a_mask_token_stay_stock(checkpoint):
    config = vllm_config(checkpoint(mask_token_id=None))
    assert config.model_config.architecture == "Qwen3ForCausalLM"
    assert not backbones.is_refusion(config.model_config)
    assert config.diffusion_config is None
    assert config.scheduler_config.scheduler_cls is None


def test_overrides_give_and_take_the_mask_token(checkpoint):
    ours, stock = "ReFusionQwen3ForCausalLM", "Qwen3ForCausalLM"

    def architecture(model, overrides):
        return vllm_config(model, hf_overrides=overrides).model_config.architecture

    def masked(config):
        config.mask_token_id = 1
        return config

    model = checkpoint()
    assert architecture(model, {"mask_token_id": 2}) == ours
    assert architecture(model, {"mask_token_id": None}) == stock
    assert architecture(model, {"architectures": [stock]}) == stock  # as documented
    assert architecture(model, {"architectures": [ours]}) == ours
    model = checkpoint(mask_token_id=None)
    assert architecture(model, {"mask_token_id": 1}) == ours
    assert architecture(model, masked) == ours
    assert architecture(model, {"mask_token_id": 1, "architectures": [stock]}) == stock
    with pytest.raises(ValueError, match="mask_token_id=-1, but"):
        architecture(model, {"mask_token_id": -1})
    model = checkpoint(mask_token_id=1, architectures=None)
    assert architecture(model, {}) == ours  # of its model_type
    model = checkpoint(mask_token_id=None, architectures=["MistralForCausalLM"])
    for overrides in ({"mask_token_id": 1}, masked):
        with pytest.raises(ValueError, match="give MistralForCausalLM a mask_token_id, but ReFus"):
            architecture(model, overrides)


@pytest.mark.parametrize("mask", [-1, 3328, 2.5, True, "1"], ids=str)
def test_unusable_mask_token(checkpoint, mask):
    with pytest.raises(ValueError, match="mask_token_id"):
        vllm_config(checkpoint(mask_token_id=mask))


def test_defaults(checkpoint):
    config = vllm_config(checkpoint())
    assert settings.server_defaults(config.model_config) == DecodingParams(32, 128, 0.9, 0.4)
    assert settings.canvas_length(config) == 256
    assert config.model_config.get_diff_sampling_param() == {"temperature": 0.0}


def test_defaults_of_the_generation_config_and_overrides(checkpoint):
    model = checkpoint(
        {
            "slot_size": 8,
            "block_length": 32,
            "token_threshold": 0.2,
            "temperature": 0.5,
            "top_k": 20,
            "repetition_penalty": 1.1,
        }
    )
    config = vllm_config(model, override_generation_config={"token_threshold": 0.7})
    assert settings.server_defaults(config.model_config) == DecodingParams(8, 32, 0.9, 0.7)
    assert config.model_config.get_diff_sampling_param() == {"temperature": 0.5, "top_k": 20}


def test_penalties_of_the_generation_config_where_requests_are_serial(checkpoint):
    model = checkpoint({"mode": "serial", "repetition_penalty": 1.1})
    defaults = vllm_config(model).model_config.get_diff_sampling_param()
    assert defaults == {"temperature": 0.0, "repetition_penalty": 1.1}


def test_presets_as_defaults(checkpoint):
    """A preset stands for its four values where it is given; what comes later goes first."""

    def defaults(generation_config, **override):
        config = vllm_config(checkpoint(generation_config), override_generation_config=override)
        return settings.server_defaults(config.model_config)

    assert defaults({}, preset="gpqa") == DecodingParams(8, 16, 0.8, 0.2)
    assert defaults({"slot_size": 4}, preset="gpqa") == DecodingParams(8, 16, 0.8, 0.2)
    assert defaults({"preset": "gpqa"}, slot_size=4) == DecodingParams(4, 16, 0.8, 0.2)
    with pytest.raises(ValueError, match="preset='gpqa2'"):
        defaults({}, preset="gpqa2")


def test_trace_option(checkpoint):
    model = checkpoint()
    assert not settings.tracing_enabled(vllm_config(model))
    options = {"additional_config": {"refusion_trace": True}}
    assert settings.tracing_enabled(vllm_config(model, **options))
    with pytest.raises(ValueError, match="refusion_trace='yes'"):
        vllm_config(model, additional_config={"refusion_trace": "yes"})


def test_play_option(checkpoint):
    """A live page is of one engine, which records."""
    model = checkpoint()
    for value in (True, {"stock_url": "http://other:8000"}):
        options = {"additional_config": {"refusion_play": value}}
        assert settings.tracing_enabled(vllm_config(model, **options))
    for value in ("yes", {}, {"stock_url": "host"}, {"stock_url": "http://a", "b": 1}):
        with pytest.raises(ValueError, match="refusion_play=.*allowed is a boolean, or"):
            vllm_config(model, additional_config={"refusion_play": value})
    with pytest.raises(ValueError, match="data_parallel_size=2 beside refusion_play"):
        vllm_config(model, data_parallel_size=2, **options)


def test_schedule(checkpoint):
    model = checkpoint()
    for choice, fuses in ((None, True), ("fused", True), ("plain", False)):
        options = {} if choice is None else {"refusion_schedule": choice}
        assert settings.fuses_passes(vllm_config(model, additional_config=options)) is fuses
    with pytest.raises(ValueError, match="refusion_schedule='slow'.*'fused' and 'plain'"):
        vllm_config(model, additional_config={"refusion_schedule": "slow"})


def test_bad_server_default(checkpoint):
    with pytest.raises(ValueError, match="slot_threshold=1.5"):
        vllm_config(checkpoint(), override_generation_config={"slot_threshold": 1.5})


def test_canvas(checkpoint):
    model = checkpoint({"slot_size": 8, "block_length": 512})
    assert settings.canvas_length(vllm_config(model)) == 512
    with pytest.raises(ValueError, match="block_length=512"):
        vllm_config(model, diffusion_config={"canvas_length": 256})


def test_batch_limits(checkpoint):
    model = checkpoint()
    config = vllm_config(model, max_num_batched_tokens=1000, max_num_seqs=64)  # blocks of 128
    assert config.scheduler_config.max_num_seqs == 7
    config = vllm_config(model, max_num_batched_tokens=1024, max_num_seqs=4)
    assert config.scheduler_config.max_num_seqs == 4
    config = vllm_config(model, max_num_scheduled_tokens=512, max_num_seqs=64)
    assert config.scheduler_config.max_num_seqs == 4
    with pytest.raises(ValueError, match="max_num_batched_tokens=100 "):
        vllm_config(model, max_num_batched_tokens=100)
    with pytest.raises(ValueError, match="max_num_scheduled_tokens=100 "):
        vllm_config(model, max_num_batched_tokens=1024, max_num_scheduled_tokens=100)


def test_canvases_are_not_cut_like_long_prompts(checkpoint):
    model = checkpoint()
    vllm_config(model, long_prefill_token_threshold=256)
    with pytest.raises(ValueError, match="long_prefill_token_threshold=255"):
        vllm_config(model, long_prefill_token_threshold=255)


def test_positions_past_the_rope_table(checkpoint):
    config = vllm_config(checkpoint(), max_model_len=2048)
    assert config.model_config.hf_config.max_position_embeddings == 2048 + 512
    assert config.model_config.max_model_len == 2048
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="max_model_len"):
        vllm_config(checkpoint(rope_parameters=rope), max_model_len=2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, r"pipeline_parallel_size=2 \(only the.*: allowed is 1\)"),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            r"decode_context_parallel_size=2 \(allowed is 1\)",
        ),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size=2"),
        ({"enable_dbo": True}, "enable_dbo=True"),
        ({"ubatch_size": 2}, r"ubatch_size=2 \(allowed is 0\)"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative_config='ngram'",
        ),
        (
            {"kv_cache_dtype": "int8_per_token_head"},
            r"kv_cache_dtype='int8_per_token_head' \(allowed are 'auto', 'float32', 'fp8', 'fp8_",
        ),
        (
            {"kv_cache_dtype": "bfloat16"},
            r"kv_cache_dtype='bfloat16' \(allowed are 'auto', 'float3",
        ),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            r"kv_cache_dtype_skip_layers=\['0'\]",
        ),
        ({"kv_offloading_size": 1.0}, r"kv_offloading_size=1.0 \(KV is saved by.*leave it out"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill=True"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            r"kv_transfer_config='ExampleConnector' \(KV is saved by",
        ),
        ({"attention_backend": "TRITON_ATTN"}, "attention_backend='TRITON_ATTN'"),
        ({"runner": "pooling"}, r"runner='pooling' \(allowed: generate\)"),
        ({"convert": "embed"}, "runner='pooling'"),
        ({"scheduler_cls": "a.B"}, "scheduler_cls='a.B'"),
        ({"worker_extension_cls": "a.B"}, "worker_extension_cls='a.B'"),
        ({"logits_processors": ["a:B"]}, "logits_processors=.*a:B"),
        ({"use_fp64_gumbel": True}, "use_fp64_gumbel=True"),
        ({"enable_sleep_mode": True}, "enable_sleep_mode=True"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "weight_transfer_config='nccl'"),
        (
            {"diffusion_config": {"canvas_length": 256, "max_denoising_steps": 4}},
            "max_denoising_steps=4",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_engine_options_that_cannot_work(checkpoint, monkeypatch, options, message):
    # vLLM refuses sleep mode itself on a CPU
    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
    with pytest.raises(ValueError, match=message):
        vllm_config(checkpoint(), dtype="float32", **options)
    documented = (DOCS / "serving.md").read_text()
    assert [name for name in options if f"`{name}`" not in documented] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_a_gpu_wants_16_bits(monkeypatch, dtype):
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype), lora_config=None)
    (without,) = engine_options._lora_options(config)
    config.lora_config = object()
    (with_lora,) = engine_options._lora_options(config)
    assert without.works and with_lora.works == (dtype == torch.bfloat16)
    assert str(with_lora).endswith("(with LoRA on a GPU allowed are float16 and bfloat16)")


def test_the_same_type_for_the_kv_cache(checkpoint):
    vllm_config(checkpoint(), dtype="bfloat16", kv_cache_dtype="bfloat16")


def test_all_problems_at_once(checkpoint):
    with pytest.raises(ValueError, match="ubatch_size=2.*use_fp64_gumbel=True"):
        vllm_config(checkpoint(), ubatch_size=2, use_fp64_gumbel=True)


def test_model_runner_v1_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="Model Runner V2"):
        vllm_config(checkpoint())


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0", "0.3.2", "1.32.0", "dev"])
def test_unsupported_vllm(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(RuntimeError, match=f"vLLM 0.32 or 0.33, found {re.escape(version)}\\."):
        plugin.check_vllm_version()


def test_no_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError, match="found none"):
        plugin.check_vllm_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.33.0+cu130"])
def test_supported_vllm(monkeypatch, version):
    """What is imported counts: a distribution of another version may lie beside it."""
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(metadata, "version", lambda name: "0.31.0")
    assert plugin.check_vllm_version() == version


def test_the_extra_installs_what_is_supported():
    (required,) = (
        Requirement(text)
        for text in metadata.requires("vllm-refusion")
        if text.startswith("vllm") and 'extra == "gpu"' in text
    )
    minors = [f"0.{minor}" for minor in range(100) if f"0.{minor}.9" in required.specifier]
    assert tuple(minors) == plugin.SUPPORTED_VLLM
