"""The hybrid loss, with logits in chunks so that large vocabularies fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import log_softmax, nll_loss
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
    slot_certainty: float = 1.0,
) -> torch.Tensor:
    """L_AR, L_MDM and L_infill of a batch, float32 [3]; only rows with a label get logits.

    L_AR = sum of CE over clean labels / counts[0]
    L_MDM = sum over examples of (sum of CE over masks) / (p * response length) / counts[1]
    L_infill = sum of CE over infill labels / counts[2]; 0 if there are none

    A part of a larger batch is given the larger batch's ``counts``; the parts then add up.

    With ``certainty_of`` in the batch, the first mask of a slot has two labels: its token
    with weight q and the mask itself with weight 1 - q, where q is the probability of the slot's
    other tokens to the power of ``slot_certainty`` (no gradient goes through it). A mask is never
    a draft; so the draft's probability becomes that of as many slots like this one.

    Args:
        hidden: [B, L, H], what ``head`` turns into logits [..., V].
        batch: from ``collate``.
        counts: [3], from ``label_counts``.
        chunk_rows: rows of logits at a time.
        chunk_losses: a compiled ``cross_entropies``.
    """
    chunk_losses = chunk_losses or cross_entropies
    rows, length = batch["labelled"], hidden.shape[1]
    hidden = hidden.flatten(0, 1)
    if len(rows) == 0:  # gradients of zero rather than none: other processes wait for them
        return (0 * head(hidden[:1]).float().sum()).expand(3)
    columns = {"input_ids", "ar_labels", "mdm_labels", "infill_labels", "certainty_of"} & set(batch)
    at = {name: batch[name].flatten()[rows] for name in columns}
    counts = counts.clamp(min=1)
    per_mask = batch["mdm_weights"] / counts[1]
    is_ar, is_mdm = at["ar_labels"] != IGNORED, at["mdm_labels"] != IGNORED
    is_infill = ~(is_ar | is_mdm)
    weights = torch.stack(
        [is_ar / counts[0], is_mdm * per_mask[rows // length], is_infill / counts[2]]
    )  # [3, N]
    targets = torch.where(is_ar, at["ar_labels"], at["mdm_labels"])
    if "infill_labels" in at:
        targets = torch.where(is_infill, at["infill_labels"], targets)
    targets = targets[:, None]
    if "certainty_of" in at:  # the second target of a first mask is what is fed there
        targets = torch.cat([targets, at["input_ids"][:, None]], 1)
    losses = in_chunks(chunk_losses, head, hidden[rows], targets, chunk_rows)
    of_token = losses[:, 0]
    if "certainty_of" in at:
        counted = at["certainty_of"] >= 0
        first = torch.where(counted, rows - rows % length + at["certainty_of"], 0)
        surprise = of_token.new_zeros(len(hidden))
        surprise.scatter_add_(0, first, torch.where(counted, of_token.detach(), 0))
        q = (-slot_certainty * surprise[rows]).exp()  # 1 for other rows
        of_token = q * of_token + (1 - q) * losses[:, 1]
    return (weights * of_token).sum(1)  # a matrix product would be autocast to bfloat16


def visible(sees: torch.Tensor, since: torch.Tensor) -> torch.Tensor:
    """[B, L] twice -> bool [B, 1, L, L]: what each token sees, see ``Sequenced``."""
    index = torch.arange(sees.shape[1], device=sees.device)
    own = (since[..., None] <= index) & (index <= index[:, None])
    return ((index < sees[..., None]) | own)[:, None]


def in_chunks(
    losses_of: Callable[..., torch.Tensor],
    head: torch.nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    chunk_rows: int,
) -> torch.Tensor:
    """``losses_of(head, hidden, targets)`` of N rows, of ``chunk_rows`` at a time.

    Logits of more than one chunk are computed again in the backward pass instead of being kept.
    """
    if len(hidden) <= chunk_rows:
        return losses_of(head, hidden, targets)
    parts = zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
    return torch.cat([checkpoint(losses_of, head, *part, use_reentrant=False) for part in parts])


def cross_entropies(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Cross-entropies [N, T] of each row's targets [N, T]."""
    logs = log_softmax(head(hidden).float(), 1)
    return torch.stack([nll_loss(logs, of, reduction="none") for of in targets.unbind(1)], 1)


def attach(
    model: Any,
    chunk_rows: int | None = None,
    compiled: bool = False,
    slot_certainty: float = 1.0,
) -> None:
    """Lets ``model(batch=..., counts=...)`` return the losses [3] of a batch.

    It goes through the model's own ``forward``, and so through the wrappers that spread a model
    over devices; other calls are as before. The model's attention becomes ``CAUSAL``.
    ``compiled``: the training pass goes through torch.compile, for all lengths at once. Layers are
    compiled one for all: compiling a whole model of 8 takes more than twice as long.
    ``slot_certainty`` goes to ``hybrid_loss``.
    """
    model.set_attn_implementation(CAUSAL)
    chunk_rows = chunk_rows or max(1, CHUNK_LOGITS // model.config.vocab_size)
    plain, base, chunk_losses = model.forward, model.base_model, cross_entropies
    if compiled:
        from accelerate.utils import compile_regions

        base = compile_regions(base, dynamic=True)
        chunk_losses = torch.compile(chunk_losses, dynamic=True)

    def forward(*args: Any, batch: Any = None, counts: Any = None, **kwargs: Any) -> Any:
        if batch is None:
            return plain(*args, **kwargs)
        ids, positions = batch["input_ids"], batch["position_ids"]
        mask = visible(batch["sees"], batch["since"]) if "sees" in batch else None
        output = base(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        head = model.get_output_embeddings()
        hidden = output.last_hidden_state
        return hybrid_loss(hidden, head, batch, counts, chunk_rows, chunk_losses, slot_certainty)

    model.forward = forward
