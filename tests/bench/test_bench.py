"""The benchmark: its arguments, its closed loop on a made-up engine, its figures and reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from device import ON_GPU
from mask_adapters import write_adapter

from conformance import build_model
from engine import engine, options_of
from vllm_refusion.adapters import adapter_tensors, read_adapter
from vllm_refusion.bench import contributions, report
from vllm_refusion.bench.child import engine_args, levels_of
from vllm_refusion.bench.command import CALIBRATED, child_environment, parse_preset, settings_from
from vllm_refusion.bench.load import Load, Trace, ask, over_time, run_load, run_phases, summarise
from vllm_refusion.bench.server import serve_command
from vllm_refusion.bench.settings import Settings, read_prompts
from vllm_refusion.bench.shapes import SHAPES, matrix_parameters, shape_config
from vllm_refusion.bench.simulate import DrawnOutcomes, simulate, tokens_per_forward
from vllm_refusion.cli import build_parser, main
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.speculation import NO_RIDERS, Drafting, Saving
from vllm_refusion.engine import compat
from vllm_refusion.engine.acceptance import CONFIG_KEY, Profile, build_tables, seed_of, to_config
from vllm_refusion.engine.metrics import snapshot
from vllm_refusion.engine.settings import BENCHMARK_ENV

TINY_SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "vocab_size": 512,
    "mask_token_id": 3,
    "eos_token_id": 1,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def parse(*arguments: str):
    return build_parser().parse_args(["bench", *arguments])


def settings(tmp_path: Path, *arguments: str) -> Settings:
    return settings_from(parse(*arguments), tmp_path)


def test_a_shape_makes_both_checkpoints_and_replays_acceptance(tmp_path):
    made = settings(tmp_path, "--shape", "qwen3-8b", "--concurrency", "1,16", "--canvas", "32,128")
    configs = {
        side: json.loads((Path(path) / "config.json").read_text())
        for side, path in made.models.items()
    }
    assert "mask_token_id" not in configs["stock"]
    assert configs["stock"] | {"mask_token_id": 151670} == configs["refusion"]
    assert made.load_format == "dummy" and made.concurrency == [1, 16]
    assert [preset.name for preset in made.presets] == ["32/128/0.9/0.4", "canvas 32", "canvas 128"]
    assert all("replayed acceptance" in preset.acceptance for preset in made.presets)
    assert [(p.slot_size, p.block_length) for p in made.presets[1:]] == [(32, 32), (128, 128)]


def test_settings_survive_the_way_to_the_child(tmp_path):
    options = ["--presets", "8/16/0.8/0.2@0.5,0.7,2,1", "--moving-load", "1:3,64:0.5"]
    made = settings(tmp_path, "--shape", "qwen3-0.6b", *options)
    assert Settings.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_real_weights_are_not_replayed(tmp_path):
    made = settings(tmp_path, "--model", "a", "--stock-model", "b", "--stop-at-eos")
    assert made.models == {"refusion": "a", "plain": "a", "stock": "b"} and made.stop_at_eos
    assert made.presets[0].acceptance == "real"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either --model"),
        (["--model", "a", "--shape", "qwen3-8b"], "either --model"),
        (["--shape", "qwen3-9b"], "known are qwen3-0.6b"),
        (["--shape", "qwen3-8b", "--presets", "4/16/0.5/0.5"], "dummy weights need acceptance"),
        (["--model", "a", "--presets", "4/16/0.5/0.5@0.1,0.5"], "replayed with --shape only"),
        (["--shape", "qwen3-8b", "--concurrency", "0,1"], "--concurrency"),
        (["--shape", "qwen3-8b", "--sides", "ours"], "--sides"),
        (["--shape", "qwen3-8b", "--prompts", "x.jsonl"], "--prompts"),
        (["--model", "a", "--prompts", "x.jsonl"], "x.jsonl: No such file"),
        (["--model", "a", "--adapter", "random:8"], "with --shape random:RANK"),
        (["--shape", "qwen3-8b", "--second-turn", "-1"], "--second-turn: -1"),
        (["--shape", "qwen3-8b", "--moving-load", "0:3"], "--moving-load: [1, 0]"),
        (["--shape", "qwen3-8b", "--moving-load", "4:x"], "'4:x': allowed are phases"),
        (["--shape", "qwen3-8b", "--adapter", "x"], "allowed are serial/SLOT"),
        (["--shape", "qwen3-8b", "--engine-args", "[1]"], "--engine-args: allowed is a JSON obj"),
        (["--shape", "qwen3-8b", "--engine-args", "{"], "--engine-args: not JSON"),
        (["--shape", "qwen3-8b", "--engine-args", "[" * 100_000], "nested too deeply"),
    ],
)
def test_contradictions_are_refused(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["32/128", "30/128/0.9/0.4", "32/128/0.9/2", "8/16/0.8/0.2@1"])
def test_bad_presets_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse("--presets", text)
    assert "is no preset" in capsys.readouterr().err


def test_engine_arguments_of_the_sides(tmp_path):
    made = settings(
        tmp_path, "--shape", "qwen3-8b", "--canvas", "64", "--canvas-concurrency", "2",
        "--concurrency", "1,4", "--speculative-config", '{"method": "ngram"}', "--fast-start",
        "--engine-args", '{"seed": 5}', "--refusion-args", '{"seed": 6}',
    )  # fmt: skip
    stock, ours = (engine_args(made, side, 384, 8192) for side in ("stock", "refusion"))
    assert stock["speculative_config"] == {"method": "ngram"} and stock["seed"] == 5
    assert "speculative_config" not in ours and ours["seed"] == 6
    assert ours["diffusion_config"] == {"canvas_length": 256}
    assert len(ours["additional_config"][CONFIG_KEY]) == 2
    assert ours["additional_config"]["refusion_schedule"] == "fused"
    plain = engine_args(made, "plain", 384, 8192)
    assert plain["additional_config"]["refusion_schedule"] == "plain"
    graphs = [side["compilation_config"]["cudagraph_mode"] for side in (stock, ours)]
    assert graphs == ["FULL_DECODE_ONLY", "FULL"]
    same = set(stock) & set(ours) - {"model", "seed", "disable_log_stats", "compilation_config"}
    assert all(stock[name] == ours[name] for name in same) and "max_num_batched_tokens" in same
    assert levels_of(made, "stock") == [(None, 1), (None, 2), (None, 4)]
    assert [(p.name, c) for p, c in levels_of(made, "refusion")] == [
        ("32/128/0.9/0.4", 1), ("32/128/0.9/0.4", 4), ("canvas 64", 2)
    ]  # fmt: skip


def test_a_random_adapter_beside_a_shape(tmp_path):
    """The ReFusion side serves the stock shape, whose configuration has no mask token."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_SHAPE))
    made = settings(
        tmp_path, "--shape", str(tmp_path / "config.json"), "--presets", "serial/16@0.8",
        "--adapter", "random:6",
    )  # fmt: skip
    assert made.models["refusion"] == made.models["stock"]
    args = engine_args(made, "refusion", 256, 8192)
    folder = args["additional_config"]["refusion_adapter"]
    assert read_adapter(folder).rank == 6
    tensors = adapter_tensors(folder)
    assert tensors["layers.1.self_attn.v_proj.lora_B"].shape == (64, 6)
    assert "additional_config" not in engine_args(made, "stock", 256, 8192)


