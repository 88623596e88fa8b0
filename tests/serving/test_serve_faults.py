"""Bad input and broken engines behind a real server: errors that say what is wrong, never a 5xx."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import is_dataclass

import openai
import psutil
import pytest
from extremes import values
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from server import MODEL_NAME, STOP_SECONDS
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

from vllm_refusion.decoding.params import DecodingParams

SMALL = DecodingParams(8, 32)
SERIAL = DecodingParams(8, mode="serial")
INF, NAN, HUGE = float("inf"), float("nan"), 10**30
CHAT = {"messages": [{"role": "user", "content": "What is 2 + 3?"}]}


def post(server, path, body):
    """The response to a JSON body, NaN and lone surrogates included."""
    body = {"model": MODEL_NAME, "max_tokens": 4} | body
    return server.http.post(
        path, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )


def xargs(**values):
    return {"vllm_xargs": values}


@contextmanager
def healthy_requests(chat, reference, questions):
    """Streams answers of both modes meanwhile, in turn; each must be the reference's."""
    stop, wrong, right = threading.Event(), [], []
    expected = {params: reference.text(questions[1], params) for params in (SMALL, SERIAL)}

    def stream():
        for params in itertools.cycle(expected):
            if stop.is_set():
                break
            chunks = chat(questions[1], params, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            (right if text == expected[params] else wrong).append(text)

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        yield right
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert right


# What is sent, and the parameter that the answer must name.
BAD = {
    "xargs is a list": ({"vllm_xargs": [1]}, "vllm_xargs"),
    "xargs unknown": (xargs(slot_sise=8), "slot_sise"),
    "xargs null": (xargs(slot_size=None), "slot_size"),
    "xargs text": (xargs(slot_size="8"), "slot_size"),
    "xargs bool": (xargs(block_length=True), "block_length"),
    "xargs nested": (xargs(slot_size={"a": [1]}), "slot_size"),
    "xargs zero": (xargs(slot_size=0), "slot_size"),
    "xargs not a multiple": (xargs(slot_size=7), "block_length"),
    "xargs huge": (xargs(slot_size=HUGE), "extra_args"),
    "xargs 2**63": (xargs(block_length=2**63), "block_length"),
    "xargs NaN": (xargs(slot_threshold=NAN), "slot_threshold"),
    "xargs infinite": (xargs(token_threshold=INF), "token_threshold"),
    "xargs negative": (xargs(token_threshold=-0.5), "token_threshold"),
    "temperature NaN": ({"temperature": NAN}, "temperature"),
    "temperature huge": ({"temperature": 1e300}, "temperature"),
    "temperature text": ({"temperature": "hot"}, "temperature"),
    "top_p NaN": ({"top_p": NAN, "temperature": 1}, "top_p"),
    "top_p zero": ({"top_p": 0, "temperature": 1}, "top_p"),
    "top_k negative": ({"top_k": -5, "temperature": 1}, "top_k"),
    "min_p NaN": ({"min_p": NAN, "temperature": 1}, "min_p"),
    "seed huge": ({"seed": HUGE}, "seed"),
    "seed -2**63": ({"seed": -(2**63), "temperature": 1}, "seed"),
    "max_tokens zero": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens negative": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens huge": ({"max_tokens": HUGE}, "max_tokens"),
    "min_tokens negative": ({"min_tokens": -1}, "min_tokens"),
    "min_tokens above": ({"min_tokens": 9}, "min_tokens"),
    "n zero": ({"n": 0}, "n"),
    "n huge": ({"n": HUGE, "temperature": 1}, "n"),
    "penalty NaN": ({"presence_penalty": NAN}, "presence_penalty"),
    "structured outputs of a number": ({"structured_outputs": 5}, "structured_outputs"),
    "structured outputs of a list": ({"structured_outputs": [5]}, "structured_outputs"),
    "bias NaN": ({"logit_bias": {"5": NAN}}, "logit_bias"),
    "bias infinite": ({"logit_bias": {"5": INF}}, "logit_bias"),
    "bias of no token": ({"logit_bias": {"five": 1}}, "logit_bias"),
    "bias outside": ({"logit_bias": {"999999": 1}}, "logit_bias"),
    "allowed outside": ({"allowed_token_ids": [999999]}, "allowed_token_ids"),
    "allowed mask only": ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    "stop token outside": ({"stop_token_ids": [-3]}, "stop_token_ids"),
    "stop token huge": ({"stop_token_ids": [HUGE]}, "stop_token_ids"),
    "empty stop": ({"stop": [""]}, "stop"),
    "too many logprobs": ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    "mask token text": ({"messages": [{"role": "user", "content": "a <|mask|> b"}]}, "prompt"),
    "over the limit": ({"messages": [{"role": "user", "content": "word " * 600}]}, "length"),
    "1 MB": ({"messages": [{"role": "user", "content": "word " * 200_000}]}, "length"),
    "1 MB of one letter": ({"messages": [{"role": "user", "content": "a" * 2**20}]}, "length"),
    "no messages": ({"messages": None}, ""),
    "messages of text": ({"messages": "hello"}, "messages"),
    "broken unicode": ({"messages": [{"role": "user", "content": "a \ud800 b"}]}, ""),
}
BAD_PROMPTS = {
    "empty": ([], "prompt"),
    "empty text": ("", "prompt"),
    "null": (None, "prompt"),
    "outside": ([5, 999999], "out of"),
    "huge": ([HUGE], "vocabulary"),
    "negative": ([-1], "prompt"),
    "mask": ([5, 1, 7], "mask token"),
    "fractions": ([1.5, 2.5], "prompt"),
    "at the limit": ([7] * 512, "max_tokens"),
    "over the limit": ([7] * 513, "length"),
    "million tokens": ([7] * 1_000_000, "length"),
    "broken unicode": ("a \udfff b", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_chat(server, name):
    body, parameter = BAD[name]
    response = post(server, "/v1/chat/completions", CHAT | body)
    assert 400 <= response.status_code < 500, response.text[:500]
    assert parameter in response.text, response.text[:500]


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompt(server, name):
    prompt, parameter = BAD_PROMPTS[name]
    response = post(server, "/v1/completions", {"prompt": prompt})
    assert 400 <= response.status_code < 500, response.text[:500]
    assert parameter in response.text, response.text[:500]


def test_bad_bodies_of_completions(server):
    for body in ({"structured_outputs": 5}, {"logit_bias": {"5": NAN}}):
        response = post(server, "/v1/completions", {"prompt": "a"} | body)
        assert response.status_code == 400, response.text[:500]
        assert response.json()["error"]["param"] in body


# What every endpoint needs, and the same with the mask token in its prompt.
MASKED = [{"role": "user", "content": "a <|mask|> b"}]
ENDPOINTS = {
    "/v1/chat/completions": (ChatCompletionRequest, CHAT, {"messages": MASKED}),
    "/v1/completions": (CompletionRequest, {"prompt": [5, 6]}, {"prompt": [5, 1]}),
    "/v1/responses": (ResponsesRequest, {"input": "a"}, {"input": "a <|mask|> b"}),
    "/v1/messages": (AnthropicMessagesRequest, CHAT, {"messages": MASKED}),
    "/inference/v1/generate": (GenerateRequest, {"token_ids": [5, 6]}, {"token_ids": [5, 1]}),
    "/v1/chat/completions/batch": (
        BatchChatCompletionRequest,
        {"messages": [CHAT["messages"]] * 2},
        {"messages": [CHAT["messages"], MASKED]},
    ),
}
SHORT = {
    "/v1/responses": {"max_output_tokens": 4},
    "/inference/v1/generate": {"sampling_params": {"max_tokens": 4}},
}


def ask(server, path, body):
    """The response of an endpoint to a small request with ``body`` in it."""
    return post(server, path, ENDPOINTS[path][1] | SHORT.get(path, {}) | body)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_refused_streams(server, path):
    """A refused request that streams gets what one that does not gets: before the stream."""
    refused, streamed = (
        ask(server, path, ENDPOINTS[path][2] | {"stream": stream}) for stream in (False, True)
    )
    assert refused.status_code == streamed.status_code == 400, streamed.text[:500]
    error = streamed.json()["error"]
    assert error == refused.json()["error"]
    if not path.endswith("batch") or "mask token" in error["message"]:  # it may take no streams
        assert "prompt=1 is not supported: the prompt contains the mask token" in error["message"]


@pytest.mark.parametrize("bias", [NAN, INF, -INF])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_infinite_biases(server, path, bias):
    body = {"logit_bias": {"5": bias}}
    if path == "/inference/v1/generate":
        body = {"sampling_params": body}
    if path == "/v1/messages":  # has none
        return
    response = ask(server, path, body)
    assert response.status_code == 400 and "logit_bias" in response.text, response.text[:500]


FEW = {-(2**63) - 1, 2**63 - 1, 10**30}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("count", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_every_number_of_every_request(server, path, count):
    """Found by reflection, at the ends of its type: no 5xx, and the server goes on."""
    kind, small, _ = ENDPOINTS[path]
    before = ask(server, path, {}).text
    assert ask(server, path, {}).status_code == 200, before[:500]
    failures, statuses = [], set()
    for name, field in kind.model_fields.items():
        for value in values(field.annotation):
            if name in small or count == "few" and not FEW & set(numbers_in(value)):
                continue
            if is_dataclass(value) or hasattr(value, "__struct_fields__"):
                continue
            response = ask(server, path, {name: value})
            statuses.add(response.status_code)
            if response.status_code >= 500:
                failures.append((name, value, response.text[:200]))
    assert not failures, failures[:5]
    assert 400 in statuses
    assert ask(server, path, {}).status_code == 200


def numbers_in(value):
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return [number for one in value for number in numbers_in(one)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("seed, n", [(2**63 - 1, 2), (2**63 - 2, 2), (2**63 - 2, 3), (-3, 3)])
def test_seeds_of_several_answers(server, path, seed, n):
    """vLLM gives the i-th answer seed + i, which the engine must be able to hold."""
    body = {"seed": seed, "n": n, "temperature": 1}
    response = ask(server, path, body)
    fits = seed + n - 1 < 2**63 or path == "/v1/responses"  # has no n
    assert response.status_code == (200 if fits else 400), response.text[:500]
    assert fits or f"seed={seed}" in response.text
    assert ask(server, path, {}).status_code == 200


def test_longest_prompt(server, complete, reference):
    """One token less than the limit leaves room for one token."""
    response = complete([7] * 511, SMALL, max_tokens=1)
    assert response.choices[0].token_ids == reference([7] * 511, SMALL, 1).tokens


def test_broken_json(server):
    for content in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "served", "messages": 1e9999}',
    ):
        for path in ("/v1/chat/completions", "/v1/completions"):
            response = server.http.post(
                path, content=content, headers={"Content-Type": "application/json"}
            )
            assert 400 <= response.status_code < 500, (content, response.text[:500])


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 40),
    st.integers(),
    st.sampled_from([2**31, 2**32, 2**63, -(2**63), 2**64, HUGE, -HUGE]),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.lists(st.integers(-2, 4000), max_size=4),
    st.lists(st.text(max_size=4), max_size=3),
    st.dictionaries(
        st.sampled_from(["5", "x", "type", "slot_size"]), st.integers(-2, 9), max_size=2
    ),
)
FIELDS = (
    "temperature top_p top_k min_p seed n stop stop_token_ids max_tokens min_tokens logprobs "
    "top_logprobs logit_bias allowed_token_ids bad_words presence_penalty repetition_penalty "
    "frequency_penalty logprob_token_ids "
    "prompt_logprobs echo stream stream_options ignore_eos skip_special_tokens response_format "
    "structured_outputs return_token_ids include_stop_str_in_output vllm_xargs best_of "
    "truncate_prompt_tokens use_beam_search length_penalty priority add_special_tokens "
    "return_tokens_as_token_ids tools tool_choice suffix user repetition_detection"
).split()
XARGS = st.dictionaries(
    st.sampled_from(["slot_size", "block_length", "slot_threshold", "token_threshold", "other"]),
    VALUES,
    max_size=3,
)
# serial mode has penalties, and structured outputs
IN_SERIAL = st.just({"mode": "serial"})
DECODING = (
    st.none()
    | XARGS
    | IN_SERIAL
    | st.builds(lambda *parts: {**parts[0], **parts[1]}, XARGS, IN_SERIAL)
)
CONSTRAINTS = st.sampled_from(
    [
        {"regex": "[ab]{2,9}c"},
        {"regex": "(("},
        {"choice": ["yes", "no"]},
        {"choice": []},
        {"json": {"type": "object", "properties": {"x": {"type": "integer"}}}},
        {"json": {"type": "nothing"}},
        {"json": "{"},
        {"json_object": True},
        {"grammar": 'root ::= "a" | "b" root'},
        {"grammar": "root ::="},
        {"structural_tag": "{}"},
    ]
)
TOKENS = st.integers(0, 3327)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("f", "g")
]
# what most requests say, in whatever combination: limits may contradict each other and grammars
PLAUSIBLE = {
    "temperature": st.sampled_from([0, 0.7, 1.5]),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(0, 50),
    "min_p": st.floats(0, 1),
    "seed": st.integers(0, 2**40),
    "n": st.integers(1, 3),
    "stop": st.sampled_from(["a", ["e", "."]]),
    "stop_token_ids": st.lists(TOKENS, max_size=4),
    "max_tokens": st.integers(1, 24),
    "min_tokens": st.integers(0, 24),
    "logit_bias": st.dictionaries(TOKENS.map(str), st.floats(-100, 100), max_size=3),
    "allowed_token_ids": st.lists(TOKENS, min_size=1, max_size=40),
    "bad_words": st.lists(st.sampled_from(["a", "the", "yes", "is the", "{", '"']), max_size=3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "logprobs": st.sampled_from([True, 0, 1, 5]),
    "top_logprobs": st.integers(0, 5),
    "logprob_token_ids": st.lists(TOKENS, max_size=4),
    "prompt_logprobs": st.integers(0, 3),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "ignore_eos": st.booleans(),
    "tools": st.just(TOOLS),
    "tool_choice": st.sampled_from(
        ["auto", "none", "required", {"type": "function", "function": {"name": "g"}}]
    ),
}


@st.composite
def plausible_bodies(draw):
    names = draw(st.lists(st.sampled_from(sorted(PLAUSIBLE)), unique=True, max_size=6))
    return {name: draw(PLAUSIBLE[name]) for name in names}


BODIES = plausible_bodies() | st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)
PROMPTS = st.one_of(st.just([5, 6, 7]), st.text(max_size=20), VALUES)


