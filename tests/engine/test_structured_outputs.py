"""Structured outputs in serial mode: stock vLLM's answers, and the reference's."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import pytest
import torch
from device import ON_GPU
from grammars import KINDS, allowed_by, random_schema
from lora_requests import OPTIONS as LORA
from loras import write_lora
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from engine import assert_idle, engine, free_pages, model_state_of, scheduler_of
from vllm_refusion.decoding.draft_price import NOTHING_DRAFTED, DraftPrice
from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.reference import decode
from vllm_refusion.decoding.state import Counter

SERIAL = {"mode": "serial"}
BACKENDS = ("xgrammar", "guidance")
EOS = 0


@dataclass
class Ask:
    """A request: its text, what its answer is to follow, other parameters."""

    prompt: str
    follows: dict[str, Any] | None
    options: dict[str, Any] = field(default_factory=dict)

    def parameters(self, **more) -> SamplingParams:
        options = {"temperature": 0, "max_tokens": 60, "seed": 1} | self.options | more
        follows = self.follows and StructuredOutputsParams(**self.follows)
        return SamplingParams(structured_outputs=follows, **options)


@dataclass
class Answer:
    text: str
    tokens: list[int]
    reason: str | None
    logprobs: list[dict[int, float]] | None

    @classmethod
    def of(cls, output) -> Answer:
        logprobs = output.logprobs and [
            {token: e.logprob for token, e in entry.items() if e.logprob > -1e30}
            for entry in output.logprobs
        ]
        return cls(output.text, list(output.token_ids), output.finish_reason, logprobs)


def ask(llm, asked: list[Ask], lora=None, **more) -> list[list[Answer]]:
    """The answers to each, as many as its ``n``."""
    outputs = llm.generate(
        [f"<|user|>{one.prompt}<|assistant|>" for one in asked],
        [one.parameters(**more) for one in asked],
        lora_request=lora,
        use_tqdm=False,
    )
    return [
        [Answer.of(choice) for choice in sorted(output.outputs, key=lambda o: o.index)]
        for output in outputs
    ]


def options(backend: str = "xgrammar", **more) -> dict[str, Any]:
    config = {"backend": backend, "disable_any_whitespace": True}
    return {"skip_tokenizer_init": False, "structured_outputs_config": config} | more


@pytest.fixture(scope="module")
def examples(tiny_checkpoint):
    return tiny_checkpoint.parent


@pytest.fixture(scope="module")
def asked(questions) -> list[Ask]:
    """Each kind of structured output, with each kind of limit; neighbours without any."""
    kinds = list(KINDS.values())
    others: list[dict[str, Any]] = [
        {},
        {"logprobs": 2},
        {"max_tokens": 7},
        {"min_tokens": 3, "logprobs": 0},
        {"stop": ["a"]},
        {"ignore_eos": True, "max_tokens": 40},
        {"stop_token_ids": [5, 6, 7, 300]},
        {"logit_bias": {9: 3.0, 16: -2.0}},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.2},
    ]
    asks = [
        Ask(questions[i % 5], kind, others[(i + len(others) * j) % len(others)])
        for j in range(2)
        for i, kind in enumerate(kinds, 3 * j)
    ]
    asks += [Ask(questions[i], kinds[0], other) for i, other in enumerate(others)]
    return asks + [Ask(questions[i], None, {"logprobs": 1}) for i in range(4)]


def without(tokenizer, letters: str) -> list[int]:
    """Tokens that have none of the letters, and are not EOS."""
    texts = {token: tokenizer.decode([token]) for token in range(3, len(tokenizer))}
    return [token for token, text in texts.items() if not set(letters) & set(text)]


def contradictions(tokenizer) -> list[tuple[Ask, str, str]]:
    """Requests that limits leave nothing to pick for; their answers' pattern and end."""
    no_h = {"allowed_token_ids": without(tokenizer, "h")}
    sampled = {"temperature": 1.0, "n": 2, "seed": 3}
    choice, regex = KINDS["choice"], KINDS["regex"]
    words = "|".join(choice["choice"])
    a_child = "T|A (boy|girl) ?"  # The, has
    return [
        (Ask("Is it?", choice, {"min_tokens": 40}), words, "stop"),
        (Ask("Is it?", choice, {"min_tokens": 40, "logprobs": 2} | sampled), words, "stop"),
        (Ask("Is it?", {"choice": ["yes", "no"]}, no_h), "yes|no", "stop"),
        (Ask("Who?", regex, no_h), a_child, "abort"),
        (Ask("Who?", regex, no_h | sampled | {"logprobs": 1, "min_p": 0.1}), a_child, "abort"),
        (Ask("Who?", regex, {"allowed_token_ids": [0, 5], "prompt_logprobs": 0}), "", "abort"),
        (Ask("Who?", regex, {"allowed_token_ids": [0], "logprobs": 1}), "", "abort"),
    ]


