"""The backbones that ReFusion models are built on, and what is published."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Stock vLLM architecture of the backbone -> our class. A published checkpoint names the former.
ARCHITECTURES = {
    "Qwen3ForCausalLM": "ReFusionQwen3ForCausalLM",
    "Qwen2ForCausalLM": "ReFusionQwen2ForCausalLM",
    "LlamaForCausalLM": "ReFusionLlamaForCausalLM",
}
# Names without an owner, for checkpoints on the Hugging Face Hub.
SHORT_NAMES = {"refusion-8b": "GSAI-ML/ReFusion"}


def published(name: str) -> str:
    """What the Hugging Face Hub calls the checkpoint of this name; a folder of it goes first."""
    is_short = name in SHORT_NAMES and not os.path.exists(name)
    return SHORT_NAMES[name] if is_short else name


def head_shape(config: Any) -> tuple[int, int, int]:
    """Query heads, KV heads and their size, of a Hugging Face config of a backbone."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def is_refusion(model_config: ModelConfig) -> bool:
    """Whether a model is served by this plugin."""
    return any(name in ARCHITECTURES.values() for name in model_config.architectures)
