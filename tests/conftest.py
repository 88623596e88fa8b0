"""Settings that must be in the environment before Triton or vLLM is imported; shared paths."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine starts faster in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes what is free
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The published form of a ReFusion checkpoint with 7.1M parameters and its tokenizer."""
    return EXAMPLES / "refusion-tiny"


@pytest.fixture(scope="session")
def dev_problems_file() -> Path:
    """60 word problems, one JSON object a line: query, response, answer."""
    return EXAMPLES / "dev_problems.jsonl"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Conformance checkpoints by name, built with their answers when first asked for."""
    from engine import Checkpoint

    made = {}

    def get(name: str = "qwen3-gqa2") -> Checkpoint:
        if name not in made:
            made[name] = Checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def preemptions(monkeypatch):
    """Request ids and the tokens emitted by then, in the order they were preempted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen = []
    original = Scheduler._preempt_request

    def preempt(self, request, *args, **kwargs):
        seen.append((request.request_id, request.num_output_tokens))
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    return seen
