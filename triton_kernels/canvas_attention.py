"""Attention of canvas and prompt tokens over a paged KV cache.

    output[l] = sum_j p[j] V[j],  p = softmax over the visible j of  scale * query[l] . K[j]
    j is visible  iff  j < context_end  or  run_start <= j < run_end  or  own_start <= j <= s

for row l of a request with ``query_len`` rows, whose own KV index is s = seq_len - query_len + l.
A row that sees nothing gives zeros. The folder's README derives the tiling.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_refusion.triton_kernels.checks import check_entries
from vllm_refusion.triton_kernels.tiling import (
    HOPPER_PAGE,
    Tiling,
    choose_tiling,
    launches_of_all_kinds,
    requests_padded,
)

_LOG2_E = 1.4426950408889634


@triton.jit
def _work_of_program(
    query_start_loc_ptr, num_requests, work, BLOCK_Q: tl.constexpr, REQUESTS: tl.constexpr
):
    """(split, request, tile of the request) of the ``work``-th program of a KV head; all tiles.

    A request of n rows owns cdiv(n, BLOCK_Q) tiles. First come the first splits of all tiles in the
    order of the requests, then the second splits and so on: splits that turn out to have nothing to
    do, and programs past the last split, then keep no other from starting.
    """
    index = tl.arange(0, REQUESTS)
    exists = index < num_requests
    start = tl.load(query_start_loc_ptr + index, mask=exists, other=0)
    stop = tl.load(query_start_loc_ptr + index + 1, mask=exists, other=0)
    end_tile = tl.cumsum((stop - start + BLOCK_Q - 1) // BLOCK_Q, axis=0)
    all_tiles = tl.maximum(tl.max(end_tile, axis=0), 1)
    tile = work % all_tiles
    before = end_tile <= tile
    request = tl.sum(before.to(tl.int32), axis=0)
    first_tile = tl.max(tl.where(before, end_tile, 0), axis=0)
    return work // all_tiles, request, tile - first_tile, all_tiles


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
    first, last, kv_ptr, kv_desc, kv_head, table_ptr,
    context_end, run_start, run_end, own_start, own_end,  # [BLOCK_M] int32
    scale_log2, kv_stride_block, kv_stride_entry,
    PAGE: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the KV entries [first, last).

    Without MASKED these must be whole tiles that every row sees.
    """
    dims = tl.arange(0, HEAD_PADDED)
    # loaded one step ahead: K and V can then be requested two steps before they are needed
    if PAGE % BLOCK_N == 0:
        next_page = tl.load(table_ptr + first // PAGE, mask=first < last, other=0)
    else:
        index = first + tl.arange(0, BLOCK_N)
        next_page = tl.load(table_ptr + index // PAGE, mask=index < last, other=0)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        index = start + tl.arange(0, BLOCK_N)
        if MASKED:
            sees = (
                (index[None, :] < context_end[:, None])
                | ((index[None, :] >= run_start[:, None]) & (index[None, :] < run_end[:, None]))
                | ((index[None, :] >= own_start[:, None]) & (index[None, :] < own_end[:, None]))
            )
            # an entry that no row sees may hold NaN from a freed page, and 0 * NaN is NaN
            seen = tl.max(sees.to(tl.int32), axis=0) > 0

        page = next_page
        following = start + BLOCK_N
        if PAGE % BLOCK_N == 0:
            next_page = tl.load(table_ptr + following // PAGE, mask=following < last, other=0)
        else:
            following += tl.arange(0, BLOCK_N)
            next_page = tl.load(table_ptr + following // PAGE, mask=following < last, other=0)
        if TMA:
            at = start % PAGE
            k = kv_desc.load([page, kv_head, at, 0]).reshape(BLOCK_N, HEAD_SIZE)
            v = kv_desc.load([page, kv_head, at, HEAD_SIZE]).reshape(BLOCK_N, HEAD_SIZE)
            if MASKED:
                v = tl.where(seen[:, None], v, 0.0)
        else:
            entry = page.to(tl.int64) * kv_stride_block
            entry += (index % PAGE).to(tl.int64) * kv_stride_entry
            k_ptr = kv_ptr + entry[:, None] + dims[None, :]
            in_head = tl.broadcast_to(dims[None, :] < HEAD_SIZE, (BLOCK_N, HEAD_PADDED))
            if MASKED:
                k = tl.load(k_ptr, mask=(index < last)[:, None] & in_head, other=0.0)
                v = tl.load(k_ptr + HEAD_SIZE, mask=seen[:, None] & in_head, other=0.0)
            elif HEAD_PADDED > HEAD_SIZE:
                k = tl.load(k_ptr, mask=in_head, other=0.0)
                v = tl.load(k_ptr + HEAD_SIZE, mask=in_head, other=0.0)
            else:
                k = tl.load(k_ptr)
                v = tl.load(k_ptr + HEAD_SIZE)
        k = k.to(query.dtype)
        v = v.to(query.dtype)

        score = _dot(query, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), UPCAST)
        if MASKED:
            score = tl.where(sees, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=1) * scale_log2)
        # a row that has seen nothing yet keeps -inf, and -inf - -inf is NaN
        if MASKED:
            finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            finite_peak = new_peak
        weight = tl.exp2(score * scale_log2 - finite_peak[:, None])
        decay = tl.exp2(peak - finite_peak)
        total = total * decay + tl.sum(weight, axis=1)
        acc = _dot(weight.to(v.dtype), v, acc * decay[:, None], UPCAST)
        peak = new_peak
    return acc, total, peak


# Compiled once for a tiling: batches come in all sizes, and their parts begin anywhere.
@triton.jit(
    do_not_specialize=["num_requests", "num_splits", "work_items", "min_steps", "table_stride"],
    do_not_specialize_on_alignment=["partial_lse_ptr", "parts_ptr"],
)
def _canvas_attention_kernel(
    query_ptr, kv_ptr, kv_desc, output_ptr,
    block_table_ptr, query_start_loc_ptr, seq_lens_ptr, visibility_ptr,
    # fp32 [N, Hq, splits, HEAD_SIZE] and [N, Hq, splits], int32 [N]; None without splits
    partial_output_ptr, partial_lse_ptr, parts_ptr,
    k_scale_ptr, v_scale_ptr,  # fp32 [1]; None without FP8
    scale_log2, num_requests, num_splits, work_items, min_steps,
    query_stride_row, query_stride_head, kv_stride_block, kv_stride_head, kv_stride_entry,
    output_stride_row, output_stride_head, table_stride, visibility_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, PAGE: tl.constexpr,
    HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr, REQUESTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    UPCAST: tl.constexpr, FP8: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (split, tile of BLOCK_Q query rows x GROUP_PADDED query heads, KV head)."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP_PADDED
    KV_HEADS: tl.constexpr = HEADS // GROUP
    kv_head = tl.program_id(0) % KV_HEADS
    split, request, tile, all_tiles = _work_of_program(
        query_start_loc_ptr, num_requests, tl.program_id(0) // KV_HEADS, BLOCK_Q, REQUESTS
    )
    most_parts = num_splits
    if SPLIT:
        if work_items > 0:
            most_parts = tl.maximum(tl.minimum(num_splits, work_items // all_tiles), 1)
            min_steps = tl.where(most_parts > 3, min_steps, 8 * min_steps)
    # without any tile, request is past the last
    if (split >= most_parts) | (request >= num_requests):
        return
    query_start = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + request)

    # the last rows of a prompt see the most: start with them
    lane = tl.arange(0, BLOCK_M)
    row = ((query_len - 1) // BLOCK_Q - tile) * BLOCK_Q + lane // GROUP_PADDED
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

    # only as many splits work as get min_steps loop steps each; the others end here
    parts = 1
    first = 0
    last = kv_end
    if SPLIT:
        steps = (kv_end + BLOCK_N - 1) // BLOCK_N
        parts = tl.maximum(tl.minimum(steps // min_steps, most_parts), 1)
        steps_per_part = (steps + parts - 1) // parts
        # 9 steps in 4 parts of 3 are 3 parts
        parts = (steps + steps_per_part - 1) // tl.maximum(steps_per_part, 1)
        parts = tl.maximum(parts, 1)
        if split >= parts:
            return
        first = split * steps_per_part * BLOCK_N
        last = tl.minimum(first + steps_per_part * BLOCK_N, kv_end)

    # how far each row sees from entry 0 without a gap: up to the shortest no mask is needed
    unbroken = tl.maximum(context_end, 0)
    unbroken = tl.where(run_start <= unbroken, tl.maximum(unbroken, run_end), unbroken)
    unbroken = tl.where(own_start <= unbroken, tl.maximum(unbroken, own_end), unbroken)
    mask_from = tl.min(tl.where(is_row, unbroken, kv_end), axis=0) // BLOCK_N * BLOCK_N

    group_head = lane % GROUP_PADDED
    is_head_row = is_row & (group_head < GROUP)
    head = kv_head.to(tl.int64) * GROUP + group_head
    dims = tl.arange(0, HEAD_PADDED)
    in_tile = is_head_row[:, None] & (dims[None, :] < HEAD_SIZE)
    query = tl.load(
        query_ptr + (token * query_stride_row + head * query_stride_head)[:, None] + dims[None, :],
        mask=in_tile,
        other=0.0,
    )

    if FP8:
        scale_log2 *= tl.load(k_scale_ptr)
    acc = tl.zeros((BLOCK_M, HEAD_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    kv_head_ptr = kv_ptr + kv_head.to(tl.int64) * kv_stride_head
    table_ptr = block_table_ptr + request.to(tl.int64) * table_stride
    # fmt: off
    acc, total, peak = _attend_range(
        acc, total, peak, query, first, tl.minimum(last, mask_from),
        kv_head_ptr, kv_desc, kv_head, table_ptr,
        context_end, run_start, run_end, own_start, own_end,
        scale_log2, kv_stride_block, kv_stride_entry,
        PAGE, HEAD_SIZE, HEAD_PADDED, BLOCK_M, BLOCK_N, UPCAST, MASKED=False,
        TMA=TMA, STAGES=STAGES)
    acc, total, peak = _attend_range(
        acc, total, peak, query, tl.maximum(first, mask_from), last,
        kv_head_ptr, kv_desc, kv_head, table_ptr,
        context_end, run_start, run_end, own_start, own_end,
        scale_log2, kv_stride_block, kv_stride_entry,
        PAGE, HEAD_SIZE, HEAD_PADDED, BLOCK_M, BLOCK_N, UPCAST, MASKED=True,
        TMA=TMA, STAGES=MASKED_STAGES)
    # fmt: on

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if FP8:
        result *= tl.load(v_scale_ptr)
    if SPLIT:
        if (split == 0) & (kv_head == 0):
            tl.store(parts_ptr + token, tl.zeros_like(row) + parts, mask=is_row & (group_head == 0))
        if parts > 1:
            slot = (token * HEADS + head) * num_splits + split
            # peak is -inf where nothing was seen
            lse = peak + tl.log2(tl.where(total > 0, total, 1.0))
            tl.store(partial_lse_ptr + slot, lse, mask=is_head_row)
            tl.store(
                partial_output_ptr + (slot * HEAD_SIZE)[:, None] + dims[None, :],
                result,
                mask=in_tile,
            )
            return
    tl.store(
        output_ptr
        + (token * output_stride_row + head * output_stride_head)[:, None]
        + dims[None, :],
        result.to(output_ptr.dtype.element_ty),
        mask=in_tile,
    )


@triton.jit(
    do_not_specialize=["num_requests", "num_splits"],
    do_not_specialize_on_alignment=["partial_lse_ptr", "parts_ptr"],
)
def _combine_splits_kernel(
    partial_output_ptr, partial_lse_ptr, parts_ptr, output_ptr, query_start_loc_ptr,
    num_requests, num_splits, output_stride_row, output_stride_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):  # fmt: skip
    """output = sum_i w_i output_i / sum_i w_i  with  w_i = exp2(lse_i - max_i lse_i).

    One program per (row, KV head); i counts the parts of the row's tile, and a part that saw
    nothing has w_i = 0. A tile of one part has written its output already.
    """
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(query_start_loc_ptr + num_requests):
        return
    parts = tl.load(parts_ptr + token)
    if parts == 1:
        return
    part = tl.arange(0, SPLITS_PADDED)
    dims = tl.arange(0, HEAD_PADDED)
    for group_head in range(GROUP):
        head = tl.program_id(1) * GROUP + group_head
        slot = (token * HEADS + head) * num_splits + part
        lse = tl.load(partial_lse_ptr + slot, mask=part < parts, other=float("-inf"))
        top = tl.max(lse, axis=0)
        weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
        partial = tl.load(
            partial_output_ptr + (slot * HEAD_SIZE)[:, None] + dims[None, :],
            mask=(part < parts)[:, None] & (dims[None, :] < HEAD_SIZE),
            other=0.0,
        )
        total = tl.sum(weight, axis=0)
        result = tl.sum(weight[:, None] * partial, axis=0) / tl.where(total > 0, total, 1.0)
        tl.store(
            output_ptr + token * output_stride_row + head.to(tl.int64) * output_stride_head + dims,
            result.to(output_ptr.dtype.element_ty),
            mask=dims < HEAD_SIZE,
        )


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _descriptor_strides(kv_cache: torch.Tensor) -> list[int]:
    """The cache's strides; a dimension of one entry may have any, and gets a legal one."""
    width = kv_cache.shape[3]
    dimensions = zip(kv_cache.shape[:3], kv_cache.stride()[:3], strict=True)
    return [stride if size > 1 else width for size, stride in dimensions]


def _takes_descriptors(kv_cache: torch.Tensor) -> bool:
    """Whether K and V of 64 entries can be one box each of a tensor descriptor."""
    page, width = kv_cache.shape[2:]
    return (
        _is_hopper(kv_cache.device)
        and kv_cache.dtype in (torch.bfloat16, torch.float16)
        and page % HOPPER_PAGE == 0
        and width in (128, 256)  # head sizes 64 and 128
        and all(stride % 8 == 0 for stride in _descriptor_strides(kv_cache))
        and kv_cache.data_ptr() % 16 == 0
    )


def canvas_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    visibility: torch.Tensor,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    *,
    tiling: Tiling | None = None,
) -> None:
    """Writes the attention of every row below query_start_loc[-1] to ``output``; other rows stay.

    Args:
        query: [N, Hq, D] fp32, bf16 or fp16, last dim contiguous.
        kv_cache: [blocks, Hkv, page, 2 * D], K in [..., :D], V in [..., D:], last dim contiguous;
            of the query's dtype or one of ``FP8_DTYPES``.
        output: [N, Hq, D].
        block_table: [R, max_pages] int32; a row's pages must cover what the request's rows see.
        query_start_loc: [R + 1] int32, non-decreasing from 0; a request may have no row.
        seq_lens: [R] int32, KV entries of each request, those of this pass included.
        visibility: [N, 4] int32 (context_end, run_start, run_end, own_start), absolute KV indices.
        scale: factor of the dot products.
        k_scale, v_scale: [] or [1] fp32, what the entries of an FP8 cache are in units of.
        tiling: how to cut the work; by default what ``choose_tiling`` says.
    """
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, page = kv_cache.shape[1:3]
    num_requests = block_table.shape[0]
    assert query.dtype in (torch.float32, torch.bfloat16, torch.float16), query.dtype
    check_entries(kv_cache, query.dtype, k_scale, v_scale)
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
    # some requests may have no row: as if each had one, there are fewer kinds of launches
    tiling = tiling or choose_tiling(
        max(num_rows, num_requests), num_requests, num_kv_heads, group, head_size, query.dtype,
        _processors(device), tma=_takes_descriptors(kv_cache), interpreted=not query.is_cuda,
    )  # fmt: skip
    group_padded = triton.next_power_of_2(group)
    assert tiling.block_m % group_padded == 0, (tiling, group)
    block_q = tiling.block_m // group_padded
    head_padded = max(16, triton.next_power_of_2(head_size))
    splits = tiling.num_splits
    partial_output = partial_lse = parts = kv_desc = None
    if splits > 1:
        slots = num_rows * num_heads * splits
        workspace = torch.empty(
            slots * (head_size + 1) + num_rows, dtype=torch.float32, device=device
        )
        partial_output, partial_lse, parts = workspace.split((slots * head_size, slots, num_rows))
        parts = parts.view(torch.int32)
    if tiling.tma:
        assert page % tiling.block_n == 0 and head_size == head_padded, (tiling, page, head_size)
        kv_desc = TensorDescriptor(
            kv_cache, list(kv_cache.shape), [*_descriptor_strides(kv_cache), 1],
            [1, 1, tiling.block_n, head_size],
        )  # fmt: skip

    # every request may leave one tile partly filled, and each tile has a row
    most_tiles = min(num_rows // block_q + num_requests, num_rows)
    works = most_tiles * splits
    if tiling.work_items:
        works = max(most_tiles, tiling.work_items if splits > 1 else 0)
    grid = (num_kv_heads * works,)
    _canvas_attention_kernel[grid](
        query, kv_cache, kv_desc, output, block_table, query_start_loc, seq_lens, visibility,
        partial_output, partial_lse, parts, k_scale, v_scale, scale * _LOG2_E, num_requests, splits,
        tiling.work_items, tiling.min_steps,
        *query.stride()[:2], *kv_cache.stride()[:3], *output.stride()[:2],
        block_table.stride(0), visibility.stride(0),
        HEADS=num_heads, GROUP=group, GROUP_PADDED=group_padded, PAGE=page,
        HEAD_SIZE=head_size, HEAD_PADDED=head_padded,
        REQUESTS=requests_padded(num_requests),
        BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, SPLIT=splits > 1,
        # the interpreter's dot takes the bits of a bf16 for an integer
        UPCAST=not query.is_cuda and query.dtype == torch.bfloat16,
        FP8=k_scale is not None,
        TMA=tiling.tma, STAGES=tiling.num_stages,
        # most tiles of rows have one masked tile, so deeper pipelines only take longer to fill
        MASKED_STAGES=min(tiling.num_stages, 2),
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    if splits > 1:
        _combine_splits_kernel[(num_rows, num_kv_heads)](
            partial_output, partial_lse, parts, output, query_start_loc, num_requests, splits,
            *output.stride()[:2],
            HEADS=num_heads, GROUP=group, HEAD_SIZE=head_size, HEAD_PADDED=head_padded,
            SPLITS_PADDED=triton.next_power_of_2(splits), num_warps=1,
        )  # fmt: skip


def compile_for(
    kv_cache: torch.Tensor,
    num_heads: int,
    dtype: torch.dtype,
    most_rows: int,
    most_requests: int,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Compiles what launches of at most so many rows and requests need, by such without rows.

    Args:
        kv_cache, k_scale, v_scale: see ``canvas_attention``. num_heads, dtype: of the query.
    """
    device = kv_cache.device
    num_kv_heads, head_size = kv_cache.shape[1], kv_cache.shape[3] // 2
    launches = launches_of_all_kinds(
        most_rows, most_requests, num_kv_heads, num_heads // num_kv_heads, head_size, dtype,
        _processors(device), tma=_takes_descriptors(kv_cache),
    )  # fmt: skip
    for rows, requests in launches:
        query = torch.empty(rows, num_heads, head_size, dtype=dtype, device=device)
        starts = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        canvas_attention(
            query, kv_cache, query, starts.new_zeros(requests, 1), starts, starts[:requests],
            starts.new_zeros(rows, 4), 1.0, k_scale, v_scale,
        )  # fmt: skip
