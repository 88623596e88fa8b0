"""The live page in Chromium, against a server that plays synthetic traces."""

from __future__ import annotations

import threading
import time

import pytest
from page_server import PageServer
from synthetic_trace import ENGLISH, synthetic_serial_trace, synthetic_trace
from test_viewer_page import ARABIC, CHINESE

from vllm_refusion.cli import build_parser
from vllm_refusion.viewer import play_command
from vllm_refusion.viewer.timeline import Timeline

LANES = ("Parallel", "Serial", "Token by token", "Stock, token by token")


@pytest.fixture(scope="module")
def running_server():
    server = PageServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running_server):
    running_server.pieces, running_server.delay, running_server.key = ENGLISH, 0.0, None
    running_server.asked.clear()
    return running_server


@pytest.fixture
def visit(chromium, server):
    """Opens the page; fails on any script error and any request to another place."""
    errors, tabs = [], []

    def open_page(width=1280, scheme="light", slots=(8, 32), ready=True):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        tab = context.new_page()
        tabs.append(tab)
        tab.on("pageerror", lambda error: errors.append(error))
        tab.on("request", lambda request: note(request.url))
        tab.goto(server.url)
        if ready:
            tab.locator("#run:enabled").wait_for()
            tab.evaluate(f"setSizes({slots[0]}, {slots[1]}); showValues()")
        return tab

    def note(url):
        if not url.startswith((server.url.partition("/refusion")[0], "data:")):
            errors.append(url)

    yield open_page
    for tab in tabs:
        tab.context.close()
    assert not errors


def lane(tab, name):
    """A lane by its exact name."""
    return tab.locator(".lane").filter(has=tab.locator(f".name:text-is('{name}')"))


def texts(tab, name):
    return lane(tab, name).locator(".text .token:not(.dropped, .cut)").all_text_contents()


def states(tab, name):
    spans = lane(tab, name).locator(".text .token")
    return spans.evaluate_all("all => all.map(s => [...s.classList].filter(c => c !== 'slot')[1])")


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run(tab):
    tab.locator("#run").click()
    done(tab)


def done(tab):
    tab.locator("#controls:enabled").wait_for(timeout=60_000)


def test_typing_a_prompt_and_watching_all_lanes(visit, server):
    tab = visit()
    tab.locator("#prompt").fill("How much is left?")
    tab.locator("#seed").fill("7")
    run(tab)
    for name in LANES:
        assert texts(tab, name) == ENGLISH
        assert lane(tab, name).locator(".state").inner_text() == "done"
        assert lane(tab, name).locator(".count").inner_text() == str(len(ENGLISH))
    per_forward = [float(lane(tab, n).locator(".per-forward").inner_text()) for n in LANES]
    assert per_forward[0] > 1 and per_forward[1] > 1 and per_forward[2:] == [1, 1]
    asked = sorted(server.asked, key=lambda body: len(str(body)))
    assert {body["prompt"] for body in asked} == {"How much is left?"}
    assert {body["seed"] for body in asked} == {7}
    stock, serial, tokens, parallel = asked
    assert stock["stock"] and "parameters" not in stock
    assert serial["parameters"] == {"mode": "serial", "slot_size": 8}
    assert tokens["parameters"] == {"mode": "serial", "slot_size": 8, "drafts": 0}
    assert parallel["parameters"] == {
        "mode": "parallel",
        "slot_size": 8,
        "block_length": 32,
        "slot_threshold": 0.9,
        "token_threshold": 0.4,
    }


def test_tokens_come_while_the_request_runs(visit, server):
    """Drafts, accepted and committed tokens, and figures, before the end."""
    server.pieces, server.delay = ENGLISH * 3, 0.1
    tab = visit()
    tab.locator("#run").click()
    lane(tab, "Parallel").locator(".token.committed").first.wait_for()
    lane(tab, "Serial").locator(".token.draft").first.wait_for()
    assert lane(tab, "Parallel").locator(".state").inner_text() == "decoding"
    assert float(lane(tab, "Parallel").locator(".per-forward").inner_text()) > 0
    tab.locator("#stop").click()
    done(tab)


