"""Models without a mask token are served by vLLM as if this package were not installed."""

from __future__ import annotations

import json
import random

import pytest
import torch
from server import MODEL_NAME, serve
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import StructuredOutputsParams

from conformance import MODELS, build_model
from engine import engine, model_runner_of, scheduler_of

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
    """Transformers' greedy answers; one at least ends with EOS and one does not."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=EOS
        )
        answers.append(output[0, len(prompt) :].tolist())
    assert {answer[-1] == EOS for answer in answers} == {True, False}
    return answers


@torch.inference_mode()
def log_probabilities(model, prompt, tokens):
    """[len(tokens), V]: what transformers expects at each place of an answer."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def llm(checkpoint):
    with engine(checkpoint, skip_tokenizer_init=False) as llm:
        yield llm


@pytest.fixture
def generate(llm, prompts):
    """The answers to all prompts, each as (tokens, logprobs)."""

    def run(**options):
        params = SamplingParams(max_tokens=NUM_TOKENS, **options)
        batch = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = [output.outputs[0] for output in llm.generate(batch, params, use_tqdm=False)]
        return [(list(output.token_ids), output.logprobs) for output in outputs]

    return run


def test_nothing_of_the_engine_is_ours(llm):
    config = llm.llm_engine.vllm_config
    assert config.model_config.architecture == "Qwen3ForCausalLM"
    assert config.diffusion_config is None
    assert not config.parallel_config.worker_extension_cls
    runner = model_runner_of(llm)
    parts = [scheduler_of(llm), runner, runner.model, runner.sampler]
    layers = config.compilation_config.static_forward_context.values()
    kinds = [type(part) for part in parts] + [layer.attn_backend for layer in layers]
    assert len(kinds) > len(parts)
    assert not [kind for kind in kinds if not kind.__module__.startswith("vllm.")]


def test_greedy(generate, greedy):
    assert [tokens for tokens, _ in generate(temperature=0)] == greedy


def test_parameters_that_refusion_refuses(generate, greedy):
    extra_args = {"slot_size": "8", "block_length": 4096, "mine": 1}
    assert [tokens for tokens, _ in generate(temperature=0, extra_args=extra_args)] == greedy
    biased = generate(temperature=0, logit_bias={5: 100.0})
    assert [tokens for tokens, _ in biased] == [[5] * NUM_TOKENS] * len(greedy)


def test_log_probabilities(generate, model, prompts):
    for prompt, (tokens, logprobs) in zip(prompts, generate(temperature=0, logprobs=3)):
        expected = log_probabilities(model, prompt, tokens)
        for row, entries in zip(expected, logprobs, strict=True):
            found = {token: entry.logprob for token, entry in entries.items()}
            assert found == pytest.approx({token: row[token].item() for token in found}, abs=1e-3)
            assert set(row.topk(3).indices.tolist()) <= set(found)


def test_structured_outputs(generate, model, prompts):
    """One of two words, the likelier one, then EOS."""
    words = {"t5": 5, "t7": 7}
    choice = StructuredOutputsParams(choice=list(words))
    for prompt, (tokens, _) in zip(prompts, generate(temperature=0, structured_outputs=choice)):
        first = log_probabilities(model, prompt, [EOS])[0]
        assert tokens == [max(words.values(), key=lambda token: first[token]), EOS]


@pytest.mark.parametrize("limits", [{"top_p": 0.6}, {"top_k": 3}], ids=str)
def test_sampling(generate, model, prompts, greedy, limits):
    """Samples are random, repeat with their seed, and lie within the limits."""
    samples = generate(temperature=1.0, seed=1, **limits)
    assert samples == generate(temperature=1.0, seed=1, **limits)
    assert samples != generate(temperature=1.0, seed=2, **limits)
    assert [tokens for tokens, _ in samples] != greedy
    for prompt, (tokens, _) in zip(prompts, samples):
        ordered, order = log_probabilities(model, prompt, tokens).exp().sort(descending=True)
        likelier = ordered.cumsum(-1) - ordered  # probability of all that is ahead in the order
        ranks = [row.tolist().index(token) for row, token in zip(order, tokens)]
        assert max(ranks) < limits.get("top_k", VOCAB)
        heads = [row[rank].item() for row, rank in zip(likelier, ranks)]
        assert max(heads) < limits.get("top_p", 1) + 1e-4


def test_server(checkpoint, tmp_path, prompts, greedy):
    with serve(checkpoint, tmp_path) as server:

        def create(prompt, **options):
            response = server.client.completions.create(
                model=MODEL_NAME,
                prompt=prompt,
                max_tokens=NUM_TOKENS,
                extra_body={"return_token_ids": True, "vllm_xargs": {"slot_size": "8"}},
                **options,
            )
            return response.choices[0]

        for prompt, answer in zip(prompts, greedy):
            choice = create(prompt, temperature=0)
            assert choice.token_ids == answer
            assert choice.finish_reason == ("stop" if answer[-1] == EOS else "length")
        sampled = create(prompts[1], temperature=1, top_p=0.5, logprobs=2)
        assert len(sampled.logprobs.tokens) == len(sampled.token_ids)
        assert server.terminate() == 0
