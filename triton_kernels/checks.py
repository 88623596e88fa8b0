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


def check_rows(tensor: torch.Tensor, rows: int, dtype: torch.dtype) -> None:
    """Asserts a contiguous vector of ``dtype`` with room for so many rows at least."""
    assert tensor.ndim == 1 and tensor.shape[0] >= rows and tensor.dtype == dtype, (
        f"expected a [>= {rows}] {dtype}, got {list(tensor.shape)} {tensor.dtype}"
    )
    assert tensor.is_contiguous(), tensor.stride()


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


FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def check_entries(
    kv_cache: torch.Tensor,
    dtype: torch.dtype,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Asserts that a KV cache is of ``dtype``, or of FP8 with what its entries are in units of."""
    for scale in (k_scale, v_scale):
        assert (scale is None) == (kv_cache.dtype == dtype), (kv_cache.dtype, dtype, scale)
        if scale is not None:
            assert kv_cache.dtype in FP8_DTYPES, kv_cache.dtype
            assert scale.numel() == 1 and scale.dtype == torch.float32, (scale.shape, scale.dtype)
            assert scale.device == kv_cache.device, (scale.device, kv_cache.device)
