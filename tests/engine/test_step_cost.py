"""What a step costs by its rows, learned from the steps that run."""

import numpy as np
import pytest

from vllm_refusion.engine.pass_cost import PassCost
from vllm_refusion.engine.step_cost import StepCost

PASSES = PassCost((32, 64, 256), (4.0, 5.0, 11.0))


def of(cost, *rows):
    return cost.of(np.array(rows)).tolist()


def test_at_first_a_step_costs_its_pass():
    assert of(StepCost(PASSES, learns=False), 32, 64, 160) == [4.0, 5.0, 8.0]


def test_steps_that_take_longer_than_their_pass_make_every_size_dearer():
    cost = StepCost(PASSES, learns=False)
    for _ in range(200):
        cost.observe(64, took=6.0, late=False)
    assert of(cost, 32, 64, 256) == pytest.approx([4.8, 6.0, 13.2])


def test_rows_cost_nothing_up_to_what_the_host_takes():
    cost = StepCost(PASSES, learns=False)
    for _ in range(200):
        cost.observe(64, took=8.0, late=True)
    assert of(cost, 32, 64, 140) == pytest.approx([8.0] * 3, rel=1e-3)
    assert of(cost, 256)[0] == pytest.approx(11)


def test_more_rows_do_not_make_the_host_slower():
    """A step that the device fills says nothing of the host but that it is no slower."""
    cost = StepCost(PASSES, learns=False)
    for _ in range(200):
        cost.observe(64, took=8.0, late=True)
    for _ in range(200):
        cost.observe(256, took=11.0, late=False)
    assert cost.host < 2
    assert of(cost, 64, 256) == pytest.approx([5, 11])


def test_a_shorter_step_shows_at_once_that_the_host_takes_no_more():
    cost = StepCost(PASSES, learns=False)
    for _ in range(200):
        cost.observe(64, took=14.0, late=True)
    cost.observe(32, took=4.1, late=False)
    assert cost.host == pytest.approx(4.1, rel=0.02)


def test_steps_that_draft_are_learned_from_by_what_drafting_costs():
    cost = StepCost(PASSES, learns=False, drafting=PassCost((32, 64, 256), (6.0, 7.5, 16.5)))
    for _ in range(200):
        cost.observe(64, took=9.0, late=False, drafts=True)
    assert of(cost, 32, 64, 256) == pytest.approx([4.8, 6.0, 13.2])
    assert cost.of(np.array((64, 64)), np.array((True, False))) == pytest.approx([9.0, 6.0])
