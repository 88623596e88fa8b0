"""What is decoded: every row of the tables, with its method and its decoder's settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_refusion.decoding.params import PRESETS


class Variant(NamedTuple):
    """``note`` says what the name leaves open."""

    method: str
    options: dict[str, Any] = {}
    note: str = ""


def _refusion(slot: int, block: int, method: str = "refusion", **options: Any) -> Variant:
    thresholds = {"slot_threshold": 0.9, "token_threshold": 0.4}
    note = "" if method == "refusion" else "trained with all options of docs/training.md"
    parameters = {"slot_size": slot, "block_length": block, **thresholds, **options}
    return Variant(method, parameters, note)


MAIN = {
    "ReFusion 32/128": Variant("refusion", vars(PRESETS["gsm8k"]), "the paper's GSM8K preset"),
    "ReFusion 8/32": _refusion(8, 32),
    "ReFusion 32/128, options": _refusion(32, 128, "refusion_options"),
    "ReFusion 8/32, options": _refusion(8, 32, "refusion_options"),
    "autoregressive": Variant("autoregressive", {}, "greedy"),
    "LLaDA": Variant("llada", {"stop": False}, "one token a pass, to the last position"),
    "LLaDA, stopped": Variant("llada", {}, "the same, up to the block with EOS"),
    "LLaDA, 2 a pass": Variant("llada", {"tokens_per_step": 2}, "two tokens a pass, stopped"),
    "LLaDA, 4 a pass": Variant("llada", {"tokens_per_step": 4}, "four tokens a pass, stopped"),
    "BD3-LM": Variant("bd3lm", {}, "first-hitting sampler, nucleus 0.9"),
    "BD3-LM, greedy": Variant("bd3lm", {"greedy": True}, "most probable token first"),
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
SAME_TEXT = {"LLaDA": "LLaDA, stopped"}
TIMED = [*MAIN, *RECOMPUTED]
