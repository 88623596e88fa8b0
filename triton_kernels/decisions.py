"""What a pass decides: sections 3.1 to 3.3 of the algorithm, as parts of the transition's kernel.

The rules are ``choose_slots``, ``accepted_run``, ``until_eos`` and ``committed_prefix``, as in
``vllm_refusion/decoding/rules.py``; around them stands what they do to the statuses of a block.
Vectors are [LANES], one lane for each position p of the block:

    fails(p)  = failed tests among the positions <= p
    good(p)   = fails(p) - fails(before p's slot) == 0    p and all before it in its slot passed
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_refusion.triton_kernels.lanes import NOWHERE, count, first, in_slot, infilled, rows_of
from vllm_refusion.triton_kernels.packed import (
    Block,
    Verified,
    with_origin,
    with_rounds,
    with_status,
)
from vllm_refusion.triton_kernels.state_codes import (
    ACCEPTED,
    BLANK,
    CHOSEN,
    COMMITTED,
    COUNT_INFILL_VERIFY,
    COUNT_PLAN,
    COUNT_PREDICT,
    COUNT_SLOTS_CHOSEN,
    COUNT_VERIFY,
    DROPPED,
    F_CORRECTS,
    F_EOS,
    F_KEPT,
    FLOAT_SLOT_THRESHOLD,
    FLOAT_TOKEN_THRESHOLD,
    INFILL,
    MASKED,
    PLAN,
    VERIFY,
)


class Tests(NamedTuple):
    """How the proposals in a canvas fare.

    Attributes:
        proposed: they are in the canvas. tested: of them, those that take a test. failed: of those.
        good: neither the position nor one before it in its slot failed.
        reached: none before it did.
    """

    proposed: tl.tensor
    tested: tl.tensor
    failed: tl.tensor
    good: tl.tensor
    reached: tl.tensor


class Decision(NamedTuple):
    """What a pass made of its phase.

    Attributes:
        next_phase: INFILL also where tokens are committed: ``commit`` says what follows then.
        commits: tokens to commit. kept: rows whose KV stays. infill_kept: see ``Field.KEPT``.
        cut: the lane after which EOS ends the response, or NOWHERE.
        tested, passed: tokens. counter: of the pass.
    """

    next_phase: tl.tensor
    commits: tl.tensor
    kept: tl.tensor
    infill_kept: tl.tensor
    cut: tl.tensor
    tested: tl.tensor
    passed: tl.tensor
    counter: tl.tensor


@triton.jit
def choose_slots(certainty, opens, threshold, lanes):
    """Rule 3.1: which of the slots that begin where ``opens`` are chosen; [LANES] int32."""
    # below every probability, also for NaN: then the first slot is chosen and decoding goes on
    certainty = tl.where(opens & (certainty >= 0), certainty, -1.0)
    largest = tl.max(certainty, axis=0)
    sure = opens & (certainty > threshold)
    best = lanes.p == first(opens & (certainty == largest), lanes)
    return tl.where(largest > threshold, sure.to(tl.int32), best.to(tl.int32))


@triton.jit
def accepted_run(given, tested, threshold, lanes):
    """Rules 3.2 and 3.3: which tests fail; where none did in the slot so far; and before."""
    failed = tested & ((given > threshold) == 0)
    fails = tl.cumsum(failed.to(tl.int32), axis=0)
    before = fails - failed.to(tl.int32)
    of_others = tl.gather(before, lanes.slot_start, axis=0)
    return failed, fails == of_others, before == of_others


@triton.jit
def until_eos(token, among, eos, lanes):
    """Where the first EOS is ``among`` some positions [LANES], else NOWHERE."""
    return first(among & (token == eos), lanes)


@triton.jit
def committed_prefix(token, tests, eos, lanes):
    """Rule 3.2: how many leading drafts are committed (0: infill), where EOS ends them."""
    reached = tests.proposed & (lanes.p < first(tests.failed, lanes))
    ending = until_eos(token, reached, eos, lanes)
    accepted = count(reached & (lanes.p <= ending))
    # with EOS the last slot is cut right after it, else only whole slots count
    return tl.where(ending < NOWHERE, accepted, accepted // lanes.size * lanes.size), ending


@triton.jit
def pick(block, takes, row, stats):
    """Where ``takes`` [LANES], the token picked in ``row`` is to be verified."""
    token = tl.load(stats.picked + row, mask=takes, other=0)
    confidence = tl.load(stats.picked_prob + row, mask=takes, other=0.0)
    return Block(
        tl.where(takes, CHOSEN, block.status),
        tl.where(takes, token, block.token),
        tl.where(takes, confidence, block.confidence),
        block.rounds,
        block.origin,
        tl.where(takes, row, block.pick_row),
    )


@triton.jit
def plan(block, row, stats, threshold, counters_ptr, lanes):
    """Section 3.1, the masks of the remaining slots being in ``row`` [LANES]."""
    masked = block.status == MASKED
    opens = masked & (lanes.p == lanes.slot_start)
    certainty = tl.load(stats.picked_prob + row, mask=opens, other=-1.0)
    opens_chosen = choose_slots(certainty, opens, threshold, lanes)
    tl.atomic_add(counters_ptr + COUNT_SLOTS_CHOSEN, tl.sum(opens_chosen, axis=0))
    chosen = masked & (tl.gather(opens_chosen, lanes.slot_start, axis=0) == 1)
    block = pick(block, chosen, row, stats)
    return Block(
        block.status,
        block.token,
        block.confidence,
        block.rounds,
        tl.where(chosen, lanes.slot_start, block.origin),
        tl.where(masked, row, block.pick_row),
    )


@triton.jit
def takes_test(block, corrects, lanes):
    """Whether positions [LANES] have a proposal that is not accepted without a test."""
    untested = tl.where(corrects > 0, lanes.slot_start, block.origin)
    return (block.status == CHOSEN) & (untested != lanes.p)


@triton.jit
def run_tests(block, row, stats, threshold, corrects, lanes):
    """The ``Tests`` of a canvas."""
    proposed = (row >= 0) & (block.status == CHOSEN)
    tested = proposed & takes_test(block, corrects, lanes)
    # the row before gives this row's token its probability
    given = tl.load(stats.given_prob + row - 1, mask=tested & (row > 0), other=-1.0)
    failed, good, reached = accepted_run(given, tested, threshold, lanes)
    return Tests(proposed, tested, failed, good, reached)


@triton.jit
def accept(block, row, tests, anew, stats, lanes):
    """Accepts proposals up to the first failure of their slot, where an operation starts.

    Where that is ``anew`` [LANES], it starts behind: the token that the row before it picked is
    accepted in its place. Returns the block, and the rows [LANES] that hold what it holds.
    """
    open_ = (block.status == CHOSEN) | (block.status == BLANK)
    fails = open_ & (tests.good == 0) & (anew == 0)
    starts = lanes.slot_start + in_slot(tests.good | anew, lanes)
    block = pick(block, anew, row - 1, stats)
    status = tl.where(fails, BLANK, block.status)
    status = tl.where((tests.proposed & tests.good) | anew, ACCEPTED, status)
    block = with_origin(with_status(block, status), tl.where(fails, starts, block.origin))
    return block, tl.where(anew, -1, row)


@triton.jit
def cut_after(block, cut, lanes):
    """EOS at ``cut``: what lies after it and is not committed is dropped."""
    dropped = (lanes.p > cut) & (block.status != COMMITTED)
    return with_status(block, tl.where(dropped, DROPPED, block.status))


@triton.jit
def accept_eos(block, eos, lanes):
    """Cuts the infill after the first accepted EOS, if there is one; and where."""
    cut = until_eos(block.token, block.status == ACCEPTED, eos, lanes)
    return cut_after(block, cut, lanes), cut


@triton.jit
def verify(block, row, tests, stats, eos, corrects, lanes):
    """Section 3.2.

    Returns the block, its rows, the rows to commit (0: infill follows), where EOS cuts.
    """
    block = with_rounds(block, tl.where(block.status == CHOSEN, 0, block.rounds))
    commits, cut = committed_prefix(block.token, tests, eos, lanes)
    if commits > 0:
        back = tests.proposed & (row >= commits)
        block = with_status(block, tl.where(back, MASKED, block.status))
        block = cut_after(block, cut, lanes)
    else:
        # of other slots than the first the rows saw more than the slot
        leads = lanes.slot_start == first(tests.proposed, lanes)
        anew = tl.where(corrects > 0, (tests.failed & tests.reached & leads).to(tl.int32), 0)
        block, row = accept(block, row, tests, anew > 0, stats, lanes)
        block, cut = accept_eos(block, eos, lanes)
    return block, row, commits, cut


@triton.jit
def infill(block, row, tests, stats, eos, corrects, lanes):
    """Section 3.3, one pass of it. Returns the block, its rows, where EOS cuts."""
    # masks are in the canvas only of slots without a proposal
    blank = block.status == BLANK
    takes = blank & (row >= 0)
    begins = blank & (in_slot(takes, lanes) > 0)
    anew = tl.where(corrects > 0, (tests.failed & tests.reached).to(tl.int32), 0)
    block, accepted_row = accept(block, row, tests, anew > 0, stats, lanes)
    block = pick(block, takes, row, stats)
    block = with_rounds(block, block.rounds + begins.to(tl.int32))
    block, cut = accept_eos(block, eos, lanes)
    return block, accepted_row, cut


@triton.jit
def waiting(block, lanes):
    """Positions [LANES] that wait for proposals, where none of their slot is left to be tested."""
    return (block.status == BLANK) & (in_slot(block.status == CHOSEN, lanes) == 0)


@triton.jit
def keepable(block, row, kept, corrects, lanes):
    """How many leading canvas rows hold accepted tokens that are the next in commit order."""
    slots = infilled(block.status)
    order = rows_of(slots) - kept
    behind = tl.minimum(lanes.p + 1, lanes.slot_end)
    status_behind = tl.gather(block.status, behind, axis=0)
    # a row that will be asked about the token behind it is fed again
    in_same = lanes.p + 1 < lanes.slot_start + lanes.size
    tested = (tl.gather(block.origin, behind, axis=0) != lanes.p + 1) | (corrects > 0)
    asked = in_same & tested & ((status_behind == CHOSEN) | (status_behind == BLANK))
    final = (block.status == ACCEPTED) & (row == order) & (asked == 0)
    left = slots & (order >= 0)
    first_other = tl.min(tl.where(left & (final == 0), order, NOWHERE), axis=0)
    return count(left & (order < first_other))


@triton.jit
def decide(block, row, stats, phase, ints, floats, counters_ptr, lanes):
    """What the rows of the phase decide: a plan, a verification, or a pass of an infill."""
    nothing = tl.zeros_like(lanes.p) - 1
    verified = Verified(nothing, nothing)
    if phase == PLAN:
        threshold = tl.load(floats + FLOAT_SLOT_THRESHOLD)
        block = plan(block, row, stats, threshold, counters_ptr, lanes)
        decision = Decision(VERIFY, 0, 0, 0, NOWHERE, 0, 0, COUNT_PLAN)
    else:
        eos = tl.load(ints + F_EOS)
        kept = tl.load(ints + F_KEPT)
        corrects = tl.load(ints + F_CORRECTS)
        threshold = tl.load(floats + FLOAT_TOKEN_THRESHOLD)
        tests = run_tests(block, row, stats, threshold, corrects, lanes)
        verified = Verified(
            tl.where(tests.proposed, block.token, -1), tl.where(tests.tested, row - 1, -1)
        )
        tested = count(tests.tested & tests.reached)
        passed = count(tests.tested & tests.good)
        if phase == VERIFY:
            counter = COUNT_VERIFY
            block, row, commits, cut = verify(block, row, tests, stats, eos, corrects, lanes)
            final = tl.where(commits > 0, commits, keepable(block, row, 0, corrects, lanes))
            kept = tl.where(commits > 0, 0, final)
        else:
            predicts = count(waiting(block, lanes)) > 0
            counter = tl.where(predicts, COUNT_PREDICT, COUNT_INFILL_VERIFY)
            block, row, cut = infill(block, row, tests, stats, eos, corrects, lanes)
            final = keepable(block, row, kept, corrects, lanes)
            kept += final
            total = count(infilled(block.status))
            commits = tl.where(kept >= total, total, 0)
        decision = Decision(INFILL, commits, final, kept, cut, tested, passed, counter)
    return block, decision, verified
