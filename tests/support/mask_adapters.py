"""Random mask adapters, written by hand as PEFT writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from vllm_refusion.adapters import CONFIG, LINEARS, TENSORS, fingerprint


def write_adapter(
    folder: Path,
    base: Path,
    rank: int = 4,
    targets: tuple[str, ...] = tuple(LINEARS),
    layers: list[int] | None = None,
    chain_length: int = 8,
    skips_known: bool = True,
    size: float = 0.5,
    seed: int = 0,
) -> Path:
    """A random adapter of the model in ``base``, far from zero, in ``folder``."""
    config = AutoConfig.from_pretrained(base)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = head_dim * config.num_key_value_heads
    widths = {"q_proj": (hidden, heads * head_dim), "o_proj": (heads * head_dim, hidden)}
    widths |= {"k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    widths |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
    widths |= {"down_proj": (inner, hidden)}
    chance = torch.Generator().manual_seed(seed)
    tensors = {"mask_embedding": torch.randn(hidden, generator=chance) * size}
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        for linear in targets:
            name = f"base_model.model.model.layers.{layer}.{LINEARS[linear]}.{linear}"
            wide, out = widths[linear]
            for factor, shape in {"A": (rank, wide), "B": (out, rank)}.items():
                values = torch.randn(shape, generator=chance) * size / shape[1] ** 0.5
                tensors[f"{name}.lora_{factor}.weight"] = values
    folder.mkdir(parents=True)
    save_file(tensors, folder / TENSORS)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.relpath(base, folder),
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "layers_to_transform": layers,
        "refusion_mask_adapter": {
            "version": 1,
            "base_fingerprint": fingerprint(base),
            "chain_length": chain_length,
            "skips_known": skips_known,
        },
    }
    (folder / CONFIG).write_text(json.dumps(about))
    return folder
