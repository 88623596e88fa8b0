"""``train --mask-adapter``: equals a literal implementation, resumes bit-equal, leaves the base."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mask_adapters import write_adapter
from safetensors.torch import load_file
from torch.nn.functional import kl_div, linear, log_softmax
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from vllm_refusion import stock
from vllm_refusion.adapters import LINEARS, adapter_tensors, check_base, find_base, read_adapter
from vllm_refusion.cli import main
from vllm_refusion.training.collator import Example

pytest.importorskip("peft")
from vllm_refusion.training.adapter_task import AdapterTrainer  # noqa: E402
from vllm_refusion.training.chains import (  # noqa: E402
    Chained,
    Cutting,
    collate_chains,
    cut,
    label_count,
    leading_hits,
)
from vllm_refusion.training.mask_adapter import MaskAdapterModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 40
CLASSES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}


def backbone(kind="qwen3", tied=True, vocabulary=VOCABULARY, **config):
    """A small random model, far from uniform, so that attention matters."""
    make_config, make, more = CLASSES[kind]
    torch.manual_seed(0)
    model = make(
        make_config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            attention_dropout=0.5,  # has no effect on what is frozen
            **{**more, **config},
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.train()


def randomised(model):
    """Factors far from zero, drawn in the order of their names."""
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=chance) * 0.2)
    return model


def literal_logits(model, factors, prefix, masks, first):
    """Logits [masks, V]: the clean prefix and masks as one sequence; these have the adapter."""
    rows = torch.arange(len(prefix) + masks) >= len(prefix)
    hooks = []

    def adapt(name):
        def hook(_, inputs, output):
            low = linear(inputs[0], factors[f"{name}.lora_A"])
            delta = linear(low, factors[f"{name}.lora_B"]) * 2  # lora_alpha / rank
            return output + delta * rows[None, :, None]

        return hook

    for name, module in model.model.named_modules():
        if f"{name}.lora_A" in factors:
            hooks.append(module.register_forward_hook(adapt(name)))
    known = model.get_input_embeddings()(torch.tensor([prefix]))
    fed = torch.cat([known, factors["mask_embedding"].expand(1, masks, -1)], 1)
    places = [*range(len(prefix)), *range(first, first + masks)]
    seen = torch.full((len(places), len(places)), -torch.inf).triu(1)
    hidden = model.model(
        inputs_embeds=fed, position_ids=torch.tensor([places]), attention_mask=seen[None, None]
    ).last_hidden_state
    for hook in hooks:
        hook.remove()
    return model.lm_head(hidden[0, len(prefix) :])


def literal_loss(model, factors, rows, cutting, divergence):
    """The mean over all masks that stand in the text, a sequence for each cut."""
    losses = []
    for row in rows:
        for at in row.cuts:
            first = at + cutting.skips_known
            logits = literal_logits(model, factors, row.tokens[:at], cutting.length, first)
            for logs, place in zip(log_softmax(logits, 1), range(first, len(row.tokens))):
                if divergence:
                    with torch.no_grad():
                        clean = model(torch.tensor([row.tokens[:place]])).logits[0, -1]
                    teacher = log_softmax(clean, 0)
                    losses.append(kl_div(logs, teacher, reduction="sum", log_target=True))
                else:
                    losses.append(-logs[row.tokens[place]])
    return torch.stack(losses).mean()


EXAMPLES = [Example([3, 4], [5, 6, 7, 8, 0]), Example([9], [1, 0]), Example([2] * 6, [3] * 11)]


def cut_rows(cutting, seed=0):
    return [cut(e, cutting, np.random.default_rng([seed, i])) for i, e in enumerate(EXAMPLES)]


def ours(model, rows, count=None):
    batch = collate_chains(rows, model.cutting, 7)
    return model(batch=batch, counts=label_count(batch) if count is None else count)[0]


@pytest.mark.parametrize("divergence", [False, True], ids=["response", "kl"])
@pytest.mark.parametrize("skips_known", [True, False], ids=["skips", "all"])
@pytest.mark.parametrize(
    ("kind", "tied", "layers", "modules"),
    [
        ("qwen3", True, None, LINEARS),
        ("qwen2", False, None, ("down_proj", "q_proj")),
        ("llama", True, [1, 2], LINEARS),
        ("llama", False, None, LINEARS),
    ],
)
def test_loss_and_gradients_are_the_literal_ones(
    kind, tied, layers, modules, skips_known, divergence
):
    cutting = Cutting(3, 4, skips_known)
    rows = cut_rows(cutting)
    model = backbone(kind, tied)
    options = {"divergence": divergence, "chunk_rows": 5}
    adapter = randomised(MaskAdapterModel(model, cutting, 3, layers, modules, **options))
    loss = ours(adapter, rows)
    loss.backward()
    assert not any(parameter.grad is not None for parameter in model.parameters())

    plain = backbone(kind, tied).eval()
    factors = {
        name.removeprefix("adapted.").replace(".default.weight", ""): p.detach().clone()
        for name, p in adapter.trained().items()
    }
    assert len(factors) == 1 + len(modules) * 2 * len(layers or range(3))
    for tensor in factors.values():
        tensor.requires_grad_()
    literal = literal_loss(plain, factors, rows, cutting, divergence)
    literal.backward()
    torch.testing.assert_close(loss, literal, rtol=1e-5, atol=1e-6)
    for name, parameter in adapter.trained().items():
        wanted = factors[name.removeprefix("adapted.").replace(".default.weight", "")].grad
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5, msg=name)


def test_parts_of_a_batch_add_up():
    cutting = Cutting(4, 3, True)
    rows = cut_rows(cutting)
    model = randomised(MaskAdapterModel(backbone(), cutting, 2))
    count = label_count(collate_chains(rows, cutting, 0))
    parts = [ours(model, [row], count) for row in rows]
    torch.testing.assert_close(sum(parts), ours(model, rows))
    silent = ours(model, [Chained([1, 2, 3], [])], count)  # other processes wait for its gradients
    silent.backward()
    assert silent == 0 and all((p.grad == 0).all() for p in model.trained().values())


@pytest.mark.parametrize("skips_known", [True, False])
def test_cuts(skips_known):
    """Any place such that the first mask stands in the response, each at most once."""
    example = Example([1, 2, 3], [4, 5, 6, 7, 0])
    seen = set()
    for seed in range(50):
        cuts = cut(example, Cutting(2, 4, skips_known), np.random.default_rng(seed)).cuts
        assert len(set(cuts)) == 2
        seen |= set(cuts)
    assert seen == set(range(3, 7 if skips_known else 8))
    lonely = cut(Example([1], [0]), Cutting(2, 4, skips_known), np.random.default_rng(0))
    assert list(lonely.cuts) == ([] if skips_known else [1])
    unprompted = cut(Example([], [4, 0]), Cutting(9, 4, skips_known), np.random.default_rng(0))
    assert sorted(unprompted.cuts) == ([] if skips_known else [1])


def test_accepted_drafts_of_a_chain():
    """Row of tokens 0 to 9, cut at 4: masks at 5, 6, 7 or at 4, 5, 6."""
    row = [Chained(list(range(10)), [4, 8])]
    for skips_known, picks, accepted in [
        (True, [[5, 6, 0], [9, 1, 1]], [2, 1]),
        (True, [[0, 6, 7], [0, 1, 1]], [0, 0]),
        (False, [[0, 5, 6], [0, 9, 1]], [2, 1]),
        (False, [[4, 0, 6], [8, 0, 1]], [0, 0]),
    ]:
        cutting = Cutting(3, 3, skips_known)
        batch = collate_chains(row, cutting, 0)
        padded = torch.tensor([[*picks[0], *picks[1], 0, 0, 0]])
        assert leading_hits(padded, batch, cutting).tolist() == accepted


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_checkpoint):
    """A plain checkpoint: no mask token in its configuration."""
    folder = tmp_path_factory.mktemp("models") / "base"
    config = {"head_dim": 32, "eos_token_id": 0, "pad_token_id": 2}  # a size that vLLM's CPU has
    backbone(vocabulary=3321, **config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The toy task: say a letter eight times."""
    folder, chance = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, count in (("train", 40), ("dev", 4)):
        letters = [chance.choice("ABCDEFGH") for _ in range(count)]
        rows = [{"query": letter, "response": " ".join(letter * 8)} for letter in letters]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(base, data, folder, *options, code=0):
    command = ["train", base, "--data", data / "train.jsonl", "-o", folder, "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, command), "--mask-adapter", *map(str, options)])
    assert ended.value.code == code


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


SHORT = ("--batch-size", 4, "--micro-batch-size", 2, "--log-every", 1, "--rank", 4)
SHORT += ("--chain-length", 4, "--chains-per-row", 2)


def test_what_is_written(base, data, tmp_path):
    before = (base / "model.safetensors").read_bytes()
    dev = ("--dev", data / "dev.jsonl", "--eval-every", 30)
    options = ("--steps", 30, "--batch-size", 16, "--micro-batch-size", 16, "--learning-rate", 2e-2)
    options += ("--rank", 4, "--chain-length", 4, "--adapter-layers", "upper-half")
    options += ("--adapter-modules", "down_proj,o_proj")
    train(base, data, tmp_path / "run", *options, *dev)
    assert (base / "model.safetensors").read_bytes() == before
    rows = [row for row in log(tmp_path / "run") if "loss_mask" in row]
    assert rows[-1]["loss_mask"] < 0.75 * rows[0]["loss_mask"]
    figures = [row for row in log(tmp_path / "run") if "eval_accepted" in row]
    assert figures[-1]["step"] == 30 and 1 < figures[-1]["eval_accepted"] <= 4
    assert figures[-1]["eval_loss_mask"] > 0

    folder = tmp_path / "run/adapter"
    read, tensors = read_adapter(folder), adapter_tensors(folder)
    assert (read.rank, read.scale, read.chain_length, read.skips_known) == (4, 2.0, 4, True)
    assert read.layers == (1, 2) and len(tensors) == 1 + 2 * 2 * 2
    assert read.target_modules == ("o_proj", "down_proj")
    check_base(read, find_base(read))
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_peft_reads_it(base, data, tmp_path):
    from peft import PeftModel

    train(base, data, tmp_path / "run", *SHORT, "--steps", 2)
    folder = tmp_path / "run/adapter"
    model = Qwen3ForCausalLM.from_pretrained(base).eval()
    plain = model(torch.tensor([[1, 2, 3]])).logits
    read = PeftModel.from_pretrained(model, folder)
    tensors = adapter_tensors(folder)
    for name, parameter in read.named_parameters():
        if "lora" in name:
            name = name.removeprefix("base_model.model.model.")
            assert torch.equal(parameter, tensors[name.replace(".default.weight", "")])
    assert not torch.equal(read(torch.tensor([[1, 2, 3]])).logits, plain)


@pytest.fixture(scope="module")
def drafts():
    """The program examples/adapter_drafts.py."""
    path = Path(__file__).parents[2] / "examples/adapter_drafts.py"
    spec = importlib.util.spec_from_file_location("adapter_drafts", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accepted_drafts_are_the_literal_ones(base, tmp_path, drafts):
    """Of every cut of texts that the backbone wrote, in batches and one by one."""
    folder = write_adapter(tmp_path / "adapter", base, rank=3, chain_length=4, size=0.1)
    plain = Qwen3ForCausalLM.from_pretrained(base).eval()
    prompts = [[5, 6, 7], [9], [4] * 8]
    responses = drafts.written(plain, prompts, 9, 0, 2)
    for prompt, response in zip(prompts, responses, strict=True):
        alone = plain.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)
        assert response == alone[0, len(prompt) :].tolist()
    model = drafts.load(folder, str(base), torch.float32, "cpu", chains=2)
    runs = drafts.accepted(model, prompts, responses, masks=16)
    factors = adapter_tensors(folder)
    for prompt, response, run in zip(prompts, responses, runs, strict=True):
        tokens = [*prompt, *response]
        assert len(run) == len(response)
        for at, hits in enumerate(run, len(prompt)):
            picks = literal_logits(plain, factors, tokens[:at], 4, at + 1).argmax(1).tolist()
            right = [pick == token for pick, token in zip(picks, tokens[at + 1 :], strict=False)]
            assert hits == (right + [False]).index(False)


def test_figures_of_drafts(drafts):
    """Tokens of two responses: passes begin at 0, 3, 4 of the first and at 0 of the other."""
    found = drafts.figures([[2, 9, 9, 0, 1, 0], [1, 0]], 2)
    assert found["tokens_per_pass"] == 8 / 4 and found["chains"] == 8
    assert found["accepted"] == 22 / 8 and found["by_depth"] == [0.625, 0.375]


class Killed(Exception):
    """Stands for a process that ends without warning."""


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise Killed


def test_a_resumed_run_ends_bit_equal(base, data, tmp_path, monkeypatch):
    """Killed after step 5 of 7, and gone on with from step 4; its checkpoints hold no backbone."""
    options = (*SHORT, "--steps", 7, "--save-every", 4, "--workers", 1)
    train(base, data, tmp_path / "whole", *options)
    original = AdapterTrainer.__init__

    def killed(self, *, callbacks, **given):
        original(self, callbacks=[*callbacks, Kill()], **given)

    monkeypatch.setattr(AdapterTrainer, "__init__", killed)
    with pytest.raises(Killed):
        train(base, data, tmp_path / "parts", *options)
    monkeypatch.undo()
    kept = load_file(tmp_path / "parts/checkpoint-4/model.safetensors")
    assert len(kept) == 1 + 3 * 7 * 2 and not any("base_layer" in name for name in kept)
    train(base, data, tmp_path / "parts", *options, "--resume")
    one, two = (adapter_tensors(tmp_path / name / "adapter") for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    losses = [
        [(row["step"], row["loss"]) for row in log(tmp_path / name) if "loss_mask" in row]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_batches_may_be_cut_otherwise(base, data, tmp_path):
    """Micro batches, recomputed activations and other processes change no loss."""
    for name, options in (
        ("one", ("--micro-batch-size", 4)),
        ("two", ("--micro-batch-size", 1, "--gradient-checkpointing", "--workers", 1)),
    ):
        train(base, data, tmp_path / name, *SHORT, "--steps", 3, *options)
    for name in ("loss", "grad_norm"):
        one, two = (
            [row[name] for row in log(tmp_path / folder) if name in row]
            for folder in ("one", "two")
        )
        assert len(one) == 3 and one == pytest.approx(two, rel=2e-3)


def test_bf16(base, data, tmp_path):
    train(base, data, tmp_path / "run", *SHORT, "--steps", 2, "--bf16", "--labels", "kl")
    tensors = adapter_tensors(tmp_path / "run/adapter")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    kept = load_file(next((tmp_path / "run").glob("checkpoint-*")) / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(base, data, tmp_path):
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        train(base, data, tmp_path / name, *SHORT, "--steps", 3, *more)
    plain, compiled = (
        [row["loss"] for row in log(tmp_path / name) if "loss_mask" in row]
        for name in ("plain", "compiled")
    )
    assert len(plain) == 3 and compiled == pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_like_one(base, data, tmp_path):
    """Under DDP on the CPU: the same losses and, but for rounding, the same adapter."""
    train(base, data, tmp_path / "one", *SHORT, "--steps", 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "vllm_refusion", "train", base, "--data", data / "train.jsonl", "--quiet"]
    command += ["-o", tmp_path / "two", "--mask-adapter", *SHORT, "--steps", "3"]
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "3 steps of 4 examples on 2 devices" in result.stderr
    for name in ("loss", "grad_norm"):
        one, two = (
            [row[name] for row in log(tmp_path / folder) if "loss_mask" in row]
            for folder in ("one", "two")
        )
        assert len(one) == 3 and one == pytest.approx(two, rel=1e-3)
    first, second = (adapter_tensors(tmp_path / name / "adapter") for name in ("one", "two"))
    assert all(torch.allclose(first[n], second[n], atol=2e-3) for n in first)


def test_a_changed_backbone_is_noticed(base, data, tmp_path, monkeypatch):
    original = MaskAdapterModel.backbone_digest
    seen = []

    def digest(self):
        if seen:
            with torch.no_grad():
                next(self.backbone.parameters()).view(-1)[0].add_(1)
        seen.append(original(self))
        return seen[-1]

    monkeypatch.setattr(MaskAdapterModel, "backbone_digest", digest)
    with pytest.raises(RuntimeError, match="the backbone has changed"):
        train(base, data, tmp_path / "run", *SHORT, "--steps", 1)
    assert len(seen) == 2 and not (tmp_path / "run/adapter").exists()


WRITER = """
import json, sys
what = json.load(open(sys.argv[1]))
assert what["max_tokens"] == [5] * len(what["prompts"]) and what["temperature"] == 0.0
with open(sys.argv[2], "w") as file:
    for ids in what["prompts"]:
        file.write(json.dumps([*(ids[1:2] * 3), what["eos_token_id"]]) + chr(10))
"""


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """Stands for vLLM: says the prompt's second token thrice. Counts its runs."""
    program, runs = tmp_path / "writer.py", []
    program.write_text(WRITER)
    run = stock.subprocess.run

    def stand_in(command, **options):
        runs.append(command)
        return run([sys.executable, str(program), *command[-2:]], **options)

    monkeypatch.setattr(stock.subprocess, "run", stand_in)
    return runs


def test_on_policy_text_is_written_once(base, data, tmp_path, writer):
    """Rows need no response; each file of rows is answered once, by whoever resumes."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    queries = tmp_path / "train.jsonl"
    queries.write_text("".join(json.dumps({"query": row["query"]}) + "\n" for row in rows))
    options = (*SHORT, "--steps", 2, "--on-policy", "--max-tokens", 5)
    options += ("--dev", data / "dev.jsonl", "--eval-every", 1)
    train(base, tmp_path, tmp_path / "run", *options)
    assert [command[2] for command in writer] == ["vllm_refusion.stock"] * 2  # and the dev rows
    own = [json.loads(line) for line in (tmp_path / "run/own/rows.jsonl").read_text().splitlines()]
    assert len(own) == len(rows) and len(set(own[0]["tokens"][:3])) == 1
    assert own[0]["tokens"][3] == 0 and own[0]["response"] and not own[0]["response"].endswith("|>")
    assert {path.name for path in (tmp_path / "run/own").iterdir()} == {"rows.jsonl", "about.json"}
    shutil.rmtree(tmp_path / "run/adapter")
    train(base, tmp_path, tmp_path / "run", *options, "--resume")
    assert len(writer) == 2
    shutil.rmtree(tmp_path / "run/adapter")
    train(base, tmp_path, tmp_path / "run", *options, "--seed", 1, "--resume", code=2)
    assert len(writer) == 2


@pytest.mark.slow
def test_on_policy_text_is_what_the_backbone_writes(base, data, tmp_path):
    """Through vLLM itself, greedily."""
    rows = (data / "train.jsonl").read_text().splitlines(keepends=True)[:4]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    train(base, tmp_path, tmp_path / "run", *SHORT, "--steps", 1, "--on-policy", "--max-tokens", 6)
    model = Qwen3ForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for line in (tmp_path / "run/own/rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["query"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        ids = torch.tensor([prompt])
        output = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)
        assert row["tokens"] == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", 0), "--rank 0: allowed is an integer above 0"),
        (("--chain-length", 0), "--chain-length 0: allowed is an integer above 0"),
        (("--chains-per-row", -1), "--chains-per-row -1: allowed is an integer above 0"),
        (("--adapter-modules", "lm_head"), "--adapter-modules lm_head: allowed is all, or some of"),
        (("--labels", "own"), "--labels own: allowed is response or kl"),
        (("--on-policy", -1), "--on-policy -1.0: allowed is a temperature of at least 0"),
        *(
            (("--adapter-layers", text), f"--adapter-layers {text}: allowed is all, upper-half, or")
            for text in ("lower", "2-1", "0-3", "1", "-2", "a-b")
        ),
        (("--objective", "refusion"), "--objective: has no use with --mask-adapter"),
        (("--from-scratch",), "--from-scratch: has no use with --mask-adapter"),
        (("--slot-sizes", "4,8"), "--slot-sizes: has no use with --mask-adapter"),
        (("--infill-weight", 1), "--infill-weight: has no use with --mask-adapter"),
        (("--dev-decoded", 1), "--dev-decoded: has no use with --mask-adapter"),
        (("--dev-preset", "math"), "--dev-preset: has no use with --mask-adapter"),
        (("--max-tokens", 9), "--max-tokens: has no use with --mask-adapter but --on-policy"),
    ],
)
def test_bad_settings_are_refused(base, data, tmp_path, capsys, options, message):
    options = [*options[:1], *options[1:]]
    if options[0] == "--adapter-layers":
        options = [f"{options[0]}={options[1]}"]
    train(base, data, tmp_path / "run", *options, code=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize("option", ["--rank", "--chain-length", "--labels", "--skips-known"])
def test_options_of_adapters_alone_are_refused(base, data, tmp_path, capsys, option):
    command = ["train", base, "--data", data / "train.jsonl", "-o", tmp_path / "run", option]
    with pytest.raises(SystemExit):
        main([*map(str, command), *([] if option == "--skips-known" else ["1"])])
    assert f"{option}: needs --mask-adapter" in capsys.readouterr().err


def test_another_base_is_refused(base, data, tmp_path, capsys):
    train(base, data, tmp_path / "run", *SHORT, "--steps", 1)
    shutil.rmtree(tmp_path / "run/adapter")
    train(base, data, tmp_path / "run", *SHORT, "--steps", 1, "--rank", 8, "--resume", code=2)
    assert "other settings: adapter was" in capsys.readouterr().err
    other = tmp_path / "base"
    shutil.copytree(base, other)
    model = Qwen3ForCausalLM.from_pretrained(base)
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(other)
    train(other, data, tmp_path / "run", *SHORT, "--steps", 1, "--resume", code=2)
    assert "base was" in capsys.readouterr().err


def test_other_architectures_are_refused(data, tmp_path, capsys, tiny_checkpoint):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "gpt2")
    train(tmp_path / "gpt2", data, tmp_path / "run", code=2)
    assert "gpt2 has the architecture GPT2LMHeadModel; supported" in capsys.readouterr().err
