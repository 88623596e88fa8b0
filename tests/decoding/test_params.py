"""Presets: the published values, usable under explicit keys."""

from __future__ import annotations

import pytest

from vllm_refusion.decoding.params import PRESETS, DecodingParams, ParameterError

PUBLISHED = {
    "gsm8k": (32, 128, 0.9, 0.4),
    "math": (32, 64, 0.8, 0.6),
    "mbpp": (32, 128, 0.9, 0.3),
    "humaneval": (32, 128, 0.9, 0.4),
    "gpqa": (8, 16, 0.8, 0.2),
    "arc-c": (8, 8, 0.8, 0.1),
    "mmlu-pro": (16, 128, 0.9, 0.4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_ones(name):
    assert DecodingParams(4, 4, 0.1, 0.1).updated({"preset": name}) == DecodingParams(
        *PUBLISHED[name]
    )
    assert set(PRESETS) == set(PUBLISHED)


def test_explicit_keys_override_a_preset_in_any_order():
    wanted = DecodingParams(4, 16, 0.8, 0.2)
    assert DecodingParams().updated({"preset": "gpqa", "slot_size": 4}) == wanted
    assert DecodingParams().updated({"slot_size": 4, "preset": "gpqa"}) == wanted


def test_values_of_a_preset_and_explicit_ones_must_fit():
    with pytest.raises(ParameterError, match="block_length=16 .* slot_size=32"):
        DecodingParams().updated({"preset": "gpqa", "slot_size": 32})


@pytest.mark.parametrize("name", ["GSM8K", "", None, 3, ["gsm8k"]])
def test_unknown_presets(name):
    with pytest.raises(ParameterError, match="allowed presets are gsm8k, math"):
        DecodingParams().updated({"preset": name})


def test_names_that_mean_something_are_listed():
    with pytest.raises(ParameterError, match="slot_sise=8 .* slot_start, preset, trace"):
        DecodingParams().updated({"slot_sise": 8})


@pytest.mark.parametrize(
    "values, named",
    [
        ({"mode": "serial", "block_length": 32}, "block_length=32"),
        ({"mode": "serial", "token_threshold": 0.4}, "token_threshold=0.4"),
        ({"mode": "serial", "preset": "gpqa"}, "preset='gpqa'"),
        ({"mode": "serial", "infill": "propose"}, "infill='propose'"),
        ({"infill": "corrected"}, "infill='corrected' .* 'propose' and 'correct'"),
        ({"mode": "both"}, "mode='both' .* 'parallel' and 'serial'"),
        ({"mode": 1}, "mode=1"),
        ({"slot_start": "next"}, "slot_start='next'.*this server's is 'mask'"),
    ],
)
def test_a_request_sets_nothing_that_has_no_effect(values, named):
    with pytest.raises(ParameterError, match=named):
        DecodingParams().of_request(values)


def test_serial_mode_ignores_defaults_of_parallel_mode():
    values = {"preset": "gpqa", "mode": "serial", "slot_start": "next", "infill": "correct"}
    defaults = DecodingParams().updated(values)
    params = defaults.of_request({"slot_size": 5})  # the default blocks are of 16
    assert (params.mode, params.slot_start, params.slot_size) == ("serial", "next", 5)
    assert defaults.of_request({"mode": "parallel"}) == DecodingParams(
        8, 16, 0.8, 0.2, slot_start="next", infill="correct"
    )
    with pytest.raises(ParameterError, match="block_length=16"):
        defaults.of_request({"mode": "parallel", "slot_size": 5})


def test_the_first_block_ends_with_the_budget():
    params = DecodingParams(8, 32)
    assert [params.first_rows(tokens) for tokens in (1, 8, 9, 31, 32, 33)] == [
        8,
        8,
        16,
        32,
        32,
        32,
    ]
