"""What a ReFusion model changes in vLLM's configuration."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_refusion.backbones import ARCHITECTURES
from vllm_refusion.decoding.params import ParameterError
from vllm_refusion.engine.adapter_option import adapter_of, shape_of
from vllm_refusion.engine.options import refuse_unsupported_options
from vllm_refusion.engine.settings import (
    ADAPTER_OPTION,
    PLAY_OPTION,
    canvas_length,
    fuses_passes,
    has_adapter,
    play_options,
    position_slack,
    resolve_defaults,
    tracing_enabled,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.refusion")

DEFAULT_CANVAS = 256
CAPTURE_SIZES = (
    *(1, 2, 4),
    *range(8, 64, 8),
    *range(64, 256, 16),
    *range(256, 512, 32),
    *range(512, 1024, 64),
    *range(1024, 2048 + 1, 128),
)
MAX_REQUESTS = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tekken.json")
# Sampling defaults of a generation config that parallel mode cannot honour.
SERIAL_DEFAULTS = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def route(config: Any, overrides: Any) -> None:
    """Names our architectures in the configuration of a model with a mask token, or an adapter.

    Args:
        overrides: ``--hf-overrides``, which may give or take the mask token and name the class.

    Raises:
        ValueError: the model is none of ours, and something beside its config asked for ReFusion.
    """
    if _overridden(config, overrides, ADAPTER_OPTION) is not None:
        # one past the vocabulary: no row of the embedding, none of the logits
        config.mask_token_id = config.get_text_config().vocab_size
        asked = "{} has a mask adapter"
    elif _overridden(config, overrides, "mask_token_id") is None:
        return
    else:
        own = getattr(config, "mask_token_id", None) is not None
        chosen = isinstance(overrides, dict) and "architectures" in overrides
        asked = "" if own or chosen else "hf_overrides give {} a mask_token_id"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    routed = [ARCHITECTURES.get(name, name) for name in names if name]
    if asked and not set(routed) & set(ARCHITECTURES.values()):
        raise ValueError(
            f"{asked.format(', '.join(routed) or config.model_type)}, but ReFusion models are "
            f"built on {', '.join(ARCHITECTURES)}."
        )
    config.architectures = routed


def _overridden(config: Any, overrides: Any, name: str) -> Any:
    if callable(overrides):
        return getattr(overrides(copy.deepcopy(config)), name, None)
    return overrides.get(name, getattr(config, name, None))


class ReFusionConfig:
    """Per-architecture configuration hook (an entry of vLLM's ``MODELS_CONFIG_MAP``)."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Checks the checkpoint and sets sampling defaults that ReFusion can honour.

        A model with a mask adapter keeps its base's temperature: so do its answers.

        Raises:
            ValueError: the checkpoint has no usable mask token, or no tokenizer.
        """
        check_tokenizer(model_config)
        config = model_config.hf_text_config
        mask = getattr(config, "mask_token_id", None)
        adapted = has_adapter(model_config)
        valid = isinstance(mask, int) and not isinstance(mask, bool)
        if not adapted and not (valid and 0 <= mask < config.vocab_size):
            raise ValueError(
                f"config.json of {model_config.model} has mask_token_id={mask!r}, but a ReFusion "
                f"model needs the id of its mask token, in [0, {config.vocab_size})."
            )
        defaults = model_config.get_diff_sampling_param()
        overrides = model_config.override_generation_config
        serial = resolve_defaults(model_config).mode == "serial"
        for name in SERIAL_DEFAULTS:
            if name in defaults and name not in overrides and not serial:
                overrides[name] = None
                logger.info("Ignoring %s of the generation config: of serial mode only.", name)
        if "temperature" not in defaults and not adapted:
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
        replicas = vllm_config.parallel_config.data_parallel_size
        if play_options(vllm_config.additional_config) is not None and replicas > 1:
            raise ValueError(
                f"data_parallel_size={replicas} beside {PLAY_OPTION}: allowed is 1, as one engine "
                "is shown."
            )
        model_config = vllm_config.model_config
        defaults = resolve_defaults(model_config)
        config = model_config.hf_text_config
        config.refusion_defaults = vars(defaults).copy()
        adapter = adapter_of(model_config)
        if adapter is not None:
            config.refusion_adapter_shape = shape_of(adapter)
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
        limit = max(1, min(MAX_REQUESTS, budget // defaults.least_rows))
        if scheduler.max_num_seqs > limit:
            logger.info(
                "max_num_seqs %d -> %d: %s=%d holds that many canvases of %d rows.",
                scheduler.max_num_seqs, limit, budget_name, budget, defaults.least_rows,
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
        room = min(model_config.max_model_len - 1, scheduler.max_num_batched_tokens)
        if min(model_config.get_vocab_size(), room) <= canvas:
            # vLLM warms its kernels up with prompts of the token ids 0 .. canvas, and some tokens
            # more, whatever the vocabulary, a request's pages and the rows of a step
            vllm_config.kernel_config.enable_jit_warmup = False
        vllm_config.parallel_config.worker_extension_cls = (
            "vllm_refusion.engine.worker.WorkerExtension"
        )

        # RoPE tables must reach the end of the last slot.
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
