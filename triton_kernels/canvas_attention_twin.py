"""fp32 PyTorch twins of ``canvas_attention.py``: its tests' oracle, and what runs without a GPU."""

from __future__ import annotations

import torch

from vllm_refusion.triton_kernels.checks import FP8_DTYPES, check_entries

# bounds the scores held at once to Hq x this x seq_len
_CHUNK_ROWS = 256


def canvas_attention_twin(
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
) -> None:
    """Writes the attention of every row below query_start_loc[-1] to ``output``; other rows stay.

    Row l of a request sees KV index j iff ``j < context_end or run_start <= j < run_end or
    own_start <= j <= seq_len - query_len + l``; a row that sees nothing gives zeros.

    Args:
        query: [N, Hq, D] of any float dtype; the arithmetic is fp32.
        kv_cache: [blocks, Hkv, page, 2 * D] of any float dtype, K in [..., :D], V in [..., D:].
        output: [N, Hq, D].
        block_table: [R, max_pages] int32.
        query_start_loc: [R + 1] int32, non-decreasing from 0; a request may have no row.
        seq_lens: [R] int32, KV entries of each request, those of this pass included.
        visibility: [N, 4] int32 (context_end, run_start, run_end, own_start), absolute KV indices.
        scale: factor of the dot products.
        k_scale, v_scale: [] or [1] fp32, what the entries of an FP8 cache are in units of.
    """
    check_entries(kv_cache, query.dtype, k_scale, v_scale)
    page = kv_cache.shape[2]
    starts = query_start_loc.tolist()
    for request, seq_len in enumerate(seq_lens.tolist()):
        start, stop = starts[request], starts[request + 1]
        if start == stop:
            continue
        sees = _visible(visibility[start:stop], seq_len)  # [query_len, seq_len]
        seeing = sees.any(1)
        if not seeing.all():
            # unused rows of a canvas come last: leave them out
            used = int(seeing.nonzero()[-1]) + 1 if seeing.any() else 0
            output[start + used : stop] = 0
            stop, sees = start + used, sees[:used]
        seen = sees.any(0)
        kv_end = int(seen.nonzero()[-1]) + 1 if stop > start else 0
        seen = seen[:kv_end]
        pages = block_table[request, : -(-kv_end // page)]
        # [pages, Hkv, page, 2 * D] -> [Hkv, kv_end, 2 * D]. Not index_select: it first makes the
        # whole cache contiguous, which another layout than [blocks, Hkv, page, 2 * D] is not.
        kv = _as_bytes(kv_cache)[pages].view(kv_cache.dtype)
        kv = kv.transpose(0, 1).flatten(1, 2)[:, :kv_end].float()
        if not seen.all():
            # an entry that no row sees may hold NaN from a freed page, and 0 * NaN is NaN
            kv = kv.masked_fill(~seen[:, None], 0.0)
        key, value = kv.chunk(2, dim=-1)
        if k_scale is not None and v_scale is not None:
            key, value = key * k_scale, value * v_scale
        for first in range(0, stop - start, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, stop - start)
            rows = slice(start + first, start + last)
            output[rows] = _attend(query[rows], key, value, sees[first:last, :kv_end], scale)


def _visible(visibility: torch.Tensor, seq_len: int) -> torch.Tensor:
    """[query_len, seq_len] bool from the [query_len, 4] int32 of one request."""
    context_end, run_start, run_end, own_start = visibility[:, :, None].unbind(1)
    index = torch.arange(seq_len, device=visibility.device)
    own = torch.arange(seq_len - len(visibility), seq_len, device=visibility.device)[:, None]
    in_run = (run_start <= index) & (index < run_end)
    return (index < context_end) | in_run | ((own_start <= index) & (index <= own))


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: torch.Tensor, scale: float
) -> torch.Tensor:
    """[L, Hq, D]: attention of query [L, Hq, D], sees [L, S], over fp32 key, value [Hkv, S, D]."""
    length, num_heads, head_size = query.shape
    num_kv_heads, num_keys = key.shape[:2]
    group = num_heads // num_kv_heads
    # the query heads of a KV head are consecutive; lay them out as its rows
    rows = (
        query.float().view(length, num_kv_heads, group, head_size).permute(1, 2, 0, 3).flatten(1, 2)
    )
    score = (rows @ key.transpose(1, 2)).mul_(scale)  # [Hkv, group * L, S]
    score.view(num_kv_heads, group, length, num_keys).masked_fill_(~sees, float("-inf"))
    result = (score.softmax(-1) @ value).view(num_kv_heads, group, length, head_size)
    result = result.permute(2, 0, 1, 3).flatten(1, 2)
    # the softmax of nothing but -inf is NaN
    return result.masked_fill_(~sees.any(1)[:, None, None], 0.0)


def write_kv_twin(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Stores each row's key and value in the entry ``slot_mapping`` names.

    Args:
        key, value: [N, Hkv, D].
        kv_cache: [blocks, Hkv, page, 2 * D], any strides.
        slot_mapping: [N] int64, block * page + offset; -1 skips the row.
        k_scale, v_scale: [] or [1] fp32, what the entries of an FP8 cache are in units of.
    """
    check_entries(kv_cache, key.dtype, k_scale, v_scale)
    page = kv_cache.shape[2]
    kept = slot_mapping >= 0
    if not kept.all():
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    if k_scale is not None and v_scale is not None:
        most = torch.finfo(kv_cache.dtype).max  # the conversion itself does not hold values to it
        key = (key.float() / k_scale).clamp(-most, most).to(kv_cache.dtype)
        value = (value.float() / v_scale).clamp(-most, most).to(kv_cache.dtype)
    entries = torch.cat((_as_bytes(key), _as_bytes(value)), dim=-1)  # [n, Hkv, 2 * D]
    _as_bytes(kv_cache)[slot_mapping // page, :, slot_mapping % page] = entries


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes: PyTorch does not index it."""
    return values.view(torch.uint8) if values.dtype in FP8_DTYPES else values
