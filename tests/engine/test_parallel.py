"""Tensor and data parallel engines give the tokens of a single one: the reference decoder's.

On two GPUs, or on a CPU with two processes (slow).
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from device import ON_GPU
from server import DEFAULTS, MODEL_NAME, extras, serve
from test_adapted_models import Base, ask_all, assert_same, parameters
from vllm import SamplingParams

from engine import engine
from vllm_refusion.decoding.state import Counter

if not ON_GPU:
    pytestmark = pytest.mark.slow
elif torch.cuda.device_count() < 2:
    pytestmark = pytest.mark.skip(reason="needs two GPUs")


@pytest.fixture(autouse=True)
def spawned_workers(monkeypatch):
    """This process may have used the GPU, after which it cannot be forked."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


# so much for KV pages: no profiling of the memory, which others on the GPU would disturb
PAGES = 2**30
TWO_RANKS = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "kv_cache_memory_bytes": PAGES,
}


def figures(llm):
    """What each rank counted and measured; the ranks must decide alike."""
    costs = llm.collective_rpc(lambda worker: repr(worker.model_runner.model_state.pass_cost))
    return llm.collective_rpc("refusion_counters"), costs


# one KV head for each rank; one for both; an odd vocabulary in shards
@pytest.mark.parametrize("name", ["qwen3-gqa2", "llama-gqa4"])
def test_tensor_parallel(checkpoints, name):
    checkpoint = checkpoints(name)
    with engine(checkpoint.path, **TWO_RANKS) as llm:
        checkpoint.run(llm, checkpoint.mixed)
        counters, costs = figures(llm)
    assert len(counters) == 2 and counters[0] == counters[1]
    assert costs[0] == costs[1] and (costs[0] != "None") == ON_GPU


# ranks with heads of their own; one KV head for both, whose factors both have
@pytest.mark.parametrize("name", ["qwen3-gqa2", "llama-gqa4"])
def test_tensor_parallel_mask_adapter(name, tmp_path):
    """Greedy answers are stock vLLM's, drawn ones the reference's; drafts as right as on a rank."""
    base = Base(name, tmp_path)
    prompts = base.prompts(8)
    greedy = [parameters(index) for index in range(8)]
    drawn = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=30, logprobs=1, detokenize=False)
        for i in range(4)
    ]

    def answers(model, **options):
        with engine(model, **options) as llm:
            found = ask_all(llm, prompts + prompts[:4], greedy + drawn)
            counters = llm.collective_rpc("refusion_counters") if model != base.path else None
        return [answer for (answer,) in found], counters

    expected, _ = answers(base.path)
    expected[8:] = [base.sample(prompt, one) for prompt, one in zip(prompts, drawn)]
    alone, (counts,) = answers(base.adapter)
    parallel, counters = answers(base.adapter, **TWO_RANKS)
    assert_same(alone, expected)
    assert_same(parallel, expected)
    assert counters == [counts, counts] and counts[Counter.DRAFTS_PASSED]


@pytest.mark.skipif(not ON_GPU, reason="vLLM does not support Ray on CPUs")
def test_tensor_parallel_through_ray(checkpoints):
    """Workers that Ray starts, as on several hosts, find the plugin."""
    ray = pytest.importorskip("ray", reason="Ray is not installed here")
    checkpoint = checkpoints()
    ray.init(num_gpus=2, include_dashboard=False)
    try:
        options = TWO_RANKS | {"distributed_executor_backend": "ray"}
        with engine(checkpoint.path, **options) as llm:
            checkpoint.run(llm, checkpoint.mixed)
            counters, _ = figures(llm)
            processes = llm.collective_rpc(lambda worker: os.getpid())
    finally:
        ray.shutdown()
    assert len(counters) == 2 and counters[0] == counters[1]
    assert len({*processes, os.getpid()}) == 3


def test_tensor_parallel_with_preemptions(checkpoints, preemptions):
    """Both ranks keep the state of a preempted request and go on from it."""
    checkpoint = checkpoints()
    chosen = [i for i, c in enumerate(checkpoint.cases) if len(c.prompt_ids) + c.max_tokens <= 160]
    chosen = chosen[:12]
    options = {"max_model_len": 160, "num_gpu_blocks_override": 28, "block_size": 16}
    options["diffusion_config"] = {"canvas_length": 128}
    with engine(checkpoint.path, **TWO_RANKS, **options) as llm:
        checkpoint.run(llm, chosen)
        counters, _ = figures(llm)
    assert counters[0] == counters[1]
    assert any(emitted for _, emitted in preemptions)


def test_data_parallel(tiny_checkpoint, reference, questions, tmp_path):
    """Two engines behind one server, both of which answer."""
    options = ("--data-parallel-size", "2", "--kv-cache-memory-bytes", str(PAGES))
    with serve(tiny_checkpoint, tmp_path, *options) as server:

        def ask(question):
            response = server.client.chat.completions.create(
                model=MODEL_NAME,
                messages=[{"role": "user", "content": question}],
                max_tokens=100,
                extra_body=extras(DEFAULTS),
            )
            return response.choices[0].token_ids

        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(ask, questions[:8]))
        metrics = server.http.get("/metrics").text
        assert server.terminate() == 0
    assert answers == [list(reference(q, max_tokens=100).tokens) for q in questions[:8]]
    generated = re.findall(r'^vllm:generation_tokens_total{engine="(\d)".*} (.*)$', metrics, re.M)
    assert len(generated) == 2
    assert sum(float(tokens) for _, tokens in generated) == sum(map(len, answers))
    assert all(float(tokens) for _, tokens in generated)
