"""What the engine's configuration says about decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_refusion.decoding.params import DecodingParams, ParameterError, expand_preset

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# in vLLM's additional_config
TRACE_OPTION = "refusion_trace"
PLAY_OPTION = "refusion_play"
SCHEDULE_OPTION = "refusion_schedule"
ADAPTER_OPTION = "refusion_adapter"  # an attribute of the model's configuration, too
# how a model with a mask adapter is decoded
ADAPTED = {"mode": "serial", "slot_start": "next"}
# Set in the processes of `vllm-refusion bench`: marks an engine that the benchmark started.
BENCHMARK_ENV = "REFUSION_BENCHMARK"


def resolve_defaults(model_config: ModelConfig) -> DecodingParams:
    """Decoding parameters of requests that do not set them.

    From ``--override-generation-config``, else the checkpoint's generation config, else the
    defaults of ``DecodingParams``; a preset in one of them stands for its four values there. With a
    mask adapter tokens are decoded as its base does, whatever mode the base's file speaks of. Reads
    files: done once, at start.

    Raises:
        ParameterError: one of them is out of range, or does not go with a mask adapter.
    """
    values: dict[str, Any] = {}
    if model_config.generation_config != "vllm":
        values.update(expand_preset(model_config.try_get_generation_config()))
    if has_adapter(model_config):
        values.update(ADAPTED)
    values.update(expand_preset(model_config.override_generation_config))
    defaults = DecodingParams().updated(values)
    if has_adapter(model_config):
        refuse_beside_adapter(defaults)
    return defaults


def has_adapter(model_config: ModelConfig) -> bool:
    """Whether a mask adapter acts on the model: a stock backbone, decoded serially."""
    return hasattr(model_config.hf_text_config, ADAPTER_OPTION)


def refuse_beside_adapter(params: DecodingParams) -> None:
    """Raises ParameterError for what only a model with a mask token of its own can do."""
    for name, value in ADAPTED.items():
        if getattr(params, name) != value:
            raise ParameterError(
                name,
                getattr(params, name),
                f"the model is served with a mask adapter, beside which allowed is {value!r}",
            )


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
    return value or play_options(vllm_config.additional_config) is not None


@dataclass(frozen=True)
class PlayOptions:
    """What ``refusion_play`` says of the live page.

    Attributes:
        stock_url: of another server of the OpenAI API, whose model answers beside this one.
    """

    stock_url: str | None = None


def play_options(additional_config: Any) -> PlayOptions | None:
    """What the server was asked to offer as a live page; None for no page.

    Raises:
        ValueError: ``refusion_play`` is no boolean and no object with a ``stock_url``.
    """
    options = additional_config if isinstance(additional_config, dict) else {}
    value = options.get(PLAY_OPTION, False)
    if isinstance(value, bool):
        return PlayOptions() if value else None
    url = value.get("stock_url") if isinstance(value, dict) and len(value) == 1 else None
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise ValueError(
            f"additional_config has {PLAY_OPTION}={value!r}: allowed is a boolean, or an object "
            'with a "stock_url" that begins with http:// or https://.'
        )
    return PlayOptions(url.rstrip("/"))


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


def serial_rows(vllm_config: VllmConfig) -> int:
    """Rows that every running request in serial mode gets in each step at least."""
    scheduler = vllm_config.scheduler_config
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    return max(2, min(canvas_length(vllm_config), budget // scheduler.max_num_seqs))


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
