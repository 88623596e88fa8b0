"""Serial mode keeps stock vLLM's contract; so does what is said of a prompt, in both modes."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace

import pytest
from test_engine_sampling import check, generate
from test_serial_mode import MODEL, NEXT_SLOWLY, Serial
from vllm import SamplingParams, TokensPrompt
from vllm.config.reasoning import ReasoningConfig
from vllm.exceptions import VLLMValidationError

import conformance
from engine import assert_idle, drive, engine, free_pages, scheduler_of
from vllm_refusion.triton_kernels.dispatch import CPU_KERNELS_ENV

PENALTIES = [
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.8, "presence_penalty": -0.5},
    {"presence_penalty": 2.0, "temperature": 1.0, "top_p": 0.9},
    {"repetition_penalty": 0.7, "frequency_penalty": 1.1, "logit_bias": ((5, 4.0), (17, -100.0))},
    {"repetition_penalty": 1.5, "allowed_token_ids": tuple(range(3, 110, 7)), "temperature": 0.8},
    {"frequency_penalty": -0.3, "min_tokens": 8},
]


class Penalised(Serial):
    """Serial requests with penalties and with bad words from their own answers."""

    def __init__(self, path, slot_start: str, count: int = 18) -> None:
        super().__init__(path, slot_start, count)
        rng = random.Random(slot_start)
        for i, (case, answer) in enumerate(zip(self.cases, self.answers)):
            starts = [rng.randrange(max(1, len(answer.tokens) - 3)) for _ in range(i % 4)]
            words = [answer.tokens[start : start + rng.choice((2, 2, 3))] for start in starts]
            self.cases[i] = replace(
                case,
                **PENALTIES[i % len(PENALTIES)] if i % 3 else {},
                bad_words=tuple(tuple(word) for word in words if len(word) > 1),
                logprobs=(None, 0, 3)[i // 2 % 3],
            )
        plain, self.answers = self.answers, conformance.expected(path, self.cases)
        changed = [a.tokens != b.tokens for a, b in zip(plain, self.answers)]
        assert sum(changed) > count // 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return conformance.build_model(MODEL, tmp_path_factory.mktemp(MODEL))


@pytest.mark.parametrize("slot_start", ("mask", "next"))
def test_penalties_and_bad_words(path, slot_start):
    requests = Penalised(path, slot_start)
    parallel = [case for case in conformance.cases(MODEL) if case.params.block_length <= 32][::9]
    beside = conformance.expected(path, parallel)
    with engine(path, **requests.options()) as llm:
        pages = free_pages(llm)
        outputs = generate(llm, [*requests.cases, *parallel])
        assert_idle(llm, pages)
        check(outputs, [*requests.cases, *parallel], [*requests.answers, *beside])


def test_preempted(path, preemptions):
    """What was said before is known again, at another index of the engine's tables, too."""
    requests = Penalised(path, "mask")
    options = requests.options(num_gpu_blocks_override=40, block_size=16, max_model_len=384)
    chosen = [i for i, case in enumerate(requests.cases) if len(case.prompt_ids) < 200]
    with engine(path, **options) as llm:
        outputs = drive(llm, requests, chosen, lambda *_: None)
    assert sum(emitted > 0 for _, emitted in preemptions) >= 2
    for i in chosen:
        assert outputs[i] == list(requests.answers[i].tokens), requests.cases[i].label


@pytest.mark.slow
@pytest.mark.parametrize("slot_start", NEXT_SLOWLY)
def test_kernels_in_the_interpreter(path, slot_start, monkeypatch):
    monkeypatch.setenv(CPU_KERNELS_ENV, "interpreter")
    requests = Penalised(path, slot_start, 8)
    with engine(path, **requests.options()) as llm:
        check(generate(llm, requests.cases), requests.cases, requests.answers)


