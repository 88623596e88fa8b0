"""What a grammar refuses is taken out of rows of logits, before anything else reads them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_refusion.triton_kernels.constant import Constant

GPU_TILE = 4096
CPU_TILE = 65536  # the interpreter pays per operation
WORD = Constant(32)


# Chunks of rows may start anywhere: no compilation per alignment.
@triton.jit(do_not_specialize_on_alignment=["logits_ptr", "mask_row_ptr"])
def _forbid_kernel(
    logits_ptr,  # [N, V]
    mask_row_ptr,  # [N] int32
    bitmask_ptr,  # [M, words] int32
    logits_stride,
    bitmask_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    """One program per (row, tile); rows of no grammar end at once."""
    row = tl.program_id(0).to(tl.int64)
    mask_row = tl.load(mask_row_ptr + row).to(tl.int64)
    if mask_row < 0:
        return
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    word = tl.load(bitmask_ptr + mask_row * bitmask_stride + token // WORD, mask=inside, other=-1)
    refused = ((word >> (token % WORD)) & 1) == 0
    tl.store(logits_ptr + row * logits_stride + token, float("-inf"), mask=inside & refused)


def forbid(logits: torch.Tensor, mask_row: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Same arguments and effects as ``forbid_twin``. ``logits`` may have any row stride."""
    rows, vocab = logits.shape
    assert vocab == 1 or logits.stride(1) == 1, "a row of logits must be contiguous"
    assert mask_row.shape == (rows,) and mask_row.dtype == torch.int32 and mask_row.is_contiguous()
    assert bitmask.dtype == torch.int32 and bitmask.stride(1) == 1, bitmask.dtype
    assert bitmask.shape[1] * 32 >= vocab, f"{bitmask.shape[1]} words for {vocab} tokens"
    if rows == 0:
        return
    block = min(GPU_TILE if logits.is_cuda else CPU_TILE, triton.next_power_of_2(vocab))
    _forbid_kernel[(rows, triton.cdiv(vocab, block))](
        logits, mask_row, bitmask, logits.stride(0), bitmask.stride(0), vocab, BLOCK=block
    )
