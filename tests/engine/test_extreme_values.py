"""No number in a request ends the engine: each is answered, or refused by the name of its field.

The fields are found by reflection, so that a new one of vLLM's is seen.
"""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
from extremes import FLOATS, INTS, values
from vllm import SamplingParams, TokensPrompt
from vllm.exceptions import VLLMClientError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from conformance import build_model
from engine import engine
from vllm_refusion.decoding.params import OPTION_NAMES

SMALL = {"max_tokens": 3, "temperature": 1.0, "seed": 3}
MODES = ("parallel", "serial")
MAX_N = 3


def sampling_fields() -> dict[str, list[Any]]:
    hints = typing.get_type_hints(SamplingParams, include_extras=False)
    own = {name: hint for name, hint in hints.items() if name in SamplingParams.__struct_fields__}
    return {name: found for name, hint in own.items() if (found := values(hint))}


FIELDS = sampling_fields()
TOGETHER = {
    "lengths": [{"min_tokens": n, "max_tokens": n, "stop_token_ids": [5]} for n in INTS if n > 0],
    "seeds": [{"seed": seed, "n": n} for seed in INTS for n in (2, MAX_N)],
    "biases": [{"logit_bias": {5: b, 6: b, 7: -b}, "temperature": 0.01} for b in FLOATS],
    "greedy biases": [{"logit_bias": {5: b}, "temperature": 0} for b in FLOATS],
    "penalties": [
        {"repetition_penalty": r, "logit_bias": {5: b, 6: -b}, "logprobs": 1}
        for r in (1e-6, 1e6)
        for b in FLOATS
    ],
    "cuts": [{"logit_bias": {5: b}, "min_p": 1.0, "top_p": 1e-9} for b in FLOATS],
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """An engine whose requests travel as they do to one in another process."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_MAX_N_SEQUENCES", str(MAX_N))
    model = build_model("qwen3-gqa2", tmp_path_factory.mktemp("model"))
    narrow = {
        "diffusion_config": {"canvas_length": 8},
        "override_generation_config": {"slot_size": 4, "block_length": 8},
    }
    with engine(model, max_model_len=16, max_num_batched_tokens=64, max_num_seqs=4, **narrow) as it:
        core = it.llm_engine.engine_core
        add, encoder, decoder = (
            core.add_request,
            MsgpackEncoder(),
            MsgpackDecoder(EngineCoreRequest),
        )
        patch.setattr(core, "add_request", lambda one: add(decoder.decode(encoder.encode(one))))
        it.answers = [ask(it, params_of(mode)) for mode in MODES]
        yield it
    patch.undo()


def params_of(mode="parallel", **params) -> SamplingParams | None:
    """None for what vLLM itself refuses before any engine sees it."""
    params = {"extra_args": {}} | params
    if params["extra_args"] is not None:
        params["extra_args"] = {"mode": mode} | params["extra_args"]
    try:
        return SamplingParams(**SMALL | params, detokenize=False)
    except (VLLMClientError, ValueError, TypeError, OverflowError):
        return None


def ask(llm, params, prompt=(5, 6, 7)) -> list[list[int]]:
    prompt = TokensPrompt(prompt_token_ids=list(prompt))
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    return [list(answer.token_ids) for answer in output.outputs]


def assert_survives(llm, requests, names) -> int:
    """How many of the requests were answered; the engine answers as ever behind them."""
    answered = 0
    for request in requests:
        try:
            answers = request()
        except (VLLMClientError, ValueError) as error:
            assert any(name in str(error) for name in names), (names, str(error))
        else:
            answered += 1
            assert all(0 <= token < 113 for tokens in answers for token in tokens)
        assert not llm.llm_engine.has_unfinished_requests()
    assert [ask(llm, params_of(mode)) for mode in MODES] == llm.answers
    return answered


@pytest.mark.parametrize("name", [name for name in FIELDS if not name.startswith("_")])
@pytest.mark.parametrize("mode", MODES)
def test_every_field_of_sampling_params(llm, name, mode):
    admitted = filter(None, (params_of(mode, **{name: value}) for value in FIELDS[name]))
    requests = [lambda p=params: ask(llm, p) for params in admitted]
    parts = {"max_pattern_size", "min_pattern_size", "min_count"}  # of repetition_detection
    assert_survives(llm, requests, {name, *OPTION_NAMES, *parts})


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("mode", MODES)
def test_fields_that_act_together(llm, name, mode):
    admitted = filter(None, (params_of(mode, **params) for params in TOGETHER[name]))
    requests = [lambda p=params: ask(llm, p) for params in admitted]
    names = {key for params in TOGETHER[name] for key in params}
    all_refused = name == "penalties" and mode == "parallel"
    assert bool(assert_survives(llm, requests, names)) is not all_refused


def test_every_argument_of_a_request(llm):
    """Numbers beside the sampling parameters: priority, arrival time and whatever comes."""
    hints = typing.get_type_hints(LLMEngine.add_request)
    names = set(inspect.signature(LLMEngine.add_request).parameters) & hints.keys()
    numbers = {name: values(hints[name]) for name in names - {"prompt", "params"}}
    assert numbers["priority"] and numbers["arrival_time"]

    def asking(name, value):
        def ask_with() -> list[list[int]]:
            prompt = TokensPrompt(prompt_token_ids=[5, 6, 7])
            prompt = llm.renderer.render_cmpl([prompt])[0]
            llm.llm_engine.add_request("one", prompt, params_of(), **{name: value})
            tokens = []
            while llm.llm_engine.has_unfinished_requests():
                tokens += [list(o.outputs[0].token_ids) for o in llm.llm_engine.step()]
            return tokens

        return ask_with

    for name, found in numbers.items():
        assert_survives(llm, [asking(name, value) for value in found], {name})


def test_every_token_of_a_prompt(llm):
    requests = [lambda v=value: ask(llm, params_of(), (5, v, 7)) for value in INTS]
    assert assert_survives(llm, requests, {"prompt", "token", "Token"}) == 2  # tokens 0 and 1


def test_children_of_the_largest_seed(llm):
    """The last child's seed is the largest that a worker can hold."""
    last = 2**63 - 1
    first, second = ask(llm, params_of(seed=last - 1, n=2))
    assert [first, second] == [*ask(llm, params_of(seed=last - 1)), *ask(llm, params_of(seed=last))]
    with pytest.raises(
        VLLMClientError, match=f"seed={last} .*allowed is an integer in .*{last - 1}]"
    ):
        ask(llm, params_of(seed=last, n=2))
