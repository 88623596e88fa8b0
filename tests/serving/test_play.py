"""The live page's routes of a real server, and the page in a browser in front of one."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from server import MODEL_NAME, free_port, serve

from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.viewer.play import API, PAGE, STOCK_KEY_ENV, _may_ask

KEY = {"Authorization": "Bearer sekret"}
MODES = {
    "parallel": {"mode": "parallel", "slot_size": 8, "block_length": 32},
    "serial": {"mode": "serial", "slot_size": 8},
    "tokens": {"mode": "serial", "slot_size": 8, "drafts": 0},
}
SERIAL = DecodingParams(8, 128, mode="serial")


def options(port):
    """The server is its own other one."""
    config = {"refusion_play": {"stock_url": f"http://127.0.0.1:{port}"}}
    return ["--additional-config", json.dumps(config), "--api-key", "sekret"]


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    port = free_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(STOCK_KEY_ENV, "sekret")
        folder = tmp_path_factory.mktemp("play")
        with serve(tiny_checkpoint, folder, *options(port), port=port) as server:
            yield server


def events(server, prompt, max_tokens=200, **ask):
    """[seconds since the start, name, data] of a request's events."""
    start = time.monotonic()
    body = {"prompt": prompt, "max_tokens": max_tokens, **ask}
    with server.http.stream("POST", API, json=body, headers=KEY) as response:
        assert response.status_code == 200, response.read()
        name = None
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield time.monotonic() - start, name, json.loads(line[6:])


def played(found):
    """What a page makes of the events: the text in position order, and the passes."""
    pieces, passes = {}, []
    for _, name, data in found:
        assert name != "error", data
        if "pass" in data:
            passes.append(data["pass"])
        for number, news in data.get("positions", {}).items():
            if "text" in news:
                pieces[int(number)] = news["text"]
    assert sorted(pieces) == list(range(found[-1][2]["delivered"]))
    return "".join(pieces[i] for i in range(len(pieces))), passes


def test_the_page_is_open_and_all_else_asks_for_the_key(server):
    page = server.http.get(PAGE)
    assert page.status_code == 200 and "sekret" not in page.text
    assert server.http.get(API).status_code == 401
    assert server.http.post(API, json={"prompt": "a"}).status_code == 401
    about = server.http.get(API, headers=KEY).json()
    assert about["model"] == MODEL_NAME and about["modes"] == ["parallel", "serial"]


@pytest.mark.parametrize("mode", MODES)
def test_passes_stream_while_the_request_runs(server, reference, questions, mode):
    """And make up the answer that the reference gives."""
    found = list(events(server, questions[1], parameters=MODES[mode]))
    text, passes = played(found)
    params = DecodingParams(8, 32) if mode == "parallel" else SERIAL
    answer = reference(questions[1], params, 200)
    whole = reference.tokenizer.decode(answer.tokens)
    assert text == whole
    decoding = [entry for entry in passes if entry["decodes"]]
    committed = [position for entry in passes for position in entry["committed"]]
    assert set(range(len(answer.tokens))) <= set(committed)
    if mode == "tokens":
        assert [len(entry["committed"]) for entry in passes[1:]] == [1] * len(decoding)
    else:
        assert len(decoding) < len(answer.tokens)
    assert found[0][1] == "start" and found[-1][1] == "end"
    assert found[-1][2]["finish_reason"] == "stop"
    with_pass = [when for when, _, data in found if "pass" in data]
    # all at the end they would be read in a tenth of a millisecond each
    assert with_pass[-1] - with_pass[0] > 0.001 * len(with_pass)


def test_another_servers_model(server, chat, questions):
    found = list(events(server, questions[1], stock=True))
    text, passes = played(found)
    assert found[0][2]["model"] == MODEL_NAME
    assert text == chat(questions[1], max_tokens=200).choices[0].message.content
    assert all(entry["kinds"] == ["token"] for entry in passes)


@pytest.fixture(scope="module")
def chat(server):
    def send(question, **options):
        return server.client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            extra_headers=KEY,
            **options,
        )

    return send


