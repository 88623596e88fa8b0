"""The hybrid loss, with logits in chunks so that large vocabularies fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vllm_refusion.training.collator import IGNORED

CHUNK_LOGITS = 1 << 28  # of a chunk: 1 GB in float32

# Causal in the input's order, whatever the positions say. Under the name "sdpa" transformers takes
# a jump in ``position_ids`` for the start of another packed sequence and cuts attention there, and
# moved slots do jump; for a name that it has no masks for it makes none. No mask to read also
# means that flash kernels can be used. A mask given by the caller is applied as ever.
CAUSAL = "refusion_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def label_counts(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What ``hybrid_loss`` divides by, int64 [3]: clean labels, examples, infill labels."""
    labels = batch["ar_labels"]
    infill = batch.get("infill_labels", labels.new_empty(0))
    examples = labels.new_full((), len(labels))
    return torch.stack([(labels != IGNORED).sum(), examples, (infill != IGNORED).sum()])


def hybrid_loss(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    batch: Mapping[str, torch.Tensor],
    counts: torch.Tensor,
    chunk_rows: int = 2048,
    chunk_losses: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """L_AR, L_MDM and L_infill of a batch, float32 [3]; only rows with a label get logits.

    L_AR = sum of CE over clean labels / counts[0]
    L_MDM = sum over examples of (sum of CE over masks) / (p * response length) / counts[1]
    L_infill = sum of CE over infill labels / counts[2]; 0 if there are none

    A part of a larger batch is given the larger batch's ``counts``; the parts then add up.

    Args:
        hidden: [B, L, H], what ``head`` turns into logits [..., V].
        batch: from ``collate``.
        counts: [3], from ``label_counts``.
        chunk_rows: rows of logits at a time.
        chunk_losses: a compiled ``_chunk_losses``.
    """
    chunk_losses = chunk_losses or _chunk_losses
    rows = batch["labelled"]
    ar, mdm = (batch[name].flatten()[rows] for name in ("ar_labels", "mdm_labels"))
    counts = counts.clamp(min=1)
    per_mask = batch["mdm_weights"] / counts[1]
    is_ar, is_mdm = ar != IGNORED, mdm != IGNORED
    is_infill = ~(is_ar | is_mdm)
    weights = torch.stack(
        [is_ar / counts[0], is_mdm * per_mask[rows // hidden.shape[1]], is_infill / counts[2]]
    )  # [3, N]
    labels = torch.where(is_ar, ar, mdm)
    if "infill_labels" in batch:
        labels = torch.where(is_infill, batch["infill_labels"].flatten()[rows], labels)
    hidden = hidden.flatten(0, 1)
    if len(rows) == 0:  # gradients of zero rather than none: other processes wait for them
        return (0 * head(hidden[:1]).float().sum()).expand(3)
    hidden = hidden[rows]
    if len(rows) <= chunk_rows:
        return chunk_losses(head, hidden, labels, weights)
    # Logits are computed again in the backward pass instead of being kept.
    parts = zip(hidden.split(chunk_rows), labels.split(chunk_rows), weights.split(chunk_rows, 1))
    return sum(checkpoint(chunk_losses, head, *part, use_reentrant=False) for part in parts)


def visible(sees: torch.Tensor) -> torch.Tensor:
    """[B, L] -> bool [B, 1, L, L]: each token sees itself and the first ``sees`` of its row."""
    index = torch.arange(sees.shape[1], device=sees.device)
    return ((index < sees[..., None]) | (index == index[:, None]))[:, None]


def _chunk_losses(
    head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    losses = cross_entropy(head(hidden).float(), labels, reduction="none")
    return (weights * losses).sum(1)  # a matrix product would be autocast to bfloat16


def attach(model: Any, chunk_rows: int | None = None, compiled: bool = False) -> None:
    """Lets ``model(batch=..., counts=...)`` return the losses [3] of a batch.

    It goes through the model's own ``forward``, and so through the wrappers that spread a model
    over devices; other calls are as before. The model's attention becomes ``CAUSAL``.
    ``compiled``: the training pass goes through torch.compile, for all lengths at once.
    """
    model.set_attn_implementation(CAUSAL)
    chunk_rows = chunk_rows or max(1, CHUNK_LOGITS // model.config.vocab_size)
    plain, base, chunk_losses = model.forward, model.base_model, _chunk_losses
    if compiled:
        base = torch.compile(base, dynamic=True)
        chunk_losses = torch.compile(chunk_losses, dynamic=True)

    def forward(*args: Any, batch: Any = None, counts: Any = None, **kwargs: Any) -> Any:
        if batch is None:
            return plain(*args, **kwargs)
        ids, positions = batch["input_ids"], batch["position_ids"]
        mask = visible(batch["sees"]) if "sees" in batch else None
        output = base(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        head = model.get_output_embeddings()
        return hybrid_loss(output.last_hidden_state, head, batch, counts, chunk_rows, chunk_losses)

    model.forward = forward
