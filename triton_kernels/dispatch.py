"""Which implementation of each operation runs on a device.

On a GPU the Triton kernels run. On a CPU a Triton kernel would run in Triton's interpreter, whose
cost is per program and operation: the PyTorch twins are faster there and are the default.
``VLLM_REFUSION_CPU_KERNELS=interpreter`` runs the kernels instead, so that a machine without a GPU
can test them end to end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

CPU_KERNELS_ENV = "VLLM_REFUSION_CPU_KERNELS"


@dataclass(frozen=True)
class Operations:
    """The operations of one decoding step; see each one's docstring for shapes."""

    canvas_attention: Callable[..., None]
    write_kv: Callable[..., None]
    apply_penalties: Callable[..., None]
    token_stats: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    layout: Callable[..., None]
    transition: Callable[..., None]
    serial_transition: Callable[..., None]
    give_drafts: Callable[..., None]
    forbid: Callable[..., None]
    allocate: Callable[..., None]
    acceptance_stats: Callable[..., None]
    replayed_rows: Callable[..., None]
    find_masks: Callable[..., None]
    embed_masks: Callable[..., None]
    shrink_masks: Callable[..., None]
    expand_masks: Callable[..., None]


def operations(device: torch.device) -> Operations:
    """The operations to use for tensors on ``device``.

    Raises:
        ValueError: VLLM_REFUSION_CPU_KERNELS is neither ``twin`` nor ``interpreter``.
    """
    choice = os.environ.get(CPU_KERNELS_ENV, "twin")
    if choice not in ("twin", "interpreter"):
        raise ValueError(f"{CPU_KERNELS_ENV}={choice!r}: allowed are 'twin' and 'interpreter'.")
    return _load(twins=device.type == "cpu" and choice == "twin")


@cache
def _load(twins: bool) -> Operations:
    if twins:
        from vllm_refusion.triton_kernels import (
            acceptance_twin,
            allocation_twin,
            canvas_attention_twin,
            grammar_twin,
            layout_twin,
            mask_lora_twin,
            penalties_twin,
            serial_twin,
            token_stats_twin,
            transition_twin,
        )

        return Operations(
            canvas_attention=canvas_attention_twin.canvas_attention_twin,
            write_kv=canvas_attention_twin.write_kv_twin,
            apply_penalties=penalties_twin.apply_penalties_twin,
            token_stats=token_stats_twin.token_stats_twin,
            layout=layout_twin.layout_twin,
            transition=transition_twin.transition_twin,
            serial_transition=serial_twin.serial_transition_twin,
            give_drafts=serial_twin.give_drafts_twin,
            forbid=grammar_twin.forbid_twin,
            allocate=allocation_twin.allocate_twin,
            acceptance_stats=acceptance_twin.acceptance_stats_twin,
            replayed_rows=acceptance_twin.replayed_rows_twin,
            find_masks=mask_lora_twin.find_masks_twin,
            embed_masks=mask_lora_twin.embed_masks_twin,
            shrink_masks=mask_lora_twin.shrink_masks_twin,
            expand_masks=mask_lora_twin.expand_masks_twin,
        )
    from vllm_refusion.triton_kernels import (
        acceptance,
        allocation,
        canvas_attention,
        grammar,
        layout,
        mask_lora,
        penalties,
        serial,
        token_stats,
        transition,
        write_kv,
    )

    return Operations(
        canvas_attention=canvas_attention.canvas_attention,
        write_kv=write_kv.write_kv,
        apply_penalties=penalties.apply_penalties,
        token_stats=token_stats.token_stats,
        layout=layout.layout,
        transition=transition.transition,
        serial_transition=serial.serial_transition,
        give_drafts=serial.give_drafts,
        forbid=grammar.forbid,
        allocate=allocation.allocate,
        acceptance_stats=acceptance.acceptance_stats,
        replayed_rows=acceptance.replayed_rows,
        find_masks=mask_lora.find_masks,
        embed_masks=mask_lora.embed_masks,
        shrink_masks=mask_lora.shrink_masks,
        expand_masks=mask_lora.expand_masks,
    )
