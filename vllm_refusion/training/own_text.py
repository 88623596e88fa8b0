"""Training data on policy: the responses that the backbone itself writes, through vLLM."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vllm_refusion.files import damage, read_json, seal, writing
from vllm_refusion.rows import DataError, Row, check_texts, read_objects
from vllm_refusion.stock import responses
from vllm_refusion.training.collator import Example
from vllm_refusion.training.data import ABOUT, Encoder

ROWS = "rows.jsonl"


class OwnText(Encoder):
    """Rows of ``write_own_text``: their responses are the token ids that were written."""

    @classmethod
    def of(cls, encoder: Encoder) -> OwnText:
        return cls(**{field.name: getattr(encoder, field.name) for field in fields(Encoder)})

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        prompts = self.prompts([row.values["query"] for row in rows])
        return [
            Example(prompt, row.values["tokens"]) for prompt, row in zip(prompts, rows, strict=True)
        ]


def write_own_text(
    model: Path,
    model_fingerprint: str,
    encoder: Encoder,
    paths: Iterable[Path],
    folder: Path,
    asked: Mapping[str, Any],
) -> Path:
    """The file of rows in ``folder`` whose responses ``model`` wrote, made if it is not there.

    Rows need no ``response``. Those whose prompt leaves no room for one, or whose response has no
    text, are left out. A response that was cut off has no EOS.

    Args:
        asked: temperature, max_tokens of a response, max_length with its prompt, seed, dtype.

    Raises:
        DataError: a row is broken, or none is left.
        ValueError: vLLM failed.
    """
    rows = list(read_objects(paths))
    for row in rows:
        check_texts(row, ("query",))
    prompts = encoder.prompts([row.values["query"] for row in rows])
    digest = hashlib.sha256(json.dumps([model_fingerprint, dict(asked), prompts]).encode())
    key = digest.hexdigest()
    if not damage(folder, ABOUT) and read_json(folder / ABOUT).get("key") == key:
        return folder / ROWS
    limit = min(asked["max_length"], AutoConfig.from_pretrained(model).max_position_embeddings)
    kept = [(row, ids) for row, ids in zip(rows, prompts, strict=True) if len(ids) < limit]
    if not kept:
        raise DataError(f"no row whose prompt leaves room for a response in {limit} tokens")
    print(f"{len(kept)} of {len(rows)} prompts are answered by {model}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    written = _written(model, encoder, [ids for _, ids in kept], limit, folder, asked)
    with writing(folder / ROWS) as file:
        for (row, _), tokens in zip(kept, written, strict=True):
            text = encoder.tokenizer.decode(tokens, skip_special_tokens=True)
            if text.strip():
                values = {**row.values, "response": text, "tokens": tokens}
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
    seal(folder, ABOUT, key=key)
    return folder / ROWS


def _written(
    model: Path,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    limit: int,
    folder: Path,
    asked: Mapping[str, Any],
) -> list[list[int]]:
    """Token ids of the responses, from a process of its own."""
    tokens = [min(asked["max_tokens"], limit - len(ids)) for ids in prompts]
    what = {
        "model": str(model),
        "dtype": asked["dtype"],
        "prompts": prompts,
        "max_tokens": tokens,
        "max_model_len": max(len(ids) + n for ids, n in zip(prompts, tokens, strict=True)),
        "temperature": asked["temperature"],
        "seed": asked["seed"] % 2**32,
        "eos_token_id": encoder.tokenizer.eos_token_id,
    }
    try:
        return responses(what, folder)
    except ValueError as error:
        raise ValueError(f"--on-policy: {error}") from error
