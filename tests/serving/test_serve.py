"""The tiny checkpoint behind a real server, over HTTP: the reference decoder's answers."""

from __future__ import annotations

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
import torch
from server import DEFAULTS, MODEL_NAME, STOP_SECONDS
from transformers import AutoModelForCausalLM

from vllm_refusion.decoding.params import DecodingParams

DOCS = Path(__file__).parents[2] / "docs"
SMALL = DecodingParams(8, 32)
PRESETS = pytest.mark.parametrize("params", [DEFAULTS, SMALL], ids=["defaults", "small slots"])


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


def test_streaming_completion(complete, reference):
    prompt = random.Random(0).choices(range(3, 3000), k=20)
    choices = [chunk.choices[0] for chunk in complete(prompt, SMALL, max_tokens=40, stream=True)]
    answer = reference(prompt, SMALL, 40)
    assert [token for choice in choices for token in choice.token_ids or ()] == answer.tokens
    assert "".join(choice.text for choice in choices) == reference.text(prompt, SMALL, 40)


SERIAL = DecodingParams(8, mode="serial")


def test_penalties_of_serial_mode(chat, reference, questions):
    openai_has = {"presence_penalty": 1.5, "frequency_penalty": 2.0}
    vllm_has = {"repetition_penalty": 2.5}
    options = openai_has | {"max_tokens": 60, "extra_body": vllm_has}
    answer = reference(questions[1], SERIAL, 60, **openai_has, **vllm_has)
    assert chat(questions[1], SERIAL, **options).choices[0].token_ids == answer.tokens
    assert answer.tokens != reference(questions[1], SERIAL, 60).tokens


@pytest.mark.parametrize("params", [SMALL, SERIAL], ids=["parallel", "serial"])
def test_echo_with_logprobs(complete, reference, params):
    """What lm-eval's likelihood tasks ask for: a prompt's rows are the backbone's own."""
    prompt = random.Random(0).choices(range(3, 3000), k=40)
    model = AutoModelForCausalLM.from_pretrained(reference.checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        rows = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    (choice,) = complete(prompt, params, max_tokens=1, echo=True, logprobs=2).choices
    first, *others = choice.logprobs.token_logprobs[: len(prompt)]
    assert first is None and len(choice.logprobs.token_logprobs) == len(prompt) + 1
    expected = rows[range(len(prompt) - 1), prompt[1:]].tolist()
    assert others == pytest.approx(expected, abs=1e-3)
    assert choice.token_ids == reference(prompt, params, 1).tokens


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
        ("presence_penalty", "0.5", {"presence_penalty": 0.5}),
        ("repetition_penalty", "1.5", {"extra_body": {"repetition_penalty": 1.5}}),
        (
            "structured_outputs",
            "StructuredOutputsParams(",
            {"extra_body": {"structured_outputs": {"choice": ["a", "b"]}}},
        ),
        (
            "structured_outputs",
            "StructuredOutputsParams(",
            {"response_format": {"type": "json_object"}},
        ),
        (
            "structured_outputs",
            "StructuredOutputsParams(",
            {"extra_body": {"structured_outputs": {"regex": "a+"}}},
        ),
        (
            "structured_outputs",
            "StructuredOutputsParams(",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "object"}},
                }
            },
        ),
        ("bad_words", "['several words']", {"extra_body": {"bad_words": ["several words"]}}),
        ("use_beam_search", "True", {"n": 2, "extra_body": {"use_beam_search": True}}),
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
    assert f"{parameter}={value}" in str(error.value)
    assert "is not supported" in str(error.value)