def test_an_adapter_is_compared_with_its_base(tmp_path):
    base = build_model("qwen3-gqa2", tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", base)
    made = settings(tmp_path, "--model", str(folder), "--presets", "serial/16")
    assert made.models["refusion"] == made.models["plain"] == str(folder)
    assert Path(made.models["stock"]).resolve() == base.resolve()


def test_stock_runs_without_the_plugin(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    stock, ours = child_environment("stock"), child_environment("refusion")
    assert "refusion" not in stock["VLLM_PLUGINS"].split(",") and BENCHMARK_ENV not in stock
    assert "VLLM_PLUGINS" not in ours and ours[BENCHMARK_ENV]
    monkeypatch.setenv("VLLM_PLUGINS", "other,refusion")
    assert child_environment("stock")["VLLM_PLUGINS"] == "other"


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_size_in_their_name(name):
    config = SimpleNamespace(**shape_config(name))
    size = matrix_parameters(config)
    if not config.tie_word_embeddings:
        size += config.vocab_size * config.hidden_size
    billions = float(name.removeprefix("qwen3-").removesuffix("b"))
    assert size / 1e9 == pytest.approx(billions, rel=0.06)


class FakeEngine:
    """Gives each request a token per step; a step takes one second."""

    def __init__(self, lengths):
        self.now, self.most = 0.0, 0
        self.lengths = dict(lengths)
        self.left: dict[str, int] = {}

    def add_request(self, name, prompt, params):
        self.left[name] = params

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        self.now += 1
        self.most = max(self.most, len(self.left))
        outputs = []
        for name in list(self.left):
            self.left[name] -= 1
            finished = not self.left[name]
            if finished:
                del self.left[name]
            token = SimpleNamespace(token_ids=[0])
            outputs.append(
                SimpleNamespace(
                    request_id=name, outputs=[token], finished=finished, num_cached_tokens=16
                )
            )
        return outputs


def test_closed_loop_keeps_the_concurrency_and_times_settled_steps():
    fake = FakeEngine({})
    load = run_load(fake, [(None, 4)] * 5, 2, "x", clock=lambda: fake.now)
    assert fake.most == 2 and load.wall == 12 and load.steps == 12
    assert [trace.tokens for trace in load.traces] == [4] * 5
    # each of the two full waves: 4 steps less the first token's and the last; then one runs alone
    assert load.settled == [(1, 2)] * 4
    figures = summarise(load)
    assert figures["step_ms"] == 1000 and figures["tokens_per_s"] == pytest.approx(20 / 12)
    assert figures["ttft_ms"] == 1000 and figures["gap_ms_p99"] == 1000


def test_bursts_count_as_one_delivery():
    burst = Trace(0.0, [(1.0, 8), (1.5, 4), (3.0, 4)])
    figures = summarise(Load([burst], 3.0, 6, []))
    assert figures["deliveries"] == 3 and figures["time_per_token_ms"] == 250
    assert (figures["gap_ms_p50"], figures["gap_ms_p99"]) == (1500, 1500)
    assert figures["step_ms"] is None


PHASES = [[1, 3], [4, 4], [1, 2]]


def moving_traces():
    fake = FakeEngine({})
    traces = run_phases(fake, lambda number: (None, 2), PHASES, "x", clock=lambda: fake.now)
    assert fake.most == 4 and not fake.has_unfinished_requests()
    return traces


def test_a_moving_load_keeps_each_phase_at_its_number():
    traces = moving_traces()
    added = [trace.added for trace in traces]
    # one after the other; three beside it; as they end others come; one again
    assert added == [0, 2, 3, 3, 3, 4, 5, 5, 5, 6, 8]
    bins = over_time(traces)
    assert [at["at_s"] for at in bins][:3] == [0, 0.25, 0.5]
    assert sum(at["tokens_per_s"] for at in bins) * 0.25 == 2 * len(traces)
    assert bins[4]["running"] == 1 and bins[18]["running"] == 4
    assert {at["gap_ms_p99"] for at in bins} == {None, 1000}


def test_second_turns_are_asked_alone():
    fake = FakeEngine({})
    trace, cached = ask(fake, None, 3, "x", clock=lambda: fake.now)
    assert [at for at, _ in trace.deliveries] == [1, 2, 3] and trace.token_ids == [0] * 3
    assert cached == 16
    found = result()
    run = {"side": "stock", "preset": None, "acceptance": "-", "first_ttft_ms": [30, 32]}
    found["sides"][0]["turns"] = [run | {"second_ttft_ms": [8, 9], "cached": [0.9, 1]}]
    assert "| stock | - | 31.0 | 8.5 | 95.0 |" in report.table([found])


def test_server_levels_ask_for_the_same_load(tmp_path):
    arguments = parse("--base-url", "http://x", "--served-model", "m", "--input-len", "9")
    preset = parse_preset("8/16/0.8/0.2/correct")
    assert (preset.name, preset.parameters["infill"]) == ("8/16/0.8/0.2/correct", "correct")
    command = serve_command(arguments, "http://x", "m", preset, 4)
    body = json.loads(command[command.index("--extra-body") + 1])
    assert body["vllm_xargs"] == preset.parameters and "--ignore-eos" in command
    stock = serve_command(arguments, "http://y", "m", None, 4)
    assert "vllm_xargs" not in stock[stock.index("--extra-body") + 1]
    same = ("--random-input-len", "--num-prompts", "--max-concurrency")
    for name in same:
        assert command[command.index(name) + 1] == stock[stock.index(name) + 1]


@pytest.mark.parametrize(
    "speedups, expected",
    [
        ({1: 2.0, 4: 1.5}, None),
        ({1: 0.9, 4: 0.5}, 0),
        ({1: 2.0, 4: 0.5}, 2.0),
        ({1: 0.9, 2: 2.0, 8: 0.5}, 4.0),
        ({1: 2.0, 4: 1.0, 16: 0.5}, 4.0),
        ({}, None),
    ],
)
def test_crossover(speedups, expected):
    stock = {1: 10.0, 2: 17.0, 4: 30.0, 8: 50.0, 16: 90.0}
    other = {level: stock[level] * speedup for level, speedup in speedups.items()}
    found = report.crossover(stock, other)
    assert found == (expected if not expected else pytest.approx(expected))


def level(side, concurrency, speed, preset=None, canvas=None, step=5.0, acceptance="-"):
    figures = summarise(Load([Trace(0.0, [(0.5, 1), (1.0, 9)])], 10 / speed, 2, [(step / 1e3, 2)]))
    return figures | {
        "side": side,
        "preset": preset,
        "canvas": canvas,
        "concurrency": concurrency,
        "acceptance": acceptance,
        "gpu_memory_mib": 2048,
        "counters": {"rows_fed": 640, "forward_passes": 20},
        "tokens_per_forward": 2.5,
        "fed_per_token": 12.0,
        "scheduled_per_token": None,
    }


def result(error=None):
    environment = {"gpu": "Some GPU", "packages": {"vllm": "0.32.0", "torch": "2.11.0"}}
    replayed = "replayed acceptance (slot 0.25, token 0.8)"
    ours = [
        level("refusion", 1, 250.0, "32/128/0.9/0.4", acceptance=replayed),
        level("refusion", 4, 200.0, "32/128/0.9/0.4", acceptance=replayed),
        level("refusion", 1, 30.0, "canvas 32", 32, 5.5, replayed),
    ]
    stock = [level("stock", 1, 100.0), level("stock", 4, 400.0)]
    return {
        "kind": "offline",
        "bf16_tflops": 640.0,
        "settings": {
            "shape": "qwen3-8b", "models": {}, "input_len": 128, "output_len": 256,
            "dtype": "bfloat16",
        },
        "sides": [
            {"side": "stock", "levels": stock, "environment": environment, "error": None},
            {"side": "refusion", "levels": ours, "environment": environment, "error": error,
             "matrix_parameters": 10**11},
        ],
    }  # fmt: skip


def test_table_compares_levels_and_marks_replayed_rows():
    text = report.table([result()])
    rows = [line for line in text.splitlines() if line.startswith("| 1 | refusion")]
    assert len(rows) == 1 and "replayed acceptance" in rows[0]
    # the arithmetic of 32 rows takes 2 x 1e11 x 32 / 640e12 s = 10 ms, twice the stock step
    assert (
        "| 250 | 2.50 | 5.00 | 0.50 | 500.0 | 1.00 |" in rows[0]
        and "Some GPU · vllm 0.32.0" in text
    )
    assert "crossover with stock decoding at concurrency 2." in text
    assert "| 32 | 1 | 5.500 | 1.100 | 32.0 |" in text
    assert "failed" not in text
    assert "**refusion failed: exit status 1**" in report.table([result("exit status 1")])


def test_serial_answers_are_compared_with_stock(tmp_path):
    """Of the same prompts, where what is accepted is not drawn."""
    mixed = result()
    stock, ours = (side["levels"] for side in mixed["sides"])
    for number, level in enumerate((*stock, *ours)):
        level["answers"] = ["a", "b", "c", "d" if number < 2 else "e"]
    assert "equal answers" not in report.table([mixed])
    ours[0] |= {"preset": "serial/16", "acceptance": "real"}
    rows = report.table([mixed]).splitlines()
    assert "equal answers" in rows[2] and sum("| 75.0% |" in row for row in rows) == 1


def test_report_command_writes_table_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.json").write_text(json.dumps(result()))
    with pytest.raises(SystemExit) as ended:
        main(["bench-report", str(tmp_path), "--out", str(tmp_path / "page")])
    assert not ended.value.code
    assert (tmp_path / "page.md").read_text() == report.table([result()])
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    for content in ("{}", "", "3", '{"sides": [{}]}', '{"sides": 3, "settings": {}}', "[" * 10**5):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(SystemExit) as ended:
            main(["bench-report", str(tmp_path)])
        assert ended.value.code == 2 and "b.json: " in capsys.readouterr().err


def html_of(tmp_path, *results):
    files = [tmp_path / f"{number}.json" for number in range(len(results))]
    for file, content in zip(files, results):
        file.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        main(["bench-report", *map(str, files), "--html", str(tmp_path / "page.html")])
    assert not ended.value.code
    return (tmp_path / "page.html").read_text()


def test_page_has_every_figure_and_needs_nothing_else(tmp_path):
    text = html_of(tmp_path, result(), result("exit <status> 1"))
    assert not re.search(r"""(src|href)=|url\(|@import|https?://|<script""", text)
    assert text.count("<figure>") == 8 and "exit &lt;status&gt; 1" in text
    for level in report.levels_of(result()):
        if level["canvas"] is None:
            assert f"<td>{level['tokens_per_s']:.0f}</td>" in text
    assert "stock is faster from 2 on" in text and "replayed acceptance" in text


def test_a_moving_load_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    moved = result()
    moved["settings"]["phases"] = PHASES
    for side in moved["sides"]:
        run = {"side": side["side"], "preset": None, "acceptance": "-"}
        side["moving"] = [run | {"bins": over_time(moving_traces())}]
    text = html_of(tmp_path, moved)
    assert text.count("<figure>") == 6 and "1 for 3 s, then 4 for 4 s" in text
    report.write(tmp_path / "drawn", [moved])
    assert (tmp_path / "drawn-moving.png").read_bytes().startswith(b"\x89PNG")


def test_page_tells_acceptances_of_a_preset_apart(tmp_path):
    """Else one would be drawn over the other."""
    both = result()
    side = next(side for side in both["sides"] if side["side"] == "refusion")
    other = [
        level | {"acceptance": "replayed acceptance (token 0.3)", "tokens_per_s": 1.0}
        for level in side["levels"]
        if level["canvas"] is None
    ]
    side["levels"] += other
    text = html_of(tmp_path, both)
    assert "(token 0.3)</strong>: 0.01× stock decoding" in text
    assert "slower at every measured concurrency" in text
    assert "stock is faster from 2 on" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_page_fits_and_is_accessible(chromium, tmp_path, width, scheme):
    Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
    html_of(tmp_path, result(), result("exit status 1"))
    tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.goto((tmp_path / "page.html").as_uri())
    tab.locator("summary").first.click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(tab).response["violations"]
    tab.close()
    assert not [f["id"] for f in found if f["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"}', ":2: no query; its keys are text"),
        ('{"prompt": 3}', ":2: prompt must be text, not int"),
        (r'{"query": "\ud83d"}', r":2: query has \ud83d, half of a character"),
        ("{", ":2: not JSON"),
    ],
)
def test_prompts_are_texts_of_a_data_file(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one", "query": "other"}\n')
    assert read_prompts(path) == ["one"]
    path.write_text('{"query": "two"}\n' + line)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="a.jsonl: no rows"):
        read_prompts(path)


def test_every_replayed_preset_gives_the_published_rate():
    """Tokens per pass of the plain schedule: published tokens/s over those of Qwen3-8B."""
    rates = {"32/128/0.9/0.4": 2.5, "8/16/0.8/0.2": 64.11 / 30.43, "16/128/0.9/0.4": 52.74 / 31.42}
    assert rates.keys() == CALIBRATED.keys()
    for name, expected in rates.items():
        preset = parse_preset(name)
        rate, _ = tokens_per_forward(
            DecodingParams(**preset.parameters), Profile(*CALIBRATED[name]), requests=5
        )
        assert rate == pytest.approx(expected, rel=0.08), name


SAVED = DecodingParams(8, 32, 0.9, 0.4), Profile(0.4, 0.7)
SIZE = {"max_tokens": 64, "requests": 3}


def saved(speculation, savings) -> contributions.Counts:
    return contributions.decode(*SAVED, speculation, savings, **SIZE)


def test_every_way_of_saving_saves_on_its_own():
    """Without any the twin makes the simulated passes; the tokens are always the same."""
    plain = saved(NO_RIDERS, ())
    assert plain.figures == tokens_per_forward(*SAVED, **SIZE)
    low, high = contributions.CONCURRENCY.values()
    alone = {saving: saved(low, {saving}) for saving in Saving}
    together = saved(low, contributions.RIDERS)
    for counts in (together, *alone.values()):
        assert torch.equal(counts.responses, plain.responses)
    for saving in contributions.RIDERS:
        assert together.passes < alone[saving].passes < plain.passes, saving
    assert saved(high, {Saving.PIECES}).rows < plain.rows


def test_contributions_table():
    lines = contributions.table(16, 1, ["8/16/0.8/0.2"]).splitlines()
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines)}
    assert len(lines) == len(rows) == 12 and all(len(cells) == 2 for cells in rows.values())
    assert rows["plain"][0].endswith(", 1.00")


