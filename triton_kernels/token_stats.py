"""Row statistics of logits in one read: the token to pick, its probability, a given token's.

For one row x of V logits, with the draw of the row, T and seed of its request:

    value[t] = x[t]                        if T = 0
               x[t] / T + noise[t]         if T > 0, noise of `vllm_refusion/decoding/noise.py`
    picked   = argmax of value over the allowed tokens, the lowest id among equals
    prob(t)  = exp(x[t] - m) / s,          m = max x,  s = sum_j exp(x[j] - m)

Never allowed is the mask token; before ``min_tokens`` the stop tokens are not allowed either.
Requests may limit what is allowed and bias it, see `decoding/picking.py`. Probabilities are
those of the full softmax of x at temperature 1, whatever is allowed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_refusion.decoding.noise import LARGEST_UNIFORM, NOISE_BOUND
from vllm_refusion.decoding.picking import PickLimits
from vllm_refusion.triton_kernels.checks import check, check_rows
from vllm_refusion.triton_kernels.constant import Constant
from vllm_refusion.triton_kernels.lowest_kept import lowest_kept
from vllm_refusion.triton_kernels.sizes import cdiv, next_power_of_2
from vllm_refusion.triton_kernels.token_stats_twin import FLOOR, Stats, allocate_stats

_FLOOR = Constant(FLOOR)
_NOISE_BOUND = Constant(NOISE_BOUND)
_LARGEST_UNIFORM = Constant(LARGEST_UNIFORM)

# Tokens of a row held at once: 16 per thread. The interpreter pays per operation instead, so a
# CPU takes tiles as wide as its cache likes.
GPU_TILE = 2048
CPU_TILE = 65536
THREADS_PER_WARP = 32
TOKENS_PER_THREAD = 16
# Programs that keep a GPU's memory busy; with fewer rows than that, a row is cut into parts.
GPU_PROGRAMS = 1056
CPU_PROGRAMS = 1


@triton.jit
def gumbel(seed, draw, position, token):
    """Noise [BLOCK] of the tokens [BLOCK] int32; seed int64, draw and position int32 scalars."""
    word, _, _, _ = tl.philox(seed, token, position, draw, 0)
    uniform = ((word >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2**-24
    return -tl.log(-tl.log(tl.minimum(uniform, _LARGEST_UNIFORM)))


@triton.jit
def _parts_of(workspace_ptr, num_rows, tiles, parts):
    """Maxima and sums of tiles, both [N, tiles] float32; of parts, both [N, parts], the best values
    float32 and their tokens int32.
    """
    tile_sum_ptr = workspace_ptr + num_rows * tiles
    part_best_ptr = tile_sum_ptr + num_rows * tiles
    part_picked_ptr = (part_best_ptr + num_rows * parts).to(tl.pointer_type(tl.int32), bitcast=True)
    return workspace_ptr, tile_sum_ptr, part_best_ptr, part_picked_ptr


# Chunks of rows may start anywhere: no compilation per alignment of the per-row vectors.
@triton.jit(
    do_not_specialize=["num_rows", "tiles", "parts", "tiles_per_part"],
    do_not_specialize_on_alignment=[
        "row_request_ptr",
        "row_position_ptr",
        "row_draw_ptr",
        "lowest_ptr",
    ],
)
def _token_stats_kernel(
    logits_ptr,  # [N, V]
    row_request_ptr,  # [N] int64
    row_position_ptr,  # [N] int32
    temperature_ptr,  # [max_reqs] float32
    seed_ptr,  # [max_reqs] int64
    row_draw_ptr,  # [N] int32
    min_tokens_ptr,  # [max_reqs] int32
    stop_ids_ptr,  # [max_reqs, F] int32
    workspace_ptr,  # see _parts_of
    bias_index_ptr,  # [max_reqs] int32, read if BIASED
    bias_ptr,  # [1 + B, V] float32, read if BIASED
    lowest_ptr,  # [N] float32, read if CUT
    logits_stride,
    vocab,
    num_stop_ids,
    mask_token_id,
    num_rows,
    tiles,
    parts,
    tiles_per_part,
    BIASED: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (row, part): each tile's maximum and sum, the best value of the part."""
    tile_maximum_ptr, tile_sum_ptr, part_best_ptr, part_picked_ptr = _parts_of(
        workspace_ptr, num_rows, tiles, parts
    )
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    position = tl.load(row_position_ptr + row)
    # the other inputs of an unused row may hold anything
    if position < 0:
        return
    request = tl.load(row_request_ptr + row)
    temperature = tl.load(temperature_ptr + request)
    min_tokens = tl.load(min_tokens_ptr + request)
    seed = tl.load(seed_ptr + request)
    draw = tl.load(row_draw_ptr + row)
    stop_ids = stop_ids_ptr + request * num_stop_ids
    logits = logits_ptr + row * logits_stride
    if BIASED:
        bias = bias_ptr + tl.load(bias_index_ptr + request).to(tl.int64) * vocab
    if CUT:
        lowest = tl.load(lowest_ptr + row)

    best = float("-inf")
    picked = 0
    first = part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tiles)
    lane = tl.arange(0, BLOCK)
    token = first * BLOCK + lane
    following = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
    for tile in range(first, last):
        x = following.to(tl.float32)
        token = tile * BLOCK + lane
        if tile + 1 < last:  # in flight while this tile is worked on
            following = tl.load(
                logits + token + BLOCK, mask=token + BLOCK < vocab, other=float("-inf")
            )
        # FLOOR for -inf and NaN keeps the maximum finite; a NaN still reaches the sum
        floored = tl.where(x > _FLOOR, x, _FLOOR)
        maximum = tl.max(floored, axis=0)
        tl.store(tile_maximum_ptr + row * tiles + tile, maximum)
        tl.store(tile_sum_ptr + row * tiles + tile, tl.sum(tl.exp(x - maximum), axis=0))

        # No value of the tile lies above this bound (division and addition round monotonically),
        # and an equal one would lose to the lower id found before: many tiles need no noise.
        bound = maximum
        if BIASED:
            added = tl.load(bias + token, mask=token < vocab, other=0.0)
            x += added
            floored = tl.where(x > _FLOOR, x, _FLOOR)
            bound = tl.max(floored, axis=0)
        if temperature > 0:
            bound = tl.maximum(tl.div_rn(bound, temperature) + _NOISE_BOUND, _FLOOR)
        if bound > best:
            value = floored
            if temperature > 0:
                score = tl.div_rn(x, temperature)
                perturbed = score + gumbel(seed, draw, position, token)
                value = tl.where(perturbed > _FLOOR, perturbed, _FLOOR)
                if CUT:
                    score = tl.where(score > _FLOOR, score, _FLOOR)
                    value = tl.where(score >= lowest, value, float("-inf"))
            value = tl.where(token < vocab, value, float("-inf"))
            if BIASED:
                value = tl.where(added == float("-inf"), float("-inf"), value)
            value = tl.where(token != mask_token_id, value, float("-inf"))
            if position < min_tokens:
                for entry in range(num_stop_ids):
                    stop_id = tl.load(stop_ids + entry)
                    value = tl.where(token != stop_id, value, float("-inf"))
            tile_best = tl.max(value, axis=0)
            if tile_best > best:
                best = tile_best
                picked = tl.min(tl.where(value == tile_best, token, vocab), axis=0)

    tl.store(part_best_ptr + row * parts + part, best)
    tl.store(part_picked_ptr + row * parts + part, picked)


