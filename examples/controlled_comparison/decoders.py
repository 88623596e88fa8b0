"""Each method's documented decoding, batch 1, with a KV cache where the procedure has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from objectives import START, block_mask, block_numbers, see_both_ways
from transformers import DynamicCache

from vllm_refusion.decoding import reference
from vllm_refusion.decoding.params import DecodingParams


@dataclass(frozen=True)
class Tokens:
    """Ids that have a meaning to decoders."""

    mask: int
    eos: int


@dataclass(frozen=True)
class Outcome:
    """Tokens up to EOS, and forward passes. A pass over the prompt that gives no token (ReFusion,
    BD3-LM) is not counted; autoregressive decoding takes its first token from the prompt's.
    """

    tokens: list[int]
    passes: int


def until_eos(tokens: Sequence[int], eos: int) -> list[int]:
    tokens = list(tokens)
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


class _Context:
    """Feeds tokens behind those kept, every one of them visible."""

    def __init__(self, model: Any, both_ways: bool) -> None:
        see_both_ways(model, both_ways)
        self._model, self._cache, self.length = model, DynamicCache(), 0

    def feed(
        self, ids: Sequence[int], keep: bool, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits float32 [tokens, V]; drops their keys and values unless they are to be kept."""
        device = self._model.device
        positions = torch.arange(self.length, self.length + len(ids), device=device)
        output = self._model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=positions[None],
            attention_mask={"full_attention": mask},
            past_key_values=self._cache,
            use_cache=True,
        )
        if keep:
            self.length += len(ids)
        else:
            self._cache.crop(-len(ids))
        return output.logits[0].float()


@torch.inference_mode()
def autoregressive(model: Any, prompt: Sequence[int], special: Tokens, max_tokens: int) -> Outcome:
    """Greedy, one token a pass."""
    context, fed, tokens = _Context(model, both_ways=False), list(prompt), []
    while len(tokens) < max_tokens and (not tokens or tokens[-1] != special.eos):
        tokens.append(int(context.feed(fed, keep=True)[-1].argmax()))
        fed = tokens[-1:]
    return Outcome(tokens, len(tokens))


@torch.inference_mode()
def llada(
    model: Any,
    prompt: Sequence[int],
    special: Tokens,
    max_tokens: int,
    block_length: int = 32,
    tokens_per_step: int = 1,
    stop: bool = True,
) -> Outcome:
    """Masked diffusion with low-confidence remasking, block after block (arXiv 2502.09992).

    Every pass feeds the prompt and the whole response. Of the masked tokens of the current block
    the most probable ones get their argmax, the others stay masked ("remasked"); a block takes
    block_length / tokens_per_step passes. ``stop`` ends with the block that has EOS, which changes
    no token before it; the authors' sampler goes on to the last block.
    """
    if max_tokens % block_length or block_length % tokens_per_step:
        raise ValueError(f"{max_tokens=} in blocks of {block_length=}, {tokens_per_step=} at once")
    see_both_ways(model)
    start, passes = len(prompt), 0
    ids = torch.tensor([[*prompt, *[special.mask] * max_tokens]], device=model.device)
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    for first in range(start, ids.shape[1], block_length):
        block = ids[0, first : first + block_length]  # a view
        for _ in range(block_length // tokens_per_step):
            logits = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask={"full_attention": None},
                use_cache=False,
            ).logits[0, first : first + block_length]
            passes += 1
            probabilities = logits.float().softmax(-1)
            probabilities[:, special.mask] = 0  # never picked
            confidence, picked = probabilities.max(-1)
            confidence = confidence.masked_fill(block != special.mask, -1)
            chosen = confidence.topk(tokens_per_step).indices
            block[chosen] = picked[chosen]
        if stop and (block == special.eos).any():
            break
    tokens = [token for token in ids[0, start:].tolist() if token != special.mask]
    return Outcome(until_eos(tokens, special.eos), passes)


@torch.inference_mode()
def bd3lm(
    model: Any,
    prompt: Sequence[int],
    special: Tokens,
    max_tokens: int,
    block_length: int = 4,
    nucleus: float = 0.9,
    greedy: bool = False,
    seed: int = 0,
) -> Outcome:
    """Block diffusion with a KV cache of finished blocks (arXiv 2503.09573).

    The first-hitting sampler: every pass feeds the current block and unmasks one of its masked
    tokens, drawn uniformly, with a token drawn from the nucleus. A finished block is fed once more,
    clean, for its keys and values. ``greedy`` instead takes the argmax where it is most probable.
    """
    chance = torch.Generator().manual_seed(seed)
    context, passes, tokens = _Context(model, both_ways=True), 0, []
    numbers = torch.tensor(block_numbers(len(prompt), 0, block_length), device=model.device)[None]
    mask = block_mask(numbers, torch.zeros_like(numbers, dtype=torch.bool))
    context.feed(list(prompt), keep=True, mask=mask)
    while True:
        block = [special.mask] * block_length
        while special.mask in block:
            logits = context.feed(block, keep=False).cpu()
            passes += 1
            logits[:, special.mask] = -torch.inf
            masked = [i for i, token in enumerate(block) if token == special.mask]
            place, token = _unmasked(logits, masked, nucleus, None if greedy else chance)
            block[place] = token
        tokens += block
        if special.eos in block or len(tokens) >= max_tokens:
            return Outcome(until_eos(tokens, special.eos)[:max_tokens], passes)
        context.feed(block, keep=True)
        passes += 1


