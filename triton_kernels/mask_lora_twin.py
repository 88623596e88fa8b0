"""PyTorch twins of the kernels in ``mask_lora``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

LEAST_RANK = 16  # the kernel's: of a matrix product's smallest tile


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


def mask_lora_twin(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
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
        x: [N, in].
        a: [blocks * r, in], the A of each block.
        b: [sum of the blocks' widths, r], the B of each.
        rows, count: see ``find_masks_twin``.
        blocks: for each block, the first of its columns in y and their number.
    """
    chosen = rows[: int(count)].long()
    rank = b.shape[1]
    inner = x[chosen].float() @ a.float().T  # [masks, blocks * r]
    first = 0
    for block, (column, width) in enumerate(zip(blocks[::2], blocks[1::2], strict=True)):
        of_block = inner[:, block * rank : (block + 1) * rank] @ b[first : first + width].float().T
        columns = slice(column, column + width)
        y[chosen, columns] = (y[chosen, columns].float() + scale * of_block).to(y.dtype)
        first += width