def test_stopping_in_mid_answer(visit, server):
    server.pieces, server.delay = ENGLISH * 10, 0.05
    tab = visit()
    tab.locator("#run").click()
    lane(tab, "Token by token").locator(".token.committed").nth(3).wait_for()
    tab.locator("#stop").click()
    done(tab)
    for name in LANES:
        assert lane(tab, name).locator(".state").inner_text() == "stopped"
    assert 3 < len(texts(tab, "Token by token")) < 400
    wait_until(lambda: server.open == 0)  # the server was told
    server.pieces, server.delay = ENGLISH, 0.0
    run(tab)
    assert texts(tab, "Parallel") == ENGLISH


def test_two_tabs_at_once(visit, server):
    server.delay = 0.02
    tabs = [visit(), visit()]
    for i, tab in enumerate(tabs):
        tab.locator("#prompt").fill(f"prompt {i}")
        tab.locator("#run").click()
    tabs[0].locator("#stop").click()
    for tab in tabs:
        done(tab)
    assert lane(tabs[0], "Token by token").locator(".state").inner_text() == "stopped"
    assert texts(tabs[1], "Token by token") == ENGLISH
    assert {body["prompt"] for body in server.asked} == {"prompt 0", "prompt 1"}


def test_server_gone_in_mid_answer_and_back(visit, server):
    server.pieces, server.delay = ENGLISH * 10, 0.05
    tab = visit()
    tab.locator("#run").click()
    lane(tab, "Token by token").locator(".token.committed").nth(2).wait_for()
    server.stop()
    done(tab)
    assert lane(tab, "Serial").locator(".state").inner_text() == "broken off"
    assert "The server is gone" in lane(tab, "Serial").locator(".error").inner_text()
    assert tab.locator("#status").get_attribute("data-state") == "gone"
    assert len(texts(tab, "Token by token")) > 2, "what came stays"
    assert tab.locator("#run").is_disabled()
    server.pieces, server.delay = ENGLISH, 0.0
    server.start()
    tab.locator("#run:enabled").wait_for(timeout=10_000)
    run(tab)
    assert texts(tab, "Serial") == ENGLISH
    assert lane(tab, "Serial").locator(".error").inner_text() == ""


def test_server_gone_while_nothing_runs(visit, server):
    tab = visit()
    server.stop()
    tab.locator("#status[data-state=gone]").wait_for(timeout=10_000)
    assert tab.locator("#run").is_disabled()
    server.start()
    tab.locator("#status[data-state=ready]").wait_for(timeout=10_000)


def test_one_lane_after_another(visit, server):
    """Each has the server to itself."""
    server.delay = 0.01
    tab, most = visit(), [0]
    tab.locator("[value=alone]").check()
    assert "each alone" in tab.locator("#how").inner_text()
    tab.locator("#run").click()
    watching = threading.Event()

    def watch():
        while not watching.is_set():
            most[0] = max(most[0], server.open)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    done(tab)
    watching.set()
    thread.join()
    assert most[0] == 1
    for name in LANES:
        assert texts(tab, name) == ENGLISH


@pytest.mark.parametrize(
    ("name", "trace"),
    [
        ("Parallel", synthetic_trace(ENGLISH, 4, 16)),
        ("Serial", synthetic_serial_trace(ENGLISH, 4, 5)),
    ],
    ids=["parallel", "serial"],
)
def test_afterwards_every_pass_is_shown_like_a_recording(visit, name, trace):
    tab = visit(slots=(4, 16))
    for box in ("parallel", "serial", "tokens", "stock"):
        tab.locator(f"#use-{box}").set_checked(box == name.lower())
    run(tab)
    timeline = Timeline.of(trace, trace["requests"][0])
    tab.keyboard.press("Home")
    for number in range(len(timeline.passes) + 1):
        events = [position.at(number) for position in timeline.positions]
        assert states(tab, name) == [event.state if event else "masked" for event in events]
        moment = f"{name} · Pass {number} of {len(timeline.passes)}"
        assert tab.locator("#moment").inner_text().startswith(moment)
        tab.keyboard.press("ArrowRight")


