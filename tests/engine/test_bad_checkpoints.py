"""A checkpoint that cannot be served fails at start, with a sentence that says what to do."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from conformance import build_model
from engine import engine


@pytest.fixture
def broken(tmp_path):
    """A copy of a checkpoint whose config and weights may be changed."""

    def make(weights=None, drop=(), **config):
        copy = build_model("qwen3-gqa2", tmp_path)
        path = copy / "config.json"
        changed = json.loads(path.read_text()) | config
        path.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
        if weights is not None:
            tensors = load_file(copy / "model.safetensors")
            weights(tensors)
            save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        for name in drop:
            (copy / name).unlink()
        return copy

    return make


def start(model, **options):
    with engine(model, **options):
        pass


@pytest.mark.parametrize("mask", [113, "<mask>", True], ids=str)
def test_mask_token_outside_the_vocabulary(broken, mask):
    with pytest.raises(ValueError, match="mask_token_id=.* needs the id of its mask token, in"):
        start(broken(mask_token_id=mask))


def test_no_mask_token(broken):
    """Only a checkpoint that names our class: else it is a stock model, and served as one."""
    model = broken(mask_token_id=None, architectures=["ReFusionQwen3ForCausalLM"])
    with pytest.raises(ValueError, match="mask_token_id=None.* needs the id of its mask token"):
        start(model)


def test_wrong_shapes(broken):
    with pytest.raises(
        ValueError, match="(?s)weight of shape .* does not fit .*config.json.* again"
    ):
        start(broken(vocab_size=120))


def test_missing_weights(broken):
    def drop_a_layer(tensors):
        for name in [name for name in tensors if "layers.1.mlp" in name]:
            del tensors[name]

    with pytest.raises(ValueError, match="(?s)layers.1.mlp.* incomplete.* again"):
        start(broken(drop_a_layer))


def test_unknown_weights(broken):
    def add_a_weight(tensors):
        tensors["model.layers.0.mlp.surplus.weight"] = tensors["model.norm.weight"].clone()

    with pytest.raises(ValueError, match="(?s)surplus.* does not fit .*config.json"):
        start(broken(add_a_weight))


def test_no_weights(broken):
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        start(broken(drop=["model.safetensors"]))


def test_no_tokenizer(broken):
    model = broken(drop=["tokenizer.json", "tokenizer_config.json"])
    with pytest.raises(ValueError, match="has no tokenizer.*--tokenizer"):
        start(model, skip_tokenizer_init=False)
