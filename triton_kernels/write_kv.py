"""The write of new keys and values into the paged KV cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_refusion.triton_kernels.checks import check_entries


@triton.jit
def _in_units_of(values, scale, LARGEST: tl.constexpr):
    """fp32, held within what FP8 can say: the conversion itself may not do so."""
    return tl.clamp(tl.div_rn(values.to(tl.float32), scale), -LARGEST, LARGEST)


@triton.jit(do_not_specialize=["num_rows"])
def _write_kv_kernel(
    key_ptr, value_ptr, kv_ptr, slot_mapping_ptr,
    k_scale_ptr, v_scale_ptr,  # fp32 [1]; None without FP8
    num_rows,
    key_stride_row, key_stride_head, value_stride_row, value_stride_head,
    kv_stride_block, kv_stride_head, kv_stride_entry,
    PAGE: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One program per (BLOCK_ROWS rows, KV head)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, HEAD_PADDED)
    slot = tl.load(slot_mapping_ptr + row, mask=row < num_rows, other=-1)
    mask = (slot >= 0)[:, None] & (dims[None, :] < HEAD_SIZE)
    key = tl.load(
        key_ptr + (row * key_stride_row + head * key_stride_head)[:, None] + dims[None, :],
        mask=mask,
    )
    value = tl.load(
        value_ptr + (row * value_stride_row + head * value_stride_head)[:, None] + dims[None, :],
        mask=mask,
    )
    if LARGEST > 0:
        key = _in_units_of(key, tl.load(k_scale_ptr), LARGEST).to(kv_ptr.dtype.element_ty)
        value = _in_units_of(value, tl.load(v_scale_ptr), LARGEST).to(kv_ptr.dtype.element_ty)
    entry = slot // PAGE * kv_stride_block + head * kv_stride_head + slot % PAGE * kv_stride_entry
    k_ptr = kv_ptr + entry[:, None] + dims[None, :]
    tl.store(k_ptr, key, mask=mask)
    tl.store(k_ptr + HEAD_SIZE, value, mask=mask)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Stores each row's key and value in the entry ``slot_mapping`` names.

    Args:
        key, value: [N, Hkv, D], last dim contiguous.
        kv_cache: [blocks, Hkv, page, 2 * D], last dim contiguous; of their dtype or of FP8.
        slot_mapping: [N] int64, block * page + offset; -1 skips the row.
        k_scale, v_scale: [] or [1] fp32, what the entries of an FP8 cache are in units of.
    """
    num_rows, num_heads, head_size = key.shape
    page = kv_cache.shape[2]
    assert value.shape == key.shape, (value.shape, key.shape)
    assert kv_cache.shape[1] == num_heads, (kv_cache.shape, num_heads)
    assert kv_cache.shape[3] == 2 * head_size, (kv_cache.shape, head_size)
    assert key.dtype == value.dtype, (key.dtype, value.dtype)
    check_entries(kv_cache, key.dtype, k_scale, v_scale)
    assert slot_mapping.shape == (num_rows,), (slot_mapping.shape, num_rows)
    assert slot_mapping.dtype == torch.int64, slot_mapping.dtype
    for tensor in (key, value, kv_cache, slot_mapping):
        assert tensor.stride(-1) == 1, (tensor.shape, tensor.stride())
        assert tensor.device == key.device, (tensor.device, key.device)
    if num_rows == 0:
        return

    block_rows = 8 if key.is_cuda else min(triton.next_power_of_2(num_rows), 1024)
    _write_kv_kernel[(triton.cdiv(num_rows, block_rows), num_heads)](
        key, value, kv_cache, slot_mapping, k_scale, v_scale, num_rows,
        *key.stride()[:2], *value.stride()[:2], *kv_cache.stride()[:3],
        PAGE=page, HEAD_SIZE=head_size, HEAD_PADDED=triton.next_power_of_2(head_size),
        BLOCK_ROWS=block_rows,
        LARGEST=0.0 if k_scale is None else torch.finfo(kv_cache.dtype).max, num_warps=4,
    )  # fmt: skip
