"""Traces tell what the reference decoder did, whatever happens to the request meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
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
from vllm_refusion.decoding.trace import MAX_KEPT, Recorder
from vllm_refusion.engine.model_state import ReFusionModelState
from vllm_refusion.triton_kernels.dispatch import operations as operations_of
from vllm_refusion.triton_kernels.layout_twin import layout_twin
from vllm_refusion.triton_kernels.token_stats_twin import token_stats_twin
from vllm_refusion.triton_kernels.transition_twin import transition_twin
from vllm_refusion.viewer.record import TRACING, record
from vllm_refusion.viewer.timeline import Timeline

EOS = 9
REQUESTS = {
    "several_slots": Request([3, 1, 4], DecodingParams(4, 16, 0.2, 0.4), 24, None, 0.7),
    "infill": Request([5, 9, 2, 6], DecodingParams(4, 16, 0.2, 0.4), 20, None, 1.5, 7),
    "eos": Request([1, 2], DecodingParams(2, 8, 0.1, 0.02), 24, EOS),
    "all_accepted": Request([4, 4], DecodingParams(2, 8, 0.0, 0.0), 22),
    "single_slots": Request([8, 3], DecodingParams(4, 4, 0.3, 0.02), 11),
    "corrected": Request([6, 2], DecodingParams(4, 16, 0.2, 0.4, infill="correct"), 20, None, 1.5),
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
        request = REQUESTS[name]
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
    """Recordings of requests decoded at once, in the order of the requests."""
    twins = Operations(layout_twin, token_stats_twin, transition_twin)
    simulated = SimulatedEngine(model, twins, weather=weather, seed=1)
    recorder = Recorder(simulated.state)
    simulated.operations = twins._replace(transition=recorder.around(transition_twin))
    state, owners, names = simulated.state, {}, iter(range(len(requests)))
    add, save, restore, remove = state.add, state.save, state.restore, state.remove

    def start(req, name):
        owners[req] = name
        recorder.add(req, name, requests[int(name)].prompt)

    def added(req, *args, **kwargs):
        add(req, *args, **kwargs)
        start(req, str(next(names)))

    def restored(req, saved, emitted):
        restore(req, saved, emitted)
        start(req, saved["name"])

    state.add, state.restore = added, restored
    state.save = lambda req: save(req) | {"name": owners[req]}
    state.remove = lambda req: (remove(req), recorder.remove(req))
    outcomes = simulated.decode(requests)
    recordings = recorder.take()
    assert recorder.take() == []
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
    state = SimulatedEngine(model, None).state
    recorder = Recorder(state)
    calls = []
    recorder.around(lambda state, idx_mapping: calls.append(idx_mapping))(state, None)
    assert calls == [None] and recorder.take() == []


@pytest.mark.parametrize("enabled", [False, True])
def test_only_an_engine_that_records_has_the_recorder_in_its_steps(enabled):
    """Elsewhere the sampler calls the transition itself."""
    made = object.__new__(ReFusionModelState)
    original = operations_of(torch.device("cpu"))
    config = SimpleNamespace(
        additional_config={"refusion_trace": True} if enabled else {},
        diffusion_config=SimpleNamespace(canvas_length=8),
        model_config=SimpleNamespace(dtype=torch.float32),
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
        operations=original,
        recorder=None,
        limits=SimpleNamespace(vocab=10),
        records={},
        _req_of={},
        serial=set(),
        model=None,
    )
    states = SimpleNamespace(draft_tokens=torch.zeros(2, 8, dtype=torch.int64))
    sampler, _ = made.custom_sampler(SimpleNamespace(req_states=states))
    assert (sampler.operations.transition is original.transition) is not enabled
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
        recorder.add(0, str(number), [1])
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
    return trace, untraced.outputs[0].token_ids, left, params


def test_recorded_by_an_engine(traced, tiny_checkpoint):
    """Through vLLM: the reference's passes again, the schema, texts that make up the response."""
    trace, untraced, left, params = traced
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


def test_certainties_are_what_choices_were_made_by(traced):
    """A slot is chosen iff it is certain enough; without one, the most certain is."""
    trace, _, _, params = traced
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
    trace, _, _, params = traced
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
