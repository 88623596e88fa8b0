"""Every length of an engine at and around ours: it serves, or is refused with a sentence."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams, TokensPrompt
from vllm.v1.worker.gpu.warmup import warmup_kernels

from conformance import Case, build_model, expected
from engine import ON_GPU, engine, model_state_of

NAME = "qwen3-gqa2"
BASE = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 2, "block_size": 16}
SLOT, BLOCK, CANVAS = 4, 8, 16
# What is changed of an engine with slots of 4, blocks of 8 and canvases of 16 tokens.
SERVES = {
    "as it is": {},
    "model length of the canvas and two": {"max_model_len": CANVAS + 2},
    "model length of the canvas and one": {"max_model_len": CANVAS + 1},
    "model length of the canvas": {"max_model_len": CANVAS},
    "model length below the canvas": {"max_model_len": CANVAS - 1},
    "model length of the block": {"max_model_len": BLOCK},
    "model length below the block": {"max_model_len": BLOCK - 1},
    "model length below the slot": {"max_model_len": SLOT - 1},
    "shortest model length": {"max_model_len": 2},
    "budget of the canvas": {"max_num_batched_tokens": CANVAS},
    "canvas of the block": {"canvas": BLOCK},
    "canvas of no whole blocks": {"canvas": BLOCK + 1},
    "block of the slot": {"block": SLOT},
    "slots of a token": {"slot": 1, "block": 1},
    "everything of a token": {"slot": 1, "block": 1, "canvas": 1, "max_num_batched_tokens": 2},
    "one request": {"max_num_seqs": 1},
    "more requests than blocks": {"max_num_seqs": CANVAS, "max_num_batched_tokens": CANVAS},
    "pages wider than the model length": {"block_size": 128},
}
REFUSED = {
    "budget below the canvas": (
        {"max_num_batched_tokens": CANVAS - 1},
        "max_num_batched_tokens=15 is less than the canvas of 16",
    ),
    "canvas below the block": ({"canvas": BLOCK - 1}, "block_length=8 .*canvas of 7"),
    "canvas of nothing": ({"canvas": 0}, "canvas_length"),
    "block below the slot": ({"block": SLOT - 1}, "block_length=3 .*multiple of slot_size=4"),
    "no slot": ({"slot": 0}, "slot_size=0 "),
    "no model length": ({"max_model_len": 0}, "max_model_len"),
    "more requests than rows": ({"max_num_seqs": 65}, "max_num_seqs"),
    "no requests": ({"max_num_seqs": 0}, "max_num_seqs"),
}
USUAL = ("as it is", "model length of the canvas", "model length below the slot")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(NAME, tmp_path_factory.mktemp("model"))


def options(slot=SLOT, block=BLOCK, canvas=CANVAS, **changed):
    return BASE | changed | {
        "diffusion_config": {"canvas_length": canvas},
        "override_generation_config": {"slot_size": slot, "block_length": block},
    }  # fmt: skip


# an eager engine would not warm up; graphs are for GPUs
WARM = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "NONE"}}


def warm_up(llm, monkeypatch) -> None:
    """What a GPU's worker does behind the profile of its memory; the CPU's does not."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    if not ON_GPU:
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    if worker.vllm_config.kernel_config.enable_jit_warmup:
        warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)


@pytest.mark.parametrize(
    "name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in SERVES]
)
def test_serves(model, monkeypatch, name):
    """Answers of every length are the reference's, with a page of prompt before it or a token."""
    changed = options(**SERVES[name])
    room = changed["max_model_len"]
    with engine(model, **({} if ON_GPU else WARM), **changed) as llm:
        warm_up(llm, monkeypatch)
        defaults = model_state_of(llm).defaults
        for prompt in {1, room // 2, room - 1}:
            ids = tuple(range(5, 5 + prompt))
            sampling = SamplingParams(temperature=0, max_tokens=room, detokenize=False)
            (output,) = llm.generate(TokensPrompt(prompt_token_ids=list(ids)), sampling)
            case = Case("", ids, defaults, room - prompt)
            (answer,) = expected(model, [case])
            assert list(output.outputs[0].token_ids) == answer.tokens


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(model, name):
    changed, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence), engine(model, **options(**changed)):
        pass
