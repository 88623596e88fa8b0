"""LoRA over HTTP: a request names its adapter as its model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from lora_requests import Adapted, Mixed
from server import MODEL_NAME, serve

from engine import options_of


@pytest.mark.slow
def test_adapters_by_name(tmp_path):
    """Both modes and all adapters at once: the answers of merged weights."""
    adapted = Adapted(tmp_path / "models")
    mixed = Mixed.of(adapted)
    names = [MODEL_NAME, "first", "second", "third"]
    options = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-modules"]
    options += [f"{name}={path}" for name, path in zip(names[1:], adapted.loras[1:])]
    with serve(adapted.base, tmp_path, *options) as server:
        assert [model.id for model in server.client.models.list()] == names

        def ask(i: int) -> list[int]:
            case = mixed.cases[i]
            cuts = {"top_k": case.top_k, "min_p": case.min_p, "seed": case.seed}
            answer = server.client.completions.create(
                model=names[mixed.numbers[i]],
                prompt=list(case.prompt_ids),
                max_tokens=case.max_tokens,
                temperature=case.temperature,
                top_p=case.top_p,
                logit_bias={str(token): bias for token, bias in case.logit_bias} or None,
                extra_body=cuts
                | {
                    "min_tokens": case.min_tokens,
                    "ignore_eos": case.ignore_eos,
                    "stop_token_ids": list(case.stop_token_ids),
                    "allowed_token_ids": list(case.allowed_token_ids) or None,
                    "vllm_xargs": options_of(case.params),
                    "return_token_ids": True,
                },
            )
            return answer.choices[0].token_ids

        with ThreadPoolExecutor(8) as clients:
            mixed.check(list(clients.map(ask, range(len(mixed.cases)))))
        with pytest.raises(openai.NotFoundError):
            server.client.completions.create(model="fourth", prompt=[5])
