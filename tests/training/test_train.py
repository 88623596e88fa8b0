"""``vllm-refusion train``: a toy task is learned, runs go on bit-equal, bad settings refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from vllm_refusion.cli import build_parser, main
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import decode
from vllm_refusion.training import run
from vllm_refusion.training.hybrid_task import HybridTask
from vllm_refusion.training.recipe import Recipe
from vllm_refusion.training.train_command import settings_from
from vllm_refusion.training.trainer import SEAL, ReFusionTrainer

pytest.importorskip("accelerate")
GENERATION = {"eos_token_id": 0, **vars(DecodingParams(4, 8, 0.9, 0.4))}
del GENERATION["slot_start"]  # only a checkpoint trained for "next" says it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint):
    """A ReFusion checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=3321,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        mask_token_id=1,
        eos_token_id=0,
        pad_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The toy task: say a letter eight times. A file of training rows, one of dev rows."""
    folder, chance = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, count in (("train", 300), ("dev", 8)):
        letters = [chance.choice("ABCDEFGH") for _ in range(count)]
        rows = [{"query": letter, "response": " ".join(letter * 8)} for letter in letters]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(checkpoint, data, folder, *options, code=0):
    command = ["train", checkpoint, "--data", data / "train.jsonl", "-o", folder, "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, command), *map(str, options)])
    assert ended.value.code == code


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model/model.safetensors")


TOY = ("--steps", 150, "--batch-size", 32, "--micro-batch-size", 32, "--learning-rate", 5e-3)
SHORT = ("--batch-size", 8, "--micro-batch-size", 4, "--learning-rate", 1e-3, "--log-every", 1)


def test_a_toy_task_is_learned(checkpoint, data, tmp_path):
    dev = ("--dev", data / "dev.jsonl", "--eval-every", 75, "--max-tokens", 32)
    dev += ("--dev-slot-size", 4, "--dev-block-length", 16, "--dev-decoded", 8)
    train(checkpoint, data, tmp_path / "run", *TOY, *dev)
    rows = [row for row in log(tmp_path / "run") if "loss_mdm" in row]
    for name in ("loss_ar", "loss_mdm"):
        assert rows[0][name] > 5
        assert rows[-1][name] < 0.3
    assert all(abs(r["loss"] - r["loss_ar"] - r["loss_mdm"]) < 2e-3 for r in rows)
    last = [row for row in log(tmp_path / "run") if "eval_tpf" in row][-1]
    assert last["step"] == 150 and last["eval_loss_mdm"] < 0.3
    assert last["eval_right"] >= 0.75 and last["eval_tpf"] > 2
    samples = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    assert len(samples) == 16 and json.loads(samples[-1])["step"] == 150

    # what is written is a checkpoint in the published form, with its decoding defaults
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert model.config.architectures == ["Qwen3ForCausalLM"] and model.config.mask_token_id == 1
    assert model.config.use_cache
    written = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert {name: written[name] for name in GENERATION} == GENERATION
    assert not list((tmp_path / "run/model").glob("*.bin"))
    prompt = tokenizer.encode("<|user|>C<|assistant|>", add_special_tokens=False)
    answer = decode(
        model, prompt, DecodingParams(4, 16), mask_token_id=1, eos_token_id=0, max_tokens=32
    )
    assert "C C C" in tokenizer.decode(answer.tokens)


def test_infill_loss_is_trained_and_logged(checkpoint, data, tmp_path):
    more = ("--infill-weight", 0.5, "--block-share", 0.5, "--dev", data / "dev.jsonl")
    train(checkpoint, data, tmp_path / "run", *TOY, *more, "--eval-every", 150, "--max-tokens", 8)
    rows = [row for row in log(tmp_path / "run") if "loss_infill" in row]
    assert rows[0]["loss_infill"] > 5 and rows[-1]["loss_infill"] < 0.3
    expected = [r["loss_ar"] + r["loss_mdm"] + 0.5 * r["loss_infill"] for r in rows]
    assert [row["loss"] for row in rows] == pytest.approx(expected, abs=2e-3)
    assert [r for r in log(tmp_path / "run") if "eval_loss" in r][-1]["eval_loss_infill"] < 0.3


def test_joined_slots_decode_serially_without_masks(checkpoint, tmp_path):
    """Letters in order from the one asked for, each told by the one before it."""
    chance = random.Random(0)

    def row():
        first = chance.randrange(8)
        walk = [(first + n) % 8 for n in range(12)]
        return {"query": "ABCDEFGH"[first], "response": " ".join("ABCDEFGH"[n] for n in walk)}

    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(300)))
    more = ("--slot-sizes", 4, "--joined-slots", "--ordered-share", 0.5)
    train(checkpoint, tmp_path, tmp_path / "run", *TOY, *more)
    train(tmp_path / "run/model", tmp_path, tmp_path / "on", *SHORT, "--steps", 1)
    starts = []
    for folder in ("run", "on"):
        written = json.loads((tmp_path / folder / "model/generation_config.json").read_text())
        starts.append(written.pop("slot_start", None))
        assert {name: written[name] for name in GENERATION} == GENERATION
    assert starts == ["next", None]  # without the option a checkpoint no longer says so

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    params = DecodingParams(4, 4, mode="serial", slot_start="next")
    right = 0
    for first in range(8):
        prompt = f"<|user|>{'ABCDEFGH'[first]}<|assistant|>"
        known = tokenizer.encode(prompt, add_special_tokens=False)
        answer = decode(model, known, params, mask_token_id=1, eos_token_id=0, max_tokens=40)
        walk = " ".join("ABCDEFGH"[(first + n) % 8] for n in range(12))
        right += tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() == walk
    assert right >= 7


@pytest.mark.parametrize("certainty, certainly", [(0, 1), (1, 1 / 8), (0.5, 8**-0.5)])
def test_first_masks_learn_how_sure_the_slot_is(checkpoint, tmp_path, certainty, certainly):
    """Slots of an A and three letters that are one of two: the A is sure, the slot is not."""
    chance = random.Random(0)
    texts = [" ".join(["A", *(chance.choice("BC") for _ in range(3))]) for _ in range(300)]
    rows = [{"query": "Q", "response": text} for text in texts]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--slot-sizes", 4, "--slot-certainty", certainty)
    train(checkpoint, tmp_path, tmp_path / "run", *TOY, *more)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    prompt, letters = "<|user|>Q<|assistant|>", " ".join("ABBB")
    known = tokenizer.encode(prompt, add_special_tokens=False)
    first = tokenizer.encode(prompt + letters, add_special_tokens=False)[len(known)]
    with torch.no_grad():
        row = model(torch.tensor([[*known, 1, 1, 1, 1]])).logits[0, len(known)].softmax(0)
    assert row[first].item() == pytest.approx(certainly, abs=0.07)
    assert (row[first] + row[1]).item() == pytest.approx(1, abs=0.02)  # 1 is the mask


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(checkpoint, data, tmp_path):
    options = (*SHORT, "--steps", 3, "--infill-weight", 1, "--slot-certainty", 1)
    for name, more in (("plain", ()), ("compiled", ("--compile", "--gradient-checkpointing"))):
        train(checkpoint, data, tmp_path / name, *options, *more)
    plain, compiled = (
        [row["loss"] for row in log(tmp_path / name) if "loss_ar" in row]
        for name in ("plain", "compiled")
    )
    assert len(plain) == 3 and compiled == pytest.approx(plain, rel=1e-3)


class Killed(Exception):
    """Stands for a process that ends without warning."""


class Interrupt(TrainerCallback):
    """Calls ``act`` at the end of a step."""

    def __init__(self, step, act) -> None:
        self._step, self._act = step, act

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self._step:
            self._act()


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("more", [(), ("--joined-slots", "--ordered-share", 0.5)])
def test_a_resumed_run_ends_bit_equal(checkpoint, data, tmp_path, monkeypatch, more):
    """Killed after step 5 of 9, in the second epoch, gone on with, and SIGTERM after step 7."""
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)[:27]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    options = (*SHORT, "--steps", 9, "--save-every", 4, *more)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(checkpoint, tmp_path, whole, *options)

    def interrupted(step, act):
        def trainer(*, callbacks, **given):
            return ReFusionTrainer(callbacks=[Interrupt(step, act), *callbacks], **given)

        monkeypatch.setattr(HybridTask, "trainer", staticmethod(trainer))

    interrupted(5, kill)
    with pytest.raises(Killed):
        train(checkpoint, tmp_path, parts, *options)
    (parts / "checkpoint-5").mkdir()  # what a save leaves that is cut off
    assert run.latest_checkpoint(parts).name == "checkpoint-4"
    interrupted(7, terminate)
    train(checkpoint, tmp_path, parts, *options, "--resume", code=1)
    assert run.latest_checkpoint(parts).name == "checkpoint-7"
    assert not (parts / "model").exists()
    monkeypatch.undo()
    train(checkpoint, tmp_path, parts, *options, "--resume")

    one, two = weights(whole), weights(parts)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    losses = [[(r["step"], r["loss"]) for r in log(f) if "loss_ar" in r] for f in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 9


@pytest.fixture(scope="module")
def crashed(checkpoint, data, tmp_path_factory):
    """A run of four steps as a crash behind the last checkpoint leaves it, and its outcome."""
    folder = tmp_path_factory.mktemp("crashed")
    train(checkpoint, data, folder / "run", *CRASHED)
    outcome = weights(folder / "run")
    shutil.rmtree(folder / "run/model")
    return folder / "run", outcome


CRASHED = (*SHORT, "--steps", 4, "--save-every", 2)


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(crashed, tmp_path, capsys):
    """Whichever of its files it is; without one before the run starts anew."""
    source, _ = crashed
    names = [path.name for path in (source / "checkpoint-4").iterdir()]
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", SEAL} < set(names)
    for name in names:
        shutil.copytree(source, tmp_path / name)
        path = tmp_path / name / "checkpoint-4" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert run.latest_checkpoint(tmp_path / name).name == "checkpoint-4"
        run._set_damaged_aside(tmp_path / name)
        assert run.latest_checkpoint(tmp_path / name).name == "checkpoint-2"
        said = capsys.readouterr().err
        assert str(path) in said and f"goes on from {tmp_path / name}/checkpoint-2" in said
    (tmp_path / name / "checkpoint-2/trainer_state.json").unlink()
    run._set_damaged_aside(tmp_path / name)
    assert run.latest_checkpoint(tmp_path / name) is None
    assert "starts anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content",
    [
        ("log.jsonl", '{"step": 3, "lo'),
        ("samples.jsonl", '{"step": 1, "text": "a"}\n{"step": 4, "text": "b"}\n{"st'),
        ("data/about.json", ""),
        ("data/tokens.bin", ""),
        ("checkpoint-4/optimizer.pt", ""),
    ],
)
def test_a_run_goes_on_after_a_crash_in_the_midst_of_writing(
    checkpoint, data, crashed, tmp_path, name, content
):
    source, outcome = crashed
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    if not name.startswith("checkpoint"):
        shutil.rmtree(folder / "checkpoint-4")
    with open(folder / name, "a" if name.endswith("jsonl") else "w") as file:
        file.write(content)
    train(checkpoint, data, folder, *CRASHED, "--resume")
    assert all(torch.equal(outcome[n], w) for n, w in weights(folder).items())
    assert [row["step"] for row in log(folder) if "loss_ar" in row] == [1, 2, 3, 4]
    if name == "samples.jsonl":
        assert (folder / name).read_text() == '{"step": 1, "text": "a"}\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("settings.json", "", "settings.json: not JSON: Expecting value at column 1: restore it"),
        ("settings.json", "[]", "settings.json: not settings: restore it"),
        ("log.jsonl", 'x\n{"step": 1}\n', "log.jsonl:1: no line of this run (not JSON"),
        ("log.jsonl", '{"step": "1"}\n', "log.jsonl:1: no line of this run"),
        ("log.jsonl", "[]\n", "log.jsonl:1: no line of this run"),
    ],
)
def test_other_broken_files_of_a_run_are_named(
    checkpoint, data, crashed, tmp_path, capsys, name, content, message
):
    folder = tmp_path / "run"
    shutil.copytree(crashed[0], folder)
    (folder / name).write_text(content)
    train(checkpoint, data, folder, *CRASHED, "--resume", code=2)
    assert message in capsys.readouterr().err


def test_batches_may_be_cut_otherwise(checkpoint, data, tmp_path):
    """Accumulating gradients over micro batches, and checkpointing them, is the same training."""
    for name, options in (
        ("one", ("--micro-batch-size", 8)),
        ("two", ("--micro-batch-size", 2, "--gradient-checkpointing", "--workers", 1)),
    ):
        train(checkpoint, data, tmp_path / name, *SHORT, "--steps", 3, *options)
    one, two = (log(tmp_path / name) for name in ("one", "two"))
    for name in ("loss_ar", "loss_mdm", "grad_norm"):
        values = [[row[name] for row in rows if name in row] for rows in (one, two)]
        assert len(values[0]) == 3
        assert values[0] == pytest.approx(values[1], rel=2e-3)


def test_autoregressive_twin(checkpoint, data, tmp_path):
    options = ("--objective", "autoregressive", "--from-scratch", "--seed", 3, "--max-tokens", 4)
    dev = ("--dev", data / "dev.jsonl", "--eval-every", 2, "--dev-decoded", 1)
    train(checkpoint, data, tmp_path / "run", *SHORT, "--steps", 2, *options, *dev)
    rows = log(tmp_path / "run")
    assert all(row["loss_mdm"] == 0 < row["loss_ar"] for row in rows if "loss_ar" in row)
    assert [row["eval_tpf"] for row in rows if "eval_tpf" in row] == [1.0]


@pytest.mark.slow
def test_two_processes_train_like_one(checkpoint, data, tmp_path):
    """Under DDP on the CPU: the same losses and, but for rounding, the same weights."""
    train(checkpoint, data, tmp_path / "one", *SHORT, "--steps", 4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "vllm_refusion", "train", checkpoint, "--data", data / "train.jsonl"]
    command += ["-o", tmp_path / "two", "--quiet", *SHORT, "--steps", "4"]
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "4 steps of 8 examples on 2 devices" in result.stderr
    for name in ("loss", "grad_norm"):
        one, two = (
            [row[name] for row in log(tmp_path / folder) if "loss_ar" in row]
            for folder in ("one", "two")
        )
        assert one == pytest.approx(two, rel=1e-3)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(first[n], second[n], atol=2e-3) for n in first)


def test_a_signal_to_all_processes_of_a_run_saves(checkpoint, data, tmp_path):
    """As a terminal, timeout or systemd send it: to the processes that prepare batches too."""
    command = [sys.executable, "-m", "vllm_refusion", "train", checkpoint, "-o", tmp_path / "run"]
    command += ["--data", data / "train.jsonl", "--quiet", *SHORT, "--steps", 100000]
    with subprocess.Popen(
        list(map(str, [*command, "--workers", 2])),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            until = time.monotonic() + 120
            while not (tmp_path / "run/log.jsonl").exists() or len(log(tmp_path / "run")) < 3:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGTERM)
            messages = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 1 and "interrupted; go on with --resume" in messages
    assert run.latest_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--objective", "diffusion"), "--objective diffusion: allowed is refusion or autoreg"),
        (("--steps", 1, "--epochs", 1), "either --steps or --epochs"),
        (("--slot-sizes", "0,4"), "--slot-sizes (0, 4): allowed is integers above 0"),
        (("--infill-weight", -1), "--infill-weight -1.0: allowed is a number of at least 0"),
        (("--block-share", 1.5), "--block-share 1.5: allowed is a number in [0, 1]"),
        (("--ordered-share", -0.1), "--ordered-share -0.1: allowed is a number in [0, 1]"),
        (
            ("--ordered-share", 0.6, "--block-share", 0.5),
            "--ordered-share 0.6: allowed is a number in [0, 1], with --block-share 1 at most",
        ),
        (
            ("--objective", "autoregressive", "--joined-slots"),
            "--joined-slots True: allowed is no value with --objective autoregressive",
        ),
        *(
            (("--objective", "autoregressive", option, value), f"{option} {shown}: allowed is no")
            for option, value, shown in [
                ("--infill-weight", 1, 1.0),
                ("--mdm-weight", 0.5, 0.5),
                ("--block-share", 0.5, 0.5),
                ("--ordered-share", 0.5, 0.5),
                ("--slot-certainty", 2, 2.0),
                ("--slot-sizes", "4,8", (4, 8)),
            ]
        ),
        (("--batch-size", 9), "--batch-size 9: allowed is a multiple of 8"),
        (("--dev-slot-size", 5), "block_length=128 is not supported"),
        (("--max-length", 3), "no row is left"),
    ],
)
def test_bad_settings_are_refused(checkpoint, data, tmp_path, capsys, options, message):
    train(checkpoint, data, tmp_path / "run", *options, code=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/model").exists()


def test_bad_data_is_refused_with_file_and_line(checkpoint, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"query": "a", "response": "b"}\n{"query": "a"}\n')
    train(checkpoint, tmp_path, tmp_path / "run", "--steps", 1, code=2)
    assert f"{tmp_path}/train.jsonl:2: no response" in capsys.readouterr().err


def test_runs_are_not_mixed_up(checkpoint, data, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "something").touch()
    train(checkpoint, data, folder, *SHORT, "--steps", 1, code=2)
    assert "is not empty: go on with --resume" in capsys.readouterr().err
    (folder / "something").unlink()
    train(checkpoint, data, folder, *SHORT, "--steps", 1)
    train(checkpoint, data, folder, *SHORT, "--steps", 1, "--resume", code=2)
    assert "the run is complete" in capsys.readouterr().err
    (folder / "model").rename(tmp_path / "model")
    train(checkpoint, data, folder, *SHORT, "--steps", 2, "--seed", 5, "--resume", code=2)
    assert "other settings: steps was 1, now 2, seed was 0, now 5" in capsys.readouterr().err


def test_an_unconverted_model_is_refused(data, tmp_path, capsys, tiny_checkpoint):
    Qwen3Config(vocab_size=3321).save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "plain")
    train(tmp_path / "plain", data, tmp_path / "run", code=2)
    assert "plain has no mask_token_id: make a ReFusion checkpoint" in capsys.readouterr().err


def test_defaults_are_the_published_recipe():
    arguments = ["train", "model", "-o", "run", "--data", "a.jsonl"]
    recipe, _ = settings_from(build_parser().parse_args(arguments))
    assert recipe == Recipe("model")
    assert (recipe.epochs, recipe.learning_rate, recipe.max_length) == (4, 2e-5, 4096)
    assert (recipe.schedule, recipe.warmup_steps, recipe.weight_decay) == ("cosine", 0, 0)


def test_training_imports_no_vllm(tmp_path):
    program = "import sys, vllm_refusion.training.run, vllm_refusion.training.convert\n"
    program += "assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
