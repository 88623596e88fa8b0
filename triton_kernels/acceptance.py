"""Drawn acceptance: what decoding decides is drawn from a seed, so that dummy weights will do.

Only for benchmarks. It runs after ``token_stats`` and replaces its three results; the passes, the
kernels and the copies stay as they are. With s the request's seed, x a response position, t a
token, and philox(c0, c1, c2, c3) the words of Philox-4x32-10 with key s:

    token(x, draw)  = philox(0, x, draw, 1)[0] mod (ordinary tokens), never the excluded ones
    w               = philox(t, x, 0, 2)
    q(t, x)         = quantiles[w[0] >> 22]                   see vllm_refusion/engine/acceptance.py
    passes(t, x)    = uniform(w[1]) < q(t, x)
    certainty(t, x) = 1                  if uniform(w[2]) < slot_chance (first_chance at x = 0)
                      threshold * uniform(w[3])              otherwise

    picked      = t = token(x, draw)
    picked_prob = certainty(t, x)        if x is the first position of a slot, else q(t, x)
    given_prob  = 1 if passes(given, g) else 0               g: where a row's given token stands

In serial decoding draw 0 is what is picked, and a draft, of draw c > 0, is that if it passes:

    picked = token(x, 0) if c = 0 or passes(token(x, c), x), else token(x, c);   picked_prob = q

c says where its chain began, so that a draft made anew is right or wrong anew; one that is kept
stays what it is.

The picks of rows of tokens are corrections (algorithm section 8), drawn like any.

The outcome of a token is a function of the token, its position and the seed: any schedule of passes
that proposes it sees the same. picked_prob predicts the outcome without bias, as a calibrated
model's would. The seed's high word chooses the profile: a row of ``quantiles``, two chances.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_refusion.decoding.state import DecodeState
from vllm_refusion.triton_kernels.acceptance_twin import (
    OUTCOME,
    PICK,
    QUANTILE_BITS,
    QUANTILES,
    AcceptanceTables,
)
from vllm_refusion.triton_kernels.checks import check, check_rows
from vllm_refusion.triton_kernels.constant import Constant
from vllm_refusion.triton_kernels.sizes import cdiv
from vllm_refusion.triton_kernels.state_codes import (
    F_RESUME,
    F_SKIPS_KNOWN,
    IDLE,
    NUM_FIELDS,
    NUM_ROW_FIELDS,
    R_OWN_START,
    R_POSITION,
    R_TARGET,
    SERIAL,
)

_PICK = Constant(PICK)
_OUTCOME = Constant(OUTCOME)
_QUANTILES = Constant(QUANTILES)
_QUANTILE_SHIFT = Constant(32 - QUANTILE_BITS)
# The interpreter pays per program and operation.
GPU_ROWS = 128
CPU_ROWS = 4096


@triton.jit
def _uniform(word):
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24


@triton.jit
def _pick(seed, position, draw, ordinary, excluded_low, excluded_high):
    zero = tl.zeros_like(position)
    word, _, _, _ = tl.philox(seed, zero, position, draw, zero + _PICK)
    token = (word.to(tl.int64) & 0xFFFFFFFF) % ordinary
    token += (token >= excluded_low).to(tl.int64)
    token += (token >= excluded_high).to(tl.int64)
    return token.to(tl.int32)


@triton.jit
def _outcome(quantiles_ptr, profile, seed, token, position, used):
    """Probability and outcome of tokens, and two words for what a slot's first token decides."""
    zero = tl.zeros_like(position)
    word0, word1, word2, word3 = tl.philox(seed, token, position, zero, zero + _OUTCOME)
    entry = profile * _QUANTILES + (word0 >> _QUANTILE_SHIFT).to(tl.int64)
    probability = tl.load(quantiles_ptr + entry, mask=used, other=0.0)
    return probability, _uniform(word1) < probability, word2, word3


