"""Masks behind random cuts of an example, and the loss of a frozen backbone's adapter on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div, log_softmax, scaled_dot_product_attention
from transformers import AttentionInterface

from vllm_refusion.training.collator import IGNORED, MULTIPLE, Example
from vllm_refusion.training.loss import cross_entropies, in_chunks


@dataclass(frozen=True)
class Cutting:
    """How an example is cut.

    Attributes:
        chains: of an example, at most: each cut is another one.
        length: masks of a chain.
        skips_known: the first mask stands one position behind the cut, see ``MaskAdapter``.
    """

    chains: int
    length: int
    skips_known: bool


@dataclass(frozen=True)
class Chained:
    """An example's tokens, and the cuts: how many of the tokens each chain sees."""

    tokens: Sequence[int]
    cuts: Sequence[int]


def cut(example: Example, cutting: Cutting, generator: np.random.Generator) -> Chained:
    """Draws the cuts: each such that the first mask stands within the response.

    A response of one token has none to skip: it gets no chain where ``skips_known``.
    """
    tokens = [*example.prompt, *example.response]
    allowed = np.arange(max(1, len(example.prompt)), len(tokens) - cutting.skips_known)
    drawn = generator.choice(allowed, min(cutting.chains, len(allowed)), replace=False)
    return Chained(tokens, drawn.tolist())


def collate_chains(
    rows: Sequence[Chained], cutting: Cutting, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """A batch, all int64: ``input_ids`` [B, L] padded at the end, ``cuts`` [B, C], and of masks:

    ``mask_positions`` and ``mask_labels`` [B, C * K], and ``labelled`` [N], the indices into
    [B * C * K] of those that have a label. Chains that are missing see nothing and have none.
    """
    width = -(-max(len(row.tokens) for row in rows) // MULTIPLE) * MULTIPLE
    beyond = cutting.length + cutting.skips_known  # of the last cut
    tokens = np.full((len(rows), width + beyond), IGNORED, np.int64)
    cuts = np.zeros((len(rows), cutting.chains), np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        cuts[i, : len(row.cuts)] = row.cuts
    positions = cuts[..., None] + np.arange(cutting.skips_known, beyond)  # [B, C, K]
    index = np.where(cuts[..., None] > 0, positions, width)
    labels = np.take_along_axis(tokens, index.reshape(len(rows), -1), 1)
    ids = tokens[:, :width]
    arrays = {
        "input_ids": np.where(ids == IGNORED, pad_token_id, ids),
        "cuts": cuts,
        "mask_positions": positions.reshape(len(rows), -1),
        "mask_labels": labels,
        "labelled": np.flatnonzero(labels != IGNORED),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def label_count(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the loss is divided by, int64 [1]."""
    return torch.tensor([len(batch["labelled"])])


def leading_hits(
    picks: torch.Tensor, batch: Mapping[str, torch.Tensor], cutting: Cutting
) -> torch.Tensor:
    """Of each chain, int64 [chains]: masks before the first that does not pick its label.

    ``picks`` [B, C * K]. A mask where the token is known anyway neither counts nor ends a chain.
    """
    shape = (*batch["cuts"].shape, cutting.length)
    hits = (picks == batch["mask_labels"]).view(shape)[..., int(not cutting.skips_known) :]
    return hits.cumprod(2).sum(2)[batch["cuts"] > 0]


def sees(cuts: torch.Tensor, width: int, length: int) -> torch.Tensor:
    """Cuts [B, C] -> bool [B, 1, C * length, width + C * length]: what each mask sees.

    That are the clean tokens before its cut, masks before it in its own chain, and itself.
    """
    count = cuts.shape[1] * length
    clean = torch.arange(width, device=cuts.device) < cuts.repeat_interleave(length, 1)[..., None]
    index = torch.arange(count, device=cuts.device)
    chain = index // length
    own = (chain[:, None] == chain) & (index <= index[:, None])
    return torch.cat([clean, own.expand(len(cuts), -1, -1)], 2)[:, None]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    kept: list | None = None,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [B, heads, rows, size] of transformers' layers: causal without a mask.

    Keys and values are added to ``kept``; those of ``before`` stand before the rows' own.
    """
    if kept is not None:
        kept.append((key, value))
    if before is not None:
        key, value = (torch.cat(pair, 2) for pair in zip(before, (key, value), strict=True))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    causal = attention_mask is None
    out = scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=causal, scale=scaling
    )
    return out.transpose(1, 2), None


CHAINS = "refusion_chains"  # a name that transformers makes no masks for
AttentionInterface.register(CHAINS, _attention)


def feed(base: Any, hidden: torch.Tensor, positions: torch.Tensor, **given: Any) -> torch.Tensor:
    """Hidden states [B, L, H] of embedded rows after all layers and the last norm.

    ``given`` goes to every layer, but of ``before`` each layer gets its own item.
    """
    before = given.pop("before", [None] * len(base.layers))
    rope = base.rotary_emb(hidden, positions)
    for layer, own in zip(base.layers, before, strict=True):
        hidden = layer(hidden, position_embeddings=rope, before=own, **given)
    return base.norm(hidden)


def masks_after(
    plain: Any,
    adapted: Any,
    embedding: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the clean rows [B, L, H], without gradients, and of masks [B, C * K, H].

    Args:
        plain: the backbone without its head; feeds the clean rows.
        adapted: the same with adapters on every row that it is fed; feeds the masks.
        embedding: [H], of the mask.
        length: K, masks of a chain.
    """
    ids, kept = batch["input_ids"], list[Any]()
    with torch.no_grad():
        index = torch.arange(ids.shape[1], device=ids.device)[None]
        clean = feed(plain, plain.embed_tokens(ids), index, attention_mask=None, kept=kept)
    visible = sees(batch["cuts"], ids.shape[1], length)
    positions = batch["mask_positions"]
    masks = embedding.to(clean.dtype).expand(*positions.shape, -1)
    return clean, feed(adapted, masks, positions, attention_mask=visible, before=kept)


def chain_loss(
    masks: torch.Tensor,
    head: torch.nn.Module,
    batch: Mapping[str, torch.Tensor],
    count: torch.Tensor,
    chunk_rows: int,
    losses_of: Callable[..., torch.Tensor] = cross_entropies,
    clean: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over masks with a label, divided by ``count`` [1]; float32 [1].

    Args:
        masks: hidden states [B, C * K, H] of masks.
        losses_of: ``cross_entropies``, or ``divergences`` if ``clean`` is given.
        clean: hidden states [B, L, H] of clean rows.
    """
    rows, chains = batch["labelled"], masks.shape[1]
    hidden = masks.flatten(0, 1)
    if len(rows) == 0:  # gradients of zero rather than none: other processes wait for them
        return 0 * head(hidden[:1]).float().sum()[None]
    if clean is None:
        targets = batch["mask_labels"].flatten()[rows, None]
    else:  # the row before predicts the mask's position
        targets = clean[rows // chains, batch["mask_positions"].flatten()[rows] - 1]
    losses = in_chunks(losses_of, head, hidden[rows], targets, chunk_rows)
    return losses.sum()[None] / count.clamp(min=1)


def divergences(head: torch.nn.Module, hidden: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """KL(backbone || mask) [N] from hidden states [N, H] of masks and of clean rows."""
    with torch.no_grad():
        teacher = log_softmax(head(clean).float(), 1)
    logs = log_softmax(head(hidden).float(), 1)
    return kl_div(logs, teacher, reduction="none", log_target=True).sum(1)