def test_forced_tool(chat):
    """Without a parser for tool calls vLLM itself refuses it, else as structured output."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    choice = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="tool_choice|structured_outputs"):
        chat("What is 2 + 3?", tools=[tool], tool_choice=choice)


def test_refused_token_ids(complete):
    with pytest.raises(openai.BadRequestError, match="prompt=1 .*mask token"):
        complete([5, 1, 7], max_tokens=8)


def test_refused_while_another_request_streams(chat, reference, questions):
    """The stream goes on. A refused request that streams gets its error before any event."""
    stream = chat(questions[1], SMALL, stream=True)
    texts = []
    for chunk in stream:
        texts.append(chunk.choices[0].delta.content or "")
        if len(texts) == 2:
            with pytest.raises(openai.BadRequestError, match="slot_sise=8"):
                chat(questions[1], extra_body={"vllm_xargs": {"slot_sise": 8}})
            with pytest.raises(openai.BadRequestError, match="slot_sise=8") as error:
                chat(questions[1], stream=True, extra_body={"vllm_xargs": {"slot_sise": 8}})
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


@pytest.mark.parametrize("border", [8, 32], ids=["slots", "blocks"])
@pytest.mark.parametrize("streamed", [False, True], ids=["at once", "streamed"])
def test_stop_string_across_borders(chat, reference, questions, border, streamed):
    tokens, whole = reference(questions[1], SMALL).tokens, reference.text(questions[1], SMALL)
    stop = reference.tokenizer.decode(tokens[border - 2 : border + 2])
    assert reference.tokenizer.decode(tokens[:border]).find(stop) < 0, "it ends behind the border"
    response = chat(questions[1], SMALL, stop=[stop], stream=streamed)
    if streamed:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in response)
    else:
        text = response.choices[0].message.content
    assert text == whole[: whole.index(stop)]


def test_stop_token_ids(chat, reference, questions):
    stop = reference(questions[1], SMALL).tokens[20]
    answer = reference(questions[1], SMALL, stop_token_ids=(stop,))
    response = chat(questions[1], SMALL, extra_body={"stop_token_ids": [stop]})
    assert response.choices[0].token_ids == answer.tokens
    assert (response.choices[0].finish_reason, response.choices[0].stop_reason) == ("stop", stop)
    assert response.usage.completion_tokens == len(answer.tokens) <= 21


def test_min_tokens(chat, reference, questions):
    least = len(reference(questions[1], SMALL).tokens) + 5
    answer = reference(questions[1], SMALL, min_tokens=least)
    response = chat(questions[1], SMALL, extra_body={"min_tokens": least})
    assert response.choices[0].token_ids == answer.tokens
    assert len(answer.tokens) >= least


LIMITS = pytest.mark.parametrize(
    "limits",
    [
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 4, "min_p": 0.1},
        {"logit_bias": ((226, -100.0), (24, 3.0))},
        {"allowed_token_ids": tuple(range(300, 400))},
    ],
    ids=lambda limits: " ".join(limits),
)


@LIMITS
def test_limits_of_picks(complete, reference, limits):
    prompt = random.Random(5).choices(range(3, 3000), k=20)  # none of the answers is a near tie
    answer = reference(prompt, SMALL, 40, seed=5, **limits)
    plain = reference(prompt, SMALL, 40, seed=5, temperature=limits.get("temperature", 0.0))
    assert answer.tokens != plain.tokens, "the limits have an effect"
    sent = {name: dict(v) if name == "logit_bias" else v for name, v in limits.items()}
    response = complete(prompt, SMALL, max_tokens=40, seed=5, extra_body=sent)
    assert response.choices[0].token_ids == answer.tokens


def test_bad_word(chat, reference, questions):
    """A word of the answer that is one token with and without a space before it."""
    answer, tokenizer = reference(questions[1], SMALL), reference.tokenizer
    word, tokens = next(
        (text, tokens)
        for text in map(str.strip, map(tokenizer.decode, answer.tokens))
        if text and len(tokens := tokenizer.encode(text, add_special_tokens=False)) == 1
        and tokens[0] in answer.tokens
    )  # fmt: skip
    response = chat(questions[1], SMALL, extra_body={"bad_words": [word]})
    assert tokens[0] not in response.choices[0].token_ids


@pytest.mark.parametrize("streamed", [False, True], ids=["at once", "streamed"])
def test_logprobs(chat, reference, questions, streamed):
    answer = reference(questions[1], SMALL, logprobs=2)
    response = chat(questions[1], SMALL, logprobs=True, top_logprobs=2, stream=streamed)
    choices = [part.choices[0] for part in response] if streamed else response.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert len(entries) == len(answer.tokens)
    for token, entry, wanted in zip(answer.tokens, entries, answer.logprobs, strict=True):
        assert entry.logprob == pytest.approx(wanted[token], abs=1e-3)
        likely = sorted(wanted.values(), reverse=True)[:2]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(likely, abs=1e-3)


def test_echo(complete, reference, questions):
    text = questions[3]
    prompt = reference.tokenizer.encode(text, add_special_tokens=False)
    # with return_token_ids vLLM echoes the prompt's token ids only
    echo = {"echo": True, "return_token_ids": False}
    response = complete(text, SMALL, max_tokens=20, extra_body=echo)
    assert response.choices[0].text == text + reference.text(prompt, SMALL, 20)


def test_several_turns(chat, reference, questions):
    """The prefix cache holds the prompts; an answer's text comes back as part of the next one."""
    messages = []
    for turn in range(3):
        messages.append({"role": "user", "content": questions[turn]})
        response = chat(messages, SMALL, max_tokens=60)
        assert response.prompt_token_ids == reference.prompt(messages)
        assert response.choices[0].token_ids == reference(messages, SMALL, 60).tokens
        cached = response.usage.prompt_tokens_details.cached_tokens
        assert (cached > 0) == (turn > 0), "of the prompt of the turn before"
        messages.append({"role": "assistant", "content": response.choices[0].message.content})


