"""What a training run is asked for: what its outcome depends on, and how it is carried out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_refusion.adapters import LINEARS
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.training.order import OBJECTIVES

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
LABELS = ("response", "kl")
# What --mask-adapter has no use for.
HYBRID = (
    *("objective", "from_scratch", "slot_sizes", "block_share", "ordered_share", "joined_slots"),
    *("ar_weight", "mdm_weight", "infill_weight", "slot_certainty"),
)


def refuse(**checks: tuple[Any, bool, str]) -> None:
    """Raises ValueError for the first option that does not hold: (value, whether, allowed)."""
    for name, (value, holds, allowed) in checks.items():
        if not holds:
            raise ValueError(f"--{name.replace('_', '-')} {value}: allowed is {allowed}")


@dataclass(frozen=True)
class AdapterRecipe:
    """What a mask adapter depends on beside the rest of the ``Recipe``.

    Attributes:
        adapter_layers: "all", "upper-half", or "N-M" with the last one included.
        adapter_modules: "all", or names of the linear layers that are adapted, with commas.
        chain_length: masks behind a cut.
        chains_per_row: cuts of an example each time it is seen.
        labels: what a mask predicts: "response", its token; "kl", what the backbone predicts there.
        on_policy: the temperature at which the backbone itself writes the responses; None: they
            are those of the data.
        max_tokens: of such a response.
        skips_known: see ``MaskAdapter``.
    """

    rank: int = 64
    adapter_layers: str = "all"
    adapter_modules: str = "all"
    chain_length: int = 16
    chains_per_row: int = 8
    labels: str = "response"
    on_policy: float | None = None
    max_tokens: int = 512
    skips_known: bool = True

    def __post_init__(self) -> None:
        counts = ("rank", "chain_length", "chains_per_row", "max_tokens")
        checks = {n: (getattr(self, n), getattr(self, n) > 0, "an integer above 0") for n in counts}
        temperature = self.on_policy
        modules = f"all, or some of {', '.join(LINEARS)}"
        refuse(
            adapter_modules=(self.adapter_modules, set(self.modules) <= set(LINEARS), modules),
            labels=(self.labels, self.labels in LABELS, " or ".join(LABELS)),
            on_policy=(
                temperature,
                temperature is None or 0 <= temperature < math.inf,
                "a temperature of at least 0",
            ),
            **checks,
        )

    @property
    def modules(self) -> list[str]:
        """Names of the linear layers that are adapted."""
        return list(LINEARS) if self.adapter_modules == "all" else self.adapter_modules.split(",")

    def layers(self, count: int) -> list[int] | None:
        """Numbers of the layers that are adapted, of a backbone of ``count``; None: all.

        Raises:
            ValueError: ``adapter_layers`` says none of them.
        """
        text = self.adapter_layers
        if text == "all":
            return None
        if text == "upper-half":
            return list(range(count // 2, count))
        first, dash, last = text.partition("-")
        numbers = (first + last).isdecimal() and bool(first and dash and last)
        found = list(range(int(first), int(last) + 1)) if numbers else []
        allowed = f"all, upper-half, or N-M with 0 <= N <= M < {count}"
        refuse(adapter_layers=(text, bool(found) and found[-1] < count, allowed))
        return found


@dataclass(frozen=True)
class Recipe:
    """What the outcome depends on; the defaults are the published recipe where it says.

    Attributes:
        epochs: passes over the data, unless ``steps`` says how many optimiser steps.
        batch_size: examples per optimiser step, over all devices.
        from_scratch: random weights in the model's shape instead of its own.
        block_share: of the examples, shown as decoding in blocks leaves them, see ``draw``.
        ordered_share: of the examples, shown as decoding in order leaves them, see ``draw``.
        joined_slots: the last token before a slot predicts its first one, see ``sequence``; the
            outcome's generation config says ``slot_start`` "next".
        infill_weight: of L_infill, see ``sequence``; the paper has none.
        slot_certainty: first masks learn how sure so many slots are, see ``hybrid_loss``; 0: how
            sure their own token is, as in the paper.
        adapter: a mask adapter is trained, not the model.
    """

    model: str
    objective: str = "refusion"
    from_scratch: bool = False
    epochs: float = 4.0
    steps: int | None = None
    batch_size: int = 64
    max_length: int = 4096
    slot_sizes: tuple[int, ...] = (4, 8, 16, 32)
    block_share: float = 0.0
    ordered_share: float = 0.0
    joined_slots: bool = False
    ar_weight: float = 1.0
    mdm_weight: float = 1.0
    infill_weight: float = 0.0
    slot_certainty: float = 0.0
    learning_rate: float = 2e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    bf16: bool = False
    seed: int = 0
    plain_prompt: bool = False
    template_options: dict[str, Any] = field(default_factory=dict)
    adapter: AdapterRecipe | None = None

    @property
    def extras(self) -> dict[str, bool]:
        """What ``sequence`` feeds beside what the paper does."""
        return {
            "infill": self.infill_weight > 0,
            "certainty": self.slot_certainty > 0,
            "joined": self.joined_slots,
        }

    def __post_init__(self) -> None:
        weights = ("ar_weight", "mdm_weight", "infill_weight", "slot_certainty")
        checks = {name: (getattr(self, name) >= 0, "a number of at least 0") for name in weights}
        checks |= {
            "objective": (self.objective in OBJECTIVES, " or ".join(OBJECTIVES)),
            "schedule": (self.schedule in SCHEDULES, ", ".join(SCHEDULES)),
            "epochs": (self.epochs > 0, "a number above 0"),
            "steps": (self.steps is None or self.steps > 0, "an integer above 0"),
            "batch_size": (self.batch_size > 0, "an integer above 0"),
            "slot_sizes": (self.slot_sizes and min(self.slot_sizes) > 0, "integers above 0"),
            "block_share": (0 <= self.block_share <= 1, "a number in [0, 1]"),
            "ordered_share": (
                self.ordered_share >= 0 and self.block_share + self.ordered_share <= 1,
                "a number in [0, 1], with --block-share 1 at most",
            ),
            "learning_rate": (self.learning_rate > 0, "a number above 0"),
            "adam_beta2": (0 <= self.adam_beta2 < 1, "a number in [0, 1)"),
            "seed": (0 <= self.seed < 2**63, "an integer in [0, 2**63)"),
        }
        idle: tuple[str, ...] = ()
        why = ""
        if self.adapter:
            idle, why = HYBRID, "--mask-adapter"
        elif self.objective == "autoregressive":  # it has no masks
            idle = tuple(n for n in HYBRID if n not in ("objective", "from_scratch", "ar_weight"))
            why = "--objective autoregressive"
        for name in idle:
            is_default = getattr(self, name) == getattr(Recipe, name)
            checks[name] = (is_default, f"no value with {why}")
        refuse(**{name: (getattr(self, name), *check) for name, check in checks.items()})


@dataclass(frozen=True)
class Execution:
    """How the run is carried out; it may go on with other values."""

    micro_batch_size: int = 8
    gradient_checkpointing: bool = False
    compile: bool = False
    workers: int = 0
    log_every: int = 10
    save_every: int = 500
    dev: tuple[Path, ...] = ()
    eval_every: int = 500
    dev_decoded: int = 20
    dev_params: DecodingParams = DecodingParams()
    max_tokens: int = 512
    progress: bool = True
