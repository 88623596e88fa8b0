"""The hybrid loss, with logits in chunks so that large vocabularies fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from vllm_refusion.training.collator import IGNORED

CHUNK_ROWS = 2048  # a chunk's float32 logits over 152k words: 1.2 GB


def causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Additive mask [1, 1, length, length]: a token sees what precedes it in the input's order.

    Always given: without a mask transformers takes a jump in ``position_ids`` for the start of
    another packed sequence and cuts attention there, and moved slots do jump.
    """
    mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=device)
    return mask.triu(1)[None, None]


def label_counts(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the two means of the loss divide by: clean labels and examples, int64 [2]."""
    labels = batch["ar_labels"]
    return torch.stack([(labels != IGNORED).sum(), torch.tensor(len(labels), device=labels.device)])


def hybrid_loss(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    batch: Mapping[str, torch.Tensor],
    counts: torch.Tensor,
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """L_AR and L_MDM of a batch, float32 [2]; only rows with a label get logits.

    L_AR = sum of CE over clean labels / counts[0]
    L_MDM = sum over examples of (sum of CE over masks) / (p * response length) / counts[1]

    A part of a larger batch is given the larger batch's ``counts``; the parts then add up.

    Args:
        hidden: [B, L, H], what ``head`` turns into logits [..., V].
        batch: from ``collate``.
        counts: [2], from ``label_counts``.
    """
    ar, mdm = batch["ar_labels"].flatten(), batch["mdm_labels"].flatten()
    labels = torch.where(ar != IGNORED, ar, mdm)
    rows = (labels != IGNORED).nonzero()[:, 0]
    counts = counts.clamp(min=1)
    per_mask = batch["mdm_weights"] / counts[1]
    weights = torch.stack(
        [
            (ar != IGNORED) / counts[0],
            (mdm != IGNORED) * per_mask.repeat_interleave(hidden.shape[1]),
        ]
    )  # [2, B * L]
    hidden = hidden.flatten(0, 1)
    losses = hidden.new_zeros(2, dtype=torch.float32)
    for chunk in rows.split(chunk_rows):
        # Logits are computed again in the backward pass instead of being kept.
        losses = losses + checkpoint(
            _chunk_losses,
            head,
            hidden[chunk],
            labels[chunk],
            weights[:, chunk],
            use_reentrant=False,
        )
    if len(rows) == 0:  # gradients of zero rather than none: other processes wait for them
        losses = losses + 0 * head(hidden[:1]).float().sum()
    return losses


def _chunk_losses(
    head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    losses = cross_entropy(head(hidden).float(), labels, reduction="none")
    return (weights * losses).sum(1)  # a matrix product would be autocast to bfloat16


def attach(model: Any, chunk_rows: int = CHUNK_ROWS) -> None:
    """Lets ``model(batch=..., counts=...)`` return the losses [2] of a batch.

    It goes through the model's own ``forward``, and so through the wrappers that spread a model
    over devices; other calls are as before.
    """
    plain = model.forward

    def forward(*args: Any, batch: Any = None, counts: Any = None, **kwargs: Any) -> Any:
        if batch is None:
            return plain(*args, **kwargs)
        ids = batch["input_ids"]
        device = ids.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else model.dtype
        output = model.base_model(
            input_ids=ids,
            position_ids=batch["position_ids"],
            attention_mask=causal_mask(ids.shape[1], dtype, ids.device),
            use_cache=False,
        )
        head = model.get_output_embeddings()
        return hybrid_loss(output.last_hidden_state, head, batch, counts, chunk_rows)

    model.forward = forward