def test_contributions_to_serial_decoding():
    lines = contributions.serial_table(96, 4).splitlines()
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines)}
    tokens = {
        name: float(cells[0].split(",")[0]) for name, cells in rows.items() if "," in cells[0]
    }
    assert len(tokens) == 2 + len(Drafting) + 1
    assert tokens["none"] == pytest.approx(1, abs=0.1) and tokens["all"] > 3
    for way in (Drafting.AHEAD, Drafting.BRANCHES):
        assert tokens[f"without {way.value}"] < tokens["all"], way


class NothingPasses:
    """Both slots are chosen, and no token that is tested is accepted."""

    def draft(self, positions, draw):
        return [0] * len(positions), [1.0] * len(positions)

    def given(self, tokens, positions):
        return [0.0] * len(tokens)


@pytest.mark.parametrize("keeps, infill", [(True, [7, 7, 6, 6, 5, 5]), (False, [8] * 6)])
def test_accepted_tokens_are_fed_again_if_asked_for(keeps, infill):
    made = simulate(DecodingParams(4, 8), NothingPasses(), 8, keeps_accepted=keeps)
    assert [p.kind for p in made] == ["plan", "verify", *["predict", "infill_verify"] * 3]
    assert [p.width for p in made] == [8, 8, *infill]


