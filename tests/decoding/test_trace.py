"""Traces tell what the reference decoder did, whatever happens to the request meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from simulated_engine import Operations, Request, SimulatedEngine, Weather
from synthetic_trace import SCHEMA
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt

import conformance
from engine import engine, options_of
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import decode
from vllm_refusion.decoding.speculation import CERTAIN, Speculation
from vllm_refusion.decoding.trace import MAX_KEPT, Recorder, parameters_of
from vllm_refusion.engine import model_state
from vllm_refusion.engine.model_state import ReFusionModelState
from vllm_refusion.triton_kernels.dispatch import operations as operations_of
from vllm_refusion.triton_kernels.layout_twin import layout_twin
from vllm_refusion.triton_kernels.serial_twin import serial_transition_twin
from vllm_refusion.triton_kernels.token_stats_twin import token_stats_twin
from vllm_refusion.triton_kernels.transition_twin import transition_twin
from vllm_refusion.viewer.record import TRACING, record
from vllm_refusion.viewer.timeline import Timeline

EOS = 9
EXAMPLES = Path(__file__).parents[2] / "examples"
REQUESTS = {
    "several_slots": Request([3, 1, 4], DecodingParams(4, 16, 0.2, 0.4), 24, None, 0.7),
    "infill": Request([5, 9, 2, 6], DecodingParams(4, 16, 0.2, 0.4), 20, None, 1.5, 7),
    "eos": Request([1, 2], DecodingParams(2, 8, 0.1, 0.02), 24, EOS, 0.0, 1),
    "all_accepted": Request([4, 4], DecodingParams(2, 8, 0.0, 0.0), 22, None, 0.0, 2),
    "single_slots": Request([8, 3], DecodingParams(4, 4, 0.3, 0.02), 11, None, 0.0, 3),
    "corrected": Request(
        [6, 2], DecodingParams(4, 16, 0.2, 0.4, infill="correct"), 20, None, 1.5, 4
    ),
}
SERIAL = {
    f"{start}, slots of {size}, temperature {temperature}": Request(
        [3, 1, 4, size],
        DecodingParams(size, size, mode="serial", slot_start=start),
        40,
        EOS if temperature else None,
        temperature,
        seed,
    )
    for seed, (start, size, temperature) in enumerate(
        [("mask", 4, 0.0), ("next", 4, 0.0), ("mask", 8, 0.9), ("next", 8, 0.9), ("mask", 2, 0.5)],
        10,
    )
}
KINDS = {"plan", "verify", "predict", "infill_verify"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = conformance.build_model("qwen3-gqa2", tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def reference(model):
    @cache
    def answer(name):
        request = (REQUESTS | SERIAL)[name]
        return decode(
            model,
            request.prompt,
            request.params,
            mask_token_id=model.config.mask_token_id,
            eos_token_id=request.eos_token_id,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )

    return answer


def record_simulated(model, requests: list[Request], weather: Weather | None = None):
    """Recordings of requests decoded at once, in the order of the requests, whose seeds differ."""
    twins = Operations(layout_twin, token_stats_twin, transition_twin)
    simulated = SimulatedEngine(model, twins, weather=weather, seed=1)
    state = simulated.state
    recorder = Recorder(state)

    def transition(*args):
        args[0].begun = recorder.begin(args[1].tolist())
        transition_twin(*args)

    def serial_transition(*args):
        serial_transition_twin(*args)
        _, _, starts, logits_start, _, _, _, probabilities, sampled, num_sampled, *_ = args
        if state.begun is not None:
            rows = starts, logits_start, probabilities, state.given_prob
            recorder.end(state.begun, *rows, sampled, num_sampled)

    def token_stats(*args, **kwargs):
        statistics = token_stats_twin(*args, **kwargs)
        state.given_prob = statistics[2]
        return statistics

    simulated.operations = twins._replace(
        transition=transition, serial_transition=serial_transition, token_stats=token_stats
    )
    add, add_serial = state.add, state.add_serial
    save, restore, remove = state.save, state.restore, state.remove
    owners = {}

    def start(req, seed):
        owners[req] = seed
        number, request = next((i, r) for i, r in enumerate(requests) if r.seed == seed)
        how = parameters_of(request.params, request.temperature, seed, request.max_tokens)
        recorder.add(req, str(number), request.prompt, how)

    def starting(original):
        def added(req, *args, **kwargs):
            original(req, *args, **kwargs)
            start(req, kwargs["seed"])

        return added

    def restored(req, saved, emitted):
        restore(req, saved, emitted)
        start(req, saved["owner"])

    state.add, state.add_serial, state.restore = starting(add), starting(add_serial), restored
    state.save = lambda req: save(req) | {"owner": owners[req]}
    state.remove = lambda req: (remove(req), recorder.remove(req))
    outcomes = simulated.decode(requests)
    recordings = recorder.take()
    assert recorder.take() == []
    recordings.sort(key=lambda recording: int(recording["id"]))
    assert [recording["id"] for recording in recordings] == [str(i) for i in range(len(requests))]
    return recordings, outcomes


def operations(recording):
    """(kind, rows) of the passes that decoded, each carrying one operation."""
    assert all(len(entry["operations"]) == 1 for entry in recording["passes"])
    return [
        (entry["operations"][0]["kind"], entry["rows"])
        for entry in recording["passes"]
        if entry["operations"][0]["kind"] in KINDS
    ]


def check_operations(recording, answer):
    """The reference's; it feeds the accepted tokens of an infill in each of its passes."""
    found = operations(recording)
    assert [kind for kind, _ in found] == [step.kind for step in answer.passes]
    for (kind, rows), step in zip(found, answer.passes):
        assert rows == step.width if kind in ("plan", "verify") else 0 < rows <= step.width


