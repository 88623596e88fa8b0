"""Totals of the device as Prometheus counters and as a line of the log."""

from __future__ import annotations

import prometheus_client
import pytest

from vllm_refusion.decoding.state import Counter
from vllm_refusion.engine.metrics import PASSES, Figures


@pytest.fixture
def figures():
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    yield Figures("some-model")
    unregister_vllm_metrics()  # as vLLM does when another engine starts in the process
    Figures("another")
    unregister_vllm_metrics()


def value(name, **labels):
    labels = {"model_name": "some-model"} | labels
    return prometheus_client.REGISTRY.get_sample_value(f"vllm:refusion_{name}_total", labels)


def totals(**counts):
    return [counts.get(counter.name.lower(), 0) for counter in Counter]


def test_counters_follow_the_totals(figures):
    figures.update(totals(plan=3, verify=2, rows_fed=100, tokens=40))
    figures.update(totals(plan=5, verify=2, rows_fed=160, tokens=60))
    assert value("passes", kind="plan") == 5 and value("passes", kind="verify") == 2
    assert value("passes", kind="infill_verify") == 0
    assert value("rows_fed") == 160 and value("tokens") == 60


def test_every_counter_has_a_metric(figures):
    figures.update([10 + counter for counter in Counter])
    for counter in Counter:
        name = counter.name.lower()
        shown = value("passes", kind=name) if counter in PASSES else value(name)
        assert shown == 10 + counter


def test_the_line_is_about_what_was_done_since(figures):
    figures.update(totals(plan=30, verify=20, rows_fed=1000, tokens=400))
    done = dict(plan=32, verify=22, replay=1, rows_fed=1100, tokens=430)
    done |= dict(tokens_tested=50, tokens_passed=40)
    line = figures.update(totals(**done))
    assert "7.50 tokens per forward pass" in line
    assert "25.0 fed; 80% of the tested tokens accepted" in line
    assert line.endswith("passes: 2 plan, 2 verify, 1 replay")
    assert figures.update(totals(**done)) is None


def test_engines_in_one_process_have_counters_of_their_own(figures):
    other = Figures("another")
    figures.update(totals(tokens=5))
    other.update(totals(tokens=7, plan=1))
    assert value("tokens") == 5 and value("passes", kind="plan") == 0
    assert value("tokens", model_name="another") == 7
    assert value("passes", model_name="another", kind="plan") == 1
