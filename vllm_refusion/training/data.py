"""Training data: (query, response) pairs from JSON, JSONL or gz, tokenised once into a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from vllm_refusion.files import damage, read_json, seal, writing
from vllm_refusion.rows import DataError, Row, check_texts, read_objects
from vllm_refusion.training.collator import Example

KEYS = ("query", "response")
ABOUT = "about.json"
SHOWN = 5  # places that a report names
AT_ONCE = 1024  # rows tokenised together


def read_rows(paths: Iterable[str | Path]) -> Iterator[Row]:
    """The rows of data files in order, see ``read_objects``.

    Raises:
        DataError: a file or row is broken, lacks a key or holds something else than text.
    """
    for row in read_objects(paths):
        check_texts(row, KEYS)
        if not row.values["response"].strip():
            raise DataError(f"{row.place}: empty response")
        yield row


@dataclass(frozen=True)
class Encoder:
    """Turns rows into token ids: the chat template's prompt, then response and EOS.

    As the server does it: a chat template writes the special tokens that it wants, a plain prompt
    gets those that the tokenizer adds (BOS, for one).

    Attributes:
        template_options: given to the chat template, e.g. ``{"enable_thinking": False}``.
        plain: the query itself is the prompt; for tokenizers without a chat template.

    Raises:
        ValueError: the tokenizer lacks EOS or a chat template.
    """

    tokenizer: Any
    mask_token_id: int | None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, which ends every response")
        if not self.plain and not self.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: add one to it, or take the query itself as "
                "the prompt with --plain-prompt"
            )

    def prompt(self, query: str) -> list[int]:
        return self.prompts([query])[0]

    def prompts(self, queries: Iterable[str]) -> list[list[int]]:
        return self._tokenised([self._prompt_text(query) for query in queries], self.plain)

    def _prompt_text(self, query: str) -> str:
        if self.plain:
            return query
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": query}],
            add_generation_prompt=True,
            tokenize=False,
            **self.template_options,
        )

    def key(self, paths: Iterable[Path], max_length: int) -> str:
        """Of all that the token ids follow from, so that they need not be made again."""
        digest = hashlib.sha256()
        for path in paths:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        tokenizer = self.tokenizer
        words = getattr(tokenizer, "backend_tokenizer", None)
        parts = [words.to_str() if words else repr(sorted(tokenizer.get_vocab().items()))]
        parts += [tokenizer.chat_template, dict(self.template_options), self.plain, max_length]
        digest.update(json.dumps([*parts, tokenizer.eos_token_id], sort_keys=True).encode())
        return digest.hexdigest()

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Raises DataError if a text cannot be the prompt or the response; says which and why."""
        prompts = self._tokenised([self._row_prompt(row) for row in rows], self.plain)
        responses = self._tokenised([row.values["response"] for row in rows])
        eos, mask = self.tokenizer.eos_token_id, self.mask_token_id
        examples = []
        for row, prompt, response in zip(rows, prompts, responses, strict=True):
            if mask is not None and (mask in prompt or mask in response):
                raise DataError(f"{row.place}: the text contains the mask token")
            while response and response[-1] == eos:
                response.pop()
            if not response:
                raise DataError(f"{row.place}: empty response")
            if eos in response:
                raise DataError(
                    f"{row.place}: the response goes on behind {self.tokenizer.eos_token}, which "
                    "ends every response"
                )
            examples.append(Example(prompt, [*response, eos]))
        return examples

    def _row_prompt(self, row: Row) -> str:
        try:
            return self._prompt_text(row.values["query"])
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{row.place}: the chat template fails: {error}") from error

    def _tokenised(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Many at once: tokenizers spread them over the processor's cores."""
        return self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False)[
            "input_ids"
        ]


@dataclass
class Report:
    """What became of the rows.

    Attributes:
        too_long: place and tokens of rows left out.
    """

    max_length: int
    kept: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    too_long: list[tuple[str, int]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.kept} examples, {self.prompt_tokens} prompt and {self.response_tokens} "
            "response tokens"
        ]
        if self.too_long:
            longest = max(tokens for _, tokens in self.too_long)
            lines.append(
                f"{len(self.too_long)} rows left out, of more than {self.max_length} tokens (up to "
                f"{longest}):"
            )
            lines += [f"  {place}: {tokens} tokens" for place, tokens in self.too_long[:SHOWN]]
            if len(self.too_long) > SHOWN:
                lines.append(f"  and {len(self.too_long) - SHOWN} more")
        return "\n".join(lines)


class TokenStore:
    """Examples in a folder as token ids, mapped into memory: ``store[i]`` reads example i.

    ``fingerprint`` tells whether two stores hold the same examples in the same order.
    """

    def __init__(self, folder: Path) -> None:
        about = read_json(folder / ABOUT, "tokenise the data again")
        self._tokens = np.memmap(folder / "tokens.bin", np.int32, "r")
        self._bounds = np.load(folder / "bounds.npy")  # [examples, 3]: start, response, end
        self.lengths: list[int] = (self._bounds[:, 2] - self._bounds[:, 0]).tolist()
        self.fingerprint: str = about["fingerprint"]

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> Example:
        start, response, end = self._bounds[index]
        return Example(self._tokens[start:response].tolist(), self._tokens[response:end].tolist())


def _encoded(rows: Iterable[Row], encoder: Encoder) -> Iterator[tuple[Row, Example]]:
    rows = iter(rows)
    while part := list(islice(rows, AT_ONCE)):
        yield from zip(part, encoder.encode(part), strict=True)


def stored(folder: Path, key: str) -> str | None:
    """The report of the store that ``folder`` holds under ``key``; None if it holds no such."""
    if damage(folder, ABOUT):
        return None
    about = read_json(folder / ABOUT)
    return about["report"] if about.get("key") == key else None


def write_store(
    rows: Iterable[Row],
    encoder: Encoder,
    folder: Path,
    max_length: int,
    progress: Callable[[Iterable[Row]], Iterable[Row]] = iter,
    key: str | None = None,
) -> Report:
    """Tokenises rows, ``AT_ONCE`` at a time, into ``folder``; leaves out long ones.

    Raises:
        DataError: a row is broken, or none is left.
    """
    report, digest = Report(max_length), hashlib.sha256()
    bounds, end = [], 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)  # written last: what it describes is complete
    place = None
    with writing(folder / "tokens.bin", "wb") as file:
        for row, example in _encoded(progress(rows), encoder):
            place = row.place
            length = len(example.prompt) + len(example.response)
            if length > max_length:
                report.too_long.append((row.place, length))
                continue
            content = np.array([*example.prompt, *example.response], np.int32).tobytes()
            file.write(content)
            digest.update(len(example.prompt).to_bytes(4, "little") + content)
            bounds.append((end, end + len(example.prompt), end + length))
            end += length
            report.kept += 1
            report.prompt_tokens += len(example.prompt)
            report.response_tokens += len(example.response)
    if place is None:
        raise DataError("the data files hold no rows")
    if not bounds:
        raise DataError(f"no row is left\n{report}")
    digest.update(np.array(bounds, np.int64).tobytes())
    with writing(folder / "bounds.npy", "wb") as file:
        np.save(file, np.array(bounds, np.int64))
    seal(folder, ABOUT, fingerprint=digest.hexdigest(), report=str(report), key=key)
    return report
