"""The driver half of the stub: one class that Triton finds and never creates."""

import sys
from importlib import import_module

from triton.backends.driver import DriverBase

from vllm_refusion.triton_cpu_stub import real_cpu_backend, switch_interpreter_on_where_wanted

if real := real_cpu_backend():
    # Triton keeps one backend per name, whichever entry point comes last: be that one as well.
    sys.modules[__name__] = import_module(f"{real}.driver")
else:
    switch_interpreter_on_where_wanted()

    class StubDriver(DriverBase):
        """Never active, so that neither Triton nor vLLM counts it as a device."""

        @staticmethod
        def is_active() -> bool:
            return False

    # Triton fails to import when a backend leaves a method abstract, and what is abstract differs
    # between its releases; nothing calls them, so none is abstract here.
    StubDriver.__abstractmethods__ = frozenset()
