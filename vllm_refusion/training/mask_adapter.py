"""A frozen backbone, low-rank adapters on the rows of masks, and the mask's embedding."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from vllm_refusion.adapters import CONFIG, LINEARS, MASK_EMBEDDING, OURS, PREFIX, TENSORS, VERSION
from vllm_refusion.files import write_text
from vllm_refusion.training.chains import CHAINS, Cutting, chain_loss, divergences, masks_after
from vllm_refusion.training.loss import CHUNK_LOGITS, cross_entropies

ALPHA = 2  # lora_alpha / rank


class MaskAdapterModel(torch.nn.Module):
    """``model(batch=..., counts=...)`` gives the loss [1] of a batch of ``collate_chains``.

    Its state is what is trained, in float32: the adapters' factors and ``mask_embedding``. The
    modules around the backbone's tensors exist twice: as they are, and with adapters.
    """

    _keys_to_ignore_on_save = None  # transformers' Trainer asks for it

    def __init__(
        self,
        backbone: Any,
        cutting: Cutting,
        rank: int,
        layers: list[int] | None = None,
        modules: Sequence[str] = tuple(LINEARS),
        divergence: bool = False,
        compiled: bool = False,
        chunk_rows: int | None = None,
    ) -> None:
        """The factors are drawn from torch's generator.

        Args:
            layers: numbers of those that are adapted; None: all.
            modules: names of the linear layers that are adapted, of LINEARS.
            divergence: the loss is the divergence from the backbone, not cross-entropy.
            compiled: as for ``loss.attach``.
        """
        super().__init__()
        backbone.requires_grad_(False)
        backbone.set_attn_implementation(CHAINS)
        self.backbone: Any = backbone
        self.config, self.cutting = backbone.config, cutting
        self.lora = LoraConfig(
            r=rank,
            lora_alpha=ALPHA * rank,
            target_modules=list(modules),
            layers_to_transform=layers,
            task_type="CAUSAL_LM",
        )
        shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
        self.adapted = copy.deepcopy(backbone.base_model, shared)
        # PEFT finds numbers of layers only where a name stands before "layers".
        inject_adapter_in_model(self.lora, torch.nn.ModuleDict({"model": self.adapted}))
        for module in self.adapted.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False  # autocast casts what needs it
        mean = backbone.get_input_embeddings().weight.float().mean(0)
        self.mask_embedding = torch.nn.Parameter(mean)
        for parameter in self.trained().values():
            parameter.data = parameter.data.float()
        self.register_state_dict_post_hook(_only_what_is_trained)
        self.register_load_state_dict_post_hook(_nothing_frozen_is_missing)

        self._divergence = divergence
        self._chunk_rows = chunk_rows or max(1, CHUNK_LOGITS // backbone.config.vocab_size)
        self._losses: Any = divergences if divergence else cross_entropies
        self._feeds = (backbone.base_model, self.adapted)
        if compiled:
            from accelerate.utils import compile_regions

            self._losses = torch.compile(self._losses, dynamic=True)
            self._feeds = tuple(compile_regions(base, dynamic=True) for base in self._feeds)

    def forward(
        self, batch: Mapping[str, torch.Tensor], counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss or, without ``counts``, what each mask picks, int64 [B, C * K]."""
        clean, masks = self.hidden(batch)
        head: Any = self.backbone.get_output_embeddings()
        if counts is None:
            parts = masks.flatten(0, 1).split(self._chunk_rows)
            return torch.cat([head(part).argmax(1) for part in parts]).view(masks.shape[:2])
        teacher = clean if self._divergence else None
        return chain_loss(masks, head, batch, counts, self._chunk_rows, self._losses, teacher)

    def hidden(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of clean rows and of masks, see ``masks_after``."""
        return masks_after(*self._feeds, self.mask_embedding, batch, self.cutting.length)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.adapted.gradient_checkpointing_enable(**options)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def _factors(self) -> dict[str, torch.nn.Parameter]:
        """The adapters' factors under the names of ``adapter_tensors``."""
        end = ".default.weight"  # "default" is PEFT's name of the only adapter
        named = self.adapted.named_parameters()
        return {name.removesuffix(end): p for name, p in named if name.endswith(end)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes the values of ``adapter_tensors``, of an adapter of this shape."""
        for name, parameter in {MASK_EMBEDDING: self.mask_embedding, **self._factors()}.items():
            parameter.copy_(tensors[name])

    def backbone_digest(self) -> str:
        """SHA-256, in hexadecimal, of all that the backbone holds."""
        digest = hashlib.sha256()
        for name, tensor in self.backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: Path, base: str, base_fingerprint: str, dtype: torch.dtype) -> None:
        """Writes the adapter as PEFT does, and what ``adapters`` adds to it, to a new folder."""
        folder.mkdir()
        tensors: dict[str, torch.Tensor] = {MASK_EMBEDDING: self.mask_embedding}
        for name, parameter in self._factors().items():
            tensors[f"{PREFIX}{name}.weight"] = parameter
        tensors = {name: t.detach().cpu().to(dtype).contiguous() for name, t in tensors.items()}
        save_file(tensors, folder / TENSORS, {"format": "pt"})
        self.lora.base_model_name_or_path, self.lora.inference_mode = base, True
        self.lora.save_pretrained(str(folder))
        about = json.loads((folder / CONFIG).read_text())
        kept = self.lora.target_modules or ()
        about["target_modules"] = [name for name in LINEARS if name in kept]  # of a set
        about[OURS] = {
            "version": VERSION,
            "base_fingerprint": base_fingerprint,
            "chain_length": self.cutting.length,
            "skips_known": self.cutting.skips_known,
        }
        write_text(folder / CONFIG, json.dumps(about, indent=2) + "\n")


def _only_what_is_trained(
    model: Any, state: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    kept = {prefix + name for name in model.trained()}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def _nothing_frozen_is_missing(model: Any, incompatible: Any) -> None:
    trained = model.trained()
    incompatible.missing_keys[:] = [n for n in incompatible.missing_keys if n in trained]
