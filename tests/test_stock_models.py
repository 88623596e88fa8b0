"""Models without a mask token are served by vLLM as if this package were not installed."""

from __future__ import annotations

import json
import random

import pytest
import torch
from server import MODEL_NAME, serve
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt

from conformance import MODELS, build_model
from engine import engine, scheduler_of

NAME = "qwen3-gqa2"
EOS = MODELS[NAME].eos_token_id
VOCAB = MODELS[NAME].vocab_size
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Qwen3 that differs from a ReFusion checkpoint by its missing mask token only."""
    path = build_model(NAME, tmp_path_factory.mktemp(NAME))
    config = json.loads((path / "config.json").read_text())
    del config["mask_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def prompts():
    draw = random.Random(0)
    return [draw.choices(range(VOCAB), k=length) for length in (1, 7, 50, 150)]


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def greedy(model, prompts):
    """Transformers' greedy answer to each prompt, through EOS."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@torch.inference_mode()
def log_probabilities(model, prompt, tokens):
    """[len(tokens), V]: what transformers expects at each place of an answer."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def llm(checkpoint):
    with engine(checkpoint) as llm:
        yield llm


@pytest.fixture
def generate(llm, prompts):
    """The answers to all prompts as (tokens, logprobs)."""

    def run(**options):
        params = SamplingParams(max_tokens=NUM_TOKENS, detokenize=False, **options)
        batch = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = [output.outputs[0] for output in llm.generate(batch, params, use_tqdm=False)]
        return [(list(output.token_ids), output.logprobs) for output in outputs]

    return run


def test_nothing_of_the_engine_is_ours(llm):
    config = llm.llm_engine.vllm_config
    assert config.model_config.architecture == "Qwen3ForCausalLM"
    assert config.diffusion_config is None
    assert not config.parallel_config.worker_extension_cls
    worker = scheduler_of(llm), llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    runner = worker[1].worker.model_runner
    for part in (worker[0], runner.model, runner.model_state, runner.sampler):
        assert type(part).__module__.startswith("vllm."), type(part)


def test_greedy(generate, greedy):
    assert [tokens for tokens, _ in generate(temperature=0)] == greedy


def test_parameters_that_refusion_refuses(generate, greedy):
    """Names and values that ReFusion would refuse are none of our business here."""
    extra_args = {"slot_size": "8", "block_length": 4096, "mine": 1}
    assert [tokens for tokens, _ in generate(temperature=0, extra_args=extra_args)] == greedy
    for tokens, _ in generate(temperature=0, logit_bias={5: 100.0}):
        assert tokens == [5] * NUM_TOKENS


def test_log_probabilities(generate, model, prompts):
    for prompt, (tokens, logprobs) in zip(prompts, generate(temperature=0, logprobs=3)):
        expected = log_probabilities(model, prompt, tokens)
        for row, entries in zip(expected, logprobs, strict=True):
            found = {token: entry.logprob for token, entry in entries.items()}
            assert found == pytest.approx({token: row[token].item() for token in found}, abs=1e-3)
            assert set(row.topk(3).indices.tolist()) <= set(found)


def test_sampling(generate, model, prompts, greedy):
    """Samples are random, repeat with their seed, and lie in the nucleus."""
    top_p = 0.6
    sampling = {"temperature": 1.0, "top_p": top_p}
    samples = generate(**sampling, seed=1)
    assert samples == generate(**sampling, seed=1)
    assert samples != generate(**sampling, seed=2)
    assert [tokens for tokens, _ in samples] != greedy
    for prompt, (tokens, _) in zip(prompts, samples):
        ordered, order = log_probabilities(model, prompt, tokens).exp().sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all that is likelier
        for likelier, ids, token in zip(before, order, tokens):
            assert likelier[ids == token] < top_p + 1e-4


def test_server(checkpoint, tmp_path, prompts, greedy):
    """The same through HTTP, where vLLM also knows the tokenizer's EOS."""
    with serve(checkpoint, tmp_path) as server:
        create = server.client.completions.create
        for prompt, answer in zip(prompts, greedy):
            response = create(
                model=MODEL_NAME,
                prompt=prompt,
                temperature=0,
                max_tokens=NUM_TOKENS,
                extra_body={"return_token_ids": True, "vllm_xargs": {"slot_size": "8"}},
            )
            (choice,) = response.choices
            end = answer.index(EOS) + 1 if EOS in answer else NUM_TOKENS
            assert choice.token_ids == answer[:end]
            assert choice.finish_reason == ("stop" if EOS in answer else "length")
        sampled = create(
            model=MODEL_NAME, prompt=prompts[1], max_tokens=8, temperature=1, top_p=0.5, logprobs=2
        )
        assert len(sampled.choices[0].logprobs.tokens) <= 8
        assert server.terminate() == 0
