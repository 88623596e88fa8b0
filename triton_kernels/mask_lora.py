"""Low-rank adapters on the rows of masks: y += scale * B(A x) there, and nothing anywhere else.

For a row n of the M that feed a mask, and a block i of y's columns:

    h[n]    = A x[n]                                 shrink: [M, in] x [in, blocks * r]
    y[n, i] = y[n, i] + scale * B_i h[n, i]          expand: [M, r] x [r, width of i]

``find_masks`` lists these rows once a step; no one else looks at token ids. How many there are is
known on the device only, so grids depend on padded sizes alone, as CUDA graphs want it, and
programs that have nothing to do end at once.

The shrink is cut along ``in`` into splits, whose sums the expand adds in order: any number of
programs gives the same answer, without atomics. Both are so short that starting and waiting is
most of their time. The shrink needs the linear layer's input alone, so where few rows leave most
of a GPU to it, it runs aside, on a stream of its own, while that layer is computed, and the expand
behind both. In line instead, the programs of each are placed on Hopper while those of the kernel
before it end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from vllm_refusion.triton_kernels.checks import check
from vllm_refusion.triton_kernels.mask_lora_twin import LEAST_RANK

MAX_BLOCKS = 3
FIND_TILE = 1024
EMBED_TILE = 1024
ROW_PROGRAMS = 8  # tiles of rows side by side; more of them take turns
STEP = 128  # splits are multiples of it
MAX_TILES = 4  # of a program of the expand, one after another: they share the sum over splits
ASIDE_ROWS = 64  # of x, at most, that leave room for programs aside
PROGRAMS = 132  # that keep a GPU busy: with fewer, no tile waits for another


@triton.jit
def _times_transposed(a, b, UPCAST: tl.constexpr):
    """a [M, K] x b [N, K] transposed; the interpreter does not know bfloat16 there."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit(do_not_specialize=["num_rows", "num_padded"])
def _find_masks_kernel(
    input_ids_ptr, rows_ptr, count_ptr, num_rows, num_padded, mask_token_id, BLOCK: tl.constexpr
):
    """One program goes through all rows."""
    count = 0
    for first in range(0, num_padded, BLOCK):
        row = first + tl.arange(0, BLOCK)
        token = tl.load(input_ids_ptr + row, mask=row < num_padded, other=-1)
        is_mask = token == mask_token_id
        found = (is_mask & (row < num_rows)).to(tl.int32)
        place = count + tl.cumsum(found, axis=0) - 1
        tl.store(rows_ptr + place, row, mask=found > 0)
        tl.store(input_ids_ptr + row, tl.zeros_like(token), mask=is_mask)
        count += tl.sum(found, axis=0)
    tl.store(count_ptr, count)


