"""What a pass decides: sections 3.1 to 3.3 of the algorithm, as parts of the transition's kernel.

Vectors are [LANES], one lane for each position p of the block, as in ``transition.py``:

    fails(p)  = failed tests among the positions <= p
    intact(p) = fails(p) - fails(before p's slot) == 0    p and all before it in its slot passed
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_refusion.triton_kernels.compose import (
    block_length_at,
    first,
    in_slot,
    infilled,
    rows_of,
)
from vllm_refusion.triton_kernels.state_codes import (
    ACCEPTED,
    BLANK,
    CHOSEN,
    COMMITTED,
    COUNT_SLOTS_CHOSEN,
    DROPPED,
    MASKED,
)


@triton.jit
def intact(failed, slot_start):
    """Whether none of a slot's positions failed up to this one, and before it; [LANES] each."""
    failed = failed.to(tl.int32)
    fails = tl.cumsum(failed, axis=0)
    of_others = tl.gather(fails - failed, slot_start, axis=0)
    return fails == of_others, fails - failed == of_others


@triton.jit
def keepable(status, origin, canvas_row, p, slot_start, size, kept, LANES: tl.constexpr):
    """How many leading canvas rows hold accepted tokens that are the next in commit order."""
    slots = infilled(status)
    order = rows_of(slots) - kept
    behind = tl.minimum(p + 1, LANES - 1)
    status_behind = tl.gather(status, behind, axis=0)
    # a row that will be asked about the token behind it is fed again
    asked = (p + 1 < slot_start + size) & (tl.gather(origin, behind, axis=0) != p + 1)
    asked = asked & ((status_behind == CHOSEN) | (status_behind == BLANK))
    final = (status == ACCEPTED) & (canvas_row == order) & (asked == 0)
    left = slots & (order >= 0)
    first_other = tl.min(tl.where(left & (final == 0), order, LANES), axis=0)
    return tl.sum((left & (order < first_other)).to(tl.int32), axis=0)


@triton.jit
def drop_after(status, p, cut):
    """EOS at ``cut``: what lies after it and is not committed is dropped."""
    return tl.where((p > cut) & (status != COMMITTED), DROPPED, status)


@triton.jit
def take(takes, row, token, confidence, picked_ptr, picked_prob_ptr):
    """Where ``takes`` [LANES], the token picked in ``row`` and its probability."""
    token = tl.where(takes, tl.load(picked_ptr + row, mask=takes, other=0), token)
    probability = tl.load(picked_prob_ptr + row, mask=takes, other=0.0)
    return token, tl.where(takes, probability, confidence)


@triton.jit
def choose(
    status, origin, token, confidence, row, p, slot_start, picked_ptr, picked_prob_ptr, threshold,
    counters_ptr, LANES: tl.constexpr,
):  # fmt: skip
    """Section 3.1: chooses slots; their drafts become the tokens."""
    masked = status == MASKED
    opens = masked & (p == slot_start)
    certainty = tl.load(picked_prob_ptr + row, mask=opens, other=-1.0)
    # below every probability, also for NaN: then the first slot is chosen and decoding goes on
    certainty = tl.where(certainty >= 0, certainty, -1.0)
    largest = tl.max(certainty, axis=0)
    sure = opens & (certainty > threshold)
    best = p == first(opens & (certainty == largest), p, LANES)
    opens_chosen = tl.where(largest > threshold, sure.to(tl.int32), best.to(tl.int32))
    tl.atomic_add(counters_ptr + COUNT_SLOTS_CHOSEN, tl.sum(opens_chosen, axis=0))
    chosen = masked & (tl.gather(opens_chosen, slot_start, axis=0) == 1)
    token, confidence = take(chosen, row, token, confidence, picked_ptr, picked_prob_ptr)
    origin = tl.where(chosen, slot_start, origin)
    return tl.where(chosen, CHOSEN, status), origin, token, confidence


@triton.jit
def accept(status, origin, fed, failed, good, slot_start, size, LANES: tl.constexpr):
    """Accepts proposals [LANES] up to the first failure of their slot, where an operation starts.

    ``fed``, ``failed``, ``good``: in the canvas; failed its test; neither it nor one before failed.
    """
    open_ = (status == CHOSEN) | (status == BLANK)
    starts = slot_start + in_slot(good, slot_start, size, LANES)
    fails = open_ & (good == 0)
    status = tl.where(fed & good, ACCEPTED, tl.where(fails, BLANK, status))
    return status, tl.where(fails, starts, origin)


@triton.jit
def verify_drafts(
    status, origin, token, row, fed, failed, good, p, slot_start, size, eos, LANES: tl.constexpr
):
    """Section 3.2. Returns status and origin, the rows to commit (0: infill), where EOS cuts."""
    reached = fed & (p < first(failed, p, LANES))
    prefix_eos = first(reached & (token == eos), p, LANES)
    ends = reached & (p <= prefix_eos)
    accepted = tl.sum(ends.to(tl.int32), axis=0)
    # with EOS the last slot is cut right after it, else only whole slots count
    kept = tl.where(prefix_eos < LANES, accepted, accepted // size * size)

    begun, begun_origin = accept(status, origin, fed, failed, good, slot_start, size, LANES)
    infill_eos = first((begun == ACCEPTED) & (token == eos), p, LANES)
    back = tl.where(fed & (row >= kept), MASKED, status)
    cut = tl.where(kept > 0, prefix_eos, infill_eos)
    origin = tl.where(kept > 0, origin, begun_origin)
    return drop_after(tl.where(kept > 0, back, begun), p, cut), origin, kept, cut


@triton.jit
def block_statuses(p, start, ints):
    """Statuses [LANES] of a block that starts now at response position ``start``."""
    return tl.where(p < block_length_at(start, ints), MASKED, DROPPED)
