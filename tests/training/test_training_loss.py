"""Collator and hybrid loss against a literal implementation; what a moved slot attends to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.utils import compile_regions
from training_reference import (
    assert_close,
    fed_again,
    feeding_order,
    losses,
    one_token_at_a_time,
    random_model,
)

from vllm_refusion.training.collator import (
    BLOCKS,
    IGNORED,
    MIN_MASKING,
    Draw,
    Example,
    autoregressive,
    collate,
    draw,
    sequence,
)
from vllm_refusion.training.loss import (
    CAUSAL,
    attach,
    cross_entropies,
    hybrid_loss,
    label_counts,
    visible,
)

VOCABULARY, MASK, PAD = 40, 39, 38
SLOT_SIZES = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def model():
    model = random_model(VOCABULARY)
    attach(model, chunk_rows=7)
    return model


def random_example(generator, longest=70) -> Example:
    # one in five without a prompt, one in five with a response of one token
    prompt = generator.integers(0, 30, generator.integers(0, 12) * (generator.random() > 0.2))
    length = 1 if generator.random() < 0.2 else generator.integers(1, longest)
    return Example(prompt.tolist(), generator.integers(0, 38, length).tolist())


def random_draw(length, generator) -> Draw:
    """A quarter of them in blocks, one in order, but every third one masks all or nothing."""
    drawn = draw(length, SLOT_SIZES, generator, block_share=0.25, ordered_share=0.25)
    extreme = generator.integers(6)
    if extreme == 0:
        return Draw(drawn.slot_size, drawn.masking, ())
    if extreme == 1:
        slots = generator.permutation(-(-length // drawn.slot_size)).tolist()
        return Draw(drawn.slot_size, drawn.masking, tuple(slots))
    return drawn


def extras(seed):
    """(infill, certainty, joined) of a batch: all eight triples."""
    return seed % 2 == 1, seed % 4 > 1, seed % 8 > 3


def random_batch(seed):
    generator = np.random.default_rng(seed)
    examples = [random_example(generator) for _ in range(generator.integers(1, 5))]
    draws = [random_draw(len(e.response), generator) for e in examples]
    rows = [sequence(e, d, MASK, *extras(seed)) for e, d in zip(examples, draws, strict=True)]
    return examples, draws, collate(rows, PAD)


def test_collator_equals_the_literal_order():
    seen = set()
    for seed in range(400):
        examples, draws, batch = random_batch(seed)
        for row, (example, drawn) in enumerate(zip(examples, draws, strict=True)):
            infill, certainty, joined = extras(seed)
            fed = feeding_order(example.prompt, example.response, drawn, MASK, joined)
            slots = -(-len(example.response) // drawn.slot_size)
            columns = [batch[name][row] for name in ("input_ids", "position_ids")]
            columns += [batch["ar_labels"][row], batch["mdm_labels"][row]]
            expected = [
                (
                    t,
                    p,
                    label if kind in ("ar", "join") else IGNORED,
                    label if kind == "mdm" else IGNORED,
                )
                for t, p, kind, label in fed
            ]
            again = fed_again(example.prompt, fed, drawn.slot_size, MASK, infill, certainty)
            expected += [
                (*shown[-1][:2], label if kind == "ar" else IGNORED, IGNORED)
                for shown, kind, label in again
            ]
            if infill or certainty:
                at = {position: place for place, (_, position, *_) in enumerate(fed)}
                behind = {}  # of the tokens behind those, by (id, position)
                sees = [set(range(place + 1)) for place in range(len(fed))]
                for n, (shown, *_) in enumerate(again, len(fed)):
                    known = {at[p] for t, p, *_ in shown[:-1] if fed[at[p]][0] == t}
                    copies = {behind[t, p] for t, p, *_ in shown[:-1] if fed[at[p]][0] != t}
                    sees.append({*known, *copies, n})
                    behind[shown[-1][:2]] = n
                seen_by = visible(batch["sees"], batch["since"])[row, 0, : len(expected)]
                assert [set(line.nonzero()[:, 0].tolist()) for line in seen_by] == sees
                counts_for = [-1] * batch["input_ids"].shape[1]
                for n, (token, position, label, _) in enumerate(expected):
                    is_join = n < len(fed) and fed[n][2] == "join"
                    if certainty and token != MASK and label != IGNORED and not is_join:
                        slot = position - (position - len(example.prompt)) % drawn.slot_size
                        is_masked = fed[at[slot]][0] == MASK
                        counts_for[n] = at[slot] if is_masked else behind.get((MASK, slot), -1)
                assert ("certainty_of" in batch) == certainty
                assert not certainty or batch["certainty_of"][row].tolist() == counts_for
                wanted = [IGNORED] * len(counts_for)
                for n, (_, kind, label) in enumerate(again, len(fed)):
                    wanted[n] = label if kind == "infill" else IGNORED
                assert batch["infill_labels"][row].tolist() == wanted
            count = len(expected)
            assert list(zip(*(c[:count].tolist() for c in columns))) == expected
            padding = [c[count:].unique().tolist() for c in columns]
            assert padding in ([[]] * 4, [[PAD], [0], [IGNORED], [IGNORED]])
            seen |= {
                name
                for name, holds in {
                    "short last slot": len(example.response) % drawn.slot_size,
                    "all masked": not drawn.clean,
                    "none masked": len(drawn.clean) == slots,
                    "one token": len(example.response) == 1,
                    "no prompt": not example.prompt,
                    "joined": any(kind == "join" for _, _, kind, _ in fed),
                    "moved": list(drawn.clean) != sorted(drawn.clean),
                    f"slots of {drawn.slot_size}": True,
                }.items()
                if holds
            }
    assert len(seen) == 7 + len(SLOT_SIZES), seen


@pytest.mark.parametrize(
    "clean, labels",
    [
        # 0 1 2 3 | 4 5 6 7 | 8 9, behind a prompt of two; of the row of each clean token, its label
        ((), [None, 0]),
        ((0,), [None, 0, 1, 2, 3, 4]),
        ((0, 1), [None, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ((0, 1, 2), [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, None]),
        ((1, 2, 0), [None, None, 5, 6, 7, 8, 9, None, 1, 2, 3, None]),
        ((1,), [None, None, 5, 6, 7, None]),  # a mask of slot 0 follows
        ((2, 0), [None, None, 9, None, 1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("prompt", [2, 0])
def test_labels_of_joined_slots(clean, labels, prompt):
    example = Example([20, 21][:prompt], list(range(10)))
    for infill in (False, True):
        row = sequence(example, Draw(4, 0.5, clean), MASK, infill, joined=True)
        masks = len(row.ar_labels) - len(labels[2 - prompt :])
        expected = [IGNORED if label is None else label for label in labels[2 - prompt :]]
        assert row.ar_labels == expected + [IGNORED] * masks


def test_loss_and_gradients_equal_the_literal_ones():
    """300 batches of random hidden states; gradients of them and of the head."""
    for seed in range(300):
        examples, draws, batch = random_batch(seed)
        torch.manual_seed(seed)
        hidden = torch.randn(*batch["input_ids"].shape, 6, requires_grad=True)
        head = torch.nn.Linear(6, VOCABULARY, bias=False)
        weights = torch.tensor([0.7, 1.3, 0.4])
        wanted = (hidden, head.weight)

        power = 1 + seed % 3
        ours = hybrid_loss(hidden, head, batch, label_counts(batch), 5, slot_certainty=power)
        gradients = torch.autograd.grad((ours * weights).sum(), wanted)

        def logits_of(index, fed, hidden=hidden, head=head):
            return head(hidden[index, : len(fed)])

        def logits_behind(index, seen, n, hidden=hidden, head=head):
            return head(hidden[index, n])

        parts = losses(examples, draws, MASK, logits_of, logits_behind, *extras(seed), power)
        literal = torch.stack([torch.as_tensor(part).double() for part in parts])
        assert_close(ours, literal)
        expected = torch.zeros_like(hidden), torch.zeros_like(head.weight)
        if literal.requires_grad:
            expected = torch.autograd.grad((literal * weights).sum(), wanted)
        for gradient, other in zip(gradients, expected, strict=True):
            assert_close(gradient, other)


def test_only_logits_are_rounded_under_autocast():
    """Losses of their bfloat16 logits, computed in float32."""
    _, _, batch = random_batch(5)
    torch.manual_seed(0)
    hidden = torch.randn(*batch["input_ids"].shape, 6)
    head = torch.nn.Linear(6, VOCABULARY, bias=False)
    counts = label_counts(batch)
    with torch.autocast("cpu", torch.bfloat16):
        ours = hybrid_loss(hidden, head, batch, counts)
        logits = head(hidden).float()
    expected = hybrid_loss(logits, torch.nn.Identity(), batch, counts)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


def test_parts_of_a_batch_add_up_to_it(model):
    """Gradient accumulation and several devices give the same loss as one large batch."""
    examples, draws, batch = random_batch(3)
    assert len(examples) > 1
    counts = label_counts(batch)
    whole = model(batch=batch, counts=counts)
    rows = [sequence(e, d, MASK, True, True) for e, d in zip(examples, draws, strict=True)]
    parts = [model(batch=collate([row], PAD), counts=counts) for row in rows]
    assert_close(sum(parts), whole)


@pytest.mark.parametrize("seed", range(8))
def test_model_loss_and_gradients_equal_those_of_single_tokens(model, seed):
    """Through the whole model: batched, padded and masked against one token at a time."""
    examples, draws, batch = random_batch(1010 + seed)
    wanted = list(model.parameters())
    ours = model(batch=batch, counts=label_counts(batch))
    gradients = torch.autograd.grad(ours.sum(), wanted, allow_unused=True)
    literal = losses(
        examples,
        draws,
        MASK,
        lambda i, fed: one_token_at_a_time(model, fed),
        lambda i, seen, n: one_token_at_a_time(model, seen)[-1],
        *extras(1010 + seed),
    )
    for part, other in zip(ours, literal, strict=True):
        assert_close(part, torch.as_tensor(other))
    expected = torch.autograd.grad(sum(literal), wanted, allow_unused=True)
    for gradient, other in zip(gradients, expected, strict=True):
        scale = other.abs().max()
        assert (gradient - other).abs().max() <= 1e-4 * scale + 1e-7


def test_a_moved_slot_sees_what_is_placed_before_it_and_nothing_later(model):
    """Slots in the order 2, 0, 1: the trap at the end of section 6."""
    example = Example([1, 2, 3], list(range(4, 16)))
    fed = feeding_order(example.prompt, example.response, Draw(4, 0.5, (2, 0, 1)), MASK)
    assert [position for _, position, _, _ in fed][3:] == [*range(11, 15), *range(3, 11)]

    def hidden(changed=None):
        row = sequence(example, Draw(4, 0.5, (2, 0, 1)), MASK)
        batch = collate([row], PAD)
        if changed is not None:
            batch["input_ids"][0, changed] = 35
        seen = []
        handle = model.base_model.register_forward_hook(
            lambda _, __, output: seen.append(output.last_hidden_state[0, : len(fed)])
        )
        model(batch=batch, counts=label_counts(batch))
        handle.remove()
        return seen[0].detach()

    before = hidden()
    for changed in range(len(fed)):
        moved = (hidden(changed) - before).abs().amax(-1)
        assert (moved[:changed] == 0).all()
        assert (moved[changed:] > 1e-6).all(), changed


@pytest.mark.parametrize("seed", range(4))
def test_no_mask_equals_an_explicit_causal_mask(model, seed):
    """Losses and gradients of right-padded rows: padding comes after all that could see it."""
    _, _, batch = random_batch(2000 + 4 * seed)
    counts, wanted = label_counts(batch), list(model.parameters())
    ours = model(batch=batch, counts=counts)
    length = batch["input_ids"].shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    hidden = model.base_model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=mask[None, None].expand(len(batch["input_ids"]), 1, -1, -1),
        use_cache=False,
    ).last_hidden_state
    assert "sees" not in batch
    masked = hybrid_loss(hidden, model.lm_head, batch, counts)
    assert_close(ours, masked)
    for part in range(2):
        gradients = torch.autograd.grad(ours[part], wanted, retain_graph=True)
        expected = torch.autograd.grad(masked[part], wanted, retain_graph=True)
        for gradient, other in zip(gradients, expected, strict=True):
            assert (gradient - other).abs().max() <= 1e-5 * other.abs().max() + 1e-8


def test_transformers_still_cuts_attention_at_jumps_under_sdpa(model):
    """Why attention has a name of its own; should this fail, that can go."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    other = torch.tensor([[9, 2, 3, 4, 5, 6]])
    positions = torch.tensor([[0, 1, 4, 5, 2, 3]])

    def last_is_the_same():
        logits = (model(input_ids=i, position_ids=positions, use_cache=False) for i in (ids, other))
        one, two = (output.logits[0, -1] for output in logits)
        return bool((one == two).all())

    assert not last_is_the_same()
    model.set_attn_implementation("sdpa")
    try:
        assert last_is_the_same()
    finally:
        model.set_attn_implementation(CAUSAL)