# Chunks of rows may start anywhere: no compilation per alignment of the per-row vectors.
@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=[
        "row_request_ptr",
        "row_position_ptr",
        "row_given_ptr",
        "row_given_at_ptr",
        "row_draw_ptr",
        "picked_ptr",
        "picked_prob_ptr",
        "given_prob_ptr",
    ],
)
def _acceptance_kernel(
    row_request_ptr,  # [N] int64
    row_position_ptr,  # [N] int32
    row_given_ptr,  # [N] int32
    row_given_at_ptr,  # [N] int32
    row_draw_ptr,  # [N] int32
    seed_ptr,  # [max_reqs] int64
    slot_size_ptr,  # [max_reqs] int32, strided
    slot_threshold_ptr,  # [max_reqs] float32, strided
    resume_ptr,  # [max_reqs] int32, strided
    quantiles_ptr,  # [F, QUANTILES] float32
    slot_chance_ptr,  # [F] float32
    first_chance_ptr,  # [F] float32
    picked_ptr,  # [N] int32
    picked_prob_ptr,  # [N] float32
    given_prob_ptr,  # [N] float32
    rows,
    slot_size_stride,
    slot_threshold_stride,
    resume_stride,
    num_profiles,
    ordinary,
    excluded_low,
    excluded_high,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(row_position_ptr + row, mask=row < rows, other=-1)
    used = position >= 0
    # the other inputs of an unused row may hold anything
    request = tl.load(row_request_ptr + row, mask=used, other=0)
    draw = tl.load(row_draw_ptr + row, mask=used, other=0)
    given = tl.load(row_given_ptr + row, mask=used, other=-1)
    given_at = tl.load(row_given_at_ptr + row, mask=used, other=0)
    seed = tl.load(seed_ptr + request, mask=used, other=0)
    size = tl.load(slot_size_ptr + request * slot_size_stride, mask=used, other=1)
    of_request = slot_threshold_ptr + request * slot_threshold_stride
    threshold = tl.load(of_request, mask=used, other=0.0)
    profile = tl.minimum((seed >> 32) & 0xFFFFFFFF, num_profiles - 1)

    zero = tl.zeros_like(position)
    token = _pick(seed, position, draw, ordinary, excluded_low, excluded_high)
    probability, right, word2, word3 = _outcome(quantiles_ptr, profile, seed, token, position, used)
    serial = tl.load(resume_ptr + request * resume_stride, mask=used, other=IDLE) == SERIAL
    in_order = _pick(seed, position, zero, ordinary, excluded_low, excluded_high)
    token = tl.where(serial & (draw > 0) & right, in_order, token)
    slot_chance = tl.load(slot_chance_ptr + profile, mask=used, other=0.0)
    first_chance = tl.load(first_chance_ptr + profile, mask=used, other=0.0)
    chance = tl.where(position == 0, first_chance, slot_chance)
    certainty = tl.where(_uniform(word2) < chance, 1.0, threshold * _uniform(word3))
    tl.store(picked_ptr + row, token, mask=used)
    is_first = (position % size == 0) & (serial == 0)
    tl.store(picked_prob_ptr + row, tl.where(is_first, certainty, probability), used)

    known = tl.maximum(given, 0)
    _, passes, _, _ = _outcome(quantiles_ptr, profile, seed, known, given_at, used)
    tl.store(given_prob_ptr + row, tl.where(given >= 0, passes.to(tl.float32), 0.0), mask=used)


def acceptance_stats(
    row_request: torch.Tensor,
    row_position: torch.Tensor,
    row_given: torch.Tensor,
    row_given_at: torch.Tensor,
    row_draw: torch.Tensor,
    *,
    seed: torch.Tensor,
    slot_size: torch.Tensor,
    slot_threshold: torch.Tensor,
    resume: torch.Tensor,
    tables: AcceptanceTables,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Replaces the results of ``token_stats`` for every used row.

    Args:
        row_request: [N] int64, request index of the row, an index of the per-request tensors.
        row_position: [>= N] int32, the response position that the row's token is picked for; -1 for
            an unused row, whose outputs are left alone.
        row_given: [>= N] int32, the token of ``given_prob``; -1 for none.
        row_given_at: [>= N] int32, its response position.
        row_draw: [>= N] int32, the draw that the row's token is picked for.
        seed: [max_reqs] int64. slot_size: [max_reqs] int32, any stride.
        slot_threshold: [max_reqs] float32, any stride; below 1, else no slot is ever certain.
        resume: [max_reqs] int32, any stride; SERIAL for requests in serial mode.
        tables: on the same device.
        out: picked [>= N] int32, picked_prob and given_prob [>= N] float32.
    """
    rows, requests, profiles = len(row_request), len(seed), len(tables.slot_chance)
    check(row_request, (rows,), torch.int64)
    for tensor in (row_position, row_given, row_given_at, row_draw):
        check_rows(tensor, rows, torch.int32)
    for tensor, dtype in zip(out, (torch.int32, torch.float32, torch.float32), strict=True):
        check_rows(tensor, rows, dtype)
    check(seed, (requests,), torch.int64)
    assert slot_size.shape == (requests,) and slot_size.dtype == torch.int32
    assert slot_threshold.shape == (requests,) and slot_threshold.dtype == torch.float32
    assert resume.shape == (requests,) and resume.dtype == torch.int32
    check(tables.quantiles, (profiles, QUANTILES), torch.float32)
    check(tables.slot_chance, (profiles,), torch.float32)
    check(tables.first_chance, (profiles,), torch.float32)
    low, high = tables.excluded
    assert 0 <= low <= high <= tables.vocab and (low < high or low == tables.vocab)
    if rows == 0:
        return
    block = GPU_ROWS if row_request.is_cuda else CPU_ROWS
    _acceptance_kernel[(cdiv(rows, block),)](
        row_request,
        row_position,
        row_given,
        row_given_at,
        row_draw,
        seed,
        slot_size,
        slot_threshold,
        resume,
        tables.quantiles,
        tables.slot_chance,
        tables.first_chance,
        *out,
        rows,
        slot_size.stride(0),
        slot_threshold.stride(0),
        resume.stride(0),
        profiles,
        tables.vocab - (low < tables.vocab) - (high < tables.vocab),
        low,
        high,
        BLOCK=block,
    )


@triton.jit(do_not_specialize=["rows"])
def _replayed_rows_kernel(
    ints_ptr,  # [max_reqs, NUM_FIELDS] int32
    by_row_ptr,  # [max_reqs, NUM_ROW_FIELDS, W] int32
    canvas_token_ptr,  # [max_reqs, W] int64
    row_request_ptr,  # [N] int64
    canvas_row_ptr,  # [N] int32
    row_draw_ptr,  # [>= N] int32
    replayed_ptr,  # [2, M] int32
    rows,
    replayed_stride,
    canvas_length,
    mask_token_id,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < rows
    request = tl.load(row_request_ptr + index, mask=exists, other=0)
    row = tl.load(canvas_row_ptr + index, mask=exists, other=0)
    ints = ints_ptr + request * NUM_FIELDS
    at = by_row_ptr + request * NUM_ROW_FIELDS * canvas_length + row
    position = tl.load(at + R_POSITION * canvas_length, mask=exists, other=0)
    behind = row - tl.load(at + R_OWN_START * canvas_length, mask=exists, other=0)
    lead = 1 - tl.load(ints + F_SKIPS_KNOWN, mask=exists, other=0)
    token = tl.load(canvas_token_ptr + request * canvas_length + row, mask=exists, other=0)
    serial = tl.load(ints + F_RESUME, mask=exists, other=IDLE) == SERIAL
    is_draft = serial & (behind >= lead) & (token == mask_token_id)
    target = tl.load(at + R_TARGET * canvas_length, mask=exists, other=0)
    draw = tl.load(row_draw_ptr + index, mask=exists, other=0)
    draw = tl.where(is_draft, target - behind + 1, draw)
    tl.store(replayed_ptr + index, position + 1, mask=exists)
    tl.store(replayed_ptr + replayed_stride + index, draw, mask=exists)


def replayed_rows(
    state: DecodeState,
    row_request: torch.Tensor,
    canvas_row: torch.Tensor,
    row_draw: torch.Tensor,
    replayed: torch.Tensor,
) -> None:
    """Same arguments and effects as ``replayed_rows_twin``, as one kernel."""
    rows = len(row_request)
    check(row_request, (rows,), torch.int64)
    check(canvas_row, (rows,), torch.int32)
    check_rows(row_draw, rows, torch.int32)
    check(replayed, (2, replayed.shape[1]), torch.int32)
    assert rows <= replayed.shape[1]
    if rows == 0:
        return
    block = GPU_ROWS if row_request.is_cuda else CPU_ROWS
    _replayed_rows_kernel[(cdiv(rows, block),)](
        state.ints,
        state.by_row,
        state.canvas_token,
        row_request,
        canvas_row,
        row_draw,
        replayed,
        rows,
        replayed.stride(0),
        state.canvas_length,
        state.mask_token_id,
        BLOCK=block,
    )
