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
# entries of a KV page, or a divisor of them, with which canvas_attention is fastest on Hopper
HOPPER_PAGE = 64


@dataclass(frozen=True)
class Operations:
    """The operations of one decoding step; see each one's docstring for shapes."""

    canvas_attention: Callable[..., None]
    write_kv: Callable[..., None]
    token_stats: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    layout: Callable[..., None]
    transition: Callable[..., None]
    allocate: Callable[..., None]
    replay_stats: Callable[..., None]


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
        from vllm_refusion.triton_kernels import allocation_reference as allocation
        from vllm_refusion.triton_kernels import attention_reference as attention
        from vllm_refusion.triton_kernels import layout_reference, replay_reference
        from vllm_refusion.triton_kernels import stats_reference as stats
        from vllm_refusion.triton_kernels import transition_reference as transitions

        return Operations(
            canvas_attention=attention.canvas_attention_reference,
            write_kv=attention.write_kv_reference,
            token_stats=stats.token_stats_reference,
            layout=layout_reference.layout_reference,
            transition=transitions.transition_reference,
            allocate=allocation.allocate_reference,
            replay_stats=replay_reference.replay_stats_reference,
        )
    from vllm_refusion.triton_kernels import (
        allocation,
        canvas_attention,
        layout,
        replay,
        token_stats,
        transition,
        write_kv,
    )

    return Operations(
        canvas_attention=canvas_attention.canvas_attention,
        write_kv=write_kv.write_kv,
        token_stats=token_stats.token_stats,
        layout=layout.layout,
        transition=transition.transition,
        allocate=allocation.allocate,
        replay_stats=replay.replay_stats,
    )
