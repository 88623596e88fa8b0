"""From an autoregressive checkpoint through convert and train to the engine."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from vllm import SamplingParams, TokensPrompt

from engine import engine
from vllm_refusion.cli import main
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import decode


@pytest.mark.slow
def test_converted_and_trained_is_served(tiny_checkpoint, tmp_path):
    """With the decoding defaults given to convert; the same tokens as the reference."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=3321, **sizes, **heads)).save_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.mask_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "a")
    rows = [{"query": c, "response": " ".join(c * 8)} for c in "ABCDEFGH" * 8]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b, run = (str(tmp_path / name) for name in ("a", "b", "run"))
    for command in (
        ["convert", a, "-o", b, "--mask-token", "[m]", "--slot-size", "4", "--block-length", "8"],
        ["train", b, "-o", run, "--data", str(tmp_path / "d.jsonl"), "--quiet", "--steps", "60"]
        + ["--batch-size", "16", "--learning-rate", "5e-3"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    prompts = [
        tokenizer.encode(f"<|user|>{c}<|assistant|>", add_special_tokens=False) for c in "AG"
    ]
    expected = [
        decode(
            model,
            prompt,
            DecodingParams(4, 8, 0.9, 0.4),
            mask_token_id=3321,
            eos_token_id=0,
            max_tokens=32,
        ).tokens
        for prompt in prompts
    ]
    with engine(tmp_path / "run/model", skip_tokenizer_init=False, max_model_len=256) as llm:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=32),
            use_tqdm=False,
        )
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
