"""Which rows vLLM's LoRA kernels are told to adapt, for layouts that only the device knows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from device import DEVICE
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.utils import get_captured_lora_counts

from vllm_refusion.engine.compat import LoraLayers
from vllm_refusion.engine.lora_rows import LoraRows

MOST_ROWS, MOST_ACTIVE, VOCAB = 40, 3, 100
SLOT_OF = {7: 0, 4: 1, 9: 2}  # by adapter


def started(specialised: bool, of_batch, starts, of_req) -> SimpleNamespace:
    """A wrapper with the tables of vLLM's on a GPU, after the start of a step."""

    def meta():
        counts = get_captured_lora_counts(MOST_ACTIVE, specialised)
        made = LoRAKernelMeta.make(MOST_ACTIVE, MOST_ROWS, DEVICE, counts)
        for tensor in (made.token_indices_sorted_by_lora_ids, made.active_lora_ids):
            tensor.fill_(12345)  # of another step
        return made

    indices = {
        name: torch.full((MOST_ROWS,), 12345, device=DEVICE)
        for name in ("_token_lora_indices", "_sampler_indices", "_embeddings_indices")
    }
    wrapper = SimpleNamespace(
        **indices, indices_len=[None] * 4, token_mapping_meta=meta(), prompt_mapping_meta=meta()
    )
    manager = SimpleNamespace(
        punica_wrapper_mapping={"": wrapper},
        lora_index_to_id=list(SLOT_OF),
        lora_slots=MOST_ACTIVE,
        vocab_size=VOCAB,
    )
    wrapper.rows = LoraRows(LoraLayers(manager), torch.device(DEVICE))
    starts = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    wrapper.rows.start_step(of_batch, np.array(of_req, dtype=np.int32), starts)
    return wrapper


def assert_tables(meta: LoRAKernelMeta, of_row: list[int]) -> None:
    """Of each listed slot the rows that the kernels find are those that it acts on."""
    found = {}
    for i, slot in enumerate(meta.active_lora_ids.tolist()):
        start, count = int(meta.lora_token_start_loc[i]), int(meta.num_tokens_per_lora[i])
        rows = meta.token_indices_sorted_by_lora_ids[start : start + count].tolist()
        if slot >= 0:
            found[slot] = rows
        else:
            assert not rows
    expected = {slot: [row for row, s in enumerate(of_row) if s == slot] for slot in found}
    assert found == expected
    assert set(of_row) - {-1} <= set(found)
    assert bool(meta.no_lora_flag_cpu) == (not found)
    assert len(found) <= int(meta.num_active_loras_cpu) <= MOST_ACTIVE + 1


@pytest.mark.parametrize("specialised", [False, True])
@pytest.mark.parametrize(
    ("of_batch", "starts"),
    [
        ((4, 0, 9, 4), (0, 3, 9, 10, 17, 20, 20)),  # and rows of no request
        ((0, 9), (0, 5, 5, 33)),  # a request without rows
        ((7, 4, 9, 0, 7), (0, 1, 2, 3, 4, 40)),
        ((0, 0, 0), (0, 4, 8, 11)),
    ],
    ids=str,
)
def test_rows(specialised, of_batch, starts):
    of_req = (0, *of_batch[::-1], 4, 31)  # the last one has left, and its adapter too
    wrapper = started(specialised, of_batch, starts, of_req)
    of_row = [-1] * MOST_ROWS
    for request, adapter in enumerate(of_batch):
        for row in range(starts[request], starts[request + 1]):
            of_row[row] = SLOT_OF.get(adapter, -1)
    assert wrapper._token_lora_indices.tolist() == of_row
    assert wrapper._embeddings_indices.tolist() == [VOCAB * max(slot, 0) for slot in of_row]
    assert_tables(wrapper.token_mapping_meta, of_row)
    owners = [1, 1, 3, 2, 2, 1][: len(of_batch) + 3]
    owners = [min(owner, len(of_batch)) for owner in owners]
    wrapper.rows.start_logits(torch.tensor(owners, device=DEVICE), len(owners))
    of_logits = [SLOT_OF.get(of_req[owner], -1) for owner in owners]
    assert wrapper._sampler_indices[: len(owners)].tolist() == of_logits
    assert wrapper.indices_len[1] == len(owners)
    assert_tables(wrapper.prompt_mapping_meta, of_logits)
    wrapper.rows.start_logits(None, 5)
    assert wrapper._sampler_indices[:5].tolist() == [-1] * 5
    assert wrapper.prompt_mapping_meta.num_tokens_per_lora.tolist() == [0] * (MOST_ACTIVE + 1)
