"""In bfloat16 an answer may leave the float32 reference, but only where a decision was close."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from vllm import LLM

from engine import model_state_of
from vllm_refusion.decoding.reference import Decoded
from vllm_refusion.decoding.state import Field


def assert_near_tie(llm: LLM, checkpoint: Path, prompt: Sequence[int], answer: Decoded) -> None:
    """The request that ran last, alone, left ``answer`` by a decision within bfloat16's error.

    The decision is one of the first round whose commits differ. In the reference it must have been
    closer than twice the error that plain PyTorch makes in bfloat16 on the same tokens.
    """
    state = model_state_of(llm).decode_state
    (req,) = model_state_of(llm)._req_of.values()
    order = state.order[req, : state.ints[req, Field.COMMITTED]].tolist()
    tokens = dict(enumerate(state.response[req].tolist()))
    common = 0  # committed tokens that agree
    for ours, theirs in zip(order, answer.commit_order, strict=False):
        if ours != theirs or tokens[ours] != answer.committed[theirs]:
            break
        common += 1
    decisive = [r for r in answer.rounds if r.committed <= common][-1]
    logit_error, probability_error = bfloat16_error(checkpoint, prompt, answer.tokens)
    assert (
        decisive.threshold_margin <= 2 * probability_error
        or decisive.argmax_margin <= 2 * logit_error
    ), f"{decisive} is no near tie: errors {probability_error=:.3g} {logit_error=:.3g}"


def assert_near_stock(
    tokens: Sequence[int],
    stock: Sequence[int],
    logprobs: Sequence[dict[int, float]],
    error: float,
    label: str,
) -> None:
    """Where an answer leaves stock vLLM's, its pick is less likely by ``error`` at most.

    Args: logprobs: of stock's answer, by token.
    """
    for ours, theirs, scores in zip(tokens, stock, logprobs):
        if ours != theirs:
            gap = scores[theirs] - scores.get(ours, float("-inf"))
            assert gap < error, f"{label}: {gap}"
            return
    assert len(tokens) == len(stock), label


def bfloat16_error(
    checkpoint: Path, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[float, float]:
    """Largest error of logits and of probabilities, over the prompt and the answer's tokens."""
    tokens = torch.tensor([[*prompt, *answer]])
    with torch.inference_mode():
        exact, rounded = (
            AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)(tokens).logits.float()
            for dtype in (torch.float32, torch.bfloat16)
        )
    errors = (exact - rounded).abs(), (exact.softmax(-1) - rounded.softmax(-1)).abs()
    return float(errors[0].max()), float(errors[1].max())
