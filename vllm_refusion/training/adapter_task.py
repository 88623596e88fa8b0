"""What is particular to training a mask adapter: its data, its model, and the folder it makes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

from vllm_refusion.adapters import fingerprint
from vllm_refusion.training.chains import (
    Chained,
    Cutting,
    collate_chains,
    cut,
    label_count,
    leading_hits,
)
from vllm_refusion.training.collator import Example
from vllm_refusion.training.convert import check_backbone
from vllm_refusion.training.data import Encoder, TokenStore
from vllm_refusion.training.mask_adapter import MaskAdapterModel
from vllm_refusion.training.order import Course, generator
from vllm_refusion.training.own_text import OwnText, write_own_text
from vllm_refusion.training.recipe import AdapterRecipe, Execution, Recipe
from vllm_refusion.training.trainer import Dev, Losses, ReFusionTrainer

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # of a base on the hub


class AdapterTask:
    """See ``run.train``, which asks it."""

    outcome = "adapter"
    mask_token_id = None  # the mask is no token of the backbone

    def __init__(
        self, recipe: Recipe, adapter: AdapterRecipe, execution: Execution, config: Any
    ) -> None:
        """Raises ValueError if the base is no backbone whose masks can be adapted."""
        self._recipe, self._adapter, self._execution = recipe, adapter, execution
        check_backbone(recipe.model, config)
        self._layers = adapter.layers(config.num_hidden_layers)
        self._cutting = Cutting(adapter.chains_per_row, adapter.chain_length, adapter.skips_known)
        self._base = Path(recipe.model)
        if not self._base.is_dir():
            self._base = Path(snapshot_download(recipe.model, allow_patterns=FILES))
        self.settings = {"base": fingerprint(self._base)}

    def texts(
        self, encoder: Encoder, paths: Sequence[Path], folder: Path
    ) -> tuple[Encoder, Sequence[Path]]:
        """The data as they are or, on policy, what the backbone writes, kept in ``folder``."""
        temperature = self._adapter.on_policy
        if temperature is None:
            return encoder, paths
        asked: dict[str, Any] = {"temperature": temperature, "max_tokens": self._adapter.max_tokens}
        asked |= {"max_length": self._recipe.max_length, "seed": self._recipe.seed}
        asked["dtype"] = "bfloat16" if self._recipe.bf16 else "float32"
        path = write_own_text(self._base, self.settings["base"], encoder, paths, folder, asked)
        return OwnText.of(encoder), [path]

    def course(self, store: TokenStore, steps: int) -> ChainCourse:
        recipe = self._recipe
        count = steps * recipe.batch_size
        return ChainCourse(
            self._cutting, store, count, recipe.seed, (), None, recipe.batch_size, store.lengths
        )

    def dev_row(self, example: Example, number: int) -> Chained:
        return cut(example, self._cutting, generator(self._recipe.seed, number))

    def losses(self, pad_token_id: int) -> Losses:
        collate = partial(collate_chains, cutting=self._cutting, pad_token_id=pad_token_id)
        return Losses(collate, label_count, (1.0,), ("loss_mask",))

    def model(self) -> MaskAdapterModel:
        recipe, adapter = self._recipe, self._adapter
        dtype = torch.bfloat16 if recipe.bf16 else torch.float32
        backbone = AutoModelForCausalLM.from_pretrained(self._base, dtype=dtype)
        torch.manual_seed(recipe.seed)
        return MaskAdapterModel(
            backbone,
            self._cutting,
            adapter.rank,
            self._layers,
            adapter.modules,
            divergence=adapter.labels == "kl",
            compiled=self._execution.compile,
        )

    def trainer(self, **options: Any) -> AdapterTrainer:
        """Raises ValueError under FSDP, which would spread what is frozen with what is not."""
        trainer = AdapterTrainer(**options)
        if trainer.is_fsdp_enabled:
            raise ValueError("--mask-adapter: allowed are one device or DDP, not FSDP")
        return trainer

    def save(self, trainer: Any, part: Path) -> None:
        """Writes the outcome to the new folder ``part``.

        Raises:
            RuntimeError: the backbone is not what it was.
        """
        trainer.check_backbone()
        if not trainer.is_world_process_zero():
            return
        local = Path(self._recipe.model).is_dir()
        base = str(self._base.resolve()) if local else self._recipe.model
        dtype = torch.bfloat16 if self._recipe.bf16 else torch.float32
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.save(part, base, self.settings["base"], dtype)


class ChainCourse(Course):
    """A course whose items are cut."""

    def __init__(self, cutting: Cutting, *course: Any) -> None:
        super().__init__(*course)
        self._cutting = cutting

    def _row(self, number: int, example: Example) -> Chained:
        return cut(example, self._cutting, generator(self._seed, number))


class AdapterTrainer(ReFusionTrainer):
    """Logs ``eval_accepted`` of the dev set: drafts before the first that is not in the text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._backbone = self.model.backbone_digest()

    def check_backbone(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if model.backbone_digest() != self._backbone:
            raise RuntimeError("the backbone has changed while the adapter was trained")

    def _decode(self, model: Any, dev: Dev) -> dict[str, float]:
        rows, size = [p.row for p in dev.problems], self.args.per_device_eval_batch_size
        hits: list[np.ndarray] = []
        cutting = self.accelerator.unwrap_model(model).cutting
        for start in range(0, len(rows), size):
            batch = self._prepare_inputs(self._of.collate(rows[start : start + size]))
            hits.append(leading_hits(model(batch=batch), batch, cutting).cpu().numpy())
        return {"accepted": float(np.concatenate(hits).mean())}