@pytest.mark.parametrize(
    "keeps, infill", [(True, [7, 7, 6, 6, 4, 5, 1]), (False, [8, 8, 8, 8, 4, 8, 8])]
)
def test_corrections_are_fed_by_the_pass_behind_them(keeps, infill):
    """The first slot gets one in the verification, then each slot in each verify."""
    params = DecodingParams(4, 8, infill="correct")
    made = simulate(params, NothingPasses(), 8, keeps_accepted=keeps)
    kinds = ["plan", "verify", *["predict", "infill_verify"] * 3, "infill_verify"]
    assert [p.kind for p in made] == kinds
    assert [p.width for p in made] == [8, 8, *infill]


@pytest.mark.parametrize("chance", [0.3, 0.7])
def test_twins_with_corrected_infill_make_the_simulated_passes(chance):
    asked = DecodingParams(8, 32, 0.9, 0.4, infill="correct"), Profile(0.6, chance)
    plain = contributions.decode(*asked, NO_RIDERS, (), **SIZE)
    assert plain.figures == tokens_per_forward(*asked, **SIZE)
    # rows that cost all but nothing; then those that are likely needed
    fast = contributions.decode(*asked, contributions.CONCURRENCY["low"], Saving, **SIZE)
    thrifty = contributions.decode(*asked, contributions.ALL_THAT_FIT, Saving, **SIZE)
    assert torch.equal(fast.responses, plain.responses) and fast.passes < plain.passes
    assert torch.equal(thrifty.responses, plain.responses) and thrifty.rows < fast.rows


