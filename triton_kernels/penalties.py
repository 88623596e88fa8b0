"""Penalties and bad words: what the tokens before a position do to its row of logits.

``vllm_refusion/decoding/penalties.py`` has the formula. The tokens before a row of serial decoding
are the prompt's, the response so far, and the drafts that the row sees: of a token's row those up
to it, of a mask's those that its chain is for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_refusion.decoding.penalties import MAX_BAD_WORDS, Penalties
from vllm_refusion.decoding.state import DecodeState
from vllm_refusion.triton_kernels.checks import check
from vllm_refusion.triton_kernels.constant import Constant
from vllm_refusion.triton_kernels.sizes import cdiv, next_power_of_2
from vllm_refusion.triton_kernels.state_codes import (
    F_EMITTED,
    H_RESPONSE,
    NUM_FIELDS,
    NUM_HISTORY_FIELDS,
    NUM_ROW_FIELDS,
    R_RUN_END,
)

_WORDS = Constant(MAX_BAD_WORDS)
# The interpreter pays per program and operation.
GPU_TILE = 2048
CPU_TILE = 65536


@triton.jit
def _drafts_seen(by_row_ptr, tokens, request, row, canvas, mask_token_id):
    run_end = tl.load(by_row_ptr + (request * NUM_ROW_FIELDS + R_RUN_END) * canvas + row)
    is_mask = tl.load(tokens + row) == mask_token_id
    return tl.where(is_mask, tl.maximum(run_end - 1, 0), row)


# Chunks of rows may start anywhere: no compilation per alignment of the per-row vectors.
@triton.jit(
    do_not_specialize_on_alignment=["row_request_ptr", "row_ptr", "row_position_ptr"],
)
def _penalties_kernel(
    logits_ptr,  # [N, V] float32
    row_request_ptr,  # [N] int64
    row_ptr,  # [N] int32
    row_position_ptr,  # [N] int32
    index_ptr,  # [max_reqs] int32
    factors_ptr,  # [1 + B, 3] float32
    bias_ptr,  # [1 + B, V] float32
    seen_ptr,  # [1 + B, V] int32
    by_row_ptr,  # [max_reqs, fields, canvas] int32
    canvas_token_ptr,  # [max_reqs, canvas] int64
    logits_stride,
    vocab,
    canvas,
    mask_token_id,
    BLOCK: tl.constexpr,
):
    """One program per row and tile of the vocabulary."""
    n = tl.program_id(0).to(tl.int64)
    # the other inputs of an unused row may hold anything
    if tl.load(row_position_ptr + n) < 0:
        return
    request = tl.load(row_request_ptr + n)
    table = tl.load(index_ptr + request).to(tl.int64)
    if table == 0:
        return
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    tokens = canvas_token_ptr + request * canvas
    row = tl.load(row_ptr + n)
    drafts = _drafts_seen(by_row_ptr, tokens, request, row, canvas, mask_token_id)

    seen = tl.load(seen_ptr + table * vocab + token, mask=inside, other=0)
    count = seen >> 1
    for draft in range(drafts):
        count += (token == tl.load(tokens + 1 + draft)).to(tl.int32)
    in_response = (count > 0).to(tl.int32)

    repetition = tl.load(factors_ptr + 3 * table)
    frequency = tl.load(factors_ptr + 3 * table + 1)
    presence = tl.load(factors_ptr + 3 * table + 2)
    at = logits_ptr + n * logits_stride + token
    score = tl.load(at, mask=inside, other=0.0)
    score += tl.load(bias_ptr + table * vocab + token, mask=inside, other=0.0)
    scale = tl.where(((seen & 1) | in_response) > 0, repetition, 1.0)
    score *= tl.where(score > 0, tl.div_rn(1.0, scale), scale)
    score -= frequency * count
    score -= presence * in_response
    tl.store(at, score, mask=inside)


@triton.jit(
    do_not_specialize_on_alignment=["row_request_ptr", "row_ptr", "row_position_ptr"],
)
def _bad_words_kernel(
    logits_ptr,  # [N, V] float32
    row_request_ptr,  # [N] int64
    row_ptr,  # [N] int32
    row_position_ptr,  # [N] int32
    index_ptr,  # [max_reqs] int32
    start_ptr,  # [1 + B, WORDS] int32, strided
    length_ptr,  # [1 + B, WORDS] int32, strided
    token_ptr,  # [1 + B, tokens] int32, strided
    ints_ptr,  # [max_reqs, fields] int32
    by_row_ptr,  # [max_reqs, fields, canvas] int32
    canvas_token_ptr,  # [max_reqs, canvas] int64
    history_ptr,  # [max_reqs, fields, max_response] int32
    logits_stride,
    words_stride,
    canvas,
    max_response,
    mask_token_id,
):
    """One program per row, a lane for each word."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(row_position_ptr + n) < 0:
        return
    request = tl.load(row_request_ptr + n)
    table = tl.load(index_ptr + request).to(tl.int64)
    if table == 0:
        return
    word = tl.arange(0, _WORDS)
    start = tl.load(start_ptr + table * words_stride + word)
    length = tl.load(length_ptr + table * words_stride + word)
    tokens = canvas_token_ptr + request * canvas
    row = tl.load(row_ptr + n)
    drafts = _drafts_seen(by_row_ptr, tokens, request, row, canvas, mask_token_id)
    known = tl.load(ints_ptr + request * NUM_FIELDS + F_EMITTED)
    response = history_ptr + (request * NUM_HISTORY_FIELDS + H_RESPONSE) * max_response

    before = length - 1  # tokens of the word that the response has to end in
    first = known + drafts - before
    matches = (length > 0) & (first >= 0)
    for i in range(tl.max(before, axis=0)):
        compared = matches & (i < before)
        at = first + i
        wanted = tl.load(token_ptr + table * words_stride + start + i, mask=compared, other=0)
        of_response = tl.load(response + at, mask=compared & (at < known), other=0)
        of_draft = tl.load(tokens + 1 + at - known, mask=compared & (at >= known), other=0)
        found = tl.where(at < known, of_response, of_draft.to(tl.int32))
        matches = matches & ((i >= before) | (found == wanted))
    last = tl.load(token_ptr + table * words_stride + start + before, mask=matches, other=0)
    tl.store(logits_ptr + n * logits_stride + last, float("-inf"), mask=matches)