def test_refused_drafts_are_told(visit):
    tab = visit(slots=(4, 16))
    run(tab)
    lane(tab, "Serial").locator(".token.replaced").first.click()
    story = tab.locator("#inspector").inner_text()
    assert "draft “\u2068?\u2069” refused in pass" in story and "at 10.0%" in story
    assert "(Serial)" in tab.locator(".of-lane").first.inner_text()


def test_keyboard_only(visit):
    """From typing to looking at a single token, in the order of the page."""
    tab = visit(slots=(4, 16))
    tab.locator("#prompt").focus()
    tab.keyboard.press("Control+a")
    tab.keyboard.type("typed t")  # a key that switches the theme elsewhere
    tab.keyboard.press("Control+Enter")
    done(tab)
    assert not tab.evaluate("document.documentElement.classList.contains('dark')")
    seen = []
    for _ in range(30):
        tab.keyboard.press("Tab")
        seen.append(tab.evaluate("document.activeElement.id || document.activeElement.className"))
    wanted = ["run", "use-parallel", "preset", "slot_size", "raw", *["text"] * 4, "play", "slider"]
    seen = ["text" if name.startswith("text") else name for name in seen]
    assert [name for name in seen if name in wanted][: len(wanted)] == wanted
    lane(tab, "Parallel").locator(".text").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert "position 1 · slot 0 · committed" in tab.locator("#inspector").inner_text()
    tab.keyboard.press("ArrowDown")
    assert "position 5 · slot 1" in tab.locator("#inspector").inner_text()
    tab.keyboard.press("Home")
    assert set(states(tab, "Parallel")) <= {"masked"}
    tab.keyboard.press("t")
    assert tab.evaluate("document.documentElement.classList.contains('dark')")
    tab.locator("#speed").select_option("2")
    tab.locator("#play").focus()
    tab.keyboard.press(" ")
    assert tab.locator("#play").inner_text() == "Pause"
    tab.locator("#play:text('Play')").wait_for(timeout=20_000)
    assert texts(tab, "Parallel") == ENGLISH


def test_escape_stops(visit, server):
    server.pieces, server.delay = ENGLISH * 10, 0.05
    tab = visit()
    tab.locator("#prompt").focus()
    tab.keyboard.press("Control+Enter")
    lane(tab, "Serial").locator(".token.committed").first.wait_for()
    tab.keyboard.press("Escape")
    done(tab)
    assert lane(tab, "Serial").locator(".state").inner_text() == "stopped"


def test_sizes_stay_allowed_and_presets_set_all_four(visit, server):
    tab = visit()
    tab.locator("#preset").select_option("gpqa")
    values = [tab.locator(f"#{n}-value").inner_text() for n in ("slot_size", "block_length")]
    assert values == ["8", "16"]
    assert tab.locator("#slot_threshold-value").inner_text() == "0.80"
    for index in range(6):
        tab.locator("#slot_size").fill(str(index))
        assert tab.locator("#preset").input_value() == "own"
        slot, block = (
            int(tab.locator(f"#{n}-value").inner_text()) for n in ("slot_size", "block_length")
        )
        assert block % slot == 0 and slot <= block <= 256
    tab.locator("#preset").select_option("defaults")
    assert tab.locator("#slot_size-value").inner_text() == "32"


def test_refusals_are_shown(visit):
    tab = visit()
    tab.locator("#prompt").fill("refuse me")
    run(tab)
    assert lane(tab, "Parallel").locator(".state").inner_text() == "refused"
    assert "'refuse me' is refused" in lane(tab, "Parallel").locator(".error").inner_text()


