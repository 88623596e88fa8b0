"""The step logic: twins against the reference decoder, kernels against the twins.

The kernels run on the GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from fuzzed_states import DECODING, FUZZED, MASK_TOKEN_ID, POISON, Fuzz
from simulated_engine import Operations, Outcome, Request, SimulatedEngine, Weather
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from twins import same

import conformance
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import Decoded, decode
from vllm_refusion.decoding.speculation import Speculation
from vllm_refusion.decoding.state import Counter, Phase
from vllm_refusion.triton_kernels.layout import layout
from vllm_refusion.triton_kernels.layout_twin import ASKED, layout_twin
from vllm_refusion.triton_kernels.token_stats_twin import token_stats_twin
from vllm_refusion.triton_kernels.transition import transition
from vllm_refusion.triton_kernels.transition_twin import transition_twin

TWINS = Operations(layout_twin, token_stats_twin, transition_twin)

# slot_size, block_length, slot_threshold, token_threshold; then what differs from the defaults
REQUESTS: dict[str, tuple[tuple, dict[str, Any]]] = {
    "one_slot_blocks": ((4, 4, 0.3, 0.02), {"max_tokens": 28}),
    "slots_of_one": ((1, 4, 0.5, 0.05), {"max_tokens": 10}),
    "slots_of_three": ((3, 12, 0.1, 0.02), {"max_tokens": 31, "temperature": 0.7}),
    "slots_of_thirty_two": ((32, 32, 0.9, 0.1), {"max_tokens": 40}),
    "thresholds_of_0": ((2, 8, 0.0, 0.0), {"max_tokens": 20}),
    "thresholds_of_1": ((4, 8, 1.0, 1.0), {"max_tokens": 23}),
    "several_slots": ((8, 32, 0.2, 0.4), {"max_tokens": 50, "temperature": 0.7}),
    "partial_prefixes": ((2, 16, 0.2, 0.1), {"max_tokens": 47}),
    "noise": ((4, 16, 0.2, 0.4), {"max_tokens": 40, "temperature": 1.5, "seed": -(2**62) - 11}),
    "noise_and_eos": ((4, 16, 0.2, 0.4), {"max_tokens": 40, "temperature": 1.5, "eos_token_id": 9}),
    "eos_in_verify": ((2, 8, 0.1, 0.02), {"max_tokens": 40, "eos_token_id": 9}),
    "eos_in_infill": ((8, 16, 0.2, 0.2), {"max_tokens": 40, "eos_token_id": 13}),
    "eos_before_gaps": ((4, 16, 0.5, 0.2), {"max_tokens": 40, "eos_token_id": 22}),
    "eos_held_back": (
        (4, 8, 0.3, 0.1),
        {"max_tokens": 24, "eos_token_id": 6, "min_tokens": 11, "stop_token_ids": (3,)},
    ),
    "stop_token": ((4, 16, 0.3, 0.1), {"max_tokens": 40, "stop_token_ids": (2, 4)}),
    "one_token": ((8, 16, 0.2, 0.2), {"max_tokens": 1}),
}
# the same with corrected infill
CORRECTED = {
    "corrected_pairs": ((2, 16, 0.7, 0.3), {"max_tokens": 47}),
    "corrected_slots_of_three": ((3, 12, 0.1, 0.2), {"max_tokens": 31, "temperature": 0.7}),
    "corrected_thresholds_of_1": ((4, 8, 1.0, 1.0), {"max_tokens": 23}),
    "corrected_several_slots": ((8, 32, 0.2, 0.4), {"max_tokens": 50, "temperature": 0.7}),
    "corrected_long_slots": ((32, 32, 0.9, 0.1), {"max_tokens": 40}),
    "corrected_noise_and_eos": (
        (4, 16, 0.2, 0.4),
        {"max_tokens": 40, "temperature": 1.5, "eos_token_id": 9},
    ),
    "corrected_to_eos": ((8, 16, 0.2, 0.2), {"max_tokens": 40, "eos_token_id": 13}),
    "corrected_eos_held_back": (
        (4, 8, 0.3, 0.3),
        {"max_tokens": 24, "eos_token_id": 6, "min_tokens": 11, "stop_token_ids": (3,)},
    ),
}
REQUESTS |= CORRECTED
ALL_BRANCHES = frozenset(
    "forced_slot several_slots whole_prefix partial_prefix eos_in_verify eos_in_infill no_eos "
    "infill_one_round infill_many_rounds infill_complete_on_entry infill_drops_slots later_block "
    "short_last_block early_eos_with_masked_slots_before "
    "infill_without_round correction_ends_infill correction_is_eos".split()
)
EVERYTHING = Weather(
    chunk=7,
    ragged=True,
    truncate=0.1,
    preempt=0.03,
    lose=0.03,
    abort=0.01,
    strangers=0.2,
    riders=0.5,
)
WEATHERS = {
    "calm": Weather(),
    "single_token_chunks": Weather(chunk=1),
    "ragged_chunks": Weather(chunk=5, ragged=True),
    "truncated_canvases": Weather(truncate=0.3),
    "idle_requests": Weather(strangers=0.5),
    "preemptions": Weather(chunk=7, ragged=True, preempt=0.05),
    "lost_tokens": Weather(chunk=7, ragged=True, lose=0.05),
    "aborts": Weather(abort=0.01),
    "riders": Weather(riders=1.0),
    "sometimes_riders": Weather(riders=0.5, ragged=True, truncate=0.1, preempt=0.03, lose=0.03),
    "everything": EVERYTHING,
}
PREEMPTED = (Phase.PREFILL, *DECODING, Phase.REPLAY, Phase.DONE)
pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def tiny_model() -> Qwen3ForCausalLM:
    """A random model with weights so large that probabilities spread over (0, 1)."""
    config = Qwen3Config(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        attn_implementation="eager",
        mask_token_id=MASK_TOKEN_ID,
    )
    generator = torch.Generator().manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.25, generator=generator)
        model.lm_head.weight.mul_(2)
    return model


@cache
def build_request(name: str) -> Request:
    params, options = REQUESTS[name]
    infill = "correct" if name in CORRECTED else "propose"
    rng = random.Random(name)
    prompt = [rng.randrange(MASK_TOKEN_ID) for _ in range(rng.randint(1, 12))]
    decoding = DecodingParams(*params, infill=infill)
    return Request(prompt, decoding, **{"seed": rng.getrandbits(40)} | options)


@cache
def reference(name: str) -> Decoded:
    options = dict(vars(build_request(name)))
    decoded = decode(tiny_model(), options.pop("prompt"), **options, mask_token_id=MASK_TOKEN_ID)
    # the engine computes the same in another order: no decision may hang on rounding
    assert min(decoded.threshold_margin, decoded.argmax_margin) > 1e-5, "choose another request"
    return decoded


def simulate(
    names: Mapping[str, Any],
    operations: Operations,
    weather: Weather,
    seed: int = 0,
    **options: Any,
) -> SimulatedEngine:
    """Decodes the requests of these names together and checks what they give."""
    engine = SimulatedEngine(tiny_model(), operations, weather=weather, seed=seed, **options)
    outcomes = engine.decode([build_request(name) for name in names])
    assert weather.abort > 0 or None not in outcomes
    for name, outcome in zip(names, outcomes, strict=True):
        if outcome is not None:
            fused = weather.riders > 0
            check(name, outcome, reference(name), build_request(name).stop_token_ids, fused)
    return engine


def check(
    name: str,
    outcome: Outcome,
    expected: Decoded,
    stop_token_ids: tuple[int, ...],
    fused: bool = False,
) -> None:
    assert outcome.tokens == expected.tokens, name
    if outcome.tokens[-1] in stop_token_ids:
        # the scheduler ended the request where the reference went on to the end
        assert outcome.commit_order == expected.commit_order[: len(outcome.commit_order)], name
        assert outcome.passes <= len(expected.passes) or fused, name
    else:
        assert outcome.commit_order == expected.commit_order, name
        assert outcome.passes == len(expected.passes) or fused, name


# Twins against the reference decoder


def test_the_requests_take_every_branch():
    taken = frozenset().union(*(reference(name).branches for name in REQUESTS))
    assert taken >= ALL_BRANCHES


@pytest.mark.parametrize("name", REQUESTS)
def test_alone(name: str):
    counters = simulate({name: None}, TWINS, Weather()).state.counters.tolist()
    if REQUESTS[name][1].get("stop_token_ids"):
        return
    kinds = [step.kind for step in reference(name).passes]
    for kind in ("plan", "verify", "predict", "infill_verify"):
        assert counters[Counter[kind.upper()]] == kinds.count(kind)
    # the reference feeds the accepted tokens of an infill in each of its passes
    fed, width = counters[Counter.ROWS_FED], sum(step.width for step in reference(name).passes)
    assert fed == width if not kinds.count("predict") else fed < width
    assert counters[Counter.TOKENS] == len(reference(name).tokens)
    assert counters[Counter.REPLAY] == counters[Counter.IDLE] == 0


def test_rows_are_put_off_where_they_are_dear():
    """The same tokens, of fewer rows where a pass is cheap, in fewer passes where rows are. The
    rows that a pass gets in any case are enough to get on."""
    rows, passes = {}, {}
    names = ("slots_of_thirty_two", "several_slots", "noise")
    for price in (0, 4, 400):
        weather = Weather(riders=float(price > 0), speculation=Speculation(0, price))
        engine = simulate(dict.fromkeys(names), TWINS, weather, canvas_length=64)
        counters = engine.state.counters.tolist()
        rows[price] = counters[Counter.ROWS_FED]
        kinds = (Counter.PLAN, Counter.VERIFY, Counter.PREDICT, Counter.INFILL_VERIFY)
        passes[price] = sum(counters[kind] for kind in kinds)
    assert rows[4] < 0.8 * rows[0]
    assert passes[400] < 0.8 * passes[0]


def _slowly(values, often) -> list[Any]:
    """Those that are not run ``often`` are marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(v, marks=() if v in often else slow) for v in values]


