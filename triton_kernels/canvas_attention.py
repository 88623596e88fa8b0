"""Attention of canvas and prompt tokens over a paged KV cache, and the write into that cache.

    output[l] = sum_j p[j] V[j],  p = softmax over the visible j of  scale * query[l] . K[j]
    j is visible  iff  j < context_end  or  run_start <= j < run_end  or  own_start <= j <= s

for row l of a request with ``query_len`` rows, whose own KV index is s = seq_len - query_len + l.
A row that sees nothing gives zeros. The folder's README derives the tiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634
_MAX_SPLITS = 16


@triton.jit
def _request_of_tile(query_start_loc_ptr, num_requests, tile, BLOCK_Q: tl.constexpr):
    """The last request r whose first tile, query_start_loc[r] // BLOCK_Q + r, is <= ``tile``."""
    low = 0
    high = num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # "ieee" only concerns fp32, where the default would be TF32
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _attend_range(
    acc,  # [BLOCK_M, HEAD_PADDED] fp32, not yet divided by total
    total,  # [BLOCK_M] fp32, sum of exp2(score - peak)
    peak,  # [BLOCK_M] fp32, largest score so far, in units of log2
    query,  # [BLOCK_M, HEAD_PADDED]
    first, last, kv_ptr, table_ptr,
    context_end, run_start, run_end, own_start, own_end,  # [BLOCK_M] int32
    scale_log2, kv_stride_block, kv_stride_entry,
    PAGE: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the KV entries [first, last).

    Without MASKED these must be whole tiles that every row sees.
    """
    dims = tl.arange(0, HEAD_PADDED)
    for start in range(first, last, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        if MASKED:
            exists = index < last
            sees = (
                (index[None, :] < context_end[:, None])
                | ((index[None, :] >= run_start[:, None]) & (index[None, :] < run_end[:, None]))
                | ((index[None, :] >= own_start[:, None]) & (index[None, :] < own_end[:, None]))
            )
            # an entry that no row sees may hold NaN from a freed page, and 0 * NaN is NaN
            seen = tl.max(sees.to(tl.int32), axis=0) > 0

        if PAGE % BLOCK_N == 0:
            block = tl.load(table_ptr + start // PAGE)
        elif MASKED:
            block = tl.load(table_ptr + index // PAGE, mask=exists, other=0)
        else:
            block = tl.load(table_ptr + index // PAGE)
        entry = block.to(tl.int64) * kv_stride_block + (index % PAGE).to(tl.int64) * kv_stride_entry
        k_ptr = kv_ptr + entry[:, None] + dims[None, :]

        if MASKED:
            in_head = dims[None, :] < HEAD_SIZE
            k = tl.load(k_ptr, mask=exists[:, None] & in_head, other=0.0)
            v = tl.load(k_ptr + HEAD_SIZE, mask=seen[:, None] & in_head, other=0.0)
        elif HEAD_PADDED > HEAD_SIZE:
            in_head = tl.broadcast_to(dims[None, :] < HEAD_SIZE, (BLOCK_N, HEAD_PADDED))
            k = tl.load(k_ptr, mask=in_head, other=0.0)
            v = tl.load(k_ptr + HEAD_SIZE, mask=in_head, other=0.0)
        else:
            k = tl.load(k_ptr)
            v = tl.load(k_ptr + HEAD_SIZE)

        score = _dot(query, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), UPCAST)
        score *= scale_log2
        if MASKED:
            score = tl.where(sees, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        # a row that has seen nothing yet keeps -inf, and -inf - -inf is NaN
        if MASKED:
            finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            finite_peak = new_peak
        weight = tl.exp2(score - finite_peak[:, None])
        decay = tl.exp2(peak - finite_peak)
        total = total * decay + tl.sum(weight, axis=1)
        acc = _dot(weight.to(v.dtype), v, acc * decay[:, None], UPCAST)
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["num_requests"])
def _canvas_attention_kernel(
    query_ptr, kv_ptr, output_ptr,
    block_table_ptr, query_start_loc_ptr, seq_lens_ptr, visibility_ptr,
    # fp32 [N, Hq, NUM_SPLITS, HEAD_SIZE] and twice [N, Hq, NUM_SPLITS]; None without splits
    partial_acc_ptr, partial_total_ptr, partial_peak_ptr,
    scale_log2, num_requests,
    query_stride_row, query_stride_head, kv_stride_block, kv_stride_head, kv_stride_entry,
    output_stride_row, output_stride_head, table_stride, visibility_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, PAGE: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per (tile of BLOCK_Q query rows x GROUP_PADDED query heads, KV head, split)."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP_PADDED
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)

    request = _request_of_tile(query_start_loc_ptr, num_requests, tile, BLOCK_Q)
    query_start = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - query_start
    first_row = (tile - (query_start // BLOCK_Q + request)) * BLOCK_Q
    if first_row >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + request)

    lane = tl.arange(0, BLOCK_M)
    row = first_row + lane // GROUP_PADDED
    is_row = row < query_len
    token = (query_start + row).to(tl.int64)

    # [BLOCK_M] int32 each: what is empty ends at 0, nothing ends past seq_len
    view_ptr = visibility_ptr + token * visibility_stride
    context_end = tl.minimum(tl.load(view_ptr, mask=is_row, other=0), seq_len)
    run_start = tl.load(view_ptr + 1, mask=is_row, other=0)
    run_end = tl.minimum(tl.load(view_ptr + 2, mask=is_row, other=0), seq_len)
    own_start = tl.load(view_ptr + 3, mask=is_row, other=0)
    own = seq_len - query_len + row
    run_end = tl.where(run_start < run_end, run_end, 0)
    own_end = tl.where(is_row & (own_start <= own), own + 1, 0)
    kv_end = tl.max(tl.maximum(context_end, tl.maximum(run_end, own_end)), axis=0)

    # how far each row sees from entry 0 without a gap: up to the shortest no mask is needed
    unbroken = tl.maximum(context_end, 0)
    unbroken = tl.where(run_start <= unbroken, tl.maximum(unbroken, run_end), unbroken)
    unbroken = tl.where(own_start <= unbroken, tl.maximum(unbroken, own_end), unbroken)
    mask_from = tl.min(tl.where(is_row, unbroken, kv_end), axis=0) // BLOCK_N * BLOCK_N

    if NUM_SPLITS == 1:
        split_start = 0
        split_end = kv_end
    else:
        split = tl.program_id(2)
        length = tl.cdiv(tl.cdiv(kv_end, BLOCK_N), NUM_SPLITS) * BLOCK_N
        split_start = split * length
        split_end = tl.minimum(split_start + length, kv_end)

    group_head = lane % GROUP_PADDED
    is_head_row = is_row & (group_head < GROUP)
    head = kv_head * GROUP + group_head
    dims = tl.arange(0, HEAD_PADDED)
    in_tile = is_head_row[:, None] & (dims[None, :] < HEAD_SIZE)
    query = tl.load(
        query_ptr + (token * query_stride_row + head * query_stride_head)[:, None] + dims[None, :],
        mask=in_tile,
        other=0.0,
    )

    acc = tl.zeros((BLOCK_M, HEAD_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    kv_head_ptr = kv_ptr + kv_head * kv_stride_head
    table_ptr = block_table_ptr + request.to(tl.int64) * table_stride
    # fmt: off
    acc, total, peak = _attend_range(
        acc, total, peak, query, split_start, tl.minimum(split_end, mask_from),
        kv_head_ptr, table_ptr, context_end, run_start, run_end, own_start, own_end,
        scale_log2, kv_stride_block, kv_stride_entry,
        PAGE, HEAD_SIZE, HEAD_PADDED, BLOCK_M, BLOCK_N, UPCAST, MASKED=False)
    acc, total, peak = _attend_range(
        acc, total, peak, query, tl.maximum(split_start, mask_from), split_end,
        kv_head_ptr, table_ptr, context_end, run_start, run_end, own_start, own_end,
        scale_log2, kv_stride_block, kv_stride_entry,
        PAGE, HEAD_SIZE, HEAD_PADDED, BLOCK_M, BLOCK_N, UPCAST, MASKED=True)
    # fmt: on

    if NUM_SPLITS == 1:
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            output_ptr
            + (token * output_stride_row + head * output_stride_head)[:, None]
            + dims[None, :],
            result.to(output_ptr.dtype.element_ty),
            mask=in_tile,
        )
    else:
        slot = (token * HEADS + head) * NUM_SPLITS + split
        tl.store(partial_total_ptr + slot, total, mask=is_head_row)
        tl.store(partial_peak_ptr + slot, peak, mask=is_head_row)
        # what an empty split would have stored is never read
        tl.store(
            partial_acc_ptr + (slot * HEAD_SIZE)[:, None] + dims[None, :],
            acc,
            mask=in_tile & (total > 0)[:, None],
        )


@triton.jit(do_not_specialize=["num_requests"])
def _combine_splits_kernel(
    partial_acc_ptr, partial_total_ptr, partial_peak_ptr, output_ptr, query_start_loc_ptr,
    num_requests, output_stride_row, output_stride_head,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """output = sum_i w_i acc_i / sum_i w_i total_i  with  w_i = exp2(peak_i - max_i peak_i).

    One program per (row, query head); i counts the splits, and w_i = 0 for one that saw nothing.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if token >= tl.load(query_start_loc_ptr + num_requests):
        return
    slot = (token * HEADS + head) * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    dims = tl.arange(0, HEAD_PADDED)
    total = tl.load(partial_total_ptr + slot)
    peak = tl.load(partial_peak_ptr + slot)
    top = tl.max(peak, axis=0)
    weight = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
    acc = tl.load(
        partial_acc_ptr + (slot * HEAD_SIZE)[:, None] + dims[None, :],
        mask=(total > 0)[:, None] & (dims[None, :] < HEAD_SIZE),
        other=0.0,
    )
    denominator = tl.sum(weight * total, axis=0)
    result = tl.sum(weight[:, None] * acc, axis=0) / tl.where(denominator > 0, denominator, 1.0)
    tl.store(
        output_ptr + token * output_stride_row + head.to(tl.int64) * output_stride_head + dims,
        result.to(output_ptr.dtype.element_ty),
        mask=dims < HEAD_SIZE,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _write_kv_kernel(
    key_ptr, value_ptr, kv_ptr, slot_mapping_ptr, num_rows,
    key_stride_row, key_stride_head, value_stride_row, value_stride_head,
    kv_stride_block, kv_stride_head, kv_stride_entry,
    PAGE: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
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
    entry = slot // PAGE * kv_stride_block + head * kv_stride_head + slot % PAGE * kv_stride_entry
    k_ptr = kv_ptr + entry[:, None] + dims[None, :]
    tl.store(k_ptr, key, mask=mask)
    tl.store(k_ptr + HEAD_SIZE, value, mask=mask)


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; any choice gives the same answer up to rounding.

    Attributes:
        block_m: rows of a query tile (query rows x query heads of a KV head), a power of two >= 16.
        block_n: KV entries of a loop step, a power of two >= 16.
        num_splits: parts of the KV range, a power of two; above 1 a second kernel combines them.
        num_warps, num_stages: Triton's launch options.
    """

    block_m: int
    block_n: int
    num_splits: int = 1
    num_warps: int = 4
    num_stages: int = 2


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_tiling(
    num_rows: int,
    num_requests: int,
    num_kv_heads: int,
    group: int,
    head_size: int,
    dtype: torch.dtype,
    max_length: int,
    processors: int,
    interpreted: bool = False,
) -> Tiling:
    """The tiling for a launch, from shapes alone (a captured graph replays it for other values).

    Args:
        num_rows, num_requests, num_kv_heads, head_size, dtype: the shape of the call.
        group: query heads per KV head.
        max_length: the most KV entries that a row of the block table can hold.
        processors: multiprocessors of the device.
        interpreted: Triton's interpreter runs the kernel: a program costs more than its arithmetic.
    """
    group_padded = triton.next_power_of_2(group)
    head_padded = max(16, triton.next_power_of_2(head_size))
    rows_per_request = -(-num_rows // max(num_requests, 1))
    wanted_m = triton.next_power_of_2(rows_per_request * group_padded)
    if interpreted:
        return Tiling(max(16, group_padded, min(wanted_m, 512)), block_n=128)

    def programs(block_m: int) -> int:
        return max(num_requests, -(-num_rows * group_padded // block_m)) * num_kv_heads

    if dtype == torch.float32:
        # no tensor cores: both operands of a dot live in registers, and larger tiles spill
        block_m, block_n, num_warps, num_stages = 32, 16, 8, 1
    elif head_padded > 128:
        block_m, block_n, num_warps, num_stages = 64, 32, 8, 2
    elif programs(128) >= 2 * processors:
        # more rows halve the reads of K and V, once they still fill the device twice over
        block_m, block_n, num_warps, num_stages = 128, 64, 8, 3
    else:
        block_m, block_n, num_warps, num_stages = 64, 64, 4, 3
    if wanted_m < block_m:
        block_m, num_warps = wanted_m, 4
    block_m = max(16, group_padded, block_m)

    # splits only fill idle processors, and each keeps some steps of its own
    room = min(processors // programs(block_m), max_length // (4 * block_n), _MAX_SPLITS)
    return Tiling(block_m, block_n, 1 << max(room, 1).bit_length() - 1, num_warps, num_stages)


def canvas_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    visibility: torch.Tensor,
    scale: float,
    *,
    tiling: Tiling | None = None,
) -> None:
    """Writes the attention of every row below query_start_loc[-1] to ``output``; other rows stay.

    Args:
        query: [N, Hq, D] fp32, bf16 or fp16, last dim contiguous.
        kv_cache: [blocks, Hkv, page, 2 * D], K in [..., :D], V in [..., D:], last dim contiguous.
        output: [N, Hq, D].
        block_table: [R, max_pages] int32; a row's pages must cover what the request's rows see.
        query_start_loc: [R + 1] int32, non-decreasing from 0; a request may have no row.
        seq_lens: [R] int32, KV entries of each request, those of this pass included.
        visibility: [N, 4] int32 (context_end, run_start, run_end, own_start), absolute KV indices.
        scale: factor of the dot products.
        tiling: how to cut the work; by default what ``choose_tiling`` says.
    """
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, page = kv_cache.shape[1:3]
    num_requests, max_pages = block_table.shape
    assert query.dtype in (torch.float32, torch.bfloat16, torch.float16), query.dtype
    assert kv_cache.dtype == query.dtype, (kv_cache.dtype, query.dtype)
    assert output.dtype == query.dtype, (output.dtype, query.dtype)
    assert output.shape == query.shape, (output.shape, query.shape)
    assert kv_cache.shape[3] == 2 * head_size, (kv_cache.shape, head_size)
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    assert query_start_loc.shape == (num_requests + 1,), (query_start_loc.shape, num_requests)
    assert seq_lens.shape == (num_requests,), (seq_lens.shape, num_requests)
    assert visibility.shape == (num_rows, 4), (visibility.shape, num_rows)
    for tensor in (query, kv_cache, output, block_table, query_start_loc, seq_lens, visibility):
        assert tensor.stride(-1) == 1, (tensor.shape, tensor.stride())
        assert tensor.device == query.device, (tensor.device, query.device)
    for tensor in (block_table, query_start_loc, seq_lens, visibility):
        assert tensor.dtype == torch.int32, tensor.dtype
    if num_rows == 0 or num_requests == 0:
        return

    group = num_heads // num_kv_heads
    device = query.device
    tiling = tiling or choose_tiling(
        num_rows, num_requests, num_kv_heads, group, head_size, query.dtype,
        max_pages * page, _processors(device), interpreted=device.type == "cpu",
    )  # fmt: skip
    group_padded = triton.next_power_of_2(group)
    assert tiling.block_m % group_padded == 0, (tiling, group)
    block_q = tiling.block_m // group_padded
    head_padded = max(16, triton.next_power_of_2(head_size))
    partial_acc = partial_total = partial_peak = None
    if tiling.num_splits > 1:
        shape = (num_rows, num_heads, tiling.num_splits)
        partial_acc = torch.empty(*shape, head_size, dtype=torch.float32, device=device)
        partial_total = torch.empty(shape, dtype=torch.float32, device=device)
        partial_peak = torch.empty(shape, dtype=torch.float32, device=device)

    # every request may leave one tile partly filled, hence the + num_requests
    grid = (num_rows // block_q + num_requests, num_kv_heads, tiling.num_splits)
    _canvas_attention_kernel[grid](
        query, kv_cache, output, block_table, query_start_loc, seq_lens, visibility,
        partial_acc, partial_total, partial_peak, scale * _LOG2_E, num_requests,
        *query.stride()[:2], *kv_cache.stride()[:3], *output.stride()[:2],
        block_table.stride(0), visibility.stride(0),
        HEADS=num_heads, GROUP=group, GROUP_PADDED=group_padded, PAGE=page,
        HEAD_SIZE=head_size, HEAD_PADDED=head_padded,
        BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, NUM_SPLITS=tiling.num_splits,
        # the interpreter's dot takes the bits of a bf16 for an integer
        UPCAST=device.type == "cpu" and query.dtype == torch.bfloat16,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    if tiling.num_splits > 1:
        _combine_splits_kernel[(num_rows, num_heads)](
            partial_acc, partial_total, partial_peak, output, query_start_loc, num_requests,
            *output.stride()[:2],
            HEADS=num_heads, HEAD_SIZE=head_size, HEAD_PADDED=head_padded,
            NUM_SPLITS=tiling.num_splits, num_warps=1,
        )  # fmt: skip


def write_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Stores each row's key and value in the entry ``slot_mapping`` names.

    Args:
        key, value: [N, Hkv, D], last dim contiguous.
        kv_cache: [blocks, Hkv, page, 2 * D], last dim contiguous.
        slot_mapping: [N] int64, block * page + offset; -1 skips the row.
    """
    num_rows, num_heads, head_size = key.shape
    page = kv_cache.shape[2]
    assert value.shape == key.shape, (value.shape, key.shape)
    assert kv_cache.shape[1] == num_heads, (kv_cache.shape, num_heads)
    assert kv_cache.shape[3] == 2 * head_size, (kv_cache.shape, head_size)
    assert key.dtype == value.dtype == kv_cache.dtype, (key.dtype, value.dtype, kv_cache.dtype)
    assert slot_mapping.shape == (num_rows,), (slot_mapping.shape, num_rows)
    assert slot_mapping.dtype == torch.int64, slot_mapping.dtype
    for tensor in (key, value, kv_cache, slot_mapping):
        assert tensor.stride(-1) == 1, (tensor.shape, tensor.stride())
        assert tensor.device == key.device, (tensor.device, key.device)
    if num_rows == 0:
        return

    block_rows = min(triton.next_power_of_2(num_rows), 1024 if key.device.type == "cpu" else 8)
    _write_kv_kernel[(triton.cdiv(num_rows, block_rows), num_heads)](
        key, value, kv_cache, slot_mapping, num_rows,
        *key.stride()[:2], *value.stride()[:2], *kv_cache.stride()[:3],
        PAGE=page, HEAD_SIZE=head_size, HEAD_PADDED=triton.next_power_of_2(head_size),
        BLOCK_ROWS=block_rows, num_warps=4,
    )  # fmt: skip
