"""Drawn acceptance, as the benchmark sets it up: profiles, tables, and who may switch it on.

With dummy weights no draft is ever accepted for a reason. The benchmark then draws what decoding
decides from a seed (`triton_kernels/acceptance.py`); every pass, kernel and copy stays real.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_refusion.engine.settings import BENCHMARK_ENV
from vllm_refusion.triton_kernels.acceptance_twin import QUANTILES, AcceptanceTables

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "refusion_acceptance"  # of vLLM's additional_config
MAX_PROFILES = 2**15


@dataclass(frozen=True)
class Profile:
    """How often decoding succeeds.

    Attributes:
        slot: chance that a slot's certainty exceeds the request's ``slot_threshold``.
        token: mean chance that a token which is tested passes. A token's own chance q, which the
            predictor reports as the token's probability, is drawn from a Kumaraswamy distribution
            with this mean; it passes with probability q, independently of all others.
        shape: second parameter of that distribution. Below 1 chances pile up near 1, as a language
            model's do; large values make all tokens alike.
        first: chance of the response's first slot; None: as any other's.
    """

    slot: float
    token: float
    shape: float = 0.5
    first: float | None = None

    def __post_init__(self) -> None:
        chances = (self.slot, self.first_chance)
        in_range = all(0 <= chance <= 1 for chance in chances) and 0 < self.token < 1
        if not (in_range and 0.25 <= self.shape <= 100):
            raise ValueError(
                f"{self}: slot and first must lie in [0, 1], token strictly between 0 and 1, "
                "shape in [0.25, 100]."
            )

    @property
    def first_chance(self) -> float:
        return self.slot if self.first is None else self.first

    def quantiles(self) -> torch.Tensor:
        """[QUANTILES] float32, ascending: equally likely values of q."""
        grid = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
        base = 1 - (1 - grid) ** (1 / self.shape)
        low, high = -40.0, 12.0  # log2 of the first parameter, whose mean grows with it
        for _ in range(80):
            middle = (low + high) / 2
            if (base ** (2.0**-middle)).mean() < self.token:
                low = middle
            else:
                high = middle
        return (base ** (2.0**-low)).to(torch.float32)


def seed_of(profile_index: int, request_index: int) -> int:
    """The seed of a request whose outcomes follow a profile (the seed's high word chooses it)."""
    assert 0 <= profile_index < MAX_PROFILES and 0 <= request_index < 2**32
    return profile_index << 32 | request_index


def build_tables(
    profiles: Sequence[Profile],
    vocab: int,
    excluded: Sequence[int | None],
    device: torch.device | str,
) -> AcceptanceTables:
    """Tables of some profiles; ``excluded``: up to two tokens that are never picked."""
    known = {token for token in excluded if token is not None and 0 <= token < vocab}
    assert len(known) <= 2
    low, high = sorted([*known, vocab, vocab])[:2]
    return AcceptanceTables(
        quantiles=torch.stack([profile.quantiles() for profile in profiles]).to(device),
        slot_chance=torch.tensor([profile.slot for profile in profiles]).to(device),
        first_chance=torch.tensor([profile.first_chance for profile in profiles]).to(device),
        vocab=vocab,
        excluded=(low, high),
    )


def to_config(profiles: Sequence[Profile]) -> dict[str, Any]:
    """What the benchmark puts into vLLM's ``additional_config``."""
    return {CONFIG_KEY: [asdict(profile) for profile in profiles]}


def acceptance_tables(vllm_config: VllmConfig, device: torch.device) -> AcceptanceTables | None:
    """The tables that the engine's configuration asks for, None in every normal engine.

    Raises:
        ValueError: it is asked for outside ``vllm-refusion bench``, or with real weights.
    """
    config = vllm_config.additional_config
    if not isinstance(config, Mapping) or CONFIG_KEY not in config:
        return None
    if BENCHMARK_ENV not in os.environ or vllm_config.load_config.load_format != "dummy":
        raise ValueError(
            f"additional_config[{CONFIG_KEY!r}] replaces the model's decisions by random ones: "
            "only `vllm-refusion bench` may set it, and only with dummy weights."
        )
    model = vllm_config.model_config
    eos = getattr(model.hf_text_config, "eos_token_id", None)
    return build_tables(
        [Profile(**profile) for profile in config[CONFIG_KEY]],
        model.get_vocab_size(),
        (model.hf_text_config.mask_token_id, eos if isinstance(eos, int) else None),
        device,
    )
