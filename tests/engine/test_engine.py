"""The engine answers every conformance case with the reference decoder's tokens, in float32.

On a CPU the PyTorch twins run, and for some cases the Triton kernels in the interpreter; on a GPU
the Triton kernels run under CUDA graphs.
"""

from __future__ import annotations

import random
from collections import Counter as Tally

import pytest
from device import ON_GPU
from near_ties import assert_near_tie
from vllm import TokensPrompt
from vllm.exceptions import VLLMValidationError

from conformance import MODELS, Case, expected
from engine import NARROW, assert_idle, engine, free_pages, run, sampling_params
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.speculation import MAX_PRICE, Speculation
from vllm_refusion.engine.metrics import snapshot
from vllm_refusion.engine.row_budget import RowBudget
from vllm_refusion.triton_kernels.dispatch import CPU_KERNELS_ENV


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["third", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_conformance(checkpoints, name, step):
    """The cases of a model at once, by default every third; fused passes are fewer, never more."""
    checkpoint = checkpoints(name)
    counts, answers = count_passes(checkpoint, range(0, len(checkpoint.cases), step))
    assert counts["plans_ridden"] > 0 and counts["predicts_ridden"] > 0
    if not ON_GPU:  # with async scheduling a request may make passes after its last token
        assert counts["forward_passes"] < sum(len(answer.passes) for answer in answers)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["fifth", "all"])
def test_the_plain_schedule_is_the_papers(checkpoints, step):
    """Without riders each pass is one of the reference's.

    Of requests that end with a slot: others end before the passes that commit their last one.
    """
    checkpoint = checkpoints()
    chosen = [
        i
        for i, (case, answer) in enumerate(zip(checkpoint.cases, checkpoint.answers, strict=True))
        if not case.stop_token_ids and len(answer.tokens) % case.params.slot_size == 0
    ][::step]
    assert len(chosen) >= 4
    plain = {"additional_config": {"refusion_schedule": "plain"}}
    counts, answers = count_passes(checkpoint, chosen, **plain)
    assert counts["plans_ridden"] == counts["predicts_ridden"] == counts["rider_rows_fed"] == 0
    if not ON_GPU:
        kinds = Tally(step.kind for answer in answers for step in answer.passes)
        assert {kind: counts[kind] for kind in kinds} == kinds
        assert counts["forward_passes"] == kinds.total()


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["third", "all"])
def test_any_schedule_gives_the_same_tokens(checkpoints, monkeypatch, step):
    """What riders a step takes is drawn anew for each."""
    draw = random.Random(step)

    def speculate(self, decoding):
        free = draw.choice((0, 0, 16, draw.randint(0, 256), 256))
        return Speculation(free, draw.choice((0, 4, draw.randint(0, MAX_PRICE))))

    monkeypatch.setattr(RowBudget, "_speculate", speculate)
    checkpoint = checkpoints()
    counts, _ = count_passes(checkpoint, range(0, len(checkpoint.cases), step))
    assert counts["plans_ridden"] > 0 and counts["predicts_ridden"] > 0


def count_passes(checkpoint, chosen, **options):
    """Runs cases and compares them with the reference; the counts of the engine, the answers."""
    with engine(checkpoint.path, **options) as llm:
        pages = free_pages(llm)
        checkpoint.run(llm, chosen)
        counts = snapshot(llm)
        assert_idle(llm, pages)
    answers = [checkpoint.answers[i] for i in chosen]
    assert counts["output_tokens"] >= sum(len(answer.tokens) for answer in answers)
    return counts, answers


@pytest.mark.slow
def test_bfloat16_differs_only_by_near_ties(checkpoints, capsys):
    checkpoint = checkpoints()
    chosen = [i for i in checkpoint.mixed if not checkpoint.cases[i].stop_token_ids]
    differing = 0
    with engine(checkpoint.path, dtype="bfloat16") as llm:
        for i in chosen:
            case, answer = checkpoint.cases[i], checkpoint.answers[i]
            if run(llm, [case])[0] != list(answer.tokens):
                differing += 1
                assert_near_tie(llm, checkpoint.path, case.prompt_ids, answer)
    assert differing, "this set has answers that bfloat16 changes"
    with capsys.disabled():
        print(f"\nbfloat16: {differing} of {len(chosen)} answers differ, each from a near tie on")


def test_mixed_requests_alone_and_together(checkpoints):
    checkpoint = checkpoints()
    with engine(checkpoint.path) as llm:
        checkpoint.run(llm, checkpoint.mixed)
        for i in checkpoint.mixed[::2]:
            checkpoint.run(llm, [i])


def test_parallel_samples_are_those_of_their_seeds(checkpoints):
    """``n`` answers with seed s are the answers with seeds s, s+1, .."""
    checkpoint = checkpoints()
    # so warm that no two of 60 answers share more than their first 7 tokens; at 1.0 some are equal
    case = next(case for case in checkpoint.cases if case.temperature == 1.5)
    params = sampling_params(case)
    params.n = 3
    with engine(checkpoint.path) as llm:
        output = llm.generate(
            TokensPrompt(prompt_token_ids=list(case.prompt_ids)), params, use_tqdm=False
        )[0]
        several = [list(sample.token_ids) for sample in output.outputs]
        params.n, params.seed = 1, None
        unseeded = [
            llm.generate(
                TokensPrompt(prompt_token_ids=list(case.prompt_ids)), params, use_tqdm=False
            )[0].outputs[0].token_ids
            for _ in range(2)
        ]  # fmt: skip
    seeds = [Case(**{**vars(case), "seed": case.seed + i, "label": f"seed {i}"}) for i in range(3)]
    assert several == [list(answer.tokens) for answer in expected(checkpoint.path, seeds)]
    assert list(unseeded[0]) != list(unseeded[1])


def test_wide_blocks_are_refused_and_harm_nobody(checkpoints):
    checkpoint = checkpoints()
    wide = Case("wide", (1, 2), DecodingParams(32, 512), 40)
    with engine(checkpoint.path) as llm:
        with pytest.raises(VLLMValidationError, match="block_length=512"):
            run(llm, [wide])
        checkpoint.run(llm, [0])


def test_sleep_is_refused_and_the_engine_goes_on(checkpoints):
    checkpoint = checkpoints()
    with engine(checkpoint.path) as llm:
        for ask in (llm.sleep, lambda: llm.sleep(2), llm.release_kv_cache_memory):
            with pytest.raises(VLLMValidationError, match="no sleep mode"):
                ask()
        checkpoint.run(llm, [0])


@pytest.mark.skipif(ON_GPU, reason="there the kernels run anyway")
def test_triton_kernels_in_the_interpreter(checkpoints, monkeypatch):
    """Part of the set end to end through the Triton kernels."""
    monkeypatch.setenv(CPU_KERNELS_ENV, "interpreter")
    checkpoint = checkpoints()
    chosen = [
        i
        for i, (case, answer) in enumerate(zip(checkpoint.cases, checkpoint.answers, strict=True))
        if case.params.block_length <= 32 and len(answer.passes) <= 20
    ][:4]
    assert len(chosen) == 4
    with engine(checkpoint.path, **NARROW) as llm:
        checkpoint.run(llm, chosen)
