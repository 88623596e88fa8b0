"""A training run in a folder: settings, tokenised data, checkpoints, log, and the model it makes.

settings.json   what the run's outcome depends on; a run only goes on with the same
data/           the tokenised examples
checkpoint-N/   all that is needed to go on after step N, sealed once it is complete
log.jsonl       losses and dev figures by step
samples.jsonl   decoded dev problems by step
model/          the outcome, there once it is complete
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TrainingArguments,
)

from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.files import damage, publish, read_json, write_text
from vllm_refusion.training.collator import autoregressive, draw, sequence
from vllm_refusion.training.data import Encoder, TokenStore, read_rows, stored, write_store
from vllm_refusion.training.loss import CAUSAL
from vllm_refusion.training.order import OBJECTIVES, Course, generator
from vllm_refusion.training.trainer import (
    SEAL,
    Checkpoints,
    Dev,
    LogFiles,
    Problem,
    ReFusionTrainer,
    SaveWhenInterrupted,
    sealed_checkpoints,
)

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
DEV_KEY = 1 << 61  # dev rows are masked with keys of their own


@dataclass(frozen=True)
class Recipe:
    """What the outcome depends on; the defaults are the published recipe where it says.

    Attributes:
        epochs: passes over the data, unless ``steps`` says how many optimiser steps.
        batch_size: examples per optimiser step, over all devices.
        from_scratch: random weights in the model's shape instead of its own.
        block_share: of the examples, shown as decoding in blocks leaves them, see ``draw``.
        infill_weight: of L_infill, see ``sequence``; the paper has none.
        slot_certainty: first masks learn how sure so many slots are, see ``hybrid_loss``; 0: how
            sure their own token is, as in the paper.
    """

    model: str
    objective: str = "refusion"
    from_scratch: bool = False
    epochs: float = 4.0
    steps: int | None = None
    batch_size: int = 64
    max_length: int = 4096
    slot_sizes: tuple[int, ...] = (4, 8, 16, 32)
    block_share: float = 0.0
    ar_weight: float = 1.0
    mdm_weight: float = 1.0
    infill_weight: float = 0.0
    slot_certainty: float = 0.0
    learning_rate: float = 2e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    bf16: bool = False
    seed: int = 0
    plain_prompt: bool = False
    template_options: dict[str, Any] = field(default_factory=dict)

    @property
    def extras(self) -> dict[str, bool]:
        """What ``sequence`` feeds beside what the paper does."""
        return {"infill": self.infill_weight > 0, "certainty": self.slot_certainty > 0}

    def __post_init__(self) -> None:
        weights = ("ar_weight", "mdm_weight", "infill_weight", "slot_certainty")
        checks = {name: (getattr(self, name) >= 0, "a number of at least 0") for name in weights}
        checks |= {
            "objective": (self.objective in OBJECTIVES, " or ".join(OBJECTIVES)),
            "schedule": (self.schedule in SCHEDULES, ", ".join(SCHEDULES)),
            "epochs": (self.epochs > 0, "a number above 0"),
            "steps": (self.steps is None or self.steps > 0, "an integer above 0"),
            "batch_size": (self.batch_size > 0, "an integer above 0"),
            "slot_sizes": (self.slot_sizes and min(self.slot_sizes) > 0, "integers above 0"),
            "block_share": (0 <= self.block_share <= 1, "a number in [0, 1]"),
            "learning_rate": (self.learning_rate > 0, "a number above 0"),
            "adam_beta2": (0 <= self.adam_beta2 < 1, "a number in [0, 1)"),
            "seed": (0 <= self.seed < 2**63, "an integer in [0, 2**63)"),
        }
        if self.objective == "autoregressive":  # it has no masks
            masking = ("slot_sizes", "block_share", "mdm_weight", "infill_weight")
            for name in (*masking, "slot_certainty"):
                is_default = getattr(self, name) == getattr(Recipe, name)
                checks[name] = (is_default, "no value with --objective autoregressive")
        for name, (holds, allowed) in checks.items():
            if not holds:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: allowed is {allowed}"
                )


@dataclass(frozen=True)
class Execution:
    """How the run is carried out; it may go on with other values."""

    micro_batch_size: int = 8
    gradient_checkpointing: bool = False
    compile: bool = False
    workers: int = 0
    log_every: int = 10
    save_every: int = 500
    dev: tuple[Path, ...] = ()
    eval_every: int = 500
    dev_decoded: int = 20
    dev_params: DecodingParams = DecodingParams()
    max_tokens: int = 512
    progress: bool = True


def train(
    recipe: Recipe, execution: Execution, data: list[Path], run: Path, resume: bool = False
) -> bool:
    """Trains in the folder ``run``; False if it was interrupted and can be resumed.

    Raises:
        ValueError: settings, data or folder do not fit; says what.
    """
    tokenizer, config = _load_source(recipe)
    mask = config.mask_token_id if recipe.objective == "refusion" else None
    encoder = Encoder(tokenizer, mask, recipe.template_options, recipe.plain_prompt)
    args = _arguments(recipe, execution, run)
    with args.main_process_first(local=False, desc="tokenising"):
        if args.process_index == 0:  # the others may find what this one has begun
            _check_folder(run, resume)
            _write_data(encoder, data, run / "data", recipe.max_length, execution.progress)
            _check_settings(recipe, TokenStore(run / "data").fingerprint, run)
            _set_damaged_aside(run)
    store = TokenStore(run / "data")
    steps = recipe.steps or math.ceil(recipe.epochs * len(store) / recipe.batch_size)
    args.max_steps = steps
    if args.process_index == 0:
        amount = f"{steps} steps of {recipe.batch_size} examples on {args.world_size} devices"
        print(amount, file=sys.stderr)
    course = Course(
        store,
        steps * recipe.batch_size,
        recipe.seed,
        recipe.slot_sizes,
        mask,
        recipe.batch_size,
        store.lengths,
        recipe.block_share,
        **recipe.extras,
    )
    interruption = SaveWhenInterrupted()
    trainer = ReFusionTrainer(
        model=_load_model(recipe, config),
        args=args,
        train_dataset=course,
        processing_class=tokenizer,
        pad_token_id=tokenizer.pad_token_id or 0,
        examples=len(store),
        loss_weights=(recipe.ar_weight, recipe.mdm_weight, recipe.infill_weight),
        compiled=execution.compile,
        slot_certainty=recipe.slot_certainty,
        dev=_dev(recipe, execution, encoder, mask, run) if execution.dev else None,
        callbacks=[LogFiles(run), Checkpoints(run), interruption],
    )
    last = latest_checkpoint(run)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if interruption.interrupted and trainer.state.global_step < steps:
        return False
    _save(trainer, recipe, run)
    return True


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
    if recipe.objective == "refusion" and getattr(config, "mask_token_id", None) is None:
        raise ValueError(
            f"{recipe.model} has no mask_token_id: make a ReFusion checkpoint of it first, with "
            "vllm-refusion convert"
        )
    return tokenizer, config


def _load_model(recipe: Recipe, config: Any) -> Any:
    # float32 even under bf16: steps of 2e-5 would be lost in the rounding of bfloat16 weights
    options = {"dtype": torch.float32, "attn_implementation": CAUSAL}
    if recipe.from_scratch:
        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(config, **options)
        with suppress(OSError):  # decoding defaults are kept, where there are any
            model.generation_config = GenerationConfig.from_pretrained(recipe.model)
        return model
    return AutoModelForCausalLM.from_pretrained(recipe.model, **options)


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
    encoder: Encoder, data: list[Path], folder: Path, max_length: int, progress: bool
) -> None:
    def bar(rows: Any) -> Any:
        return tqdm(rows, desc="tokenising", unit=" rows", disable=not progress)

    key = encoder.key(data, max_length) if all(path.is_file() for path in data) else None
    known = stored(folder, key) if key else None
    report = known or write_store(read_rows(data), encoder, folder, max_length, bar, key)
    print(report, file=sys.stderr)


def _check_folder(run: Path, resume: bool) -> None:
    if run.exists() and any(run.iterdir()) and not resume:
        raise ValueError(f"{run} is not empty: go on with --resume, or name another folder")
    if (run / "model").exists():
        raise ValueError(f"{run}/model exists: the run is complete")


def _check_settings(recipe: Recipe, fingerprint: str, run: Path) -> None:
    """Writes the run's settings, or compares them with those it was started with."""
    settings = json.loads(json.dumps({**asdict(recipe), "data": fingerprint}))
    path = run / "settings.json"
    if path.exists():
        before = read_json(path, "restore it, or start a run in another folder")
        if not isinstance(before, dict):
            raise ValueError(f"{path}: not settings: restore it, or start a run in another folder")
        changed = {n: (before.get(n), v) for n, v in settings.items() if before.get(n) != v}
        if changed:
            listed = ", ".join(f"{n} was {a!r}, now {b!r}" for n, (a, b) in changed.items())
            raise ValueError(f"{run} cannot go on with other settings: {listed}")
    write_text(path, json.dumps(settings, indent=2) + "\n")


def _dev(
    recipe: Recipe, execution: Execution, encoder: Encoder, mask: int | None, run: Path
) -> Dev:
    problems = []
    rows = list(read_rows(execution.dev))
    for number, (row, example) in enumerate(zip(rows, encoder.encode(rows), strict=True)):
        if mask is None:
            fed = autoregressive(example)
        else:
            chance = generator(recipe.seed, DEV_KEY + number)
            drawn = draw(len(example.response), recipe.slot_sizes, chance)
            fed = sequence(example, drawn, mask, **recipe.extras)
        problems.append(Problem(row.values, list(example.prompt), fed))
    if not problems:
        raise ValueError("the dev files hold no rows")
    params = execution.dev_params if mask is not None else None
    return Dev(problems, params, execution.dev_decoded, execution.max_tokens, run / "samples.jsonl")


def _save(trainer: ReFusionTrainer, recipe: Recipe, run: Path) -> None:
    part = run / "model.part"
    if recipe.bf16 and not trainer.is_fsdp_enabled:
        trainer.model.to(torch.bfloat16)
    trainer.save_model(str(part))
    if trainer.is_world_process_zero():
        (part / "training_args.bin").unlink(missing_ok=True)
        publish(part, run / "model")
