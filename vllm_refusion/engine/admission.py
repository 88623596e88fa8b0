"""What a request may ask for, checked when it is admitted (HTTP 400 / ValueError)."""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, Any

from vllm_refusion.decoding.logprobs import MAX_LOGPROBS
from vllm_refusion.decoding.params import ParameterError
from vllm_refusion.decoding.state import MAX_STOP_IDS
from vllm_refusion.engine.settings import (
    TRACE_OPTION,
    canvas_length,
    server_defaults,
    tracing_enabled,
)

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest

# Fields of vLLM's SamplingParams that work, or that cannot change the output: docs/serving.md says
# how. Every other field must have its default.
HONOURED = {
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",  # of one token each
    "logprobs",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "extra_args",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "output_kind",
    "stream_interval",
    "skip_clone",
    "skip_reading_prefix_cache",
    "repetition_detection",
    "flat_logprobs",
    "output_text_buffer_length",
    "_watermarking_skipped",
    "_eos_token_id",
    "_all_stop_token_ids",
    "_bad_words_token_ids",
}
INT64_MAX = 2**63 - 1


def admit(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    """Checks a request for a ReFusion model and fills in what the engine needs.

    ``max_tokens`` is cut to what fits max_model_len; a sampled request without a seed gets one, so
    that every worker draws the same noise.

    Raises:
        VLLMValidationError: names the parameter, its value and what is allowed.
    """
    from vllm.exceptions import VLLMValidationError

    params = request.sampling_params
    try:
        if params is None:
            raise ParameterError("pooling_params", "...", "ReFusion only generates text")
        if request.resumable:
            raise ParameterError("resumable", True, "ReFusion does not take streamed input")
        _resolve_eos(params, vllm_config)  # EOS counts among the stop tokens checked next
        _check_sampling_params(params)
        _check_picks(params, vllm_config)
        _check_prompt(request.prompt_token_ids, vllm_config)
        decoding = server_defaults(vllm_config.model_config).updated(params.extra_args)
        decoding.check_canvas(canvas_length(vllm_config))
        _check_trace((params.extra_args or {}).get("trace", False), vllm_config)
    except ParameterError as error:
        raise VLLMValidationError(
            str(error), parameter=error.parameter, value=error.value
        ) from error
    room = vllm_config.model_config.max_model_len - len(request.prompt_token_ids)
    params.max_tokens = min(params.max_tokens or room, room)
    if params.temperature > 0 and params.seed is None:
        params.seed = secrets.randbits(62)


def ending_token_ids(params: SamplingParams) -> set[int]:
    """Tokens that end the request, hence are held back before ``min_tokens``.

    Not vLLM's ``all_stop_token_ids``: that one holds EOS even where ``ignore_eos`` makes it an
    ordinary token.
    """
    eos = params.eos_token_id
    return set(params.stop_token_ids or ()) | ({eos} if eos is not None else set())


def _check_sampling_params(params: SamplingParams) -> None:
    defaults = type(params)()
    if params.watermarking is False:  # no watermark; vLLM resolves None to False
        params.watermarking = None
    for name in params.__struct_fields__:
        if name in HONOURED:
            continue
        value, allowed = getattr(params, name), getattr(defaults, name)
        if type(value) is not type(allowed) or value != allowed:
            raise ParameterError(name, value, f"ReFusion allows only {allowed!r}")
    if params.seed is not None and not -INT64_MAX <= params.seed <= INT64_MAX:
        raise ParameterError("seed", params.seed, "allowed is a 64-bit integer")
    if params.min_tokens and len(ending_token_ids(params)) > MAX_STOP_IDS:
        raise ParameterError(
            "stop_token_ids",
            len(ending_token_ids(params)),
            f"with min_tokens allowed are at most {MAX_STOP_IDS} stop tokens, EOS included",
        )


def banned_token_ids(params: SamplingParams) -> list[int]:
    """Tokens that ``bad_words`` forbids; words of several tokens are not admitted."""
    return [token_ids[0] for token_ids in params.bad_words_token_ids or ()]


def _check_picks(params: SamplingParams, vllm_config: VllmConfig) -> None:
    """Checks what limits the tokens that may be picked."""
    vocab_size = vllm_config.model_config.get_vocab_size()
    if params.top_k >= vocab_size:
        params.top_k = 0
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise ParameterError("logprobs", params.logprobs, f"allowed is 0 to {MAX_LOGPROBS}")
    for token, bias in (params.logit_bias or {}).items():
        if not math.isfinite(bias):
            raise ParameterError("logit_bias", {token: bias}, "allowed are finite numbers")
    if params.bad_words and params.bad_words_token_ids is None:
        raise ParameterError("bad_words", params.bad_words, "it needs a tokenizer: none is allowed")
    if any(len(token_ids) > 1 for token_ids in params.bad_words_token_ids or ()):
        raise ParameterError(
            "bad_words", params.bad_words, "allowed are words of a single token of the model"
        )
    forbidden = {vllm_config.model_config.hf_text_config.mask_token_id, *banned_token_ids(params)}
    if params.min_tokens:
        forbidden |= ending_token_ids(params)
    allowed = params.allowed_token_ids
    if forbidden.issuperset(allowed) if allowed else len(forbidden) >= vocab_size:
        raise ParameterError(
            "allowed_token_ids",
            allowed,
            "no token would be left to pick; allowed are sets with one that neither bad_words nor "
            "min_tokens nor the model (its mask token) forbids",
        )


def _check_prompt(token_ids: list[int] | None, vllm_config: VllmConfig) -> None:
    if token_ids is None:
        raise ParameterError("prompt_embeds", "...", "ReFusion takes tokens or text")
    config = vllm_config.model_config.hf_text_config
    vocab_size = vllm_config.model_config.get_vocab_size()
    outside = next((t for t in token_ids if not 0 <= t < vocab_size), None)
    if outside is not None:
        raise ParameterError("prompt", outside, f"allowed are token ids in [0, {vocab_size})")
    if config.mask_token_id in token_ids:
        raise ParameterError(
            "prompt",
            config.mask_token_id,
            "the prompt contains the mask token, which only decoding uses",
        )


def _check_trace(value: Any, vllm_config: VllmConfig) -> None:
    if value not in (True, False):
        raise ParameterError("trace", value, "allowed are true and false")
    if value and not tracing_enabled(vllm_config):
        raise ParameterError(
            "trace",
            value,
            "the engine does not record traces; start it with "
            f"--additional-config '{{\"{TRACE_OPTION}\": true}}'",
        )


def _resolve_eos(params: SamplingParams, vllm_config: VllmConfig) -> None:
    """Without a tokenizer vLLM knows no EOS; decoding needs the model's."""
    if params.eos_token_id is not None or params.ignore_eos:
        return
    eos = getattr(vllm_config.model_config.hf_text_config, "eos_token_id", None)
    if isinstance(eos, int):
        params.update_from_generation_config({}, eos)
        if params.stop_token_ids and eos in params.stop_token_ids:
            params.stop_token_ids.remove(eos)