# each of the others alone is in "everything", too
OFTEN = ("calm", "single_token_chunks", "idle_requests", "riders", "sometimes_riders", "everything")


@pytest.mark.parametrize("weather", _slowly(WEATHERS, OFTEN))
def test_all_at_once_in(weather: str):
    simulate(REQUESTS, TWINS, WEATHERS[weather], seed=1)


@pytest.mark.parametrize(
    "phase", _slowly(PREEMPTED, (*DECODING, Phase.REPLAY)), ids=lambda phase: phase.name
)
def test_preempted_in(phase: Phase):
    # a preempted request replays; a finished one is only preempted if its last tokens were lost
    lose = 0.1 if phase in (Phase.REPLAY, Phase.DONE) else 0.0
    weather = Weather(chunk=3, ragged=True, lose=lose, preempt_at=phase)
    engine = simulate(REQUESTS, TWINS, weather, seed=2)
    assert engine.preempted_in[phase] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 40))
def test_storm(seed: int):
    weather = Weather(
        7, True, truncate=0.2, preempt=0.1, lose=0.1, abort=0.003, strangers=0.3, riders=0.5
    )
    simulate(REQUESTS, TWINS, weather, seed)


@pytest.mark.parametrize(
    "name, every",
    [
        pytest.param("qwen3-gqa2", 6, id="qwen3-gqa2-some"),
        *(pytest.param(name, 1, id=name, marks=pytest.mark.slow) for name in conformance.MODELS),
    ],
)
def test_conformance_cases(name: str, every: int, tmp_path):
    directory = conformance.build_model(name, tmp_path)
    cases = conformance.cases(name)[::every]
    answers = conformance.expected(directory, cases)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    weather = Weather(chunk=100, ragged=True, truncate=0.02, preempt=0.01, lose=0.01)
    engine = SimulatedEngine(
        model, TWINS, canvas_length=128, max_response=544, max_requests=8, weather=weather
    )
    requests = [
        Request(
            list(case.prompt_ids),
            case.params,
            case.max_tokens,
            None if case.ignore_eos else model.config.eos_token_id,
            case.temperature,
            case.seed,
            case.min_tokens,
            case.stop_token_ids,
        )
        for case in cases
    ]
    for case, outcome, answer in zip(cases, engine.decode(requests), answers, strict=True):
        check(case.label, outcome, answer, case.stop_token_ids)


