"""``vllm-refusion convert``: what it writes, what it refuses, and that nothing is left half-way."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_refusion.cli import main
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import decode
from vllm_refusion.training.convert import convert

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="session")
def words(tiny_checkpoint):
    """Makes tokenizers of 3,321 words without mask token and, unless asked for, without pad."""

    def make(**special):
        tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
        tokenizer.mask_token = tokenizer.pad_token = None
        for name, token in special.items():
            setattr(tokenizer, name, token)
        return tokenizer

    return make


@pytest.fixture
def source(tmp_path, words):
    """Writes an autoregressive checkpoint; options go into its config."""

    def write(tokenizer=None, rows=3321, **options):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=rows, **{**SIZES, "head_dim": 8, **options})
        LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
        (tokenizer or words(mask_token="<|mask|>")).save_pretrained(tmp_path / "source")
        return str(tmp_path / "source")

    return write


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [3321, 3325])
def test_new_words_get_the_mean_of_the_old_rows(source, words, tmp_path, tied, rows):
    """With 3,325 rows there are some without a word, which the new words take."""
    given = source(words(), rows, tie_word_embeddings=tied)
    options = {"mask_token": "[new mask]", "pad_token": "[new pad]"}
    convert(given, tmp_path / "out", **options, decoding={"preset": "gpqa", "slot_size": 4})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    mask, pad = tokenizer.mask_token_id, tokenizer.pad_token_id
    assert (mask, pad) == (3321, 3322)
    assert tokenizer.encode("[new mask]", add_special_tokens=False) == [mask]
    grown = rows < 3323
    new_rows = 3328 if grown else rows  # a multiple of 64
    old = AutoModelForCausalLM.from_pretrained(given)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for one, other in (
        (old.get_input_embeddings(), new.get_input_embeddings()),
        (old.get_output_embeddings(), new.get_output_embeddings()),
    ):
        assert len(other.weight) == new_rows
        assert torch.equal(one.weight[:3321], other.weight[:3321])
        for token in (mask, pad, *([3327] if grown else [])):
            torch.testing.assert_close(other.weight[token], one.weight.mean(0))
    rest = dict(new.named_parameters())
    for name, weight in old.named_parameters():
        assert "embed" in name or "lm_head" in name or torch.equal(weight, rest[name])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == new_rows
    names = ("mask_token_id", "pad_token_id", "eos_token_id")
    assert [config[name] for name in names] == [mask, pad, tokenizer.eos_token_id]
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad,
        **vars(DecodingParams(4, 16, 0.8, 0.2)),
    }
    decoded = decode(new.eval(), [5, 6], DecodingParams(4, 8), mask_token_id=mask, max_tokens=8)
    assert len(decoded.tokens) == 8


def test_tokens_that_are_there_stay(source, words, tmp_path):
    made = convert(source(words(mask_token="<|mask|>", pad_token="<|pad|>")), tmp_path / "out")
    assert (made["mask_token"], made["pad_token"]) == (("<|mask|>", 1), ("<|pad|>", 2))
    assert made["embedding_rows"] == (3321, 3321)


def test_gguf(tmp_path):
    """A GGUF file written here, in transformers' own reading of it."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, **SIZES, head_dim=8, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    characters = [chr(0x21 + i) for i in range(0x5E)] + [chr(0x100 + i) for i in range(204)]
    writer.add_token_list(["<|endoftext|>", *characters, "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.layers": "blk",
    }
    for name, weight in model.named_parameters():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # GGUF interleaves the halves of a head
            weight = weight.view(heads, 2, 4, 32).transpose(1, 2).reshape(weight.shape)
        for theirs, ggufs in names.items():
            name = name.replace(theirs, ggufs)
        writer.add_tensor(name, weight.detach().contiguous().numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    made = convert(str(tmp_path / "a.gguf"), tmp_path / "out", dtype="float32")
    assert made["eos_token"] == ("<|endoftext|>", 0)
    assert made["mask_token"] == ("<|mask|>", 300) and made["embedding_rows"] == (300, 320)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(new(ids).logits[..., :300], model(ids).logits)

    convert(str(tmp_path / "a.gguf"), tmp_path / "plain", dtype="float32", plain=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not hasattr(plain.config, "mask_token_id") and plain.config.vocab_size == 300
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").mask_token is None
    with pytest.raises(ValueError, match="--plain: allowed is a GGUF file alone"):
        convert(str(tmp_path / "a.gguf"), tmp_path / "no", mask_token="[m]", plain=True)


def refusal(*arguments, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["convert", *map(str, arguments)])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ({"mask_token_id": 1}, [], "is a ReFusion checkpoint already: its mask_token_id is 1"),
        ({}, ["--mask-token", "[m]"], "--mask-token [m]: the tokenizer's mask token is <|mask|>"),
        ({}, ["--slot-size", "5"], "block_length=128 is not supported"),
        ({}, ["--preset", "gsm9k"], "allowed presets are gsm8k"),
        ({}, ["--dtype", "int4"], "--dtype int4: allowed are auto"),
        ({}, ["--plain"], "--plain: allowed is a GGUF file alone"),
        ({"layer_types": ["sliding_attention"] * 2}, [], "without full attention (sliding"),
    ],
)
def test_refuses_and_writes_nothing(source, tmp_path, capsys, options, arguments, message):
    given = source(**options)
    before = sorted(tmp_path.iterdir())
    assert message in refusal(given, "-o", tmp_path / "out", *arguments, capsys=capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_refuses_what_it_cannot_serve(source, tmp_path, capsys):
    given = source()
    config = tmp_path / "source/config.json"
    values = json.loads(config.read_text())
    for change, message in (
        ({"architectures": ["MistralForCausalLM"]}, "has the architecture MistralForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised"),
        ({"num_hidden_layers": 3}, "lacks weights: model.layers.2"),
    ):
        config.write_text(json.dumps(values | change))
        assert message in refusal(given, "-o", tmp_path / "out", capsys=capsys)
    assert message  # the last one had read the weights
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (tmp_path / "there").mkdir()
    assert "exists already" in refusal(given, "-o", tmp_path / "there", capsys=capsys)
    assert "cannot load" in refusal(tmp_path / "no", "-o", tmp_path / "out", capsys=capsys)
    assert "no such file" in refusal(tmp_path / "no.gguf", "-o", tmp_path / "out", capsys=capsys)


def test_a_failure_while_writing_leaves_nothing(source, words, tmp_path, monkeypatch):
    given = source()

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(type(words()), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(given, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
