"""The share of word problems a model solves, and its tokens per forward pass, by decoding setting.

python examples/evaluate.py [MODEL] --settings 8/32/0.9/0.4 32/128/0.9/0.4 8/32/0.9/0.4/correct
python examples/evaluate.py TWIN --token-by-token
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt

from vllm_refusion.engine import metrics
from vllm_refusion.training.data import Encoder, read_rows
from vllm_refusion.training.trainer import is_right
from vllm_refusion.viewer.record import stock

FOLDER = Path(__file__).parent
SETTINGS = ("8/32/0.9/0.4", "32/128/0.9/0.4")
KINDS = {"slot_size": int, "block_length": int, "slot_threshold": float, "token_threshold": float}
OPTIONS: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 2**30,
    "gpu_memory_utilization": 0.1,  # only checked: several of these may share a GPU
    "enforce_eager": True,
}


def parameters(setting: str) -> dict[str, Any]:
    """``8/32/0.9/0.4``, with ``/correct`` behind it or not, or ``serial/8`` as parameters."""
    if setting.startswith("serial/"):
        return {"mode": "serial", "slot_size": int(setting.removeprefix("serial/"))}
    numbers, *infill = setting.rsplit("/correct", 1)
    named = zip(KINDS.items(), numbers.split("/"), strict=True)
    values = {name: kind(value) for (name, kind), value in named}
    return values | ({"infill": "correct"} if infill == [""] else {})


def evaluate(
    llm: LLM,
    prompts: Sequence[list[int]],
    rows: Sequence[Any],
    extra: dict | None,
    limit: int,
    temperature: float = 0.0,
) -> dict[str, float]:
    """Figures of all problems; ``extra`` None is token by token. A problem's number is its seed."""
    before = metrics.snapshot(llm) if extra else {}
    sampling = [
        SamplingParams(temperature=temperature, seed=seed, max_tokens=limit, extra_args=extra)
        for seed in range(len(prompts))
    ]
    began = time.monotonic()
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False
    )
    seconds = time.monotonic() - began
    texts = [output.outputs[0].text for output in outputs]
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    passes, accepted = tokens, None
    if extra:
        done = {name: count - before[name] for name, count in metrics.snapshot(llm).items()}
        passes = done["forward_passes"]
        tested = done["tokens_tested"] + done["drafts_tested"]
        accepted = (done["tokens_passed"] + done["drafts_passed"]) / max(tested, 1)
    right = sum(is_right(text, row.values) for text, row in zip(texts, rows, strict=True))
    return {
        "problems": len(rows),
        "right": right,
        "share": right / len(rows),
        "tokens": tokens,
        "passes_per_response": passes / len(rows),
        "tokens_per_forward": tokens / passes,
        "accepted": accepted,  # of the tokens tested
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(FOLDER / "refusion-tiny"))
    parser.add_argument("--token-by-token", action="store_true", help="an autoregressive model")
    parser.add_argument(
        "--settings", nargs="+", default=SETTINGS, metavar="SLOT/BLOCK/SLOT_T/TOKEN_T"
    )
    parser.add_argument("--schedule", choices=["fused", "plain"], default="fused")
    parser.add_argument(
        "--slot-start", choices=["mask", "next"], help="of serial decoding, if not the checkpoint's"
    )
    parser.add_argument("--problems", type=Path, default=FOLDER / "dev_problems.jsonl")
    parser.add_argument("--count", type=int, help="only the first of them")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=OPTIONS["max_num_seqs"])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="appends the figures to this file, a line each")
    args = parser.parse_args()

    options = OPTIONS | {"dtype": args.dtype, "model": args.model}
    options["max_num_seqs"] = args.max_num_seqs
    if args.token_by_token:
        options |= stock(args.model)
    elif args.schedule == "plain":
        options["additional_config"] = {"refusion_schedule": "plain"}
    start = {"slot_start": args.slot_start} if args.slot_start else {}
    options["override_generation_config"] = start
    llm = LLM(**options)
    rows = list(read_rows([args.problems]))[: args.count]
    encoder = Encoder(llm.get_tokenizer(), None)
    prompts = [encoder.prompt(row.values["query"]) for row in rows]
    settings = [None] if args.token_by_token else args.settings
    for setting in settings:
        figures = {"model": args.model, "schedule": args.schedule, "settings": setting} | start
        if setting is None:
            figures |= {"schedule": None, "settings": "token by token"}
        extra = parameters(setting) if setting else None
        figures |= evaluate(llm, prompts, rows, extra, args.max_tokens, args.temperature)
        print(json.dumps(figures), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(figures) + "\n")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    # One process: the quicker start matters more here than a scheduler of its own.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
