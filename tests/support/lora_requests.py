"""A conformance model with LoRA adapters, and requests for them whose answers are known."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace

import pytest
from device import ON_GPU
from loras import LAYERS, merge, write_lora
from vllm import TokensPrompt
from vllm.lora.request import LoRARequest

import conformance
from engine import sampling_params
from vllm_refusion.decoding.params import DecodingParams

MODEL = "qwen3-gqa2"
OPTIONS = {"enable_lora": True, "max_lora_rank": 8} | ({"dtype": "bfloat16"} if ON_GPU else {})
in_float32 = pytest.mark.skipif(ON_GPU, reason="vLLM's LoRA kernels take 16-bit models only")


class Adapted:
    """A base, adapters of it by number, and for each a checkpoint with it merged (0: the base)."""

    def __init__(self, folder) -> None:
        self.base = conformance.build_model(MODEL, folder / "base")
        layers = (LAYERS, ("q_proj", "v_proj"), (*LAYERS[:3], "down_proj"))
        self.loras = [None]
        self.merged = [self.base]
        for i, names in enumerate(layers, 1):
            self.loras.append(write_lora(folder / f"lora{i}", self.base, i, names))
            self.merged.append(merge(folder / f"merged{i}", self.base, self.loras[i]))
        self.stock = shutil.copytree(self.base, folder / "stock")
        config = json.loads((self.stock / "config.json").read_text())
        del config["mask_token_id"]
        (self.stock / "config.json").write_text(json.dumps(config))

    def request(self, number: int) -> LoRARequest | None:
        return LoRARequest(f"lora{number}", number, str(self.loras[number])) if number else None


def ask(llm, adapted, prompts, params, numbers):
    """Tokens and log-probabilities of each request, with the adapter of its number."""
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
        params,
        lora_request=[adapted.request(number) for number in numbers],
        use_tqdm=False,
    )
    return [
        (
            list(output.outputs[0].token_ids),
            [
                {token: entry.logprob for token, entry in row.items()}
                for row in output.outputs[0].logprobs or ()
            ],
            output.prompt_logprobs,
        )
        for output in outputs
    ]


@dataclass
class Mixed:
    """Requests of both modes, numbers of their adapters, answers of the merged weights."""

    cases: list[conformance.Case]
    numbers: list[int]
    expected: list[list[int]]

    @classmethod
    def of(cls, adapted: Adapted, longest: int = 10**6) -> Mixed:
        fits = [
            case
            for case in conformance.cases(MODEL)
            if case.params.block_length <= 32 and len(case.prompt_ids) + case.max_tokens <= longest
        ]
        cases = fits[::4]
        cases += [replace(case, params=_serial(case.params)) for case in cases[::2]]
        numbers, expected = [i % 4 for i in range(len(cases))], {}
        for number in range(4):
            chosen = range(number, len(cases), 4)
            answers = conformance.expected(adapted.merged[number], [cases[i] for i in chosen])
            expected |= zip(chosen, answers)
        return cls(cases, numbers, [list(expected[i].tokens) for i in range(len(cases))])

    def check(self, tokens: list[list[int]]) -> None:
        for i, found in enumerate(tokens):
            assert found == self.expected[i], f"{self.cases[i].label}, adapter {self.numbers[i]}"

    def run(self, llm, adapted: Adapted) -> None:
        prompts, params = [c.prompt_ids for c in self.cases], map(sampling_params, self.cases)
        self.check([found[0] for found in ask(llm, adapted, prompts, [*params], self.numbers)])


def _serial(params: DecodingParams) -> DecodingParams:
    return DecodingParams(params.slot_size, params.slot_size, mode="serial")
