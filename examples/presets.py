"""Answer a word problem under several decoding settings, side by side, on one engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vllm import LLM, SamplingParams

from vllm_refusion.engine import metrics

FOLDER = Path(__file__).parent
# Named presets are the published settings. Explicit keys override what a preset says.
SETTINGS = [
    {"preset": "gsm8k"},
    {"preset": "gpqa"},
    {"preset": "gpqa", "slot_size": 4, "slot_threshold": 0.6},
    {"slot_size": 4, "block_length": 32, "slot_threshold": 0.9, "token_threshold": 0.4},
]


def main() -> None:
    with open(FOLDER / "dev_problems.jsonl") as lines:
        problem = json.loads(lines.readline())
    llm = LLM(
        str(FOLDER / "refusion-tiny"),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=1,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
    )
    print(f"\nProblem:  {problem['query']}\nExpected: {problem['answer']}")
    for settings in SETTINGS:
        before = metrics.snapshot(llm)["forward_passes"]
        sampling = SamplingParams(temperature=0.0, max_tokens=256, extra_args=settings)
        messages = [{"role": "user", "content": problem["query"]}]
        (output,) = llm.chat(messages, sampling, use_tqdm=False)
        passes = metrics.snapshot(llm)["forward_passes"] - before
        answer = output.outputs[0].text.strip().splitlines()[-1]
        tokens = len(output.outputs[0].token_ids)
        print(f"\n{settings}\n  {answer}   {tokens} tokens in {passes} forward passes")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
