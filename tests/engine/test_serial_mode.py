"""Serial decoding in the engine: the tokens of the reference, under every disturbance."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from test_engine_sampling import LIMITS, check, generate
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt

import conformance
from engine import (
    NARROW,
    assert_idle,
    drive,
    engine,
    free_pages,
    model_state_of,
    run,
    sampling_params,
)
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
        proposing = [c for c in conformance.cases(MODEL) if c.params.infill == "propose"]
        parallel = rng.sample(proposing, count)
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
def test_limits_logprobs_and_several_samples(checkpoint, slot_start):
    requests = checkpoint(slot_start)
    cases = [
        replace(
            case,
            **{"temperature": 0.0} | LIMITS[i % len(LIMITS)],
            logprobs=(None, 0, 3)[i % 3],
            max_tokens=min(case.max_tokens, 24),
            min_tokens=min(case.min_tokens, 8),
        )
        for i, case in enumerate(requests.cases)
    ]
    sampled = replace(cases[0], temperature=1.0, logprobs=None, seed=1000)
    children = [replace(sampled, seed=1000 + index) for index in range(3)]
    answers = conformance.expected(requests.path, [*cases, *children])
    with engine(requests.path, **requests.options()) as llm:
        check(generate(llm, cases), cases, answers[: len(cases)])
        parameters = sampling_params(sampled)
        parameters.n = len(children)
        prompt = TokensPrompt(prompt_token_ids=list(sampled.prompt_ids))
        (output,) = llm.generate([prompt], parameters, use_tqdm=False)
    check(sorted(output.outputs, key=lambda o: o.index), children, answers[len(cases) :])


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


DRAWS = 20_000


@pytest.mark.slow
def test_samples_have_the_distribution_of_token_by_token_decoding(checkpoint):
    """First tokens and pairs of many seeds, against what transformers computes."""
    requests = checkpoint("next")
    prompt = [7, 20, 3, 5]
    model = AutoModelForCausalLM.from_pretrained(requests.path, dtype=torch.float32).eval()
    mask = model.config.mask_token_id

    def chances(texts: list[list[int]]) -> torch.Tensor:
        logits = model(torch.tensor(texts)).logits[:, -1].double()
        logits[:, mask] = -torch.inf
        return logits.softmax(-1)

    with torch.no_grad():
        first = chances([prompt])[0]
        pairs = first[:, None] * chances([[*prompt, token] for token in range(len(first))])

    parameters = [
        SamplingParams(
            temperature=1.0,
            max_tokens=2,
            ignore_eos=True,
            seed=seed,
            detokenize=False,
            extra_args={"mode": "serial"},
        )
        for seed in range(DRAWS)
    ]
    prompts = [TokensPrompt(prompt_token_ids=prompt)] * DRAWS
    with engine(requests.path, **requests.options(max_num_seqs=64)) as llm:
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
    counted = torch.zeros_like(pairs)
    for output in outputs:
        counted[tuple(output.outputs[0].token_ids)] += 1
    assert chi_square(counted.sum(1), DRAWS * first) > 1e-3
    assert chi_square(counted.flatten(), DRAWS * pairs.flatten()) > 1e-3


def chi_square(counted: torch.Tensor, wanted: torch.Tensor) -> float:
    """The chance of a deviation like this; cells where fewer than 5 are expected are one."""
    rare = wanted < 5
    observed = torch.cat([counted[~rare], counted[rare].sum()[None]])
    expected = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    used = expected > 0
    deviation = ((observed[used] - expected[used]) ** 2 / expected[used]).sum()
    degrees = torch.tensor((int(used.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, deviation / 2))
