"""examples/controlled_comparison: objectives and decoders against literal ones, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import compare
import decoders
import evaluation
import numpy as np
import pytest
import torch
import training_run
from decoders import Tokens
from objectives import (
    CAUSAL,
    METHODS,
    START,
    Objective,
    hidden_states,
    loss_of,
    see_both_ways,
)
from training_reference import assert_close, random_model
from variants import MAIN, SAME_TEXT, VARIANTS

from vllm_refusion.training.collator import Example, autoregressive, collate, draw, sequence
from vllm_refusion.training.loss import attach, label_counts

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS, MASK, PAD, EOS = 40, 39, 38, 37
SPECIAL = Tokens(MASK, EOS)


@pytest.fixture(scope="module")
def model():
    return random_model(WORDS, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=PAD)


def chance(seed, number):
    return np.random.default_rng([seed, number])


def random_items(seed):
    """One to four examples, one in five with a response of one token."""
    generator = np.random.default_rng(seed)
    items = []
    for number in range(generator.integers(1, 5)):
        length = 1 if generator.random() < 0.2 else generator.integers(1, 30)
        prompt = generator.integers(0, 30, generator.integers(1, 12)).tolist()
        response = [*generator.integers(0, 30, length - 1).tolist(), EOS]
        items.append((Example(prompt, response), chance(seed, number)))
    return items


def objective(method, **options):
    return Objective(method, MASK, PAD, EOS, generation_length=24, **options)


def our_loss(model, method, batch):
    see_both_ways(model, method not in CAUSAL)
    return loss_of(hidden_states(model, batch), model.lm_head, batch)


def log_probabilities(model, ids, positions, sees):
    """float [L, V] of a model that sees what ``sees(query, key)`` says: by a mask in full."""
    length = len(ids)
    mask = torch.tensor([[bool(sees(q, k)) for k in range(length)] for q in range(length)])
    output = model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None],
        use_cache=False,
    )
    return output.logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("method", CAUSAL)
def test_causal_losses_equal_those_of_training(model, method):
    attach(model)
    options = method == "refusion_options"

    def row(example, drawn_by):
        if method in ("autoregressive", START):
            return autoregressive(example)
        drawn = draw(len(example.response), (4, 8, 16, 32), drawn_by, 0.5 if options else 0)
        return sequence(example, drawn, MASK, options, options)

    for seed in range(12):
        items = random_items(seed)
        batch = collate([row(e, chance(seed, n)) for n, (e, _) in enumerate(items)], PAD)
        expected = model(batch=batch, counts=label_counts(batch)).sum()
        assert_close(our_loss(model, method, objective(method)(items)), expected)


def masked_literally(model, seed, items, batch):
    """Of each example, padded with EOS and masked as ``batch`` has to be, what a loss is made of.

    Yields:
        its text, where the response starts, the masked places, how likely each was to be one, and
        the log-probabilities of a model that sees all.
    """
    for row, (example, _) in enumerate(items):
        text = [*example.prompt, *example.response]
        drawn, start = chance(seed, row), len(example.prompt)
        text += [EOS] * (start + 24 - len(text))
        width = len(text)
        masking = 0.999 * drawn.random() + 0.001
        masked = {start + i for i, u in enumerate(drawn.random(width - start)) if u < masking}
        fed = [MASK if i in masked else token for i, token in enumerate(text)]
        assert batch["input_ids"][row, :width].tolist() == fed
        assert batch["real"][row].sum() == width
        given = log_probabilities(model, fed, list(range(width)), lambda q, k: True)
        yield text, start, masked, masking, given


def test_llada_loss_equals_the_literal_one(model):
    """Mean over examples of (sum over masked tokens of CE / p) / length, EOS padding included."""
    for seed in range(8):
        items = random_items(seed)
        batch = objective("llada")(items)
        total = 0
        for text, start, masked, masking, given in masked_literally(model, seed, items, batch):
            total -= sum(given[i, text[i]] / masking for i in masked) / (len(text) - start)
        assert_close(our_loss(model, "llada", batch), torch.as_tensor(total / len(items)))


def test_dream_loss_equals_the_literal_one(model):
    """Sum of w CE / masks of the batch: the token before predicts, w sums over known tokens."""
    for seed in range(8):
        items = random_items(seed)
        batch = objective("dream")(items)
        total, masks = 0, 0
        for text, _, masked, _, given in masked_literally(model, seed, items, batch):
            for i in masked:
                known = set(range(len(text))) - masked
                weight = sum(0.5 * 0.1 * 0.9 ** (abs(i - j) - 1) for j in known)
                total -= weight * given[i - 1, text[i]]
            masks += len(masked)
        assert_close(our_loss(model, "dream", batch), torch.as_tensor(total / masks))


@pytest.mark.parametrize("size", [1, 4, 5])
def test_bd3lm_loss_equals_one_pass_per_block(model, size):
    """Each noised block alone behind what is clean before it, instead of all in one sequence."""
    for seed in range(4):
        items = random_items(seed)
        batch = objective("bd3lm", block_length=size)(items)
        total = 0
        for row, (example, _) in enumerate(items):
            prompt, response = example.prompt, list(example.response)
            response += [EOS] * (-len(response) % size)
            drawn, blocks = chance(seed, row), len(response) // size
            maskings = [0.45 + 0.5 * u for u in drawn.random(blocks)]
            uniform = drawn.random(len(response))
            of_prompt = [i // size for i in range(len(prompt))]
            of_all = of_prompt + [of_prompt[-1] + 1 + i // size for i in range(len(response))]
            for block, masking in enumerate(maskings):
                first, last = block * size, (block + 1) * size
                masked = [i for i in range(first, last) if uniform[i] < masking]
                noised = [MASK if i in masked else response[i] for i in range(first, last)]
                fed = [*prompt, *response[:first], *noised]
                start = len(prompt)
                given = log_probabilities(
                    model, fed, list(range(len(fed))), lambda q, k, of=of_all: of[k] <= of[q]
                )
                losses = [-given[start + i, response[i]] / masking for i in masked]
                total += sum(losses) / len(response)
        assert_close(our_loss(model, "bd3lm", batch), torch.as_tensor(total / len(items)))


def prompts(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 30, n).tolist() for n in generator.integers(1, 12, count)]


def test_autoregressive_equals_decoding_without_cache(model):
    for prompt in prompts(4):
        tokens = []
        while len(tokens) < 12 and EOS not in tokens:
            fed = prompt + tokens
            given = log_probabilities(model, fed, list(range(len(fed))), lambda q, k: k <= q)
            tokens.append(int(given[-1].argmax()))
        outcome = decoders.autoregressive(model, prompt, SPECIAL, 12)
        assert (outcome.tokens, outcome.passes) == (tokens, len(tokens))


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_llada_equals_the_literal_sampler(model, at_once):
    """Every pass unmasks exactly ``at_once`` tokens, all in the first block that has masks."""
    for prompt in prompts(4):
        response, passes = [MASK] * 16, 0
        for block in range(0, 16, 8):
            for _ in range(8 // at_once):
                fed = prompt + response
                given = log_probabilities(model, fed, list(range(len(fed))), lambda q, k: True)
                given[:, MASK] = -math.inf
                passes += 1
                scores = {
                    i: given[len(prompt) + i].max()
                    for i in range(block, block + 8)
                    if response[i] == MASK
                }
                for i in sorted(scores, key=scores.get)[-at_once:]:
                    response[i] = int(given[len(prompt) + i].argmax())
            assert MASK not in response[: block + 8]
        options = {"block_length": 8, "tokens_per_step": at_once}
        outcome = decoders.llada(model, prompt, SPECIAL, 16, stop=False, **options)
        assert outcome.passes == passes == 16 // at_once
        assert outcome.tokens == decoders.until_eos(response, EOS)
        stopped = decoders.llada(model, prompt, SPECIAL, 16, **options)
        assert stopped.tokens == outcome.tokens and stopped.passes <= passes


def literal_nucleus(row, share):
    """Probabilities [V] of the likeliest tokens that together reach ``share``, renormalised."""
    kept, total = [0.0] * len(row), 0.0
    for token in sorted(range(len(row)), key=lambda token: -row[token]):
        if total >= share:
            break
        kept[token] = row[token]
        total += row[token]
    return [p / total for p in kept]


@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("remasking", ["entropy", "maskgit_plus", "origin"])
def test_dream_equals_the_literal_sampler(model, remasking, temperature):
    """With the draws of the same generator; step i goes from time 1 - 0.999 i / steps to the next.

    Entropies, which are 0 where the nucleus is one token, are ordered from left to right then.
    """
    stopped_early = 0
    for seed, prompt in enumerate(prompts(4)):
        for at_once in (1, 4):
            drawn = torch.Generator().manual_seed(seed)
            response, start, steps = [MASK] * 16, len(prompt), 16 // at_once
            for step in range(steps):
                fed = prompt + response
                given = log_probabilities(model, fed, list(range(len(fed))), lambda q, k: True)
                given[:, MASK] = -math.inf
                places = [i for i, token in enumerate(response) if token == MASK]
                rows = given[[start + i - 1 for i in places]].double()
                rows = (rows / (temperature or 1)).softmax(-1).tolist()
                rows = [literal_nucleus(row, 0.9) for row in rows]
                tokens = [max(range(WORDS), key=row.__getitem__) for row in rows]
                if temperature and rows:
                    tokens = torch.multinomial(torch.tensor(rows).double(), 1, generator=drawn)
                    tokens = tokens[:, 0].tolist()
                time, later = 1 - 0.999 * step / steps, 1 - 0.999 * (step + 1) / steps
                share = 1 - later / time if step < steps - 1 else 1
                if remasking == "origin":
                    uniform = torch.rand(len(places), generator=drawn).tolist()
                    chosen = [n for n in range(len(places)) if uniform[n] < share]
                else:
                    surest = {
                        "entropy": [sum(-p * math.log(p) for p in row if p) for row in rows],
                        "maskgit_plus": [-row[token] for row, token in zip(rows, tokens)],
                    }[remasking]
                    order = sorted(range(len(places)), key=surest.__getitem__)
                    chosen = order[: int(len(places) * share)]
                for n in chosen:
                    response[places[n]] = tokens[n]
            assert MASK not in response
            options = {"remasking": remasking, "tokens_per_step": at_once, "seed": seed}
            options["temperature"] = temperature
            outcome = decoders.dream(model, prompt, SPECIAL, 16, stop=False, **options)
            assert outcome.tokens == decoders.until_eos(response, EOS)
            assert outcome.passes == steps
            special = Tokens(MASK, response[4])  # EOS has no say in what is picked
            stopped = decoders.dream(model, prompt, special, 16, **options)
            assert stopped.tokens == decoders.until_eos(response, response[4])
            stopped_early += stopped.passes < steps
    assert stopped_early


def test_dream_refuses_what_it_does_not_know(model):
    with pytest.raises(ValueError, match="remasking='topk'"):
        decoders.dream(model, [1], SPECIAL, 16, remasking="topk")
    with pytest.raises(ValueError, match="max_tokens=16 in steps of tokens_per_step=3"):
        decoders.dream(model, [1], SPECIAL, 16, tokens_per_step=3)


@pytest.mark.parametrize("greedy", [False, True])
def test_bd3lm_equals_decoding_without_cache(model, greedy):
    for seed, prompt in enumerate(prompts(4)):
        size, tokens, passes = 4, [], 0
        drawn = torch.Generator().manual_seed(seed)
        before = -(-len(prompt) // size)
        of = [i // size for i in range(len(prompt))] + [before + i // size for i in range(16)]
        while len(tokens) < 16 and EOS not in tokens:
            passes += bool(tokens)  # the block before is fed clean
            block = [MASK] * size
            for _ in range(size):
                fed = prompt + tokens + block
                given = log_probabilities(
                    model, fed, list(range(len(fed))), lambda q, k, of=of: of[k] <= of[q]
                )[-size:]
                passes += 1
                masked = [i for i, token in enumerate(block) if token == MASK]
                place, token = decoders._unmasked(
                    given.index_fill(1, torch.tensor(MASK), -math.inf),
                    masked,
                    0.9,
                    None if greedy else drawn,
                )
                block[place] = token
            tokens += block
        outcome = decoders.bd3lm(model, prompt, SPECIAL, 16, size, greedy=greedy, seed=seed)
        assert outcome.tokens == decoders.until_eos(tokens, EOS)
        assert outcome.passes == passes


def test_nucleus_is_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25] * 4]).log()
    drawn = torch.Generator().manual_seed(0)
    picks = [decoders._unmasked(logits, [0, 1], 0.75, drawn) for _ in range(400)]
    assert {token for place, token in picks if place == 0} == {0, 1}
    assert {token for place, token in picks if place == 1} <= {0, 1, 2, 3}
    assert abs(sum(place for place, _ in picks) - 200) < 50
    first = [token for place, token in picks if place == 0]
    assert abs(first.count(0) / len(first) - 0.5 / 0.8) < 0.1
    assert decoders._unmasked(logits, [0, 1], 0.75, None) == (0, 0)


def test_recomputed_kv_is_that_of_one_causal_run(model, monkeypatch):
    """After recomputation the cache equals that of the tokens fed in the order committed."""
    caches = []
    commit = decoders._Recomputing._commit

    def noting(self, slots, masked):
        commit(self, slots, masked)
        caches.append((self.canvas, dict(self.tokens)))

    monkeypatch.setattr(decoders._Recomputing, "_commit", noting)
    kept = more = 0
    for prompt in prompts(6):
        options = {"slot_size": 4, "block_length": 16, "slot_threshold": 0.0}
        options["token_threshold"] = 0.9
        caches.clear()
        outcome = decoders.refusion(model, prompt, SPECIAL, 16, recompute=True, **options)
        canvas, committed = caches[-1]
        canvas.keep(0)
        ids = torch.tensor([[*prompt, *committed.values()]])
        where = [*range(len(prompt)), *(len(prompt) + position for position in committed)]
        length = ids.shape[1]
        cache = decoders.DynamicCache()
        model(
            input_ids=ids,
            position_ids=torch.tensor([where]),
            attention_mask={"full_attention": torch.ones(length, length).tril().bool()[None, None]},
            past_key_values=cache,
        )
        for ours, literal in zip(canvas._cache.layers, cache.layers):
            torch.testing.assert_close(ours.keys, literal.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.values, literal.values, rtol=1e-4, atol=1e-4)
        plain = decoders.refusion(model, prompt, SPECIAL, 16, **options)
        kept += any(p.kind == "recompute" for p in canvas.passes)
        more += outcome.passes - plain.passes
    assert kept and more


def test_methods_are_trained_on_the_same_examples_from_the_same_weights(tmp_path, tiny_store):
    runs = {}
    for method in METHODS:
        settings = training_run.Settings(
            str(EXAMPLES / "refusion-tiny"), tiny_store, str(tmp_path), 2, 4, workers=0
        )
        runs[method] = training_run.Run(settings, method, 3)
        loader = runs[method].loader()
        runs[method].counts = [next(loader)["data_tokens"] for _ in range(10)]
    first, *others = runs.values()
    for run in others:
        assert run.counts == first.counts
        for ours, theirs in zip(run.model.parameters(), first.model.parameters()):
            assert ours.equal(theirs)


def test_methods_start_from_the_autoregressive_model_of_their_seed(tmp_path, tiny_store):
    """And go on with the examples behind those that it was trained on."""
    settings = training_run.Settings(
        str(EXAMPLES / "refusion-tiny"), tiny_store, str(tmp_path), 8, 4, workers=0, layers=2
    )
    start = training_run.Run(settings, START, 3)
    trained = start.train()
    start.model.save_pretrained(tmp_path / "models" / start.name)
    counts = [next(loader)["data_tokens"] for loader in [start.loader()] for _ in range(16)]
    assert trained["data_tokens"] == sum(counts[:8])
    for method in METHODS:
        run = training_run.Run(replace(settings, start_steps=8), method, 3)
        loader = run.loader()
        assert sum(next(loader)["data_tokens"] for _ in range(8)) == sum(counts[8:])
        for ours, theirs in zip(run.model.parameters(), start.model.parameters()):
            assert ours.equal(theirs)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    problems = [
        {"query": f"What is {a} + {b}?", "response": f"{a} + {b} = {a + b}\n#### {a + b}"}
        for a in range(8)
        for b in range(5)
    ]
    lines = [json.dumps(row | {"answer": row["response"].split()[-1]}) for row in problems]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def tiny_store(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    args = ["--data", str(rows), "--dev", str(rows), "--output", str(folder), "--small"]
    return str(compare._tokenised(compare.arguments(args)))


def test_the_command_makes_tables_and_plot(rows, tmp_path):
    args = ["--data", str(rows), "--dev", str(rows), "--output", str(tmp_path), "--small"]
    args += ["--seeds", "1", "--steps", "2", "--max-tokens", "32", "--problems", "1"]
    compare.main([*args, "--timed", "1", "--start-steps", "2"])
    results = json.loads((tmp_path / "results.json").read_text())
    runs = {run["method"]: run for run in results["trained"]}
    assert set(runs) == {START, *METHODS} and {run["steps"] for run in runs.values()} == {2}
    assert len({runs[method]["data_tokens"] for method in METHODS}) == 1
    for row in results["main"]["rows"].values():
        assert row["right"] and row["seconds"] > 0
    assert results["main"]["rows"]["LLaDA"]["tokens_per_forward"][0] <= 1
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {name}" in table for name in VARIANTS)
    assert (tmp_path / "results.png").stat().st_size > 10_000
    compare.main([*args, "--phases", "report"])  # says what the other phases were told
    assert (tmp_path / "results.md").read_text() == table


def test_decoding_goes_on_where_it_was_stopped(rows, tmp_path, monkeypatch):
    """What a file has a line of is not decoded again."""
    args = ["--data", str(rows), "--dev", str(rows), "--output", str(tmp_path), "--small"]
    (tmp_path / "models" / "autoregressive-0").mkdir(parents=True)
    line = {"variant": "autoregressive", "seed": 0, "problem": 1}
    (tmp_path / "decoded-cpu.jsonl").write_text(json.dumps(line) + "\n")
    left = []

    def work(place, device, waiting, *rest):
        while not waiting.empty():
            left.append(waiting.get())

    monkeypatch.setattr(evaluation, "work", work)
    compare.decode(compare.arguments([*args, "--problems", "3"]))
    assert left == [evaluation.Job("autoregressive", 0, (0, 2))]


@pytest.mark.parametrize("main_only", [False, True])
def test_jobs_advance_all_variants_together(main_only):
    made = evaluation.jobs(range(2), 5, 2, main_only)
    names = set(MAIN if main_only else VARIANTS) - set(SAME_TEXT)
    assert {(j.variant, j.seed, n) for j in made for n in j.problems} == {
        (v, s, n) for v in names for s in range(2) for n in range(5)
    }
    assert [j.problems[0] for j in made] == sorted(j.problems[0] for j in made)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_is_decoded(method, rows, tmp_path, tiny_store):
    """Each objective with its decoder: 40 sums learned by heart."""
    settings = training_run.Settings(
        str(EXAMPLES / "refusion-tiny"),
        tiny_store,
        str(tmp_path),
        steps=1500 if method in decoders.WHOLE else 600,
        batch_size=16,
        learning_rate=3e-3,
        warmup_steps=50,
        layers=2,
        hidden_size=128,
        generation_length=32,
        workers=0,
    )
    training_run.train_one(settings, method, 0)
    model = evaluation.load(str(tmp_path), method, 0, "cpu")
    problems = evaluation.Problems(
        evaluation.Place(str(tmp_path), str(rows), str(EXAMPLES / "refusion-tiny"), 32)
    )
    variant = {
        "refusion": "ReFusion 8/32",
        "refusion_options": "ReFusion 8/32, options",
        "llada": "LLaDA, stopped",
        "bd3lm": "BD3-LM",
        "dream": "Dream, stopped",
    }
    right = 0
    for number, prompt in enumerate(problems.prompts):
        name = variant.get(method, method)
        outcome = evaluation.decode_one(model, name, prompt, number, 32)
        right += problems.right(number, outcome.tokens)
    assert right >= 36, right