def committed(recording):
    return [pair for entry in recording["passes"] for pair in entry.get("committed", [])]


@pytest.mark.parametrize("weather", [None, Weather(8, ragged=True, truncate=0.2, preempt=0.1)])
def test_tells_the_reference_decoders_passes(model, reference, weather):
    """Kinds, widths, commit order and tokens of every pass; also after preemptions."""
    recordings, _ = record_simulated(model, list(REQUESTS.values()), weather)
    for name, recording in zip(REQUESTS, recordings, strict=True):
        answer = reference(name)
        check_operations(recording, answer)
        assert [list(pair) for pair in answer.committed.items()] == committed(recording)
        assert recording["prompt"] == REQUESTS[name].prompt
    kinds = {op["kind"] for r in recordings for p in r["passes"] for op in p["operations"]}
    assert kinds == KINDS | {"prefill"} | ({"replay", "idle"} if weather else set())


WEATHERS = {
    "fair": None,
    "drafts": Weather(riders=1.0),
    "cut": Weather(8, ragged=True, truncate=0.3, riders=0.7),
    "preempted": Weather(8, ragged=True, truncate=0.2, preempt=0.1, lose=0.05, riders=0.8),
}


@pytest.mark.parametrize("weather", WEATHERS.values(), ids=WEATHERS)
def test_serial_passes_tell_what_the_reference_decides(model, reference, weather):
    """All that is decided, with its probability, whatever was drafted."""
    requests = list(SERIAL.values()) + [REQUESTS["infill"]]
    recordings, outcomes = record_simulated(model, requests, weather)
    seen = set()
    for name, recording, outcome in zip(SERIAL, recordings, outcomes):
        answer = reference(name)
        picks = {}
        for entry in recording["passes"]:
            for operation in entry["operations"]:
                if operation["kind"] != "serial":
                    continue
                seen |= {key for key in ("tests", "drafts", "chains") if operation.get(key)}
                check_serial_pass(operation, entry, picks)
        assert outcome.tokens == answer.tokens
        assert [(p, *picks[p]) for p in sorted(picks)] == [
            (p, token, pytest.approx(chance, abs=1e-4)) for p, token, chance in answer.picks
        ]
        if weather is None or not weather.lose:
            assert committed(recording) == [[p, token] for p, token, _ in answer.picks]
        trace = {"model": "", "device": "", "vocabulary": Everything(), "requests": []}
        output = {"text": "", "tokens": answer.tokens, "pieces": list(map(str, answer.tokens))}
        request = {**recording, "output": output, "prompt": {"text": "", "tokens": []}}
        timeline = Timeline.of(trace, request)
        shown = [position.at(len(timeline.passes)) for position in timeline.positions]
        assert [event.text for event in shown if event.state == "committed"] == output["pieces"]
        assert {event.state for event in shown} <= {"committed", "dropped"}
    assert seen == {"tests", "drafts", "chains"}