def failed(response) -> bool:
    """Whether a response is a 5xx, or a stream that ends in one."""
    if response.status_code >= 500:
        return True
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        return False
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return any("error" in json.loads(event) for event in events)


@pytest.mark.parametrize(
    "examples", [60, pytest.param(5000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_fuzz(server, chat, reference, questions, examples, capsys):
    """No body whatever gives a 5xx, and requests beside it do not notice."""
    fuzzed = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        body=BODIES,
        decoding=DECODING,
        constraint=st.none() | CONSTRAINTS,
        prompt=PROMPTS,
        to_chat=st.booleans(),
    )
    def fuzz(body, decoding, constraint, prompt, to_chat):
        if constraint is not None:
            body = body | {"structured_outputs": constraint}
            decoding = (decoding or {}) | {"mode": "serial"}
        if decoding is not None:
            body = body | {"vllm_xargs": decoding}
        if to_chat:
            body = CHAT | body
        path = "/v1/chat/completions" if to_chat else "/v1/completions"
        fuzzed.append((path, {"prompt": prompt} | body))

    fuzz()
    with healthy_requests(chat, reference, questions) as answered, ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda one: post(server, *one), fuzzed))
    statuses = Counter(response.status_code for response in responses)
    with capsys.disabled():
        print(f"\nfuzzed bodies by status: {statuses}; right answers meanwhile: {len(answered)}")
    failures = [
        (*one, response.text[-300:])
        for one, response in zip(fuzzed, responses, strict=True)
        if failed(response)
    ]
    assert not failures, failures[:5]
    assert statuses[200] and statuses[400]


