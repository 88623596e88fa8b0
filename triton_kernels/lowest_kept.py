"""The lowest score that min_p, top_k and top_p let a row pick (`decoding/picking.py`).

A float32's bits, with the lower 31 of a negative one flipped, are an int32 of the same order. So

    top_k:  the largest c with  #{s >= c} >= top_k
    top_p:  the largest c with  sum{s >= c} exp(s - max s) >= top_p * sum{s >= c0} exp(s - max s),
            c0: what min_p and top_k leave

are found exactly by halving a range of such integers 32 times: both left sides fall as c rises. One
program per row; rows whose request cuts nothing end at once. A row is read up to 66 times, mostly
from the L2 cache, for requests that ask for it and for no other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_refusion.decoding.picking import PickLimits
from vllm_refusion.triton_kernels.constant import Constant
from vllm_refusion.triton_kernels.token_stats_twin import FLOOR

_FLOOR = Constant(FLOOR)
_FLIP = Constant(0x7FFFFFFF)


@triton.jit
def order_key(x):
    """An int32 that orders as the float32 x does, 0.0 and -0.0 being equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ _FLIP, bits)


@triton.jit
def key_value(key):
    """The float32 of an ``order_key``."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ _FLIP, bits).to(tl.float32, bitcast=True)


@triton.jit
def _scores(logits, bias, start, vocab, temperature, mask_token_id, early, stop_ids, num_stop_ids,
            BIASED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Scores [BLOCK] of the tokens from ``start`` on: finite where allowed, else -inf."""
    token = start + tl.arange(0, BLOCK)
    score = tl.load(logits + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    if BIASED:
        added = tl.load(bias + token, mask=token < vocab, other=0.0)
        score = tl.div_rn(score + added, temperature)
    else:
        score = tl.div_rn(score, temperature)
    score = tl.where(score > _FLOOR, tl.minimum(score, -_FLOOR), _FLOOR)
    if BIASED:
        score = tl.where(added == float("-inf"), float("-inf"), score)
    score = tl.where(token < vocab, score, float("-inf"))
    score = tl.where(token != mask_token_id, score, float("-inf"))
    if early:
        for entry in range(num_stop_ids):
            score = tl.where(token != tl.load(stop_ids + entry), score, float("-inf"))
    return score


@triton.jit(do_not_specialize_on_alignment=["row_request_ptr", "row_position_ptr", "lowest_ptr"])
def _lowest_kept_kernel(
    logits_ptr,  # [N, V]
    row_request_ptr,  # [N] int64
    row_position_ptr,  # [N] int32
    temperature_ptr,  # [max_reqs] float32
    min_tokens_ptr,  # [max_reqs] int32
    stop_ids_ptr,  # [max_reqs, F] int32
    top_k_ptr,  # [max_reqs] int32
    top_p_ptr,  # [max_reqs] float32
    log_min_p_ptr,  # [max_reqs] float32
    bias_index_ptr,  # [max_reqs] int32
    bias_ptr,  # [B, V] float32
    lowest_ptr,  # [N] float32
    logits_stride,
    vocab,
    num_stop_ids,
    mask_token_id,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(row_position_ptr + row)
    if position < 0:
        return
    request = tl.load(row_request_ptr + row)
    temperature = tl.load(temperature_ptr + request)
    top_k = tl.load(top_k_ptr + request)
    top_p = tl.load(top_p_ptr + request)
    log_min_p = tl.load(log_min_p_ptr + request)
    tl.store(lowest_ptr + row, float("-inf"))
    cuts = (top_k > 0) | (top_p < 1) | (log_min_p > float("-inf"))
    if (temperature > 0) & cuts:
        early = position < tl.load(min_tokens_ptr + request)
        stop_ids = stop_ids_ptr + request * num_stop_ids
        logits = logits_ptr + row * logits_stride
        bias = bias_ptr + tl.load(bias_index_ptr + request).to(tl.int64) * vocab
        maximum = float("-inf")
        for start in range(0, vocab, BLOCK):
            score = _scores(logits, bias, start, vocab, temperature, mask_token_id, early,
                            stop_ids, num_stop_ids, BIASED, BLOCK)  # fmt: skip
            maximum = tl.maximum(maximum, tl.max(score, axis=0))
        lowest = tl.maximum(maximum + log_min_p, _FLOOR)

        if top_k > 0:
            # invariant: at least top_k scores (or all allowed ones) have keys of at least low
            low = order_key(tl.maximum(lowest, _FLOOR)).to(tl.int64)
            high = order_key(maximum).to(tl.int64)
            for _ in range(32):
                middle = (low + high + 1) >> 1
                count = 0
                for start in range(0, vocab, BLOCK):
                    score = _scores(logits, bias, start, vocab, temperature, mask_token_id, early,
                                    stop_ids, num_stop_ids, BIASED, BLOCK)  # fmt: skip
                    count += tl.sum((order_key(score) >= middle).to(tl.int32), axis=0)
                enough = count >= top_k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
            lowest = key_value(low)

        if top_p < 1:
            low = order_key(lowest).to(tl.int64)
            high = order_key(maximum).to(tl.int64)
            needed = 0.0
            for step in range(33):
                # the first step sums all that min_p and top_k leave
                middle = (low + high + 1) >> 1
                middle = tl.where(step == 0, low, middle)
                mass = tl.zeros([BLOCK], dtype=tl.float32)
                for start in range(0, vocab, BLOCK):
                    score = _scores(logits, bias, start, vocab, temperature, mask_token_id, early,
                                    stop_ids, num_stop_ids, BIASED, BLOCK)  # fmt: skip
                    mass += tl.where(order_key(score) >= middle, tl.exp(score - maximum), 0.0)
                total = tl.sum(mass, axis=0)
                needed = tl.where(step == 0, total * top_p, needed)
                enough = total >= needed
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
            lowest = key_value(low)
        tl.store(lowest_ptr + row, lowest)


def lowest_kept(
    logits: torch.Tensor,
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    *,
    temperature: torch.Tensor,
    min_tokens: torch.Tensor,
    stop_ids: torch.Tensor,
    mask_token_id: int,
    limits: PickLimits,
    block: int,
    num_warps: int,
) -> torch.Tensor:
    """[N] float32: the lowest score a used row may pick, -inf where its request cuts nothing.

    Arguments as of ``token_stats``, which checks them; ``block`` is the tile of a row.
    """
    lowest = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _lowest_kept_kernel[(len(logits),)](
        logits,
        row_request,
        row_position,
        temperature,
        min_tokens,
        stop_ids,
        limits.top_k,
        limits.top_p,
        limits.log_min_p,
        limits.bias_index,
        limits.bias,
        lowest,
        logits.stride(0),
        logits.shape[1],
        stop_ids.shape[1],
        mask_token_id,
        BIASED=limits.biased,
        BLOCK=block,
        num_warps=num_warps,
    )
    return lowest