@pytest.mark.parametrize("seed", [4, 7])
def test_training_pass_compiles_without_graph_breaks(model, seed):
    """What ``--compile`` compiles, here without code generation; losses stay the same."""
    _, _, batch = random_batch(seed)
    expected = model(batch=batch, counts=label_counts(batch))
    torch._dynamo.reset()
    base = compile_regions(model.base_model, dynamic=True, fullgraph=True, backend="eager")
    fed = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    fed["attention_mask"] = visible(batch["sees"], batch["since"]) if "sees" in batch else None
    hidden = base(**fed, use_cache=False).last_hidden_state
    compiled = torch.compile(cross_entropies, dynamic=True, fullgraph=True, backend="eager")
    ours = hybrid_loss(hidden, model.lm_head, batch, label_counts(batch), chunk_losses=compiled)
    assert_close(ours, expected)


def test_draws_follow_the_algorithm():
    generator = np.random.default_rng(0)
    drawn = [draw(64, SLOT_SIZES, generator) for _ in range(4000)]
    sizes = [d.slot_size for d in drawn]
    assert all(abs(sizes.count(size) / 4000 - 0.25) < 0.03 for size in SLOT_SIZES)
    assert min(d.masking for d in drawn) >= MIN_MASKING and max(d.masking for d in drawn) <= 1
    assert abs(np.mean([d.masking for d in drawn]) - 0.5) < 0.02
    fours = [d for d in drawn if d.slot_size == 4]
    masked = np.array([16 - len(d.clean) for d in fours])
    expected = np.array([16 * d.masking for d in fours])
    assert abs((masked - expected).mean()) < 0.25
    first = np.mean([d.clean[0] for d in fours if len(d.clean) > 1])
    assert abs(first - 7.5) < 0.8  # any slot may come first