def counters(server):
    """The totals of decoding by name, those of passes by kind, once no more is to come."""
    seen = None
    while True:
        lines = server.http.get("/metrics").text.splitlines()
        shown = [line.rsplit(" ", 1) for line in lines if line.startswith("vllm:refusion_")]
        values = {name: float(value) for name, value in shown if "_created" not in name}
        if values == seen:
            return values
        seen = values
        time.sleep(2.5)  # more than two intervals of the server's figures


def passes(values):
    kinds = ("plan", "verify", "predict", "infill_verify")
    return sum(
        values.get(f'vllm:refusion_passes_total{{kind="{kind}",model_name="{MODEL_NAME}"}}', 0)
        for kind in kinds
    )


def test_dashboard_asks_for_metrics_that_are_there(server, chat, questions):
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"vllm:\w+", query)}
    kinds = {kind for query in queries for found in re.findall(r'kind=~"(.*?)"', query)
             for kind in found.split("|")}  # fmt: skip
    assert len(asked) > 12 and len(kinds) == 5
    chat(questions[0])
    for _ in range(100):  # figures are fetched every second
        text = server.http.get("/metrics").text
        missing = {name for name in asked if f"\n{name}{{" not in text}
        missing |= {kind for kind in kinds if f'kind="{kind}"' not in text}
        if not missing:
            return
        time.sleep(0.1)
    raise AssertionError(missing)


@pytest.mark.parametrize("streamed", [False, True], ids=["at once", "streamed"])
def test_metrics(server, chat, questions, streamed):
    """Counters of the device appear among vLLM's; a response has its request's share of them."""
    before = counters(server)
    usage = {"stream": True, "stream_options": {"include_usage": True}} if streamed else {}
    response = chat(questions[1], SMALL, **usage)
    if streamed:
        (*_, response) = response
    after = counters(server)
    tokens = f'vllm:refusion_tokens_total{{model_name="{MODEL_NAME}"}}'
    assert after[tokens] - before.get(tokens, 0) == response.usage.completion_tokens
    made = passes(after) - passes(before)
    assert made > 0
    assert response.metrics["forward_passes"] == made
    assert response.metrics["tokens_per_forward"] == response.usage.completion_tokens / made
    assert response.metrics["time_to_first_token_ms"] > 0
    assert not response.metrics.get("speculative_decoding")
    assert "spec_decode" not in server.http.get("/metrics").text


def test_several_choices_have_no_figures_of_one_request(complete):
    response = complete([5, 6, 7], SMALL, n=2, temperature=0.8, max_tokens=8)
    assert getattr(response, "metrics", None) is None


def test_stops_on_sigterm(server):
    """The last test: it stops the server."""
    children = server.children()
    assert server.terminate() == 0
    _, alive = psutil.wait_procs(children, timeout=STOP_SECONDS)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(openai.APIConnectionError):
        server.client.models.list()
