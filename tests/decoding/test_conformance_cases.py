"""The conformance cases run every branch of the algorithm, and no answer hangs on a near tie."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import conformance
from conformance import MAX_MODEL_LEN, MODELS, build_model, cases, expected

REQUIRED = {
    "whole_prefix",
    "partial_prefix",
    "infill_one_round",
    "infill_many_rounds",
    "infill_complete_on_entry",
    "infill_drops_slots",
    "eos_in_verify",
    "eos_in_infill",
    "early_eos_with_masked_slots_before",
    "eos_before_committed_eos",
    "no_eos",
    "forced_slot",
    "several_slots",
    "short_last_block",
    "later_block",
    "infill_without_round",
    "correction_ends_infill",
    "correction_is_eos",
}
# About 30 times what two attention implementations of transformers differ by on these cases.
THRESHOLD_MARGIN, ARGMAX_MARGIN = 1e-4, 1e-3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(name, tmp_path_factory) -> Path:
    return build_model(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def answers(name, directory):
    return expected(directory, cases(name))


def test_every_branch_is_run_by_some_case(name, answers):
    for case, answer in zip(cases(name), answers, strict=True):
        print(f"{case.label}: {len(answer.tokens)} tokens, {' '.join(sorted(answer.branches))}")
    runs = Counter(branch for answer in answers for branch in answer.branches)
    print(dict(runs))
    assert set(runs) >= REQUIRED


def test_no_decision_is_a_near_tie(name, answers):
    close = [
        (case.label, answer.threshold_margin, answer.argmax_margin)
        for case, answer in zip(cases(name), answers, strict=True)
        if answer.threshold_margin < THRESHOLD_MARGIN or answer.argmax_margin < ARGMAX_MARGIN
    ]
    assert not close


def test_cases_cover_the_ranges_of_a_request(name):
    made = cases(name)
    assert len(made) >= 60 and len({case.label for case in made}) == len(made)
    for case in made:
        assert MODELS[name].mask_token_id not in case.prompt_ids
        assert len(case.prompt_ids) + case.max_tokens <= MAX_MODEL_LEN
    assert {1, 2, 4, 8, 16, 32} <= {case.params.slot_size for case in made}
    assert {case.params.block_length for case in made} >= {4, 8, 16, 32, 64, 128}
    assert sum(case.params.block_length == case.params.slot_size for case in made) >= 5
    assert sum(case.max_tokens % case.params.slot_size > 0 for case in made) >= 20
    full = [case for case in made if len(case.prompt_ids) + case.max_tokens == MAX_MODEL_LEN]
    past = [
        case
        for case in full
        if len(case.prompt_ids) + case.params.budget(case.max_tokens) > MAX_MODEL_LEN
    ]
    assert len(full) - len(past) >= 2 and len(past) >= 2
    assert len({case.seed for case in made if case.temperature}) >= 10


@pytest.mark.parametrize(
    ("option", "neutral"), [("min_tokens", 0), ("ignore_eos", False), ("temperature", 0.0)]
)
def test_options_change_answers(name, directory, answers, option, neutral):
    chosen = [i for i, case in enumerate(cases(name)) if getattr(case, option)]
    without = expected(directory, [replace(cases(name)[i], **{option: neutral}) for i in chosen])
    changed = [i for i, answer in zip(chosen, without) if answer.tokens != answers[i].tokens]
    assert changed


def test_stop_tokens_cut_answers(name, answers):
    made = zip(cases(name), answers, strict=True)
    assert any(answer.tokens[-1] in case.stop_token_ids for case, answer in made)


def test_checkpoint_has_the_published_form(name, directory, tmp_path):
    spec = MODELS[name]
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM" if spec.llama else "Qwen3ForCausalLM"]
    assert config["mask_token_id"] == spec.mask_token_id
    assert config["eos_token_id"] == AutoTokenizer.from_pretrained(directory).eos_token_id
    assert config["max_position_embeddings"] == MAX_MODEL_LEN
    again = build_model(name, tmp_path) / "model.safetensors"
    assert again.read_bytes() == (directory / "model.safetensors").read_bytes()


def test_answers_are_kept_for_the_same_weights_and_cases(name, directory, answers, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(conformance, "_decode", refuse)
    assert expected(directory, cases(name)) == answers
    with pytest.raises(AssertionError, match="decoded again"):
        expected(directory, cases(name)[:1])


class Distorted:
    """A model that is fed something else than the decoder asked for, but for the prompt."""

    def __init__(self, model: Any, kind: str) -> None:
        self.model, self.kind = model, kind
        self.device, self.dtype, self.config = model.device, model.dtype, model.config

    def __call__(self, attention_mask, position_ids, **inputs):
        rows, columns = attention_mask.shape[2:]
        context = columns - rows
        if context and self.kind == "positions in commit order":
            position_ids = torch.arange(context, columns)[None]
        if context and self.kind == "slots of infill see each other":
            hidden = torch.full((rows, rows), torch.finfo(self.dtype).min).triu(1)
            attention_mask = attention_mask.clone()
            attention_mask[0, 0, :, context:] = hidden
        return self.model(attention_mask=attention_mask, position_ids=position_ids, **inputs)


@pytest.mark.parametrize("kind", ["positions in commit order", "slots of infill see each other"])
def test_cases_notice_wrong_positions_and_visibility(name, directory, answers, kind):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sample = [(c, a) for c, a in zip(cases(name), answers) if c.max_tokens <= 100][::4]
    wrong = [conformance._decode(Distorted(model, kind), c).tokens != a.tokens for c, a in sample]
    assert sum(wrong) >= len(sample) / 4
