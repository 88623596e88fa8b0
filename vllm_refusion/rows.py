"""Rows of data files: JSON objects from .jsonl, .json or gz; what is broken has file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_refusion.files import parse_json

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


class DataError(ValueError):
    """Data that cannot be used; the message starts with file and line."""


class Row(NamedTuple):
    """A row of a data file and where it is: ``file:line``."""

    place: str
    values: dict[str, Any]


def read_objects(paths: Iterable[str | Path]) -> Iterator[Row]:
    """The rows of data files in order, a line at a time; a .json file, an array, is read whole.

    Raises:
        DataError: a file or row is broken.
    """
    for path in map(Path, paths):
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: allowed are files ending in {', '.join(SUFFIXES)}")
        array = path.name.removesuffix(".gz").endswith(".json")
        for line, value in (_array if array else _lines)(path):
            place = f"{path}:{line}"
            if not isinstance(value, dict):
                raise DataError(f"{place}: a row must be an object, not {type(value).__name__}")
            yield Row(place, value)


def check_texts(row: Row, keys: Sequence[str]) -> None:
    """Raises DataError if ``row`` lacks one of ``keys`` or has something else than text there."""
    place, values = row
    if missing := [key for key in keys if key not in values]:
        found = f"its keys are {', '.join(map(_shown, values))}" if values else "it is empty"
        raise DataError(f"{place}: no {' and no '.join(missing)}; {found}")
    for key in keys:
        if not isinstance(values[key], str):
            raise DataError(f"{place}: {key} must be text, not {type(values[key]).__name__}")
        try:
            values[key].encode()
        except UnicodeEncodeError as error:
            half = ascii(values[key][error.start])[1:-1]
            raise DataError(
                f"{place}: {key} has {half}, half of a character, at character {error.start}"
            ) from error


def _shown(key: str) -> str:
    return key.encode(errors="backslashreplace").decode()


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
            yield number, parse_json(line.rstrip("\r\n"))
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from error


def _array(path: Path) -> Iterator[tuple[int, Any]]:
    text = "".join(line for _, line in _raw_lines(path))
    decode, at, line, counted = json.JSONDecoder().raw_decode, 0, 1, 0

    def found() -> str:
        """What is next, behind white space; nothing at the end."""
        nonlocal at, line, counted
        while at < len(text) and text[at].isspace():
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        return text[at : at + 1]

    def expect(allowed: str) -> str:
        nonlocal at
        if not (sign := found()) or (allowed and sign not in allowed):
            wanted = " or ".join(map(repr, allowed)) or "a row"
            shown = repr(sign) if sign else "the end of the file"
            raise DataError(f"{path}:{line}: not a JSON array of rows: {shown}, not {wanted}")
        at += bool(allowed)
        return sign

    expect("[")
    separator = "]" if found() == "]" else ","
    at += separator == "]"
    while separator == ",":
        expect("")
        try:
            value, end = decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
            ) from error
        except (RecursionError, ValueError) as error:
            problem = "nested too deeply" if isinstance(error, RecursionError) else error
            raise DataError(f"{path}:{line}: not JSON that can be read: {problem}") from error
        yield line, value
        at = end
        separator = expect(",]")
    if sign := found():
        raise DataError(f"{path}:{line}: not a JSON array of rows: {sign!r} behind its end")
