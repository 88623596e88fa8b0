"""Compile-time constants of kernels, as module globals."""

from __future__ import annotations

from typing import Any

import triton.language as tl


class Constant(tl.constexpr):
    """A ``constexpr`` that costs nothing to compare with itself.

    At each launch Triton compares what a kernel reads from its module with what it was when it was
    compiled: 63 values of serial decoding's, 157 of the parallel one's, half a microsecond each.
    """

    def __ne__(self, other: Any) -> Any:
        return other is not self and super().__ne__(other)
