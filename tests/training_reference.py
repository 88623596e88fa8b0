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


def losses(examples, draws, mask_token_id, logits_of, infill_logits):
    """(L_AR, L_MDM, L_infill) as scalars.

    ``logits_of(i, fed)`` gives the logits [tokens, V] of example i, ``infill_logits(i, fed, n)``
    those [V] of a mask that stands for a clean token, behind what was fed before that; in a batch
    it is token n of the row. None: there are no such masks.
    """
    clean, per_example, infill = [], [], []
    for index, (example, drawn) in enumerate(zip(examples, draws, strict=True)):
        fed = feeding_order(example.prompt, example.response, drawn, mask_token_id)
        masked = []
        for row, (_, _, kind, label) in zip(logits_of(index, fed), fed, strict=True):
            if kind is not None:
                surprise = row.double().logsumexp(0) - row[label].double()
                (clean if kind == "ar" else masked).append(surprise)
        per_example.append(sum(ce / drawn.masking for ce in masked) / len(example.response))
        if infill_logits is not None:
            known = [n for n, (token, *_) in enumerate(fed) if token != mask_token_id]
            for count, place in enumerate(known[len(example.prompt) :]):
                token, position, _, _ = fed[place]
                behind = [*fed[:place], (mask_token_id, position, None, None)]
                row = infill_logits(index, behind, len(fed) + count)
                infill.append(row.double().logsumexp(0) - row[token].double())

    def mean(values):
        return sum(values) / len(values) if values else torch.tensor(0.0)

    return mean(clean), mean(per_example), mean(infill)


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
