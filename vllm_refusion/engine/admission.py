"""What a request may ask for, checked when it is admitted (HTTP 400 / ValueError)."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from vllm_refusion.decoding.logprobs import ScoreKind
from vllm_refusion.decoding.params import ParameterError
from vllm_refusion.decoding.penalties import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from vllm_refusion.decoding.state import MAX_STOP_IDS
from vllm_refusion.engine.request import RequestSpec
from vllm_refusion.engine.settings import (
    TRACE_OPTION,
    canvas_length,
    has_adapter,
    refuse_beside_adapter,
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
    "bad_words",  # in parallel mode of one token each
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "thinking_token_budget",
    "logprobs",
    "logprob_token_ids",
    "prompt_logprobs",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
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
    "structured_outputs",  # in serial mode
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
# Fields that act on a token by what stands before it: serial mode only.
BY_WHAT_STANDS_BEFORE = (
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "thinking_token_budget",
)
REPETITION_PENALTIES = (1e-6, 1e6)  # so that float32 holds a logit after it
MAX_BIAS = 1e30  # float32 holds it, with logits added and divided by the lowest temperature


def admit(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    """Checks a request for a ReFusion model and fills in what the engine needs.

    ``max_tokens`` and ``min_tokens`` are cut to what fits max_model_len; a sampled request without
    a seed gets one, so that every worker draws the same noise.

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
        _check_integers(request)
        _resolve_eos(params, vllm_config)
        _check_sampling_params(params)
        _check_prompt(request.prompt_token_ids, vllm_config)
        model = vllm_config.model_config
        spec = RequestSpec.of(
            params, len(request.prompt_token_ids), server_defaults(model), model.max_model_len
        )
        if has_adapter(model):
            refuse_beside_adapter(spec.decoding)
        spec.decoding.check_canvas(canvas_length(vllm_config))
        _check_mode(spec, params)
        _check_stops(spec)
        _check_picks(spec, params, vllm_config)
        _check_trace(spec, vllm_config)
    except ParameterError as error:
        raise VLLMValidationError(
            str(error), parameter=error.parameter, value=error.value
        ) from error
    # vLLM's scheduler ends the request by them
    params.max_tokens, params.min_tokens = spec.max_tokens, spec.min_tokens
    if params.temperature > 0 and params.seed is None:
        params.seed = secrets.randbits(62)


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
    last = INT64_MAX - (params.n - 1)  # vLLM gives the i-th of n answers seed + i
    if params.seed is not None and not -INT64_MAX <= params.seed <= last:
        raise ParameterError("seed", params.seed, f"allowed is an integer in [-2**63 + 1, {last}]")


def _check_mode(spec: RequestSpec, params: SamplingParams) -> None:
    """Checks what needs all tokens before one to be known when that one is picked."""
    if spec.constrained and not spec.serial:
        raise ParameterError(
            "structured_outputs",
            params.structured_outputs,
            "mode='parallel' drafts slots before the text that a grammar goes by is known; "
            "allowed is None, or mode='serial'",
        )


def _check_stops(spec: RequestSpec) -> None:
    if len(spec.held_back) > MAX_STOP_IDS:
        raise ParameterError(
            "stop_token_ids",
            len(spec.held_back),
            f"with min_tokens allowed are at most {MAX_STOP_IDS} stop tokens, EOS included",
        )


def _check_integers(value: Any, name: str = "") -> None:
    """Whatever a request holds travels to the engine as integers of 64 bits at most.

    Raises:
        ParameterError: one is larger; names the field of the request or its parameters.
    """
    if isinstance(value, int):
        if not -INT64_MAX - 1 <= value <= INT64_MAX:
            raise ParameterError(name, value, "allowed is a 64-bit integer")
    elif isinstance(value, dict):
        for key, one in value.items():
            _check_integers(key, name)
            _check_integers(one, key if isinstance(key, str) else name)
    elif isinstance(value, list | tuple | set):
        for one in value:
            _check_integers(one, name)
    elif names := getattr(value, "__struct_fields__", getattr(value, "__dataclass_fields__", ())):
        for field in names:
            if field != "prompt_token_ids":  # checked with the prompt
                _check_integers(getattr(value, field), field)


def _check_picks(spec: RequestSpec, params: SamplingParams, vllm_config: VllmConfig) -> None:
    """Checks what limits the tokens that may be picked."""
    vocab_size = vllm_config.model_config.get_vocab_size()
    if params.top_k >= vocab_size:
        params.top_k = 0
    mode = vllm_config.model_config.logprobs_mode
    if spec.logprobs is not None and not spec.serial and ScoreKind.of(mode).processed:
        name = "logprobs" if params.logprobs is not None else "logprob_token_ids"
        allowed = f"beside logprobs_mode={mode} allowed is None, or mode='serial'"
        raise ParameterError(name, getattr(params, name), allowed)
    for token, bias in spec.logit_bias.items():
        if not abs(bias) <= MAX_BIAS:
            allowed = f"allowed are numbers in [{-MAX_BIAS:g}, {MAX_BIAS:g}]"
            raise ParameterError("logit_bias", {token: bias}, allowed)
    if params.bad_words and params.bad_words_token_ids is None:
        raise ParameterError("bad_words", params.bad_words, "it needs a tokenizer: none is allowed")
    _check_penalties(spec, params)
    mask = vllm_config.model_config.hf_text_config.mask_token_id
    forbidden = {mask, *spec.banned_token_ids, *spec.held_back} - {vocab_size}
    allowed = spec.allowed_token_ids
    if forbidden.issuperset(allowed) if allowed else len(forbidden) >= vocab_size:
        raise ParameterError(
            "allowed_token_ids",
            allowed,
            "no token would be left to pick; allowed are sets with one that neither bad_words nor "
            "min_tokens nor the model (its mask token) forbids",
        )


def _check_penalties(spec: RequestSpec, params: SamplingParams) -> None:
    """Checks what acts on a token by what stands before it."""
    defaults = type(params)()
    for name in BY_WHAT_STANDS_BEFORE:
        value, default = getattr(params, name), getattr(defaults, name)
        if value != default and not spec.serial:
            raise ParameterError(name, value, f"allowed is {default!r}, or mode='serial'")
    if spec.thinking_token_budget is not None and spec.decoding.slot_start != "next":
        allowed = "allowed is None where a slot's first token is picked in the row of a mask"
        raise ParameterError("thinking_token_budget", spec.thinking_token_budget, allowed)
    low, high = REPETITION_PENALTIES
    if not low <= spec.repetition_penalty <= high:
        allowed = f"allowed are numbers in [{low:g}, {high:g}]"
        raise ParameterError("repetition_penalty", spec.repetition_penalty, allowed)
    if spec.bad_words and not spec.serial:
        allowed = "allowed are words of a single token of the model, or mode='serial'"
        raise ParameterError("bad_words", params.bad_words, allowed)
    tokens = sum(map(len, spec.bad_words))
    if len(spec.bad_words) > MAX_BAD_WORDS or tokens > MAX_BAD_WORD_TOKENS:
        allowed = (
            f"they come to {len(spec.bad_words)} sequences of {tokens} tokens; allowed are "
            f"{MAX_BAD_WORDS} of {MAX_BAD_WORD_TOKENS} in all, beside words of a single token"
        )
        raise ParameterError("bad_words", params.bad_words, allowed)


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


def _check_trace(spec: RequestSpec, vllm_config: VllmConfig) -> None:
    if spec.trace and not tracing_enabled(vllm_config):
        raise ParameterError(
            "trace",
            True,
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
