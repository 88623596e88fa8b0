"""Decodes dev problems with trained models: accuracy and passes in parallel, seconds alone."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from decoders import DECODERS, DRAWING, Outcome, Tokens
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from variants import MAIN, SAME_TEXT, VARIANTS

from vllm_refusion.training.data import Encoder, read_rows
from vllm_refusion.training.trainer import is_right


class Place(NamedTuple):
    """Where models and problems are, and the longest response."""

    folder: str
    dev: str
    tokenizer: str
    max_tokens: int


class Problems:
    """Dev problems, tokenised."""

    def __init__(self, place: Place) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(place.tokenizer)
        self.rows = [row.values for row in read_rows([place.dev])]
        encoder = Encoder(self.tokenizer, None)
        self.prompts = [encoder.prompt(row["query"]) for row in self.rows]

    def right(self, number: int, tokens: list[int]) -> bool:
        return is_right(self.tokenizer.decode(tokens, skip_special_tokens=True), self.rows[number])


class Job(NamedTuple):
    """Some problems decoded with one variant by the model of one seed."""

    variant: str
    seed: int
    problems: tuple[int, ...]


def jobs(seeds: Sequence[int], problems: int, chunk: int, main_only: bool = False) -> list[Job]:
    """All there is to decode, so ordered that each variant has had the same problems before any
    has more; the tables' main rows come first.
    """
    names = MAIN if main_only else VARIANTS
    variants = [name for name in reversed(names) if name not in SAME_TEXT]
    return [
        Job(variant, seed, tuple(range(first, min(first + chunk, problems))))
        for first in range(0, problems, chunk)
        for variant in variants
        for seed in seeds
    ]


def decode_one(
    model: Any, variant: str, prompt: list[int], number: int, max_tokens: int
) -> Outcome:
    """``number`` seeds what is drawn."""
    method, options, _ = VARIANTS[variant]
    special = Tokens(model.config.mask_token_id, model.config.eos_token_id)
    if method in DRAWING:
        options = {**options, "seed": number}
    return DECODERS[method](model, prompt, special, max_tokens, **options)


@cache
def load(
    folder: str, method: str, seed: int, device: str, dtype: torch.dtype = torch.float32
) -> Any:
    path = Path(folder) / "models" / f"{method}-{seed}"
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    return AutoModelForCausalLM.from_pretrained(path, **options).eval().to(device)


def work(place: Place, device: str, waiting: Any, deadline: float, name: str) -> None:
    """Takes jobs from a queue until none is left or the time is over; a line for each problem."""
    torch.set_num_threads(1)
    disable_progress_bar()
    problems = Problems(place)
    with open(Path(place.folder) / f"decoded-{name}.jsonl", "a") as file:
        while True:
            try:
                job = waiting.get(timeout=1)
            except queue.Empty:
                return
            model = load(place.folder, VARIANTS[job.variant].method, job.seed, device)
            for number in job.problems:
                if time.time() > deadline:
                    return
                began = time.perf_counter()
                prompt = problems.prompts[number]
                outcome = decode_one(model, job.variant, prompt, number, place.max_tokens)
                line = {
                    "variant": job.variant,
                    "seed": job.seed,
                    "problem": number,
                    "right": problems.right(number, outcome.tokens),
                    "tokens": len(outcome.tokens),
                    "passes": outcome.passes,
                    "seconds_shared": time.perf_counter() - began,
                    "device": device,
                }
                file.write(json.dumps(line) + "\n")
                file.flush()


def measure(
    place: Place, variants: Iterable[str], seed: int, count: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """Seconds a problem of one process with the machine to itself, after a short one unmeasured.

    In bfloat16 on a GPU. Problems are the outer loop, so that a deadline leaves all variants with
    the same ones but for the last.
    """
    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    models = {
        name: load(place.folder, VARIANTS[name].method, seed, device, dtype)
        for name in variants
        if (Path(place.folder) / "models" / f"{VARIANTS[name].method}-{seed}").exists()
    }
    problems = Problems(place)
    for number in range(-1, count):
        for variant, model in models.items():
            if time.time() > deadline:
                return
            wait()
            began = time.perf_counter()
            at, most = (number, place.max_tokens) if number >= 0 else (0, 32)
            outcome = decode_one(model, variant, problems.prompts[at], at, most)
            wait()
            line = {"variant": variant, "seed": seed, "problem": number}
            line |= {"seconds": time.perf_counter() - began, "tokens": len(outcome.tokens)}
            line |= {"passes": outcome.passes, "device": device}
            if number >= 0:
                yield line
