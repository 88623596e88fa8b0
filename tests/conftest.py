"""Settings that must be in the environment before Triton or vLLM is imported; shared paths."""

import json
import os
import shutil
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core for each worker: threads of several would wait for each other, for most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine starts faster in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes what is free
    # any memory node for any rank: vLLM 0.33 wants node i for data parallel rank i
    "VLLM_CPU_SIM_MULTI_NUMA": "0",
    "TRITON_F32_DEFAULT": "ieee",  # on a GPU: stock's float32 attention would round to TF32
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The published form of a ReFusion checkpoint with 4.8M parameters and its tokenizer."""
    return EXAMPLES / "refusion-tiny"


@pytest.fixture(scope="session")
def tokenizer(tiny_checkpoint):
    """The tiny checkpoint's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def dev_problems_file() -> Path:
    """60 word problems, one JSON object a line: query, response, answer."""
    return EXAMPLES / "dev_problems.jsonl"


@pytest.fixture(scope="session", autouse=True)
def shared_answers(tmp_path_factory):
    """The reference answers a conformance request once in all processes of this run."""
    import conformance

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    conformance.answers_folder = base / "answers"
    conformance.answers_folder.mkdir(exist_ok=True)


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
def async_scheduling(monkeypatch):
    """Async scheduling also on a CPU, where the platform turns it off."""
    from vllm.platforms import current_platform

    original = type(current_platform).check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(
        type(current_platform), "check_and_update_config", classmethod(check_and_update_config)
    )


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


@pytest.fixture(scope="session")
def questions(dev_problems_file) -> list[str]:
    return [json.loads(line)["query"] for line in dev_problems_file.read_text().splitlines()]


@pytest.fixture(scope="session")
def reference(tiny_checkpoint):
    """The reference decoder's answers of the tiny checkpoint."""
    from server import Reference

    return Reference(tiny_checkpoint)


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    """A server of the tiny checkpoint, one for all tests of a file."""
    from server import serve

    options = ["--enable-per-request-metrics", "--enable-prompt-tokens-details"]
    options += ["--enable-scale-out"]  # an endpoint for token ids
    options += ["--block-size", "16"]  # prompts of tests fill some pages
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with serve(tiny_checkpoint, tmp_path_factory.mktemp("server"), *options) as server:
        yield server


@pytest.fixture(scope="module")
def chat(server):
    """Sends a question or messages; options as of the client, ``params`` as vllm_xargs."""
    from server import DEFAULTS, MODEL_NAME, extras

    def send(question, params=DEFAULTS, **options):
        if isinstance(question, str):
            question = [{"role": "user", "content": question}]
        return server.client.chat.completions.create(
            model=MODEL_NAME,
            messages=question,
            extra_body=extras(params) | options.pop("extra_body", {}),
            **{"max_tokens": 200} | options,
        )

    return send


@pytest.fixture(scope="module")
def complete(server):
    """Sends a prompt of token ids or text to the completions endpoint."""
    from server import DEFAULTS, MODEL_NAME, extras

    def send(prompt, params=DEFAULTS, **options):
        return server.client.completions.create(
            model=MODEL_NAME,
            prompt=prompt,
            extra_body=extras(params) | options.pop("extra_body", {}),
            **options,
        )

    return send


@pytest.fixture(scope="session")
def chromium():
    """A browser for the tests of pages; skipped where playwright or chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Debian's chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def trace() -> dict:
    """A made-up trace of one English response in slots of 4 and blocks of 16."""
    from synthetic_trace import ENGLISH, synthetic_trace

    return synthetic_trace(ENGLISH, 4, 16)


@pytest.fixture
def timeline(trace):
    """The states that the only request of ``trace`` goes through."""
    from vllm_refusion.viewer.timeline import Timeline

    return Timeline.of(trace, trace["requests"][0])
