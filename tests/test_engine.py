"""The engine answers every conformance case with the reference decoder's tokens, in float32.

On a CPU the PyTorch twins run, and for some cases the Triton kernels in the interpreter; on a GPU
the Triton kernels run under CUDA graphs.
"""

from __future__ import annotations

import random

import pytest
from near_ties import assert_near_tie
from vllm import TokensPrompt
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.scheduler import Scheduler

from conformance import MODELS, Case, build_model, cases, expected
from engine import ON_GPU, engine, free_pages, model_state_of, run, sampling_params, scheduler_of
from vllm_refusion.config import DecodingParams
from vllm_refusion.metrics import snapshot
from vllm_refusion.triton_kernels.dispatch import CPU_KERNELS_ENV

ONE_MODEL = "qwen3-gqa2"
# A canvas of 32 rows, and server defaults that fit it.
NARROW = {
    "diffusion_config": {"canvas_length": 32},
    "override_generation_config": {"slot_size": 8, "block_length": 32},
}


class Checkpoint:
    """A conformance model with its requests and the reference's answers."""

    def __init__(self, name, directory):
        self.name = name
        self.path = build_model(name, directory)
        self.cases = cases(name)
        self.answers = expected(self.path, self.cases)
        # two dozen requests with everything mixed: sizes, thresholds, temperatures, endings
        self.mixed = random.Random(name).sample(range(len(self.cases)), 24)

    def run(self, llm, chosen):
        """Runs the chosen cases at once and compares them with the reference."""
        self.check(run(llm, [self.cases[i] for i in chosen]), chosen)

    def check(self, outputs, chosen):
        """Compares outputs with the reference; says for each difference which case it is."""
        wrong = [
            f"{self.cases[i].label}: {output} instead of {self.answers[i].tokens}"
            for i, output in zip(chosen, outputs, strict=True)
            if output != list(self.answers[i].tokens)
        ]
        assert not wrong, f"{len(wrong)} of {len(outputs)} differ:\n" + "\n".join(wrong)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(name=ONE_MODEL):
        if name not in made:
            made[name] = Checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def preemptions(monkeypatch):
    """Request ids, in the order they were preempted."""
    seen = []
    original = Scheduler._preempt_request

    def preempt(self, request, *args, **kwargs):
        seen.append((request.request_id, request.num_output_tokens))
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    return seen


@pytest.fixture
def async_scheduling(monkeypatch):
    """Async scheduling also on a CPU, where the platform turns it off."""
    from vllm.platforms import current_platform

    original = type(current_platform).check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(
        type(current_platform), "check_and_update_config", classmethod(check_and_update_config)
    )


def assert_idle(llm, pages):
    """All KV pages and request slots are free again."""
    llm.llm_engine.step()  # tells the worker about the last finished requests
    assert free_pages(llm) == pages
    state = model_state_of(llm)
    assert not state._slot_of
    assert not state._suspended
    assert not state.decode_state.ints[:, 0].any()


@pytest.mark.parametrize("name", MODELS)
def test_conformance(checkpoints, name):
    """All cases of a model at once; the number of passes is the reference's too."""
    checkpoint = checkpoints(name)
    with engine(checkpoint.path) as llm:
        pages = free_pages(llm)
        checkpoint.run(llm, range(len(checkpoint.cases)))
        counts = snapshot(llm)
        assert_idle(llm, pages)
    if not ON_GPU:  # with async scheduling a request may make passes after its last token
        stopped_early = any(case.stop_token_ids for case in checkpoint.cases)
        expected_passes = sum(len(answer.passes) for answer in checkpoint.answers)
        assert counts["forward_passes"] <= expected_passes
        assert stopped_early or counts["forward_passes"] == expected_passes
    assert counts["output_tokens"] >= sum(len(answer.tokens) for answer in checkpoint.answers)