class Everything(dict):
    """A vocabulary in which a token's text is its number."""

    def __missing__(self, key):
        return key


def check_serial_pass(operation, entry, picks):
    """Drafts are accepted up to the first that is not what is picked; notes the picks."""
    known = operation["picks"][0][0] if operation["picks"] else None
    accepted = [test for test in operation["tests"] if test[3]]
    refused = [test for test in operation["tests"] if not test[3]]
    assert operation["tests"] == accepted + refused and len(refused) <= 1
    assert entry.get("committed", []) == [pick[:2] for pick in operation["picks"]]
    assert [pick[0] for pick in operation["picks"]] == [
        known + i for i in range(len(operation["picks"]))
    ]
    for test, pick in zip(operation["tests"], operation["picks"]):
        assert test[0] == pick[0] and (test[1] == pick[1]) == test[3]
        assert not test[3] or test[2] == pick[2]
    for position, token, chance in operation["picks"]:
        assert picks.setdefault(position, (token, chance))[0] == token
    if operation.get("drafts"):
        assert operation["drafts"][0][0] == max(picks) + 1


def test_serial_passes_without_drafts_are_the_references(model, reference, monkeypatch):
    """One token a pass then, in position order: no draft is worth its price."""
    dear = Speculation(row_price=CERTAIN)
    monkeypatch.setattr(SimulatedEngine, "_speculation", lambda self: dear)
    recordings, _ = record_simulated(model, list(SERIAL.values()))
    for name, recording in zip(SERIAL, recordings):
        serial = [
            operation
            for entry in recording["passes"]
            for operation in entry["operations"]
            if operation["kind"] == "serial"
        ]
        assert not any(op["tests"] for op in serial)
        picks = [pick for op in serial for pick in op["picks"]]
        assert len(picks) == len(serial) == len(reference(name).tokens)
        assert committed(recording) == [pick[:2] for pick in picks]


def test_corrections_stand_where_tests_failed(model, reference):
    """The tokens of the reference, each in place of the one that failed in the same operation."""
    (recording,), _ = record_simulated(model, [REQUESTS["corrected"]])
    assert recording["parameters"]["infill"] == "correct"
    corrected, answer = {}, reference("corrected")
    for entry in recording["passes"]:
        for operation in entry["operations"]:
            refused = {p: t for p, t, _, accepted in operation.get("tests", ()) if not accepted}
            for position, token, _ in operation.get("corrections", ()):
                assert position in refused
                corrected[position] = token
    assert len(corrected) > 4
    assert {position: answer.committed[position] for position in corrected} == corrected
    assert any(
        not operation["tests"]
        for entry in recording["passes"]
        for operation in entry["operations"]
        if "tests" in operation
    )


def test_untraced_requests_are_left_alone(model):
    """They are not copied to the host: the recorder asks only which requests take part."""
    recorder = Recorder(SimulatedEngine(model, None).state)
    assert recorder.begin([0, 1]) is None and recorder.take() == []


@pytest.mark.parametrize("enabled", [False, True])
def test_only_an_engine_that_records_has_a_recorder(enabled, monkeypatch):
    monkeypatch.setattr(model_state, "get_tensor_model_parallel_rank", lambda: 0)
    made = object.__new__(ReFusionModelState)
    config = SimpleNamespace(
        additional_config={"refusion_trace": True} if enabled else {},
        diffusion_config=SimpleNamespace(canvas_length=8),
        model_config=SimpleNamespace(dtype=torch.float32, logprobs_mode="raw_logprobs"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
    )
    vars(made).update(
        vllm_config=config,
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(mask_token_id=9),
            get_vocab_size=lambda: 10,
            max_model_len=16,
        ),
        max_num_reqs=2,
        slack=16,
        device=torch.device("cpu"),
        operations=operations_of(torch.device("cpu")),
        recorder=None,
        publisher=None,
        limits=SimpleNamespace(vocab=10),
        penalties=None,
        records={},
        _req_of={},
        serial=set(),
        model=None,
    )
    states = SimpleNamespace(draft_tokens=torch.zeros(2, 8, dtype=torch.int64))
    sampler, _ = made.custom_sampler(SimpleNamespace(req_states=states, thinking_budget_state=None))
    assert sampler.recorder is made.recorder
    assert (made.recorder is None) is not enabled


