"""Section 6 of the algorithm taken literally: one example, one token, one probability at a time."""

from __future__ import annotations

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM


def random_model(vocab_size, **config):
    """A small random model, far from uniform, so that attention matters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        **config,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def feeding_order(prompt, response, drawn, mask_token_id):
    """Of each token fed: (id, position, kind of label or None, label)."""
    slots = {}
    for index, token in enumerate(response):
        slots.setdefault(index // drawn.slot_size, []).append((len(prompt) + index, token))
    fed = [(token, position, None, None) for position, token in enumerate(prompt)]
    for number in drawn.clean:
        slot = slots.pop(number)
        for (position, token), following in zip(slot, [*slot[1:], None], strict=True):
            fed.append((token, position, following and "ar", following and following[1]))
    for number in sorted(slots):
        fed += [(mask_token_id, position, "mdm", token) for position, token in slots[number]]
    return fed


def fed_again(prompt, fed, slot_size, mask_token_id, infill, certainty):
    """Of each token behind ``fed``: (all that it sees, itself last; kind, label, slot).

    First the masks of L_infill, then the masked slots, clean. A slot is the position of its first
    token; of a slot's last token the label is None.
    """
    known = [n for n, (token, *_) in enumerate(fed) if token != mask_token_id]
    masks = {position: token for _, position, kind, token in fed if kind == "mdm"}
    rows = []
    for place in known[len(prompt) :] if infill else []:
        token, position, _, _ = fed[place]
        if (position - len(prompt)) % slot_size:
            mask = (mask_token_id, position, None, None)
            rows.append(([*fed[:place], mask], "infill", token, None))
    for position in masks if certainty else []:
        first = position - (position - len(prompt)) % slot_size
        own = [(masks[at], at, None, None) for at in range(first, position + 1)]
        is_last = (position + 1 - len(prompt)) % slot_size == 0
        following = None if is_last else masks.get(position + 1)
        rows.append(([*(fed[n] for n in known), *own], "ar", following, first))
    return rows


def losses(examples, draws, mask_token_id, logits_of, logits_behind, infill, certainty, power=1):
    """(L_AR, L_MDM, L_infill) as scalars.

    ``logits_of(i, fed)`` gives the logits [tokens, V] of example i, ``logits_behind(i, seen, n)``
    those [V] of the last token of ``seen``; in a batch it is token n of the row.
    """
    clean, per_example, infilled = [], [], []

    def surprise(logits, label):
        return logits.double().logsumexp(0) - logits[label].double()

    for index, (example, drawn) in enumerate(zip(examples, draws, strict=True)):
        fed = feeding_order(example.prompt, example.response, drawn, mask_token_id)
        unsure = {}  # by slot: minus the logarithm of q
        again = fed_again(example.prompt, fed, drawn.slot_size, mask_token_id, infill, certainty)
        for n, (seen, kind, label, slot) in enumerate(again, len(fed)):
            if label is not None:
                ce = surprise(logits_behind(index, seen, n), label)
                (clean if kind == "ar" else infilled).append(ce)
                if kind == "ar":
                    unsure[slot] = unsure.get(slot, 0) + ce.detach()
        masked = []
        for row, (_, position, kind, label) in zip(logits_of(index, fed), fed, strict=True):
            if kind == "ar":
                clean.append(surprise(row, label))
            if kind == "mdm":
                q = torch.exp(-torch.as_tensor(unsure.get(position, 0.0))) ** power
                masked.append(q * surprise(row, label) + (1 - q) * surprise(row, mask_token_id))
        per_example.append(sum(ce / drawn.masking for ce in masked) / len(example.response))

    def mean(values):
        return sum(values) / len(values) if values else torch.tensor(0.0)

    return mean(clean), mean(per_example), mean(infilled)


def one_token_at_a_time(model, fed):
    """Logits [tokens, V]: each token is fed alone, behind a cache of those fed before it."""
    cache, rows = DynamicCache(), []
    for count, (token, position, _, _) in enumerate(fed, 1):
        output = model(
            input_ids=torch.tensor([[token]]),
            position_ids=torch.tensor([[position]]),
            attention_mask=torch.zeros(1, 1, 1, count),
            past_key_values=cache,
            use_cache=True,
        )
        rows.append(output.logits[0, 0])
    return torch.stack(rows)
