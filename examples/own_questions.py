"""Questions that a chat model asks itself: prompts for ``train --on-policy`` where there are none.

They are what the model writes as the user's turn of its chat template, drawn by stock vLLM; those
that end are kept, each once.

python examples/own_questions.py MODEL -o questions
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_refusion.files import write_text
from vllm_refusion.stock import responses

LENGTHS = range(15, 401)  # of a question, in characters
MAX_TOKENS = 128
HELD_OUT = 200  # or a quarter, where there are few


def special_ids(tokenizer: Any) -> set[int]:
    return {token for token, about in tokenizer.added_tokens_decoder.items() if about.special}


def user_turn(tokenizer: Any) -> tuple[list[int], int]:
    """Token ids that open the user's turn, and the one that ends it.

    Raises:
        ValueError: the tokenizer has no chat template with such an end.
    """
    marker = "\u241f"
    chat = [{"role": "user", "content": marker}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(marker)
    opening, closing = (
        tokenizer.encode(part, add_special_tokens=False) for part in (before, after)
    )
    if not found or not opening or closing[:1] == [] or closing[0] not in special_ids(tokenizer):
        raise ValueError("the chat template has no user's turn between special tokens")
    return opening, closing[0]


def questions(tokenizer: Any, written: Iterable[list[int]], end: int) -> list[str]:
    """Of the turns that were written, in token ids, those that end, of some length."""
    turns = (ids[:-1] for ids in written if ids and ids[-1] == end)
    special = special_ids(tokenizer)
    plain = (ids for ids in turns if not special & set(ids))
    texts = (tokenizer.decode(ids).strip() for ids in plain)
    return list(dict.fromkeys(text for text in texts if len(text) in LENGTHS))


def draw(model: str, count: int, temperature: float, seed: int, dtype: str) -> list[str]:
    """The questions among ``count`` turns. Raises ValueError if vLLM fails."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    opening, end = user_turn(tokenizer)
    asked = {
        "model": model,
        "dtype": dtype,
        "prompts": [opening] * count,
        "max_tokens": [MAX_TOKENS] * count,
        "max_model_len": len(opening) + MAX_TOKENS,
        "temperature": temperature,
        "seed": seed,
        "eos_token_id": end,
    }
    return questions(tokenizer, responses(asked), end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or name on the hub of a chat model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--count", type=int, default=16_000, help="turns that are drawn")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    args = parser.parse_args()

    args.output.mkdir(parents=True)
    texts = draw(args.model, args.count, args.temperature, args.seed, args.dtype)
    held = min(HELD_OUT, len(texts) // 4)
    for name, part in (("train", texts[held:]), ("dev", texts[:held])):
        lines = [json.dumps({"query": text}, ensure_ascii=False) + "\n" for text in part]
        write_text(args.output / f"{name}.jsonl", "".join(lines))
    print(f"{len(texts)} questions of {args.count} turns, {held} of them held out", file=sys.stderr)


if __name__ == "__main__":
    main()
