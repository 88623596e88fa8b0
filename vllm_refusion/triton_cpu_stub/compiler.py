"""The compiler half of the stub: one class that Triton finds and never creates."""

import sys
from importlib import import_module

from triton.backends.compiler import BaseBackend

from vllm_refusion.triton_cpu_stub import real_cpu_backend

if real := real_cpu_backend():
    # As in driver.py: the two halves of a backend must belong together.
    sys.modules[__name__] = import_module(f"{real}.compiler")
else:

    class StubCompiler(BaseBackend):
        """Compiles for no target."""

        @staticmethod
        def supports_target(target: object) -> bool:
            return False

    StubCompiler.__abstractmethods__ = frozenset()  # as in driver.py
