"""What rows are worth (``vllm_refusion/decoding/speculation.py``), for the next canvas."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_refusion.decoding.speculation import (
    CERTAIN,
    LARGEST_COST,
    LEVELS,
    PRIOR,
    PRIOR_TESTED,
)
from vllm_refusion.triton_kernels.constant import Constant
from vllm_refusion.triton_kernels.decisions import takes_test
from vllm_refusion.triton_kernels.lanes import first
from vllm_refusion.triton_kernels.state_codes import F_BLOCK_LENGTH

_CERTAIN = Constant(CERTAIN)
_LARGEST_COST = Constant(LARGEST_COST)
_LEVELS = Constant(LEVELS)
_PRIOR = Constant(PRIOR)
_PRIOR_TESTED = Constant(PRIOR_TESTED)


class Prices(NamedTuple):
    """What rows are worth: ``Speculation``, ``device_table``, and how the request fares."""

    free_rows: tl.tensor
    pass_price: tl.tensor
    table: tl.tensor
    acceptance: tl.tensor
    speculates: tl.tensor


class Costs(NamedTuple):
    """Costs [LANES] of the tests: of one, of all up to it, of all before its slot."""

    cost: tl.tensor
    through: tl.tensor
    slot_before: tl.tensor


@triton.jit
def acceptance(passed, tested, prior):
    return (_LEVELS * passed + _PRIOR_TESTED * prior) // (tested + _PRIOR_TESTED)


@triton.jit
def level_of(confidence):
    level = confidence * _LEVELS
    return tl.where(level > 0, tl.minimum(level, _LEVELS), 0.0).to(tl.int32)


@triton.jit
def prices_of(course, table_ptr, free_rows, pass_price):
    speculates = (free_rows > 0) | (pass_price > 0)
    passes = acceptance(course.passed, course.tested, _PRIOR)
    return Prices(free_rows, pass_price, table_ptr, passes, speculates)


@triton.jit
def chance_of(cost, table):
    return tl.load(table + _LEVELS + 1 + tl.minimum(cost, _LARGEST_COST))


@triton.jit
def test_costs(block, corrects, prices, lanes):
    """Nothing where there is no proposal or it takes no test."""
    level = level_of(block.confidence)
    cost = tl.load(prices.table + level, mask=takes_test(block, corrects, lanes), other=0)
    through = tl.cumsum(cost, axis=0)
    return Costs(cost, through, tl.gather(through - cost, lanes.slot_start, axis=0))


@triton.jit
def worth_feeding(chance, again, prices):
    """Whether to feed a row at once that is needed with a chance."""
    later = _LEVELS + (_LEVELS - prices.acceptance) * (prices.pass_price + again)
    return chance.to(tl.int64) * later > _CERTAIN * _LEVELS


@triton.jit
def predict_width(ints, canvas, prices, lanes):
    """The most masks of a predict."""
    cost = tl.load(prices.table + prices.acceptance) * (lanes.p - 1)
    worth = worth_feeding(chance_of(tl.maximum(cost, 0), prices.table), lanes.p, prices)
    width = first((lanes.p >= 1) & ((lanes.p >= lanes.size) | (worth == 0)), lanes)
    # an operation that goes on may take a slot's rows more than what is open in the block
    fits = tl.load(ints + F_BLOCK_LENGTH) + lanes.size <= canvas.length
    return tl.where(prices.speculates & fits, width, lanes.size)
