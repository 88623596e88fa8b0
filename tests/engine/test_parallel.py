"""Tensor and data parallel engines give the tokens of a single one: the reference decoder's.

On two GPUs, or on a CPU with two processes (slow).
"""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import openai
import pytest
import torch
from device import ON_GPU
from lora_requests import OPTIONS as LORA
from lora_requests import Adapted, Mixed, in_float32
from server import DEFAULTS, MODEL_NAME, engines_elsewhere, extras, free_port, serve
from test_adapted_models import Base, ask_all, assert_same, parameters
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from engine import NARROW, engine
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
    assert counters[0] == counters[1] and counts[Counter.DRAFTS_PASSED]
    # on a GPU what is drafted depends on the time that passes took
    assert ON_GPU or counters[0] == counts


@in_float32
def test_tensor_parallel_lora(tmp_path):
    """Both ranks map the rows to adapters alike, in both modes."""
    adapted = Adapted(tmp_path)
    mixed = Mixed.of(adapted)
    with engine(adapted.base, max_loras=2, **TWO_RANKS, **LORA, **NARROW) as llm:
        mixed.run(llm, adapted)
        counters, _ = figures(llm)
    assert counters[0] == counters[1]


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


def counted(server, name: str, label: str = "") -> float:
    """The sum of a metric over its labels, or those among them that have the one given."""
    metrics = server.http.get("/metrics").text
    found = re.findall(rf"^vllm:{name}_total{{(.*)}} (\S+)$", metrics, re.MULTILINE)
    return sum(float(value) for labels, value in found if label in labels)


# so many that each of two engines and of two API servers gets some
BOTH = 16


@pytest.mark.parametrize("hosts", [1, 2])
def test_data_parallel(hosts, tiny_checkpoint, reference, questions, tmp_path):
    """Two engines behind vLLM's load balancer, on one host or two: both answer and are counted."""
    options = ["--data-parallel-size", "2", "--kv-cache-memory-bytes", str(PAGES)]
    with ExitStack() as stack:
        if hosts == 2:
            options += ["--data-parallel-size-local", "1", "--data-parallel-address", "127.0.0.1"]
            options += ["--data-parallel-rpc-port", str(free_port())]
            second = (*options, "--data-parallel-start-rank", "1")
            stack.enter_context(engines_elsewhere(tiny_checkpoint, tmp_path, *second))
        server = stack.enter_context(serve(tiny_checkpoint, tmp_path, *options))

        def ask(question, **more):
            # a connection of its own: each API server accepts some
            with httpx.Client(trust_env=False, timeout=120) as connection:
                client = server.client.with_options(http_client=connection)
                return client.chat.completions.create(
                    model=MODEL_NAME,
                    messages=[{"role": "user", "content": question}],
                    max_tokens=100,
                    extra_body=extras(DEFAULTS) | more,
                )

        def refused(_):
            with pytest.raises(openai.BadRequestError, match="slot_size"):
                ask("?", vllm_xargs={"slot_size": 0})

        with ThreadPoolExecutor(8) as clients:
            answers = [
                response.choices[0].token_ids for response in clients.map(ask, questions[:BOTH])
            ]
            list(clients.map(refused, range(BOTH)))
        tokens = sum(map(len, answers))
        deadline = time.monotonic() + 30
        while counted(server, "refusion_tokens") < tokens and time.monotonic() < deadline:
            time.sleep(0.5)
        assert counted(server, "refusion_tokens") == counted(server, "generation_tokens") == tokens
        assert all(counted(server, "generation_tokens", f'engine="{rank}"') for rank in (0, 1))
        assert server.terminate() == 0
    assert answers == [list(reference(q, max_tokens=100).tokens) for q in questions[:BOTH]]


@pytest.mark.parametrize("option", [{"data_parallel_rank": 0}, {"data_parallel_external_lb": True}])
def test_another_balancer_has_servers_of_their_own(option, tiny_checkpoint):
    """vLLM refuses to join them where models have no experts: such engines share nothing."""
    arguments = EngineArgs(str(tiny_checkpoint), data_parallel_size=2, **option)
    with pytest.raises(ValueError, match="launch independent vLLM instances"):
        arguments.create_engine_config()
