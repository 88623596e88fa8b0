"""Mask adapters on disk: folder, tensors, and the fingerprint that tells their base from another.

The folder is PEFT's for LoRA with two additions: ``refusion_mask_adapter`` in adapter_config.json,
``mask_embedding`` among the tensors. Read by training and serving; needs neither PEFT nor vLLM.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from vllm_refusion.backbones import head_shape
from vllm_refusion.files import read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OURS, VERSION = "refusion_mask_adapter", 1
PREFIX, MASK_EMBEDDING = "base_model.model.model.", "mask_embedding"
LINEARS = {  # of a layer, with the module that PEFT's names put before it
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
# What else PEFT's LoRA can do, and what it says where it does not.
PLAIN = {
    "alpha_pattern": {},
    "bias": "none",
    "fan_in_fan_out": False,
    "layers_pattern": None,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}
SAMPLED = 8  # rows of a tensor that a fingerprint reads, and values of each


@dataclass(frozen=True)
class MaskAdapter:
    """What adapter_config.json says.

    Attributes:
        base: folder or name on the hub; see ``find_base``.
        scale: lora_alpha / rank; a mask's row gets lora_B(lora_A(x)) * scale on top.
        chain_length: masks behind the last clean token that it was trained for.
        skips_known: the first mask stands one position behind the token that is known next.
        target_modules: names of linear layers, in the order of ``LINEARS``.
        layers: numbers of the layers that are adapted; None: all.
    """

    folder: Path
    base: str
    base_fingerprint: str
    rank: int
    scale: float
    chain_length: int
    skips_known: bool
    target_modules: tuple[str, ...]
    layers: tuple[int, ...] | None


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder has the configuration of a mask adapter, be it whole or broken."""
    try:
        config = read_json(Path(folder) / CONFIG)
    except ValueError:
        return False
    return isinstance(config, dict) and OURS in config


def read_adapter(folder: str | Path) -> MaskAdapter:
    """Reads adapter_config.json.

    Raises:
        ValueError: it is broken, asks for what is not supported, or is no mask adapter's.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(ours := config.get(OURS), dict):
        raise ValueError(f"{path}: no object {OURS}: not a mask adapter of vllm-refusion")
    values: dict[str, Any] = {**config, **{f"{OURS}.{key}": value for key, value in ours.items()}}

    def get(key: str, kind: Any, holds: Any = bool, allowed: str = "") -> Any:
        value = values.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{path}: {key} {value!r}: allowed is {allowed}")
        if not holds(value):
            raise ValueError(f"{path}: {key} {value!r}: allowed is {allowed}")
        return value

    get(f"{OURS}.version", int, VERSION.__eq__, f"{VERSION}, the version that this package reads")
    get("peft_type", str, "LORA".__eq__, "'LORA'")
    for key, plain in PLAIN.items():
        if config.get(key) not in (plain, None) and config[key]:
            raise ValueError(f"{path}: {key} {config[key]!r}: allowed is {plain!r}")
    rank = get("r", int, lambda r: r > 0, "an integer above 0")
    alpha = get("lora_alpha", (int, float), lambda a: 0 < a < math.inf, "a finite number above 0")
    targets = get(
        "target_modules",
        list,
        lambda names: names and all(isinstance(n, str) and n in LINEARS for n in names),
        f"a list of {', '.join(LINEARS)}",
    )
    layers = values.get("layers_to_transform")
    if layers is not None:
        layers = get(
            "layers_to_transform",
            list,
            lambda numbers: numbers and all(type(n) is int and n >= 0 for n in numbers),
            "null or a list of layer numbers",
        )
    return MaskAdapter(
        folder=Path(folder),
        base=get("base_model_name_or_path", str, bool, "a folder or a name on the hub"),
        base_fingerprint=get(
            f"{OURS}.base_fingerprint", str, lambda text: len(text) == 64, "64 hexadecimal digits"
        ),
        rank=rank,
        scale=alpha / rank,
        chain_length=get(f"{OURS}.chain_length", int, lambda k: k > 0, "an integer above 0"),
        skips_known=get(f"{OURS}.skips_known", bool, lambda _: True, "true or false"),
        target_modules=tuple(name for name in LINEARS if name in targets),
        layers=None if layers is None else tuple(sorted(set(layers))),
    )


def adapter_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """``mask_embedding`` [hidden] and, of each adapted linear layer, two factors, on the CPU.

    These are called ``layers.0.self_attn.q_proj.lora_A`` [rank, in] and ``....lora_B`` [out, rank].

    Raises:
        ValueError: the file is broken, or its tensors are not what the configuration says.
    """
    adapter, path = read_adapter(folder), Path(folder) / TENSORS
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            for key in list(file.keys()):
                tensors[key.removeprefix(PREFIX).removesuffix(".weight")] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    _check_tensors(adapter, tensors, path)
    return tensors


def _check_tensors(adapter: MaskAdapter, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """All that should be there, nothing else, of shapes that fit each other, and finite."""
    layers: Sequence[int] | None = adapter.layers
    if layers is None:
        numbers = [name.split(".")[1] for name in tensors if name.startswith("layers.")]
        layers = range(1 + max((int(n) for n in numbers if n.isdecimal()), default=0))
    names = {MASK_EMBEDDING}
    names |= {
        f"layers.{layer}.{LINEARS[linear]}.{linear}.lora_{factor}"
        for layer in layers
        for linear in adapter.target_modules
        for factor in "AB"
    }
    for name in sorted(names ^ tensors.keys()):
        problem = "is missing" if name in names else f"is none that {CONFIG} speaks of"
        raise ValueError(f"{path}: {name} {problem}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name}: allowed are finite floating-point values")
    sizes: dict[str, int] = {"rank": adapter.rank}
    for name in sorted(names, key=lambda name: (name != MASK_EMBEDDING, name)):
        shape, wanted = tuple(tensors[name].shape), _dimensions(name)
        known = tuple(sizes.get(d, n) for d, n in zip(wanted, shape, strict=False))
        if len(shape) != len(wanted) or known != shape:
            said = ", ".join(f"{d} {sizes[d]}" if d in sizes else d for d in wanted)
            raise ValueError(f"{path}: {name} has the shape {list(shape)}, not [{said}]")
        sizes |= dict(zip(wanted, shape, strict=True))


def _dimensions(name: str) -> tuple[str, ...]:
    """What a tensor's dimensions are; those of one name have one size."""
    if name == MASK_EMBEDDING:
        return ("hidden",)
    linear, factor = name.split(".")[-2:]
    inner = {"q": "queries", "o": "queries", "k": "keys", "v": "keys"}
    own = inner.get(linear[0], "intermediate")
    to_hidden = linear in ("o_proj", "down_proj")
    if factor == "lora_A":
        return ("rank", own if to_hidden else "hidden")
    return ("hidden" if to_hidden else own, "rank")


