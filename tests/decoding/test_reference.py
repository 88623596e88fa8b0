"""The reference decoder against cases worked by hand, and against decoding without a cache."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conformance import MODELS, build_model
from vllm_refusion.decoding import reference
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import decode

VOCAB, MASK, EOS, STOP = 16, 15, 14, 13
NAMES = {"M": MASK, "E": EOS, "S": STOP}
PROMPT = [1, 2, 3]

pytestmark = pytest.mark.usefixtures("one_thread")


class Script:
    """A model whose logits the test writes: passes apart by ``|``, with a word for each row.

    ``4:.5,M:.3`` gives token 4 probability .5 and the mask .3 (E is EOS, S a stop token); the rest
    is spread evenly over the other tokens. ``-`` is an even row, which must not matter. Records of
    every pass the ids, the RoPE positions less the prompt's length, the context's length, and per
    row which rows of the pass it sees.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, *passes: str) -> None:
        texts = [text for part in passes for text in part.split("|")]
        self.passes = [["-"] * len(PROMPT), *(text.split() for text in texts if text)]
        self.ids, self.positions, self.contexts, self.visible = [], [], [], []

    def __call__(self, input_ids, position_ids, attention_mask, past_key_values, use_cache):
        rows = input_ids.shape[1]
        assert use_cache and position_ids.shape == (1, rows)
        assert attention_mask.shape[:3] == (1, 1, rows) and attention_mask.dtype == self.dtype
        script = self.passes[len(self.ids)]
        assert len(script) == rows, f"pass {len(self.ids)} feeds {rows} rows"
        context = attention_mask.shape[-1] - rows
        seen = attention_mask[0, 0] == 0
        assert seen[:, :context].all() and (attention_mask[0, 0][~seen] < -1e30).all()
        self.ids.append(input_ids[0].tolist())
        self.positions.append([p - len(PROMPT) for p in position_ids[0].tolist()])
        self.contexts.append(context)
        self.visible.append([row.nonzero()[:, 0].tolist() for row in seen[:, context:]])
        return SimpleNamespace(logits=torch.stack([_logits(row) for row in script])[None])

    def decode(self, params: DecodingParams, **options) -> reference.Decoded:
        options = {"mask_token_id": MASK, "eos_token_id": EOS} | options
        decoded = decode(self, PROMPT, params, **options)
        assert len(self.ids) == len(self.passes), "not every scripted pass was asked for"
        assert [p.width for p in decoded.passes] == [len(ids) for ids in self.ids[1:]]
        return decoded


def _logits(word: str) -> torch.Tensor:
    pairs = [pair.split(":") for pair in word.split(",") if pair != "-"]
    row = {NAMES.get(token) or int(token): float(chance) for token, chance in pairs}
    rest = (1.0 - sum(row.values())) / (VOCAB - len(row))
    return torch.tensor([row.get(token, rest) for token in range(VOCAB)]).log()


def kinds(decoded: reference.Decoded) -> list[str]:
    return [p.kind for p in decoded.passes]


def causal(rows: int) -> list[list[int]]:
    return [list(range(row + 1)) for row in range(rows)]


def isolated(*lengths: int) -> list[list[int]]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [list(range(s, s + i + 1)) for s, n in zip(starts, lengths) for i in range(n)]


def test_whole_prefix_is_committed_and_the_next_block_follows():
    script = Script("4:.9 5:.3 6:.8 7:.3 | 5:.5 - 7:.6 - | 8:.6 9:.3 | 9:.5 -")
    decoded = script.decode(DecodingParams(2, 4, 0.5, 0.4), max_tokens=6)
    assert decoded.tokens == [4, 5, 6, 7, 8, 9]
    assert decoded.commit_order == [0, 1, 2, 3, 4, 5]
    assert decoded.passes == [("plan", 4), ("verify", 4), ("plan", 2), ("verify", 2)]
    assert decoded.tpf == 6 / 4
    assert script.ids == [PROMPT, [MASK] * 4, [4, 5, 6, 7], [MASK] * 2, [8, 9]]
    assert script.positions[1:] == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5], [4, 5]]
    assert script.contexts == [0, 3, 3, 7, 7]
    assert script.visible == [causal(3), causal(4), causal(4), causal(2), causal(2)]
    assert {"whole_prefix", "several_slots", "later_block", "short_last_block", "no_eos"} == (
        decoded.branches
    )


