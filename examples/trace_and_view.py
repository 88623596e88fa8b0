"""Record how a word problem is decoded and write the page that plays it."""

from __future__ import annotations

import argparse
import json
import os
from itertools import islice
from pathlib import Path

from vllm import LLM, SamplingParams

from vllm_refusion.viewer import page, terminal
from vllm_refusion.viewer.record import TRACING, record
from vllm_refusion.viewer.timeline import Timeline

FOLDER = Path(__file__).parent
PROBLEM = 34  # one whose slots are committed out of order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("trace.html"))
    args = parser.parse_args()
    with open(FOLDER / "dev_problems.jsonl") as lines:
        problem = json.loads(next(islice(lines, PROBLEM, None)))
    llm = LLM(
        str(FOLDER / "refusion-tiny"),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=1,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
        **TRACING,
    )
    settings = {
        "slot_size": 8,
        "block_length": 64,
        "slot_threshold": 0.9,
        "token_threshold": 0.5,
    }
    sampling = SamplingParams(temperature=0.0, max_tokens=256, extra_args=settings)
    trace = record(llm, [problem["query"]], sampling)
    args.page.write_text(page.html(trace), encoding="utf-8")
    terminal.show(Timeline.of(trace, trace["requests"][0]), until=None, speed=0.25)
    print(f"wrote {args.page}: open it in a browser")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
