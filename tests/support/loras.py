"""Random LoRA adapters, as PEFT writes them, and checkpoints with one merged into their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 8
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def write_lora(folder: Path, base: Path, seed: int, layers: tuple[str, ...] = LAYERS) -> Path:
    """One of the linear layers called ``layers``, far from zero."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.split(".")[-1] in layers:
            outs, ins = weight.shape
            a = torch.randn(RANK, ins, generator=draw) * ins**-0.5
            b = torch.randn(outs, RANK, generator=draw) * 0.5 * weight.std()
            tensors[f"base_model.model.{layer}.lora_A.weight"] = a
            tensors[f"base_model.model.{layer}.lora_B.weight"] = b
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(layers),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge(folder: Path, base: Path, lora: Path) -> Path:
    """The model of ``base`` with the weights that ``lora`` makes of its, in ``folder``."""
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    tensors = load_file(lora / "adapter_model.safetensors")
    for name in weights:
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if key + "A.weight" in tensors:
            product = tensors[key + "B.weight"] @ tensors[key + "A.weight"]
            weights[name] += ALPHA / RANK * product
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
