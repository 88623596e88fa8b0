"""What is particular to training a whole model: ReFusion's objective, or next tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from vllm_refusion.training.collator import (
    Example,
    Sequenced,
    autoregressive,
    collate,
    draw,
    sequence,
)
from vllm_refusion.training.data import Encoder, TokenStore
from vllm_refusion.training.loss import CAUSAL, attach, label_counts
from vllm_refusion.training.order import Course, generator
from vllm_refusion.training.recipe import Execution, Recipe
from vllm_refusion.training.trainer import Losses, ReFusionTrainer


class HybridTask:
    """See ``run.train``, which asks it."""

    outcome = "model"
    trainer = ReFusionTrainer

    def __init__(self, recipe: Recipe, execution: Execution, config: Any) -> None:
        """Raises ValueError if the model has no mask token that the objective needs."""
        self._recipe, self._execution, self._config = recipe, execution, config
        self.mask_token_id: int | None = None
        self.settings: dict[str, Any] = {}
        if recipe.objective == "refusion":
            self.mask_token_id = getattr(config, "mask_token_id", None)
            if self.mask_token_id is None:
                raise ValueError(
                    f"{recipe.model} has no mask_token_id: make a ReFusion checkpoint of it first, "
                    "with vllm-refusion convert"
                )

    def texts(
        self, encoder: Encoder, paths: Sequence[Path], folder: Path
    ) -> tuple[Encoder, Sequence[Path]]:
        """The data as they are."""
        return encoder, paths

    def course(self, store: TokenStore, steps: int) -> Course:
        recipe = self._recipe
        return Course(
            store,
            steps * recipe.batch_size,
            recipe.seed,
            recipe.slot_sizes,
            self.mask_token_id,
            recipe.batch_size,
            store.lengths,
            recipe.block_share,
            ordered_share=recipe.ordered_share,
            **recipe.extras,
        )

    def dev_row(self, example: Example, number: int) -> Sequenced:
        if self.mask_token_id is None:
            return autoregressive(example)
        recipe = self._recipe
        drawn = draw(len(example.response), recipe.slot_sizes, generator(recipe.seed, number))
        return sequence(example, drawn, self.mask_token_id, **recipe.extras)

    def losses(self, pad_token_id: int) -> Losses:
        recipe = self._recipe
        weights = {"loss_ar": recipe.ar_weight, "loss_mdm": recipe.mdm_weight}
        weights |= {"loss_infill": recipe.infill_weight}
        logged = tuple(weights)[: 3 if recipe.infill_weight else 2]
        return Losses(
            lambda rows: collate(rows, pad_token_id), label_counts, tuple(weights.values()), logged
        )

    def model(self) -> Any:
        """Its generation config says whether joined slots are trained: ``slot_start``."""
        model = self._load()
        if self._recipe.objective == "refusion":
            vars(model.generation_config).pop("slot_start", None)
            if self._recipe.joined_slots:
                model.generation_config.slot_start = "next"
        attach(
            model,
            compiled=self._execution.compile,
            slot_certainty=self._recipe.slot_certainty,
        )
        return model

    def _load(self) -> Any:
        recipe = self._recipe
        # float32 even under bf16: steps of 2e-5 would be lost in the rounding of bfloat16 weights
        options = {"dtype": torch.float32, "attn_implementation": CAUSAL}
        if recipe.from_scratch:
            torch.manual_seed(recipe.seed)
            model = AutoModelForCausalLM.from_config(self._config, **options)
            with suppress(OSError):  # decoding defaults are kept, where there are any
                model.generation_config = GenerationConfig.from_pretrained(recipe.model)
            return model
        return AutoModelForCausalLM.from_pretrained(recipe.model, **options)

    def save(self, trainer: ReFusionTrainer, part: Path) -> None:
        """Writes the outcome to the new folder ``part``; every process calls it."""
        if self._recipe.bf16 and not trainer.is_fsdp_enabled:
            trainer.model.to(torch.bfloat16)
        trainer.save_model(str(part))
        if trainer.is_world_process_zero():
            (part / "training_args.bin").unlink(missing_ok=True)