@pytest.fixture(scope="module")
def stock(examples, asked):
    """Stock vLLM's answers by backend."""
    made = {}

    def answers(backend: str, asked=asked):
        key = backend, id(asked)
        if key not in made:
            with engine(examples / "stock-tiny", **options(backend)) as llm:
                made[key] = ask(llm, asked)
        return made[key]

    return answers


def assert_same(answers, expected, asked) -> None:
    for one, mine, theirs in zip(asked, answers, expected, strict=True):
        for got, wanted in zip(mine, theirs, strict=True):
            if wanted.reason == "error":  # nothing was left to pick
                assert (got.tokens, got.reason) == (wanted.tokens[:-1], "abort"), one
                continue
            assert (got.tokens, got.text) == (wanted.tokens, wanted.text), one
            assert got.reason == wanted.reason, one
            assert (got.logprobs is None) == (wanted.logprobs is None)
            for entry, stock in zip(got.logprobs or (), wanted.logprobs or (), strict=True):
                assert entry == pytest.approx(stock, abs=1e-3), one


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_of_stock_vllm(examples, asked, stock, tokenizer, backend):
    """Tokens, ends and log-probabilities; the neighbours' too. Drafts pass, forced ones as well.

    Stock vLLM answers nothing where limits leave nothing that a grammar allows.
    """
    nothing_left = contradictions(tokenizer)
    with engine(examples / "stock-tiny-adapter", **options(backend)) as llm:
        pages = free_pages(llm)
        answers = ask(llm, asked)
        counts = model_state_of(llm).decode_state.counters.tolist()
        beside = asked[-6:]
        ended = ask(llm, [*beside, *(one for one, _, _ in nothing_left)])
        assert_idle(llm, pages)
    assert_same(answers, stock(backend), asked)
    assert counts[Counter.SERIAL] < 0.8 * counts[Counter.TOKENS]
    assert_same(ended[:6], stock(backend)[-6:], beside)
    for (one, pattern, reason), choices in zip(nothing_left, ended[6:], strict=True):
        for answer in choices:
            assert re.fullmatch(pattern, answer.text), (one, answer)
            assert answer.reason == reason, (one, answer)
            assert EOS not in answer.tokens
            assert len(answer.logprobs or ()) == ("logprobs" in one.options) * len(answer.tokens)


def test_what_is_forced_is_fed_where_no_masks_are(examples, asked, stock, monkeypatch):
    """As in a full batch, where masks do not pay."""
    monkeypatch.setattr(DraftPrice, "choose", lambda *_: NOTHING_DRAFTED)
    with engine(examples / "stock-tiny-adapter", **options()) as llm:
        answers = ask(llm, asked)
        counts = model_state_of(llm).decode_state.counters.tolist()
    assert_same(answers, stock("xgrammar"), asked)
    assert counts[Counter.SERIAL] < 0.9 * counts[Counter.TOKENS]


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_text_that_begins_within_a_character(examples, questions, backend):
    """Whose first byte was picked before it was clear which one it is."""
    words = ["\u00e9t\u00e9", "\u00e8re", "\u00bf?", "\u20ac", "\u65e5\u672c", "\u2713"]
    asked = [
        Ask(one, {"choice": words}, {"temperature": 2.0, "seed": i})
        for i, one in enumerate(questions[:40])
    ]
    with engine(examples / "stock-tiny-adapter", **options(backend)) as llm:
        answers = ask(llm, asked)
    found = {answer.text for (answer,) in answers}
    assert found <= set(words) and len(found) > 2, found


def test_ahead_of_the_device_with_little_memory(
    examples, asked, stock, async_scheduling, preemptions
):
    """Steps are scheduled while others run; requests are preempted in mid-grammar."""
    small = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "max_model_len": 256}
    small |= {"diffusion_config": {"canvas_length": 32}}
    small |= {"num_gpu_blocks_override": 26, "block_size": 16}
    with engine(examples / "stock-tiny-adapter", **options(**small)) as llm:
        pages = free_pages(llm)
        assert_same(ask(llm, asked), stock("xgrammar"), asked)
        assert_idle(llm, pages)
    assert [tokens for _, tokens in preemptions if tokens]


