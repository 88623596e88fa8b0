"""What a request asks for, resolved in one place for all who serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_refusion.decoding.params import DecodingParams, ParameterError

if TYPE_CHECKING:
    from vllm import SamplingParams


@dataclass(frozen=True)
class RequestSpec:
    """A request, its parameters and the server's defaults in one.

    The front end, the scheduler and the workers each make it of the same ``SamplingParams``: those
    travel between their processes anyway, and vLLM's warm-up requests come to the workers alone.

    Attributes:
        decoding: how it is decoded.
        max_tokens: at most what fits max_model_len.
        eos_token_id: ends the response; None where EOS is a token like others.
        min_tokens: tokens before which nothing that ends the response may be picked; at most
            ``max_tokens``.
        held_back: those ending tokens, ascending; empty without ``min_tokens``.
        temperature, seed: of the noise on logits; temperature 0 for none.
        top_k, top_p, min_p: limits of picks; 0, 1 and 0 for none.
        logit_bias: added to logits by token.
        allowed_token_ids: all that may be picked; None for all.
        banned_token_ids: what ``bad_words`` of one token forbids.
        bad_words: those of several tokens, in serial mode.
        repetition_penalty, frequency_penalty, presence_penalty: in serial mode; 1, 0 and 0 for
            none.
        thinking_token_budget: tokens of thinking before its end is forced; None for no limit.
        logprobs: likely tokens to report with each token, or which ones; None for no
            log-probabilities.
        constrained: whether a grammar limits what is picked (structured outputs).
        trace: whether its passes are recorded.
        drafts: whether masks draft in serial mode; if not, each pass decides one token.
    """

    decoding: DecodingParams
    max_tokens: int
    eos_token_id: int | None
    min_tokens: int
    held_back: tuple[int, ...]
    temperature: float
    seed: int
    top_k: int
    top_p: float
    min_p: float
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int] | None
    banned_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    thinking_token_budget: int | None
    logprobs: int | tuple[int, ...] | None
    constrained: bool
    trace: bool
    drafts: bool

    @classmethod
    def of(
        cls, params: SamplingParams, prompt_len: int, defaults: DecodingParams, max_model_len: int
    ) -> RequestSpec:
        """Resolves ``params`` of a request with a prompt of that many tokens.

        Raises:
            ParameterError: one of ``extra_args`` is unknown or out of range.
        """
        room = max_model_len - prompt_len
        options = params.extra_args or {}
        bad_words = params.bad_words_token_ids or ()
        max_tokens = min(params.max_tokens or room, room)
        decoding = defaults.of_request(options)
        ending = {*(params.stop_token_ids or ()), params.eos_token_id} - {None}
        if decoding.mode == "serial":
            ending |= params.all_stop_token_ids  # with an EOS that is ignored
        drafts = _flag(options, "drafts", True)
        if decoding.mode == "parallel" and not drafts:
            raise ParameterError("drafts", False, "allowed is true beside mode='parallel'")
        return cls(
            decoding=decoding,
            max_tokens=max_tokens,
            eos_token_id=params.eos_token_id,
            min_tokens=min(params.min_tokens, max_tokens),
            held_back=tuple(sorted(ending)) if params.min_tokens else (),
            temperature=params.temperature,
            seed=params.seed or 0,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            logit_bias=params.logit_bias or {},
            allowed_token_ids=params.allowed_token_ids,
            banned_token_ids=tuple(ids[0] for ids in bad_words if len(ids) == 1),
            bad_words=tuple(tuple(ids) for ids in bad_words if len(ids) > 1),
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            thinking_token_budget=params.thinking_token_budget,
            logprobs=tuple(params.logprob_token_ids or ()) or params.logprobs,
            constrained=params.structured_outputs is not None,
            trace=_flag(options, "trace", False),
            drafts=drafts,
        )

    @property
    def budget(self) -> int:
        """Response positions that are decoded: ``max_tokens`` rounded up to whole slots."""
        return self.decoding.budget(self.max_tokens)

    @property
    def first_rows(self) -> int:
        """Rows of the first canvas."""
        return self.decoding.first_rows(self.max_tokens)

    @property
    def penalised(self) -> bool:
        """Whether the tokens before a position act on what is picked there."""
        penalties = self.repetition_penalty, self.frequency_penalty, self.presence_penalty
        thinks = self.thinking_token_budget is not None
        return thinks or bool(self.bad_words) or penalties != (1, 0, 0)

    @property
    def serial(self) -> bool:
        """Whether it is decoded token by token in position order."""
        return self.decoding.mode == "serial"


def _flag(options: Mapping[str, Any], name: str, default: bool) -> bool:
    value = options.get(name, default)
    if value not in (True, False):
        raise ParameterError(name, value, "allowed are true and false")
    return bool(value)
