"""The price of a row in serial decoding: the table, and what is chosen from it."""

import random

import numpy as np
import pytest

from vllm_refusion.bench.draft_table import decode_serially
from vllm_refusion.decoding.draft_price import (
    ACCEPTANCES,
    LAG,
    NO_MASKS,
    PRICES,
    ROWS,
    TOKENS,
    DraftPrice,
    rates,
)
from vllm_refusion.decoding.params import DecodingParams

NEXT = DecodingParams(mode="serial", slot_start="next")


@pytest.mark.parametrize("acceptance, price", [(0.2, 0.02), (0.6, 0.1), (0.8, 0.2), (0.9, 0.05)])
def test_the_table_is_what_the_state_machine_does(acceptance: float, price: float):
    at = list(ACCEPTANCES).index(acceptance), list(PRICES).index(price)
    tokens, rows = decode_serially(NEXT, acceptance, price, max_tokens=192, requests=8)
    assert tokens == pytest.approx(TOKENS[at], rel=0.15)
    assert rows == pytest.approx(ROWS[at], rel=0.2)


def test_rates_fall_with_the_price_and_rise_with_acceptance():
    before = np.zeros(len(PRICES))
    for acceptance in np.linspace(0.1, 0.99, 30):
        tokens, rows = rates(acceptance)
        assert (np.diff(tokens) <= 1e-9).all() and (np.diff(rows) <= 1e-9).all()
        assert (tokens >= before).all()
        before = tokens


def cost(rows: np.ndarray) -> np.ndarray:
    """About an 8B model's on an H200, milliseconds."""
    points = (1, 64, 128, 256, 384, 512, 1024), (5.4, 6.0, 7.2, 9.7, 12.2, 13.8, 22.8)
    return np.interp(rows, *points) + 0.021 * np.maximum(rows - 1024, 0)


def course(price: DraftPrice, requests: int, acceptance: float, steps: int, rng) -> float:
    """Tokens per millisecond of the second half, passes bringing what the table says."""
    tokens = time = 0.0
    chosen = [price.index] * LAG
    for step in range(steps):
        price.choose(requests, cost)
        chosen = [*chosen[1:], price.index]
        made, rows = 1.0, 1.0
        if chosen[0] is not None:
            made, rows = (values[chosen[0]] for values in rates(acceptance))
        drawn = sum(1 + (rng.random() * 2 * (made - 1)) for _ in range(requests))
        price.learn(requests, round(drawn))
        if step >= steps // 2:
            tokens += requests * made
            time += float(cost(np.array(requests * rows)))
    return tokens / time


@pytest.mark.parametrize("requests", [1, 4, 16, 64, 128, 256])
@pytest.mark.parametrize("acceptance", [0.95, 0.866, 0.6, 0.3])
def test_the_price_comes_close_to_the_best(requests: int, acceptance: float):
    tokens, rows = rates(acceptance)
    at_prices = tokens * requests / cost(rows * requests)
    nothing = requests / float(cost(np.array(requests)))
    reached = course(DraftPrice(), requests, acceptance, 300, random.Random(1))
    assert reached > 0.96 * max(nothing, at_prices.max())


def test_nothing_is_drafted_where_nothing_passes():
    price = DraftPrice()
    course(price, 64, 0.2, 200, random.Random(2))
    assert price.index is None and price.price == NO_MASKS


def test_drafting_begins_anew_when_fewer_requests_run():
    price, rng = DraftPrice(), random.Random(3)
    course(price, 256, 0.866, 100, rng)
    assert price.index is None
    course(price, 4, 0.866, 20, rng)
    assert price.index is not None


def test_after_a_while_it_is_tried_again():
    """What was refused may be another text by now."""
    price, rng = DraftPrice(), random.Random(4)
    course(price, 64, 0.2, 200, rng)
    assert price.index is None
    course(price, 64, 0.95, 2000, rng)
    assert price.acceptance > 0.9 and price.index is not None