def apply_penalties(
    logits: torch.Tensor,
    row_request: torch.Tensor,
    row: torch.Tensor,
    row_position: torch.Tensor,
    state: DecodeState,
    penalties: Penalties,
) -> None:
    """Changes the rows of requests with penalties or bad words, in place; waits for nothing.

    Args:
        logits: [N, V] float32, V contiguous.
        row_request: [N] int64, request index of the row.
        row: [N] int32, its row of the request's canvas.
        row_position: [N] int32, response position; -1 for an unused row, which is left alone.
    """
    rows, vocab = logits.shape
    assert logits.dtype == torch.float32 and vocab and logits.stride(1) == 1
    assert vocab == penalties.vocab
    check(row_request, (rows,), torch.int64)
    for tensor in (row, row_position):
        check(tensor, (rows,), torch.int32)
    if rows == 0:
        return
    block = min(GPU_TILE if logits.is_cuda else CPU_TILE, next_power_of_2(vocab))
    of_row = (logits, row_request, row, row_position, penalties.index)
    _penalties_kernel[(rows, cdiv(vocab, block))](
        *of_row, penalties.factors, penalties.bias, penalties.seen,
        state.by_row, state.canvas_token,
        logits.stride(0), vocab, state.canvas_length, state.mask_token_id,
        BLOCK=block,
    )  # fmt: skip
    words = penalties.word_start, penalties.word_length, penalties.word_tokens
    _bad_words_kernel[(rows,)](
        *of_row, *words, state.ints, state.by_row, state.canvas_token, state.history,
        logits.stride(0), words[0].stride(0), state.canvas_length, state.max_response,
        state.mask_token_id,
        num_warps=1,
    )  # fmt: skip
