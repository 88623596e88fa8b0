"""From examples to a batch: slots masked whole, clean slots in random order, masks behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

IGNORED = -100  # no label
MIN_MASKING = 1e-3  # eps: the masking probability is never below
MULTIPLE = 8  # rows are padded to it: few lengths, and aligned ones


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt, which may be empty, and of a response, EOS included."""

    prompt: Sequence[int]
    response: Sequence[int]


@dataclass(frozen=True)
class Draw:
    """What chance decides about an example, each time it is seen.

    Attributes:
        slot_size: tokens per slot; the last slot of the response may be shorter.
        masking: the probability p with which each slot was masked.
        clean: numbers of the slots left clean, in the order they are fed.
    """

    slot_size: int
    masking: float
    clean: tuple[int, ...]


def draw(
    length: int,
    slot_sizes: Sequence[int],
    generator: np.random.Generator,
    ordered_share: float = 0.0,
) -> Draw:
    """Draws slot size, masking and order for a response of ``length`` tokens.

    With probability ``ordered_share`` any number of slots but all, from the first, is clean and in
    position order, as when they are decoded from left to right.
    """
    slot_size = slot_sizes[generator.integers(len(slot_sizes))]
    if ordered_share and generator.random() < ordered_share:
        slots = -(-length // slot_size)
        clean = int(generator.integers(slots))
        return Draw(slot_size, 1 - clean / slots, tuple(range(clean)))
    masking = (1 - MIN_MASKING) * generator.random() + MIN_MASKING
    kept = generator.random(-(-length // slot_size)) >= masking
    return Draw(slot_size, masking, tuple(generator.permutation(np.flatnonzero(kept)).tolist()))


@dataclass(frozen=True)
class Sequenced:
    """One row of a batch before padding; the lists are of the same length.

    A label is what the token at its own index has to predict: nothing is shifted later.
    ``mdm_weight`` multiplies the cross-entropy of each mask: 1 / (p * response length).
    ``sees`` is the number of tokens, from the row's first, that each token sees beside itself:
    those before it if None.
    """

    input_ids: list[int]
    position_ids: list[int]
    ar_labels: list[int]
    mdm_labels: list[int]
    mdm_weight: float = 0.0
    infill_labels: list[int] | None = None
    sees: list[int] | None = None


def sequence(example: Example, drawn: Draw, mask_token_id: int, infill: bool = False) -> Sequenced:
    """The prompt, the clean slots in the order drawn, the masked slots in position order.

    ``infill``: behind them each clean token of the response is masked once more, at its own
    position, and that mask sees what was fed before the token. So does the first mask of an
    infill's predict pass, whose proposal is accepted without a test.
    """
    start, response, size = len(example.prompt), example.response, drawn.slot_size
    slots = range(-(-len(response) // size))
    clean = set(drawn.clean)
    masked = [slot for slot in slots if slot not in clean]
    ids, positions = list(example.prompt), list(range(start))
    ar, mdm = [IGNORED] * start, [IGNORED] * start
    for slot in (*drawn.clean, *masked):
        tokens = list(response[slot * size : (slot + 1) * size])
        first = start + slot * size
        positions += range(first, first + len(tokens))
        nothing = [IGNORED] * len(tokens)
        if slot not in clean:
            ids += [mask_token_id] * len(tokens)
            ar += nothing
            mdm += tokens
        else:
            ids += tokens
            ar += tokens[1:] + [IGNORED]
            mdm += nothing
    weight = 1 / (drawn.masking * len(response))
    if not infill:
        return Sequenced(ids, positions, ar, mdm, weight)
    again = range(start, mdm.count(IGNORED))  # the clean tokens: all masks are behind them
    none = [IGNORED] * len(again)
    return Sequenced(
        ids + [mask_token_id] * len(again),
        positions + [positions[i] for i in again],
        ar + none,
        mdm + none,
        weight,
        infill_labels=[IGNORED] * len(ids) + [ids[i] for i in again],
        sees=[*range(len(ids)), *again],
    )


def autoregressive(example: Example) -> Sequenced:
    """Plain next-token prediction of the response: the objective of an autoregressive twin."""
    ids = [*example.prompt, *example.response]
    unlabelled = max(0, len(example.prompt) - 1)
    labels = [IGNORED] * unlabelled + ids[unlabelled + 1 :] + [IGNORED]
    return Sequenced(ids, list(range(len(ids))), labels, [IGNORED] * len(ids))


def collate(rows: Sequence[Sequenced], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch: ids, positions and labels int64 [B, L] padded at the end, mdm_weights float32 [B].

    Padding comes after all that is real and has no labels, so causal attention is all it needs.
    ``labelled`` int64 [N] are the indices into [B * L] that have a label of any kind: computed
    here, since on a device their number would have to be waited for. ``infill_labels`` and
    ``sees``, int64 [B, L], are there if a row has them.
    """
    longest = max(len(row.input_ids) for row in rows)
    width = -(-longest // MULTIPLE) * MULTIPLE
    fills: dict[str, Any] = {"input_ids": pad_token_id, "position_ids": 0}
    fills |= {"ar_labels": IGNORED, "mdm_labels": IGNORED}
    if any(row.sees is not None for row in rows):
        fills |= {"infill_labels": IGNORED, "sees": np.arange(width)}
    batch = {}
    for name, fill in fills.items():
        padded = np.full((len(rows), width), fill, np.int64)
        for i, row in enumerate(rows):
            if (values := getattr(row, name)) is not None:
                padded[i, : len(values)] = values
        batch[name] = torch.from_numpy(padded)
    labels = [batch[name] for name in fills if name.endswith("labels")]
    batch["labelled"] = (torch.stack(labels) != IGNORED).any(0).flatten().nonzero()[:, 0]
    batch["mdm_weights"] = torch.tensor([row.mdm_weight for row in rows])
    return batch
