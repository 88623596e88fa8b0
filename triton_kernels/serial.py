"""The state transition of serial decoding (section 7), decided on the device.

One program moves one request; of others it touches nothing. What a canvas holds is described in
``serial_twin``, whose steps have the same names here. Lanes stand for numbers of accepted drafts
(the draft behind so many, the chain that follows them), or for canvas rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_refusion.decoding.speculation import (
    CERTAIN,
    LARGEST_COST,
    LEVELS,
    Speculation,
    device_table,
)
from vllm_refusion.decoding.state import ACCEPTANCE_WINDOW, DecodeState
from vllm_refusion.triton_kernels.checks import check, check_pass
from vllm_refusion.triton_kernels.constant import Constant
from vllm_refusion.triton_kernels.lanes import (
    NOWHERE,
    at_lane,
    first,
    lanes_of,
)
from vllm_refusion.triton_kernels.serial_twin import GIVEN
from vllm_refusion.triton_kernels.sizes import lanes_of_canvas
from vllm_refusion.triton_kernels.state_codes import (
    COUNT_DRAFTS_PASSED,
    COUNT_DRAFTS_TESTED,
    COUNT_IDLE,
    COUNT_RIDER_ROWS_FED,
    COUNT_ROWS_FED,
    COUNT_SERIAL,
    COUNT_TOKENS,
    DONE,
    F_BLOCK_START,
    F_CANVAS,
    F_DRAFTS,
    F_EMITTED,
    F_EOS,
    F_LAST_TOKENS,
    F_MASKED_STARTS,
    F_MAX_TOKENS,
    F_MOST_MASKS,
    F_MOST_TESTS,
    F_PASSED,
    F_PASSES,
    F_PHASE,
    F_RESUME,
    F_ROWS,
    F_SKIPS_KNOWN,
    F_SLOT_SIZE,
    F_TESTED,
    F_TESTS,
    H_RESPONSE,
    IDLE,
    NUM_FIELDS,
    NUM_HISTORY_FIELDS,
    NUM_POSITION_FIELDS,
    NUM_ROW_FIELDS,
    P_CANVAS_ROW,
    P_CONFIDENCE,
    P_PICK_ROW,
    P_RIDER_ROW,
    P_RIDER_WIDTH,
    P_TEST_ROW,
    P_TOKEN,
    PREFILL,
    R_CONTEXT,
    R_DRAW,
    R_OWN_START,
    R_POSITION,
    R_RUN_END,
    R_RUN_START,
    R_TARGET,
    SERIAL,
)
from vllm_refusion.triton_kernels.worth import acceptance, chance_of, level_of

SEARCH_STEPS = LARGEST_COST.bit_length()
_ACCEPTANCE_WINDOW = Constant(ACCEPTANCE_WINDOW)
_CERTAIN = Constant(CERTAIN)
_GIVEN = Constant(GIVEN)
_LARGEST_COST = Constant(LARGEST_COST)
_LEVELS = Constant(LEVELS)
_SEARCH_STEPS = Constant(SEARCH_STEPS)


class Drafts(NamedTuple):
    """Drafts of the positions behind the known tokens: [LANES] each, and their number."""

    token: tl.tensor
    confidence: tl.tensor
    number: tl.tensor


class Picks(NamedTuple):
    """What a pass picked; ``accepted``, ``new``, ``tested``: numbers of tokens.

    Attributes:
        token, row: [LANES], the token behind so many accepted drafts, and the row that picks it.
        refused: whether a draft is not what was picked. ends: whether the response does.
    """

    token: tl.tensor
    row: tl.tensor
    accepted: tl.tensor
    new: tl.tensor
    tested: tl.tensor
    refused: tl.tensor
    ends: tl.tensor


class Worth(NamedTuple):
    """What chains are worth; ``comes_true``: [LANES], the chance that one does.

    Attributes:
        starts: [LANES], whether its first mask picks a token. leads: whether it drafts none.
        most: [LANES], drafts that it may have. each: the cost of a draft. table: ``device_table``.
    """

    comes_true: tl.tensor
    starts: tl.tensor
    leads: tl.tensor
    most: tl.tensor
    each: tl.tensor
    table: tl.tensor


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _starts_slot(position, ints):
    """Whether the token there is picked in the row of a mask; 0 or 1."""
    starts = (position % tl.load(ints + F_SLOT_SIZE)) == 0
    return (starts & (tl.load(ints + F_MASKED_STARTS) > 0)).to(tl.int32)


@triton.jit
def _leads(position, ints):
    """Masks of a chain from there on that draft nothing; 0 or 1."""
    return tl.where(tl.load(ints + F_SKIPS_KNOWN) > 0, _starts_slot(position, ints), 1)


@triton.jit
def _cost_of(chance, table):
    """The lowest cost [LANES] whose chance is at most that."""
    low = tl.zeros_like(chance).to(tl.int32)
    high = low + _LARGEST_COST
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) // 2
        above = chance_of(middle, table).to(tl.int64) > chance
        high = tl.where((low < high) & (above == 0), middle, high)
        low = tl.where((low < high) & above, middle + 1, low)
    return low


@triton.jit
def _decide(drafts, chain_row, picked, ints, known, fed, lanes):
    """Accepts drafts while they are what is picked."""
    j = lanes.p
    under_test = tl.maximum(tl.minimum(tl.load(ints + F_TESTS), fed - 1), 0)
    row = tl.where(_starts_slot(known + j, ints) > 0, chain_row, j)
    valid = (row >= 0) & (row < fed)
    token = tl.load(picked + row, mask=valid, other=-1)
    accepted = first((valid & (j < under_test) & (token == drafts.token)) == 0, lanes)
    last = at_lane(valid.to(tl.int32), lanes, accepted)
    differs = at_lane((token != drafts.token).to(tl.int32), lanes, accepted)
    refused = tl.where(accepted < drafts.number, last * differs, 0)
    tested = accepted + tl.where(accepted < under_test, refused, 0)
    left = tl.load(ints + F_MAX_TOKENS) - known
    new = tl.minimum(accepted + last, left)
    eos = tl.load(ints + F_EOS)
    cut = first((token == eos) & (j < new) & (eos >= 0), lanes)
    ends = (cut < NOWHERE) | (new == left)
    new = tl.minimum(new, cut + 1)
    return Picks(token, row, accepted, new, tested, refused, ends.to(tl.int32))


@triton.jit
def _take_drafts(
    drafts, picks, chain_row, chain_width, leads, picked, picked_prob, fed, lanes
):  # fmt: skip
    """The drafts from now on: those of the chain that came true, else old ones that may."""
    j = lanes.p
    row = at_lane(chain_row, lanes, picks.accepted)
    lead = at_lane(leads, lanes, picks.accepted)
    of_chain = tl.minimum(row + at_lane(chain_width, lanes, picks.accepted), fed) - row - lead
    if (row >= 0) & (of_chain > 0):
        number = of_chain
        token = tl.load(picked + row + lead + j, mask=j < number, other=0)
        confidence = tl.load(picked_prob + row + lead + j, mask=j < number, other=0.0)
    else:
        number = tl.where(picks.refused > 0, 0, tl.maximum(drafts.number - picks.new, 0))
        behind = tl.minimum(j + picks.new, lanes.last)
        token = tl.gather(drafts.token, behind, axis=0)
        confidence = tl.gather(drafts.confidence, behind, axis=0)
    return Drafts(token, confidence, number)


@triton.jit
def _chain_widths(worth, price, lanes):
    """Masks of each chain: those worth their ``price``; see the twin."""
    comes_true = tl.maximum(worth.comes_true, 1).to(tl.int64)
    number = (_cost_of(price + price * _CERTAIN // comes_true, worth.table) - 1) // worth.each
    number = tl.minimum(tl.maximum(number, 0), worth.most)
    one = chance_of(worth.each, worth.table).to(tl.int64)
    through = one - chance_of(worth.each * (tl.maximum(number, 0) + 1), worth.table)
    drafted = through * _CERTAIN // (_CERTAIN - one)
    gain = comes_true * (drafted - number * price) // _CERTAIN
    gain -= price * (number + worth.leads - worth.starts)
    pays = (worth.comes_true > 0) & (number > 0) & (gain > 0)
    return tl.where(pays, number + worth.leads, worth.starts)


@triton.jit
def _compose(
    drafts, last, ints, known, tested, passed, price, prior, mask_token_id, positions, rows,
    tokens, table, CANVAS: tl.constexpr, lanes,
):  # fmt: skip
    """Writes the next canvas, at least one token being known."""
    j = lanes.p
    cost = tl.load(table + level_of(drafts.confidence), mask=j < drafts.number, other=0)
    through = tl.cumsum(cost, axis=0)
    chance, chance_before = chance_of(through, table), chance_of(through - cost, table)
    max_tokens = tl.load(ints + F_MAX_TOKENS)
    most = tl.minimum(drafts.number, max_tokens - known - 1)
    most = tl.minimum(most, tl.load(ints + F_MOST_TESTS))
    with_start = 1 + _starts_slot(known + j + 1, ints)
    tests = first(((j < most) & (chance > with_start * price)) == 0, lanes)

    starts, leads = _starts_slot(known + j, ints), _leads(known + j, ints)
    worth = Worth(
        chance_before - tl.where(j < tests, chance, 0),
        starts,
        leads,
        tl.minimum(tl.load(ints + F_MOST_MASKS) - leads, max_tokens - 2 - known - j),
        tl.load(table + acceptance(passed, tested, prior)),
        table,
    )
    room = CANVAS - 1 - tests
    width = tl.where(j <= tests, _chain_widths(worth, price, lanes), 0)
    while tl.sum(width, axis=0) > room:
        price = 2 * price + _LEVELS
        width = tl.where(j <= tests, _chain_widths(worth, price, lanes), 0)
    through_width = tl.cumsum(width, axis=0)
    total = tl.sum(width, axis=0)
    start = 1 + tests + tl.where(j > 0, at_lane(width, lanes, 0) + total - through_width, 0)
    canvas = 1 + tests + total
    needed = tl.where(at_lane(starts, lanes, 0) > 0, 2 + tests, 1)

    in_canvas = j < CANVAS
    # the chain that begins at a row, then for each row the one that it belongs to
    tl.store(positions + P_CANVAS_ROW * CANVAS + j, tl.zeros_like(j) - 1, mask=in_canvas)
    tl.debug_barrier()
    tl.store(positions + P_CANVAS_ROW * CANVAS + start, j, mask=width > 0)
    chain_row = tl.where(width > 0, start, -1)
    tl.store(positions + P_RIDER_ROW * CANVAS + j, chain_row, mask=in_canvas)
    tl.store(positions + P_RIDER_WIDTH * CANVAS + j, width, mask=in_canvas)
    tl.store(positions + P_TOKEN * CANVAS + j, drafts.token, mask=j < drafts.number)
    confidence = drafts.confidence.to(tl.int32, bitcast=True)
    tl.store(positions + P_CONFIDENCE * CANVAS + j, confidence, mask=j < drafts.number)
    tl.debug_barrier()
    begins = tl.load(positions + P_CANVAS_ROW * CANVAS + j, mask=in_canvas, other=-1) >= 0
    own_start = tl.associative_scan(tl.where(begins, j, 0), 0, _maximum)
    chain = tl.load(positions + P_CANVAS_ROW * CANVAS + own_start)
    used, is_mask = j < canvas, j > tests
    behind = known + chain + 1 - _leads(known + chain, ints) + j - own_start
    target = tl.where(is_mask, behind, known + j)
    fed = tl.gather(drafts.token, tl.maximum(j - 1, 0), axis=0)
    fed = tl.where(is_mask, mask_token_id, tl.where(j > 0, fed, last))
    position = tl.where(is_mask, behind, known - 1 + j)
    zero = tl.zeros_like(j)
    tl.store(tokens + j, fed.to(tl.int64), mask=used)
    at = rows + j
    tl.store(at + R_POSITION * CANVAS, tl.where(used, position, -1), mask=in_canvas)
    tl.store(at + R_TARGET * CANVAS, tl.where(used, target, -1), mask=in_canvas)
    tl.store(at + R_DRAW * CANVAS, zero, mask=used)
    tl.store(at + R_CONTEXT * CANVAS, zero, mask=used)
    tl.store(at + R_RUN_START * CANVAS, zero, mask=used)
    tl.store(at + R_RUN_END * CANVAS, tl.where(is_mask, chain + 1, 0), mask=used)
    tl.store(at + R_OWN_START * CANVAS, tl.where(is_mask, own_start, 0), mask=used)
    tl.store(ints + F_DRAFTS, drafts.number)
    tl.store(ints + F_TESTS, tests)
    tl.store(ints + F_ROWS, needed)
    tl.store(ints + F_CANVAS, canvas)


@triton.jit(do_not_specialize=["row_price", "prior"])
def _serial_kernel(
    ints_ptr,  # [max_reqs, NUM_FIELDS] int32
    by_position_ptr,  # [max_reqs, NUM_POSITION_FIELDS, W] int32
    by_row_ptr,  # [max_reqs, NUM_ROW_FIELDS, W] int32
    history_ptr,  # [max_reqs, NUM_HISTORY_FIELDS, P] int32
    canvas_token_ptr,  # [max_reqs, W] int64
    counters_ptr,  # [NUM_COUNTERS] int64
    idx_mapping_ptr,  # [R] int64
    query_start_loc_ptr,  # [R+1] int32
    logits_start_ptr,  # [R+1] int32
    num_computed_ptr,  # [max_reqs] int32
    prefill_len_ptr,  # [max_reqs] int32
    picked_ptr,  # [rows] int32
    picked_prob_ptr,  # [rows] float32
    sampled_ptr,  # [R, W] int32
    num_sampled_ptr,  # [R] int32
    num_rejected_ptr,  # [R] int32
    table_ptr,  # see device_table
    max_response,
    mask_token_id,
    row_price,
    prior,
    CANVAS: tl.constexpr,
    LANES: tl.constexpr,
):
    index = tl.program_id(0)
    req = tl.load(idx_mapping_ptr + index).to(tl.int64)
    ints = ints_ptr + req * NUM_FIELDS
    phase = tl.load(ints + F_PHASE)
    if (phase == IDLE) | (tl.load(ints + F_RESUME) != SERIAL):
        return
    query_len = tl.load(query_start_loc_ptr + index + 1) - tl.load(query_start_loc_ptr + index)
    first_row = tl.load(logits_start_ptr + index).to(tl.int64)
    decode_rows = tl.load(logits_start_ptr + index + 1) - first_row
    positions = by_position_ptr + req * NUM_POSITION_FIELDS * CANVAS
    known = tl.load(ints + F_EMITTED)
    needed = tl.load(ints + F_ROWS)
    next_phase = phase
    kept = 0
    # rows without statistics are of a prefill: tokens that it need not feed
    decides = (phase == SERIAL) & (decode_rows >= query_len)
    if phase == PREFILL:
        left = tl.load(prefill_len_ptr + req) - tl.load(num_computed_ptr + req)
        kept = tl.minimum(query_len, left)
        next_phase = tl.where(query_len >= left, SERIAL, PREFILL)
        decides = (query_len >= left) & (known == 0)
    fed = tl.minimum(query_len - kept, tl.load(ints + F_CANVAS))
    decides = decides & (needed <= tl.minimum(fed, decode_rows))
    new = 0
    lanes = lanes_of(tl.load(ints + F_SLOT_SIZE), LANES)
    at, mask = positions + lanes.p, lanes.p < CANVAS
    nowhere = tl.zeros_like(lanes.p) - 1
    pick_row = nowhere
    if decides:
        confidence = tl.load(at + P_CONFIDENCE * CANVAS, mask=mask, other=0)
        drafts = Drafts(
            tl.load(at + P_TOKEN * CANVAS, mask=mask, other=0),
            confidence.to(tl.float32, bitcast=True),
            tl.load(ints + F_DRAFTS),
        )
        chain_row = tl.load(at + P_RIDER_ROW * CANVAS, mask=mask, other=-1)
        chain_width = tl.load(at + P_RIDER_WIDTH * CANVAS, mask=mask, other=0)
        picked, picked_prob = picked_ptr + first_row, picked_prob_ptr + first_row
        picks = _decide(drafts, chain_row, picked, ints, known, fed, lanes)
        new = picks.new
        pick_row = tl.where(lanes.p < new, picks.row, -1)
        kept += tl.where(known > 0, new, 0)
        tested = tl.load(ints + F_TESTED) + picks.tested
        passed = tl.load(ints + F_PASSED) + picks.accepted
        halves = (tested >= _ACCEPTANCE_WINDOW).to(tl.int32)
        leads = _leads(known + lanes.p, ints)
        drafts = _take_drafts(
            drafts, picks, chain_row, chain_width, leads, picked, picked_prob, fed, lanes
        )
        # Every load of the old state comes before every store of the new one.
        tl.debug_barrier()
        response = history_ptr + req * NUM_HISTORY_FIELDS * max_response + H_RESPONSE * max_response
        tl.store(response + known + lanes.p, picks.token, mask=lanes.p < new)
        tl.store(sampled_ptr + index * CANVAS + lanes.p, picks.token, mask=lanes.p < new)
        if picks.ends > 0:
            next_phase = DONE
        else:
            last = at_lane(picks.token, lanes, new - 1)
            _compose(
                drafts, last, ints, known + new, tested >> halves, passed >> halves,
                row_price.to(tl.int64), prior, mask_token_id, positions,
                by_row_ptr + req * NUM_ROW_FIELDS * CANVAS, canvas_token_ptr + req * CANVAS,
                table_ptr, CANVAS, lanes,
            )  # fmt: skip
        tl.store(ints + F_PASSES, tl.load(ints + F_PASSES) + 1)
        tl.store(ints + F_TESTED, tested >> halves)
        tl.store(ints + F_PASSED, passed >> halves)
        tl.store(ints + F_EMITTED, known + new)
        tl.store(ints + F_BLOCK_START, known)
        tl.store(ints + F_LAST_TOKENS, new)
        tl.atomic_add(counters_ptr + COUNT_SERIAL, 1)
        tl.atomic_add(counters_ptr + COUNT_ROWS_FED, fed)
        tl.atomic_add(counters_ptr + COUNT_RIDER_ROWS_FED, fed - needed)
        tl.atomic_add(counters_ptr + COUNT_TOKENS, new)
        tl.atomic_add(counters_ptr + COUNT_DRAFTS_TESTED, picks.tested)
        tl.atomic_add(counters_ptr + COUNT_DRAFTS_PASSED, picks.accepted)
    elif (phase == SERIAL) | (phase == DONE):
        tl.atomic_add(counters_ptr + COUNT_IDLE, 1)
    tl.store(at + P_PICK_ROW * CANVAS, pick_row, mask=mask)
    tl.store(at + P_TEST_ROW * CANVAS, nowhere, mask=mask)
    tl.store(num_sampled_ptr + index, new)
    tl.store(num_rejected_ptr + index, query_len - kept)
    tl.store(ints + F_PHASE, next_phase)


def serial_transition(
    state: DecodeState,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    logits_start: torch.Tensor,
    num_computed: torch.Tensor,
    prefill_len: torch.Tensor,
    picked: torch.Tensor,
    picked_prob: torch.Tensor,
    sampled: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
    speculation: Speculation,
) -> None:
    """Same arguments and effects as ``serial_transition_twin``, as one kernel."""
    check_pass(
        state,
        idx_mapping,
        (query_start_loc, logits_start),
        (num_computed, prefill_len),
        picked,
        (picked_prob,),
        sampled,
        (num_sampled, num_rejected),
    )
    assert 0 <= speculation.row_price <= CERTAIN, speculation
    assert 0 < speculation.prior < LEVELS, speculation
    _serial_kernel[(len(idx_mapping),)](
        state.ints,
        state.by_position,
        state.by_row,
        state.history,
        state.canvas_token,
        state.counters,
        idx_mapping,
        query_start_loc,
        logits_start,
        num_computed,
        prefill_len,
        picked,
        picked_prob,
        sampled,
        num_sampled,
        num_rejected,
        device_table(state.device),
        state.max_response,
        state.mask_token_id,
        speculation.row_price,
        speculation.prior,
        **lanes_of_canvas(state.canvas_length),
    )


@triton.jit(do_not_specialize=["row_price", "prior"])
def _give_drafts_kernel(
    ints_ptr,  # [max_reqs, NUM_FIELDS] int32
    by_position_ptr,  # [max_reqs, NUM_POSITION_FIELDS, W] int32
    by_row_ptr,  # [max_reqs, NUM_ROW_FIELDS, W] int32
    canvas_token_ptr,  # [max_reqs, W] int64
    reqs_ptr,  # [K] int64
    drafts_ptr,  # [K, W] int32
    table_ptr,  # see device_table
    mask_token_id,
    row_price,
    prior,
    CANVAS: tl.constexpr,
    LANES: tl.constexpr,
):
    index = tl.program_id(0)
    req = tl.load(reqs_ptr + index).to(tl.int64)
    ints = ints_ptr + req * NUM_FIELDS
    known = tl.load(ints + F_EMITTED)
    if (tl.load(ints + F_PHASE) != SERIAL) | (known == 0):
        return
    lanes = lanes_of(tl.load(ints + F_SLOT_SIZE), LANES)
    j, mask = lanes.p, lanes.p < CANVAS
    positions = by_position_ptr + req * NUM_POSITION_FIELDS * CANVAS
    tokens = canvas_token_ptr + req * CANVAS
    given = tl.load(drafts_ptr + index * CANVAS + j, mask=mask, other=-1)
    number = tl.minimum(first(given < 0, lanes), CANVAS)
    old = tl.load(positions + P_TOKEN * CANVAS + j, mask=mask, other=-1)
    confidence = tl.load(positions + P_CONFIDENCE * CANVAS + j, mask=mask, other=0)
    kept = (given == old) & (j < tl.load(ints + F_DRAFTS))
    confidence = tl.where(kept, confidence.to(tl.float32, bitcast=True), _GIVEN)
    last = tl.load(tokens).to(tl.int32)
    tested, passed = tl.load(ints + F_TESTED), tl.load(ints + F_PASSED)
    # Every load of the old state comes before every store of the new one.
    tl.debug_barrier()
    _compose(
        Drafts(given, confidence, number), last, ints, known, tested, passed,
        row_price.to(tl.int64), prior, mask_token_id, positions,
        by_row_ptr + req * NUM_ROW_FIELDS * CANVAS, tokens, table_ptr, CANVAS, lanes,
    )  # fmt: skip


def give_drafts(
    state: DecodeState, reqs: torch.Tensor, drafts: torch.Tensor, speculation: Speculation
) -> None:
    """Same arguments and effects as ``give_drafts_twin``, as one kernel."""
    check(reqs, reqs.shape, torch.int64)
    check(drafts, (len(reqs), state.canvas_length), torch.int32)
    assert 0 <= speculation.row_price <= CERTAIN, speculation
    _give_drafts_kernel[(len(reqs),)](
        state.ints,
        state.by_position,
        state.by_row,
        state.canvas_token,
        reqs,
        drafts,
        device_table(state.device),
        state.mask_token_id,
        speculation.row_price,
        speculation.prior,
        **lanes_of_canvas(state.canvas_length),
    )
