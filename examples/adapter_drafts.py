"""How many drafts of a mask adapter its backbone accepts, on text that the backbone writes itself.

python examples/adapter_drafts.py RUN/adapter --problems dev.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_refusion.adapters import adapter_tensors, check_base, find_base, read_adapter
from vllm_refusion.rows import read_objects
from vllm_refusion.training.chains import Chained, Cutting, collate_chains, leading_hits
from vllm_refusion.training.data import Encoder
from vllm_refusion.training.mask_adapter import MaskAdapterModel

FOLDER = Path(__file__).parent


@torch.no_grad()
def written(
    model: Any, prompts: Sequence[list[int]], max_tokens: int, eos: int, batch: int
) -> list[list[int]]:
    """Greedy responses, EOS included."""
    responses = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(map(len, part))
        ids = torch.tensor([[eos] * (width - len(p)) + p for p in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        output = model.generate(
            input_ids=ids,
            attention_mask=mask.to(ids.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        for row in output[:, width:].tolist():
            responses.append(row[: row.index(eos) + 1] if eos in row else row)
    return responses


@torch.no_grad()
def accepted(
    model: MaskAdapterModel,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    masks: int,
) -> list[list[int]]:
    """Of each response, for each cut in it from its first token on, how many drafts are right.

    ``masks`` are fed at a time, about.
    """
    cutting, rows = model.cutting, []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens = [*prompt, *response]
        cuts = range(max(1, len(prompt)), len(tokens))
        for start in range(0, len(cuts), cutting.chains):
            rows.append((number, Chained(tokens, cuts[start : start + cutting.chains])))
    rows.sort(key=lambda row: -len(row[1].tokens))
    found: list[dict[int, int]] = [{} for _ in prompts]
    device, size = model.mask_embedding.device, max(1, masks // (cutting.chains * cutting.length))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = collate_chains([row for _, row in part], cutting, 0)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        hits = iter(leading_hits(model(batch=batch), batch, cutting).tolist())
        for number, row in part:
            found[number] |= {at: next(hits) for at in row.cuts}
    return [[of[at] for at in sorted(of)] for of in found]


def figures(runs: Sequence[Sequence[int]], depth: int) -> dict[str, Any]:
    """Of the cuts of all responses; and of those that decoding meets where masks always ride.

    Then a pass gives the drafts that are accepted and the token that is picked behind them.
    """
    everywhere = [hits for run in runs for hits in run]
    passes = tokens = 0
    for run in runs:
        at = 0
        while at < len(run):
            at += run[at] + 1
            passes += 1
        tokens += len(run)
    return {
        "responses": len(runs),
        "chains": len(everywhere),
        "accepted": sum(everywhere) / len(everywhere),
        "by_depth": [
            round(sum(hits > place for hits in everywhere) / len(everywhere), 4)
            for place in range(depth)
        ],
        "tokens_per_pass": tokens / passes,
    }


def load(folder: Path, base: str, dtype: torch.dtype, device: str, chains: int) -> MaskAdapterModel:
    """The adapter on its base; raises ValueError if the base is another."""
    adapter = read_adapter(folder)
    check_base(adapter, base)
    backbone = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    cutting = Cutting(chains, adapter.chain_length, adapter.skips_known)
    layers = None if adapter.layers is None else list(adapter.layers)
    model = MaskAdapterModel(backbone, cutting, adapter.rank, layers, adapter.target_modules)
    model.load(adapter_tensors(folder))
    return model.to(device, dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("--base", help="folder of its base; default: where the adapter says")
    parser.add_argument("--problems", type=Path, default=FOLDER / "dev_problems.jsonl")
    parser.add_argument("--count", type=int, help="only the first of them")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--plain-prompt", action="store_true", help="no chat template")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="responses written at a time")
    parser.add_argument("--masks", type=int, default=8192, help="fed at a time")
    args = parser.parse_args()

    base = args.base or find_base(read_adapter(args.adapter))
    dtype = getattr(torch, args.dtype)
    model = load(args.adapter, base, dtype, args.device, chains=32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = Encoder(tokenizer, None, plain=args.plain_prompt)
    rows = list(read_objects([args.problems]))[: args.count]
    prompts = encoder.prompts([row.values["query"] for row in rows])
    began = time.monotonic()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(args.device).eval()
    eos = tokenizer.eos_token_id
    responses = written(plain, prompts, args.max_tokens, eos, args.batch)
    print(f"text written in {time.monotonic() - began:.0f} s", file=sys.stderr)
    depth = model.cutting.length - (not model.cutting.skips_known)
    runs = accepted(model, prompts, responses, args.masks)
    print(json.dumps({"adapter": str(args.adapter), **figures(runs, depth)}))


if __name__ == "__main__":
    main()
