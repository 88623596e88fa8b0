"""transformers' Trainer with the hybrid loss, and decoding of a dev set while training."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import decode
from vllm_refusion.files import parse_json, seal, writing

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)
SEAL = "complete.json"  # of a checkpoint, see ``files.seal``
KEPT = 2  # checkpoints of a run
FED = ("input_ids", "mask_positions")  # of a batch, a row of the model for each element


class Problem(NamedTuple):
    """A row of the dev set: its values, its prompt, and what is fed of it for the dev loss."""

    values: Mapping[str, Any]
    prompt: list[int]
    row: Any


class Dev(NamedTuple):
    """How the dev set is decoded.

    Attributes:
        params: of the reference decoder; None decodes token by token, for autoregressive models.
        decoded: how many problems, from the first; all count for the loss.
        samples: file that decoded texts are appended to.
    """

    problems: Sequence[Problem]
    params: DecodingParams | None
    decoded: int
    max_tokens: int
    samples: Path


class Losses(NamedTuple):
    """What ``model(batch=..., counts=...)`` is given, and what the losses mean that it returns.

    Attributes:
        collate: makes a batch of rows.
        counts: of a batch's labels, added up over a step: what its losses are divided by.
        weights: of the losses, in ``loss``.
        logged: names of the first losses, or of all.
    """

    collate: Callable[..., dict[str, torch.Tensor]]
    counts: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    weights: tuple[float, ...]
    logged: tuple[str, ...]


class ReFusionTrainer(Trainer):
    """All losses are means over an optimiser step's whole batch, however it is spread.

    Logs the losses that have names beside ``loss``, and ``tokens_per_second`` fed, padding
    included. ``evaluate`` gives the losses on the dev set and figures of decoding it.
    """

    model: Any
    processing_class: Any

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        losses: Losses,
        examples: int,
        dev: Dev | None = None,
        **options: Any,
    ) -> None:
        """``examples`` is the size of an epoch, for the log."""
        super().__init__(
            model=model,
            args=args,
            data_collator=losses.collate,
            eval_dataset=dev.problems if dev else None,
            **options,
        )
        self.model_accepts_loss_kwargs = True  # the loss is divided by the whole step's counts
        self._examples, self._dev, self._of = examples, dev, losses
        self._loss_weights = torch.tensor(losses.weights, device=args.device)
        self._start_interval()

    def _start_interval(self) -> None:
        self._losses = torch.zeros_like(self._loss_weights)
        self._steps, self._tokens, self._since = 0, 0, time.monotonic()

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        getattr(loader, "base_dataloader", loader).worker_init_fn = _leave_signals
        return loader

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        self._steps += 1
        counts = reduce(torch.add, (self._of.counts(batch).to(device) for batch in batch_samples))
        return self.accelerator.gather(counts[None]).sum(0)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        losses = model(batch=inputs, counts=num_items_in_batch)
        self._losses += losses.detach()
        self._tokens += sum(inputs[name].numel() for name in FED if name in inputs)
        # Gradients are averaged over the processes, but their losses are parts of one sum.
        return (losses * self._loss_weights).sum() * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.state.epoch = self.state.global_step * self._batch_size() / self._examples
        if "loss" in logs and self._steps:
            losses = self.accelerator.reduce(self._losses, "sum") / self._steps
            logs |= self._named(losses)
            seconds = time.monotonic() - self._since
            logs["tokens_per_second"] = self._tokens * self.accelerator.num_processes / seconds
            self._start_interval()
        super().log(logs, start_time)

    def _named(self, losses: torch.Tensor) -> dict[str, float]:
        return dict(zip(self._of.logged, losses.tolist()))

    def _batch_size(self) -> int:
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    @torch.no_grad()
    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Every process decodes all problems, since sharded models need all for a pass."""
        assert self._dev is not None  # else there is no dataset to evaluate on
        began, model = time.monotonic(), self.model
        training = model.training
        model.eval()
        metrics = self._dev_losses(model, self._dev) | self._decode(model, self._dev)
        model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._since += time.monotonic() - began
        return metrics

    def _dev_losses(self, model: Any, dev: Dev) -> dict[str, float]:
        rows, size = [p.row for p in dev.problems], self.args.per_device_eval_batch_size
        batches = [self._of.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        counts = reduce(torch.add, map(self._of.counts, batches)).to(self.args.device)
        prepared = (self._prepare_inputs(batch) for batch in batches)
        losses = reduce(torch.add, (model(batch=batch, counts=counts) for batch in prepared))
        return {"loss": (losses * self._loss_weights).sum().item(), **self._named(losses)}

    def _decode(self, model: Any, dev: Dev) -> dict[str, float]:
        tokenizer, outcomes = self.processing_class, []
        for problem in dev.problems[: dev.decoded]:
            tokens, passes = decode_one(model, tokenizer, problem.prompt, dev)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            outcomes.append((len(tokens), passes, is_right(text, problem.values)))
            if self.is_world_process_zero():
                sample = {"step": self.state.global_step, "query": problem.values["query"]}
                sample |= {"text": text, "tokens": len(tokens), "passes": passes}
                with open(dev.samples, "a", encoding="utf-8") as file:
                    file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        if not outcomes:
            return {}
        tokens, passes, right = (sum(column) for column in zip(*outcomes))
        return {"tpf": tokens / passes, "right": right / len(outcomes)}


def _leave_signals(_: int) -> None:
    """For workers: a signal to the whole process group is for the process that saves."""
    for number in INTERRUPTIONS:
        signal.signal(number, signal.SIG_IGN)


def decode_one(model: Any, tokenizer: Any, prompt: list[int], dev: Dev) -> tuple[list[int], int]:
    """The tokens of an answer and the passes that it took, the prompt's not counted."""
    if dev.params is None:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=dev.max_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokens = output[0, len(prompt) :].tolist()
        return tokens, len(tokens)
    decoded = decode(
        model,
        prompt,
        dev.params,
        mask_token_id=model.config.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_tokens=dev.max_tokens,
    )
    return decoded.tokens, len(decoded.passes)


def is_right(text: str, values: Mapping[str, Any]) -> bool:
    """What follows the last ``####`` is the row's ``answer``; without one: text is ``response``."""
    if "answer" in values:
        return text.split("####")[-1].strip() == str(values["answer"]).strip()
    return text.strip() == values["response"].strip()


class LogFiles(TrainerCallback):
    """Appends what is logged to log.jsonl; it and samples.jsonl are cut back where a run goes on.

    Both have one JSON object with its ``step`` a line.
    """

    def __init__(self, run: Path) -> None:
        self._log, self._samples = run / "log.jsonl", run / "samples.jsonl"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            for path in (self._log, self._samples):
                if path.exists():
                    _cut_back(path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def _cut_back(path: Path, step: int) -> None:
    """Keeps lines up to ``step``. A last line without its end was being written: it is dropped.

    Raises:
        ValueError: another line has no step; names it.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    kept = []
    for number, line in enumerate(whole.splitlines(keepends=True), 1):
        try:
            if parse_json(line.decode())["step"] <= step:
                kept.append(line.rstrip(b"\n"))
        except (ValueError, TypeError, KeyError) as error:
            problem = f"no line of this run ({error})"
            raise ValueError(f"{path}:{number}: {problem}: remove it, and resume again") from error
    with writing(path, "wb") as file:
        file.writelines(line + b"\n" for line in kept)


class Checkpoints(TrainerCallback):
    """Seals each checkpoint once every process has written its part; keeps the last two."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            seal(self._run / f"checkpoint-{state.global_step}", SEAL)
            kept = sealed_checkpoints(self._run)[:KEPT]
            for path in self._run.glob("checkpoint-*"):
                if path not in kept:
                    shutil.rmtree(path)


def sealed_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first; a save that was cut off leaves no seal."""
    found = [path.parent for path in run.glob(f"checkpoint-*/{SEAL}")]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


class SaveWhenInterrupted(TrainerCallback):
    """On SIGINT or SIGTERM: finish the step, save a checkpoint, stop. A second one ends at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._handlers: dict[int, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        for number in INTERRUPTIONS:
            self._handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        self.interrupted = True
        signal.signal(number, self._handlers[number])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.world_size > 1:  # all stop after the same step
            flag = torch.tensor(self.interrupted, dtype=torch.int32, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(flag)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