# Kernels against the twins


BOTH = Operations(same(layout_twin, layout), token_stats_twin, same(transition_twin, transition))
BRANCHY = dict.fromkeys(
    ("slots_of_three", "partial_prefixes", "noise_and_eos", "eos_in_infill", "eos_held_back")
    + ("corrected_noise_and_eos", "corrected_to_eos")
)


@pytest.mark.parametrize(
    "names, weather",
    [
        pytest.param(BRANCHY, EVERYTHING, id="some-everything"),
        pytest.param(REQUESTS, Weather(), id="all-calm", marks=pytest.mark.slow),
        pytest.param(REQUESTS, EVERYTHING, id="all-everything", marks=pytest.mark.slow),
    ],
)
def test_kernels_equal_twins_in_simulation(names: Mapping[str, Any], weather: Weather):
    simulate(names, BOTH, weather, seed=3)


def fuzz_cases() -> list[Any]:
    cases = [pytest.param((phase,), 32, id=f"{phase.name}-canvas32") for phase in FUZZED]
    cases += [
        pytest.param((phase,), width, id=f"{phase.name}-canvas{width}")
        for phase in DECODING
        for width in (48, 128)
    ]
    return cases + [pytest.param(FUZZED, w, id=f"mixed-canvas{w}") for w in (32, 48, 128, 512)]