def test_draws_in_blocks_are_what_decoding_leaves():
    generator = np.random.default_rng(1)
    drawn = [draw(62, (4,), generator, block_share=1) for _ in range(4000)]
    counts = [len(d.clean) for d in drawn]
    assert all(abs(counts.count(n) / 4000 - 1 / 16) < 0.02 for n in range(16))
    assert all(d.masking == (16 - len(d.clean)) / 16 for d in drawn)

    def decoded_in(d, size):
        """Whole blocks of so many slots, from the first, and some of the next."""
        return [n // size for n in d.clean] == [i // size for i in range(len(d.clean))]

    assert all(any(decoded_in(d, size) for size in BLOCKS) for d in drawn)
    many = [d for d in drawn if len(d.clean) > 12]
    smallest = [min(size for size in BLOCKS if decoded_in(d, size)) for d in many]
    assert all(abs(smallest.count(size) / len(many) - 0.25) < 0.06 for size in BLOCKS)
    eights = [d.clean for d, size in zip(many, smallest, strict=True) if size == 8]
    first = [clean.index(0) for clean in eights]
    assert abs(np.mean(first) - 3.5) < 0.4  # any slot of a block may come first
    half = [draw(62, (4,), generator, block_share=0.5) for _ in range(4000)]
    assert abs(np.mean([(16 * d.masking).is_integer() for d in half]) - 0.5) < 0.03


def test_draws_in_order():
    generator = np.random.default_rng(2)
    drawn = [draw(62, (4,), generator, ordered_share=1) for _ in range(4000)]
    counts = [len(d.clean) for d in drawn]
    assert all(abs(counts.count(n) / 4000 - 1 / 17) < 0.02 for n in range(17))
    assert all(d.clean == tuple(range(len(d.clean))) for d in drawn)
    assert all(d.masking == (16 - n or 16) / 16 for d, n in zip(drawn, counts, strict=True))
    both = [draw(62, (4,), generator, 0.5, 0.5) for _ in range(4000)]
    assert all((16 * d.masking).is_integer() for d in both)
    in_order = [d.clean == tuple(range(len(d.clean))) for d in both if len(d.clean) > 12]
    assert abs(np.mean(in_order) - 0.69) < 0.06  # half of them, and blocks of one slot


def test_autoregressive_labels():
    row = autoregressive(Example([1, 2], [3, 4, 5]))
    assert row.input_ids == [1, 2, 3, 4, 5]
    assert row.ar_labels == [IGNORED, 3, 4, 5, IGNORED]
    assert autoregressive(Example([], [3, 4])).ar_labels == [4, IGNORED]
