"""LoRA on the backbone: which row of a step gets which adapter.

All rows of a request get its adapter, masks and drafts too. vLLM tells its layers by the host's
layout of a step, which is not the one that the rows were dealt out in; here the device's is read.
Nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_refusion.decoding.sending import sent
from vllm_refusion.engine.compat import LoraLayers

NO_SLOT = -1  # a row of no adapter


class LoraRows:
    """Args: layers: those of the model; the memory of an adapter in them is its slot."""

    def __init__(self, layers: LoraLayers, device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._rows = torch.arange(layers.most_rows, dtype=torch.int32, device=device)
        self._active: list[int] = []
        self._listed = self._nothing(layers.most_active + 1)  # the active ones, for the layers
        self._slot_of: torch.Tensor | None = None  # [most requests] int32, by req

    def start_step(
        self,
        batch_ids: Sequence[int],
        req_ids: np.ndarray,
        query_start_loc: torch.Tensor,
    ) -> None:
        """Once the rows of a step are dealt out and its adapters are loaded.

        Args:
            batch_ids: [R], the adapter of each request of the batch, 0 for none.
            req_ids: [most requests], the same by req.
            query_start_loc: [>= R+1] int32.
        """
        slots = self._layers.slots()
        of_batch = [slots.get(int(adapter), NO_SLOT) for adapter in batch_ids]
        of_req = [slots.get(int(adapter), NO_SLOT) for adapter in req_ids]
        self._active = sorted(set(of_batch) - {NO_SLOT})
        requests = len(of_batch)
        listed = self._active + [NO_SLOT] * (len(self._listed) - len(self._active))
        values = torch.tensor([*of_batch, NO_SLOT, *listed, *of_req], dtype=torch.int32)
        sizes = (requests + 1, len(listed), len(of_req))
        table, self._listed, self._slot_of = sent(values, self._device).split(sizes)
        # with all that a step could have: those of no request, of graphs too, get none
        owner = torch.searchsorted(query_start_loc[1 : requests + 1], self._rows, right=True)
        self._layers.set_rows(table[owner], self._active, self._listed)

    def start_logits(self, requests: torch.Tensor | None, num_rows: int) -> None:
        """Before logits of so many rows, of ``requests`` [num_rows], by req; None: of nobody."""
        if requests is None:
            self._layers.set_logit_rows(self._nothing(num_rows), [], self._listed)
        else:
            assert self._slot_of is not None
            self._layers.set_logit_rows(self._slot_of[requests], self._active, self._listed)

    def _nothing(self, count: int) -> torch.Tensor:
        return torch.full((count,), NO_SLOT, dtype=torch.int32, device=self._device)
