"""The tiny checkpoint behind a real server, over HTTP: the reference decoder's answers."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import openai
import psutil
import pytest
import torch
from server import MODEL_NAME, STOP_SECONDS, serve
from transformers import AutoTokenizer

from conformance import Case, expected
from vllm_refusion.config import DecodingParams
from vllm_refusion.reference import Decoded

DEFAULTS = DecodingParams(32, 128, 0.9, 0.4)
SMALL = DecodingParams(8, 32)
PRESETS = pytest.mark.parametrize("params", [DEFAULTS, SMALL], ids=["defaults", "small slots"])


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    with serve(tiny_checkpoint, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def chat(server):
    """Sends a question; further arguments as of the client, ``params`` as vllm_xargs."""

    def send(question: str, params: DecodingParams = DEFAULTS, **options):
        return server.client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": question}],
            extra_body=extras(params) | options.pop("extra_body", {}),
            **{"max_tokens": 200} | options,
        )

    return send


@pytest.fixture(scope="module")
def complete(server):
    """Sends a prompt of token ids to the completions endpoint."""

    def send(prompt: list[int], params: DecodingParams = DEFAULTS, **options):
        return server.client.completions.create(
            model=MODEL_NAME, prompt=prompt, extra_body=extras(params), **options
        )

    return send


def extras(params: DecodingParams) -> dict:
    """``params`` as far as they are not the server's defaults, and the wish for token ids."""
    changed = {k: v for k, v in asdict(params).items() if v != getattr(DEFAULTS, k)}
    return {"return_token_ids": True} | ({"vllm_xargs": changed} if changed else {})


@pytest.fixture(scope="module")
def questions(dev_problems_file):
    return [json.loads(line)["query"] for line in dev_problems_file.read_text().splitlines()]


