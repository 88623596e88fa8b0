"""``vllm-refusion doctor`` on this machine, and in environments that are broken."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import vllm

from vllm_refusion import doctor, triton_cpu_stub
from vllm_refusion.bench import environment
from vllm_refusion.cli import main

GOOD = doctor.Check("answer", True, "five tokens")


def report(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    return ended.value.code, capsys.readouterr().out


@pytest.fixture
def quick(monkeypatch):
    """Without the engine."""
    monkeypatch.setattr(doctor, "answer", lambda model: GOOD)
    monkeypatch.setattr(doctor, "folder", lambda: doctor.Check("folder", True, "hides none"))


def test_a_good_machine(quick, capsys):
    code, text = report(capsys)
    assert code == 0 and text.splitlines()[-1] == "ok   answer: five tokens"
    assert all(line.startswith("ok   ") for line in text.splitlines())


def test_an_engine_answers_like_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check = doctor.answer(None)
    assert check.ok, check
    assert "5 tokens of a tiny random model" in check.found


def no_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)


def old_vllm(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.31.1")


def gpu_build(monkeypatch, driver=None):
    monkeypatch.setattr(triton_cpu_stub, "vllm_is_cpu_build", lambda: False)
    monkeypatch.setattr(environment, "nvidia_smi", lambda query: driver)


def torch_for_cpus(monkeypatch):
    gpu_build(monkeypatch)
    fake_torch(monkeypatch, None, available=False)


def fake_torch(monkeypatch, cuda, available):
    torch = SimpleNamespace(
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: available,
            mem_get_info=lambda: (60 * 2**30, 80 * 2**30),
            device_count=lambda: 2,
            get_device_name=lambda: "Some GPU",
        ),
    )
    imported = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name: torch if name == "torch" else imported(name)
    )


def no_driver(monkeypatch):
    gpu_build(monkeypatch)
    fake_torch(monkeypatch, "13.0", available=False)


def old_driver(monkeypatch):
    gpu_build(monkeypatch, "470.1\n470.1")
    fake_torch(monkeypatch, "13.0", available=False)


def broken_torch(monkeypatch):
    imported = importlib.import_module

    def broken(name):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", broken)


def not_installed(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [])


def kept_out(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")


def old_runner(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")


@pytest.mark.parametrize(
    "broken, line, advice",
    [
        (
            no_vllm,
            "bad  vllm: vllm-refusion needs vLLM 0.32 or 0.33, found none",
            "pip install 'vllm",
        ),
        (old_vllm, "bad  vllm: vllm-refusion needs vLLM 0.32 or 0.33, found 0.31.1", "pip inst"),
        (torch_for_cpus, "built for the CPU\n", "pip install --force-reinstall"),
        (broken_torch, "bad  torch: OSError: libcudart.so.13", "Install it anew"),
        (no_driver, "bad  gpu: PyTorch sees none; no NVIDIA driver found", "docker run --gpus"),
        (old_driver, "bad  gpu: PyTorch sees none; driver 470.1\n", "Upgrade the driver"),
        (not_installed, "bad  plugin: the entry point vllm.general_plugins is missing", "pip inst"),
        (kept_out, "bad  plugin: VLLM_PLUGINS=other keeps it out", "add refusion"),
        (old_runner, "bad  variables: VLLM_USE_V2_MODEL_RUNNER=0", "Unset it"),
    ],
)
def test_what_is_broken_is_named_with_advice(quick, monkeypatch, capsys, broken, line, advice):
    broken(monkeypatch)
    code, text = report(capsys)
    assert code == 1 and line in text and advice in text
    assert "answer" not in text  # an engine would only fail later


def test_a_gpu_is_shown(quick, monkeypatch, capsys):
    gpu_build(monkeypatch, "580.2\n580.2")
    fake_torch(monkeypatch, "13.0", available=True)
    code, text = report(capsys)
    assert code == 0
    assert "ok   gpu: 2 x Some GPU, 60 of 80 GiB free; driver 580.2\n" in text


def test_a_folder_that_hides_a_package(monkeypatch, tmp_path):
    package = tmp_path / "triton_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor.folder()
    assert not check.ok and "hides vLLM's package" in check.found and "python -P" in check.advice


@pytest.mark.parametrize(
    "stdout, stderr, code, found",
    [
        ('{"ok": false, "found": "m is no ReFusion model", "advice": "x"}', "", 0, "m is no ReFu"),
        ("", "noise\nRuntimeError: CUDA out of memory\nmore", 1, "status 1: RuntimeError: CUDA"),
        ("", "", -9, "exit status -9: no message"),
        ("{", "ValueError: cut off", 1, "ValueError: cut off"),
    ],
)
def test_an_engine_that_fails(monkeypatch, stdout, stderr, code, found):
    ended = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    check = doctor.answer("m")
    assert not check.ok and found in check.found and check.advice


def test_an_engine_that_hangs(monkeypatch):
    def hangs(*_, **__):
        raise subprocess.TimeoutExpired("x", 1)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert "none within" in doctor.answer(None).found


def test_a_model_that_is_not_there():
    check = doctor.answer(os.devnull + "/no-such-model")
    assert not check.ok and "no-such-model" in str(check)
