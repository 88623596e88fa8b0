"""What launchers assert of their tensors: kernels take shapes, types and strides for granted."""

from __future__ import annotations

import torch

from vllm_refusion.decoding.state import DecodeState


def check_starts(starts: torch.Tensor, requests: int) -> None:
    """Asserts that this is an [R+1] or longer int32 tensor; that of a padded batch is longer."""
    assert len(starts) > requests and starts.dtype == torch.int32 and starts.is_contiguous()


def check(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Asserts shape and dtype of a contiguous tensor."""
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous(), (
        f"expected a contiguous {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}"
    )


def check_pass(
    state: DecodeState,
    idx_mapping: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    lengths: tuple[torch.Tensor, torch.Tensor],
    picked: torch.Tensor,
    probabilities: tuple[torch.Tensor, ...],
    sampled: torch.Tensor,
    numbers: tuple[torch.Tensor, ...],
) -> None:
    """Asserts what both transitions take: see ``transition_twin`` for what each tensor is.

    Args:
        starts: of query rows and of rows with statistics. lengths: by request index.
        probabilities: by row, as ``picked``. numbers: by request of the batch.
    """
    requests = len(idx_mapping)
    assert idx_mapping.is_contiguous()
    for start in starts:
        check_starts(start, requests)
    for length in lengths:
        check(length, (state.max_requests,), torch.int32)
    check(picked, picked.shape, torch.int32)
    for probability in probabilities:
        check(probability, picked.shape, torch.float32)
    for number in numbers:
        check(number, (requests,), torch.int32)
    check(sampled, (requests, state.canvas_length), torch.int32)
