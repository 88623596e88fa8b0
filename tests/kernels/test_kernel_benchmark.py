"""The kernels' benchmark: each of its calls fits the kernel it times."""

from __future__ import annotations

import pytest
from device import DEVICE

from vllm_refusion.triton_kernels import benchmark


@pytest.mark.parametrize("operation", benchmark.BENCHMARKS)
def test_calls_run(monkeypatch, operation):
    def time_calls(calls):
        calls[0]()
        return 2.0

    small = {"VOCAB": 300, "GRAPH_BYTES": 1, "TABLE_ENTRIES": 256, "WRITE_ROWS": (3, 40)}
    small |= {"DEVICE": DEVICE, "STATS_ROWS": (1, 5), "time_calls": time_calls}
    small["ATTENTION_SHAPES"] = [benchmark.Shape(2, 70, 5), benchmark.Shape(1, 0, 9, page=16)]
    small |= {"LINEARS": {"qkv": (40, (24, 9, 9)), "o": (24, (40,))}, "MASKS": ((0, 3), (2, 5))}
    small["flash_attention_3_is_installed"] = lambda: False
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    lines = benchmark.BENCHMARKS[operation](benchmark.Ceilings(1e12, 1e15))
    assert len({line.shape for line in lines}) == len(lines) >= 2
    for line in lines:
        assert benchmark.as_text(line).startswith(f"{operation} {line.shape}")
        assert line.gb_per_s > 0 and 0 < line.roofline_share
