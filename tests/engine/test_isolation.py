"""Nothing of one request reaches another: what is in free pages of the KV cache does not matter."""

from __future__ import annotations

import math

import pytest
from vllm import TokensPrompt

from conformance import build_model, cases, expected
from engine import (
    NARROW,
    assert_idle,
    engine,
    free_pages,
    model_runner_of,
    sampling_params,
    scheduler_of,
)


def poison_free_pages(llm, value):
    """Overwrites all pages of the KV cache that nobody holds, in every layer."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    pages = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    caches = model_runner_of(llm).kv_caches
    assert caches
    for cache in caches:
        assert cache.shape[0] == pool.num_gpu_blocks
        cache[pages] = value
    return len(pages)


@pytest.mark.parametrize(
    "value", [math.nan, pytest.param(1e4, marks=pytest.mark.slow)], ids=["NaN", "garbage"]
)
def test_poisoned_free_pages(tmp_path, value):
    """Before every step; requests come and go, so that pages change hands."""
    model = build_model("qwen3-gqa2", tmp_path)
    requests = [c for c in cases("qwen3-gqa2") if c.params.block_length <= 32][5:40:5]
    answers = expected(model, requests)
    options = NARROW | {"enable_prefix_caching": False, "max_num_seqs": 3}
    outputs, poisoned = {}, 0
    with engine(model, **options, num_gpu_blocks_override=40, block_size=16) as llm:
        pages = free_pages(llm)
        llm_engine = llm.llm_engine
        for i, case in enumerate(requests):
            prompt = TokensPrompt(prompt_token_ids=list(case.prompt_ids))
            rendered = llm.renderer.render_cmpl([prompt])[0]
            llm_engine.add_request(str(i), rendered, sampling_params(case))
        while llm_engine.has_unfinished_requests():
            poisoned += poison_free_pages(llm, value)
            for output in llm_engine.step():
                if output.finished:
                    outputs[int(output.request_id)] = list(output.outputs[0].token_ids)
        assert_idle(llm, pages)
    assert poisoned > pages
    assert [outputs[i] for i in range(len(requests))] == [list(a.tokens) for a in answers]
