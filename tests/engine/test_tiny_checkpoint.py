"""The bundled checkpoint on its word problems: exact in float32, near ties only in bfloat16."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from device import ON_GPU
from near_ties import assert_near_tie
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, TokensPrompt

from engine import engine, options_of
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import decode
from vllm_refusion.engine.metrics import snapshot

BUDGET = 256
PRESETS = [DecodingParams(32, 128, 0.9, 0.4), DecodingParams(4, 16, 0.6, 0.3)]
OPTIONS = {"skip_tokenizer_init": False, "max_model_len": 640, "max_num_batched_tokens": 4096}


@pytest.fixture(scope="module")
def problems(dev_problems_file, tokenizer):
    """(prompt token ids, right answer) of each problem."""
    rows = [json.loads(line) for line in dev_problems_file.read_text().splitlines()]
    chats = [[{"role": "user", "content": row["query"]}] for row in rows]
    options = {"add_generation_prompt": True, "tokenize": False}
    texts = [tokenizer.apply_chat_template(chat, **options) for chat in chats]
    return [
        (tokenizer.encode(text, add_special_tokens=False), row["answer"])
        for text, row in zip(texts, rows, strict=True)
    ]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, problems):
    """The reference's answer to a problem under a preset, in float32."""
    model = load(tiny_checkpoint, torch.float32)
    options = {"mask_token_id": model.config.mask_token_id, "max_tokens": BUDGET}
    options["eos_token_id"] = model.config.eos_token_id

    @cache
    def answer(preset, number):
        return decode(model, problems[number][0], preset, **options)

    return answer


def load(checkpoint, dtype):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()


def generate(llm, prompts, preset):
    params = SamplingParams(temperature=0, max_tokens=BUDGET, extra_args=options_of(preset))
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(inputs, params, use_tqdm=False)]


@pytest.mark.parametrize("count", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_same_tokens_as_the_reference(tiny_checkpoint, problems, reference, count, capsys):
    """Problems under two presets; reports how many answers are right and tokens per forward."""
    with engine(tiny_checkpoint, **OPTIONS) as llm:
        for preset in PRESETS:
            before = snapshot(llm)
            outputs = generate(llm, [prompt for prompt, _ in problems[:count]], preset)
            after = snapshot(llm)
            answers = [reference(preset, number) for number in range(count)]
            assert [list(o.token_ids) for o in outputs] == [list(a.tokens) for a in answers]
            right = sum(
                output.text.split("####")[-1].strip() == answer
                for output, (_, answer) in zip(outputs, problems[:count], strict=True)
            )
            tokens = after["output_tokens"] - before["output_tokens"]
            passes = after["forward_passes"] - before["forward_passes"]
            assert tokens == sum(len(answer.tokens) for answer in answers)
            plain = sum(len(answer.passes) for answer in answers)
            assert passes < plain
            with capsys.disabled():
                print(
                    f"\n{preset}: {right} of {count} right, {tokens / passes:.1f} TPF, "
                    f"{tokens / plain:.1f} without fused passes"
                )


@pytest.mark.slow
def test_bfloat16_differs_only_by_near_ties(tiny_checkpoint, problems, reference, capsys):
    count = len(problems) if ON_GPU else 12
    differing = 0
    with engine(tiny_checkpoint, **OPTIONS, dtype="bfloat16") as llm:
        for preset in PRESETS:
            for number, (prompt, _) in enumerate(problems[:count]):
                answer = reference(preset, number)
                (output,) = generate(llm, [prompt], preset)
                if list(output.token_ids) != list(answer.tokens):
                    differing += 1
                    assert_near_tie(llm, tiny_checkpoint, prompt, answer)
    with capsys.disabled():
        print(f"\nbfloat16: {differing} of {2 * count} answers differ, each from a near tie on")