@pytest.fixture(scope="module")
def stock(path, tmp_path_factory):
    """The same weights without a mask token in their config: stock vLLM serves them."""
    copied = tmp_path_factory.mktemp("stock") / MODEL
    shutil.copytree(path, copied)
    config = json.loads((copied / "config.json").read_text())
    del config["mask_token_id"]
    (copied / "config.json").write_text(json.dumps(config))
    return copied


MASK = conformance.MODELS[MODEL].mask_token_id
WORDS = [token for token in range(conformance.MODELS[MODEL].vocab_size) if token != MASK]
SERIAL = {"mode": "serial"}


def prompts(count: int) -> list[TokensPrompt]:
    rng = random.Random(count)
    lengths = [rng.randint(1, 90) for _ in range(count)]
    return [TokensPrompt(prompt_token_ids=rng.choices(WORDS, k=length)) for length in lengths]


def next_options(**more):
    """Of an engine that decodes token by token as stock vLLM does."""
    generation = {"slot_start": "next", "slot_size": 8, "block_length": 32}
    return {"override_generation_config": generation} | more


def stock_limits(count: int) -> list[dict]:
    """Parameters of as many requests, all penalties among them; bad words of common tokens."""
    rng = random.Random(f"limits {count}")
    made = []
    for i in range(count):
        limits = {
            "repetition_penalty": rng.choice((1.0, 1.2, 0.8)),
            "frequency_penalty": rng.choice((0.0, 0.7, -0.4)),
            "presence_penalty": rng.choice((0.0, 1.5)),
            "min_tokens": rng.choice((0, 20)),
            # stock decoding would pick the mask token, which is one like others to it
            "logit_bias": {MASK: -100.0} | {rng.choice(WORDS): rng.uniform(-5, 5)},
            "logprobs": rng.choice((None, 0, 4)),
        }
        # min_tokens holds an EOS back that is ignored, too
        limits["ignore_eos"] = i % 4 == 1
        if i % 5 == 4:
            limits |= {"allowed_token_ids": rng.sample(WORDS, 40)}
        made.append(limits)
    return made


def ask_all(llm, asked, limits, **extra):
    parameters = []
    for i, one in enumerate(limits):
        params = SamplingParams(temperature=0, max_tokens=40, detokenize=False, **one, **extra)
        words = random.Random(i)
        params.bad_words = ["..."]
        params._bad_words_token_ids = [words.choices(WORDS, k=1)] + [
            [first, second] for first in words.sample(WORDS, 25) for second in WORDS[::25]
        ]
        parameters.append(params)
    return [output.outputs[0] for output in llm.generate(asked, parameters, use_tqdm=False)]


def scores(logprobs) -> list[dict[int, float]]:
    return [{t: e.logprob for t, e in (entries or {}).items()} for entries in logprobs or ()]


def ranks(logprobs) -> list[dict[int, int]]:
    return [{t: e.rank for t, e in (entries or {}).items()} for entries in logprobs or ()]


def assert_same_logprobs(ours, theirs) -> None:
    assert ranks(ours) == ranks(theirs)
    for got, wanted in zip(scores(ours), scores(theirs)):
        assert got == pytest.approx(wanted, rel=0, abs=1e-4)


def test_limits_of_stock_vllm(path, stock):
    asked, limits = prompts(30), stock_limits(30)
    with engine(stock) as llm:
        expected = ask_all(llm, asked, limits)
    with engine(path, **next_options()) as llm:
        outputs = ask_all(llm, asked, limits, extra_args=SERIAL)
    for got, wanted in zip(outputs, expected, strict=True):
        assert got.token_ids == wanted.token_ids
        assert_same_logprobs(got.logprobs, wanted.logprobs)


