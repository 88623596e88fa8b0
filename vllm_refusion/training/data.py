"""Training data: (query, response) pairs from JSON, JSONL or gz, tokenised once into a file."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vllm_refusion.training.collator import Example

KEYS = ("query", "response")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SHOWN = 5  # places that a report names
AT_ONCE = 1024  # rows tokenised together


class DataError(ValueError):
    """Data that cannot be trained on; the message starts with file and line."""


class Row(NamedTuple):
    """A row of a data file and where it is: ``file:line``."""

    place: str
    values: dict[str, Any]


def read_rows(paths: Iterable[str | Path]) -> Iterator[Row]:
    """The rows of data files in order, a line at a time; a .json file, an array, is read whole.

    Raises:
        DataError: a file or row is broken, lacks a key or holds something else than text.
    """
    for path in map(Path, paths):
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: allowed are files ending in {', '.join(SUFFIXES)}")
        array = path.name.removesuffix(".gz").endswith(".json")
        for line, value in (_array if array else _lines)(path):
            place = f"{path}:{line}"
            yield Row(place, _checked(place, value))


def _raw_lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: truncated or damaged gz file: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _raw_lines(path):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not JSON: {error.msg} at column {error.colno}"
            ) from error


def _array(path: Path) -> Iterator[tuple[int, Any]]:
    text = "".join(line for _, line in _raw_lines(path))
    decode, at, line, counted = json.JSONDecoder().raw_decode, 0, 1, 0

    def expect(allowed: str) -> str:
        nonlocal at, line, counted
        while at < len(text) and text[at].isspace():
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if at == len(text) or (allowed and text[at] not in allowed):
            found = repr(text[at]) if at < len(text) else "the end of the file"
            wanted = " or ".join(map(repr, allowed)) or "a row"
            raise DataError(f"{path}:{line}: not a JSON array of rows: {found}, not {wanted}")
        at += bool(allowed)
        return text[at - 1]

    expect("[")
    separator = ","
    while separator == ",":
        expect("")
        if text[at] == "]" and text[:at].rstrip().endswith("["):
            return
        try:
            value, end = decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
            ) from error
        yield line, value
        at = end
        separator = expect(",]")


def _checked(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row must be an object, not {type(value).__name__}")
    if missing := [key for key in KEYS if key not in value]:
        raise DataError(f"{place}: no {' and no '.join(missing)}; its keys are {', '.join(value)}")
    for key in KEYS:
        if not isinstance(value[key], str):
            raise DataError(f"{place}: {key} must be text, not {type(value[key]).__name__}")
    if not value["response"].strip():
        raise DataError(f"{place}: empty response")
    return value


@dataclass(frozen=True)
class Encoder:
    """Turns rows into token ids: the chat template's prompt, then response and EOS.

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
        return self._tokenised([self._prompt_text(query)])[0]

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
        """Raises DataError if a text contains the mask token."""
        prompts = self._tokenised([self._prompt_text(row.values["query"]) for row in rows])
        responses = self._tokenised([row.values["response"] for row in rows])
        eos, mask = self.tokenizer.eos_token_id, self.mask_token_id
        for row, prompt, response in zip(rows, prompts, responses, strict=True):
            if mask is not None and (mask in prompt or mask in response):
                raise DataError(f"{row.place}: the text contains the mask token")
        return [Example(p, [*r, eos]) for p, r in zip(prompts, responses, strict=True)]

    def _tokenised(self, texts: list[str]) -> list[list[int]]:
        """Many at once: tokenizers spread them over the processor's cores."""
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)[
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
        self._tokens = np.memmap(folder / "tokens.bin", np.int32, "r")
        self._bounds = np.load(folder / "bounds.npy")  # [examples, 3]: start, response, end
        self.lengths: list[int] = (self._bounds[:, 2] - self._bounds[:, 0]).tolist()
        self.fingerprint: str = json.loads((folder / "about.json").read_text())["fingerprint"]

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
    try:
        about = json.loads((folder / "about.json").read_text())
    except FileNotFoundError:
        return None
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
    (folder / "about.json").unlink(missing_ok=True)  # written last: what it describes is complete
    place = None
    with open(folder / "tokens.bin", "wb") as file:
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
    np.save(folder / "bounds.npy", np.array(bounds, np.int64))
    about = {"fingerprint": digest.hexdigest(), "report": str(report), "key": key}
    (folder / "about.json").write_text(json.dumps(about, indent=2))
    return report
