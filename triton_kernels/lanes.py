"""Scans over the positions of a block, a lane each: what kernels find where twins walk."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_refusion.triton_kernels.constant import Constant
from vllm_refusion.triton_kernels.state_codes import ACCEPTED, BLANK, CHOSEN

NOWHERE = Constant(2**30)  # beyond every lane


class Lanes(NamedTuple):
    """The lanes of a block, [LANES] int32 each.

    Attributes:
        p: block positions 0, 1, 2 ...
        slot_start, slot_end: first and last lane of the slot.
        size: of a slot; a scalar.
        last: the last lane.
    """

    p: tl.tensor
    slot_start: tl.tensor
    slot_end: tl.tensor
    size: tl.tensor
    last: tl.constexpr


@triton.jit
def lanes_of(size, LANES: tl.constexpr):
    p = tl.arange(0, LANES)
    slot_start = p - p % size
    return Lanes(p, slot_start, tl.minimum(slot_start + size - 1, LANES - 1), size, LANES - 1)


@triton.jit
def in_slot(marked, lanes):
    """How many positions of the slot of each lane are ``marked`` [LANES]."""
    marked = marked.to(tl.int32)
    through = tl.cumsum(marked, axis=0)
    before = tl.gather(through - marked, lanes.slot_start, axis=0)
    return tl.gather(through, lanes.slot_end, axis=0) - before


@triton.jit
def opening(blank, lanes):
    """Where the ``blank`` [LANES] positions at the end of each lane's slot begin."""
    return lanes.slot_start + lanes.size - in_slot(blank, lanes)


@triton.jit
def rows_of(member):
    """Canvas row [LANES] of each member: the members before it."""
    member = member.to(tl.int32)
    return tl.cumsum(member, axis=0) - member


@triton.jit
def count(marked):
    return tl.sum(marked.to(tl.int32), axis=0)


@triton.jit
def first(marked, lanes):
    """The lowest lane that is ``marked`` [LANES], else NOWHERE."""
    return tl.min(tl.where(marked, lanes.p, NOWHERE), axis=0)


@triton.jit
def at_lane(values, lanes, lane):
    """The one of ``values`` [LANES] int32 at ``lane``; 0 if there is none."""
    return tl.sum(tl.where(lanes.p == lane, values, 0), axis=0)


@triton.jit
def infilled(status):
    """Whether positions of ``status`` [LANES] are of slots in infill."""
    return (status == CHOSEN) | (status == BLANK) | (status == ACCEPTED)
