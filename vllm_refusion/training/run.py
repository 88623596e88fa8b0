"""A training run in a folder: settings, tokenised data, checkpoints, log, and the model it makes.

settings.json   what the run's outcome depends on; a run only goes on with the same
data/           the tokenised examples
checkpoint-N/   all that is needed to go on after step N, sealed once it is complete
log.jsonl       losses and dev figures by step
samples.jsonl   decoded dev problems by step
model/, or adapter/   the outcome, there once it is complete
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, TrainingArguments

from vllm_refusion.files import damage, publish, read_json, write_text
from vllm_refusion.training.data import Encoder, TokenStore, read_rows, stored, write_store
from vllm_refusion.training.hybrid_task import HybridTask
from vllm_refusion.training.recipe import Execution, Recipe
from vllm_refusion.training.trainer import (
    SEAL,
    Checkpoints,
    Dev,
    LogFiles,
    Problem,
    SaveWhenInterrupted,
    sealed_checkpoints,
)

if TYPE_CHECKING:
    from vllm_refusion.training.adapter_task import AdapterTask

DEV_KEY = 1 << 61  # dev rows are masked with keys of their own


def train(
    recipe: Recipe, execution: Execution, data: Sequence[Path], run: Path, resume: bool = False
) -> bool:
    """Trains in the folder ``run``; False if it was interrupted and can be resumed.

    Raises:
        ValueError: settings, data or folder do not fit; says what.
    """
    tokenizer, config = _load_source(recipe)
    task = _task(recipe, execution, config)
    encoder = Encoder(tokenizer, task.mask_token_id, recipe.template_options, recipe.plain_prompt)
    args = _arguments(recipe, execution, run)
    with args.main_process_first(local=False, desc="tokenising"):
        first = args.process_index == 0  # the others may find what this one has begun
        settings = {**asdict(recipe), **task.settings}
        if first:
            _check_folder(run, task.outcome, resume)
            _check_settings(settings, run)
        data_encoder, data = task.texts(encoder, data, run / "own")
        if first:
            _write_data(data_encoder, data, run / "data", recipe.max_length, execution.progress)
            settings["data"] = TokenStore(run / "data").fingerprint
            _check_settings(settings, run)
            write_text(run / "settings.json", json.dumps(settings, indent=2) + "\n")
            _set_damaged_aside(run)
        dev = _dev(task, execution, encoder, run) if execution.dev else None
    store = TokenStore(run / "data")
    steps = recipe.steps or math.ceil(recipe.epochs * len(store) / recipe.batch_size)
    args.max_steps = steps
    if first:
        amount = f"{steps} steps of {recipe.batch_size} examples on {args.world_size} devices"
        print(amount, file=sys.stderr)
    interruption = SaveWhenInterrupted()
    trainer = task.trainer(
        model=task.model(),
        args=args,
        train_dataset=task.course(store, steps),
        processing_class=tokenizer,
        losses=task.losses(tokenizer.pad_token_id or 0),
        examples=len(store),
        dev=dev,
        callbacks=[LogFiles(run), Checkpoints(run), interruption],
    )
    last = latest_checkpoint(run)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if interruption.interrupted and trainer.state.global_step < steps:
        return False
    part = run / f"{task.outcome}.part"
    task.save(trainer, part)
    if trainer.is_world_process_zero():
        publish(part, run / task.outcome)
    return True


def _task(recipe: Recipe, execution: Execution, config: Any) -> HybridTask | AdapterTask:
    if recipe.adapter is None:
        return HybridTask(recipe, execution, config)
    try:
        from vllm_refusion.training.adapter_task import AdapterTask
    except ImportError as error:
        raise ValueError(f'training needs pip install "vllm-refusion[train]": {error}') from error
    return AdapterTask(recipe, recipe.adapter, execution, config)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next(iter(sealed_checkpoints(run)), None)


def _set_damaged_aside(run: Path) -> None:
    """Renames the newest checkpoints until one holds what was written."""
    while (newest := latest_checkpoint(run)) and (fault := damage(newest, SEAL)):
        aside = newest.with_name(f"damaged-{newest.name}")
        shutil.rmtree(aside, ignore_errors=True)
        newest.rename(aside)
        before = latest_checkpoint(run)
        start = f"goes on from {before}" if before else "starts anew: there is no checkpoint before"
        print(f"{fault}: {newest} is now {aside.name}, and the run {start}", file=sys.stderr)


def _load_source(recipe: Recipe) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(recipe.model)
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers cannot load {recipe.model}: {error}") from error
    return tokenizer, config


def _arguments(recipe: Recipe, execution: Execution, run: Path) -> TrainingArguments:
    try:
        args = TrainingArguments(
            output_dir=str(run),
            per_device_train_batch_size=execution.micro_batch_size,
            per_device_eval_batch_size=execution.micro_batch_size,
            max_steps=1,  # set once the data are known
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.schedule,
            warmup_steps=recipe.warmup_steps,
            weight_decay=recipe.weight_decay,
            adam_beta2=recipe.adam_beta2,
            max_grad_norm=recipe.max_grad_norm,
            bf16=recipe.bf16,
            use_cache=True,  # in the outcome's config; the training pass asks for none
            use_cpu=not torch.accelerator.is_available(),
            seed=recipe.seed % 2**32,
            gradient_checkpointing=execution.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            ddp_find_unused_parameters=False,
            train_sampling_strategy="sequential",  # the course has the order
            remove_unused_columns=False,
            dataloader_num_workers=execution.workers,
            accelerator_config={"non_blocking": True},  # copies to the device wait for nothing
            logging_nan_inf_filter=False,  # it would wait for the device after each micro batch
            logging_steps=execution.log_every,
            logging_first_step=True,
            save_steps=execution.save_every,
            eval_strategy="steps" if execution.dev else "no",
            eval_steps=execution.eval_every,
            report_to="none",
            disable_tqdm=not execution.progress,
        )
        devices = args.n_gpu
    except ImportError as error:
        raise ValueError(f'training needs pip install "vllm-refusion[train]": {error}') from error
    if devices > 1:
        raise ValueError(
            f"one process sees {devices} GPUs: start one for each with accelerate launch "
            f"--num_processes {devices} -m vllm_refusion train ..."
        )
    at_once = execution.micro_batch_size * args.world_size
    if recipe.batch_size % at_once:
        raise ValueError(
            f"--batch-size {recipe.batch_size}: allowed is a multiple of {at_once}, what the "
            "devices take at once (--micro-batch-size)"
        )
    args.gradient_accumulation_steps = recipe.batch_size // at_once
    return args


def _write_data(
    encoder: Encoder, data: Sequence[Path], folder: Path, max_length: int, progress: bool
) -> None:
    def bar(rows: Any) -> Any:
        return tqdm(rows, desc="tokenising", unit=" rows", disable=not progress)

    key = encoder.key(data, max_length) if all(path.is_file() for path in data) else None
    known = stored(folder, key) if key else None
    report = known or write_store(read_rows(data), encoder, folder, max_length, bar, key)
    print(report, file=sys.stderr)


def _check_folder(run: Path, outcome: str, resume: bool) -> None:
    if run.exists() and any(run.iterdir()) and not resume:
        raise ValueError(f"{run} is not empty: go on with --resume, or name another folder")
    if (run / outcome).exists():
        raise ValueError(f"{run}/{outcome} exists: the run is complete")


def _check_settings(settings: dict[str, Any], run: Path) -> None:
    """Raises ValueError if the run was started with other settings than these."""
    settings = json.loads(json.dumps(settings))
    path = run / "settings.json"
    if not path.exists():
        return
    before = read_json(path, "restore it, or start a run in another folder")
    if not isinstance(before, dict):
        raise ValueError(f"{path}: not settings: restore it, or start a run in another folder")
    changed = {n: (before.get(n), v) for n, v in settings.items() if before.get(n) != v}
    if changed:
        listed = ", ".join(f"{n} was {a!r}, now {b!r}" for n, (a, b) in changed.items())
        raise ValueError(f"{run} cannot go on with other settings: {listed}")


def _dev(task: HybridTask | AdapterTask, execution: Execution, encoder: Encoder, run: Path) -> Dev:
    encoder, paths = task.texts(encoder, execution.dev, run / "own-dev")
    rows, problems = list(read_rows(paths)), []
    for number, (row, example) in enumerate(zip(rows, encoder.encode(rows), strict=True)):
        fed = task.dev_row(example, DEV_KEY + number)
        problems.append(Problem(row.values, list(example.prompt), fed))
    if not problems:
        raise ValueError("the dev files hold no rows")
    params = execution.dev_params if task.mask_token_id is not None else None
    return Dev(problems, params, execution.dev_decoded, execution.max_tokens, run / "samples.jsonl")