def test_bfloat16_differs_only_by_near_ties(checkpoints, capsys):
    checkpoint = checkpoints()
    chosen = [i for i in checkpoint.mixed if not checkpoint.cases[i].stop_token_ids]
    if not ON_GPU:  # slow there
        chosen = [i for i in chosen if len(checkpoint.answers[i].passes) <= 30]
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


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_chunked_prompts(checkpoints, scheduling, request):
    """A small token budget cuts prompts into pieces of odd lengths."""
    if scheduling == "async":
        request.getfixturevalue("async_scheduling")
    checkpoint = checkpoints()
    with engine(checkpoint.path, max_num_batched_tokens=300) as llm:
        checkpoint.run(llm, checkpoint.mixed)


def test_several_requests_share_a_small_budget(checkpoints):
    """Canvases are truncated when the budget is short: such a pass decides nothing."""
    checkpoint = checkpoints()
    chosen = [i for i in checkpoint.mixed if checkpoint.cases[i].params.block_length <= 32]
    with engine(checkpoint.path, **NARROW, max_num_batched_tokens=100) as llm:
        checkpoint.run(llm, chosen)
        assert snapshot(llm)["idle"] > 0


@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_preemption(checkpoints, preemptions, scheduling, request):
    """With few KV pages requests are preempted in mid-output and go on as if nothing happened."""
    if scheduling == "async":
        request.getfixturevalue("async_scheduling")
    checkpoint = checkpoints()
    short = [i for i, c in enumerate(checkpoint.cases) if len(c.prompt_ids) + c.max_tokens <= 160]
    options = {"max_model_len": 160, "num_gpu_blocks_override": 28, "block_size": 16}
    with engine(checkpoint.path, **options) as llm:
        pages = free_pages(llm)
        checkpoint.run(llm, short)
        # wide blocks together: commits run ahead of gaps when the pages run out
        checkpoint.run(llm, sorted(short, key=lambda i: -checkpoint.cases[i].params.block_length))
        replayed = snapshot(llm)["replay"]
        assert_idle(llm, pages)
    assert len(preemptions) >= 10
    assert sum(emitted > 0 for _, emitted in preemptions) >= 5
    assert replayed > 0, "no preempted request had committed tokens ahead of a gap"


def test_reset_of_the_prefix_cache_preempts_everything(checkpoints):
    """All running requests are preempted at random steps; output in flight is dropped."""
    checkpoint = checkpoints()
    draw = random.Random(5)
    with engine(checkpoint.path) as llm:
        outputs = drive(llm, checkpoint, checkpoint.mixed, on_step=lambda step, engine: (
            draw.random() < 0.2 and scheduler_of(llm).reset_prefix_cache(True)
        ))  # fmt: skip
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


def drive(llm, checkpoint, chosen, on_step):
    """Runs cases step by step; ``on_step(step, engine)`` may interfere. Tokens by case number."""
    llm_engine = llm.llm_engine
    for i in chosen:
        case = checkpoint.cases[i]
        prompt = TokensPrompt(prompt_token_ids=list(case.prompt_ids))
        llm_engine.add_request(str(i), llm.renderer.render_cmpl([prompt])[0], sampling_params(case))
    outputs, step = {}, 0
    while llm_engine.has_unfinished_requests():
        step += 1
        on_step(step, llm_engine)
        for output in llm_engine.step():
            if output.finished:
                outputs[int(output.request_id)] = list(output.outputs[0].token_ids)
    return outputs


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


def test_parallel_samples_are_those_of_their_seeds(checkpoints):
    """``n`` answers with seed s are the answers with seeds s, s+1, .."""
    checkpoint = checkpoints()
    case = next(case for case in checkpoint.cases if case.temperature == 1.0)
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
    wide = Case("wide", (1, 2), DecodingParams(32, 256), 40)
    with engine(checkpoint.path) as llm:
        with pytest.raises(VLLMValidationError, match="block_length=256"):
            run(llm, [wide])
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
    ][:6]
    assert len(chosen) == 6
    with engine(checkpoint.path, **NARROW) as llm:
        checkpoint.run(llm, chosen)
