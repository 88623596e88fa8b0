"""Mask adapters on disk: what is broken is named, a wrong base is refused, an equal one is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mask_adapters import write_adapter
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vllm_refusion.adapters import (
    CONFIG,
    LINEARS,
    TENSORS,
    adapter_tensors,
    check_base,
    find_base,
    fingerprint,
    is_adapter,
    read_adapter,
)

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    return write_adapter(tmp_path / "adapter", base)


def test_what_is_read(base, tmp_path):
    folder = write_adapter(
        tmp_path / "a", base, rank=3, targets=("o_proj", "q_proj"), layers=[2, 1]
    )
    read = read_adapter(folder)
    assert is_adapter(folder) and not is_adapter(base)
    assert (read.rank, read.scale, read.chain_length, read.skips_known) == (3, 2.0, 8, True)
    assert read.target_modules == ("q_proj", "o_proj") and read.layers == (1, 2)
    tensors = adapter_tensors(folder)
    assert len(tensors) == 1 + 2 * 2 * 2
    assert tensors["mask_embedding"].shape == (32,)
    assert tensors["layers.1.self_attn.q_proj.lora_A"].shape == (3, 32)
    assert tensors["layers.2.self_attn.o_proj.lora_B"].shape == (32, 3)
    check_base(read, find_base(read))


def test_all_linear_layers_of_all_layers(adapter):
    assert read_adapter(adapter).layers is None
    assert len(adapter_tensors(adapter)) == 1 + 3 * len(LINEARS) * 2


OURS = "refusion_mask_adapter"


@pytest.mark.parametrize(
    "key, value, message",
    [
        (OURS, None, f"no object {OURS}: not a mask adapter"),
        (f"{OURS}.version", 2, f"{OURS}.version 2: allowed is 1"),
        (f"{OURS}.chain_length", 0, f"{OURS}.chain_length 0: allowed is an integer above 0"),
        (f"{OURS}.chain_length", True, f"{OURS}.chain_length True: allowed is an integer"),
        (f"{OURS}.skips_known", 1, f"{OURS}.skips_known 1: allowed is true or false"),
        (f"{OURS}.base_fingerprint", "ab", "base_fingerprint 'ab': allowed is 64 hexadecimal"),
        ("peft_type", "IA3", "peft_type 'IA3': allowed is 'LORA'"),
        ("r", 0, "r 0: allowed is an integer above 0"),
        ("r", "8", "r '8': allowed is an integer above 0"),
        ("lora_alpha", -1, "lora_alpha -1: allowed is a finite number above 0"),
        ("target_modules", "all-linear", "target_modules 'all-linear': allowed is a list of"),
        ("target_modules", ["lm_head"], "target_modules ['lm_head']: allowed is a list of"),
        ("layers_to_transform", 1, "layers_to_transform 1: allowed is null or a list"),
        ("layers_to_transform", [True], "layers_to_transform [True]: allowed is null or a list"),
        ("base_model_name_or_path", None, "base_model_name_or_path None: allowed is a folder"),
        ("use_rslora", True, "use_rslora True: allowed is False"),
        ("use_dora", True, "use_dora True: allowed is False"),
        ("bias", "all", "bias 'all': allowed is 'none'"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern {'q_proj': 2}: allowed is {}"),
        ("modules_to_save", ["lm_head"], "modules_to_save ['lm_head']: allowed is None"),
    ],
)
def test_a_broken_configuration_is_named(adapter, key, value, message):
    path = adapter / CONFIG
    config = json.loads(path.read_text())
    *inner, last = key.split(".")
    (config[inner[0]] if inner else config)[last] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError) as raised:
        adapter_tensors(adapter)
    assert str(path) in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize("content", ["", "[]", '{"peft_type": "LORA"}'])
def test_other_files_are_no_adapters(adapter, content):
    (adapter / CONFIG).write_text(content)
    assert not is_adapter(adapter)
    with pytest.raises(ValueError, match=CONFIG):
        read_adapter(adapter)


PREFIX = "base_model.model.model."
A = "layers.1.mlp.up_proj.lora_A"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{PREFIX}{A}.weight"), f"{A} is missing"),
        (lambda t: t.pop("mask_embedding"), "mask_embedding is missing"),
        (
            lambda t: t.update({f"{PREFIX}norm.weight": torch.ones(32)}),
            f"norm is none that {CONFIG} speaks of",
        ),
        (
            lambda t: t.update({f"{PREFIX}{A}.weight": torch.ones(5, 32)}),
            f"{A} has the shape [5, 32], not [rank 4, hidden 32]",
        ),
        (
            lambda t: t.update(
                {f"{PREFIX}{A.replace('lora_A', 'lora_B')}.weight": torch.ones(9, 4)}
            ),
            "up_proj.lora_B has the shape [9, 4], not [intermediate 48, rank 4]",
        ),
        (
            lambda t: t.update({"mask_embedding": torch.ones(1, 32)}),
            "mask_embedding has the shape [1, 32], not [hidden]",
        ),
        (
            lambda t: t.update({"mask_embedding": torch.full((32,), torch.nan)}),
            "mask_embedding: allowed are finite",
        ),
        (
            lambda t: t.update({"mask_embedding": torch.ones(32, dtype=torch.int32)}),
            "mask_embedding: allowed are finite",
        ),
    ],
)
def test_broken_tensors_are_named(adapter, change, message):
    path = adapter / TENSORS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError) as raised:
        adapter_tensors(adapter)
    assert str(path) in str(raised.value) and message in str(raised.value)


def test_a_cut_file_of_tensors_is_named(adapter):
    path = adapter / TENSORS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=TENSORS):
        adapter_tensors(adapter)
    path.unlink()
    with pytest.raises(ValueError, match=TENSORS):
        adapter_tensors(adapter)


def test_an_equal_base_saved_again_is_accepted(base, adapter, tmp_path):
    model = Qwen3ForCausalLM.from_pretrained(base)
    for name, options in {"sharded": {"max_shard_size": "20KB"}, "same": {}}.items():
        model.save_pretrained(tmp_path / name, **options)
        check_base(read_adapter(adapter), tmp_path / name)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "same/config.json").read_text())
    config |= {"transformers_version": "4.51.0", "torch_dtype": "float32"}
    theta = config.pop("rope_parameters")["rope_theta"]  # as older versions wrote it
    config |= {"rope_theta": theta, "rope_scaling": None, "mask_token_id": 3}
    (tmp_path / "same/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "same/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "same/model.safetensors", {"format": "pt"})
    check_base(read_adapter(adapter), tmp_path / "same")


def test_a_dtype_that_holds_the_values_is_accepted(base, tmp_path):
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    model.float().save_pretrained(tmp_path / "float32")
    assert fingerprint(tmp_path / "bfloat16") == fingerprint(tmp_path / "float32")
    assert fingerprint(base) != fingerprint(tmp_path / "float32")  # the values were rounded


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.norm.weight"])
def test_a_base_with_other_weights_is_refused(base, adapter, tmp_path, name):
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors[name] *= 1.001
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is an adapter of another model than .*other"):
        check_base(read_adapter(adapter), other)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 2},
        {"head_dim": 32},
        {"num_key_value_heads": 4},
        {"rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"tie_word_embeddings": False},
        {"hidden_act": "gelu"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_base_with_another_configuration_is_refused(base, adapter, tmp_path, change):
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="is an adapter of another model"):
        check_base(read_adapter(adapter), other)


def test_architectures_differ(base, tmp_path):
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "llama")
    assert fingerprint(tmp_path / "llama") != fingerprint(base)


def test_folders_without_a_model_are_named(base, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: No such file"):
        fingerprint(tmp_path)
    shutil.copy(base / "config.json", tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/model.safetensors"):
        fingerprint(tmp_path)


def test_where_the_base_is(base, adapter, tmp_path):
    read = read_adapter(adapter)
    assert os.path.samefile(find_base(read), base)
    assert os.path.samefile(find_base(replace(read, base=str(base))), base)
    assert find_base(replace(read, base="Qwen/Qwen3-0.6B")) == "Qwen/Qwen3-0.6B"
    shutil.copytree(base, tmp_path / "moved")
    assert find_base(replace(read, base="moved")) == str(tmp_path / "moved")
    assert find_base(replace(read, base="/nowhere/moved")) == str(tmp_path / "moved")
    for gone in ("/nowhere/gone", "../gone", "a/b/gone"):
        with pytest.raises(ValueError, match="base_model_name_or_path .*gone': no model in "):
            find_base(replace(read, base=gone))


def test_reading_needs_no_vllm_and_no_peft():
    program = "import sys, vllm_refusion.adapters\n"
    program += "assert not {'vllm', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_bundled_one_fits_its_base_and_is_small():
    examples = Path(__file__).parent.parent / "examples"
    folder = examples / "stock-tiny-adapter"
    adapter = read_adapter(folder)
    assert Path(find_base(adapter)) == examples / "stock-tiny"
    check_base(adapter, find_base(adapter))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2**20
