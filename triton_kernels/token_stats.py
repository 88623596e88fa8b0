"""Row statistics of logits in one read: the token to pick, its probability, a given token's.

For one row x of V logits, with T, seed and draw of the row's request:

    value[t] = x[t]                        if T = 0
               x[t] / T + noise[t]         if T > 0, noise of `vllm_refusion/noise.py`
    picked   = argmax of value over the allowed tokens, the lowest id among equals
    prob(t)  = exp(x[t] - m) / s,          m = max x,  s = sum_j exp(x[j] - m)

Never allowed is the mask token; before ``min_tokens`` the stop tokens are not allowed either.
Requests may limit what is allowed and bias it, see `vllm_refusion/picking.py`. Probabilities are
those of the full softmax of x at temperature 1, whatever is allowed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_refusion.noise import LARGEST_UNIFORM, NOISE_BOUND
from vllm_refusion.picking import PickLimits
from vllm_refusion.triton_kernels.lowest_kept import lowest_kept
from vllm_refusion.triton_kernels.stats_reference import FLOOR, Stats, allocate_stats

_FLOOR = tl.constexpr(FLOOR)
_NOISE_BOUND = tl.constexpr(NOISE_BOUND)
_LARGEST_UNIFORM = tl.constexpr(LARGEST_UNIFORM)

# Tokens of a row held at once: 16 per thread. The interpreter pays per operation instead, so a
# CPU takes tiles as wide as its cache likes.
GPU_TILE = 8192
CPU_TILE = 65536
THREADS_PER_WARP = 32
TOKENS_PER_THREAD = 16


@triton.jit
def gumbel(seed, draw, position, token):
    """Noise [BLOCK] of the tokens [BLOCK] int32; seed int64, draw and position int32 scalars."""
    word, _, _, _ = tl.philox(seed, token, position, draw, 0)
    uniform = ((word >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2**-24
    return -tl.log(-tl.log(tl.minimum(uniform, _LARGEST_UNIFORM)))


# Chunks of rows may start anywhere: no compilation per alignment of the per-row vectors.
@triton.jit(
    do_not_specialize_on_alignment=[
        "row_request_ptr",
        "row_position_ptr",
        "row_given_ptr",
        "picked_ptr",
        "picked_prob_ptr",
        "given_prob_ptr",
        "lowest_ptr",
    ]
)
def _token_stats_kernel(
    logits_ptr,  # [N, V]
    row_request_ptr,  # [N] int64
    row_position_ptr,  # [N] int32
    row_given_ptr,  # [N] int32
    temperature_ptr,  # [max_reqs] float32
    seed_ptr,  # [max_reqs] int64
    draw_ptr,  # [max_reqs] int32
    min_tokens_ptr,  # [max_reqs] int32
    stop_ids_ptr,  # [max_reqs, F] int32
    picked_ptr,  # [N] int32
    picked_prob_ptr,  # [N] float32
    given_prob_ptr,  # [N] float32
    bias_index_ptr,  # [max_reqs] int32, read if BIASED
    bias_ptr,  # [1 + B, V] float32, read if BIASED
    lowest_ptr,  # [N] float32, read if CUT
    logits_stride,
    vocab,
    num_stop_ids,
    mask_token_id,
    BIASED: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(row_position_ptr + row)
    # the other inputs of an unused row may hold anything
    if position < 0:
        return
    request = tl.load(row_request_ptr + row)
    temperature = tl.load(temperature_ptr + request)
    min_tokens = tl.load(min_tokens_ptr + request)
    seed = tl.load(seed_ptr + request)
    draw = tl.load(draw_ptr + request)
    stop_ids = stop_ids_ptr + request * num_stop_ids
    logits = logits_ptr + row * logits_stride
    if BIASED:
        bias = bias_ptr + tl.load(bias_index_ptr + request).to(tl.int64) * vocab
    if CUT:
        lowest = tl.load(lowest_ptr + row)

    maximum = _FLOOR
    partial_sums = tl.zeros([BLOCK], dtype=tl.float32)
    best = float("-inf")
    picked = 0
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        # FLOOR for -inf and NaN keeps the maximum finite; a NaN still reaches the sum
        floored = tl.where(x > _FLOOR, x, _FLOOR)
        tile_maximum = tl.max(floored, axis=0)
        new_maximum = tl.maximum(maximum, tile_maximum)
        partial_sums = partial_sums * tl.exp(maximum - new_maximum) + tl.exp(x - new_maximum)
        maximum = new_maximum

        # No value of the tile lies above this bound (division and addition round monotonically),
        # and an equal one would lose to the lower id found before: most tiles need no noise.
        if BIASED:
            added = tl.load(bias + token, mask=token < vocab, other=0.0)
            x += added
            floored = tl.where(x > _FLOOR, x, _FLOOR)
            tile_maximum = tl.max(floored, axis=0)
        bound = tile_maximum
        if temperature > 0:
            bound = tl.maximum(tl.div_rn(tile_maximum, temperature) + _NOISE_BOUND, _FLOOR)
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

    total = tl.sum(partial_sums, axis=0)
    picked_logit = tl.load(logits + picked).to(tl.float32)
    tl.store(picked_ptr + row, picked)
    tl.store(picked_prob_ptr + row, tl.div_rn(tl.exp(picked_logit - maximum), total))
    given = tl.load(row_given_ptr + row)
    given_prob = 0.0
    if given >= 0:
        if given < vocab:
            given_logit = tl.load(logits + given).to(tl.float32)
            given_prob = tl.div_rn(tl.exp(given_logit - maximum), total)
    tl.store(given_prob_ptr + row, given_prob)


def token_stats(
    logits: torch.Tensor,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    row_given: torch.Tensor,
    *,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    draw: torch.Tensor,
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
        row_request: [N] int64, request slot of the row, an index of the per-request tensors.
        row_position: [N] int32, response position; -1 for an unused row, whose outputs are left
            alone (0 when allocated here).
        row_given: [N] int32, the token of ``given_prob``; -1 for none.
        temperature: [max_reqs] float32; 0 picks the argmax.
        seed: [max_reqs] int64, all 64 bits count.
        draw: [max_reqs] int32, how many draws the request has made before.
        min_tokens: [max_reqs] int32.
        stop_ids: [max_reqs, F] int32, padded with -1; not picked at positions < min_tokens.
        mask_token_id: never picked.
        limits: of requests that limit or bias what is picked; None reads nothing.
        out: results to write into, three contiguous [N] tensors; allocated when absent.

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
    _check_vector(rows, row_request, torch.int64)
    for tensor, dtype in ((row_position, torch.int32), (row_given, torch.int32)):
        _check_vector(rows, tensor, dtype)
    for tensor, dtype in zip(out, (torch.int32, torch.float32, torch.float32), strict=True):
        _check_vector(rows, tensor, dtype)
    _check_vector(requests, temperature, torch.float32)
    _check_vector(requests, seed, torch.int64)
    _check_vector(requests, draw, torch.int32)
    _check_vector(requests, min_tokens, torch.int32)
    assert stop_ids.dtype == torch.int32 and stop_ids.is_contiguous()
    if rows == 0:
        return out

    widest = GPU_TILE if logits.is_cuda else CPU_TILE
    block = min(widest, triton.next_power_of_2(vocab))
    num_warps = max(1, block // (THREADS_PER_WARP * TOKENS_PER_THREAD))
    biased, cut = limits is not None and limits.biased, limits is not None and limits.cuts
    lowest = None
    if cut:
        lowest = lowest_kept(
            logits,
            row_request,
            row_position,
            temperature=temperature,
            min_tokens=min_tokens,
            stop_ids=stop_ids,
            mask_token_id=mask_token_id,
            limits=limits,
            block=block,
            num_warps=num_warps,
        )
    _token_stats_kernel[(rows,)](
        logits,
        row_request,
        row_position,
        row_given,
        temperature,
        seed,
        draw,
        min_tokens,
        stop_ids,
        *out,
        limits.bias_index if biased else None,
        limits.bias if biased else None,
        lowest,
        logits.stride(0),
        vocab,
        num_stop_ids,
        mask_token_id,
        BIASED=biased,
        CUT=cut,
        BLOCK=block,
        num_warps=num_warps,
    )
    return out


def _check_vector(length: int, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    assert tensor.shape == (length,) and tensor.dtype == dtype and tensor.is_contiguous(), (
        f"expected a contiguous [{length}] {dtype}, got {list(tensor.shape)} {tensor.dtype}"
    )
