"""Structured outputs for tests: of every kind, random JSON schemas, and what a grammar allows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SCHEMA = {
    "type": "object",
    "properties": {
        "number_of_apples": {"type": "integer", "minimum": 0, "maximum": 999},
        "why": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["fruit", "vegetable", None]},
    },
    "required": ["number_of_apples", "why", "kind"],
    "additionalProperties": False,
}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
}
KINDS: dict[str, dict[str, Any]] = {
    "json": {"json": SCHEMA},
    "json_object": {"json_object": True},
    "regex": {"regex": r"(The|A) (boy|girl) has [0-9]{1,3} apples\."},
    "choice": {"choice": ["yes", "no", "maybe not", "ja, natürlich"]},
    "grammar": {"grammar": 'root ::= "we say " ("a" | "b" | "cd")+ " and stop"'},
    "structural_tag": {"structural_tag": json.dumps(TAG)},
}


def random_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """An object whose text ends: strings and lists are bounded, all properties required."""
    words = ["name", "number_of_apples", "unit price", "answer", "is_it_true", "Wörter", "x"]
    names = draw.sample(words, draw.randint(1, 4))
    properties = {name: _random_value(draw, depth) for name in names}
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
    }


def _random_value(draw: random.Random, depth: int) -> dict[str, Any]:
    kind = draw.choice(["string", "integer", "boolean", "enum", "null", "array", "object", "any"])
    if depth == 0 and kind in ("array", "object", "any"):
        kind = "integer"
    if kind == "string":
        return {"type": "string", "maxLength": draw.randint(0, 12)}
    if kind == "integer":
        return {"type": "integer", "minimum": draw.randint(-20, 0), "maximum": draw.randint(1, 400)}
    if kind == "enum":
        return {"enum": draw.sample(["red", "dark red", 7, 77, True, None], 3)}
    if kind == "array":
        items = _random_value(draw, depth - 1)
        return {"type": "array", "items": items, "minItems": 0, "maxItems": draw.randint(1, 3)}
    if kind == "object":
        return random_schema(draw, depth - 1)
    if kind == "any":
        return {"anyOf": [_random_value(draw, 0), _random_value(draw, 0)]}
    return {"type": kind}


def allowed_by(
    model: Path, kind: str, vocab: int, stop_token_ids: list[int]
) -> Callable[[list[int]], torch.Tensor]:
    """What xgrammar allows behind a response, [V] bool, compiled apart from any engine.

    Behind the end of the grammar everything is.
    """
    import xgrammar
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab)
    compiler = xgrammar.GrammarCompiler(info)
    (value,) = KINDS[kind].values()
    if kind == "json":
        compiled = compiler.compile_json_schema(
            json.dumps(value), any_whitespace=False, separators=(",", ":")
        )
    elif kind == "regex":
        compiled = compiler.compile_regex(value)
    else:
        compiled = compiler.compile_grammar(value)

    def allowed(response: list[int]) -> torch.Tensor:
        matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=stop_token_ids)
        for token in response:
            if matcher.is_terminated():
                break
            assert matcher.accept_token(token), "the response is not of this grammar"
        if matcher.is_terminated():
            return torch.ones(vocab, dtype=torch.bool)
        words = xgrammar.allocate_token_bitmask(1, vocab)
        matcher.fill_next_token_bitmask(words, 0)
        bits = (words[0][:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        return bits.flatten()[:vocab].bool()

    return allowed
