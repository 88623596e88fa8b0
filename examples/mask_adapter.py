"""Make a stock model faster without changing its answers: a mask adapter beside stock decoding."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

from vllm import LLM, RequestOutput, SamplingParams

from vllm_refusion.engine import metrics

FOLDER = Path(__file__).parent
NUM_PROBLEMS = 3
SAMPLING = SamplingParams(temperature=0.0, max_tokens=256)


def start(model: str) -> LLM:
    return LLM(
        str(FOLDER / model),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=NUM_PROBLEMS,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
    )


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text.strip() for output in outputs]


def main() -> None:
    with open(FOLDER / "dev_problems.jsonl") as lines:
        problems = [json.loads(line) for line in islice(lines, NUM_PROBLEMS)]
    conversations = [[{"role": "user", "content": problem["query"]}] for problem in problems]

    stock = start("stock-tiny")
    answers = texts(stock.chat(conversations, SAMPLING, use_tqdm=False))
    stock.llm_engine.engine_core.shutdown()

    adapted = start("stock-tiny-adapter")
    outputs = adapted.chat(conversations, SAMPLING, use_tqdm=False)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    for problem, answer, own in zip(problems, answers, texts(outputs), strict=True):
        print(f"\nProblem:  {problem['query']}")
        print(f"Answer:   {own}")
        print(f"Expected: {problem['answer']}")
        print("The same as without the adapter." if own == answer else f"NOT stock's: {answer}")
    print(f"\n{tokens / metrics.snapshot(adapted)['forward_passes']:.1f} tokens per forward pass")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
