"""Answer one word problem in both modes, on one engine: slots in parallel, and in reading order."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vllm import LLM, SamplingParams

from vllm_refusion.decoding.params import MODES
from vllm_refusion.engine import metrics

FOLDER = Path(__file__).parent


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
    for mode in MODES:
        before = metrics.snapshot(llm)
        sampling = SamplingParams(temperature=0.0, max_tokens=256, extra_args={"mode": mode})
        messages = [{"role": "user", "content": problem["query"]}]
        (output,) = llm.chat(messages, sampling, use_tqdm=False)
        after = metrics.snapshot(llm)
        passes, tokens, rows = (
            after[name] - before[name] for name in ("forward_passes", "output_tokens", "rows_fed")
        )
        print(
            f"\n{mode}: {tokens / passes:.1f} tokens per forward pass, {rows / tokens:.1f} fed per "
            f"token\n{output.outputs[0].text.strip()}"
        )


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