def test_engine_with_replay_makes_the_simulated_passes(tmp_path, monkeypatch):
    """Kind by kind and row by row, several requests and profiles in one batch."""
    monkeypatch.setenv(BENCHMARK_ENV, "1")
    from vllm import SamplingParams, TokensPrompt

    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(TINY_SHAPE))
    profiles = [Profile(0.3, 0.7), Profile(0.6, 0.5)]
    params = [
        DecodingParams(8, 32, 0.9, 0.4),
        DecodingParams(4, 16, 0.8, 0.2, infill="correct"),
    ]
    seeds = [seed_of(index % 2, index) for index in range(4)]
    tables = build_tables(profiles, TINY_SHAPE["vocab_size"], (3, 1), "cpu")
    expected = [
        made
        for index, seed in enumerate(seeds)
        for made in simulate(params[index % 2], DrawnOutcomes(tables, seed, params[index % 2]), 64)
    ]
    options = {"diffusion_config": {"canvas_length": 32}, "load_format": "dummy"}
    options["override_generation_config"] = options_of(params[0])
    config = to_config(profiles) | {"refusion_schedule": "plain"}
    with engine(model, **options, additional_config=config) as llm:
        watch = compat.ScheduleWatch(compat.engine_core_of(llm).scheduler)
        before = snapshot(llm)
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=[5, 6, 7])] * len(seeds),
            [
                SamplingParams(
                    temperature=0.0, seed=seed, max_tokens=64, ignore_eos=True, detokenize=False,
                    extra_args=options_of(params[index % 2]),
                )
                for index, seed in enumerate(seeds)
            ],
            use_tqdm=False,
        )  # fmt: skip
        counts = {name: value - before[name] for name, value in snapshot(llm).items()}
    tokens = [output.outputs[0].token_ids for output in outputs]
    assert [len(found) for found in tokens] == [64] * 4
    assert not {1, 3} & {token for found in tokens for token in found}
    assert counts["forward_passes"] == len(expected)
    assert counts["rows_fed"] == sum(made.width for made in expected)
    for kind in ("plan", "verify", "predict", "infill_verify"):
        assert counts[kind] == sum(made.kind == kind for made in expected)
    assert watch.steps_since_prompt > 3


