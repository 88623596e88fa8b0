"""vLLM's engine options that ReFusion cannot honour: refused at start, never dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NOT_SET = "allowed is to leave it out"
KV_LEAVES = "KV is saved by what the host schedules, but the device decides what a step computes"
LAST_STAGE = "only the last stage knows what the next canvas holds"


@dataclass(frozen=True)
class _Option:
    name: str
    value: Any
    works: bool
    allowed: str

    def __str__(self) -> str:
        return f"{self.name}={self.value!r} ({self.allowed})"


def refuse_unsupported_options(vllm_config: VllmConfig) -> None:
    """Checks what the user asked for, before this package changes any of it.

    Raises:
        ValueError: an option cannot work; names each with its value and what is allowed.
    """
    options = [
        *_parallel_options(vllm_config),
        *_cache_options(vllm_config),
        *_model_options(vllm_config),
        *_lora_options(vllm_config),
        *_step_options(vllm_config),
    ]
    problems = [str(option) for option in options if not option.works]
    if problems:
        raise ValueError(f"ReFusion does not work with: {', '.join(problems)}.")
    if not vllm_config.use_v2_model_runner:
        raise ValueError(
            "ReFusion needs vLLM's Model Runner V2, which this setup does not use: unset "
            "VLLM_USE_V2_MODEL_RUNNER=0 and TRITON_BACKENDS_IN_TREE=1, and install triton."
        )


def _unset(name: str, value: Any, shown: Any = None, reason: str = "") -> _Option:
    """An option that must keep its default, which is false."""
    return _Option(name, shown or value, not value, f"{reason}: {NOT_SET}" if reason else NOT_SET)


def _parallel_options(vllm_config: VllmConfig) -> list[_Option]:
    parallel = vllm_config.parallel_config
    alone = [
        _Option(name, getattr(parallel, name), getattr(parallel, name) == 1, "allowed is 1")
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size")
    ]
    stages = parallel.pipeline_parallel_size
    return [
        _Option("pipeline_parallel_size", stages, stages == 1, f"{LAST_STAGE}: allowed is 1"),
        *alone,
        _unset("enable_dbo", parallel.enable_dbo),
        _Option("ubatch_size", parallel.ubatch_size, parallel.ubatch_size <= 1, "allowed is 0"),
        _unset("enable_batch_sharded_sampling", parallel.enable_batch_sharded_sampling),
        _unset("worker_extension_cls", parallel.worker_extension_cls),
    ]


def _cache_options(vllm_config: VllmConfig) -> list[_Option]:
    cache = vllm_config.cache_config
    transfer = vllm_config.kv_transfer_config
    return [
        *_kv_types(vllm_config),
        _unset("sliding_window", cache.sliding_window),
        _unset("kv_sharing_fast_prefill", cache.kv_sharing_fast_prefill),
        _unset(
            "kv_transfer_config",
            transfer is not None,
            transfer and transfer.kv_connector,
            KV_LEAVES,
        ),
        _unset("kv_offloading_size", cache.kv_offloading_size, reason=KV_LEAVES),
    ]


def _kv_types(vllm_config: VllmConfig) -> list[_Option]:
    from vllm.platforms import current_platform

    from vllm_refusion.engine.attention import FP8_KV_DTYPES

    cache = vllm_config.cache_config
    same = str(vllm_config.model_config.dtype).removeprefix("torch.")
    fp8 = cache.cache_dtype in FP8_KV_DTYPES
    old = current_platform.is_cuda_alike() and not current_platform.has_device_capability(89)
    names = () if old else FP8_KV_DTYPES
    types = ", ".join(f"{name!r}" for name in ("auto", same, *names))
    without = ", and on GPUs of compute capability 8.9 or more FP8" if old else ""
    skipped = cache.kv_cache_dtype_skip_layers
    return [
        # a checkpoint with quantised weights may ask for it too
        _Option(
            "kv_cache_dtype",
            cache.cache_dtype,
            cache.cache_dtype in ("auto", same, *names),
            f"allowed are {types}{without}",
        ),
        # pages of two sizes
        _unset("kv_cache_dtype_skip_layers", fp8 and bool(skipped), skipped),
    ]


def _lora_options(vllm_config: VllmConfig) -> list[_Option]:
    """vLLM's kernels for GPUs only assert it, once the engine has loaded."""
    import torch
    from vllm.platforms import current_platform

    dtype = vllm_config.model_config.dtype
    works = (
        vllm_config.lora_config is None
        or not current_platform.is_cuda_alike()
        or dtype in (torch.float16, torch.bfloat16)
    )
    shown = str(dtype).removeprefix("torch.")
    return [_Option("dtype", shown, works, "with LoRA on a GPU allowed are float16 and bfloat16")]


def _model_options(vllm_config: VllmConfig) -> list[_Option]:
    model = vllm_config.model_config
    backend = vllm_config.attention_config.backend
    backend = backend and backend.name
    transfer = vllm_config.weight_transfer_config
    return [
        _Option("runner", model.runner_type, model.runner_type == "generate", "allowed: generate"),
        _Option(
            "attention_backend",
            backend,
            backend in (None, "CUSTOM"),
            "canvases have an attention kernel of their own: allowed is to leave it out",
        ),
        _unset("enable_prompt_embeds", model.enable_prompt_embeds),
        # the state of requests on the device would have to be saved and restored
        _unset("enable_sleep_mode", model.enable_sleep_mode),
        # sends weights in parts; load_weights takes a part for a broken checkpoint
        _unset("weight_transfer_config", transfer is not None, transfer and transfer.backend),
    ]


def _step_options(vllm_config: VllmConfig) -> list[_Option]:
    model, diffusion = vllm_config.model_config, vllm_config.diffusion_config
    speculative = vllm_config.speculative_config
    return [
        _unset("speculative_config", speculative is not None, speculative and speculative.method),
        _unset("scheduler_cls", vllm_config.scheduler_config.scheduler_cls),
        _unset("logits_processors", model.logits_processors),
        _unset("use_fp64_gumbel", model.use_fp64_gumbel),
        _unset("return_sampling_mask", model.return_sampling_mask),
        _unset("enable_trace_replay", model.enable_trace_replay),
        _unset("watermark_config", vllm_config.watermark_config),
        _unset("max_denoising_steps", diffusion and diffusion.max_denoising_steps),
    ]
