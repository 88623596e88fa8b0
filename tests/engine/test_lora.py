"""LoRA on the backbone: each request's rows get its adapter, wherever the device puts them."""

from __future__ import annotations

import random

import pytest
import torch
from device import ON_GPU
from lora_requests import MODEL, OPTIONS, Adapted, Mixed, ask, in_float32
from mask_adapters import write_adapter
from near_ties import assert_near_stock
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

import conformance
from engine import NARROW, STOCK_GRAPHS, assert_idle, engine, free_pages, sampling_params

MASK = conformance.MODELS[MODEL].mask_token_id
NEAR_TIE = 0.05  # between log-probabilities in bfloat16


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def questions():
    """Prompts, their parameters under stock vLLM, and numbers of adapters."""
    rng = random.Random(0)
    words = [token for token in range(conformance.MODELS[MODEL].vocab_size) if token != MASK]
    shared = rng.choices(words, k=48)  # of three pages: the prefix cache has them by adapter
    numbers = [rng.choice((0, 1, 2, 2, 3)) for _ in range(24)]
    prompts = [
        (shared if i % 3 == 0 else []) + rng.choices(words, k=rng.randint(1, 60)) for i in range(24)
    ]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=rng.randint(8, 40),
            logprobs=20 if ON_GPU else (None, 2)[i % 2],
            logit_bias={MASK: -100.0},
            ignore_eos=i % 4 == 0,
        )
        for i in range(24)
    ]
    return prompts, params, numbers


@pytest.fixture(scope="module")
def of_stock(adapted, questions):
    """Stock vLLM's answers, of which most are not those without adapters."""
    prompts, params, numbers = questions
    with engine(adapted.stock, max_loras=4, **OPTIONS, **STOCK_GRAPHS) as llm:
        answers = ask(llm, adapted, prompts, params, numbers)
        plain = ask(llm, adapted, prompts, params, [0] * len(prompts))
    changed = [a[0] != b[0] for a, b, number in zip(answers, plain, numbers) if number]
    assert sum(changed) > len(changed) / 2
    return answers


def assert_same(answers, expected, numbers):
    for i, ((tokens, logprobs, _), (stock, stock_logprobs, _)) in enumerate(
        zip(answers, expected, strict=True)
    ):
        if ON_GPU:
            label = f"request {i}, adapter {numbers[i]}"
            assert_near_stock(tokens, stock, stock_logprobs, NEAR_TIE, label)
            continue
        assert tokens == stock, f"request {i}, adapter {numbers[i]}"
        for entry, stock_entry in zip(logprobs, stock_logprobs, strict=True):
            assert entry == pytest.approx(stock_entry, abs=1e-3), f"request {i}"


def test_answers_of_stock_vllm(adapted, questions, of_stock, async_scheduling):
    """Adapters and none, mixed in steps of which the device deals the rows out."""
    prompts, params, numbers = questions
    generation = {"mode": "serial", "slot_start": "next", "slot_size": 8, "block_length": 32}
    options = OPTIONS | NARROW | {"override_generation_config": generation}
    with engine(adapted.base, max_loras=3, max_num_batched_tokens=256, **options) as llm:
        pages = free_pages(llm)
        answers = ask(llm, adapted, prompts, params, numbers)
        again = ask(llm, adapted, prompts, params, numbers[::-1])  # other adapters, same prompts
        assert_idle(llm, pages)
    assert_same(answers, of_stock, numbers)
    for i, number in enumerate(numbers):
        if number == numbers[::-1][i] and not ON_GPU:
            assert again[i][0] == answers[i][0], f"request {i}"


def test_beside_a_mask_adapter(adapted, questions, of_stock, tmp_path):
    """It acts on rows of masks, which the adapter of their request acts on too."""
    prompts, params, numbers = questions
    folder = write_adapter(tmp_path / "masks", adapted.stock)
    options = OPTIONS | {"additional_config": {"refusion_adapter": str(folder)}}
    with engine(adapted.stock, max_loras=3, **options) as llm:
        assert_same(ask(llm, adapted, prompts, params, numbers), of_stock, numbers)


@in_float32
def test_answers_of_merged_weights_in_both_modes(adapted):
    """With fewer places for adapters than there are; masks are fed through the adapter as well."""
    mixed = Mixed.of(adapted)
    with engine(adapted.base, max_loras=2, max_cpu_loras=2, **OPTIONS, **NARROW) as llm:
        prompts = [c.prompt_ids for c in mixed.cases]
        params = [sampling_params(c) for c in mixed.cases]
        for one in params[::3]:
            one.prompt_logprobs = 0
        answers = ask(llm, adapted, prompts, params, mixed.numbers)
    mixed.check([tokens for tokens, _, _ in answers])
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in adapted.merged]
    for i, (_, _, scores) in enumerate(answers):
        if scores is not None and len(prompts[i]) > 1:
            found = [row[token].logprob for row, token in zip(scores[1:], prompts[i][1:])]
            ids = torch.tensor([prompts[i]])
            with torch.inference_mode():
                rows = models[mixed.numbers[i]](ids).logits[0, :-1].float().log_softmax(-1)
            wanted = rows.gather(1, ids[0, 1:, None]).flatten()
            assert found == pytest.approx(wanted.tolist(), abs=1e-3), mixed.cases[i].label


@in_float32
@pytest.mark.slow
def test_preempted(adapted, async_scheduling, preemptions):
    """Computed again, or replayed in commit order, through the request's own adapter."""
    mixed = Mixed.of(adapted, longest=160)
    small = {"max_model_len": 160, "num_gpu_blocks_override": 28, "block_size": 16}
    with engine(adapted.base, max_loras=2, **OPTIONS, **NARROW, **small) as llm:
        pages = free_pages(llm)
        mixed.run(llm, adapted)
        assert_idle(llm, pages)
    # vLLM's names begin with the number of the request
    emitted = {int(name.split("-")[0]) for name, tokens in preemptions if tokens}
    modes = {mixed.cases[i].params.mode for i in emitted if mixed.numbers[i]}
    assert modes == {"parallel", "serial"}