def told(recording):
    """Plans; by slot, as slots may be a step ahead of each other, tests up to the first failure of
    each verification; corrections; proposals. Probabilities to 4 digits."""
    size = recording["parameters"]["slot_size"]
    plans, tests, corrections, proposals = [], {}, [], set()
    for entry in recording["passes"]:
        for operation in json.loads(json.dumps(entry["operations"]), parse_float=four_digits):
            if operation["kind"] == "plan":
                plans.append(operation)
            failed = set()
            for item in operation.get("tests", ()):
                slot, accepted = item[0] // size, item[3]
                if slot not in failed:
                    tests.setdefault(slot, []).append(item)
                failed |= set() if accepted else {slot}
            corrections += operation.get("corrections", [])
            proposals |= set(map(tuple, operation.get("proposals", ())))
    return [plans, sorted(tests.items()), sorted(corrections)], proposals


def four_digits(text):
    return round(float(text), 4)


def test_fused_passes_tell_the_same_operations(model):
    """The schedule changes which pass an operation is in, and nothing that the operations say."""
    requests = list(REQUESTS.values())
    plain, _ = record_simulated(model, requests)
    fused, _ = record_simulated(model, requests, Weather(riders=1.0))
    for one, other in zip(map(told, fused), map(told, plain), strict=True):
        assert one[0] == other[0]
        assert one[1] <= other[1]  # what is hardly needed may be left out
    assert [committed(recording) for recording in fused] == [committed(r) for r in plain]
    passes = [entry for recording in fused for entry in recording["passes"]]
    assert len(passes) < sum(len(recording["passes"]) for recording in plain)
    assert any(entry.get("rider_rows") for entry in passes)
    carried = {tuple(op["kind"] for op in entry["operations"]) for entry in passes}
    assert {("verify", "plan"), ("verify", "predict"), ("prefill", "plan")} <= carried


def test_old_recordings_are_dropped(model):
    recorder = Recorder(SimulatedEngine(model, None).state)
    for number in range(MAX_KEPT + 10):
        recorder.add(0, str(number), [1], {})
        recorder.remove(0)
    assert len(recorder._by_id) == MAX_KEPT


@pytest.fixture(scope="module")
def traced(tiny_checkpoint, dev_problems_file):
    """A trace of two word problems, and what else the engine said."""
    lines = dev_problems_file.read_text().splitlines()
    prompts = [json.loads(lines[number])["query"] for number in (2, 34)]
    options = {"skip_tokenizer_init": False, "max_model_len": 640, "max_num_batched_tokens": 4096}
    schedule = {"refusion_schedule": "plain"}  # one operation a pass, as in the reference
    options["additional_config"] = TRACING["additional_config"] | schedule
    params = DecodingParams(8, 64, 0.9, 0.5)
    sampling = SamplingParams(temperature=0, max_tokens=120, extra_args=options_of(params))
    with engine(tiny_checkpoint, **options) as llm:
        trace = record(llm, prompts, sampling)
        plain = TokensPrompt(prompt_token_ids=trace["requests"][0]["prompt"]["tokens"])
        (untraced,) = llm.generate(plain, sampling, use_tqdm=False)
        left = llm.collective_rpc("refusion_recordings")
        sampling.extra_args = {"mode": "serial", "slot_size": 8}
        serial = record(llm, prompts, sampling)
    return trace, untraced.outputs[0].token_ids, left, params, serial


