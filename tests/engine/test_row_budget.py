"""The size of a step of serial decoding, from what canvases held in the steps before."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_refusion.decoding.draft_price import NOTHING_DRAFTED, rates
from vllm_refusion.decoding.state import DecodeState
from vllm_refusion.engine.config_hook import CAPTURE_SIZES
from vllm_refusion.engine.pass_cost import PassCost
from vllm_refusion.engine.row_budget import RowBudget
from vllm_refusion.engine.step_cost import StepCost
from vllm_refusion.triton_kernels.dispatch import operations

CANVAS = 256
# about an 8B model's on an H200
COST = PassCost((64, 128, 256, 512, 1024, 2048), (5.5, 6.5, 8.5, 13.5, 23.0, 45.0))


class Load:
    """Steps of serial requests, whose canvases hold what the test says."""

    def __init__(self, requests: int) -> None:
        state = DecodeState(256, CANVAS, 512, 49, "cpu")
        self.serial: list[int] = []
        self.budget = RowBudget(
            state,
            operations(state.device),
            SimpleNamespace(num_computed_tokens=SimpleNamespace(gpu=torch.zeros(256))),
            torch.zeros(257, dtype=torch.int32),
            sizes=list(CAPTURE_SIZES),
            cost=StepCost(COST, learns=False),
            requests=self.serial,
            serial=self.serial,
            riders=True,
        )
        self.admit(requests)

    def admit(self, requests: int) -> None:
        self.serial[:] = range(requests)

    def step(self, wanted: float, tokens: float, needed: float = 1.0) -> int:
        """A step in which a request's canvas holds so many rows and its pass brings so many."""
        requests = len(self.serial)
        size = self.budget.settle(requests, requests * CANVAS)
        each = requests * np.array((needed, wanted, 1.0, tokens))
        self.budget._totals_np[:] = each.round()
        self.budget._decoding = requests
        return size

    def expected(self) -> float:
        """Rows of a canvas at the price of now, by the table."""
        drafts = self.budget.drafts
        return 1.0 if drafts.index is None else float(rates(drafts.acceptance)[1][drafts.index])


@pytest.mark.parametrize("share", [0.6, 1.0, 1.5])
def test_a_step_has_room_for_what_canvases_hold(share):
    load = Load(8)
    for _ in range(60):
        size = load.step(share * load.expected(), 4.5)
    held = 8 * share * load.expected()
    assert held <= size <= held + 32, (held, size)  # the next size


@pytest.mark.parametrize("requests", [4, 16, 64])
def test_wide_canvases_of_few_requests_say_nothing_about_many(requests):
    """A lone request's canvases hold a hundred rows, now more, now less."""
    load = Load(1)
    for step in range(80):
        load.step((0.5 + step % 2) * load.expected(), 6.0)
    alone = load.expected()
    load.admit(requests)
    load.step(load.expected(), 4.0)  # its price is of many already
    expected = load.expected()
    assert requests * expected < requests * alone / 3
    for _ in range(10):
        size = load.step(load.expected(), 4.0)
        assert size < 1.5 * requests * expected, (size, requests * expected)


# of a step: milliseconds, by rows, and the best size for 4% more rows than requests
@pytest.mark.parametrize(
    ("passes", "requests", "best"),
    [
        # a row above 256 costs more than that a request waits
        (((256, 512), (8.5, 13.5)), 256, 256),
        (((128, 512), (6.5, 6.6)), 128, 144),  # one that costs nothing does not
        (((1, 64), (5.0, 5.1)), 4, 8),
        (((1, 64), (5.0, 5.1)), 1, 2),
    ],
)
def test_masks_that_slots_begin_with_may_wait_where_nothing_is_drafted(passes, requests, best):
    load = Load(requests)
    load.budget.cost = StepCost(PassCost(*passes), learns=False)
    load.budget.drafts.choose = lambda *_: NOTHING_DRAFTED
    for step in range(80):
        needed = 1.0 + 0.08 * (step % 2)
        size = load.step(needed, 1.0, needed)
    assert size == best


def test_drafts_stay_within_the_graphs():
    """Where a step seems to cost the host's time however wide it is."""
    load = Load(64)
    load.budget.cost.host = 30.0  # ms
    load.step(2.0, 1.0)  # the first one goes by what is scheduled
    for _ in range(40):
        size = load.step(1.5 * load.expected(), 12.0)
        assert size <= CAPTURE_SIZES[-1]
    assert load.budget.drafts.index is not None
    assert 64 * load.expected() <= CAPTURE_SIZES[-1]


def test_so_do_drafts_that_are_there_without_masks():
    load = Load(200)
    load.budget.cost.host = 100.0  # ms: rows cost nothing
    load.budget.drafts.choose = lambda *_: NOTHING_DRAFTED
    load.step(1.0, 1.0)
    for _ in range(20):
        size = load.step(14.0, 12.0)
    assert 200 < size <= CAPTURE_SIZES[-1]


def test_only_steps_of_a_graph_say_what_steps_cost(monkeypatch):
    load, marked = Load(1), []
    monkeypatch.setattr(load.budget.cost, "end", lambda rows, drafts: marked.append(rows))
    for rows, tokens in ((64, 64), (64, 100), (2048, 2048), (2112, 2112)):
        load.budget.end_step(rows, tokens)
    assert marked == [64, 0, 2048, 0]


def test_masks_that_an_adapter_makes_dear_are_fed_where_they_pay():
    """Not by what passes without masks take: with FP8 weights that is far less."""
    passes = PassCost((64, 128, 256, 512), (5.4, 6.9, 8.0, 11.0))
    drafting = PassCost((64, 128, 256, 512), (6.5, 8.5, 11.0, 15.5))
    for requests, cost, pays in ((64, passes, True), (64, drafting, False), (4, drafting, True)):
        load = Load(requests)
        load.budget.cost = StepCost(passes, learns=False, drafting=cost)
        for _ in range(40):
            load.step(load.expected(), 2.8 if load.expected() > 1 else 1.0)
        assert (load.budget.drafts.index is not None) == pays, (requests, cost)
