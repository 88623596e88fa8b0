"""Whatever the scheduler does to requests, their tokens stay those of the reference decoder.

Prompts in pieces, small budgets, preemption, async scheduling, aborts, prefix caching.
"""

from __future__ import annotations

import random

import pytest
from vllm import TokensPrompt

from conformance import Case, expected
from engine import (
    NARROW,
    assert_idle,
    drive,
    engine,
    free_pages,
    run,
    sampling_params,
    scheduler_of,
)
from vllm_refusion.engine.metrics import snapshot
from vllm_refusion.engine.row_budget import RowBudget

# The async variants are left out by default, for time; test_async_scheduling is not.
SCHEDULING = ["sync", pytest.param("async", marks=pytest.mark.slow)]


@pytest.mark.parametrize("scheduling", SCHEDULING)
def test_chunked_prompts(checkpoints, scheduling, request):
    """A small token budget cuts prompts into pieces of odd lengths."""
    if scheduling == "async":
        request.getfixturevalue("async_scheduling")
    checkpoint = checkpoints()
    with engine(checkpoint.path, max_num_batched_tokens=300) as llm:
        checkpoint.run(llm, checkpoint.mixed)


def test_prompts_are_held_back(checkpoints):
    """As vLLM 0.33 does it for any engine, between steps that only decode."""
    checkpoint = checkpoints()
    with engine(checkpoint.path, prefill_schedule_interval=4, max_num_batched_tokens=300) as llm:
        checkpoint.run(llm, checkpoint.mixed[:12])


def test_requests_wait_for_rows(checkpoints, monkeypatch):
    """A step with fewer rows than its phases need: who gets none decides nothing and waits."""

    def choose(self, decoding, scheduled):  # the widest block fits, so that none waits for ever
        return min(scheduled, max(32, scheduled // 3))

    monkeypatch.setattr(RowBudget, "_choose", choose)
    checkpoint = checkpoints()
    chosen = [i for i in checkpoint.mixed if checkpoint.cases[i].params.block_length <= 32]
    with engine(checkpoint.path, **NARROW, max_num_batched_tokens=100) as llm:
        checkpoint.run(llm, chosen)
        assert snapshot(llm)["idle"] > 0


@pytest.mark.parametrize("scheduling", SCHEDULING)
def test_preemption(checkpoints, preemptions, scheduling, request):
    """With few KV pages requests are preempted in mid-output and go on as if nothing happened."""
    if scheduling == "async":
        request.getfixturevalue("async_scheduling")
    checkpoint = checkpoints()
    short = [i for i, c in enumerate(checkpoint.cases) if len(c.prompt_ids) + c.max_tokens <= 160]
    options = {"max_model_len": 160, "num_gpu_blocks_override": 28, "block_size": 16}
    options["diffusion_config"] = {"canvas_length": 128}  # one sequence must fit those pages
    # riders make fewer steps, with too few preemptions among them; the test below has both
    options["additional_config"] = {"refusion_schedule": "plain"}
    with engine(checkpoint.path, **options) as llm:
        pages = free_pages(llm)
        checkpoint.run(llm, short)
        assert_idle(llm, pages)
    assert len(preemptions) >= 10
    assert sum(emitted > 0 for _, emitted in preemptions) >= 5


def test_reset_of_the_prefix_cache_preempts_everything(checkpoints):
    """All running requests are preempted at random steps; output in flight is dropped."""
    checkpoint = checkpoints()
    draw = random.Random(5)
    with engine(checkpoint.path) as llm:
        outputs = drive(llm, checkpoint, checkpoint.mixed, on_step=lambda step, engine: (
            draw.random() < 0.2 and scheduler_of(llm).reset_prefix_cache(True)
        ))  # fmt: skip
        replayed = snapshot(llm)["replay"]
    assert replayed > 0, "no preempted request had committed tokens ahead of a gap"
    checkpoint.check(list(outputs.values()), outputs)


def test_async_scheduling(checkpoints, async_scheduling):
    checkpoint = checkpoints()
    with engine(checkpoint.path) as llm:
        assert type(scheduler_of(llm)).__name__ == "ReFusionAsyncScheduler"
        pages = free_pages(llm)
        at_the_limit = {i for i, c in enumerate(checkpoint.cases) if c.label.startswith("tight")}
        checkpoint.run(llm, sorted({*checkpoint.mixed, *at_the_limit}))
        assert_idle(llm, pages)


def test_aborts(checkpoints):
    """Requests that are aborted at random steps do not touch the others."""
    checkpoint = checkpoints()
    draw = random.Random(3)
    aborted = set()

    def abort(step, engine):
        if draw.random() < 0.3 and len(aborted) < 10:
            victim = draw.choice(checkpoint.mixed)
            aborted.add(victim)
            engine.abort_request([str(victim)])

    with engine(checkpoint.path) as llm:
        pages = free_pages(llm)
        outputs = drive(llm, checkpoint, checkpoint.mixed, abort)
        assert_idle(llm, pages)
    finished = {i: tokens for i, tokens in outputs.items() if i not in aborted}
    assert 0 < len(finished) < len(checkpoint.mixed)
    checkpoint.check(list(finished.values()), finished)


def test_prefix_caching_over_turns(checkpoints, tmp_path):
    """A turn's prompt holds the answer of the turn before it, stored in another order.

    Caching the pages of generated tokens would give wrong answers here.
    """
    checkpoint = checkpoints()
    turns = [c for c in checkpoint.cases if c.ignore_eos and len(c.prompt_ids) + c.max_tokens < 200]
    shared = list(range(1, 60))  # token 40 is EOS; in a prompt it is an ordinary token
    with engine(checkpoint.path, block_size=16) as llm:
        requests = [
            Case(f"turn 1 of {case.label}", (*shared, *case.prompt_ids), case.params, 80, True)
            for case in turns
        ]
        for turn in range(1, 4):
            outputs = run(llm, requests)
            answers = [list(a.tokens) for a in expected(checkpoint.path, requests)]
            assert outputs == answers, f"turn {turn}"
            requests = [
                Case(f"turn {turn + 1}", (*r.prompt_ids, *tokens, 5, 6, 7), r.params, 50, True)
                for r, tokens in zip(requests, outputs, strict=True)
            ]
        hits = llm.generate(
            TokensPrompt(prompt_token_ids=list(requests[0].prompt_ids)),
            sampling_params(requests[0]),
            use_tqdm=False,
        )[0].num_cached_tokens
        previous_prompt = len(requests[0].prompt_ids) - 53
        assert previous_prompt // 16 * 16 == hits, "all prompt pages hit, and no page of an answer"