def prompt_questions() -> tuple[list[TokensPrompt], list[dict]]:
    """Prompts, some that begin alike, and what is asked of each."""
    rng = random.Random(3)
    common = rng.choices(WORDS, k=64)
    asked, questions = [], []
    for i in range(24):
        length = rng.choice((1, 2, 16, rng.randint(3, 60), rng.randint(90, 240)))
        tokens = (common if i % 3 == 2 else []) + rng.choices(WORDS, k=length)
        question = {"prompt_logprobs": (0, None, 3, 20)[i % 4]}
        if i % 5 == 0 and len(tokens) > 4:
            start = rng.randrange(len(tokens) - 3)
            ids = [rng.sample(WORDS, rng.randint(1, 4)) for _ in range(start, len(tokens) - 1)]
            question |= {"prompt_logprob_token_ids": ids, "prompt_logprob_start": start}
        asked.append(TokensPrompt(prompt_token_ids=tokens))
        questions.append(question)
    return asked, questions


@pytest.mark.parametrize(
    ("chunk", "mode"),
    [
        (2048, "serial"),
        (96, "parallel"),
        pytest.param(2048, "parallel", marks=pytest.mark.slow),
        pytest.param(96, "serial", marks=pytest.mark.slow),
    ],
)
def test_prompt_logprobs_of_stock_vllm(path, stock_prompts, mode, chunk, preemptions):
    """Whatever else is in the batch; with small chunks, also under preemptions."""
    asked, questions, expected = stock_prompts
    params = [
        SamplingParams(
            temperature=0, max_tokens=40, detokenize=False, extra_args={"mode": mode}, **question
        )
        for question in questions
    ]
    small = {"num_gpu_blocks_override": 28, "block_size": 16, "max_model_len": 360}
    options = next_options(max_num_batched_tokens=chunk, diffusion_config={"canvas_length": 16})
    options["override_generation_config"] |= {"slot_size": 4, "block_length": 16}
    with engine(path, **options | (small if chunk < 2048 else {})) as llm:
        pages = free_pages(llm)
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert_idle(llm, pages)
        assert not scheduler_of(llm)._prompt_scores and not scheduler_of(llm)._prompt_token_scores
    assert bool(preemptions) == (chunk < 2048)
    for output, (logprobs, table), question in zip(outputs, expected, questions, strict=True):
        assert (output.prompt_logprobs is None) == (question["prompt_logprobs"] is None)
        assert_same_logprobs(output.prompt_logprobs, logprobs)
        if "prompt_logprob_token_ids" in question:
            wanted = table[question["prompt_logprob_start"] :]
            got = output.prompt_token_id_logprobs
            for row, ids, of_token in zip(
                got, question["prompt_logprob_token_ids"], wanted, strict=True
            ):
                of_ids = row[: len(ids)].tolist()
                assert of_ids == pytest.approx([of_token[t] for t in ids], abs=1e-4)
                assert (row[len(ids) :] == -math.inf).all()


@pytest.fixture(scope="module")
def stock_prompts(stock):
    """What stock vLLM says: the answers, and each prompt's log-probabilities of all tokens."""
    asked, questions = prompt_questions()
    vocab = len(WORDS) + 1
    counts = [question["prompt_logprobs"] for question in questions]
    params = [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=n) for n in counts]
    every = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=vocab)
    with engine(stock, max_logprobs=vocab) as llm:
        answers = llm.generate(asked, params, use_tqdm=False)
        tables = llm.generate(asked, every, use_tqdm=False)
    expected = [
        (answer.prompt_logprobs, scores(table.prompt_logprobs)[1:])
        for answer, table in zip(answers, tables, strict=True)
    ]
    return asked, questions, expected


