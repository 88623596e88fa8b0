"""Tokens that are final reach the client before their slot is committed, and never change."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from device import ON_GPU

from conformance import MODELS, Case, expected
from engine import NARROW, drive, engine, scheduler_of
from vllm_refusion.decoding.params import DecodingParams

pytestmark = pytest.mark.skipif(ON_GPU, reason="counts the steps of synchronous scheduling")

PLAIN = {"additional_config": {"refusion_schedule": "plain"}}
SCHEDULES = pytest.mark.parametrize("options", [PLAIN, {}], ids=["plain", "fused"])


def deliveries(llm, checkpoint, i):
    """(step, tokens so far) of every delivery to a case that runs alone; step 1 ends the prompt."""
    seen = []

    def on_output(step, output):
        seen.append((step, list(output.outputs[0].token_ids)))

    drive(llm, checkpoint, [i], lambda step, engine: None, on_output)
    return seen


def passes_to_the_first_commit(answer):
    """Passes of the reference until the first slot in position is committed."""
    order = answer.commit_order.index(0)
    rounds = [r.committed for r in answer.rounds[1:]] + [len(answer.commit_order)]
    number = next(i for i, committed in enumerate(rounds) if committed > order)
    plans = [i for i, step in enumerate(answer.passes) if step.kind == "plan"] + [
        len(answer.passes)
    ]
    return plans[number + 1]


@SCHEDULES
def test_tokens_come_before_their_slot_is_committed(checkpoints, options):
    checkpoint = checkpoints()
    chosen = [
        i
        for i, (case, answer) in enumerate(zip(checkpoint.cases, checkpoint.answers, strict=True))
        if passes_to_the_first_commit(answer) >= 6 and case.params.slot_size > 1
    ][:8]
    assert len(chosen) == 8
    at_once = 0
    with engine(checkpoint.path, **options) as llm:
        for i in chosen:
            params, answer = checkpoint.cases[i].params, checkpoint.answers[i]
            seen = deliveries(llm, checkpoint, i)
            assert seen[-1][1] == list(answer.tokens)
            steps = {len(tokens): step for step, tokens in seen}
            before_commit = [n for n in steps if n % params.slot_size]
            assert before_commit and min(before_commit) < params.slot_size
            if options is PLAIN:
                # the prompt's step comes first; the reference's last pass commits the slot
                assert seen[0][0] < 1 + passes_to_the_first_commit(answer)
            # the first plan, which rides with the prompt where passes are fused
            at_once += seen[0][0] == (2 if options is PLAIN else 1)
    assert at_once >= 3


@pytest.mark.parametrize("scheduling", ["sync", pytest.param("async", marks=pytest.mark.slow)])
def test_what_was_delivered_survives_preemption(checkpoints, scheduling, request):
    """Preempted in the midst of slots that were delivered in part, with prompts in small pieces."""
    if scheduling == "async":
        request.getfixturevalue("async_scheduling")
    checkpoint = checkpoints()
    draw, in_part = random.Random(8), []

    def preempt(step, engine):
        if draw.random() < 0.2:
            for running in scheduler_of(llm).running:
                size = checkpoint.cases[int(running.request_id.split("-")[0])].params.slot_size
                in_part.append(running.num_output_tokens % size)
            scheduler_of(llm).reset_prefix_cache(True)

    chosen = [i for i in checkpoint.mixed if checkpoint.cases[i].params.block_length <= 32]
    with engine(checkpoint.path, **NARROW, max_num_batched_tokens=60) as llm:
        outputs = drive(llm, checkpoint, chosen, preempt)
    checkpoint.check(list(outputs.values()), outputs)
    assert sum(n > 0 for n in in_part) >= 10


@pytest.mark.parametrize(
    "options", [pytest.param(PLAIN, marks=pytest.mark.slow), {}], ids=["plain", "fused"]
)
def test_endings_in_the_midst_of_the_first_slot(checkpoints, options):
    """EOS, a stop token and max_tokens at every place of a slot, with logprobs."""
    checkpoint = checkpoints()
    wide = [i for i, c in enumerate(checkpoint.cases) if c.params.slot_size == 32 and not c.seed][0]
    case = replace(checkpoint.cases[wide], ignore_eos=True, logprobs=2, max_tokens=64)
    (answer,) = expected(checkpoint.path, [case])
    # the same text, ended by a token that occurs there for the first time
    firsts = [t for n, t in enumerate(answer.tokens) if t not in answer.tokens[:n]][:6]
    requests = [replace(case, stop_token_ids=(token,)) for token in firsts]
    requests += [replace(case, max_tokens=n) for n in (1, 2, 5, 31, 32, 33)]
    at_head = Case("eos at the head", case.prompt_ids, DecodingParams(32, 64, 0.5, 0.1), 64)
    eos = MODELS[checkpoint.name].eos_token_id
    requests += [replace(at_head, logprobs=1, logit_bias=((eos, b),)) for b in (2.0, 4.0, 9.0)]
    answers = expected(checkpoint.path, requests)
    ended = [len(answer.tokens) for answer in answers[-3:] if answer.tokens[-1] == eos]
    assert ended and min(ended) < 32
    assert {len(answer.tokens) for answer in answers} >= {1, 2, 5, 31, 32, 33}
    with engine(checkpoint.path, **options) as llm:
        made = SimpleNamespace(cases=requests, answers=answers)
        seen = {}
        drive(
            llm, made, range(len(requests)), lambda step, engine: None,
            lambda step, output: seen.setdefault(int(output.request_id), []).append(
                list(output.outputs[0].logprobs)
            ),
        )  # fmt: skip
    for i, answer in enumerate(answers):
        for logprobs in seen[i]:
            # of a prefix of the text, at every delivery
            for got, wanted in zip(logprobs, answer.logprobs, strict=False):
                assert {t: e.logprob for t, e in got.items()} == pytest.approx(wanted, abs=1e-4)
        assert len(seen[i][-1]) == len(answer.tokens)