@pytest.mark.parametrize("phases, canvas_length", fuzz_cases())
def test_transition_kernel_equals_twin(phases: tuple[Phase, ...], canvas_length: int):
    rng = random.Random(f"transition {phases} {canvas_length}")
    for _ in range(9):
        fuzz = Fuzz(rng, phases, canvas_length)
        requests = len(fuzz.idx_mapping)
        same(transition_twin, transition)(
            fuzz.state,
            fuzz.idx_mapping,
            fuzz.query_start_loc,
            fuzz.logits_start,
            fuzz.num_computed,
            fuzz.prefill_len,
            fuzz.picked,
            fuzz.picked_prob,
            fuzz.given_prob,
            torch.tensor([rng.randint(0, canvas_length) for _ in range(requests)]).int(),
            torch.full((requests, canvas_length), POISON, dtype=torch.int32),
            torch.full((requests,), POISON, dtype=torch.int32),
            torch.full((requests,), POISON, dtype=torch.int32),
            fuzz.speculation(),
        )


@pytest.mark.parametrize("phases, canvas_length", fuzz_cases())
def test_layout_kernel_equals_twin(phases: tuple[Phase, ...], canvas_length: int):
    rng = random.Random(f"layout {phases} {canvas_length}")
    for groups in (1, 1, 2, 3):
        fuzz = Fuzz(rng, phases, canvas_length)
        rows = int(fuzz.query_start_loc[-1]) + rng.randint(0, 3)  # the last ones belong to none
        same(layout_twin, layout)(
            fuzz.state,
            fuzz.idx_mapping,
            fuzz.query_start_loc,
            fuzz.logits_start,
            fuzz.num_computed,
            torch.full((rows,), POISON, dtype=torch.int32),
            torch.full((rows,), POISON, dtype=torch.int64),
            torch.full((rows, 4), POISON, dtype=torch.int32),
            torch.arange(groups * rows).view(groups, rows),
            torch.full((ASKED, len(fuzz.picked) + rng.randint(0, 3)), POISON, dtype=torch.int32),
        )
