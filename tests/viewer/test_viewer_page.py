"""The viewer's page in Chromium, driven by playwright; skipped where one of them is missing."""

from __future__ import annotations

import pytest
from synthetic_trace import ENGLISH, WRONG, synthetic_trace

from vllm_refusion.viewer import page

ARABIC = "يبدأ ما يكل بثلا ثة أضع اف عشر ين جني ها ثم يشت ري ثما ني".split()
CHINESE = list("小明一开始有六十英镑，他买了八个玩偶，每个三英镑。")


@pytest.fixture
def show(chromium, tmp_path):
    """Opens a trace's page; fails on any script error and any request but for the page itself."""
    errors, asked, pages = [], [], []

    def open_page(trace, where="", width=1280, scheme="light"):
        path = tmp_path / "page.html"
        path.write_text(page.html(trace))
        tab = chromium.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        pages.append(tab)
        tab.on("pageerror", lambda error: errors.append(error))
        tab.on("console", lambda message: message.type == "error" and errors.append(message.text))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"{path.as_uri()}#{where}")
        return tab

    yield open_page
    for tab in pages:
        tab.close()
    assert not errors and len(asked) == len(pages)


def shown(tab):
    """State of each token; the class after "token" or "token slot"."""
    return tab.eval_on_selector_all(
        "#response .token",
        "all => all.map(s => [...s.classList].filter(c => c !== 'slot')[1])",
    )


def test_page_shows_every_pass_like_the_timeline(show, trace, timeline):
    tab = show(trace, "pass=0")
    for number in range(len(timeline.passes) + 1):
        events = [position.at(number) for position in timeline.positions]
        assert shown(tab) == [event.state if event else "masked" for event in events]
        assert tab.locator("#moment").inner_text().startswith(f"Pass {number} of")
        tab.keyboard.press("ArrowRight")
    text = tab.eval_on_selector_all("#response .token", "all => all.map(s => s.textContent)")
    assert text == ENGLISH


def test_keyboard(show, trace):
    tab = show(trace, "pass=0")
    tab.keyboard.press("End")
    assert set(shown(tab)) == {"committed"}
    assert tab.locator("#twin-clock").inner_text() == "40 of 40 tokens"
    tab.keyboard.press("Home")
    assert set(shown(tab)) == {"masked"}
    tab.keyboard.press("t")
    assert tab.evaluate("document.documentElement.className") == "dark"
    tab.select_option("#speed", "2")
    tab.locator("#response").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert "position 1 · slot 0 · masked" in tab.locator("#inspector").inner_text()
    tab.keyboard.press("ArrowDown")
    assert "position 5 · slot 1" in tab.locator("#inspector").inner_text()
    tab.locator("#play").focus()
    tab.keyboard.press(" ")
    assert tab.locator("#play").inner_text() == "Pause"
    tab.locator("#play:text('Play')").wait_for(timeout=20000)
    assert set(shown(tab)) == {"committed"}
    assert "committed in pass" in tab.locator("#inspector").inner_text()


def test_pointer_and_slider(show, trace, timeline):
    tab = show(trace, "pass=99")
    tab.locator("#response .token").nth(6).hover()
    position = timeline.positions[6]
    inspector = tab.locator("#inspector").inner_text()
    assert (
        f"round {position.round}, KV entry {position.kv}" in inspector
        and "\u2068the \u2069" in inspector
    )
    tab.locator("#slider").fill("2")
    assert tab.locator("#moment").inner_text().startswith("Pass 2 of")
    tab.locator("#slider").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#moment").inner_text().startswith("Pass 3 of")


def test_playing_keeps_the_recorded_speed_and_pace_of_both(show, trace):
    """Half-way through the autoregressive twin's time half of its tokens are there."""
    tab = show(trace, "pass=0")
    tab.evaluate("player.time = 0.2; player.render()")
    assert tab.locator("#twin-clock").inner_text() == "20 of 40 tokens"
    assert tab.locator("#moment").inner_text().startswith("Pass 10 of")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_screen_and_text_is_readable(show, width, scheme):
    trace = synthetic_trace(ENGLISH + ["x" * 200], 4, 16)
    tab = show(trace, "pass=99", width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    dark = tab.evaluate("document.documentElement.classList.contains('dark')")
    assert dark == (scheme == "dark")
    measure = """() => {
      const light = (colour) => {
        const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map((value) => {
          const part = value / 255;
          return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const visible = "#response .token:not(.masked, .dropped)";
      return [...document.querySelectorAll(visible)].map((span) => {
        const style = getComputedStyle(span);
        const own = style.backgroundColor, clear = "rgba(0, 0, 0, 0)";
        const ground = own === clear ? getComputedStyle(span.parentNode).backgroundColor : own;
        const [a, b] = [light(style.color), light(ground)].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
      });
    }"""
    tab.keyboard.press("Home")
    contrasts = []
    for _ in trace["requests"][0]["passes"]:
        tab.keyboard.press("ArrowRight")
        contrasts += tab.evaluate(measure)
    assert min(contrasts) >= 4.5  # WCAG AA


@pytest.mark.parametrize(
    ("pieces", "direction"), [(ARABIC, "rtl"), (CHINESE, "ltr")], ids=["arabic", "chinese"]
)
def test_scripts(show, pieces, direction):
    """The text reads in its own direction and stays in place while tokens come."""
    tab = show(synthetic_trace(pieces, 4, 8), "pass=99")
    style = "e => getComputedStyle(e).direction"
    assert tab.eval_on_selector("#response", style) == direction
    texts = tab.eval_on_selector_all("#response .token:not(.cut)", "e => e.map(s => s.textContent)")
    assert texts == pieces
    boxes = "all => all.map(s => { const b = s.getBoundingClientRect(); return [b.x, b.y]; })"
    end = tab.eval_on_selector_all("#response .token", boxes)
    assert (end[0][0] > end[3][0]) == (direction == "rtl")
    tab.keyboard.press("Home")
    assert tab.eval_on_selector_all("#response .token", boxes) == end


def test_four_thousand_tokens(show):
    """A step of the slider takes a fraction of a second, on a busy machine too."""
    long = synthetic_trace([f" token{i}" if i % 17 else "\n" for i in range(4000)], 32, 128)
    tab = show(long, "pass=99999")
    assert shown(tab).count("committed") == 4000
    tab.locator("#slider").focus()
    tab.keyboard.press("ArrowLeft")
    assert shown(tab).count("committed") == 4000  # the twin is still writing
    milliseconds = tab.evaluate("""() => {
      const start = performance.now();
      for (let i = 1; i <= 20; i++) player.go(i * 9);
      return (performance.now() - start) / 20;
    }""")
    assert milliseconds < 250


def test_several_requests(show):
    both = synthetic_trace(ENGLISH, 4, 16)
    both["requests"] += synthetic_trace(ENGLISH[:8], 4, 16)["requests"]
    tab = show(both, "request=1&pass=99")
    assert len(shown(tab)) == 8
    tab.select_option("#request", "0")
    assert len(shown(tab)) == 40


def test_wrong_drafts_are_shown_as_such(show, trace):
    """The viewer shows what was drafted, not what came of it."""
    number = next(
        i
        for i, entry in enumerate(trace["requests"][0]["passes"], 1)
        for operation in entry["operations"]
        if any(token == WRONG for _, token, _ in operation.get("drafts", ()))
    )
    tab = show(trace, f"pass={number}")
    assert "?" in tab.locator("#response .draft").all_inner_texts()
