"""Qwen3 dense shapes, for engines with dummy weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_refusion.backbones import head_shape
from vllm_refusion.files import read_json, write_text

if TYPE_CHECKING:
    import torch

MASK_TOKEN_ID = 151670  # of the published checkpoint

# hidden, intermediate, layers, heads, KV heads, tied embeddings
_SHAPES = {
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, False),
    "qwen3-14b": (5120, 17408, 40, 40, 8, False),
    "qwen3-32b": (5120, 25600, 64, 64, 8, False),
}
SHAPES = tuple(_SHAPES)


def shape_config(name: str) -> dict[str, Any]:
    """config.json of a shape, with a mask token; ``name``: one of SHAPES or a config.json.

    Raises:
        ValueError: neither of the two, or a file without a mask token.
    """
    if name in _SHAPES:
        hidden, intermediate, layers, heads, kv_heads, tied = _SHAPES[name]
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "tie_word_embeddings": tied,
            "vocab_size": 151936,
            "mask_token_id": MASK_TOKEN_ID,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
            "use_cache": True,
            "torch_dtype": "bfloat16",
        }
    if not Path(name).is_file():
        raise ValueError(f"--shape {name}: known are {', '.join(SHAPES)}, or a config.json.")
    config = read_json(Path(name))
    if not isinstance(config, dict) or config.get("mask_token_id") is None:
        raise ValueError(f"--shape {name}: the file has no mask_token_id.")
    return config


def matrix_parameters(config: Any) -> int:
    """Parameters of a dense decoder that a row is multiplied with: input embeddings left out.

    Args:
        config: a Hugging Face config of Qwen3, Qwen2 or Llama.
    """
    heads, kv_heads, head_dim = head_shape(config)
    attention = 2 * config.hidden_size * (heads + kv_heads) * head_dim
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def write_checkpoints(name: str, folder: Path) -> dict[str, Path]:
    """Folders of a stock and a ReFusion checkpoint of the same shape, without weights."""
    config = shape_config(name)
    stock = {key: value for key, value in config.items() if key != "mask_token_id"}
    folders = {}
    for side, content in (("stock", stock), ("refusion", config)):
        folders[side] = folder / f"{Path(name).stem}-{side}"
        folders[side].mkdir(parents=True, exist_ok=True)
        write_text(folders[side] / "config.json", json.dumps(content, indent=1))
    return folders


def write_random_adapter(
    config: Mapping[str, Any],
    base: str | Path,
    folder: Path,
    rank: int,
    *,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    size: float = 0.5,
    seed: int = 0,
    base_fingerprint: str = "0" * 64,
    chain_length: int = 16,
    skips_known: bool = True,
) -> Path:
    """A mask adapter of ``base``, whose config.json holds ``config``, in the new ``folder``.

    Args:
        targets: linear layers that it adapts; None: all. layers: their numbers; None: all.
        dtype: of its tensors; None: float32.
        size: how far it is from zero.
        base_fingerprint: the default is of no model: where weights are dummies, none is checked.
    """
    import torch
    from safetensors.torch import save_file

    from vllm_refusion import adapters

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    sizes = {"q_proj": (hidden, queries), "o_proj": (queries, hidden), "down_proj": (inner, hidden)}
    sizes |= dict.fromkeys(("k_proj", "v_proj"), (hidden, keys))
    sizes |= dict.fromkeys(("gate_proj", "up_proj"), (hidden, inner))
    targets = list(targets or adapters.LINEARS)
    chance = torch.Generator().manual_seed(seed)
    tensors = {adapters.MASK_EMBEDDING: torch.randn(hidden, generator=chance) * size}
    for layer in range(config["num_hidden_layers"]) if layers is None else layers:
        for linear in targets:
            columns, out = sizes[linear]
            name = f"{adapters.PREFIX}layers.{layer}.{adapters.LINEARS[linear]}.{linear}"
            for factor, shape in {"A": (rank, columns), "B": (out, rank)}.items():
                values = torch.randn(shape, generator=chance) * size / shape[1] ** 0.5
                tensors[f"{name}.lora_{factor}.weight"] = values
    folder.mkdir(parents=True)
    cast = {name: tensor.to(dtype or torch.float32) for name, tensor in tensors.items()}
    save_file(cast, folder / adapters.TENSORS)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "layers_to_transform": layers,
        adapters.OURS: {
            "version": adapters.VERSION,
            "base_fingerprint": base_fingerprint,
            "chain_length": chain_length,
            "skips_known": skips_known,
        },
    }
    write_text(folder / adapters.CONFIG, json.dumps(about, indent=1))
    return folder