def test_adapters_of_those_that_sit_out_keep_their_places(
    examples, asked, tmp_path, async_scheduling
):
    """Constrained requests, while their pass is in flight: no other adapter takes its place."""
    loras = [
        LoRARequest(
            f"lora{i}", i, str(write_lora(tmp_path / f"lora{i}", examples / "stock-tiny", i))
        )
        for i in (1, 2, 3)
    ]
    chosen = [loras[i % 3] for i in range(len(asked))]
    given = options(max_num_seqs=8, **LORA)
    found = []
    for places in (3, 1, 2):
        with engine(examples / "stock-tiny-adapter", max_loras=places, **given) as llm:
            found.append(ask(llm, asked, lora=chosen))
            assert_idle(llm, free_pages(llm))
    for answers in found[1:]:
        if not ON_GPU:  # in 16 bits near ties fall either way
            assert_same(answers, found[0], asked)


@pytest.mark.slow
def test_with_the_kernels(examples, asked, stock, async_scheduling, monkeypatch):
    """Triton's interpreter runs what a GPU would."""
    monkeypatch.setenv("VLLM_REFUSION_CPU_KERNELS", "interpreter")
    few = [0, 2, 4, -1]
    with engine(examples / "stock-tiny-adapter", **options()) as llm:
        answers = ask(llm, [asked[i] for i in few])
    assert_same(answers, [stock("xgrammar")[i] for i in few], [asked[i] for i in few])


@pytest.mark.parametrize("slot_size", [4, pytest.param(32, marks=pytest.mark.slow)])
def test_answers_of_the_reference(examples, questions, tokenizer, slot_size):
    """Where a slot's first token is picked in the row of a mask; greedy, and samples of each."""
    path = examples / "refusion-tiny"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "n": 2}
    kinds = ("json", "regex", "grammar")
    longer, no_h = {"min_tokens": 60}, {"allowed_token_ids": without(tokenizer, "h")}
    asked = [
        Ask(questions[i], KINDS[kind], more | {"extra_args": SERIAL | {"slot_size": slot_size}})
        for i, kind in enumerate(kinds)
        for more in ({}, sampled, longer, no_h | sampled)
    ]
    with engine(path, **options()) as llm:
        answers = ask(llm, asked)
    for one, choices in zip(asked, answers, strict=True):
        (kind,) = (kind for kind in kinds if KINDS[kind] == one.follows)
        for index, choice in enumerate(choices):
            expected = decode(
                model,
                tokenizer.encode(f"<|user|>{one.prompt}<|assistant|>"),
                DecodingParams(slot_size, slot_size, mode="serial"),
                mask_token_id=model.config.mask_token_id,
                eos_token_id=EOS,
                max_tokens=60,
                temperature=one.options.get("temperature", 0),
                top_p=one.options.get("top_p", 1.0),
                seed=one.options.get("seed", 1) + index,
                min_tokens=one.options.get("min_tokens", 0),
                allowed_token_ids=one.options.get("allowed_token_ids"),
                allowed=allowed_by(path, kind, model.config.vocab_size, [EOS]),
            )
            assert choice.tokens == expected.tokens, (kind, one.options)


def test_parallel_mode_refuses_it_and_others_go_on(examples, questions, tokenizer):
    """Requests in parallel mode beside constrained ones; a grammar that does not compile."""
    with engine(examples / "refusion-tiny", **options()) as llm:
        pages = free_pages(llm)
        for kind in KINDS.values():
            with pytest.raises(VLLMValidationError, match="structured_outputs=.*mode='serial'"):
                ask(llm, [Ask(questions[0], kind)])
        broken = [{"grammar": "root ::= nothing"}, {"regex": "(("}, {"json": {"type": "nothing"}}]
        for follows in broken:
            with pytest.raises(VLLMValidationError):
                ask(llm, [Ask(questions[0], follows, {"extra_args": SERIAL})])
        free = [Ask(questions[i], None) for i in range(3)]
        alone = ask(llm, free)
        constrained = [Ask(questions[i], KINDS["json"], {"extra_args": SERIAL}) for i in range(3)]
        assert ask(llm, [*free, *constrained])[:3] == alone
        assert_idle(llm, pages)


def test_aborted_in_mid_grammar(examples, questions):
    """Its pages and its state are free; the others' answers stay what they are."""
    asked = [Ask(questions[i], KINDS["json"]) for i in range(3)]
    with engine(examples / "stock-tiny-adapter", **options()) as llm:
        pages = free_pages(llm)
        expected = ask(llm, asked)
        llm_engine = llm.llm_engine
        for i, one in enumerate(asked):
            text = {"prompt": f"<|user|>{one.prompt}<|assistant|>"}
            prompt = llm.renderer.render_cmpl([text])[0]
            llm_engine.add_request(str(i), prompt, one.parameters())
        tokens, aborted = {}, False
        while llm_engine.has_unfinished_requests():
            if tokens.get("1") and not aborted:  # its grammar may take a while to compile
                llm_engine.abort_request(["1"])
                aborted = True
            for output in llm_engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        assert {i: tokens[i] for i in "02"} == {i: expected[int(i)][0].tokens for i in "02"}
        assert tokens["1"] == expected[1][0].tokens[: len(tokens["1"])] != expected[1][0].tokens
        assert_idle(llm, pages)