def test_several_at_once(server, reference, questions):
    with ThreadPoolExecutor(4) as pool:
        asked = [(questions[i], MODES[mode]) for i in (1, 2) for mode in ("parallel", "serial")]
        found = pool.map(lambda a: list(events(server, a[0], parameters=a[1])), asked)
        for (question, parameters), one in zip(asked, found):
            params = SERIAL if parameters["mode"] == "serial" else DecodingParams(8, 32)
            answer = reference(question, params, 200)
            assert played(one)[0] == reference.tokenizer.decode(answer.tokens)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"parameters": {"slot_sise": 8}}, "slot_sise=8"),
        ({"parameters": {"mode": "serial", "block_length": 8}}, "block_length=8"),
        ({"parameters": {"drafts": 0}}, "drafts=False"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"mood": "good"}, "mood"),
    ],
    ids=lambda value: str(value),
)
def test_refusals_name_the_parameter(server, ask, message):
    response = server.http.post(API, json={"prompt": "a"} | ask, headers=KEY)
    assert response.status_code in (400, 422) and message in response.text


def running(server):
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:num_requests_running{"))


def test_a_client_that_leaves_ends_its_request(server, questions):
    """The engine works for nobody then."""
    stream = events(server, questions[0], 400, parameters=MODES["tokens"], temperature=1.0)
    for _ in range(6):
        next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    time.sleep(1.5)  # figures come each second
    while running(server):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert played(list(events(server, questions[1], parameters=MODES["serial"])))[0]


@pytest.mark.parametrize(
    ("host", "client", "allowed"),
    [
        (None, "127.0.0.1", True),
        (None, "::1", True),
        (None, "::ffff:127.0.0.1", True),
        (None, "192.168.1.2", False),
        ("0.0.0.0", "192.168.1.2", True),
        (None, "", True),
    ],
)
def test_only_this_machine_unless_told_otherwise(host, client, allowed):
    state = SimpleNamespace(args=SimpleNamespace(host=host))
    request = SimpleNamespace(app=SimpleNamespace(state=state), client=SimpleNamespace(host=client))
    assert _may_ask(request) == allowed


@pytest.mark.slow
def test_the_page_outlives_its_engine(tiny_checkpoint, tmp_path, chromium):
    """In a browser: it answers, is stopped, says that the engine died, and finds the next one."""
    port = free_port()
    config = ["--additional-config", '{"refusion_play": true}']
    tab = chromium.new_page()
    errors = []
    tab.on("pageerror", lambda error: errors.append(error))

    def run(most):
        tab.locator("#max_tokens").fill(str(most))
        tab.locator("#run").click()

    def states():
        return tab.locator(".lane .state").all_inner_texts()

    with serve(tiny_checkpoint, tmp_path, *config, port=port) as server:
        tab.goto(f"http://127.0.0.1:{port}{PAGE}")
        tab.locator("#run:enabled").wait_for()
        tab.evaluate("setSizes(8, 64); showValues()")
        run(96)
        tab.locator("#controls:enabled").wait_for(timeout=60_000)
        assert all(state.startswith("done") for state in states())
        serial, tokens = (
            tab.locator(".lane .text").nth(i).locator(".token.committed").all_text_contents()
            for i in (1, 2)
        )
        assert serial == tokens and "".join(serial).strip()
        tab.locator("#temperature").fill("1")
        run(400)
        tab.locator(".lane .token.committed").nth(3).wait_for()
        tab.locator("#stop").click()
        tab.locator("#run:enabled").wait_for()
        assert "stopped" in states()
        run(400)
        tab.locator(".lane").nth(2).locator(".token.committed").nth(3).wait_for()
        for process in server.children():
            process.kill()
        tab.locator("#controls:enabled").wait_for(timeout=60_000)
        assert set(states()) & {"failed", "broken off"}
    tab.locator("#status[data-state=gone]").wait_for(timeout=20_000)
    with serve(tiny_checkpoint, tmp_path, *config, port=port):
        tab.locator("#status[data-state=ready]").wait_for(timeout=20_000)
        tab.locator("#temperature").fill("0")
        run(96)
        tab.locator("#controls:enabled").wait_for(timeout=60_000)
        assert all(state.startswith("done") for state in states())
    tab.close()
    assert not errors
