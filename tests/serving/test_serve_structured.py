"""Structured outputs over HTTP: every endpoint, every kind, forced tools; streamed or not."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from grammars import KINDS, SCHEMA
from server import MODEL_NAME, serve

QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
# not strict, arguments are any JSON: without an end in a model that knows none
TOOL = {"name": "count_the_apples", "description": "Counts.", "parameters": SCHEMA, "strict": True}
OTHER = {
    "name": "say_it",
    "description": "Says.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"word": {"enum": ["yes", "no"]}},
        "required": ["word"],
        "additionalProperties": False,
    },
}
FUNCTIONS = [{"type": "function", "function": one} for one in (TOOL, OTHER)]
JSON_SCHEMA = {"name": "answer", "schema": SCHEMA, "strict": True}
FORMAT = {"type": "json_schema", "json_schema": JSON_SCHEMA}
LETTER_T = 57  # its token
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
SCHEMAS = {
    CHAT: {"messages": QUESTION, "max_tokens": 100, "response_format": FORMAT},
    COMPLETIONS: {"prompt": "2 + 3 =", "max_tokens": 100, "response_format": FORMAT},
    RESPONSES: {
        "input": "What is 2 + 3?",
        "max_output_tokens": 100,
        "text": {"format": {"type": "json_schema", **JSON_SCHEMA}},
    },
    MESSAGES: {
        "messages": QUESTION,
        "max_tokens": 100,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    },
}


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    options = ["--override-generation-config", '{"mode": "serial"}']
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    config = {"backend": "xgrammar", "disable_any_whitespace": True}
    options += ["--structured-outputs-config", json.dumps(config)]
    with serve(tiny_checkpoint, tmp_path_factory.mktemp("server"), *options) as server:
        yield server


@pytest.fixture
def send(server):
    def post(path, body):
        common = {"model": MODEL_NAME, "temperature": 0}
        return server.http.post(path, json=common | body)

    return post


def events(response) -> list[dict]:
    lines = response.text.splitlines()
    data = [line[6:] for line in lines if line.startswith("data: ") and line != "data: [DONE]"]
    return [json.loads(one) for one in data]


def text_of(path: str, response) -> str:
    assert response.status_code == 200, response.text[:500]
    body = response.json()
    if path == CHAT:
        return body["choices"][0]["message"]["content"]
    if path == COMPLETIONS:
        return body["choices"][0]["text"]
    if path == RESPONSES:
        return body["output"][0]["content"][0]["text"]
    return body["content"][0]["text"]


def streamed_text(path: str, response) -> str:
    assert response.status_code == 200, response.text[:500]
    parts = []
    for event in events(response):
        if path == CHAT:
            parts += [choice["delta"].get("content") for choice in event["choices"]]
        elif path == COMPLETIONS:
            parts += [choice["text"] for choice in event["choices"]]
        elif path == RESPONSES:
            parts += [event["delta"]] if event["type"] == "response.output_text.delta" else []
        elif event["type"] == "content_block_delta":
            parts.append(event["delta"].get("text"))
    return "".join(part or "" for part in parts)


@pytest.mark.parametrize("path", SCHEMAS)
def test_a_schema(send, path):
    text = text_of(path, send(path, SCHEMAS[path]))
    jsonschema.validate(json.loads(text), SCHEMA)
    assert streamed_text(path, send(path, SCHEMAS[path] | {"stream": True})) == text


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(send, kind):
    """Chat and completions; all at once as each alone, beside requests without a grammar."""
    asked = [
        (CHAT, {"messages": QUESTION, "max_tokens": 60, "structured_outputs": KINDS[kind]}),
        (COMPLETIONS, {"prompt": "2 + 3 =", "max_tokens": 60, "structured_outputs": KINDS[kind]}),
        (COMPLETIONS, {"prompt": "2 + 3 =", "max_tokens": 60}),
    ]
    alone = [text_of(path, send(path, body)) for path, body in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: text_of(one[0], send(*one)), asked))
    assert together == alone
    if kind == "choice":
        assert set(alone[:2]) <= set(KINDS[kind]["choice"])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("streamed", [False, True], ids=["at once", "streamed"])
def test_limits_that_leave_nothing(send, path, streamed):
    """The response ends: complete if the grammar may end there, else cut."""
    asked = {
        CHAT: {"messages": QUESTION, "logprobs": True, "top_logprobs": 1},
        COMPLETIONS: {"prompt": "2 + 3 =", "logprobs": 1, "echo": True},
    }[path] | {"stream": streamed, "max_tokens": 60}
    choices = KINDS["choice"]["choice"]
    before = asked.get("prompt", "")
    for more, reason, texts in (
        ({"structured_outputs": KINDS["choice"], "min_tokens": 40}, "stop", choices),
        (
            {"structured_outputs": KINDS["regex"], "allowed_token_ids": [0, LETTER_T]},
            "abort",
            ["T"],
        ),
    ):
        response = send(path, asked | more)
        text = (streamed_text if streamed else text_of)(path, response)
        assert text.removeprefix(before) in texts
        chunks = events(response) if streamed else [response.json()]
        reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        assert reasons[-1] == reason


def test_any_json(send):
    body = {"messages": QUESTION, "max_tokens": 40, "response_format": {"type": "json_object"}}
    assert text_of(CHAT, send(CHAT, body)).startswith("{")


@pytest.fixture(scope="module")
def no_spaces(tokenizer) -> dict[str, float]:
    """A bias against the whitespace that tags allow between any tokens of JSON."""
    return {
        str(token): -100 for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()
    }


def call_of(message: dict) -> tuple[str, dict]:
    (call,) = message["tool_calls"]
    return call["function"]["name"], json.loads(call["function"]["arguments"])


NAMED = {"type": "function", "function": {"name": TOOL["name"]}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_tool(send, choice, no_spaces):
    body = {"messages": QUESTION, "max_tokens": 150, "tools": FUNCTIONS, "tool_choice": choice}
    body["logit_bias"] = no_spaces
    response = send(CHAT, body)
    assert response.status_code == 200, response.text[:500]
    (chosen,) = response.json()["choices"]
    name, arguments = call_of(chosen["message"])
    (tool,) = (one for one in (TOOL, OTHER) if one["name"] == name)
    jsonschema.validate(arguments, tool["parameters"])
    assert choice == "required" or name == TOOL["name"]

    streamed = events(send(CHAT, body | {"stream": True}))
    calls = [
        call["function"]
        for event in streamed
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls") or ()
    ]
    assert "".join(call.get("name") or "" for call in calls) == name
    assert json.loads("".join(call.get("arguments") or "" for call in calls)) == arguments


def test_strict_tools_may_be_left_alone(send):
    body = {"messages": QUESTION, "max_tokens": 60, "tools": FUNCTIONS}
    assert send(CHAT, body).status_code == 200


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": TOOL["name"]}], ids=["any", "named"]
)
def test_a_forced_tool_of_messages(send, choice):
    tools = [
        {"name": one["name"], "input_schema": one["parameters"], "strict": True}
        for one in (TOOL, OTHER)
    ]
    body = {"messages": QUESTION, "max_tokens": 40, "tools": tools, "tool_choice": choice}
    response = send(MESSAGES, body | {"stream": True})
    assert response.status_code == 200, response.text[:500]
    starts = [event for event in events(response) if event["type"] == "content_block_start"]
    (use,) = (one["content_block"] for one in starts if one["content_block"]["type"] == "tool_use")
    allowed = {TOOL["name"]} if "name" in choice else {TOOL["name"], OTHER["name"]}
    assert use["name"] in allowed


def test_a_forced_tool_of_responses(send, no_spaces):
    tools = [{"type": "function", **one} for one in (TOOL, OTHER)]
    body = {"input": "What is 2 + 3?", "max_output_tokens": 150, "tools": tools}
    response = send(RESPONSES, body | {"tool_choice": "required", "logit_bias": no_spaces})
    assert response.status_code == 200, response.text[:500]
    (call,) = (one for one in response.json()["output"] if one["type"] == "function_call")
    (tool,) = (one for one in (TOOL, OTHER) if one["name"] == call["name"])
    jsonschema.validate(json.loads(call["arguments"]), tool["parameters"])


def broken(path: str, schema) -> dict:
    """The body of ``SCHEMAS`` with another schema."""
    return json.loads(json.dumps(SCHEMAS[path]).replace(json.dumps(SCHEMA), json.dumps(schema)))


@pytest.mark.parametrize("path", SCHEMAS)
@pytest.mark.parametrize("streamed", [False, True], ids=["at once", "streamed"])
def test_a_grammar_that_does_not_compile(send, path, streamed):
    """HTTP 400 in the endpoint's format, before a stream begins; the server goes on."""
    for schema in ({"type": "nothing"}, {"type": "integer", "minimum": 9, "maximum": 1}):
        response = send(path, broken(path, schema) | {"stream": streamed})
        assert response.status_code == 400, response.text[:500]
        assert response.json()["error"]["message"]
    if path in (CHAT, COMPLETIONS):
        for constraint in ({"grammar": "root ::= nothing"}, {"regex": "(("}, {"choice": []}):
            body = SCHEMAS[path] | {"stream": streamed, "structured_outputs": constraint}
            del body["response_format"]
            assert send(path, body).status_code == 400
    assert send(path, SCHEMAS[path]).status_code == 200


@pytest.mark.parametrize("streamed", [False, True], ids=["at once", "streamed"])
def test_parallel_mode_says_why_it_refuses(send, streamed):
    parallel = {"vllm_xargs": {"mode": "parallel"}, "stream": streamed}
    forced = {"tools": FUNCTIONS, "tool_choice": "required"}
    for body in (
        SCHEMAS[CHAT],
        {"messages": QUESTION} | forced,
        {"messages": QUESTION, "structured_outputs": KINDS["regex"]},
    ):
        response = send(CHAT, body | parallel)
        assert response.status_code == 400, response.text[:500]
        error = response.json()["error"]
        assert error["param"] == "structured_outputs"
        assert "mode='parallel' drafts slots before the text" in error["message"]
        assert "allowed is None, or mode='serial'" in error["message"]
    response = send(COMPLETIONS, SCHEMAS[COMPLETIONS] | parallel)
    assert response.status_code == 400 and "structured_outputs" in response.text