@triton.jit(
    do_not_specialize=["num_rows", "tiles", "parts"],
    do_not_specialize_on_alignment=[
        "row_position_ptr",
        "row_given_ptr",
        "picked_ptr",
        "picked_prob_ptr",
        "given_prob_ptr",
    ],
)
def _combine_tiles_kernel(
    logits_ptr,  # [N, V]
    row_position_ptr,  # [N] int32
    row_given_ptr,  # [N] int32
    picked_ptr,  # [N] int32
    picked_prob_ptr,  # [N] float32
    given_prob_ptr,  # [N] float32
    workspace_ptr,  # see _parts_of
    logits_stride,
    vocab,
    num_rows,
    tiles,
    parts,
    TILES_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per ROWS rows. A sum's order depends on the tiles alone, not on the parts."""
    tile_maximum_ptr, tile_sum_ptr, part_best_ptr, part_picked_ptr = _parts_of(
        workspace_ptr, num_rows, tiles, parts
    )
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    used = tl.load(row_position_ptr + row, mask=row < num_rows, other=-1) >= 0
    tile = tl.arange(0, TILES_PADDED)[None, :]
    is_tile = used[:, None] & (tile < tiles)
    is_part = used[:, None] & (tile < parts)
    at_tile = row[:, None] * tiles + tile
    at_part = row[:, None] * parts + tile
    maxima = tl.load(tile_maximum_ptr + at_tile, mask=is_tile, other=_FLOOR)
    sums = tl.load(tile_sum_ptr + at_tile, mask=is_tile, other=0.0)
    bests = tl.load(part_best_ptr + at_part, mask=is_part, other=float("-inf"))
    tokens = tl.load(part_picked_ptr + at_part, mask=is_part, other=0)

    maximum = tl.max(maxima, axis=1)
    total = tl.sum(sums * tl.exp(maxima - maximum[:, None]), axis=1)
    total = tl.where(used, total, 1.0)
    best = tl.max(bests, axis=1)
    picked = tl.min(tl.where(bests == best[:, None], tokens, vocab), axis=1)
    logits = logits_ptr + row * logits_stride
    picked_logit = tl.load(logits + picked, mask=used, other=0.0).to(tl.float32)
    picked_logit = tl.where(used, picked_logit, maximum)
    tl.store(picked_ptr + row, picked, mask=used)
    picked_prob = tl.div_rn(tl.exp(picked_logit - maximum), total)
    tl.store(picked_prob_ptr + row, picked_prob, mask=used)
    given = tl.load(row_given_ptr + row, mask=used, other=-1)
    is_token = (given >= 0) & (given < vocab)
    given_logit = tl.load(logits + given, mask=is_token, other=0.0).to(tl.float32)
    given_logit = tl.where(is_token, given_logit, maximum)
    given_prob = tl.div_rn(tl.exp(given_logit - maximum), total)
    tl.store(given_prob_ptr + row, tl.where(is_token, given_prob, 0.0), mask=used)


def token_stats(
    logits: torch.Tensor,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    row_given: torch.Tensor,
    row_draw: torch.Tensor,
    *,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    min_tokens: torch.Tensor,
    stop_ids: torch.Tensor,
    mask_token_id: int,
    limits: PickLimits | None = None,
    out: Stats | None = None,
) -> Stats:
    """Picks a token for every used row of logits and gives its and another token's probability.

    The grid depends on N only, nothing is read back: it can be captured in a CUDA graph. A row's
    results depend on that row and its request alone, bit for bit.

    Args:
        logits: [N, V] float32, bfloat16 or float16, any row stride, V contiguous. -inf is
            probability 0; every row needs a finite logit. A row with NaN or +inf gets NaN
            probabilities; ``picked`` is a token of [0, V) all the same.
        row_request: [>= N] int64, request index of the row, an index of the per-request tensors.
        row_position: [>= N] int32, response position; -1 for an unused row, whose outputs are left
            alone (0 when allocated here).
        row_given: [>= N] int32, the token of ``given_prob``; -1 for none.
        row_draw: [>= N] int32, how many draws the request has made before that of the row.
        temperature: [max_reqs] float32; 0 picks the argmax.
        seed: [max_reqs] int64, all 64 bits count.
        min_tokens: [max_reqs] int32.
        stop_ids: [max_reqs, F] int32, padded with -1; not picked at positions < min_tokens.
        mask_token_id: never picked.
        limits: of requests that limit or bias what is picked; None reads nothing.
        out: results to write into, three contiguous [>= N] tensors; allocated when absent.

    Returns:
        picked [N] int32: the lowest allowed id of the largest value. Allowed tokens with -inf
            or NaN rank below all others; 0 where no token is allowed.
        picked_prob [N] float32: probability of ``picked``.
        given_prob [N] float32: probability of ``row_given``, 0 where that is no token.
    """
    rows, vocab = logits.shape
    requests, num_stop_ids = stop_ids.shape
    out = allocate_stats(logits) if out is None else out
    assert logits.dtype in (torch.float32, torch.bfloat16, torch.float16), logits.dtype
    assert vocab == 1 or (vocab and logits.stride(1) == 1), "a row of logits must be contiguous"
    check_rows(row_request, rows, torch.int64)
    for tensor in (row_position, row_given, row_draw):
        check_rows(tensor, rows, torch.int32)
    for tensor, dtype in zip(out, (torch.int32, torch.float32, torch.float32), strict=True):
        check_rows(tensor, rows, dtype)
    check(temperature, (requests,), torch.float32)
    check(seed, (requests,), torch.int64)
    check(min_tokens, (requests,), torch.int32)
    assert stop_ids.dtype == torch.int32 and stop_ids.is_contiguous()
    if rows == 0:
        return out

    widest = GPU_TILE if logits.is_cuda else CPU_TILE
    block = min(widest, next_power_of_2(vocab))
    num_warps = max(1, block // (THREADS_PER_WARP * TOKENS_PER_THREAD))
    biased = limits if limits is not None and limits.biased else None
    cut = limits if limits is not None and limits.cuts else None
    lowest = None
    if cut is not None:
        lowest = lowest_kept(
            logits,
            row_request,
            row_position,
            temperature=temperature,
            min_tokens=min_tokens,
            stop_ids=stop_ids,
            mask_token_id=mask_token_id,
            limits=cut,
            block=block,
            num_warps=num_warps,
        )
    tiles = cdiv(vocab, block)
    programs = GPU_PROGRAMS if logits.is_cuda else CPU_PROGRAMS
    tiles_per_part = min(tiles, max(1, rows * tiles // programs))
    parts = cdiv(tiles, tiles_per_part)
    workspace = torch.empty(2 * rows * (tiles + parts), dtype=torch.float32, device=logits.device)
    _token_stats_kernel[(rows * parts,)](
        logits, row_request, row_position, temperature, seed, row_draw, min_tokens, stop_ids,
        workspace,
        biased.bias_index if biased else None, biased.bias if biased else None, lowest,
        logits.stride(0), vocab, num_stop_ids, mask_token_id, rows, tiles, parts, tiles_per_part,
        BIASED=biased is not None, CUT=cut is not None, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    rows_at_once = 1 if logits.is_cuda else next_power_of_2(rows)
    _combine_tiles_kernel[(cdiv(rows, rows_at_once),)](
        logits, row_position, row_given, *out, workspace,
        logits.stride(0), vocab, rows, tiles, parts,
        TILES_PADDED=next_power_of_2(tiles), ROWS=rows_at_once, num_warps=1,
    )  # fmt: skip
    return out
