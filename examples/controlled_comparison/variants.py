"""What is decoded: every row of the tables, with its method and its decoder's settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from objectives import START

from vllm_refusion.decoding.params import PRESETS


class Variant(NamedTuple):
    """``note`` says what the name leaves open."""

    method: str
    options: dict[str, Any] = {}
    note: str = ""


def _refusion(slot: int, block: int, **options: Any) -> Variant:
    thresholds = {"slot_threshold": 0.9, "token_threshold": 0.4}
    return Variant("refusion", {"slot_size": slot, "block_length": block, **thresholds, **options})


def _serial(slot: int) -> Variant:
    return Variant("refusion", {"mode": "serial", "slot_size": slot})


REFUSION = {
    "ReFusion 32/128": Variant("refusion", vars(PRESETS["gsm8k"]), "the paper's GSM8K preset"),
    "ReFusion 8/32": _refusion(8, 32),
    "ReFusion 32/128, corrected": _refusion(32, 128, infill="correct"),
    "ReFusion 8/32, corrected": _refusion(8, 32, infill="correct"),
    "ReFusion 32, serial": _serial(32),
    "ReFusion 8, serial": _serial(8),
}
OPTIONS = "trained with all options of docs/training.md"
MAIN = {
    **REFUSION,
    **{
        f"{name}, options": variant._replace(method="refusion_options", note=OPTIONS)
        for name, variant in REFUSION.items()
    },
    "autoregressive start": Variant(START, {}, "greedy; what all methods start from"),
    "autoregressive": Variant("autoregressive", {}, "greedy"),
    "LLaDA": Variant("llada", {"stop": False}, "one token a pass, to the last position"),
    "LLaDA, stopped": Variant("llada", {}, "the same, up to the block with EOS"),
    "LLaDA, 2 a pass": Variant("llada", {"tokens_per_step": 2}, "two tokens a pass, stopped"),
    "LLaDA, 4 a pass": Variant("llada", {"tokens_per_step": 4}, "four tokens a pass, stopped"),
    "BD3-LM": Variant("bd3lm", {}, "first-hitting sampler, nucleus 0.9"),
    "BD3-LM, greedy": Variant("bd3lm", {"greedy": True}, "most probable token first"),
    "Dream": Variant("dream", {"stop": False}, "least entropy first, one token a step, all steps"),
    "Dream, stopped": Variant("dream", {}, "the same, up to the last mask before EOS"),
    "Dream, 2 a pass": Variant("dream", {"tokens_per_step": 2}, "two tokens a step, stopped"),
    "Dream, 4 a pass": Variant("dream", {"tokens_per_step": 4}, "four tokens a step, stopped"),
    "Dream, maskgit_plus": Variant(
        "dream", {"remasking": "maskgit_plus"}, "most probable token first, stopped"
    ),
    "Dream, origin": Variant("dream", {"remasking": "origin"}, "in random order, stopped"),
}
SIZES = {
    f"ReFusion {slot}/{block}": _refusion(slot, block)
    for block in (32, 64, 128)
    for slot in (4, 8, 16, 32)
}
RECOMPUTED = {
    f"ReFusion {slot}/{block}, recomputed": _refusion(slot, block, recompute=True)
    for slot, block in ((8, 32), (32, 128))
}
VARIANTS = {**SIZES, **RECOMPUTED, **MAIN}

# Decoded with another variant's passes: stopping early changes no token of the text.
SAME_TEXT = {"LLaDA": "LLaDA, stopped", "Dream": "Dream, stopped"}