@triton.jit
def _embed_masks_kernel(
    y_ptr, embedding_ptr, rows_ptr, count_ptr, y_stride, HIDDEN: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per (rows that take turns, BLOCK columns)."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < HIDDEN
    embedding = tl.load(embedding_ptr + column, mask=mask)
    for n in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        row = tl.load(rows_ptr + n).to(tl.int64)
        tl.store(y_ptr + row * y_stride + column, embedding, mask=mask)


@triton.jit(do_not_specialize=["most_rows"])
def _shrink_kernel(
    x_ptr, a_ptr, parts_ptr, rows_ptr, count_ptr, x_stride, most_rows,
    IN: tl.constexpr, RANK: tl.constexpr, SPLIT_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per (rows that take turns, split, block)."""
    if OVERLAP:
        # A program that ended before the kernel in front did would let the one behind run ahead.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    count = tl.load(count_ptr)
    split, block = tl.program_id(1), tl.program_id(2)
    of_rank = tl.arange(0, RANK)
    a_at = a_ptr + (block * RANK + of_rank)[:, None] * IN
    for first in range(tl.program_id(0) * BLOCK_M, count, tl.num_programs(0) * BLOCK_M):
        n = first + tl.arange(0, BLOCK_M)
        exists = n < count
        row = tl.load(rows_ptr + n, mask=exists, other=0).to(tl.int64)
        x_at = x_ptr + (row * x_stride)[:, None]
        total = tl.zeros([BLOCK_M, RANK], tl.float32)
        for begin in range(0, SPLIT_COLUMNS, BLOCK_K):
            k = split * SPLIT_COLUMNS + begin + tl.arange(0, BLOCK_K)
            inside = k < IN
            x = tl.load(x_at + k[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
            a = tl.load(a_at + k[None, :], mask=inside[None, :], other=0.0)
            total += _times_transposed(x, a, UPCAST)
        part = (split * most_rows + n).to(tl.int64) * (tl.num_programs(2) * RANK)
        at = parts_ptr + (part + block * RANK)[:, None] + of_rank[None, :]
        tl.store(at, total, mask=exists[:, None])


@triton.jit(do_not_specialize=["most_rows"])
def _expand_kernel(
    y_ptr, parts_ptr, b_ptr, rows_ptr, count_ptr, y_stride, most_rows, scale,
    COLUMN0: tl.constexpr, WIDTH0: tl.constexpr, COLUMN1: tl.constexpr, WIDTH1: tl.constexpr,
    COLUMN2: tl.constexpr, WIDTH2: tl.constexpr,
    BLOCKS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    OVERLAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per (rows that take turns, TILES tiles of BLOCK_N columns of a block)."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    count = tl.load(count_ptr)
    parts0: tl.constexpr = tl.cdiv(WIDTH0, TILES * BLOCK_N)
    parts1: tl.constexpr = parts0 + tl.cdiv(WIDTH1, TILES * BLOCK_N)
    part = tl.program_id(1)
    block = 0
    column = COLUMN0
    width = WIDTH0
    b_row = 0
    begin = part
    if part >= parts1:
        block = 2
        column = COLUMN2
        width = WIDTH2
        b_row = WIDTH0 + WIDTH1
        begin = part - parts1
    elif part >= parts0:
        block = 1
        column = COLUMN1
        width = WIDTH1
        b_row = WIDTH0
        begin = part - parts0
    of_rank = tl.arange(0, RANK)
    for first in range(tl.program_id(0) * BLOCK_M, count, tl.num_programs(0) * BLOCK_M):
        n = first + tl.arange(0, BLOCK_M)
        exists = n < count
        row = tl.load(rows_ptr + n, mask=exists, other=0).to(tl.int64)
        inner = tl.zeros([BLOCK_M, RANK], tl.float32)
        for split in tl.static_range(SPLITS):  # all loads at once
            entry = (split * most_rows + n).to(tl.int64) * (BLOCKS * RANK) + block * RANK
            at = parts_ptr + entry[:, None] + of_rank[None, :]
            inner += tl.load(at, mask=exists[:, None], other=0.0)
        inner = inner.to(b_ptr.dtype.element_ty)
        for tile in range(TILES):
            of_block = (begin * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = of_block < width
            b_at = b_ptr + (b_row + of_block)[:, None] * RANK + of_rank[None, :]
            b = tl.load(b_at, mask=inside[:, None], other=0.0)
            delta = _times_transposed(inner, b, UPCAST) * scale
            y_at = y_ptr + (row * y_stride)[:, None] + (column + of_block)[None, :]
            mask = exists[:, None] & inside[None, :]
            y = tl.load(y_at, mask=mask, other=0.0)
            tl.store(y_at, (y.to(tl.float32) + delta).to(y_ptr.dtype.element_ty), mask=mask)


def find_masks(
    input_ids: torch.Tensor,
    num_rows: int,
    mask_token_id: int,
    rows: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Same arguments and effects as ``find_masks_twin``, as one kernel."""
    padded = len(input_ids)
    assert 0 <= num_rows <= padded <= len(rows), (num_rows, padded, len(rows))
    assert input_ids.is_contiguous() and not input_ids.is_floating_point(), input_ids.dtype
    check(rows, rows.shape, torch.int32)
    check(count, (1,), torch.int32)
    _find_masks_kernel[(1,)](
        input_ids, rows, count, num_rows, padded, mask_token_id, BLOCK=FIND_TILE, num_warps=8
    )


def embed_masks(
    y: torch.Tensor, embedding: torch.Tensor, rows: torch.Tensor, count: torch.Tensor
) -> None:
    """Same arguments and effects as ``embed_masks_twin``, as one kernel."""
    num_rows, hidden = y.shape
    assert y.stride(1) == 1, y.stride()
    check(embedding, (hidden,), y.dtype)
    check(rows, rows.shape, torch.int32)
    check(count, (1,), torch.int32)
    if num_rows == 0:
        return
    grid = (min(num_rows, ROW_PROGRAMS * LEAST_RANK), triton.cdiv(hidden, EMBED_TILE))
    _embed_masks_kernel[grid](
        y, embedding, rows, count, y.stride(0), HIDDEN=hidden, BLOCK=EMBED_TILE, num_warps=4
    )


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _tile(x: torch.Tensor, rank: int) -> tuple[int, int]:
    """Rows of a tile, and columns of a step of the shrink or of a tile of the expand."""
    if x.device.type == "cpu":  # the interpreter's cost is per program
        return 64, 128
    exact = x.dtype == torch.float32  # no tensor cores: smaller tiles
    return 16 if len(x) <= 64 else 32, 32 if exact else 64 if rank > 128 else 128


def _is_aside(x: torch.Tensor, asked: bool | None) -> bool:
    return x.device.type != "cpu" and (len(x) <= ASIDE_ROWS if asked is None else asked)


def _options(x: torch.Tensor, aside: bool) -> dict[str, bool | int]:
    interpreted = x.device.type == "cpu"
    overlap = not (interpreted or aside) and torch.cuda.get_device_capability(x.device) >= (9, 0)
    options: dict[str, bool | int] = {"OVERLAP": overlap, "num_warps": 4}
    options["UPCAST"] = interpreted and x.dtype == torch.bfloat16
    if overlap:
        options["launch_pdl"] = True
    return options


def shrink_masks(
    parts: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    *,
    aside: bool | None = None,
) -> None:
    """Same arguments and effects as ``shrink_masks_twin``, as one kernel.

    The rank is a power of two of at least LEAST_RANK (zeros make up for what is missing), and rows
    of x are contiguous. ``aside``: on a stream of its own, beside what the current one is given
    until ``expand_masks``, which waits for it; until then x must stay as it is. None: by the rows.
    """
    (num_rows, columns), (blocks, rank, _) = x.shape, a.shape
    splits = len(parts)
    assert x.stride(1) == 1 and len(rows) >= num_rows, (x.stride(), len(rows), num_rows)
    assert rank >= LEAST_RANK and rank & (rank - 1) == 0, rank
    check(parts, (splits, num_rows, blocks, rank), torch.float32)
    check(a, (blocks, rank, columns), x.dtype)
    check(rows, rows.shape, torch.int32)
    check(count, (1,), torch.int32)
    if num_rows == 0:
        return
    aside = _is_aside(x, aside)
    block_m, block_k = _tile(x, rank)

    def launch() -> None:
        _shrink_kernel[(min(triton.cdiv(num_rows, block_m), ROW_PROGRAMS), splits, blocks)](
            x, a, parts, rows, count, x.stride(0), num_rows, IN=columns, RANK=rank,
            SPLIT_COLUMNS=triton.cdiv(triton.cdiv(columns, STEP), splits) * STEP,
            BLOCK_M=block_m, BLOCK_K=block_k, num_stages=3, **_options(x, aside),
        )  # fmt: skip

    if not aside:
        return launch()
    side = _side_stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        launch()


def expand_masks(
    y: torch.Tensor,
    parts: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    scale: float,
    blocks: Sequence[int],
    *,
    aside: bool | None = None,
    programs: int = PROGRAMS,
) -> None:
    """Same arguments and effects as ``expand_masks_twin``, as one kernel.

    Blocks are MAX_BLOCKS at most, and rows of y contiguous. ``aside``: as for ``shrink_masks``.
    Any ``programs``, to which it is spread out, give the same answer.
    """
    splits, num_rows, number, rank = parts.shape
    widths = blocks[1::2]
    assert len(y) == num_rows and y.stride(1) == 1, (y.shape, y.stride(), num_rows)
    assert 1 <= number <= MAX_BLOCKS and len(blocks) == 2 * number, blocks
    check(parts, parts.shape, torch.float32)
    check(b, (sum(widths), rank), y.dtype)
    check(rows, rows.shape, torch.int32)
    check(count, (1,), torch.int32)
    if num_rows == 0:
        return
    aside = _is_aside(y, aside)
    if aside:
        torch.cuda.current_stream(y.device).wait_stream(_side_stream(y.device))
    block_m, block_n = _tile(y, rank)
    row_programs = min(triton.cdiv(num_rows, block_m), ROW_PROGRAMS)
    tiles = sum(triton.cdiv(width, block_n) for width in widths) * row_programs // programs
    tiles = max(1, min(tiles, MAX_TILES))
    in_tiles = sum(triton.cdiv(width, tiles * block_n) for width in widths)
    padded = [*blocks, *[0] * (2 * (MAX_BLOCKS - number))]
    _expand_kernel[(row_programs, in_tiles)](
        y, parts, b, rows, count, y.stride(0), num_rows, float(scale), *padded,
        BLOCKS=number, RANK=rank, SPLITS=splits,
        BLOCK_M=block_m, BLOCK_N=block_n, TILES=tiles, num_stages=2, **_options(y, aside),
    )  # fmt: skip