def test_recorded_by_an_engine(traced, tiny_checkpoint):
    """Through vLLM: the reference's passes again, the schema, texts that make up the response."""
    trace, untraced, left, params, _ = traced
    jsonschema.validate(trace, SCHEMA)
    assert trace["model"] == "refusion-tiny"
    assert untraced == trace["requests"][0]["output"]["tokens"] and left == [[]]
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32").eval()
    for request in trace["requests"]:
        answer = decode(
            model,
            request["prompt"]["tokens"],
            params,
            mask_token_id=trace["mask_token_id"],
            eos_token_id=model.config.eos_token_id,
            max_tokens=120,
        )
        # the last tokens may be delivered before the passes that would commit them
        in_part = len(answer.tokens) % params.slot_size > 0
        passes = len(operations(request))
        assert passes == len(answer.passes) or (in_part and passes > 0.8 * len(answer.passes))
        check_operations(request, replace(answer, passes=answer.passes[:passes]))
        pairs, told = [list(pair) for pair in answer.committed.items()], committed(request)
        assert told == pairs[: len(told)]
        last_slot = len(answer.tokens) // params.slot_size
        assert {position // params.slot_size for position, _ in pairs[len(told) :]} <= {last_slot}
        assert request["output"]["tokens"] == answer.tokens
        assert sum(entry["delivered"] for entry in request["passes"]) == len(answer.tokens)
        assert all(entry["seconds"] > 0 for entry in request["passes"])
        pieces = request["output"]["pieces"]
        assert "".join(pieces).removesuffix("<|endoftext|>") == request["output"]["text"]
        timeline = Timeline.of(trace, request)
        assert timeline.decoding_passes == passes
        order = [position for position, _ in committed(request)]
        assert [p.kv for p in timeline.positions if p.kv is not None] == [
            order.index(position) for position in sorted(order)
        ]


def check_serial_trace(trace, folder, slot_start, drafts=True):
    """Each request's passes decide what the reference does; with drafts, fewer of them."""
    jsonschema.validate(trace, SCHEMA)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    for request in trace["requests"]:
        assert request["parameters"]["mode"] == "serial"
        answer = decode(
            model,
            request["prompt"]["tokens"],
            DecodingParams(8, 8, mode="serial", slot_start=slot_start),
            mask_token_id=trace["mask_token_id"],
            eos_token_id=model.config.eos_token_id,
            max_tokens=120,
        )
        serial = [
            (operation, entry)
            for entry in request["passes"]
            for operation in entry["operations"]
            if operation["kind"] == "serial"
        ]
        picks = {}
        for operation, entry in serial:
            check_serial_pass(operation, entry, picks)
        assert request["output"]["tokens"] == answer.tokens
        assert [(p, *picks[p]) for p in sorted(picks)] == [
            (p, token, pytest.approx(chance, abs=1e-3)) for p, token, chance in answer.picks
        ]
        assert (len(serial) < len(answer.tokens)) == drafts
        assert any(test[3] for operation, _ in serial for test in operation["tests"]) == drafts
        timeline = Timeline.of(trace, request)
        assert [place.kv for place in timeline.positions[: len(answer.tokens)]] == list(
            range(len(answer.tokens))
        )


def test_serial_mode_recorded_by_an_engine(traced, tiny_checkpoint):
    """With one operation a pass there are no drafts."""
    check_serial_trace(traced[-1], tiny_checkpoint, "mask", drafts=False)


def test_a_mask_adapter_recorded_by_an_engine(dev_problems_file):
    """The base's own tokens, and the adapter's drafts of them."""
    prompt = json.loads(dev_problems_file.read_text().splitlines()[2])["query"]
    options = {"skip_tokenizer_init": False, "max_model_len": 640, **TRACING}
    with engine(EXAMPLES / "stock-tiny-adapter", **options) as llm:
        trace = record(llm, [prompt], SamplingParams(temperature=0, max_tokens=120))
    check_serial_trace(trace, EXAMPLES / "stock-tiny", "next")


def test_certainties_are_what_choices_were_made_by(traced):
    """A slot is chosen iff it is certain enough; without one, the most certain is."""
    trace, _, _, params, _ = traced
    plans = [
        operation["slots"]
        for request in trace["requests"]
        for entry in request["passes"]
        for operation in entry["operations"]
        if operation["kind"] == "plan"
    ]
    assert len(plans) > 4
    for slots in plans:
        certain = [slot["certainty"] > params.slot_threshold for slot in slots]
        best = max(slots, key=lambda slot: slot["certainty"])
        chosen = [slot["chosen"] for slot in slots]
        assert chosen == (certain if any(certain) else [slot is best for slot in slots])


def test_accepted_tokens_passed_their_test(traced):
    """Untested are a slot's first token and one proposal of each infill round."""
    trace, _, _, params, _ = traced
    kinds = set()
    for request in trace["requests"]:
        for entry in request["passes"]:
            for operation in entry["operations"]:
                for position, _, probability, accepted in operation.get("tests", ()):
                    tested = probability is not None
                    kinds.add((operation["kind"], tested, accepted))
                    if tested and accepted:
                        assert probability > params.token_threshold
                    if operation["kind"] == "verify":
                        assert tested == bool(position % params.slot_size)
    assert kinds >= {
        ("verify", False, True),
        ("verify", True, True),
        ("verify", True, False),
        ("infill_verify", False, True),
        ("infill_verify", True, True),
    }
