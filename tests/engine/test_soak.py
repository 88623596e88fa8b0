"""What the soak driver makes of its readings; and that it finds leaks in a server that has some."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import soak
from soak import Reading, growth, leaks, memory_figures, tokens_per_forward

MB = 2**20


def readings(worker_mb, objects=(0,) * 9, held=None):
    sizes = zip((size * MB for size in worker_mb), objects, strict=True)
    return [
        Reading(100 * i, {"server": 600 * MB, "worker": size, "objects": count}, held or {})
        for i, (size, count) in enumerate(sizes)
    ]


def test_growth():
    assert growth([1, 2, 3, 4]) == 1
    assert growth([5, 5, 5, 90, 90]) == 0, "one step is none"
    assert growth([5, 4, 6, 5, 6]) <= 1


def test_a_leak_is_growth_that_goes_on():
    flat = [500, 700, 790, 800, 801, 799, 802, 800, 800]
    assert leaks(readings(flat)) == []
    assert leaks(readings(flat[:4], objects=[0] * 4)) == []  # too few to tell
    assert leaks(readings([*flat[:6], *(size + 90 for size in flat[6:])])) == []
    leaking = [size + 6 * i for i, size in enumerate(flat)]
    (found,) = leaks(readings(leaking))
    assert found.startswith("worker grows by")
    assert memory_figures(readings(leaking))["grown_per_1000_requests"]["worker"] == 60
    (found,) = leaks(readings(flat, objects=[700_000 + 150 * i for i in range(9)]))
    assert found == "objects grows by 150 a window"


def test_what_is_kept_of_requests_is_a_leak():
    assert leaks(readings([800] * 9, held={"slots": 0, "records": 2})) == ["2 records left"]


def test_tokens_per_forward_counts_decoding_passes():
    kinds = {"plan": 2, "verify": 3, "predict": 1, "infill_verify": 4, "replay": 50, "idle": 60}
    counted = {f"vllm:refusion_passes_total {kind}": count for kind, count in kinds.items()}
    assert tokens_per_forward(counted | {"vllm:refusion_tokens_total": 75.0}) == 7.5


# Planted in all processes of the server: a plugin of vLLM that runs after ours.
LEAKY = """
import torch
from vllm_refusion.engine.model_state import ReFusionModelState

kept, removed = [], ReFusionModelState.remove_request

def remove_request(self, req_id):
    kept.append({leak})
    removed(self, req_id)

def plant():
    ReFusionModelState.remove_request = remove_request
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leak", "found"),
    [
        ("None", None),
        ("[[], [], []]", "objects grows"),
        ("torch.full((200_000,), 1.0)", "VLLM::"),
    ],
    ids=["none", "objects", "memory"],
)
def test_finds_a_planted_leak(tmp_path, leak, found):
    (tmp_path / "leaky.py").write_text(LEAKY.replace("{leak}", leak))
    info = tmp_path / "leaky-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: leaky\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nzz_leaky = leaky:plant\n")
    output = tmp_path / "figures.json"
    options = ["--minutes", "1", "--requests", "6", "--clients", "6", "--output", str(output)]
    of_server = ["--enforce-eager", "--max-num-batched-tokens", "1024"]
    result = subprocess.run(
        [sys.executable, soak.__file__, *options, "--", *of_server],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert output.exists(), result.stderr
    figures = json.loads(output.read_text())
    assert figures["finished"] and not figures["wrong"]
    assert result.returncode == (found is not None)
    assert any(found in named for named in figures["leaks"]) if found else not figures["leaks"]