def test_neighbours_do_not_wait(examples, questions, async_scheduling):
    """Steps are scheduled while others run: a constrained request sits out every other one."""
    asked = [
        Ask(questions[0], None, {"max_tokens": 150, "ignore_eos": True}),
        Ask(questions[1], KINDS["json"]),
    ]
    steps: list[tuple[bool, bool]] = []  # whether each of the two decodes
    with engine(examples / "stock-tiny-adapter", **options()) as llm:
        expected = ask(llm, asked[:1]) + ask(llm, asked[1:])
        scheduler = scheduler_of(llm)
        schedule = scheduler.schedule

        def watched(*args, **kwargs):
            output = schedule(*args, **kwargs)
            assert not output.pending_structured_output_tokens, "vLLM would wait"
            decode = [
                scheduler.requests[name].use_structured_output
                for name in output.scheduled_spec_decode_tokens
            ]
            steps.append((False in decode, True in decode))
            return output

        scheduler.schedule = watched
        assert ask(llm, asked) == expected
    first = steps.index((True, True))
    last = max(i for i, (_, constrained) in enumerate(steps) if constrained)
    both = steps[first : last + 1]
    assert all(free for free, _ in both) and len(both) > 10
    assert [constrained for _, constrained in both] == [i % 2 == 0 for i in range(len(both))]


def schemas(count: int, questions) -> list[Ask]:
    draw = random.Random(count)
    return [
        Ask(draw.choice(questions), {"json": random_schema(draw)}, {"max_tokens": 250})
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_random_schemas(examples, questions, count):
    """Every answer is valid, and stock vLLM's; samples are valid."""
    asked = schemas(count, questions)
    with engine(examples / "stock-tiny", **options()) as llm:
        expected = ask(llm, asked)
    with engine(examples / "stock-tiny-adapter", **options()) as llm:
        answers = ask(llm, asked)
        samples = ask(llm, asked[: count // 3], temperature=1.0)
    assert_same(answers, expected, asked)
    for one, (answer,) in zip([*asked, *asked], [*answers, *samples]):
        assert answer.reason == "stop", (one, answer)
        jsonschema.validate(json.loads(answer.text), one.follows["json"])


def test_reasoning_comes_before_the_grammar(examples, questions, tmp_path):
    """The grammar begins behind the token that ends the reasoning, wherever in a pass that is."""
    base = tmp_path / "base"
    shutil.copytree(examples / "stock-tiny", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(base)
    end = tokenizer.convert_tokens_to_ids("</think>")
    config = {"backend": "xgrammar", "disable_any_whitespace": True}
    config |= {"reasoning_parser": "deepseek_r1"}
    asked = [
        Ask(questions[i % 4], follows, {"logit_bias": {end: bias}, "logprobs": 1})
        for bias in (17.0, 18.0, 19.0, 20.0, 21.0)
        for i, follows in enumerate(KINDS.values())
    ]
    given = {"skip_tokenizer_init": False, "structured_outputs_config": config}
    with engine(base, **given) as llm:
        expected = ask(llm, asked)
    adapter = {"refusion_adapter": str(examples / "stock-tiny-adapter")}
    with engine(base, additional_config=adapter, **given) as llm:
        assert_same(ask(llm, asked), expected, asked)
    ends = [answer.tokens.index(end) for (answer,) in expected if end in answer.tokens]
    assert len(set(ends)) > 3, ends


@pytest.mark.parametrize("first", ["xgrammar", "guidance"])
def test_grammars_of_an_engine_have_one_backend(examples, first):
    """Which the first one chooses where the server names none: what it takes works on."""
    digits = Ask("How many?", {"regex": "[0-9]{3}"})  # either takes them
    multiples = Ask("How many?", {"json": {"type": "integer", "multipleOf": 3}})  # guidance does
    both = (digits, multiples) if first == "xgrammar" else (multiples, digits)
    with engine(examples / "refusion-tiny", skip_tokenizer_init=False, max_num_seqs=4) as llm:
        ((answer,),) = ask(llm, both[:1], extra_args=SERIAL)
        if first == "xgrammar":
            with pytest.raises(VLLMValidationError, match="not supported by xgrammar"):
                ask(llm, both[1:], extra_args=SERIAL)
        else:
            ((other,),) = ask(llm, both[1:], extra_args=SERIAL)
            assert re.fullmatch("[0-9]{3}", other.text)
        assert ask(llm, both[:1], extra_args=SERIAL) == [[answer]]