SCORES = [
    {"logprobs": 4},
    {"logprob_token_ids": [5, 60, 17]},
    {"logprobs": 3, "min_tokens": 20, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
    {"logprobs": -1, "logit_bias": {MASK: -100.0, 9: 3.0}},
    # noise is not stock vLLM's: of these the first token's alternatives are compared
    {"logprobs": 4, "temperature": 0.7, "top_k": 6, "presence_penalty": 1.0, "max_tokens": 1},
    {"logprobs": 2, "temperature": 1.5, "top_p": 0.9, "min_p": 0.01, "max_tokens": 1},
    {"logprob_token_ids": list(range(20)), "temperature": 1.3, "max_tokens": 1},
]
LOGPROBS_MODES = [
    "raw_logprobs",
    pytest.param("raw_logits", marks=pytest.mark.slow),
    "processed_logprobs",
    pytest.param("processed_logits", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("logprobs_mode", LOGPROBS_MODES)
def test_what_is_reported_of_tokens_in_stock_vllm(path, stock, logprobs_mode):
    options = {"logprobs_mode": logprobs_mode, "max_logprobs": -1}
    asked = prompts(2 * len(SCORES))
    common = {"max_tokens": 20, "detokenize": False, "seed": 1}

    def outputs(llm, apart=False, **extra):
        biased = {"logit_bias": {MASK: -100.0}}
        params = [
            SamplingParams(**{"temperature": 0} | common | biased | one, **extra)
            for one in SCORES * 2
        ]
        if apart:
            return [llm.generate(*one, use_tqdm=False)[0].outputs[0] for one in zip(asked, params)]
        return [o.outputs[0] for o in llm.generate(asked, params, use_tqdm=False)]

    with engine(stock, **options) as llm:
        # beside logprob_token_ids vLLM's older runner, its default here, reports token 0 of others
        expected = outputs(llm, apart=True)
    with engine(path, **next_options(**options)) as llm:
        ours = outputs(llm, extra_args=SERIAL)
        parallel = SamplingParams(logprobs=1, max_tokens=2)
        if "processed" in logprobs_mode:
            with pytest.raises(VLLMValidationError, match="logprobs=1 .*mode='serial'"):
                llm.generate(asked[:1], parallel)
        else:
            llm.generate(asked[:1], parallel)
    for got, wanted, one in zip(ours, expected, SCORES * 2, strict=True):
        if one.get("temperature"):
            named = one.get("logprob_token_ids")
            first, theirs = (
                {t: p for t, p in scores(o.logprobs)[0].items() if named is None or t in named}
                for o in (got, wanted)
            )
            drawn = {got.token_ids[0], wanted.token_ids[0]}
            both = first.keys() & theirs.keys()
            assert (first.keys() ^ theirs.keys()) <= drawn and both
            for token in both:
                assert first[token] == pytest.approx(theirs[token], abs=1e-4)
        else:
            assert got.token_ids == wanted.token_ids
            without = [[{**e} for e in o.logprobs] for o in (got, wanted)]
            for entries in without[0] + without[1]:
                entries.pop(MASK, None)  # of its bias there, of none here
            assert_same_logprobs(*without)


@pytest.mark.slow
def test_thinking_budgets_of_stock_vllm(path, stock, preemptions, monkeypatch):
    """Also where it is known again after a preemption; stock vLLM on the same runner."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    reasoning = ReasoningConfig(reasoning_start_str="t5", reasoning_end_str="t7 t9 t8")
    options = {"reasoning_config": reasoning, "skip_tokenizer_init": False}
    asked = [
        TokensPrompt(prompt_token_ids=[*prompt["prompt_token_ids"], *(5, 11, 12)[: i % 4]])
        for i, prompt in enumerate(prompts(16))
    ]

    def tokens(llm, **extra):
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=36,
                ignore_eos=True,
                thinking_token_budget=(0, 1, 5, 20, None)[i % 5],
                repetition_penalty=(1.0, 1.2)[i % 2],
                logit_bias={MASK: -100.0, 5: 2.0, 7: 1.0},
                **extra,
            )
            for i in range(len(asked))
        ]
        outputs = llm.generate(asked, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    with engine(stock, **options) as llm:
        expected = tokens(llm)
    assert sum(str([7, 9, 8])[1:-1] in str(answer) for answer in expected) > 3
    small = {"num_gpu_blocks_override": 20, "block_size": 16, "max_model_len": 160}
    small |= {"diffusion_config": {"canvas_length": 32}}
    with engine(path, **next_options(**options, **small)) as llm:
        assert tokens(llm, extra_args=SERIAL) == expected
    assert preemptions
