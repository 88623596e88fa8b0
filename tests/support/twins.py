"""Comparing kernels that update a ``DecodeState`` with their twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from device import DEVICE
from fuzzed_states import tensors

from vllm_refusion.decoding.state import DecodeState


def same(twin: Callable[..., None], kernel: Callable[..., None]) -> Callable[..., None]:
    """``twin``, with an assertion that ``kernel`` does the same to a copy of everything."""

    def both(state: DecodeState, *args: Any) -> None:
        copied = copy_state(state, DEVICE)
        copies = [
            arg.to(DEVICE, copy=True) if isinstance(arg, torch.Tensor) else arg for arg in args
        ]
        kernel(copied, *copies)
        twin(state, *args)
        for name, tensor in tensors(state).items():
            assert_same(name, getattr(copied, name), tensor)
        for index, (got, expected) in enumerate(zip(copies, args, strict=True)):
            if isinstance(expected, torch.Tensor):
                assert_same(f"argument {index}", got, expected)

    return both


def copy_state(state: DecodeState, device: str) -> DecodeState:
    copied = DecodeState(
        state.max_requests, state.canvas_length, state.max_response, state.mask_token_id, device
    )
    for name, tensor in tensors(state).items():
        getattr(copied, name).copy_(tensor)
    return copied


def assert_same(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    got = got.cpu()
    if got.is_floating_point():  # an input; NaN where it must not be read
        got, expected = got.view(torch.int32), expected.view(torch.int32)
    where = got != expected
    assert not where.any(), (
        f"{name} differs at {where.nonzero().tolist()[:9]}: "
        f"{got[where].tolist()[:9]}, expected {expected[where].tolist()[:9]}"
    )
