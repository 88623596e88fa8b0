"""The same word problems, slot by slot and token by token, each alone on an engine.

Without --twin the ReFusion model's own weights are decoded token by token by stock vLLM: that has
the speed of an autoregressive model of its shape, but not the text of one.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from vllm_refusion.viewer import page
from vllm_refusion.viewer.record import TRACING, add_autoregressive, record, stock
from vllm_refusion.viewer.timeline import Timeline

FOLDER = Path(__file__).parent
REFUSION = str(FOLDER / "refusion-tiny")
NUM_PROBLEMS = 3
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 1,
    "kv_cache_memory_bytes": 2**28,
    "enforce_eager": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--twin", help="an autoregressive model: a path or a hub name")
    parser.add_argument("--page", type=Path, default=Path("comparison.html"))
    args = parser.parse_args()
    with open(FOLDER / "dev_problems.jsonl") as lines:
        prompts = [json.loads(line)["query"] for line in islice(lines, NUM_PROBLEMS)]
    sampling = SamplingParams(temperature=0.0, max_tokens=128)

    llm = LLM(REFUSION, **OPTIONS, **TRACING)
    record(llm, prompts[:1], sampling)  # warm-up
    trace = record(llm, prompts, sampling)
    llm.llm_engine.engine_core.shutdown()

    twin = args.twin or REFUSION
    llm = LLM(twin, **OPTIONS, **stock(twin))
    add_autoregressive(trace, llm, sampling)  # warm-up; the next call overwrites it
    add_autoregressive(trace, llm, sampling)
    llm.llm_engine.engine_core.shutdown()

    for request in trace["requests"]:
        print(f"\n{request['prompt']['text']}\n  {Timeline.of(trace, request).summary()}")
    args.page.write_text(page.html(trace), encoding="utf-8")
    print(f"\nwrote {args.page}: open it in a browser")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
