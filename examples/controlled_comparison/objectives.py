"""Six objectives on the same examples.

A batch holds input_ids and position_ids [B, L] and data_tokens, an int that counts the prompts' and
responses' tokens, without padding and repetition. The rest of a causal method's is what the losses
of vllm_refusion.training read (``collate``). The others' are for one weighted cross-entropy: of
each token with a label its place in the flattened input (rows [N]), its label [N] and its weight
[N] (float32); attention masks are made of real [B, L], not padding, for LLaDA and Dream, of
blocks [B, L] and noised [B, L] for BD3-LM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from vllm_refusion.training.collator import (
    IGNORED,
    MIN_MASKING,
    MULTIPLE,
    Example,
    autoregressive,
    collate,
    draw,
    sequence,
)
from vllm_refusion.training.loss import hybrid_loss, label_counts, visible

METHODS = ("refusion", "refusion_options", "autoregressive", "llada", "bd3lm", "dream")
START = "start"  # the autoregressive model that all methods of a seed may start from
CAUSAL = ("refusion", "refusion_options", "autoregressive", START)
PADDING = 1 << 30  # block of BD3-LM's padding: behind all others

Item = tuple[Example, np.random.Generator]
Batch = dict[str, Any]


@dataclass(frozen=True)
class Objective:
    """How a method's batches are made; calling it on items collates them.

    Attributes:
        generation_length: LLaDA's and Dream's responses are padded with EOS to that many tokens,
            which they will have to decode.
        block_length: of BD3-LM.
        noise: BD3-LM's masking probabilities are uniform between these: clipped,
            as its authors do, who search for the range that lowers the variance.
        cart: of Dream: weights fall by a factor of 1 - cart with the distance to a known token.
    """

    method: str
    mask_token_id: int
    pad_token_id: int
    eos_token_id: int
    slot_sizes: tuple[int, ...] = (4, 8, 16, 32)
    generation_length: int = 256
    block_length: int = 4
    noise: tuple[float, float] = (0.45, 0.95)
    cart: float = 0.1

    def __call__(self, items: Sequence[Item]) -> Batch:
        tokens = sum(len(e.prompt) + len(e.response) for e, _ in items)
        return getattr(self, f"_{self.method}")(items) | {"data_tokens": tokens}

    def _refusion(self, items: Sequence[Item], options: bool = False) -> Batch:
        rows = []
        for example, chance in items:
            drawn = draw(len(example.response), self.slot_sizes, chance, 0.5 if options else 0.0)
            extras = {"infill": options, "certainty": options}
            rows.append(sequence(example, drawn, self.mask_token_id, **extras))
        return collate(rows, self.pad_token_id)

    def _refusion_options(self, items: Sequence[Item]) -> Batch:
        return self._refusion(items, options=True)

    def _autoregressive(self, items: Sequence[Item]) -> Batch:
        return collate([autoregressive(example) for example, _ in items], self.pad_token_id)

    _start = _autoregressive

    def _masked(self, items: Sequence[Item]) -> tuple[np.ndarray, ...]:
        """Masks tokens of the response, EOS padding included, with one probability an example.

        The response is as long as it will be when decoded; what pads rows behind it is not seen.

        Returns:
            ids, labels of the masks at their own places and real, [B, L]; of each example how many
            masks are expected, [B, 1].
        """
        lengths = [max(len(e.response), self.generation_length) for e, _ in items]
        longest = max(len(e.prompt) + length for (e, _), length in zip(items, lengths))
        shape = len(items), -(-longest // MULTIPLE) * MULTIPLE
        ids, labels = np.full(shape, self.pad_token_id), np.full(shape, IGNORED)
        real, expected = np.zeros(shape, bool), np.zeros((len(items), 1))
        for row, ((example, chance), length) in enumerate(zip(items, lengths)):
            start = len(example.prompt)
            response = np.full(length, self.eos_token_id)
            response[: len(example.response)] = example.response
            masking = (1 - MIN_MASKING) * chance.random() + MIN_MASKING
            masked, where = chance.random(length) < masking, slice(start, start + length)
            ids[row, :start] = example.prompt
            ids[row, where] = np.where(masked, self.mask_token_id, response)
            labels[row, where] = np.where(masked, response, IGNORED)
            real[row, : start + length] = True
            expected[row] = masking * length
        return ids, labels, real, expected

    def _llada(self, items: Sequence[Item]) -> Batch:
        ids, labels, real, expected = self._masked(items)
        weights = np.broadcast_to(1 / expected / len(items), ids.shape)
        return _labelled(ids, _in_order(ids), labels, weights) | {"real": torch.tensor(real)}

    def _dream(self, items: Sequence[Item]) -> Batch:
        """LLaDA's masks, each predicted where an autoregressive model does: by the token before.

        A mask's weight is the sum over known tokens, at distances d from it, of
        cart (1 - cart)^(d - 1) / 2, so that it is near 1 where all around is known (CART).
        """
        ids, labels, real, _ = self._masked(items)
        known, masks = real & (labels == IGNORED), max(1, (labels != IGNORED).sum())
        weights = known @ _cart(ids.shape[1], self.cart) / masks
        labels, weights = np.roll(labels, -1, 1), np.roll(weights, -1, 1)  # no prompt is empty
        return _labelled(ids, _in_order(ids), labels, weights) | {"real": torch.tensor(real)}

    def _bd3lm(self, items: Sequence[Item]) -> Batch:
        """Prompt and clean response, then the response again with masks, block by block.

        The prompt is cut into blocks of its own and never noised; the response is padded with EOS
        to whole blocks.
        """
        size = self.block_length
        padded = [-(-len(e.response) // size) * size for e, _ in items]
        longest = max(len(e.prompt) + 2 * n for (e, _), n in zip(items, padded))
        shape = len(items), -(-longest // MULTIPLE) * MULTIPLE
        ids, positions = np.full(shape, self.pad_token_id), np.zeros(shape, np.int64)
        labels, weights = np.full(shape, IGNORED), np.zeros(shape, np.float32)
        blocks, noised = np.full(shape, PADDING), np.zeros(shape, bool)
        for row, ((example, chance), length) in enumerate(zip(items, padded)):
            start = len(example.prompt)
            response = np.full(length, self.eos_token_id)
            response[: len(example.response)] = example.response
            low, high = self.noise
            masking = low + (high - low) * chance.random(length // size).repeat(size)
            masked = chance.random(length) < masking
            clean, noisy = slice(start, start + length), slice(start + length, start + 2 * length)
            ids[row, :start], ids[row, clean] = example.prompt, response
            ids[row, noisy] = np.where(masked, self.mask_token_id, response)
            positions[row, : start + length] = np.arange(start + length)
            positions[row, noisy] = np.arange(start, start + length)
            blocks[row, : start + length] = block_numbers(start, length, size)
            blocks[row, noisy] = blocks[row, clean]
            noised[row, noisy] = True
            labels[row, noisy] = np.where(masked, response, IGNORED)
            weights[row, noisy] = 1 / masking / length / len(items)
        batch = _labelled(ids, positions, labels, weights)
        return batch | {"blocks": torch.tensor(blocks), "noised": torch.tensor(noised)}


def block_numbers(prompt: int, response: int, size: int) -> np.ndarray:
    """BD3-LM's block of each token; the response starts a new one."""
    before = -(-prompt // size)
    return np.concatenate([np.arange(prompt) // size, before + np.arange(response) // size])


def _in_order(ids: np.ndarray) -> np.ndarray:
    return np.tile(np.arange(ids.shape[1]), (len(ids), 1))


@cache
def _cart(length: int, cart: float) -> np.ndarray:
    """What a known token adds to a mask's weight, float32 [L, L]."""
    distance = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    shares = cart / 2 * (1 - cart) ** np.maximum(distance - 1.0, 0)
    return np.where(distance == 0, 0, shares).astype(np.float32)


def _labelled(ids: Any, positions: Any, labels: Any, weights: Any) -> Batch:
    labels = torch.as_tensor(labels.flatten())
    weights = torch.as_tensor(weights.flatten(), dtype=torch.float32)
    rows = (labels != IGNORED).nonzero()[:, 0]
    return {
        "input_ids": torch.as_tensor(ids),
        "position_ids": torch.as_tensor(positions),
        "rows": rows,
        "labels": labels[rows],
        "weights": weights[rows],
    }


def block_mask(blocks: torch.Tensor, noised: torch.Tensor) -> torch.Tensor:
    """BD3-LM's training mask, bool [B, 1, L, L]: who sees whom.

    A clean token sees the clean tokens of its block and of earlier ones; a noised token sees the
    noised tokens of its block and the clean ones of earlier blocks.
    """
    of, by = blocks[:, None, :], blocks[:, :, None]  # seen, seeing
    from_noised, to_noised = noised[:, :, None], noised[:, None, :]
    seen = torch.where(to_noised, from_noised & (of == by), of < by)
    return (seen | (~from_noised & ~to_noised & (of == by)))[:, None]


def see_both_ways(model: Any, both_ways: bool = True) -> None:
    """Whether a token sees later ones too, where no mask says what it sees."""
    for layer in model.base_model.layers:
        layer.self_attn.is_causal = not both_ways


def hidden_states(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """[B, L, H]. Without a mask the attention modules' ``is_causal`` decides (``see_both_ways``).

    A mask given by its kind, None included, is taken as it is: transformers builds none of its own,
    and so does not take moved slots for the starts of packed sequences.
    """
    mask = None
    if "blocks" in batch:
        mask = block_mask(batch["blocks"], batch["noised"])
    elif "sees" in batch:
        mask = visible(batch["sees"], batch["since"])
    elif "real" in batch:
        mask = batch["real"][:, None, None, :]
    return model.base_model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask={"full_attention": mask},
        use_cache=False,
    ).last_hidden_state


def loss_of(hidden: torch.Tensor, head: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Causal methods: the sum of the losses of training. Others: sum of weight * CE. float32."""
    if "mdm_labels" in batch:
        return hybrid_loss(hidden, head, batch, label_counts(batch), len(batch["labelled"])).sum()
    logits = head(hidden.flatten(0, 1)[batch["rows"]])
    losses = cross_entropy(logits.float(), batch["labels"], reduction="none")
    return (batch["weights"] * losses).sum()
