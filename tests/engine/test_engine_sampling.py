"""Limits on what is picked and log-probabilities, in the engine: the reference decoder's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from vllm import TokensPrompt

from conformance import expected
from engine import assert_idle, engine, free_pages, model_state_of, sampling_params
from vllm_refusion.decoding.speculation import Speculation
from vllm_refusion.engine.metrics import snapshot
from vllm_refusion.engine.row_budget import RowBudget
from vllm_refusion.triton_kernels.dispatch import CPU_KERNELS_ENV

LIMITS = [
    {"top_k": 3, "temperature": 1.0},
    {"top_p": 0.6, "temperature": 1.0},
    {"min_p": 0.2, "temperature": 1.3},
    {"top_k": 10, "top_p": 0.8, "min_p": 0.05, "temperature": 0.8},
    {"logit_bias": ((5, 4.0), (17, -100.0))},
    {"logit_bias": ((5, 2.0),), "temperature": 1.0, "top_p": 0.9},
    {"allowed_token_ids": (3, 5, 8, 13, 21, 34, 55, 89)},
    {"allowed_token_ids": (3, 5, 8, 13, 21, 34, 55, 89), "temperature": 1.2, "top_k": 3},
]


@pytest.fixture(scope="module")
def limited(checkpoints):
    """A third of the conformance cases, each with limits and some with logprobs; the answers."""
    checkpoint = checkpoints()
    picked = random.Random(1).sample(checkpoint.cases, 24)
    requests = [
        replace(
            case, **{"temperature": 0.0} | LIMITS[i % len(LIMITS)], logprobs=(None, 0, 3)[i % 3]
        )
        for i, case in enumerate(picked)
    ]
    return checkpoint, requests, expected(checkpoint.path, requests)


def generate(llm, requests):
    return [
        output.outputs[0]
        for output in llm.generate(
            [TokensPrompt(prompt_token_ids=list(case.prompt_ids)) for case in requests],
            [sampling_params(case) for case in requests],
            use_tqdm=False,
        )
    ]


def check(outputs, requests, answers):
    for output, case, answer in zip(outputs, requests, answers, strict=True):
        assert list(output.token_ids) == answer.tokens, case
        if case.logprobs is None:
            assert output.logprobs is None
            continue
        assert len(output.logprobs) == len(answer.logprobs)
        for got, wanted in zip(output.logprobs, answer.logprobs, strict=True):
            assert set(got) == set(wanted), case
            for token, logprob in wanted.items():
                assert got[token].logprob == pytest.approx(logprob, abs=1e-3)
        for token, got in zip(output.token_ids, output.logprobs, strict=True):
            better = [entry for entry in got.values() if entry.logprob > got[token].logprob]
            assert got[token].rank == 1 + len(better) or len(better) == case.logprobs


def test_limits_and_logprobs_beside_plain_requests(limited):
    checkpoint, requests, answers = limited
    plain = checkpoint.mixed[:6]
    # at temperature 0 the cuts change nothing
    cut = [replace(checkpoint.cases[i], top_k=2, top_p=0.1, min_p=0.5) for i in plain]
    greedy = [i for i, case in enumerate(cut) if case.temperature == 0]
    assert len(greedy) > 1
    with engine(checkpoint.path) as llm:
        pages = free_pages(llm)
        beside = [checkpoint.cases[i] for i in plain] + [cut[i] for i in greedy]
        outputs = generate(llm, beside + requests)
        assert_idle(llm, pages)
        model_state = model_state_of(llm)
        assert model_state.limits.used is None
        assert not model_state.records and not model_state._suspended_records
        tokens = [list(output.token_ids) for output in outputs[: len(beside)]]
        checkpoint.check(tokens, plain + [plain[i] for i in greedy])
        check(outputs[len(beside) :], requests, answers)


def test_logprobs_are_those_of_the_plain_schedule(checkpoints, monkeypatch):
    """Whichever pass a row was fed in; what riders a step takes is drawn anew for each."""
    checkpoint = checkpoints()
    draw = random.Random(2)
    chosen = checkpoint.mixed[::2]
    requests = [replace(checkpoint.cases[i], logprobs=draw.choice((0, 2, 5))) for i in chosen]

    def speculate(self, decoding):
        return Speculation(draw.choice((0, 64, 256)), draw.choice((0, 4, 1000)))

    def logprobs(**options):
        with engine(checkpoint.path, **options) as llm:
            outputs, counts = generate(llm, requests), snapshot(llm)
        checkpoint.check([list(output.token_ids) for output in outputs], chosen)
        return [
            [{t: e.logprob for t, e in entries.items()} for entries in output.logprobs]
            for output in outputs
        ], counts

    plain, counts = logprobs(additional_config={"refusion_schedule": "plain"})
    assert counts["rider_rows_fed"] == 0
    monkeypatch.setattr(RowBudget, "_speculate", speculate)
    fused, counts = logprobs()
    assert counts["plans_ridden"] > 10 and counts["predicts_ridden"] > 10
    for ours, theirs in zip(fused, plain, strict=True):
        assert len(ours) == len(theirs)
        for entries, expected_entries in zip(ours, theirs, strict=True):
            # the rounding of logits, which passes of other widths compute in another order
            assert entries == pytest.approx(expected_entries, rel=0, abs=1e-4)


@pytest.mark.slow
def test_preempted(limited, preemptions):
    """With few KV pages: what is known of a request leaves with it and comes back."""
    checkpoint, requests, answers = limited
    short = [i for i, c in enumerate(requests) if len(c.prompt_ids) + c.max_tokens <= 160]
    options = {"max_model_len": 160, "num_gpu_blocks_override": 28, "block_size": 16}
    options["diffusion_config"] = {"canvas_length": 128}  # one sequence must fit those pages
    with engine(checkpoint.path, **options) as llm:
        outputs = generate(llm, [requests[i] for i in short] * 2)[: len(short)]
        assert not model_state_of(llm)._suspended_records
    check(outputs, [requests[i] for i in short], [answers[i] for i in short])
    assert sum(emitted > 0 for _, emitted in preemptions) >= 2


@pytest.mark.slow
def test_kernels_in_the_interpreter(limited, monkeypatch):
    monkeypatch.setenv(CPU_KERNELS_ENV, "interpreter")
    checkpoint, requests, answers = limited
    with engine(checkpoint.path) as llm:
        check(generate(llm, requests[:12]), requests[:12], answers[:12])
