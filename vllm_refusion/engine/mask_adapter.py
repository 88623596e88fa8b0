"""A mask adapter inside a stock backbone: low-rank products on the rows of masks, in place.

Every adapted linear layer keeps its weights and its way to multiply by them (quantised ones too);
what it gives for rows of masks is added to before a row-parallel layer sums it over its ranks. No
other row is touched, so the backbone computes what it computed before. Of the two products the
first, of the layer's input, is started before the layer's own.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_refusion.adapters import (
    LINEARS,
    MASK_EMBEDDING,
    TENSORS,
    MaskAdapter,
    adapter_tensors,
)
from vllm_refusion.triton_kernels.dispatch import operations
from vllm_refusion.triton_kernels.mask_lora_twin import LEAST_RANK, allocate_parts

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM's layers, with the linear layers of a checkpoint whose outputs each stacks
STACKED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}


class MaskRows:
    """The rows of a step that feed a mask, where captured graphs read them.

    Attributes:
        rows: [most rows] int32, ascending. count: [1] int32, how many of them hold.
    """

    def __init__(self, most_rows: int, device: torch.device) -> None:
        self.rows = torch.zeros(most_rows, dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)

    def spread(self, rows: int) -> None:
        """Of so many rows all but every eighth are ones."""
        numbers = torch.arange(rows, dtype=torch.int32, device=self.rows.device)
        masks = numbers[numbers % 8 > 0]
        self.rows[: len(masks)] = masks
        self.count.fill_(len(masks))

    def share_with(self, module: nn.Module) -> None:
        module.register_buffer("mask_rows", self.rows, persistent=False)
        module.register_buffer("mask_count", self.count, persistent=False)


class _OnMaskRows(LinearMethodBase):
    """A linear layer's method, and then the adapter of its rows of masks.

    Args:
        blocks: see ``expand_masks_twin``.
    """

    def __init__(self, base: Any, scale: float, blocks: list[int]) -> None:
        self.base = base
        self.scale = scale
        self.blocks = blocks

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        self.base.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.base.process_weights_after_loading(layer)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        masks = layer.mask_rows, layer.mask_count
        parts = allocate_parts(x, layer.mask_lora_a)
        torch.ops.refusion.shrink_masks(parts, x, layer.mask_lora_a, *masks)
        y = self.base.apply(layer, x, bias)
        torch.ops.refusion.expand_masks(
            y, parts, layer.mask_lora_b, *masks, self.scale, self.blocks
        )
        return y


def apply_adapter(
    model: nn.Module, adapter: MaskAdapter, vllm_config: VllmConfig, device: torch.device
) -> MaskRows:
    """Puts ``adapter`` on a causal LM whose weights are loaded and processed, on ``device``.

    Raises:
        ValueError: its tensors do not fit the model; names one.
    """
    backbone = model.model
    like = {"device": device, "dtype": vllm_config.model_config.dtype}
    tensors = adapter_tensors(adapter.folder)
    masks = MaskRows(vllm_config.scheduler_config.max_num_batched_tokens, device)
    embedding = tensors.pop(MASK_EMBEDDING).to(**like)
    _check(adapter, MASK_EMBEDDING, embedding, (vllm_config.model_config.get_hidden_size(),))
    backbone.embed_tokens.register_buffer("mask_embedding", embedding, persistent=False)
    masks.share_with(backbone.embed_tokens)
    backbone.embed_tokens.register_forward_hook(_embed)
    for number, layer in enumerate(backbone.layers):
        for name, stacked in STACKED.items():
            pairs = []
            for index, linear in enumerate(stacked):
                key = f"layers.{number}.{LINEARS[linear]}.{linear}.lora_"
                if key + "A" in tensors:
                    pairs.append((index, tensors.pop(key + "A"), tensors.pop(key + "B")))
            if pairs:
                module = layer.get_submodule(name)
                module = getattr(module, "base_layer", module)  # inside one of LoRA
                masks.share_with(module)
                _adapt(adapter, f"layers.{number}.{name}", module, pairs, like)
    if tensors:
        raise ValueError(
            f"{adapter.folder / TENSORS}: {min(tensors)} is of no layer of the model, which has "
            f"{len(backbone.layers)}."
        )
    return masks


def _adapt(
    adapter: MaskAdapter,
    name: str,
    layer: ColumnParallelLinear | RowParallelLinear,
    pairs: list[tuple[int, torch.Tensor, torch.Tensor]],
    like: dict[str, Any],
) -> None:
    """Gives ``layer`` this rank's part of (index among the stacked, A [r, in], B [out, r])."""
    rank = max(LEAST_RANK, 1 << math.ceil(math.log2(adapter.rank)))
    by_columns = isinstance(layer, RowParallelLinear)
    widths = [layer.output_size] if by_columns else layer.output_partition_sizes
    parts_a, parts_b, blocks = [], [], []
    for index, a, b in pairs:
        part, parts = _part(layer, index)
        outs = layer.output_size if by_columns else widths[index] * parts
        _check(adapter, f"{name}: lora_A", a, (adapter.rank, layer.input_size))
        _check(adapter, f"{name}: lora_B", b, (outs, adapter.rank))
        if by_columns:
            a = a.chunk(parts, dim=1)[part]
        else:
            b = b.chunk(parts)[part]
        parts_a.append(nn.functional.pad(a, (0, 0, 0, rank - adapter.rank)))
        parts_b.append(nn.functional.pad(b, (0, rank - adapter.rank)))
        blocks += [sum(widths[:index]), widths[index]]
    layer.register_buffer("mask_lora_a", torch.stack(parts_a).to(**like), persistent=False)
    layer.register_buffer("mask_lora_b", torch.cat(parts_b).to(**like), persistent=False)
    layer.quant_method = _OnMaskRows(layer.quant_method, adapter.scale, blocks)


