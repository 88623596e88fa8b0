"""From examples to a batch: slots masked whole, clean slots in random order, masks behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

IGNORED = -100  # no label
MIN_MASKING = 1e-3  # eps: the masking probability is never below
BLOCKS = (1, 2, 4, 8)  # slots of a block, as the published presets have them
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
        masking: the probability p with which each slot was masked; where their number was drawn,
            the masked share (1 if none is).
        clean: numbers of the slots left clean, in the order they are fed.
    """

    slot_size: int
    masking: float
    clean: tuple[int, ...]


def draw(
    length: int,
    slot_sizes: Sequence[int],
    generator: np.random.Generator,
    block_share: float = 0.0,
    ordered_share: float = 0.0,
) -> Draw:
    """Draws slot size, masking and order for a response of ``length`` tokens.

    With probability ``block_share`` slots are clean as decoding leaves them: any number of them but
    all, in blocks from left to right, those of a block in any order. ``BLOCKS`` has the sizes.
    With probability ``ordered_share`` the first slots are clean, in order: any number of them.
    """
    slot_size = slot_sizes[int(generator.integers(len(slot_sizes)))]
    slots = -(-length // slot_size)
    shown = generator.random() if block_share or ordered_share else 1.0
    if shown < block_share:
        block = np.arange(slots) // BLOCKS[generator.integers(len(BLOCKS))]
        order = np.argsort(block + generator.random(slots))
        clean = int(generator.integers(slots))
        return Draw(slot_size, 1 - clean / slots, tuple(order[:clean].tolist()))
    if shown < block_share + ordered_share:
        clean = int(generator.integers(slots + 1))
        return Draw(slot_size, 1 - clean / slots if clean < slots else 1.0, tuple(range(clean)))
    masking = (1 - MIN_MASKING) * generator.random() + MIN_MASKING
    kept = generator.random(slots) >= masking
    return Draw(slot_size, masking, tuple(generator.permutation(np.flatnonzero(kept)).tolist()))


@dataclass(frozen=True)
class Sequenced:
    """One row of a batch before padding; the lists are of the same length.

    A label is what the token at its own index has to predict: nothing is shifted later.

    Attributes:
        mdm_weight: multiplies the cross-entropy of each mask: 1 / (p * response length).
        sees, since: a token sees the row's first ``sees`` tokens and those from ``since`` up to
            itself; all up to itself if None.
        certainty_of: of a token whose label counts for how sure a slot is, the index of that
            slot's first mask; -1 of others.
    """

    input_ids: list[int]
    position_ids: list[int]
    ar_labels: list[int]
    mdm_labels: list[int]
    mdm_weight: float = 0.0
    infill_labels: list[int] | None = None
    sees: list[int] | None = None
    since: list[int] | None = None
    certainty_of: list[int] | None = None


def sequence(
    example: Example,
    drawn: Draw,
    mask_token_id: int,
    infill: bool = False,
    certainty: bool = False,
    joined: bool = False,
) -> Sequenced:
    """The prompt, the clean slots in the order drawn, the masked slots in position order.

    ``infill``: behind them each clean token of the response is masked once more, and that mask
    sees what was fed before the token. So does the first mask of a plan, and the first of an
    infill's predict pass, whose proposal is accepted without a test.

    ``certainty``: behind them the masked slots once more, clean, each seeing the prompt, the clean
    slots and itself, as when it is infilled. Their labels are next tokens of the slot too. How
    likely a slot's next tokens are together is what its first mask learns to be sure of.

    ``joined``: where the slot behind a clean one, or behind the prompt, also follows it in
    position, the last token before it has a label: the slot's first token.
    """
    start, size, response = len(example.prompt), drawn.slot_size, np.asarray(example.response)
    places = np.arange(len(response))
    following = np.append(response[1:], IGNORED)
    following[size - 1 :: size] = IGNORED
    clean = np.concatenate([places[:0], *(places[n * size : (n + 1) * size] for n in drawn.clean)])
    masked = np.setdiff1d(places, clean, assume_unique=True)
    again = clean if infill else places[:0]
    copied = masked if certainty else places[:0]

    at = np.concatenate([clean, masked, again, copied])
    ends = start + np.cumsum([0, len(clean), len(masked), len(again), len(copied)])
    cleans, masks, infills, copies = (slice(*ends[i : i + 2]) for i in range(4))
    ids = np.concatenate([np.asarray(example.prompt, response.dtype), response[at]])
    ids[masks] = ids[infills] = mask_token_id
    positions = np.concatenate([np.arange(start), start + at])
    joins = places[:0]
    if joined:  # the next one fed, a mask or not, is the next in position
        steps = np.diff(positions[: ends[2]])[: ends[1]]
        joins = np.flatnonzero(steps == 1)[max(start - 1, 0) :]

    def labels(*groups: tuple[slice | np.ndarray, np.ndarray]) -> list[int]:
        column = np.full(len(ids), IGNORED)
        for group, values in groups:
            column[group] = values
        return column.tolist()

    row = Sequenced(
        ids.tolist(),
        positions.tolist(),
        labels(
            (cleans, following[clean]),
            (copies, following[copied]),
            (joins, response[positions[joins] + 1 - start]),
        ),
        labels((masks, response[masked])),
        1 / (drawn.masking * len(response)),
    )
    if not (infill or certainty):
        return row
    sees, since, certainty_of = np.arange(len(ids)), np.arange(len(ids)), np.full(len(ids), -1)
    sees[infills] = np.arange(start, start + len(again))
    first = np.searchsorted(masked, copied - copied % size)  # of each slot, among the masked
    sees[copies] = ends[1]
    since[copies] = ends[3] + first
    certainty_of[copies] = np.where(following[copied] == IGNORED, -1, ends[1] + first)
    if infill:
        first = np.arange(len(clean)) - clean % size
        certainty_of[cleans] = np.where(following[clean] == IGNORED, -1, ends[2] + first)
    return replace(
        row,
        infill_labels=labels((infills, response[again])),
        sees=sees.tolist(),
        since=since.tolist(),
        certainty_of=certainty_of.tolist() if certainty else None,
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
    here, since on a device their number would have to be waited for. ``infill_labels``, ``sees``,
    ``since`` and ``certainty_of``, int64 [B, L], are there if a row has them.
    """
    longest = max(len(row.input_ids) for row in rows)
    width = -(-longest // MULTIPLE) * MULTIPLE
    fills: dict[str, Any] = {"input_ids": pad_token_id, "position_ids": 0}
    fills |= {"ar_labels": IGNORED, "mdm_labels": IGNORED}
    if any(row.sees is not None for row in rows):
        index = np.arange(width)
        fills |= {"infill_labels": IGNORED, "sees": index, "since": index}
    if any(row.certainty_of is not None for row in rows):
        fills["certainty_of"] = -1
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
