"""Files that are whole or not there, and JSON that names its file where it is broken."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def writing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """``path`` opened to be written anew; it keeps what it held until all is on the disk.

    A device or pipe, which cannot be replaced, is written itself.

    Args:
        mode: "w" for UTF-8 text, "wb" for bytes.
    """
    encoding = None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file():
        with open(path, mode, encoding=encoding) as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # a link stays one
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """``path`` holds ``text``, in UTF-8, or what it held before."""
    with writing(path) as file:
        file.write(text)


def publish(part: Path, folder: Path) -> None:
    """Renames the folder ``part`` to ``folder`` once all that it holds is on the disk."""
    for path in _files(part):
        _digest(path)
    os.rename(part, folder)
    _sync_folder(folder.parent)


def seal(folder: Path, name: str, **about: Any) -> None:
    """Writes ``about`` and what every file of ``folder`` holds to its file ``name``, at last."""
    files = {
        str(path.relative_to(folder)): _digest(path)
        for path in _files(folder)
        if path != folder / name
    }
    write_text(folder / name, json.dumps({**about, "files": files}, indent=2) + "\n")


def damage(folder: Path, name: str) -> str | None:
    """What is wrong with a sealed folder: a file and its fault; None if it is whole."""
    try:
        files = read_json(folder / name)["files"].items()
    except ValueError as error:
        return str(error)
    except (TypeError, KeyError, AttributeError):
        return f"{folder / name} is no list of what the folder holds"
    for file, digest in files:
        if not (folder / file).is_file():
            return f"{folder / file} is missing"
        if _digest(folder / file) != digest:
            return f"{folder / file} is not what was written"
    return None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it has none, or one beyond what Python takes; says what, and where it can.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at {place}column {error.colno}") from error
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # integers of thousands of digits
        raise ValueError(f"not JSON that can be read: {error}") from error


def read_json(path: Path, advice: str = "") -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: there is none; names the file and ends with ``advice``.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = error.strerror or str(error)
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: {error}"
    except ValueError as error:
        problem = str(error)
    raise ValueError(f"{path}: {problem}{advice and ': '}{advice}")


def json_object(text: str) -> dict[str, Any]:
    """For argparse: an option whose value is a JSON object."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"allowed is a JSON object, not {type(value).__name__}")
    return value


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    """Of a file's content, which is on the disk then."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """A rename in it lasts; where folders can be opened."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
