"""What viewers make of a trace: timeline, terminal, pictures, and the page as a file."""

from __future__ import annotations

import copy
import io
import json
import re

import jsonschema
import pytest
from PIL import Image
from rich.console import Console
from synthetic_trace import SCHEMA, synthetic_trace

from vllm_refusion.cli import main
from vllm_refusion.viewer import image, page, terminal
from vllm_refusion.viewer.timeline import Event, Timeline


@pytest.fixture
def trace_file(trace, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace))
    return path


def command(*arguments, status=0):
    """Runs ``vllm-refusion`` in this process."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == status


def passes_of(*operations, tokens=(7, 8, 9, 10)):
    """A one-request trace of hand-written passes: (operations, what else the pass has)."""
    made = synthetic_trace([f"t{i}" for i in range(max(len(tokens), 16))], 2, 4)
    request = made["requests"][0]
    request["output"] = {"text": "", "tokens": list(tokens), "pieces": [f"t{i}" for i in tokens]}
    request["passes"] = [
        {"seconds": 1.0, "rows": 4, "delivered": 0, "operations": ops, **more}
        for ops, more in operations
    ]
    return Timeline.of(made, request)


def plan(*drafts):
    chosen = {position // 2 * 2 for position, _, _ in drafts}
    slots = [{"start": s, "certainty": 0.9, "chosen": s in chosen} for s in (0, 2)]
    return {"kind": "plan", "slots": slots, "drafts": [list(draft) for draft in drafts]}


def test_schema_takes_synthetic_traces_and_refuses_unknown_keys(trace):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(trace, SCHEMA)
    for change in (
        lambda t: t.update(version=3),
        lambda t: t["requests"][0]["passes"][1]["operations"][0].update(kind="guess"),
        lambda t: t["requests"][0]["passes"][0].update(colour="red"),
    ):
        wrong = copy.deepcopy(trace)
        change(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


def test_history_of_a_slot_that_is_put_back():
    """Two slots are drafted, the first is committed, the second masked again."""
    tests = [[0, 7, None, True], [1, 8, 0.8, True], [2, 9, None, False], [3, 5, 0.1, False]]
    drafts = plan((0, 7, 0.95), (1, 8, 0.6), (2, 9, 0.92), (3, 5, 0.3))
    committed = [[0, 7], [1, 8]]
    made = passes_of(
        ([drafts], {}), ([{"kind": "verify", "tests": tests}], {"committed": committed})
    )
    first, last = made.positions[1], made.positions[3]
    assert first.events == [
        Event(1, "draft", "t8", 0.6),
        Event(2, "accepted", "t8", 0.8),
        Event(2, "committed", "t8", None),
    ]
    assert (first.round, first.kv) == (1, 1)
    assert [event.state for event in last.events] == ["draft", "masked"]
    assert (
        last.at(0) is None and last.at(1).text == "t3"
    )  # token 5 is not the final one: decoded alone
    assert made.passes[1].committed == [0, 1]


def test_drafts_stay_for_infill():
    """The verification commits nothing: what did not pass waits for its prediction."""
    tests = [[2, 9, None, True], [3, 5, 0.1, False]]
    made = passes_of(
        ([plan((2, 9, 0.95), (3, 5, 0.3))], {}), ([{"kind": "verify", "tests": tests}], {})
    )
    assert [event.state for event in made.positions[2].events] == ["draft", "accepted"]
    assert [event.state for event in made.positions[3].events] == ["draft"]


def test_a_fused_pass_commits_for_the_round_before_its_plan():
    verify = {"kind": "verify", "tests": [[0, 7, None, True], [1, 8, 0.9, True]]}
    made = passes_of(
        ([plan((0, 7, 0.95), (1, 8, 0.6))], {}),
        ([verify, plan((2, 9, 0.9), (3, 10, 0.9))], {"committed": [[0, 7], [1, 8]]}),
    )
    assert made.passes[1].kinds == ["verify", "plan"]
    assert made.positions[0].round == 1
    assert made.passes[1].round == 2
    assert made.positions[2].events == [Event(2, "draft", "t9", 0.9)]


def test_eos_drops_what_is_behind_it():
    tests = [[0, 7, None, True], [1, 8, 0.9, True]]
    made = passes_of(
        ([plan((0, 7, 0.95), (1, 8, 0.6))], {}),
        ([{"kind": "verify", "tests": tests}], {"committed": [[0, 7], [1, 8]], "end": 1}),
        tokens=(7,),
    )
    states = [[event.state for event in position.events][-1] for position in made.positions]
    assert states == ["committed", "cut", "dropped", "dropped"]


def test_summary(timeline):
    decoding = len(timeline.passes) - 1  # one is the prompt's
    assert timeline.summary().startswith(f"40 tokens in {decoding} forward passes")
    assert timeline.summary().endswith("autoregressive: 40 tokens, 0.40 s")


def test_page_needs_no_network_and_cannot_be_broken_out_of():
    text = page.html(synthetic_trace(["</script>", "<!--", "[[page.css]]", "\u2028"] * 4, 4, 16))
    assert text.count("</script>") == 2 and "[[data]]" not in text and "\u2028" not in text
    assert not re.search(r"""(src|href)=|url\(|@import|https?://""", text)
    assert "default-src 'none'" in text


def test_terminal(timeline):
    output = io.StringIO()
    terminal.show(timeline, None, 1.0, Console(file=output, width=100))
    text = output.getvalue()
    assert "The quick brown fox" in text and timeline.summary() in " ".join(text.split())
    assert text.count("infill_verify") >= 1
    output = io.StringIO()
    terminal.show(timeline, 1, 1.0, Console(file=output, width=100))
    assert "quick" not in output.getvalue() and output.getvalue().count("░") == 40


def test_terminal_plays_where_there_is_a_terminal(timeline):
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True)
    terminal.show(timeline, None, 1000.0, console)
    assert f"pass {len(timeline.passes) - 1} of" in output.getvalue()