@pytest.mark.slow
def test_bench_runs_both_sides_end_to_end(tmp_path, tiny_checkpoint):
    """The real thing in fresh processes: the bundled model against a random Qwen3."""
    stock = build_model("qwen3-gqa2", tmp_path / "stock")
    command = [sys.executable, "-P", "-m", "vllm_refusion", "bench", "--name", "run"]
    command += ["--model", str(tiny_checkpoint), "--stock-model", str(stock), "--dtype", "float32"]
    command += ["--concurrency", "1,2", "--requests", "2", "--input-len", "8"]
    command += ["--output-len", "32", "--presets", "8/32/0.9/0.4", "--out", str(tmp_path / "out")]
    command += ["--moving-load", "1:0.5,3:0.5"]
    if not ON_GPU:
        command += ["--engine-args", '{"enforce_eager": true}']
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "out" / "run.json").read_text())
    levels = list(report.levels_of(found))
    assert [(x["side"], x["concurrency"]) for x in levels] == [
        ("stock", 1), ("stock", 2), ("refusion", 1), ("refusion", 2)
    ]  # fmt: skip
    for measured in levels:
        assert measured["output_tokens"] == 64 and measured["tokens_per_s"] > 0
        assert measured["step_ms"] > 0 and measured["ttft_ms"] > 0
    assert levels[0]["tokens_per_forward"] == 1.0
    assert levels[2]["counters"]["output_tokens"] == 64
    for side in found["sides"]:
        bins = side["moving"][0]["bins"]
        assert max(at["running"] for at in bins) == 3 and max(at["tokens_per_s"] for at in bins) > 0
    assert (tmp_path / "out" / "run.md").exists()

    turns = [*command, "--name", "turns", "--second-turn", "1", "--output-len", "192"]
    turns += ["--presets", "serial/8"]
    ended = subprocess.run(turns, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for side in json.loads((tmp_path / "out" / "turns.json").read_text())["sides"]:
        (run,) = side["turns"]
        assert not side["levels"] and run["second_ttft_ms"][0] > 0 and run["cached"][0] > 0.3


def test_a_failing_side_is_reported(tmp_path):
    """The other side's figures stay; the exit status and the report say what failed."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_SHAPE))
    command = [sys.executable, "-P", "-m", "vllm_refusion", "bench", "--name", "run"]
    command += ["--shape", str(tmp_path / "config.json"), "--sides", "refusion"]
    command += [
        "--concurrency",
        "1",
        "--max-num-batched-tokens",
        "64",
        "--out",
        str(tmp_path / "out"),
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "max_num_batched_tokens=64 is less than the canvas" in ended.stdout
    found = json.loads((tmp_path / "out" / "run.json").read_text())
    assert found["sides"][0]["error"].startswith("exit status")
