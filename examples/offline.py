"""Answer three word problems with the tiny ReFusion model of this folder."""

from __future__ import annotations

import json
import os
import time
from itertools import islice
from pathlib import Path

from vllm import LLM, RequestOutput, SamplingParams

from vllm_refusion.engine import metrics

FOLDER = Path(__file__).parent
NUM_PROBLEMS = 3


def load_problems() -> list[dict[str, str]]:
    with open(FOLDER / "dev_problems.jsonl") as lines:
        return [json.loads(line) for line in islice(lines, NUM_PROBLEMS)]


def tokens_per_forward(llm: LLM, outputs: list[RequestOutput]) -> float:
    """Output tokens per forward pass, for an engine that has served these requests only.

    A pass counts once for every request it serves; prompt passes are left out.
    """
    return count_tokens(outputs) / metrics.snapshot(llm)["forward_passes"]


def count_tokens(outputs: list[RequestOutput]) -> int:
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def main() -> None:
    problems = load_problems()
    # Float32 makes the answers the same on every machine. The small key/value cache (256 MiB)
    # leaves the machine's memory alone; a server would take what is free.
    llm = LLM(
        str(FOLDER / "refusion-tiny"),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=NUM_PROBLEMS,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
    )
    conversations = [[{"role": "user", "content": problem["query"]}] for problem in problems]
    # A request sets slot_size, block_length, slot_threshold and token_threshold in extra_args.
    sampling = SamplingParams(temperature=0.0, max_tokens=256)
    start = time.perf_counter()
    outputs = llm.chat(conversations, sampling)
    seconds = time.perf_counter() - start

    for problem, output in zip(problems, outputs, strict=True):
        print(f"\nProblem:  {problem['query']}")
        print(f"Answer:   {output.outputs[0].text.strip()}")
        print(f"Expected: {problem['answer']}")
    print(
        f"\n{count_tokens(outputs)} tokens, {tokens_per_forward(llm, outputs):.1f} per forward "
        f"pass, {count_tokens(outputs) / seconds:.1f} tokens/s"
    )


if __name__ == "__main__":
    # In-process: the engine starts faster than in a process of its own.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