def test_logs_hold_no_prompts_and_no_answers(server, chat, reference, questions):
    """At the default level; neither those of requests that are refused."""
    secret = "xylophone quartz marmalade"
    bad = [
        CHAT | {"messages": [{"role": "user", "content": f"{secret} <|mask|>"}]},
        CHAT | {"messages": [{"role": "user", "content": f"{secret} " * 200}]},
        CHAT | {"messages": [{"role": "user", "content": secret}], "presence_penalty": 1},
        {"messages": {"role": "user", "content": secret}},
        {"messages": [{"role": secret, "content": secret}], "max_tokens": secret},
    ]
    for body in bad:
        assert 400 <= post(server, "/v1/chat/completions", body).status_code < 500
    answered = post(
        server, "/v1/chat/completions", {"messages": [{"role": "user", "content": secret}]}
    )
    assert answered.status_code == 200
    text = chat(questions[1], SMALL).choices[0].message.content
    log = server.log.read_text()
    assert "POST /v1/chat/completions" in log
    for private in (*secret.split(), questions[1], text, text[:40]):
        assert private not in log


def test_a_killed_engine_ends_the_server_and_its_clients_requests(server, chat, questions):
    """The last test. Nobody hangs: clients get an error, and the server exits as vLLM's does."""
    stream = chat(questions[1], SMALL, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(iter(stream))
    engines = [child for child in server.children() if "EngineCore" in " ".join(child.cmdline())]
    for child in engines or server.children():
        child.kill()
    started = time.monotonic()
    with pytest.raises((openai.APIError, Exception)) as error:
        for _ in stream:
            pass
        raise AssertionError("the stream ended as if it were complete")
    assert not isinstance(error.value, AssertionError)
    with pytest.raises(openai.APIError):
        chat(questions[1], max_tokens=4)
    assert server.process.wait(STOP_SECONDS) is not None
    assert time.monotonic() - started < STOP_SECONDS
    _, alive = psutil.wait_procs(engines, timeout=STOP_SECONDS)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