def _unmasked(
    logits: torch.Tensor, masked: list[int], nucleus: float, chance: torch.Generator | None
) -> tuple[int, int]:
    """Which place of a block is unmasked next, and the token there."""
    probabilities = logits.double().softmax(-1)
    if chance is None:
        place = max(masked, key=lambda i: probabilities[i].max())
        return place, int(probabilities[place].argmax())
    place = masked[int(torch.randint(len(masked), (), generator=chance))]
    return place, int(torch.multinomial(_cut(probabilities[place], nucleus), 1, generator=chance))


def _cut(probabilities: torch.Tensor, nucleus: float) -> torch.Tensor:
    """[..., V] -> the same of the smallest set of tokens that reaches ``nucleus``, 0 elsewhere."""
    ordered, words = probabilities.sort(-1, descending=True)
    kept = ordered * (ordered.cumsum(-1) - ordered < nucleus)
    return torch.zeros_like(kept).scatter(-1, words, kept / kept.sum(-1, keepdim=True))


@torch.inference_mode()
def dream(
    model: Any,
    prompt: Sequence[int],
    special: Tokens,
    max_tokens: int,
    remasking: str = "entropy",
    tokens_per_step: int = 1,
    temperature: float = 0.1,
    nucleus: float = 0.9,
    stop: bool = True,
    seed: int = 0,
) -> Outcome:
    """Masked diffusion in which the token before predicts a mask (arXiv 2508.15487).

    Every pass feeds the prompt and the whole response and is a step from time t to time s, of
    equal ones from 1 to 0.001. A share 1 - s / t of the masks, rounded down, gets tokens drawn from
    the nucleus: those with the least "entropy", the leftmost of equals; those whose token is the
    most probable ("maskgit_plus"); or each with that probability ("origin"). The last step leaves
    no mask. ``temperature`` 0 takes the argmax. ``stop`` ends with the last mask before an EOS,
    which changes no token before it; the authors' sampler takes all steps.
    """
    if remasking not in ("entropy", "maskgit_plus", "origin") or max_tokens % tokens_per_step:
        raise ValueError(f"{remasking=}, {max_tokens=} in steps of {tokens_per_step=}")
    see_both_ways(model)
    chance = torch.Generator(model.device).manual_seed(seed)
    start, passes = len(prompt), 0
    ids = torch.tensor([[*prompt, *[special.mask] * max_tokens]], device=model.device)
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    response = ids[0, start:]  # a view
    times = torch.linspace(1, 1e-3, max_tokens // tokens_per_step + 1).tolist()
    times[-1] = 0
    for t, s in zip(times, times[1:]):
        logits = model(
            input_ids=ids,
            position_ids=positions,
            attention_mask={"full_attention": None},
            use_cache=False,
        ).logits[0, start - 1 : -1]
        passes += 1
        masked = (response == special.mask).nonzero()[:, 0]
        logits = logits[masked].double() / (temperature or 1)
        logits[:, special.mask] = -torch.inf  # never picked
        given = _cut(logits.softmax(-1), nucleus)
        picked = given.argmax(-1)
        if temperature:
            picked = torch.multinomial(given, 1, generator=chance)[:, 0]
        if remasking == "origin":
            uniform = torch.rand(len(masked), generator=chance, device=model.device)
            chosen = uniform < 1 - s / t
        else:
            if remasking == "entropy":
                doubt = torch.special.entr(given).sum(-1)
            else:
                doubt = -given.gather(1, picked[:, None])[:, 0]
            chosen = doubt.argsort(stable=True)[: int(len(masked) * (1 - s / t))]
        response[masked[chosen]] = picked[chosen]
        tokens = until_eos(response.tolist(), special.eos)
        if stop and special.mask not in tokens:
            break
    return Outcome(tokens, passes)


class _Recomputing(reference._Request):
    """Slots infilled side by side are fed once more before they are committed, in one causal run,
    so that their keys and values have seen the slots before them.
    """

    def _commit(self, slots: Any, masked: list[int]) -> None:
        if self.canvas.passes[-1].kind == "infill_verify" and len(slots) > 1:
            self.canvas.feed("recompute", [(slot.start, slot.tokens) for slot in slots])
        super()._commit(slots, masked)


def refusion(
    model: Any,
    prompt: Sequence[int],
    special: Tokens,
    max_tokens: int,
    recompute: bool = False,
    **params: Any,
) -> Outcome:
    """The reference decoder; ``recompute`` gives committed slots the KV of their full context."""
    see_both_ways(model, False)
    request = _Recomputing if recompute else reference._Request
    with mock.patch.object(reference, "_Request", request):
        decoded = reference.decode(
            model,
            prompt,
            DecodingParams(**params),
            mask_token_id=special.mask,
            eos_token_id=special.eos,
            max_tokens=max_tokens,
        )
    return Outcome(decoded.tokens, len(decoded.passes))


DECODERS = {
    "refusion": refusion,
    "refusion_options": refusion,
    "autoregressive": autoregressive,
    "llada": llada,
    "bd3lm": bd3lm,
    "dream": dream,
    START: autoregressive,
}
WHOLE = ("llada", "dream")  # their passes feed the whole response
DRAWING = ("bd3lm", "dream")  # they take a seed
