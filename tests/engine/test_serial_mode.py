"""Serial decoding in the engine: the tokens of the reference, under every disturbance."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from vllm import SamplingParams, TokensPrompt

import conformance
from engine import NARROW, assert_idle, drive, engine, free_pages, model_state_of, run
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.state import Counter, Field

MODEL = "qwen3-gqa2"
STARTS = ("mask", "next")
NEXT_SLOWLY = ("mask", pytest.param("next", marks=pytest.mark.slow))


class Serial:
    """A conformance model's requests in serial mode, with the reference's answers."""

    def __init__(self, path, slot_start: str, count: int) -> None:
        self.path, self.slot_start = path, slot_start
        rng = random.Random(f"serial {slot_start}")
        parallel = rng.sample(conformance.cases(MODEL), count)
        self.cases = [replace(case, params=serial(case.params, slot_start)) for case in parallel]
        # of 100 tokens at most: the reference takes a pass for each
        self.cases = [replace(case, max_tokens=min(case.max_tokens, 60)) for case in self.cases]
        self.answers = conformance.expected(path, self.cases)

    def options(self, **more):
        generation = {"slot_start": self.slot_start, "slot_size": 8, "block_length": 32}
        return NARROW | {"override_generation_config": generation} | more

    def check(self, outputs) -> None:
        for case, output, answer in zip(self.cases, outputs, self.answers, strict=True):
            assert output == list(answer.tokens), case.label


def serial(params: DecodingParams, slot_start: str) -> DecodingParams:
    size = params.slot_size
    return DecodingParams(size, size, mode="serial", slot_start=slot_start)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = conformance.build_model(MODEL, tmp_path_factory.mktemp(MODEL))

    @cache
    def of(slot_start: str) -> Serial:
        return Serial(path, slot_start, 16)

    return of


@pytest.mark.parametrize("slot_start", STARTS)
def test_tokens_of_the_reference(checkpoint, slot_start):
    requests = checkpoint(slot_start)
    with engine(requests.path, **requests.options()) as llm:
        pages = free_pages(llm)
        requests.check(run(llm, requests.cases))
        counts = model_state_of(llm).decode_state.counters.tolist()
        assert_idle(llm, pages)
    tokens = sum(len(answer.tokens) for answer in requests.answers)
    assert 0 < counts[Counter.SERIAL] < tokens  # passes: drafts were accepted


@pytest.mark.parametrize("slot_start", NEXT_SLOWLY)
def test_beside_parallel_requests_with_small_chunks(checkpoint, slot_start, async_scheduling):
    requests = checkpoint(slot_start)
    parallel = [case for case in conformance.cases(MODEL) if case.params.block_length <= 32][::6]
    expected = conformance.expected(requests.path, parallel)
    options = requests.options(max_num_batched_tokens=96, max_num_seqs=3)
    with engine(requests.path, **options) as llm:
        outputs = run(llm, [*requests.cases, *parallel])
    requests.check(outputs[: len(requests.cases)])
    assert outputs[len(requests.cases) :] == [list(answer.tokens) for answer in expected]


def test_preempted(checkpoint, preemptions):
    """Memory for two requests at most: tokens are computed again, in position order."""
    requests = checkpoint("mask")
    options = requests.options(num_gpu_blocks_override=40, block_size=16, max_model_len=384)
    chosen = [i for i, case in enumerate(requests.cases) if len(case.prompt_ids) < 200]

    with engine(requests.path, **options) as llm:
        pages = free_pages(llm)
        outputs = drive(llm, requests, chosen, lambda *_: None)
        assert_idle(llm, pages)
    assert preemptions
    for i in chosen:
        assert outputs[i] == list(requests.answers[i].tokens), requests.cases[i].label


@pytest.mark.parametrize("slot_start", NEXT_SLOWLY)
def test_whatever_is_drafted(checkpoint, slot_start):
    """Drafts at random before every step."""
    requests = checkpoint(slot_start)
    generator = torch.Generator().manual_seed(1)

    def lie(step, llm_engine):
        state = model_state_of(llm).decode_state
        tests = state.ints[:, Field.TESTS].clamp(min=0, max=state.canvas_length - 1)
        lane = torch.arange(state.canvas_length)
        wrong = (torch.rand(state.token.shape, generator=generator) < 0.5) & (
            lane < tests.cpu()[:, None]
        )
        drafts = torch.randint(0, 100, state.token.shape, generator=generator, dtype=torch.int32)
        wrong, drafts = wrong.to(state.device), drafts.to(state.device)
        state.token.copy_(torch.where(wrong, drafts, state.token))
        behind = torch.where(wrong, drafts, state.canvas_token.roll(-1, 1).int())
        state.canvas_token[:, 1:] = behind[:, :-1].long()

    with engine(requests.path, **requests.options()) as llm:
        outputs = drive(llm, requests, range(len(requests.cases)), lie)
    requests.check([outputs[i] for i in range(len(requests.cases))])


def test_a_response_enters_the_prefix_cache(checkpoint):
    """A second turn finds the first one's prompt and answer, and its tokens are right."""
    requests = checkpoint("mask")
    case = max(requests.cases, key=lambda case: min(len(case.prompt_ids), 300))
    case = replace(case, prompt_ids=case.prompt_ids[:300])
    case = replace(case, ignore_eos=True, stop_token_ids=())
    (answer,) = conformance.expected(requests.path, [case])
    turn = (*case.prompt_ids, *answer.tokens, 5, 6, 7)
    second = replace(case, prompt_ids=turn, max_tokens=30)
    (expected,) = conformance.expected(requests.path, [second])
    with engine(requests.path, **requests.options(block_size=16)) as llm:
        assert run(llm, [case]) == [list(answer.tokens)]
        parameters = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
        (output,) = llm.generate(TokensPrompt(prompt_token_ids=list(turn)), parameters)
        known = len(case.prompt_ids) + len(answer.tokens) - 1
        assert output.num_cached_tokens == known // 16 * 16
        assert run(llm, [second]) == [list(expected.tokens)]


@pytest.mark.slow
def test_without_masks_in_what_is_picked_it_is_stock_decoding(checkpoint, tmp_path):
    """100 greedy prompts: the same weights on stock vLLM, without a mask token in their config."""
    requests = checkpoint("next")
    stock = tmp_path / "stock"
    shutil.copytree(requests.path, stock)
    config = json.loads((stock / "config.json").read_text())
    mask = config.pop("mask_token_id")
    (stock / "config.json").write_text(json.dumps(config))
    rng = random.Random(0)
    words = [token for token in range(conformance.MODELS[MODEL].vocab_size) if token != mask]
    prompts = [
        TokensPrompt(prompt_token_ids=rng.choices(words, k=rng.randint(1, 90))) for _ in range(100)
    ]

    def tokens_of(llm, **extra):
        # stock decoding would pick the mask token, which is one like others to it
        parameters = SamplingParams(
            temperature=0, max_tokens=40, logit_bias={mask: -100.0}, detokenize=False, **extra
        )
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    with engine(stock) as llm:
        expected = tokens_of(llm)
    with engine(requests.path, **requests.options()) as llm:
        assert tokens_of(llm, extra_args={"mode": "serial"}) == expected
