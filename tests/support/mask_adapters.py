"""Random mask adapters, written by hand as PEFT writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vllm_refusion.adapters import fingerprint
from vllm_refusion.bench.shapes import write_random_adapter


def write_adapter(folder: Path, base: Path, rank: int = 4, **how: Any) -> Path:
    """A random adapter of the model in ``base``, far from zero, in ``folder``.

    ``how``: see ``write_random_adapter``.
    """
    return write_random_adapter(
        AutoConfig.from_pretrained(base).to_dict(),
        os.path.relpath(base, folder),
        folder,
        rank,
        **{"base_fingerprint": fingerprint(base), "chain_length": 8, **how},
    )