@pytest.mark.parametrize("dark", [False, True])
def test_pictures(timeline, tmp_path, dark):
    """Every token is drawn on the mask's colour first and on its round's in the end."""
    style = image.Style(dark=dark)
    image.write_png(tmp_path / "end.png", timeline, len(timeline.passes), style)
    image.write_gif(tmp_path / "all.gif", timeline, 1.0, style)
    with Image.open(tmp_path / "end.png") as end, Image.open(tmp_path / "all.gif") as moving:
        assert moving.n_frames == len(timeline.passes) + 1
        colours = set(end.convert("RGB").get_flattened_data())
        rounds = {position.round for position in timeline.positions}
        assert {style.of_round(number) for number in rounds} <= colours
        moving.seek(0)
        first = set(moving.convert("RGB").get_flattened_data())
        assert not {style.of_round(number) for number in rounds} & first
        total = sum(
            (moving.seek(i), moving.info["duration"])[1] for i in range(moving.n_frames - 1)
        )
        assert total == pytest.approx(1000 * timeline.seconds, abs=5 * moving.n_frames)


@pytest.mark.parametrize("suffix", ["html", "png", "gif"])
def test_view_writes(trace_file, tmp_path, suffix):
    target = tmp_path / f"seen.{suffix}"
    command("view", str(trace_file), "-o", str(target))
    start = {"html": b"<!doctype html>", "png": b"\x89PNG", "gif": b"GIF8"}[suffix]
    assert target.read_bytes().startswith(start)


def test_view_in_the_terminal(trace_file, capsys):
    command("view", str(trace_file))
    assert "40 tokens in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "a.txt"], "a.txt"),
        (["--request", "1"], "--request 1"),
        (["--pass", "99"], "--pass 99"),
        (["--speed", "0"], "--speed 0"),
    ],
)
def test_view_refuses(trace_file, arguments, message, capsys):
    command("view", str(trace_file), *arguments, status=2)
    assert message in capsys.readouterr().err


TRACE = '{"format": "vllm-refusion trace", "version": 2'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"format": "vllm-refusion trace", "version": 9}',
        TRACE + "}",
        TRACE + ', "requests": 3}',
        TRACE + ', "requests": [{"passes": [1]}]}',
    ],
)
def test_not_a_trace(tmp_path, content, capsys):
    path = tmp_path / "trace.json"
    path.write_text(content)
    command("view", str(path), status=2)
    assert "trace.json" in capsys.readouterr().err
