"""Serial decoding's step logic: the twin against the reference decoder, the kernel against it."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from simulated_engine import Request, SimulatedEngine, Weather
from test_transition import BOTH, MASK_TOKEN_ID, TWINS, WEATHERS, build_request, tiny_model
from twins import same

from vllm_refusion.decoding.draft_price import NO_MASKS
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import Decoded, decode
from vllm_refusion.decoding.speculation import CERTAIN, LEVELS, Speculation
from vllm_refusion.decoding.state import Counter, DecodeState, Field, Phase
from vllm_refusion.triton_kernels.serial import give_drafts, serial_transition
from vllm_refusion.triton_kernels.serial_twin import (
    GIVEN,
    give_drafts_twin,
    serial_transition_twin,
)

# slot size; what differs from the defaults
REQUESTS = {
    "slots_of_one": (1, {"max_tokens": 14}),
    "slots_of_three": (3, {"max_tokens": 31, "temperature": 0.7}),
    "slots_of_four": (4, {"max_tokens": 40}),
    "slots_of_eight": (8, {"max_tokens": 50, "temperature": 1.5, "seed": -(2**62) - 11}),
    "one_slot": (32, {"max_tokens": 29}),
    "eos": (8, {"max_tokens": 40, "eos_token_id": 13}),
    "sampled_eos": (4, {"max_tokens": 40, "temperature": 1.5, "eos_token_id": 9}),
    "eos_held_back": (
        4, {"max_tokens": 24, "eos_token_id": 6, "min_tokens": 11, "stop_token_ids": (3,)},
    ),
    "stop_token": (4, {"max_tokens": 40, "stop_token_ids": (2, 4)}),
    "one_token": (8, {"max_tokens": 1}),
}  # fmt: skip
STARTS = ("mask", "next")


@cache
def serial_request(name: str, slot_start: str) -> Request:
    size, options = REQUESTS[name]
    rng = random.Random(f"{name} {slot_start}")
    prompt = [rng.randrange(MASK_TOKEN_ID) for _ in range(rng.randint(1, 12))]
    params = DecodingParams(size, size, mode="serial", slot_start=slot_start)
    return Request(prompt, params, **{"seed": rng.getrandbits(40)} | options)


@cache
def reference(name: str, slot_start: str) -> Decoded:
    options = dict(vars(serial_request(name, slot_start)))
    decoded = decode(tiny_model(), options.pop("prompt"), **options, mask_token_id=MASK_TOKEN_ID)
    assert decoded.argmax_margin > 1e-5, "choose another request"
    return decoded


def simulate(
    operations,
    weather: Weather,
    seed: int = 0,
    with_parallel: bool = False,
    chosen=REQUESTS,
    **options,
):
    """Decodes all requests together, with parallel ones between them, and checks the tokens."""
    engine = SimulatedEngine(tiny_model(), operations, weather=weather, seed=seed, **options)
    names = [(name, start) for name in chosen for start in STARTS]
    requests = [serial_request(*name) for name in names]
    parallel = ["several_slots", "noise_and_eos"] if with_parallel else []
    requests += [build_request(name) for name in parallel]
    outcomes = engine.decode(requests)
    for name, outcome in zip(names, outcomes):
        if outcome is None:
            assert weather.abort > 0
        else:
            assert outcome.tokens == reference(*name).tokens, name
    return engine


@pytest.mark.parametrize("weather", WEATHERS)
def test_tokens_of_the_reference_in(weather: str):
    simulate(TWINS, WEATHERS[weather], seed=1, with_parallel=True)


@pytest.mark.parametrize("price", [0, 300, 5000, CERTAIN])
def test_at_a_price_of_a_row(price: int):
    weather = Weather(riders=1.0, speculation=Speculation(0, 0, price, 20))
    counters = simulate(TWINS, weather, canvas_length=64).state.counters.tolist()
    expected = [reference(name, start) for name in REQUESTS for start in STARTS]
    tokens = sum(len(answer.tokens) for answer in expected)
    passes, rows = counters[Counter.SERIAL], counters[Counter.ROWS_FED]
    assert counters[Counter.TOKENS] >= tokens
    if price == CERTAIN:
        assert counters[Counter.DRAFTS_TESTED] == 0
    else:
        assert passes < tokens and rows > tokens


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_drafted(seed: int):
    """Drafts at random, or withheld: the tokens stay those of the reference."""
    rng = random.Random(seed)

    def disturbed(state: DecodeState, *args, **kwargs) -> None:
        serial_transition_twin(state, *args, **kwargs)
        for req in range(state.max_requests):
            tests = int(state.ints[req, Field.TESTS])
            if rng.random() < 0.7 and tests:
                lie = torch.randint(0, MASK_TOKEN_ID, (tests,), dtype=torch.int32)
                keep = torch.rand(tests) < 0.5
                truth = state.token[req, :tests].clone()
                drafts = torch.where(keep, truth, lie)
                state.token[req, :tests] = drafts
                state.canvas_token[req, 1 : tests + 1] = drafts

    operations = TWINS._replace(serial_transition=disturbed)
    simulate(operations, Weather(riders=1.0, ragged=True, preempt=0.02), seed)


def giving(rng: random.Random, give=give_drafts_twin):
    """The transition, after which requests of the batch get other drafts: cut, wrong, more."""

    def transition(state: DecodeState, idx_mapping, *args, **kwargs) -> None:
        serial_transition_twin(state, idx_mapping, *args, **kwargs)
        serial = state.ints[idx_mapping, Field.RESUME] == Phase.SERIAL
        reqs = idx_mapping[serial & (torch.rand(len(idx_mapping)) < 0.7)]
        drafts = torch.full((len(reqs), state.canvas_length), -1, dtype=torch.int32)
        for row, req in zip(drafts, reqs.tolist()):
            had = int(state.ints[req, Field.DRAFTS])
            kept, more = rng.randint(0, had), rng.choice((0, 0, 1, 9))
            row[:kept] = state.token[req, :kept]
            row[kept : kept + more] = torch.randint(0, MASK_TOKEN_ID, (min(more, len(row) - kept),))
        give(state, reqs, drafts, args[-1])

    return transition


@pytest.mark.parametrize("seed", range(2))
def test_whatever_drafts_are_given(seed: int):
    torch.manual_seed(seed)
    operations = TWINS._replace(serial_transition=giving(random.Random(seed)))
    weather = Weather(riders=1.0, ragged=True, truncate=0.2, preempt=0.02, lose=0.02)
    simulate(operations, weather, seed, with_parallel=True)


def test_given_drafts_keep_their_confidence():
    state = DecodeState(2, 32, 64, MASK_TOKEN_ID, "cpu")
    params = DecodingParams(8, 8, mode="serial", slot_start="next")
    state.add_serial(1, 5, params, 40, None, last_token=7, known=1)
    reqs = torch.tensor([1])
    drafts = torch.full((1, 32), -1, dtype=torch.int32)
    drafts[0, :3] = torch.tensor([4, 5, 6])
    before = state.ints.clone()
    give_drafts_twin(state, reqs, drafts, Speculation(0, 0, 0))
    assert torch.equal(state.ints, before), "its prompt comes first"
    state.ints[1, Field.PHASE] = Phase.SERIAL
    state.ints[1, Field.DRAFTS] = 2
    state.token[1, :3] = torch.tensor([4, 9, 6])
    state.confidence[1, :3] = torch.tensor([0.5, 0.6, 0.7])
    give_drafts_twin(state, reqs, drafts, Speculation(0, 0, 0))
    assert state.confidence[1, :3].tolist() == [0.5, GIVEN, GIVEN]
    assert state.canvas_token[1, :4].tolist() == [7, 4, 5, 6]
    assert state.ints[1, Field.TESTS] == state.ints[1, Field.DRAFTS] == 3


@pytest.mark.parametrize("prior", [0, 40, LEVELS])
@pytest.mark.parametrize("skips_known", [False, True])
def test_where_masks_do_not_pay_likely_drafts_are_fed_alone(prior: int, skips_known: bool):
    state = DecodeState(1, 32, 64, MASK_TOKEN_ID, "cpu")
    params = DecodingParams(8, 8, mode="serial", slot_start="next")
    state.add_serial(0, 5, params, 40, None, last_token=7, known=1, skips_known=skips_known)
    state.ints[0, Field.PHASE] = Phase.SERIAL
    drafts = torch.tensor([[4, 5, 6, 4, 5, 6, -1]], dtype=torch.int32)
    speculation = Speculation(row_price=int(CERTAIN * NO_MASKS), prior=prior)
    give_drafts_twin(state, torch.tensor([0]), drafts, speculation)
    tests = int(state.ints[0, Field.TESTS])
    assert GIVEN**tests > NO_MASKS > GIVEN ** (tests + 1)
    assert state.ints[0, Field.CANVAS] == 1 + tests


# The kernel against its twin


@pytest.mark.parametrize("kernel", [False, True], ids=["twin", "kernel"])
def test_drafts_are_withheld(kernel: bool):
    """A pass decides one token then, though rows cost nothing."""
    operations, chosen = TWINS, REQUESTS
    if kernel:
        step = same(serial_transition_twin, serial_transition)
        operations, chosen = BOTH._replace(serial_transition=step), ("slots_of_three",)
    weather = Weather(riders=1.0, speculation=Speculation(0, 0, 0))
    engine = simulate(operations, weather, chosen=chosen, canvas_length=40, drafts=False)
    counters = engine.state.counters.tolist()
    assert counters[Counter.SERIAL] == counters[Counter.TOKENS] > 0
    assert counters[Counter.DRAFTS_TESTED] == 0


@pytest.mark.parametrize("weather", ["calm", "sometimes_riders"])
def test_kernels_equal_twins_in_simulation(weather: str):
    operations = BOTH._replace(serial_transition=same(serial_transition_twin, serial_transition))
    chosen = ("slots_of_three", "sampled_eos", "one_token")
    simulate(operations, WEATHERS[weather], seed=2, chosen=chosen, canvas_length=40)


def test_kernel_gives_drafts_as_its_twin():
    torch.manual_seed(3)
    give = same(give_drafts_twin, give_drafts)
    operations = TWINS._replace(serial_transition=giving(random.Random(3), give))
    chosen = ("slots_of_three", "sampled_eos", "one_token")
    weather = Weather(riders=1.0, ragged=True)
    simulate(operations, weather, seed=2, chosen=chosen, canvas_length=40)