class Reference:
    """Expected answers; each is decoded once."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.known = {}

    def prompt(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    def __call__(self, prompt, params=DEFAULTS, max_tokens=200, **options) -> Decoded:
        prompt = self.prompt(prompt) if isinstance(prompt, str) else prompt
        case = Case("", tuple(prompt), params, max_tokens, **options)
        if case not in self.known:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
            (answer,) = expected(self.checkpoint, [case])
            torch.set_num_threads(threads)
            near = min(answer.threshold_margin, answer.argmax_margin)
            assert near > 1e-3, "a near tie: the answer may depend on the machine"
            self.known[case] = answer
        return self.known[case]

    def text(self, *args, **options) -> str:
        tokens = self(*args, **options).tokens
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    return Reference(tiny_checkpoint)


def test_health_and_name(server):
    assert server.http.get("/health").status_code == 200
    assert [model.id for model in server.client.models.list()] == [MODEL_NAME]


def test_the_engine_has_its_own_process(server):
    """Else this file would not show that the plugin reaches all processes of a server."""
    assert server.children()


@PRESETS
@pytest.mark.parametrize("number", [1, 2])
def test_chat(chat, reference, questions, number, params):
    response = chat(questions[number], params)
    prompt, answer = reference.prompt(questions[number]), reference(questions[number], params)
    assert response.prompt_token_ids == prompt
    (choice,) = response.choices
    assert choice.token_ids == answer.tokens
    assert choice.message.content == reference.text(questions[number], params)
    assert choice.finish_reason == "stop"
    assert response.usage.prompt_tokens == len(prompt)
    assert response.usage.completion_tokens == len(answer.tokens)


@PRESETS
def test_completion_of_token_ids(complete, reference, params):
    prompt = random.Random(0).choices(range(3, 3000), k=20)
    response = complete(prompt, params, max_tokens=40)
    answer = reference(prompt, params, 40)
    (choice,) = response.choices
    assert choice.token_ids == answer.tokens
    assert choice.text == reference.text(prompt, params, 40)
    assert choice.finish_reason == ("length" if len(answer.tokens) == 40 else "stop")
    assert response.usage.completion_tokens == len(answer.tokens)


@PRESETS
def test_streaming(chat, reference, questions, params):
    question = questions[1]
    chunks = list(chat(question, params, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    choices = [chunk.choices[0] for chunk in chunks]
    tokens = [token for choice in choices for token in getattr(choice, "token_ids", None) or ()]
    answer = reference(question, params)
    assert tokens == answer.tokens
    texts = [choice.delta.content for choice in choices if choice.delta.content]
    assert "".join(texts) == reference.text(question, params)
    assert len(texts) >= len(answer.tokens) / params.block_length, "blocks come as they are ready"
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert not last.choices
    assert last.usage.completion_tokens == len(answer.tokens)
    assert last.usage.prompt_tokens == len(reference.prompt(question))


def test_concurrent_requests(chat, reference, questions):
    """All that the batch holds at once, each with its own parameters."""
    requests = [(question, params) for question in questions[1:5] for params in (DEFAULTS, SMALL)]
    with ThreadPoolExecutor(len(requests)) as pool:
        responses = list(pool.map(lambda request: chat(*request), requests))
    for (question, params), response in zip(requests, responses, strict=True):
        assert response.choices[0].token_ids == reference(question, params).tokens


REFUSED = pytest.mark.parametrize(
    ("parameter", "value", "options"),
    [
        ("slot_sise", "8", {"extra_body": {"vllm_xargs": {"slot_sise": 8}}}),
        ("slot_size", "'8'", {"extra_body": {"vllm_xargs": {"slot_size": "8"}}}),
        ("slot_threshold", "1.5", {"extra_body": {"vllm_xargs": {"slot_threshold": 1.5}}}),
        ("block_length", "4096", {"extra_body": {"vllm_xargs": {"block_length": 4096}}}),
        ("top_p", "0.5", {"top_p": 0.5, "temperature": 1}),
        ("logprobs", "2", {"logprobs": True, "top_logprobs": 2}),
        ("logit_bias", "{5: 1.0}", {"logit_bias": {"5": 1}}),
        ("prompt", "1", {"question": "What is <|mask|>?"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)


@REFUSED
def test_refused(chat, parameter, value, options):
    with pytest.raises(openai.BadRequestError) as error:
        chat(**{"question": "What is 2 + 3?"} | options)
    assert error.value.status_code == 400
    assert error.value.param == parameter
    assert f"{parameter}={value} is not supported" in str(error.value)


def test_refused_token_ids(complete):
    with pytest.raises(openai.BadRequestError, match="prompt=1 .*mask token"):
        complete([5, 1, 7], max_tokens=8)


def test_refused_while_another_request_streams(chat, reference, questions):
    """The stream goes on. A refused request that streams gets its error as its only event."""
    stream = chat(questions[1], SMALL, stream=True)
    texts = []
    for chunk in stream:
        texts.append(chunk.choices[0].delta.content or "")
        if len(texts) == 2:
            with pytest.raises(openai.BadRequestError, match="slot_sise=8"):
                chat(questions[1], extra_body={"vllm_xargs": {"slot_sise": 8}})
            refused = chat(questions[1], stream=True, extra_body={"vllm_xargs": {"slot_sise": 8}})
            with pytest.raises(openai.APIError, match="slot_sise=8") as error:
                next(iter(refused))
            assert error.value.param == "slot_sise"
    assert len(texts) > 2
    assert "".join(texts) == reference.text(questions[1], SMALL)


def test_client_that_hangs_up(chat, reference, questions):
    """Its request ends; the same request again, beside another, is answered as ever."""
    with chat(questions[2], SMALL, stream=True) as stream:
        next(iter(stream))
    other = chat(questions[1], stream=True)
    again = chat(questions[2], SMALL)
    assert again.choices[0].token_ids == reference(questions[2], SMALL).tokens
    text = "".join(chunk.choices[0].delta.content or "" for chunk in other)
    assert text == reference.text(questions[1])


@pytest.mark.parametrize("streamed", [False, True], ids=["at once", "streamed"])
@pytest.mark.parametrize("included", [False, True], ids=["cut before", "cut after"])
def test_stop_string(chat, reference, questions, streamed, included):
    """A string over several tokens, found in the middle of a block."""
    stop = "third 16 sec"
    whole = reference.text(questions[1], SMALL)
    end = whole.index(stop) + len(stop) * included
    response = chat(
        questions[1], SMALL, stop=[stop], stream=streamed,
        extra_body={"include_stop_str_in_output": included},
    )  # fmt: skip
    if streamed:
        choices = [chunk.choices[0] for chunk in response]
        text = "".join(choice.delta.content or "" for choice in choices)
        (*_, last) = choices
    else:
        (last,) = response.choices
        text = last.message.content
    assert text == whole[:end]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)


def test_one_token(chat, reference, questions):
    response = chat(questions[1], max_tokens=1)
    (choice,) = response.choices
    assert choice.token_ids == reference(questions[1], max_tokens=1).tokens
    assert choice.finish_reason == "length"
    assert response.usage.completion_tokens == 1


def test_seeded_samples(complete, reference):
    """``n`` samples with seed s are those of the seeds s, s + 1, .., every time."""
    prompt = random.Random(0).choices(range(3, 3000), k=20)
    sampling = {"temperature": 0.8, "max_tokens": 40}
    answers = [reference(prompt, SMALL, 40, temperature=0.8, seed=seed).tokens for seed in (7, 8)]
    assert answers[0] != answers[1]
    for _ in range(2):
        response = complete(prompt, SMALL, n=2, seed=7, **sampling)
        assert [choice.token_ids for choice in response.choices] == answers


def test_stops_on_sigterm(server):
    """The last test: it stops the server."""
    children = server.children()
    assert server.terminate() == 0
    _, alive = psutil.wait_procs(children, timeout=STOP_SECONDS)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(openai.APIConnectionError):
        server.client.models.list()