def test_partial_prefix_puts_the_other_slots_back():
    script = Script(
        "4:.9 5:.3 6:.9 7:.3 8:.9 9:.3",
        # the second slot fails; the third passes, but behind the failure
        "5:.5 - 7:.3 - 9:.9 -",
        "10:.9 11:.3 12:.1 -",
        "11:.5 -",
        "13:.2 0:.2",
        "0:.5 -",
    )
    decoded = script.decode(DecodingParams(2, 6, 0.5, 0.4), max_tokens=6)
    assert decoded.tokens == [4, 5, 10, 11, 13, 0]
    assert kinds(decoded) == ["plan", "verify"] * 3
    assert script.positions[3] == [2, 3, 4, 5]
    assert script.contexts[1:] == [3, 3, 5, 5, 7, 7]
    assert "partial_prefix" in decoded.branches and "infill_one_round" not in decoded.branches


def test_no_whole_slot_goes_through_rounds_of_isolated_infill():
    script = Script(
        "4:.9 5:.3 6:.3 7:.9 8:.3 9:.3",
        # slot 0: 5 passes, 6 fails; slot 1: 8 fails, so that 9 is not even tested
        "5:.5 6:.3 - 8:.2 9:.9 -",
        # predict 4 5 m | 7 m m
        "- - 10:.9 - 11:.9 12:.9",
        # verify 4 5 10 | 7 11 12: 10 and 11 are accepted unconditionally, 12 fails
        "- 10:.01 - 11:.01 12:.4 -",
        # predict 7 11 m alone: slot 0 is complete
        "- - 13:.9",
        # verify both: the last pass has the KV of all final tokens
        "- - - - - -",
    )
    decoded = script.decode(DecodingParams(3, 6, 0.5, 0.4), max_tokens=6)
    assert decoded.tokens == [4, 5, 10, 7, 11, 13]
    assert decoded.commit_order == [0, 1, 2, 3, 4, 5]
    assert kinds(decoded) == ["plan", "verify"] + ["predict", "infill_verify"] * 2
    assert script.ids[3:] == [
        [4, 5, MASK, 7, MASK, MASK],
        [4, 5, 10, 7, 11, 12],
        [7, 11, MASK],
        [4, 5, 10, 7, 11, 13],
    ]
    assert script.visible[3:] == [isolated(3, 3), isolated(3, 3), isolated(3), isolated(3, 3)]
    assert script.positions[5:] == [[3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert script.contexts[1:] == [3] * 6
    assert {"infill_many_rounds", "no_eos", "several_slots"} == decoded.branches


def test_slot_that_passed_whole_waits_complete_in_infill_and_is_not_tested_again():
    script = Script(
        "4:.9 5:.3 6:.9 7:.3",
        "5:.3 - 7:.9 -",
        "- 8:.9",
        # isolated, token 7 would fail now; it was accepted in the global verification
        "- - 7:.001 -",
    )
    decoded = script.decode(DecodingParams(2, 4, 0.5, 0.4), max_tokens=4)
    assert decoded.tokens == [4, 8, 6, 7]
    assert script.ids[3:] == [[4, MASK], [4, 8, 6, 7]]
    assert script.visible[4] == isolated(2, 2)
    assert {"infill_one_round", "infill_complete_on_entry"} <= decoded.branches


def test_without_a_sure_slot_the_best_single_one_is_chosen_out_of_order():
    script = Script("4:.2 - 5:.4 6:.3 7:.3 - | 6:.5 - | 8:.9 9:.3 10:.9 11:.3 | 9:.5 - 11:.5 -")
    decoded = script.decode(DecodingParams(2, 6, 0.5, 0.4), max_tokens=6)
    assert decoded.tokens == [8, 9, 5, 6, 10, 11]
    assert decoded.commit_order == [2, 3, 0, 1, 4, 5]
    assert script.positions[1:] == [[0, 1, 2, 3, 4, 5], [2, 3], [0, 1, 4, 5], [0, 1, 4, 5]]
    assert script.contexts[1:] == [3, 3, 5, 5]
    assert "forced_slot" in decoded.branches


def test_chosen_slots_go_by_position_and_not_by_certainty():
    script = Script("4:.6 5:.3 6:.95 7:.3 | 5:.5 - 7:.5 -")
    decoded = script.decode(DecodingParams(2, 4, 0.5, 0.4), max_tokens=4)
    assert script.ids[2] == [4, 5, 6, 7] and decoded.commit_order == [0, 1, 2, 3]


def test_first_token_of_a_slot_is_never_tested():
    script = Script("4:.9 5:.3 6:.9 7:.3 | 5:.5 6:.001 7:.5 -")
    assert script.decode(DecodingParams(2, 4, 0.5, 0.4), max_tokens=4).tokens == [4, 5, 6, 7]


def test_probability_equal_to_a_threshold_does_not_exceed_it():
    script = Script(
        # one half to the bit, and a hair less: slot 0 is not chosen
        "4:.5,5:.499999986 6:.3 7:.9 8:.3",
        "8:.5,9:.499999986 -",
        "- 9:.9 | - - | 10:.4 11:.4 | 11:.6 -",
    )
    decoded = script.decode(DecodingParams(2, 4, 0.5, 0.5), max_tokens=4)
    assert decoded.tokens == [10, 11, 7, 9] and decoded.commit_order == [2, 3, 0, 1]
    assert {"forced_slot", "infill_one_round"} <= decoded.branches
    assert decoded.threshold_margin == 0.0


def test_thresholds_are_float32_as_probabilities_are():
    threshold = _logits("4:.6").softmax(-1)[4].item() * (1 - 1e-9)
    script = Script("4:.6 5:.7 | - | 4:.6 | -")
    decoded = script.decode(DecodingParams(1, 2, threshold, 0.5), max_tokens=2)
    assert decoded.tokens == [4, 5] and decoded.commit_order == [1, 0]


def test_ties_go_to_the_lowest_id_and_the_lowest_position():
    script = Script("7:.3,5:.3 6:.3 4:.3,9:.3 6:.3 | 6:.9 - | 9:.3,8:.3 6:.3 | 6:.9 -")
    decoded = script.decode(DecodingParams(2, 4, 0.5, 0.4), max_tokens=4)
    assert decoded.tokens == [5, 6, 8, 6] and decoded.commit_order == [0, 1, 2, 3]
    assert decoded.threshold_margin == 0.0 and decoded.argmax_margin == 0.0


def test_eos_in_verified_prefix_leaves_masked_slots_before_it():
    script = Script("4:.4 - E:.9 5:.3 6:.8 7:.3 | 5:.5 - 7:.5 - | 8:.4 9:.4 | 9:.5 -")
    decoded = script.decode(DecodingParams(2, 6, 0.5, 0.4), max_tokens=12)
    assert decoded.tokens == [8, 9, EOS]
    # cut right after EOS; the later chosen slot and the later block are dropped
    assert decoded.commit_order == [2, 0, 1]
    assert script.contexts[1:] == [3, 3, 4, 4]
    assert kinds(decoded) == ["plan", "verify"] * 2
    assert {"eos_in_verify", "early_eos_with_masked_slots_before"} <= decoded.branches
    assert "no_eos" not in decoded.branches and "later_block" not in decoded.branches


def test_eos_in_the_accepted_part_of_a_slot_that_fails_later():
    script = Script("4:.9 5:.3 - 6:.9 E:.3 7:.3 | 5:.5 0:.5 - E:.5 7:.1 -")
    decoded = script.decode(DecodingParams(3, 6, 0.5, 0.4), max_tokens=6)
    assert decoded.tokens == [4, 5, 0, 6, EOS]
    assert decoded.commit_order == [0, 1, 2, 3, 4] and kinds(decoded) == ["plan", "verify"]


def test_eos_behind_the_failure_is_no_eos():
    script = Script("4:.9 E:.3 6:.9 E:.3 | E:.3 - E:.3 - | - 5:.9 - 7:.9 | - - - -")
    decoded = script.decode(DecodingParams(2, 4, 0.5, 0.4), max_tokens=4)
    assert decoded.tokens == [4, 5, 6, 7] and "no_eos" in decoded.branches


def test_eos_found_later_and_earlier_in_position_moves_the_end():
    script = Script("4:.3 - 5:.3 - E:.9 - | - - | 6:.3 - E:.9 - | - - | 7:.3 8:.3 | 8:.9 -")
    decoded = script.decode(DecodingParams(2, 6, 0.5, 0.4), max_tokens=6)
    assert decoded.tokens == [7, 8, EOS]
    assert decoded.commit_order == [4, 2, 0, 1]
    assert "eos_before_committed_eos" in decoded.branches


def test_eos_in_infill_drops_by_position():
    script = Script(
        "4:.9 - - 5:.9 - - 6:.9 7:.3 8:.3 - - -",
        # slots 0, 1, 2 are chosen (not 3); slot 2 passes whole, the others but their first token
        "- - - - - - 7:.9 8:.9 -",
        "- 9:.9 10:.9 - E:.9 11:.9",
        # slot 1 finds EOS: complete, cut; slots 2 and 3 are dropped though 2 was complete
        "- 10:.1 - - 11:.9 - - - -",
        "- - 12:.9",
        "- - - - -",
    )
    decoded = script.decode(DecodingParams(3, 12, 0.5, 0.4), max_tokens=24)
    assert decoded.tokens == [4, 9, 12, 5, EOS]
    assert decoded.commit_order == [0, 1, 2, 3, 4]
    assert script.ids[5:] == [[4, 9, MASK], [4, 9, 12, 5, EOS]]
    assert script.visible[6] == isolated(3, 2)
    assert {"eos_in_infill", "infill_drops_slots"} <= decoded.branches


def test_eos_among_the_tags_that_enter_infill():
    script = Script(
        "4:.9 5:.3 E:.9 6:.3 7:.9 8:.3",
        "- - 6:.9 - - -",
        # slot 1 is EOS alone, complete on entry; slot 2 is gone before the first predict
        "- 9:.9",
        "- - -",
    )
    decoded = script.decode(DecodingParams(2, 6, 0.5, 0.4), max_tokens=6)
    assert decoded.tokens == [4, 9, EOS] and decoded.commit_order == [0, 1, 2]
    assert script.ids[3:] == [[4, MASK], [4, 9, EOS]]
    assert script.visible[4] == isolated(2, 1)
    assert {"infill_complete_on_entry", "eos_in_infill", "infill_drops_slots"} <= decoded.branches


def test_eos_of_an_earlier_slot_drops_a_slot_that_ended_on_eos_before():
    script = Script(
        "4:.9 - - E:.9 - -",
        "- - - - - -",
        "- 5:.9 6:.9",
        "- 6:.1 - -",
        "- - E:.9",
        "- - - -",
    )
    decoded = script.decode(DecodingParams(3, 6, 0.5, 0.4), max_tokens=6)
    assert decoded.tokens == [4, 5, EOS] and decoded.commit_order == [0, 1, 2]


def test_masked_slots_before_an_infill_eos_are_decoded_as_usual():
    script = Script("4:.4 - 5:.9 - 6:.4 - | - - | - E:.9 | - - | 7:.4 8:.4 | 8:.9 -")
    decoded = script.decode(DecodingParams(2, 6, 0.5, 0.4), max_tokens=12)
    assert decoded.tokens == [7, 8, 5, EOS] and decoded.commit_order == [2, 3, 0, 1]
    assert {"eos_in_infill", "early_eos_with_masked_slots_before"} <= decoded.branches


CORRECT = DecodingParams(3, 6, 0.5, 0.4, infill="correct")


def test_correct_picks_a_failed_token_anew_in_the_row_that_failed_it():
    script = Script(
        "4:.9 5:.3 6:.3 7:.9 8:.3 9:.3",
        # slot 0: 5 fails, and 10 takes its place; slot 1: 8 fails, but its row saw slot 0
        "10:.3,5:.2 6:.9 - 11:.5,8:.2 - -",
        # predict 4 10 m | 7 m m
        "- - 6:.9 - 12:.9 13:.9",
        # verify 4 10 6 | 7 12 13: the first proposal of a slot is tested too
        "- 6:.5 - 9:.3,12:.2 13:.9 -",
        # predict 7 9 m: 9 is fed for the first time, slot 0 is complete
        "- - 0:.9",
        # verify all
        "- - - - 0:.5 -",
    )
    decoded = script.decode(CORRECT, max_tokens=6)
    assert decoded.tokens == [4, 10, 6, 7, 9, 0]
    assert decoded.commit_order == [0, 1, 2, 3, 4, 5]
    assert kinds(decoded) == ["plan", "verify"] + ["predict", "infill_verify"] * 2
    assert script.ids[3:] == [
        [4, 10, MASK, 7, MASK, MASK],
        [4, 10, 6, 7, 12, 13],
        [7, 9, MASK],
        [4, 10, 6, 7, 9, 0],
    ]
    assert script.contexts[1:] == [3] * 6
    assert {"infill_many_rounds", "no_eos", "several_slots"} == decoded.branches


def test_a_correction_that_ends_its_slot_is_fed_before_it_is_committed():
    script = Script(
        "4:.9 - - 5:.1 - -",
        # slot 0: all but the last token pass, and the correction completes it
        "0:.9 0:.3,7:.35 -",
        # nothing is left to propose
        "- - -",
        "5:.9 - -",
        # slot 1: the same in an infill
        "6:.35 8:.9 -",
        "- - 9:.3",
        "- 8:.35,9:.34 -",
        "- - -",
    )
    decoded = script.decode(CORRECT, max_tokens=6)
    assert decoded.tokens == [4, 0, 7, 5, 6, 8]
    assert script.ids[3] == [4, 0, 7] and script.ids[8] == [5, 6, 8]
    assert script.contexts[3:5] == [3, 6]
    rounds = [["plan", "verify", "infill_verify"]]
    rounds += [["plan", "verify", "predict", "infill_verify", "infill_verify"]]
    assert kinds(decoded) == sum(rounds, [])
    assert {"infill_without_round", "infill_one_round", "correction_ends_infill"} < decoded.branches


def test_a_pass_that_is_made_anyway_feeds_a_correction_that_ends_its_slot():
    script = Script(
        "4:.9 - - 5:.9 - -",
        "0:.9 7:.35 - 0:.1 - -",
        # slot 0 is complete
        "- 8:.9 9:.9",
        "- - - 8:.9 9:.9 -",
    )
    decoded = script.decode(CORRECT, max_tokens=6)
    assert decoded.tokens == [4, 0, 7, 5, 8, 9]
    assert script.ids[3:] == [[5, MASK, MASK], [4, 0, 7, 5, 8, 9]]


def test_a_correction_may_be_an_eos_or_be_barred_from_it():
    passes = ("4:.9 - - 5:.9 - -", "E:.3,6:.2 - - - - -")
    # the other slot is dropped, though its first token is accepted
    decoded = Script(*passes, "- -").decode(CORRECT, max_tokens=12)
    assert decoded.tokens == [4, EOS] and decoded.commit_order == [0, 1]
    assert {"correction_is_eos", "eos_in_infill", "infill_drops_slots"} <= decoded.branches

    rest = ("- - 7:.9 - 8:.9 9:.9", "- 7:.9 - 8:.9 9:.9 -")
    decoded = Script(*passes, *rest).decode(CORRECT, max_tokens=6, min_tokens=2)
    assert decoded.tokens == [4, 6, 7, 5, 8, 9]


def test_an_eos_drops_a_correction_that_waits_to_be_fed():
    script = Script(
        "4:.9 - - 5:.9 - -",
        # slot 0: 0 passes, 7 is a correction
        "7:.3 - - 0:.9 0:.1 -",
        # predict 4 7 m | 5 0 m
        "- - E:.9 - - 9:.9",
        # slot 0 ends in an accepted EOS, slot 1 in a correction
        "- E:.9 - - 8:.3 -",
    )
    decoded = script.decode(CORRECT, max_tokens=6)
    assert decoded.tokens == [4, 7, EOS] and len(decoded.passes) == 4


def test_noise_of_a_correction_is_that_of_the_next_operation(monkeypatch):
    calls = []

    def gumbel_noise(seed, draw, positions, vocab):
        calls.append((draw, positions.tolist()))
        return torch.zeros(len(positions), vocab)

    fake = SimpleNamespace(gumbel_noise=gumbel_noise)
    monkeypatch.setitem(sys.modules, "vllm_refusion.decoding.noise", fake)
    script = Script(
        "4:.9 - - 5:.1 - -",
        "6:.3 - -",
        "- - 7:.9",
        "- 8:.3 -",
        "- - -",
        "5:.9 6:.3 7:.3 | 6:.9 7:.9 -",
    )
    script.decode(CORRECT, max_tokens=6, temperature=1.0)
    assert calls == [
        (0, [0, 1, 2, 3, 4, 5]),
        (1, [1]),
        (1, [2]),
        (2, [2]),
        (2, [3, 4, 5]),
    ]


def test_log_probability_of_a_correction_is_that_of_the_row_that_failed_its_place():
    script = Script("4:.9 - -", "6:.3,5:.2 - -", "- - 7:.9", "- 7:.6 -")
    decoded = script.decode(CORRECT, max_tokens=3, logprobs=1)
    chances = [math.exp(row[t]) for row, t in zip(decoded.logprobs, decoded.tokens)]
    assert decoded.tokens == [4, 6, 7] and chances == pytest.approx([0.9, 0.3, 0.6])


def test_ignored_eos_is_an_ordinary_token():
    script = Script("E:.9 5:.3 E:.9 E:.3 | 5:.5 - E:.5 -")
    params = DecodingParams(2, 4, 0.5, 0.4)
    decoded = script.decode(params, max_tokens=4, eos_token_id=None, min_tokens=4)
    assert decoded.tokens == [EOS, 5, EOS, EOS] and "no_eos" in decoded.branches


def test_budget_is_rounded_up_to_slots_and_the_output_cut():
    script = Script(
        "4:.9 5:.3 6:.3 7:.9 E:.3 8:.3",
        # EOS lies in the budget but not in the output
        "5:.9 6:.9 - E:.9 - -",
    )
    decoded = script.decode(DecodingParams(3, 9, 0.5, 0.4), max_tokens=4)
    assert decoded.tokens == [4, 5, 6, 7] and decoded.commit_order == [0, 1, 2, 3, 4]
    assert decoded.tpf == 2.0 and "short_last_block" in decoded.branches


def test_mask_token_is_never_a_draft_and_keeps_its_probability():
    script = Script(
        "M:.6,4:.3 M:.9 M:.2,6:.45 7:.3",
        # slot 1 leads although the mask is most likely in slot 0; neither exceeds 0.5
        "- -",
        "M:.9 M:.9,8:.05",
        "- -",
        "5:.3,M:.4 M:.9,9:.05",
        "9:.5 -",
    )
    decoded = script.decode(DecodingParams(2, 4, 0.5, 0.4), max_tokens=4)
    assert decoded.tokens == [5, 9, 6, 8]
    assert script.ids[2] == [6, 7] and script.ids[4] == [6, 8]


def test_neither_eos_nor_stop_tokens_are_picked_below_min_tokens():
    script = Script(
        "E:.5,4:.3 S:.5,5:.3 S:.8,6:.1 E:.5,7:.3",
        "- -",
        # the predict pass bars them too at position 1
        "- E:.6,S:.3,8:.05",
        "- -",
        "S:.8,6:.1 E:.5,7:.3",
        "E:.3 -",
        "- S:.5",
        "- -",
    )
    params = DecodingParams(2, 4, 0.7, 0.4)
    decoded = script.decode(params, max_tokens=4, min_tokens=3, stop_token_ids=[STOP])
    # position 2 is below min_tokens, position 3 is not: there EOS is drafted, then a stop token
    assert decoded.tokens == [4, 8, 6, STOP]
    assert script.ids[2] == [4, 5] and script.ids[6] == [6, EOS]


def test_output_is_cut_after_the_first_stop_token_and_decoding_goes_on():
    script = Script("4:.9 5:.3 5:.9 7:.3 | 5:.9 - 7:.9 -")
    params = DecodingParams(2, 4, 0.5, 0.4)
    decoded = script.decode(params, max_tokens=4, stop_token_ids={5, 6})
    assert decoded.tokens == [4, 5] and decoded.commit_order == [0, 1, 2, 3]


def test_noise_picks_drafts_and_proposals_but_certainty_and_tests_are_raw(monkeypatch):
    calls = []

    def gumbel_noise(seed, draw, positions, vocab):
        calls.append((seed, draw, positions.tolist(), vocab))
        noise = torch.zeros(len(positions), vocab)
        noise[:, 10 + draw] = 100.0  # picks token 10, 11, .. in the draws 0, 1, ..
        noise[:, MASK] = 1000.0
        return noise

    fake = SimpleNamespace(gumbel_noise=gumbel_noise)
    monkeypatch.setitem(sys.modules, "vllm_refusion.decoding.noise", fake)
    script = Script(
        # 10 is drafted; the raw certainty of slot 0 is 0.1 and of slot 1 is 0.2, so it is forced
        "4:.8,10:.1 5:.9 6:.7,10:.2 -",
        "10:.3 -",
        "- 7:.99",
        "- -",
        "12:.01,4:.9 -",
        "12:.5 -",
    )
    params = DecodingParams(2, 4, 0.5, 0.4)
    decoded = script.decode(params, max_tokens=4, temperature=0.5, seed=77)
    assert decoded.tokens == [12, 12, 10, 11] and decoded.commit_order == [2, 3, 0, 1]
    assert calls == [
        (77, 0, [0, 1, 2, 3], VOCAB),
        (77, 1, [3], VOCAB),
        (77, 2, [0, 1], VOCAB),
    ]


@pytest.mark.parametrize(("temperature", "picked"), [(2.0, 5), (0.5, 4)])
def test_temperature_divides_the_logits_before_the_noise(monkeypatch, temperature, picked):
    def gumbel_noise(seed, draw, positions, vocab):
        return torch.zeros(len(positions), vocab).index_fill_(1, torch.tensor([5]), 1.0)

    fake = SimpleNamespace(gumbel_noise=gumbel_noise)
    monkeypatch.setitem(sys.modules, "vllm_refusion.decoding.noise", fake)
    # log(0.6 / 0.2) = 1.1: over T less than the noise of 1 at T = 2, more at T = 0.5
    script = Script("4:.6,5:.2", "-")
    params = DecodingParams(1, 1, 0.5, 0.4)
    assert script.decode(params, max_tokens=1, temperature=temperature).tokens == [picked]


@pytest.mark.parametrize(("prompt", "max_tokens"), [([], 4), ([1], 0)])
def test_nothing_to_start_from_or_to_decode_is_refused(prompt, max_tokens):
    with pytest.raises(ValueError, match="at least 1"):
        decode(Script(), prompt, DecodingParams(), mask_token_id=MASK, max_tokens=max_tokens)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def qwen3(request, tmp_path_factory) -> Any:
    directory = build_model("qwen3-gqa2", tmp_path_factory.mktemp("qwen3"))
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=request.param
    ).eval()


class Recorder:
    """Passes calls on to a model; keeps the ids and cache lengths of each and the cache itself."""

    def __init__(self, model: Any) -> None:
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.fed, self.contexts, self.cache = [], [], None

    def __call__(self, **inputs):
        self.cache = inputs["past_key_values"]
        self.fed.append(inputs["input_ids"][0].tolist())
        self.contexts.append(self.cache.get_seq_length())
        return self.model(**inputs)


MIXED = DecodingParams(slot_size=4, block_length=16, slot_threshold=0.5, token_threshold=0.05)
REAL = {"mask_token_id": MODELS["qwen3-gqa2"].mask_token_id, "max_tokens": 94}


@pytest.mark.parametrize(
    "infill, branches",
    [
        ("propose", {"infill_many_rounds", "whole_prefix", "partial_prefix", "several_slots"}),
        ("correct", {"infill_many_rounds", "correction_ends_infill", "several_slots"}),
    ],
)
def test_committed_kv_equals_a_recomputation_without_cache(qwen3, infill, branches):
    recorder = Recorder(qwen3)
    prompt = [5, 17, 42, 9, 30]
    params = replace(MIXED, infill=infill)
    decoded = decode(recorder, prompt, params, eos_token_id=None, **REAL)
    assert branches <= decoded.branches
    assert decoded.commit_order != sorted(decoded.commit_order)

    # What each pass committed shows in the cache length that the next one finds.
    lengths = [*recorder.contexts[1:], recorder.cache.get_seq_length()]
    total = lengths[-1]
    assert total == len(prompt) + len(decoded.commit_order)
    ids = [t for fed, a, b in zip(recorder.fed, recorder.contexts, lengths) for t in fed[: b - a]]
    positions = [*range(len(prompt)), *(len(prompt) + p for p in decoded.commit_order)]
    response = dict(zip(decoded.commit_order, ids[len(prompt) :]))
    assert [response[p] for p in range(REAL["max_tokens"])] == decoded.tokens

    visible = torch.ones(total, total).tril().bool()
    for (kind, _), start, end in zip(decoded.passes, recorder.contexts[1:], lengths[1:]):
        if kind == "infill_verify":
            slot = torch.tensor(positions[start:end]).sub(len(prompt)) // MIXED.slot_size
            visible[start:end, start:end] &= slot == slot[:, None]
    mask = torch.zeros(1, 1, total, total).masked_fill_(~visible, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        again = qwen3(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            attention_mask=mask,
            use_cache=True,
        ).past_key_values
    for cached, fresh in zip(recorder.cache.layers, again.layers, strict=True):
        torch.testing.assert_close(cached.keys, fresh.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cached.values, fresh.values, rtol=1e-4, atol=1e-5)


def test_a_moved_slot_sees_the_slots_placed_before_it(qwen3):
    def logits(first_token: int) -> torch.Tensor:
        canvas = reference._Canvas(qwen3, [5, 17, 42])
        canvas.feed("verify", [(8, [first_token, 20, 21, 22])])
        canvas.keep(4)
        return canvas.feed("plan", [(0, [60] * 4)])[0]

    with torch.inference_mode():
        assert (logits(7) - logits(8)).abs().amax(dim=-1).gt(1e-3).all()


def test_temperature_is_reproducible_and_depends_on_the_seed(qwen3):
    def sample(seed: int) -> list[int]:
        options = {"temperature": 1.0, "seed": seed, "eos_token_id": None}
        return decode(qwen3, [5, 17, 42], MIXED, **REAL, **options).tokens

    greedy = decode(qwen3, [5, 17, 42], MIXED, **REAL).tokens
    assert sample(1) == sample(1)
    assert len({tuple(tokens) for tokens in (greedy, sample(1), sample(2))}) == 3
