"""How ``canvas_attention`` cuts its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_refusion.triton_kernels.sizes import next_power_of_2

# entries of a KV page, or a divisor of them, with which canvas_attention is fastest on Hopper
HOPPER_PAGE = 64
_MAX_SPLITS = 32


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; any choice gives the same answer up to rounding.

    Attributes:
        block_m: rows of a query tile (query rows x query heads of a KV head), a power of two >= 16.
        block_n: KV entries of a loop step, a power of two >= 16.
        num_splits: the most parts of a tile's KV range; above 1 a second kernel combines them.
        work_items: tiles x parts, of a KV head, that fill the device. How many tiles there are is
            known when the kernel runs: then a tile has at most work_items // tiles parts. 0: no
            such limit.
        min_steps: the fewest loop steps of a part, so that a short range has fewer parts; with
            work_items, eight times as many where there are three parts or fewer.
        tma: Hopper's tensor descriptors load K and V; the page must be a multiple of block_n, the
            head size a power of two.
        num_warps, num_stages: Triton's launch options.
    """

    block_m: int
    block_n: int
    num_splits: int = 1
    num_warps: int = 4
    num_stages: int = 2
    min_steps: int = 1
    tma: bool = False
    work_items: int = 0


def choose_tiling(
    num_rows: int,
    num_requests: int,
    num_kv_heads: int,
    group: int,
    head_size: int,
    dtype: torch.dtype,
    processors: int,
    *,
    tma: bool = False,
    interpreted: bool = False,
) -> Tiling:
    """The tiling for a launch, from shapes alone: a captured graph replays it for other values.

    A graph is captured for the most requests that its rows could be of, and mostly replayed for
    few: tiles are chosen as if all rows were of one request.

    Args:
        num_rows, num_kv_heads, head_size, dtype: the shape of the call.
        num_requests: at least the number of requests; only the interpreter's tiles depend on it.
        group: query heads per KV head.
        processors: multiprocessors of the device.
        tma: the cache can be read through descriptors.
        interpreted: Triton's interpreter runs the kernel: a program costs more than its arithmetic.
    """
    group_padded = next_power_of_2(group)
    head_padded = max(16, next_power_of_2(head_size))
    if interpreted:
        rows_per_request = -(-num_rows // max(num_requests, 1))
        wanted_m = next_power_of_2(rows_per_request * group_padded)
        return Tiling(max(16, group_padded, min(wanted_m, 512)), block_n=128)
    wanted_m = next_power_of_2(num_rows * group_padded)

    def programs(block_m: int) -> int:
        return -(-num_rows * group_padded // block_m) * num_kv_heads

    if dtype == torch.float32:
        # no tensor cores: both operands of a dot live in registers, and larger tiles spill
        block_m, block_n, num_warps, num_stages = 32, 16, 8, 1
    elif head_padded > 128:
        block_m, block_n, num_warps, num_stages = 64, 32, 8, 2
    elif not tma and programs(128) >= 2 * processors:
        # more rows halve the reads of K and V, once they still fill the device twice over
        block_m, block_n, num_warps, num_stages = 128, 64, 8, 3
    else:
        # a processor holds two of these, and one multiplies while the other takes exponentials
        block_m, block_n, num_warps, num_stages = 64, 64, 4, 3
    if wanted_m < block_m:
        block_m, num_warps = wanted_m, 4
    block_m = max(16, group_padded, block_m)

    # a processor holds two programs
    work_items = max(1, 2 * processors // num_kv_heads)
    fewest_tiles = -(-num_rows * group_padded // block_m)
    splits = max(1, min(work_items // fewest_tiles, _MAX_SPLITS))
    # two or three parts gain little: only a long range is worth the second kernel
    return Tiling(block_m, block_n, splits, num_warps, num_stages, 4, tma, work_items)


def requests_padded(num_requests: int) -> int:
    """The requests that a kernel is compiled for: of few kinds, as batches come in all sizes."""
    if num_requests <= 32:
        return 32  # a warp's lanes
    return max(256, next_power_of_2(num_requests))


def launches_of_all_kinds(
    most_rows: int, most_requests: int, *shape: Any, tma: bool
) -> list[tuple[int, int]]:
    """(rows, requests) of launches of which each needs kernels of its own, and no other does.

    Args:
        most_rows, most_requests: of any launch.
        shape, tma: other arguments of ``choose_tiling``.
    """
    kinds: dict[tuple[int, ...], tuple[int, int]] = {}
    first = 1  # request of those that the kernel is compiled for alike
    while first <= most_requests:
        for rows in range(first, max(first, most_rows) + 1):
            tiling = choose_tiling(rows, first, *shape, tma=tma)
            splits = next_power_of_2(tiling.num_splits)
            kind = (tiling.block_m, tiling.block_n, tiling.num_warps, tiling.num_stages, splits)
            kinds.setdefault((requests_padded(first), *kind), (rows, first))
        first = requests_padded(first) + 1
    return list(kinds.values())
