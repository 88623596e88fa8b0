"""Files are whole or as before, and JSON that is broken names its file."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

import vllm_refusion
from vllm_refusion import files

PACKAGE = Path(vllm_refusion.__file__).parent
# Logs that grow line by line, and are read so: run and file by function.
APPENDED = {"LogFiles.on_log", "ReFusionTrainer._decode", "_measure", "run_servers", "run_side"}


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write_text(path, "before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "after")
    with pytest.raises(KeyboardInterrupt), files.writing(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a"]


def test_links_and_devices_are_written_themselves(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    files.write_text(link, "text")
    assert link.is_symlink() and target.read_text() == "text"
    files.write_text(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()


def _writers(tree: ast.AST, inside: str = "") -> list[str]:
    """Functions that open files for writing by other means than ``files``."""
    found = []
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name = f"{inside}.{node.name}".strip(".")
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            opens = called == "open" and any(m in ("w", "wb", "a", "x") for m in modes)
            if (
                opens
                or called in ("write_text", "write_bytes")
                and isinstance(node.func, ast.Attribute)
            ):
                found.append(name)
        found += _writers(node, name)
    return found


def test_everything_is_written_whole():
    """Of a new file that is not, this test asks why."""
    writers = set()
    for folder in ("training", "bench", "viewer"):
        for path in (PACKAGE / folder).glob("*.py"):
            writers |= set(_writers(ast.parse(path.read_text())))
    assert writers == APPENDED


@pytest.mark.parametrize(
    "content, problem",
    [
        (None, "No such file"),
        (b"", "not JSON: Expecting value at column 1"),
        (b'{"a": [1,\n', "not JSON: Expecting value at line 2, column 1"),
        (b"\xff{}", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON: Unexpected UTF-8 BOM"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "Exceeds the limit"),
    ],
)
def test_broken_json_names_its_file(tmp_path, content, problem):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        files.read_json(path, "write it again")
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.endswith(": write it again")
    assert problem in message


def test_a_seal_shows_every_damage(tmp_path):
    (tmp_path / "sub").mkdir()
    held = {tmp_path / "a": b"one", tmp_path / "sub/b": b"", tmp_path / "c": b"\0" * 100}
    for path, content in held.items():
        path.write_bytes(content)
    files.seal(tmp_path, "seal.json", more=1)
    assert files.damage(tmp_path, "seal.json") is None
    assert files.read_json(tmp_path / "seal.json")["more"] == 1
    for path, content in held.items():
        path.write_bytes(content[:-1] or b"more")
        assert str(path) in files.damage(tmp_path, "seal.json")
        path.unlink()
        assert files.damage(tmp_path, "seal.json") == f"{path} is missing"
        path.write_bytes(content)
    for content in ("", "[]", "{}", '{"files": 3}'):
        (tmp_path / "seal.json").write_text(content)
        assert files.damage(tmp_path, "seal.json")
