"""The algorithm's training taken literally: one example, one token, one probability at a time."""

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


def feeding_order(prompt, response, drawn, mask_token_id, joined=False):
    """Of each token fed: (id, position, kind of label or None, label).

    A "join" is the label of a token before a slot, of the prompt or of another slot.
    """
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
    if joined:
        in_order = [-1, *drawn.clean, *sorted(slots)]  # the prompt ends where a slot -1 would
        ends = {(n + 1) * drawn.slot_size - 1: n + 1 for n in drawn.clean} | {-1: 0}
        for place, (token, position, kind, _) in enumerate(fed):
            following = ends.get(position - len(prompt))
            if kind != "mdm" and (following is not None) and following in in_order:
                if in_order.index(following) == in_order.index(following - 1) + 1:
                    first = response[following * drawn.slot_size]
                    fed[place] = (token, position, "join", first)
    return fed


def fed_again(prompt, fed, slot_size, mask_token_id, infill, certainty):
    """Of each token behind ``fed``: (all that it sees, itself last; kind of label or None, label).

    First the masks of L_infill, then the masked slots, clean.
    """
    known = [n for n, (token, *_) in enumerate(fed) if token != mask_token_id]
    masks = {position: token for _, position, kind, token in fed if kind == "mdm"}
    rows = []
    for place in known[len(prompt) :] if infill else []:
        token, position, _, _ = fed[place]
        rows.append(([*fed[:place], (mask_token_id, position, None, None)], "infill", token))
    for position in masks if certainty else []:
        first = position - (position - len(prompt)) % slot_size
        own = [(masks[at], at, None, None) for at in range(first, position + 1)]
        is_last = position + 1 == first + slot_size or position + 1 not in masks
        label = (None, None) if is_last else ("ar", masks[position + 1])
        rows.append(([*(fed[n] for n in known), *own], *label))
    return rows


def losses(
    examples,
    draws,
    mask_token_id,
    logits_of,
    logits_behind,
    infill,
    certainty,
    joined=False,
    power=1,
):
    """(L_AR, L_MDM, L_infill) as scalars.

    ``logits_of(i, fed)`` gives the logits [tokens, V] of example i, ``logits_behind(i, seen, n)``
    those [V] of the last token of ``seen``; in a batch it is token n of the row.
    """
    clean, per_example, infilled = [], [], []

    def surprise(logits, label):
        return logits.double().logsumexp(0) - logits[label].double()

    for index, (example, drawn) in enumerate(zip(examples, draws, strict=True)):
        start, size = len(example.prompt), drawn.slot_size
        fed = feeding_order(example.prompt, example.response, drawn, mask_token_id, joined)
        again = fed_again(example.prompt, fed, size, mask_token_id, infill, certainty)
        rows = [
            (position, kind, label, logits)
            for logits, (_, position, kind, label) in zip(logits_of(index, fed), fed, strict=True)
        ]
        rows += [
            (seen[-1][1], kind, label, logits_behind(index, seen, n))
            for n, (seen, kind, label) in enumerate(again, len(fed))
        ]
        unsure = {}  # by slot, the position of its first token: minus the logarithm of q
        for position, kind, label, logits in rows:
            if kind in ("ar", "join"):
                clean.append(surprise(logits, label))
            if kind == "ar":
                slot = position - (position - start) % size
                unsure[slot] = unsure.get(slot, 0) + clean[-1].detach()
        masked = []
        for position, kind, label, logits in rows:
            if kind in ("mdm", "infill"):
                ce = surprise(logits, label)
                if certainty and position in unsure:
                    q = torch.exp(-unsure[position]) ** power
                    ce = q * ce + (1 - q) * surprise(logits, mask_token_id)
                (masked if kind == "mdm" else infilled).append(ce)
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


def assert_close(ours, literal):
    torch.testing.assert_close(ours.double(), literal.double(), rtol=1e-4, atol=1e-6)
