"""Traces made up from texts, for viewers: any script, any length, every kind of operation."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from typing import Any

from vllm_refusion.viewer.record import FORMAT, VERSION

SCHEMA = json.loads((files("vllm_refusion.viewer") / "trace.schema.json").read_text())
ENGLISH = ["The ", "quick ", "brown ", "fox\n", "jumps ", "over ", "the ", "lazy ", "dog", "."] * 4
WRONG = 1  # a token that drafts get wrong


def synthetic_trace(pieces: list[str], slot_size: int, block_length: int, seed: int = 0) -> dict:
    """A trace whose response is ``pieces``, one token each."""
    vocabulary = {"0": "", str(WRONG): "?"} | {str(i): text for i, text in enumerate(pieces, 2)}
    tokens = list(range(2, 2 + len(pieces)))
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": "synthetic",
        "dtype": "float32",
        "device": "no device",
        "mask_token_id": 0,
        "vocabulary": vocabulary,
        "requests": [
            {
                "prompt": {"text": "A prompt", "tokens": [5, 6]},
                "parameters": {
                    "mode": "parallel",
                    "slot_size": slot_size,
                    "block_length": block_length,
                    "slot_threshold": 0.9,
                    "token_threshold": 0.4,
                    "temperature": 0.0,
                    "seed": 0,
                    "max_tokens": len(pieces),
                },
                "output": {"text": "".join(pieces), "tokens": tokens, "pieces": pieces},
                "passes": list(_passes(tokens, slot_size, block_length, random.Random(seed))),
                "autoregressive": {
                    "model": "twin",
                    "output": {"text": "".join(pieces), "tokens": tokens, "pieces": pieces},
                    "seconds": [round(0.01 * i, 3) for i in range(1, len(pieces) + 1)],
                },
            }
        ],
    }


def synthetic_serial_trace(pieces: list[str], slot_size: int, ahead: int, seed: int = 0) -> dict:
    """The same in serial mode, in which passes draft so many tokens ahead; some are wrong."""
    trace = synthetic_trace(pieces, slot_size, slot_size)
    (request,) = trace["requests"]
    given = request["parameters"]
    used = ("slot_size", "temperature", "seed", "max_tokens")
    request["parameters"] = {"mode": "serial", "slot_start": "mask"} | {k: given[k] for k in used}
    tokens = request["output"]["tokens"]
    request["passes"] = list(_serial_passes(tokens, ahead, random.Random(seed)))
    return trace


def _serial_passes(tokens: list[int], ahead: int, rng: random.Random) -> Any:
    known, drafts = 0, []
    while known < len(tokens):
        right = next((i for i, d in enumerate(drafts) if d != tokens[known + i]), len(drafts))
        new = tokens[known : known + right + 1]
        tests = [[known + i, d, 0.9, True] for i, d in enumerate(drafts[:right])]
        if right < len(drafts):
            tests.append([known + right, drafts[right], 0.1, False])
        picks = [[known + i, token, 0.9] for i, token in enumerate(new)]
        fed = 1 + len(drafts) + ahead
        known += len(new)
        coming = tokens[known : known + ahead]
        wrong = rng.randrange(2 * ahead) if ahead else 0
        drafts = [WRONG if i == wrong else token for i, token in enumerate(coming)]
        operation = {"kind": "serial", "tests": tests, "picks": picks, "chains": [[0, ahead]]}
        if ahead:
            operation["drafts"] = [[known + i, token, 0.5] for i, token in enumerate(drafts)]
        yield {
            "seconds": 0.02,
            "rows": fed,
            "operations": [operation],
            "committed": [pick[:2] for pick in picks],
            "delivered": len(new),
        }


def _passes(tokens: list[int], size: int, length: int, rng: random.Random) -> Any:
    def one(rows: int, *operations: dict, committed: list | None = None) -> dict:
        entry = {"seconds": 0.02, "rows": rows, "operations": list(operations), "delivered": 0}
        return entry | ({"committed": committed} if committed else {})

    def right(position: int) -> int:
        return tokens[position] if position < len(tokens) else WRONG

    def positions(slots: list[int]) -> list[int]:
        return [start + i for start in slots for i in range(size)]

    yield one(2, {"kind": "prefill"})
    for block in range(0, len(tokens), length):
        left = list(range(block, min(block + length, len(tokens)), size))
        while left:
            chosen = sorted(rng.sample(left, rng.randint(1, len(left))))
            slots = [
                {"start": s, "certainty": round(rng.random(), 3), "chosen": s in chosen}
                for s in left
            ]
            bad = rng.random() < 0.4
            drafts = [[p, WRONG if bad and p % size else right(p), 0.5] for p in positions(chosen)]
            yield one(len(left) * size, {"kind": "plan", "slots": slots, "drafts": drafts})
            commits = [[p, right(p)] for p in positions(chosen)]
            passed = [p % size == 0 or not bad for p, _, _ in drafts]
            tests = [
                [p, t, (0.9 if good else 0.1) if p % size else None, good]
                for (p, t, _), good in zip(drafts, passed)
            ]
            verify = {"kind": "verify", "tests": tests}
            if bad:
                yield one(len(tests), verify)
                rest = [p for p in positions(chosen) if p % size]
                proposals = [[p, right(p), 0.8] for p in rest]
                yield one(len(tests), {"kind": "predict", "proposals": proposals})
                tests = [[p, right(p), None if p % size == 1 else 0.9, True] for p in rest]
                yield one(
                    len(commits), {"kind": "infill_verify", "tests": tests}, committed=commits
                )
            else:
                yield one(len(tests), verify, committed=commits)
            left = [s for s in left if s not in chosen]
