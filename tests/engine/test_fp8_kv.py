"""A KV cache in FP8: canvases read what they wrote, in both modes, about as stock vLLM's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from device import ON_GPU
from test_serial_mode import MODEL, serial
from vllm import SamplingParams

import conformance
from engine import NARROW, assert_idle, engine, free_pages, model_runner_of, run
from vllm_refusion.engine import attention


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return conformance.build_model(MODEL, tmp_path_factory.mktemp(MODEL))


@pytest.fixture
def cases():
    chosen = [case for case in conformance.cases(MODEL) if case.params.block_length <= 32][::5]
    chosen = [replace(case, max_tokens=min(case.max_tokens, 40)) for case in chosen]
    return [*chosen, *(replace(case, params=serial(case.params, "mask")) for case in chosen[::2])]


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2"])
def test_rows_read_what_was_written(path, cases, kv_cache_dtype, monkeypatch):
    """The tokens of a float32 cache of which every entry is rounded to FP8 before it is written."""
    fp8 = attention.FP8_KV_DTYPES[kv_cache_dtype]
    with engine(path, kv_cache_dtype=kv_cache_dtype, **NARROW) as llm:
        pages = free_pages(llm)
        assert {cache.dtype for cache in model_runner_of(llm).kv_caches} == {torch.uint8}
        answers = run(llm, cases)
        assert run(llm, cases) == answers  # from the prefix cache
        assert_idle(llm, pages)

    original = attention.CanvasAttentionImpl.do_kv_cache_update

    def rounded(self, layer, key, value, *args):
        key, value = key.to(fp8).to(key.dtype), value.to(fp8).to(value.dtype)
        original(self, layer, key, value, *args)

    monkeypatch.setattr(attention.CanvasAttentionImpl, "do_kv_cache_update", rounded)
    with engine(path, **NARROW) as llm:
        assert run(llm, cases) == answers
    plain = conformance.expected(path, cases)
    assert [list(answer.tokens) for answer in plain] != answers


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("mode", ["serial", "parallel"])
def test_answers_of_a_trained_model(tiny_checkpoint, questions, mode):
    """Rounded entries change some answers, not most of their beginnings."""
    chats = [[{"role": "user", "content": question}] for question in questions[:24]]
    extra = {"mode": mode, "slot_size": 8} | ({} if mode == "serial" else {"block_length": 32})
    greedy = SamplingParams(temperature=0, max_tokens=100, extra_args=extra)
    texts = {}
    for kind in ("auto", "fp8", "fp8_e5m2"):
        options = {"dtype": "bfloat16", "skip_tokenizer_init": False, "kv_cache_dtype": kind}
        with engine(tiny_checkpoint, **options) as llm:
            outputs = llm.chat(chats, greedy, use_tqdm=False)
        texts[kind] = [output.outputs[0].text[:20] for output in outputs]
    for kind in ("fp8", "fp8_e5m2"):
        same = [text == plain for text, plain in zip(texts[kind], texts["auto"])]
        assert sum(same) > len(same) / 2, kind
