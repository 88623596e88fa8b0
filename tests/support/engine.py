"""Starting engines and sending them conformance cases."""

from __future__ import annotations

import atexit
import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from device import ON_GPU
from vllm import LLM, SamplingParams, TokensPrompt

from conformance import Case, build_model, cases, corrected_cases, expected
from vllm_refusion.decoding.params import PRESET_NAMES, DecodingParams
from vllm_refusion.engine import compat
from vllm_refusion.engine.worker import SIZES

atexit.register(gc.unfreeze)  # see ``engine``

# A canvas of 32 rows, and server defaults that fit it.
NARROW = {
    "diffusion_config": {"canvas_length": 32},
    "override_generation_config": {"slot_size": 8, "block_length": 32},
}


# Of stock vLLM in bfloat16: in graphs of prompts its FlashAttention answers all of them alike.
STOCK_GRAPHS: dict[str, Any] = (
    {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}} if ON_GPU else {}
)


@contextmanager
def engine(model: Path | str, **options: Any) -> Iterator[LLM]:
    """An LLM in float32: eager on a CPU, with CUDA graphs on a GPU."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": not ON_GPU,
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 16,
        "seed": 0,
    }
    gc.collect()  # vLLM asserts that nothing frees memory while it profiles
    if ON_GPU:
        # A fixed cache: other engines may start and end on the GPU while this one starts.
        settings["gpu_memory_utilization"] = 0.1
        settings["kv_cache_memory_bytes"] = 2**30
        # CUDA graphs without torch.compile, which would take most of the time
        settings["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL"}
    llm = LLM(str(model), **settings | options)
    try:
        yield llm
    finally:
        compat.shut_down(llm)
        del llm
        gc.collect()
        # vLLM collects a dozen times as an engine starts and ends: not all that is imported
        gc.freeze()
        if ON_GPU:
            torch.cuda.empty_cache()


def sampling_params(case: Case) -> SamplingParams:
    params = case.params
    made = SamplingParams(
        temperature=case.temperature,
        seed=case.seed,
        max_tokens=case.max_tokens,
        min_tokens=case.min_tokens,
        ignore_eos=case.ignore_eos,
        stop_token_ids=list(case.stop_token_ids),
        top_k=case.top_k,
        top_p=case.top_p,
        min_p=case.min_p,
        logit_bias=dict(case.logit_bias) or None,
        allowed_token_ids=list(case.allowed_token_ids) or None,
        repetition_penalty=case.repetition_penalty,
        frequency_penalty=case.frequency_penalty,
        presence_penalty=case.presence_penalty,
        bad_words=[" ".join(f"t{token}" for token in word) for word in case.bad_words],
        logprobs=case.logprobs,
        detokenize=False,
        extra_args=options_of(params),
    )
    # what a tokenizer makes of them; engines here have none
    made._bad_words_token_ids = [list(word) for word in case.bad_words] or None
    return made


def options_of(params: DecodingParams) -> dict[str, Any]:
    """What a request says to be decoded so; where slots start is the checkpoint's to say."""
    if params.mode == "serial":
        return {"mode": "serial", "slot_size": params.slot_size}
    return {name: getattr(params, name) for name in (*PRESET_NAMES, "infill")}


def run(llm: LLM, cases: Sequence[Case]) -> list[list[int]]:
    """All cases at once; the tokens of each."""
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=list(case.prompt_ids)) for case in cases],
        [sampling_params(case) for case in cases],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler_of(llm: LLM) -> Any:
    return compat.engine_core_of(llm).scheduler


def model_runner_of(llm: LLM) -> Any:
    return compat.engine_core_of(llm).model_executor.driver_worker.worker.model_runner


def model_state_of(llm: LLM) -> Any:
    return model_runner_of(llm).model_state


def free_pages(llm: LLM) -> int:
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def assert_idle(llm, pages):
    """All KV pages and decoding states are free again."""
    llm.llm_engine.step()  # tells the worker about the last finished requests
    assert free_pages(llm) == pages
    (held,) = llm.collective_rpc("refusion_held")
    assert not {kind: count for kind, count in held.items() if kind not in SIZES and count}


def drive(llm, checkpoint, chosen, on_step, on_output=lambda step, output: None):
    """Runs cases step by step; ``on_step(step, engine)`` may interfere. Tokens by case number.

    What is delivered is the beginning of the reference's answer from the first token on.
    """
    llm_engine = llm.llm_engine
    for i in chosen:
        case = checkpoint.cases[i]
        prompt = TokensPrompt(prompt_token_ids=list(case.prompt_ids))
        llm_engine.add_request(str(i), llm.renderer.render_cmpl([prompt])[0], sampling_params(case))
    outputs, step = {}, 0
    while llm_engine.has_unfinished_requests():
        step += 1
        on_step(step, llm_engine)
        for output in llm_engine.step():
            i, tokens = int(output.request_id), list(output.outputs[0].token_ids)
            on_output(step, output)
            assert tokens == list(checkpoint.answers[i].tokens[: len(tokens)])
            if output.finished:
                outputs[i] = tokens
    return outputs


class Checkpoint:
    """A conformance model with its requests and the reference's answers."""

    def __init__(self, name, directory):
        self.name = name
        self.path = build_model(name, directory)
        self.cases = cases(name)
        self.answers = expected(self.path, self.cases)
        # two dozen requests with everything mixed: sizes, thresholds, temperatures, endings, infill
        corrected = range(len(self.cases) - len(corrected_cases(name)), len(self.cases))
        self.mixed = random.Random(name).sample(range(corrected.start), 24)
        self.mixed[::6] = corrected[::3]

    def run(self, llm, chosen):
        """Runs the chosen cases at once and compares them with the reference."""
        self.check(run(llm, [self.cases[i] for i in chosen]), chosen)

    def check(self, outputs, chosen):
        """Compares outputs with the reference; says for each difference which case it is."""
        wrong = [
            f"{self.cases[i].label}: {output} instead of {self.answers[i].tokens}"
            for i, output in zip(chosen, outputs, strict=True)
            if output != list(self.answers[i].tokens)
        ]
        assert not wrong, f"{len(wrong)} of {len(outputs)} differ:\n" + "\n".join(wrong)
