"""Quantised weights on a GPU: the engine decodes about as before, with the same canvases."""

from __future__ import annotations

import pytest
import torch
from device import ON_GPU
from vllm import SamplingParams

from engine import engine
from vllm_refusion.engine.metrics import snapshot

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def weight_dtypes(worker):
    return {str(weight.dtype) for weight in worker.model_runner.model.parameters()}


@pytest.fixture(scope="module")
def answer(tiny_checkpoint, questions):
    """Texts, tokens per forward and the types of the weights, by ``quantization``."""
    chats = [[{"role": "user", "content": question}] for question in questions[:24]]
    greedy = SamplingParams(
        temperature=0, max_tokens=200, extra_args={"slot_size": 8, "block_length": 32}
    )
    settings = {"dtype": "bfloat16", "skip_tokenizer_init": False}

    def run(quantization):
        with engine(tiny_checkpoint, quantization=quantization, **settings) as llm:
            before = snapshot(llm)
            outputs = llm.chat(chats, greedy, use_tqdm=False)
            after = snapshot(llm)
            dtypes = llm.collective_rpc(weight_dtypes)[0]
        done = {name: after[name] - before[name] for name in ("output_tokens", "forward_passes")}
        texts = [output.outputs[0].text for output in outputs]
        return texts, done["output_tokens"] / done["forward_passes"], dtypes

    return run


@pytest.mark.parametrize("quantization", ["fp8"])
def test_weights_quantised_at_start(answer, quantization):
    texts, tokens_per_forward, dtypes = answer(quantization)
    plain_texts, plain_tokens_per_forward, plain_dtypes = answer(None)
    assert str(torch.float8_e4m3fn) in dtypes - plain_dtypes
    assert plain_tokens_per_forward / 2 < tokens_per_forward < plain_tokens_per_forward * 2
    # rounded weights change some answers, not most of their beginnings
    same = [text[:20] == plain[:20] for text, plain in zip(texts, plain_texts)]
    assert sum(same) > len(same) / 2
