"""The rules alone: ties, thresholds hit exactly, NaN, and where EOS cuts."""

from __future__ import annotations

import math

import pytest

from vllm_refusion.decoding.rules import accepted_run, choose_slots, committed_prefix, until_eos

EOS = 9


@pytest.mark.parametrize(
    "certainties, chosen",
    [
        ([0.9, 0.5, 0.51], [0, 2]),  # a threshold is to be exceeded
        ([0.2, 0.5, 0.5], [1]),  # without one above it the first of the most certain
        ([math.nan, 0.1], [1]),
        ([math.nan, math.nan], [0]),  # decoding goes on
        ([math.nan, 0.6], [1]),
    ],
)
def test_slots_are_chosen(certainties, chosen):
    assert choose_slots(certainties, 0.5) == chosen


@pytest.mark.parametrize(
    "given, run",
    [
        ([], 0),
        ([None], 1),
        ([None, 0.5], 1),
        ([None, 0.6, 0.4, 0.9], 2),
        ([0.4, None], 0),
        ([None, math.nan, 0.9], 1),
        ([None, 0.9, 0.9], 3),
    ],
)
def test_tokens_are_accepted_until_one_fails(given, run):
    assert accepted_run(given, 0.5) == run


def test_the_first_eos_cuts():
    assert until_eos([1, EOS, 2, EOS], EOS) == 2
    assert until_eos([1, 2], EOS) == until_eos([], EOS) == 0


@pytest.mark.parametrize(
    "drafts, runs, committed",
    [
        ([1, 2, 3, 4, 5, 6], [3, 3], (6, False)),
        ([1, 2, 3, 4, 5, 6], [3, 2], (3, False)),  # whole slots only
        ([1, 2, 3, 4, 5, 6], [2, 3], (0, False)),  # one run over all slots
        ([1, 2, 3, EOS, 5, 6], [3, 1], (4, True)),  # cut right after EOS, in a slot not whole
        ([1, EOS, 3, 4, EOS, 6], [3, 3], (2, True)),
        ([1, 2, EOS, 4, 5, EOS], [2, 3], (0, False)),  # an EOS that is not reached
    ],
)
def test_a_prefix_is_committed(drafts, runs, committed):
    assert committed_prefix(drafts, runs, 3, EOS) == committed