def find_base(adapter: MaskAdapter, beside: Sequence[Path] | None = None) -> str:
    """The folder of the base where there is one, else its name on the hub.

    A relative folder is looked for in ``beside``: by default the adapter's folder and its parent.
    So is the last part of an absolute one that is not there, since both may be moved together.

    Raises:
        ValueError: the base is no folder that exists, and its name none that a hub can have.
    """
    folders = [adapter.folder, adapter.folder.parent] if beside is None else beside
    base = Path(adapter.base)
    places = [base] if base.is_absolute() else []
    places += [folder / (base.name if base.is_absolute() else base) for folder in folders]
    for place in places:
        if (place / "config.json").is_file():
            return str(place)
    if base.is_absolute() or adapter.base.startswith(".") or len(base.parts) > 2:
        searched = ", ".join(map(str, places))
        raise ValueError(
            f"{adapter.folder / CONFIG}: base_model_name_or_path {adapter.base!r}: no model in "
            f"{searched}"
        )
    return adapter.base


def check_base(adapter: MaskAdapter, base_folder: str | Path) -> None:
    """Raises ValueError if ``base_folder`` is not the model that ``adapter`` was trained on."""
    found = fingerprint(base_folder)
    if found != adapter.base_fingerprint:
        raise ValueError(
            f"{adapter.folder} is an adapter of another model than {base_folder}: its base, "
            f"{adapter.base}, has the fingerprint {adapter.base_fingerprint[:12]}, that one "
            f"{found[:12]}"
        )


def fingerprint(base_folder: str | Path) -> str:
    """SHA-256, in hexadecimal, of what makes a model: of its configuration, and a weight sample.

    ``SAMPLED`` evenly spaced values of as many evenly spaced rows of each tensor, as float32: a
    model saved again has the same, however it is sharded and in any dtype that holds its values.

    Raises:
        ValueError: the folder holds no model with safetensors; names what is missing.
    """
    folder = Path(base_folder)
    read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    digest = hashlib.sha256(json.dumps(_shaping(config), sort_keys=True).encode())
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    places = {name: path for path in _weight_files(folder) for name in _names(path)}
    for name in sorted(places.keys() - tied):
        with safe_open(places[name], "pt") as file:
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
            rows = [tensor[row : row + 1] for row in _spaced(shape[0])] if shape else [tensor[:]]
        values = torch.stack([row.flatten()[_spaced(row.numel())] for row in rows]).float()
        digest.update(json.dumps([name, shape, values.tolist()]).encode())
    return digest.hexdigest()


def _shaping(config: Any) -> dict[str, Any]:
    """The values of a configuration that decide what a model of these weights computes."""
    heads, kv_heads, head_dim = head_shape(config)
    rope = dict(config.rope_parameters)
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    return {
        "model_type": config.model_type,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "eps": config.rms_norm_eps,
        "activation": config.hidden_act,
        "tied": config.tie_word_embeddings,
        "rope": rope,
        "windows": [config.layer_types, config.sliding_window] if layers else None,
    }


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{index}: no list of weight files") from None


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def _spaced(count: int) -> list[int]:
    """Up to ``SAMPLED`` of the numbers below ``count``, the first and the last among them."""
    kept = min(count, SAMPLED)
    return [i * (count - 1) // max(1, kept - 1) for i in range(kept)]