def _part(layer: ColumnParallelLinear | RowParallelLinear, index: int) -> tuple[int, int]:
    """Which of how many parts this rank has; KV heads may be on several ranks."""
    replicas = 1
    if isinstance(layer, QKVParallelLinear) and index > 0:
        replicas = layer.num_kv_head_replicas
    return layer.tp_rank // replicas, layer.tp_size // replicas


def _check(adapter: MaskAdapter, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{adapter.folder / TENSORS}: {name} has the shape {list(tensor.shape)}, but the model "
            f"needs {list(shape)}."
        )


def _embed(module: nn.Module, arguments: Any, embedded: torch.Tensor) -> None:
    """A forward hook: rows of masks, which were looked up as another token, get the mask's."""
    torch.ops.refusion.embed_masks(
        embedded, module.mask_embedding, module.mask_rows, module.mask_count
    )


@cache
def _no_masks(device: torch.device) -> torch.Tensor:
    """Kept: kernels on another stream may read it later."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def _masks_of_step(count: torch.Tensor) -> torch.Tensor | None:
    """``count``, or None where no row is a mask and no graph is captured.

    A pass without metadata is a made-up one: what is listed are masks of another step.
    """
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return _no_masks(count.device)
    return count if next(iter(metadata.values())).feeds_masks else None


def _shrink_masks(
    parts: torch.Tensor, x: torch.Tensor, a: torch.Tensor, rows: torch.Tensor, count: torch.Tensor
) -> None:
    masks = _masks_of_step(count)
    if masks is not None:
        operations(x.device).shrink_masks(parts, x, a, rows, masks)


def _expand_masks(
    y: torch.Tensor,
    parts: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    scale: float,
    blocks: list[int],
) -> None:
    masks = _masks_of_step(count)
    if masks is not None:
        operations(y.device).expand_masks(y, parts, b, rows, masks, scale, blocks)


def _embed_masks(
    y: torch.Tensor, embedding: torch.Tensor, rows: torch.Tensor, count: torch.Tensor
) -> None:
    masks = _masks_of_step(count)
    if masks is not None:
        operations(y.device).embed_masks(y, embedding, rows, masks)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a compiler sees of an operation that returns nothing."""


_LIBRARY = torch.library.Library("refusion", "FRAGMENT")
for _function, _changed in (
    (_shrink_masks, "parts"),
    (_expand_masks, "y"),
    (_embed_masks, "y"),
):
    direct_register_custom_op(
        _function.__name__.removeprefix("_"),
        _function,
        mutates_args=[_changed],
        fake_impl=_nothing,
        target_lib=_LIBRARY,
    )
