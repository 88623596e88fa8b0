"""examples/reproduce_paper: stock tasks of lm-eval on tiny stand-ins for their data, resumed."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import served
from benchmark_stand_ins import write_stand_ins
from benchmarks import BENCHMARKS, VARIANTS, programs, request_fields
from reproduce import main
from test_docs import ROOT

from vllm_refusion.decoding.params import PRESETS, DecodingParams

PROBLEMS = 2
SECONDS = 0.5  # of each request, on the stand-in of a server


class Answering:
    """Stands for a server: answers every question rightly, and counts as one does."""

    def __init__(self, is_stock: bool = False) -> None:
        self.is_stock, self.bodies = is_stock, []
        self.fails_behind: int | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                text = outer.metrics() if self.path == "/metrics" else '{"data": [{"id": "m"}]}'
                self.reply(text)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.fails_behind is not None and len(outer.bodies) >= outer.fails_behind:
                    self.send_error(400)
                    return
                outer.bodies.append(body)
                message = {"role": "assistant", "content": right_answer(body["messages"])}
                self.reply(json.dumps({"choices": [{"index": 0, "message": message}]}))

            def reply(self, text):
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def metrics(self) -> str:
        done = len(self.bodies)
        lines = [
            f'vllm:generation_tokens_total{{engine="0"}} {100 * done}',
            f'vllm:e2e_request_latency_seconds_sum{{engine="0"}} {SECONDS * done}',
        ]
        if not self.is_stock:
            passes = {"plan": 10, "verify": 8, "predict": 2, "infill_verify": 2, "serial": 3}
            passes |= {"replay": 1000, "idle": 1000}
            lines += [
                f'vllm:refusion_passes_total{{engine="0",kind="{kind}"}} {count * done}'
                for kind, count in passes.items()
            ]
        return "\n".join(lines) + "\n"


def right_answer(messages) -> str:
    """Of the last question of the stand-ins, in the form that its task looks for."""
    text = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    if found := re.search(r"What is \$?(\d+) \+ 1", text):
        number = int(found[1]) + 1
        return f"The final answer is ${number}$. I hope it is correct. \\boxed{{{number}}}"
    if found := re.search(r"def f(\d+)", text):
        return f"    return {found[1]}\n```\n"
    if found := re.search(r"Write f(\d+)", text):
        return f"def f{found[1]}():\n    return {found[1]}\n```\n"
    if found := re.search(r"\((.)\) a fish", text):
        return f"It is ({found[1]})"
    return "the answer is (B)" if "Options" in text else " B"


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    pytest.importorskip("math_verify")
    write_stand_ins(tmp_path / "data", PROBLEMS)
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setattr(served, "SETTLING_SECONDS", 0.01)
    for name in ("HF_HOME", "HF_MODULES_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "output"


MANY_PARTS = ("math", "mmlu-pro")  # whose tasks differ in their data only


def only(parts, monkeypatch):
    for name in MANY_PARTS:
        benchmark = BENCHMARKS[name]
        fewer = dataclasses.replace(benchmark, tasks=benchmark.tasks[parts])
        monkeypatch.setitem(BENCHMARKS, name, fewer)


@pytest.mark.slow  # minutes, most of them in lm-eval
def test_all_benchmarks_and_variants(stand_ins, monkeypatch, capsys):
    """Each answer is right: all scores are 100%. Interrupted, and gone on with."""
    only(slice(2), monkeypatch)
    ours, stock = Answering(), Answering(is_stock=True)
    command = ["--output", str(stand_ins), "--run-code", "--concurrent", "2"]
    command += ["--base-url", ours.url, "--stock-base-url", stock.url]
    tasks = sum(len(b.tasks) for b in BENCHMARKS.values())
    ours.fails_behind = 5 * PROBLEMS + 1
    with pytest.raises(Exception, match="400"):
        main(command)
    assert len(list(stand_ins.rglob("cells/*/*.json"))) == 5
    ours.fails_behind = None
    main(command)
    # the sixth task was begun twice, no other
    assert len(ours.bodies) == 3 * tasks * PROBLEMS + 1
    assert len(stock.bodies) == tasks * PROBLEMS
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    for title in VARIANTS.values():
        scores, speeds, per_forward = (line for line in lines if line.startswith(f"| {title} |"))
        assert scores.count("| 100.00 ± 0.0") == len(BENCHMARKS), scores
        assert speeds.count("| 200.0 ") == len(BENCHMARKS)
        assert per_forward.count("| 1.00 " if title == "stock model" else "| 4.00 ") == 7
    assert "| *paper*, ReFusion, parallel | 84.91 | 54.22 | 78.66 | 68.20 | 35.49 |" in printed.out
    assert (stand_ins / "results.md").read_text() in printed.out
    assert len(list(stand_ins.rglob("samples/*/*.jsonl"))) == 4 * tasks

    sent = {json.dumps(body.get("vllm_xargs"), sort_keys=True) for body in ours.bodies}
    asked = [{"preset": name} for name in BENCHMARKS]
    asked += [{"preset": name, "infill": "correct"} for name in BENCHMARKS]
    asked += [{"mode": "serial", "slot_size": size} for size in (8, 16, 32)]
    assert sent == {json.dumps(options, sort_keys=True) for options in asked}
    assert all("vllm_xargs" not in body for body in stock.bodies)
    for body in ours.bodies + stock.bodies:
        assert (body["max_tokens"], body["temperature"]) == (512, 0)
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        goes_on = body["messages"][-1]["role"] == "assistant"
        assert body.get("continue_final_message", False) == goes_on

    before = len(ours.bodies)
    main(command)  # nothing is left to do
    assert len(ours.bodies) == before
    assert capsys.readouterr().out == printed.out
    with pytest.raises(SystemExit):
        main([*command, "--limit", "1"])
    assert "gsm8k_cot_zeroshot.json is of other settings" in capsys.readouterr().err
    path = stand_ins / "cells/serial/gsm8k_cot_zeroshot.json"
    path.write_text('{"asked": {')
    with pytest.raises(SystemExit):
        main(command)
    assert "gsm8k_cot_zeroshot.json: not JSON" in capsys.readouterr().err


@pytest.mark.slow
def test_the_other_tasks_of_many(stand_ins, monkeypatch, capsys):
    only(slice(2, None), monkeypatch)
    command = ["--output", str(stand_ins), "--concurrent", "2", "--base-url", Answering().url]
    main([*command, "--benchmarks", *MANY_PARTS, "--variants", "propose"])
    (scores, *_) = (line for line in capsys.readouterr().out.splitlines() if "parallel |" in line)
    assert scores.count("| 100.00 ± 0.0") == len(MANY_PARTS), scores
    results = [json.loads(path.read_text()) for path in stand_ins.rglob("cells/*/*.json")]
    assert [result["score"] for result in results] == [1] * (5 + 12)


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "humaneval and mbpp: their tests run code that the models wrote"),
        (("--benchmarks", "gsm8k", "--limit", "0"), "--limit 0: allowed is an integer of at least"),
        (("--benchmarks", "gsm8k", "--base-url", "http://127.0.0.1:9"), "no server answers at"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, capsys, options, message):
    pytest.importorskip("lm_eval")
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "output"), *options])
    assert message in capsys.readouterr().err


ADD = "import math\n\n\ndef add(a, b):\n    return a + b\n"
ANSWERS = [  # to a prompt that ends with "```python\n"
    ADD,
    f"{ADD}```\nIt adds. For example:\n```python\nadd(1, 2)\n```",
    f"\n{ADD}```",
    f"```python\n{ADD}```",
    f"```\n{ADD}```",
    f"Here it is:\n```python\n{ADD}```",
]


def test_programs_are_read_as_written():
    for (found,) in programs([[answer] for answer in ANSWERS], [{}] * len(ANSWERS)):
        assert found.strip() == ADD.strip()
    assert programs([["No."], [""]], [{}, {}]) == [["No."], [""]]


def test_a_first_word_is_still_lost_in_the_stock_task(stand_ins):
    from lm_eval.tasks.mbpp.utils import build_predictions

    ((found,),) = build_predictions([[ANSWERS[1]]], [{}])
    assert found == ADD.removeprefix("import").rstrip(), "benchmarks.programs can go"


def test_requests_ask_for_the_published_presets():
    assert set(BENCHMARKS) == set(PRESETS)
    for preset in BENCHMARKS:
        for variant in set(VARIANTS) - {"stock", "correct"}:
            options = request_fields(variant, preset)["vllm_xargs"]
            params = DecodingParams().of_request(options)
            assert params.slot_size == PRESETS[preset].slot_size
            assert params == PRESETS[preset] or params.mode == "serial"


def test_the_papers_figures_are_those_of_the_algorithm():
    page = (ROOT / "docs/algorithm.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith(("| | MMLU-Pro", "| ReFusion, tokens/s", "| Qwen3-8B, tokens/s"))
        or line.startswith("| ReFusion, score")
    ]
    table = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}
    for benchmark in BENCHMARKS.values():
        assert float(table["ReFusion, score"][benchmark.title]) == benchmark.score
        assert float(table["ReFusion, tokens/s"][benchmark.title]) == benchmark.speed
        assert float(table["Qwen3-8B, tokens/s"][benchmark.title]) == benchmark.stock_speed
        # a whole number of problems is right: the tasks are of the paper's size
        right = round(benchmark.score / 100 * benchmark.problems)
        assert abs(100 * right / benchmark.problems - benchmark.score) < 0.0051


@pytest.mark.slow
def test_with_servers_of_its_own(stand_ins, capsys):
    """The bundled models, started and stopped; the variants that all versions serve."""
    command = ["--output", str(stand_ins), "--limit", "1", "--concurrent", "2"]
    command += ["--benchmarks", "gsm8k", "arc-c", "--variants", "propose", "serial", "stock"]
    command += ["--model", str(ROOT / "examples/refusion-tiny")]
    command += ["--stock-model", str(ROOT / "examples/stock-tiny"), "--serve-options"]
    command += ["--max-model-len 2048 --dtype float32 --enforce-eager --kv-cache-memory-bytes 256M"]
    main(command)
    lines = capsys.readouterr().out.splitlines()
    for variant in ("propose", "serial", "stock"):
        rows = [line for line in lines if line.startswith(f"| {VARIANTS[variant]} |")]
        assert len(rows) == 3 and not any("| - |" in row for row in rows)
