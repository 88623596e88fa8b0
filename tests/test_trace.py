"""Traces tell what the reference decoder did, whatever happens to the request meanwhile."""

from __future__ import annotations

import json
from functools import cache

import jsonschema
import pytest
from simulated_engine import Operations, Request, SimulatedEngine, Weather
from transformers import AutoModelForCausalLM
from vllm.exceptions import VLLMValidationError

import conformance
from engine import NARROW, engine, run
from vllm_refusion.config import DecodingParams
from vllm_refusion.reference import decode
from vllm_refusion.trace import Recorder
from vllm_refusion.triton_kernels.stats_reference import token_stats_reference
from vllm_refusion.triton_kernels.transition_reference import (
    layout_reference,
    transition_reference,
)

EOS = 9
REQUESTS = {
    "several_slots": Request([3, 1, 4], DecodingParams(8, 32, 0.2, 0.4), 50, None, 0.7),
    "infill": Request([5, 9, 2, 6], DecodingParams(4, 16, 0.2, 0.4), 40, None, 1.5, 7),
    "eos": Request([1, 2], DecodingParams(2, 8, 0.1, 0.02), 40, EOS),
    "eos_in_infill": Request([7, 7, 1], DecodingParams(8, 16, 0.2, 0.2), 40, 13),
    "single_slots": Request([8, 3], DecodingParams(4, 4, 0.3, 0.02), 21),
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


def record(model, requests: list[Request], weather: Weather | None = None):
    """Recordings of requests decoded at once, in the order of the requests."""
    twins = Operations(layout_reference, token_stats_reference, transition_reference)
    simulated = SimulatedEngine(model, twins, weather=weather, seed=1)
    recorder = Recorder(simulated.state)
    simulated.operations = twins._replace(transition=recorder.around(transition_reference))
    state, owners, names = simulated.state, {}, iter(range(len(requests)))
    add, save, restore, remove = state.add, state.save, state.restore, state.remove

    def start(slot, name):
        owners[slot] = name
        recorder.add(slot, name, requests[int(name)].prompt)

    def added(slot, *args, **kwargs):
        add(slot, *args, **kwargs)
        start(slot, str(next(names)))

    def restored(slot, saved, emitted):
        restore(slot, saved, emitted)
        start(slot, saved["name"])

    state.add, state.restore = added, restored
    state.save = lambda slot: save(slot) | {"name": owners[slot]}
    state.remove = lambda slot: (remove(slot), recorder.remove(slot))
    outcomes = simulated.decode(requests)
    recordings = recorder.take()
    assert recorder.take() == []
    assert [recording["id"] for recording in recordings] == [str(i) for i in range(len(requests))]
    return recordings, outcomes


def operations(recording):
    """(kind, rows) of the passes that decoded."""
    return [
        (entry["operations"][0]["kind"], entry["rows"])
        for entry in recording["passes"]
        if entry["operations"][0]["kind"] in KINDS
    ]


def committed(recording):
    return [pair for entry in recording["passes"] for pair in entry.get("committed", [])]


@pytest.mark.parametrize("weather", [None, Weather(8, ragged=True, truncate=0.2, preempt=0.1)])
def test_tells_the_reference_decoders_passes(model, reference, weather):
    """Kinds, widths, commit order and tokens of every pass; also after preemptions."""
    recordings, _ = record(model, list(REQUESTS.values()), weather)
    for name, recording in zip(REQUESTS, recordings, strict=True):
        answer = reference(name)
        assert operations(recording) == list(answer.passes)
        assert [list(pair) for pair in answer.committed.items()] == committed(recording)
        assert recording["prompt"] == REQUESTS[name].prompt
    kinds = {op["kind"] for r in recordings for p in r["passes"] for op in p["operations"]}
    assert kinds == KINDS | {"prefill"} | ({"replay", "idle"} if weather else set())