def test_api_key(visit, server):
    server.key = "secret"
    tab = visit(ready=False)
    tab.locator("#key").fill("wrong")
    tab.keyboard.press("Enter")
    tab.locator("#status:text('An API key is needed')").wait_for()
    tab.locator("#key").fill("secret")
    tab.keyboard.press("Enter")
    tab.locator("#run:enabled").wait_for()
    assert tab.locator("#key-form").is_hidden()
    run(tab)
    assert texts(tab, "Parallel") == ENGLISH
    tab.reload()
    tab.locator("#run:enabled").wait_for()  # the tab remembers it


@pytest.mark.parametrize(
    ("change", "lanes"),
    [
        ({"modes": ["serial"]}, ["Serial", "Token by token", "Stock, token by token"]),
        ({"stock": None}, ["Parallel", "Serial", "Token by token"]),
    ],
    ids=["mask adapter", "no other server"],
)
def test_lanes_that_the_server_has(visit, server, change, lanes):
    known, server.about = server.about, server.about | change
    tab = visit()
    server.about = known
    assert tab.locator(".lane .name").all_inner_texts() == lanes


@pytest.mark.parametrize(
    ("pieces", "direction"), [(ARABIC, "rtl"), (CHINESE, "ltr")], ids=["arabic", "chinese"]
)
def test_scripts(visit, server, pieces, direction):
    server.pieces = pieces
    tab = visit(slots=(4, 8))
    tab.locator("#prompt").fill("".join(pieces))
    style = "e => getComputedStyle(e).direction"
    assert tab.locator("#prompt").evaluate(style) == direction
    run(tab)
    for name in LANES:
        assert texts(tab, name) == pieces
        assert lane(tab, name).locator(".text").evaluate(style) == direction


def test_four_thousand_tokens(visit, server):
    """They all come, and a step takes a fraction of a second, on a busy machine too."""
    server.pieces = [f" token{i}" if i % 17 else "\n" for i in range(4000)]
    tab = visit(slots=(32, 128))
    run(tab)
    for name in LANES:
        assert len(texts(tab, name)) == 4000
    milliseconds = tab.evaluate("""() => {
      const start = performance.now();
      for (let i = 1; i <= 20; i++) player.go(i * 9);
      return (performance.now() - start) / 20;
    }""")
    assert milliseconds < 1000  # of four lanes


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_screen_and_axe_has_no_serious_finding(
    visit, server, width, scheme
):
    """Before, during and after decoding."""
    Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
    server.pieces = [*ENGLISH, "x" * 200, *ENGLISH]
    tab = visit(width, scheme, slots=(4, 16))
    found = {}

    def check(when):
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for finding in Axe().run(tab).response["violations"]:
            if finding["impact"] in ("serious", "critical"):
                found[when, finding["id"]] = [node["html"] for node in finding["nodes"]]

    check("before")
    assert tab.locator("#parameters").evaluate("e => e.open") == (width > 896)
    tab.locator("#parameters").evaluate("e => { e.open = true; }")
    server.delay = 0.1
    tab.locator("#run").click()
    lane(tab, "Serial").locator(".token.draft").first.wait_for()
    lane(tab, "Token by token").locator(".token.committed").first.wait_for()
    server.delay = 0.0
    check("during")
    done(tab)
    check("after")
    for number in (2, 5, 9):
        tab.evaluate(f"player.go({number})")
        check(number)
    assert not found


def test_the_command_becomes_a_server(monkeypatch):
    given = ["play", "folder", "--port", "8123", "--stock-url", "http://other:8000/"]
    given += [
        "--serve-args",
        """--dtype float32 --additional-config '{"refusion_schedule": "plain"}'""",
    ]
    command = play_command.serve_command(build_parser().parse_args(given))
    start = command.index("folder")
    assert command[start : start + 5] == ["folder", "--host", "127.0.0.1", "--port", "8123"]
    assert command[start + 6 :] == [
        '{"refusion_schedule": "plain", "refusion_play": {"stock_url": "http://other:8000/"}}',
        "--dtype",
        "float32",
    ]
    given[5] = "other:8000"
    with pytest.raises(ValueError, match="refusion_play=.*stock_url.*allowed"):
        play_command.serve_command(build_parser().parse_args(given))
