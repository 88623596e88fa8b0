"""PyTorch twins of the kernels in ``mask_lora``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

LEAST_RANK = 16  # the kernel's: of a matrix product's smallest tile
SPLIT, MAX_SPLITS = 512, 8  # input columns of a split of the shrink, about; splits


def find_masks_twin(
    input_ids: torch.Tensor,
    num_rows: int,
    mask_token_id: int,
    rows: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Lists the rows that feed a mask, and gives each of them token 0 in the mask's place.

    The mask is no token of the vocabulary: what looks rows' embeddings up must not see it.

    Args:
        input_ids: [N] int; rows from ``num_rows`` on are padding, which may hold masks of old.
        rows: [>= N] int32, out: the rows that feed a mask, ascending; the rest is left alone.
        count: [1] int32, out: how many.
    """
    is_mask = input_ids == mask_token_id
    found = is_mask[:num_rows].nonzero().flatten()
    rows[: len(found)] = found.int()
    count.fill_(len(found))
    input_ids.masked_fill_(is_mask, 0)


def embed_masks_twin(
    y: torch.Tensor, embedding: torch.Tensor, rows: torch.Tensor, count: torch.Tensor
) -> None:
    """Sets the rows of y [N, H] that ``rows`` and ``count`` list to ``embedding`` [H]."""
    y[rows[: int(count)].long()] = embedding


def allocate_parts(x: torch.Tensor, a: torch.Tensor, split_columns: int = SPLIT) -> torch.Tensor:
    """What a shrink of x by a writes: [splits, N, blocks, r] float32, not initialised.

    Any ``split_columns`` gives the same answer up to rounding.
    """
    splits = max(1, min(x.shape[1] // split_columns, MAX_SPLITS))
    return torch.empty(splits, x.shape[0], *a.shape[:2], dtype=torch.float32, device=x.device)


def shrink_masks_twin(
    parts: torch.Tensor, x: torch.Tensor, a: torch.Tensor, rows: torch.Tensor, count: torch.Tensor
) -> None:
    """Multiplies the rows of x that ``rows`` and ``count`` list by A.

    Args:
        parts: see ``allocate_parts``, out: the n-th entries of all splits add up to the n-th listed
            row's product; those behind ``count`` are left alone.
        x: [N, in].
        a: [blocks, r, in].
        rows, count: see ``find_masks_twin``.
    """
    number = int(count)
    parts[:, :number] = 0
    product = x[rows[:number].long()].float() @ a.flatten(0, 1).float().T
    parts[0, :number] = product.view(number, *a.shape[:2])


def expand_masks_twin(
    y: torch.Tensor,
    parts: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    scale: float,
    blocks: Sequence[int],
) -> None:
    """y += scale * B(A x) on the rows that ``rows`` and ``count`` list; no other is touched.

    Several layers that share their input are one: their outputs are blocks of columns of y, each
    with a low-rank pair of its own.

    Args:
        y: [N, out], changed in place.
        parts: see ``shrink_masks_twin``.
        b: [sum of the blocks' widths, r], the B of each block.
        rows, count: see ``find_masks_twin``.
        blocks: for each block, the first of its columns in y and their number.
    """
    chosen = rows[: int(count)].long()
    inner = parts[:, : len(chosen)].sum(0)  # [masks, blocks, r]
    first = 0
    for block, (column, width) in enumerate(zip(blocks[::2], blocks[1::2], strict=True)):
        of_block = inner[:, block] @ b[first : first + width].float().T
        columns = slice(column, column + width)
        y[chosen, columns] = (y[chosen, columns].float() + scale * of_block).to(y.dtype)
        first += width
