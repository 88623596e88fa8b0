"""Trains one method with one seed: the same initial weights, examples and steps for all methods.

Started by compare.py, one process a run. The number of steps is given, or agreed between the runs
that share a machine: each measures its pace, and compare.py answers with what fits the time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from objectives import CAUSAL, START, Item, Objective, hidden_states, loss_of, see_both_ways
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from vllm_refusion.training.data import TokenStore
from vllm_refusion.training.order import Course, generator

POOL = 8  # batches whose examples are sorted by length, to pad less
PACE_FROM, PACE_UNTIL = 20, 80  # steps whose time says the pace
EVERY = 50  # steps between logged losses


@dataclass(frozen=True)
class Settings:
    """What is the same for all methods; ``steps=None`` lets compare.py decide.

    Attributes:
        start_steps: of the autoregressive model of a seed whose weights all methods start from, and
            whose examples come before theirs; 0: random weights.
        deadline: when training ends, whatever its steps, as ``time.time()``.
    """

    config: str
    store: str
    output: str
    steps: int | None = None
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    layers: int = 6
    hidden_size: int = 256
    generation_length: int = 256
    start_steps: int = 0
    deadline: float = math.inf
    compiled: bool = False
    workers: int = 1


class Items(Dataset):
    """Item i: the i-th example seen, and the chance that masks it."""

    def __init__(self, course: Course, seed: int) -> None:
        self._course, self._seed = course, seed

    def __getitem__(self, index: int) -> Item:
        return self._course.example(index), generator(self._seed, index)


def batches(order: Course, size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Endless batches of item numbers, those of a pool sorted by length and then shuffled."""
    chance = np.random.default_rng(seed)
    while True:
        pool = np.arange(start, start + POOL * size)
        lengths = [sum(map(len, vars(order.example(i)).values())) for i in pool]
        parts = np.split(pool[np.argsort(lengths, kind="stable")], POOL)
        for part in chance.permutation(POOL):
            yield parts[part].tolist()
        start += POOL * size


def initial_model(settings: Settings, seed: int) -> Any:
    if settings.start_steps:
        start = Path(settings.output) / "models" / f"{START}-{seed}"
        options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        return AutoModelForCausalLM.from_pretrained(start, **options)
    shape = AutoConfig.from_pretrained(settings.config)
    values = shape.to_dict() | {
        "num_hidden_layers": settings.layers,
        "hidden_size": settings.hidden_size,
        "intermediate_size": 3 * settings.hidden_size,
        "layer_types": None,
    }
    config = type(shape)(**values)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def rate(step: int, settings: Settings, steps: int | None) -> float:
    """Linear warm-up, then a cosine down to 5%."""
    warmup = settings.warmup_steps if steps is None else min(settings.warmup_steps, steps // 5)
    if step < warmup or steps is None:
        return settings.learning_rate * min(1, (step + 1) / max(1, warmup))
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.learning_rate * (0.525 + 0.475 * math.cos(math.pi * progress))


class Run:
    """One model in training."""

    def __init__(self, settings: Settings, method: str, seed: int) -> None:
        self.settings, self.method, self.seed = settings, method, seed
        self.folder = Path(settings.output)
        self.name = f"{method}-{seed}"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = initial_model(settings, seed).to(self.device)
        see_both_ways(self.model, method not in CAUSAL)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=self.device == "cuda",
        )
        self.compiled = settings.compiled

    def loader(self) -> Iterator[dict[str, torch.Tensor]]:
        store, config = TokenStore(Path(self.settings.store)), self.model.config
        course = Course(store, len(store), self.seed, (4, 8, 16, 32), config.mask_token_id)
        objective = Objective(
            self.method,
            config.mask_token_id,
            config.pad_token_id,
            config.eos_token_id,
            generation_length=self.settings.generation_length,
        )
        size = self.settings.batch_size
        return iter(
            DataLoader(
                Items(course, self.seed),
                batch_sampler=batches(course, size, self.seed, self.settings.start_steps * size),
                collate_fn=objective,
                num_workers=self.settings.workers,
                pin_memory=self.device == "cuda",
                prefetch_factor=8 if self.settings.workers else None,
            )
        )

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            hidden = hidden_states(self.model, batch)
            return loss_of(hidden, self.model.get_output_embeddings(), batch)

    def prepare(self, batch: dict[str, torch.Tensor]) -> None:
        """Compiles the layers if that is wanted and works, and makes the slow first passes."""
        layers = self.model.base_model.layers
        if self.compiled:
            try:
                for layer in layers:
                    layer.compile(dynamic=True)
                self.loss(batch).backward()
            except Exception as error:  # whatever it is, the run goes on
                print(f"{self.name}: not compiled: {error!r}"[:500], flush=True)
                self.compiled = False
                for layer in layers:
                    layer._compiled_call_impl = None
        for _ in range(3):
            self.loss(batch).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def tell(self, kind: str, value: Any) -> None:
        part = self.folder / f"{kind}-{self.name}.part"
        part.write_text(json.dumps(value))
        part.rename(self.folder / f"{kind}-{self.name}.json")

    def ask(self, kind: str) -> Any:
        """Waits for compare.py's answer to all runs."""
        while not (path := self.folder / f"{kind}.json").exists():
            time.sleep(0.05)
        return json.loads(path.read_text())

    def train(self) -> dict[str, Any]:
        settings, steps = self.settings, self.settings.steps
        loader = self.loader()
        fetched = (self._moved(batch) for batch in loader)
        first = next(fetched)
        self.prepare(first)
        if steps is None:
            self.tell("ready", True)
            self.ask("go")
        began, since, losses, recent = time.monotonic(), 0.0, [], []
        data_tokens = positions = step = 0
        while True:
            if step == PACE_FROM:
                self._wait()
                since = time.monotonic()
            if step == PACE_UNTIL and steps is None:
                self._wait()
                self.tell("pace", (time.monotonic() - since) / (PACE_UNTIL - PACE_FROM))
                steps = self.ask("steps")
            if step == steps or time.time() > settings.deadline:
                break
            batch = first if step == 0 else next(fetched)
            for group in self.optimizer.param_groups:
                group["lr"] = rate(step, settings, steps)
            loss = self.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            recent.append(loss.detach())
            data_tokens += batch["data_tokens"]
            positions += batch["input_ids"].numel()
            step += 1
            if step % EVERY == 0:
                losses.append((step, torch.stack(recent).mean().item()))
                recent = []
        self._wait()
        return {
            "method": self.method,
            "seed": self.seed,
            "steps": step,
            "steps_wanted": steps,
            "examples": step * settings.batch_size,
            "data_tokens": data_tokens,
            "positions": positions,
            "seconds": time.monotonic() - began,
            "compiled": self.compiled,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "losses": losses,
        }

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _moved(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            name: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v
            for name, v in batch.items()
        }


def train_one(settings: Settings, method: str, seed: int) -> None:
    """Leaves models/<method>-<seed> and trained-<method>-<seed>.json."""
    disable_progress_bar()
    run = Run(settings, method, seed)
    outcome = run.train()
    run.model.save_pretrained(run.folder / "models" / run.name)
    run.tell("trained", outcome | {"settings": asdict(settings)})
    print(f"{run.name}: {outcome['steps']} steps, {outcome['seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("method")
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.set_num_threads(1)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new shape
    train_one(Settings(**args.settings), args.method, args.seed)


if __name__ == "__main__":
    main()
