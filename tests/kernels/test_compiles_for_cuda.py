"""The step kernels compile for a GPU, also where there is none: the interpreter takes more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from vllm_refusion.triton_kernels import (
    acceptance,
    allocation,
    canvas_attention,
    grammar,
    layout,
    mask_lora,
    penalties,
    serial,
    token_stats,
    transition,
    write_kv,
)

name, _, aside = sys.argv[1].partition("_aside")
HEADS = {"HEAD_SIZE": 128, "HEAD_PADDED": 128, "PAGE": 16}
FP8 = HEADS | {"BLOCK_ROWS": 8, "LARGEST": 448.0}
ATTENTION = HEADS | {"HEADS": 32, "GROUP": 4, "GROUP_PADDED": 4, "REQUESTS": 16, "BLOCK_M": 64}
ATTENTION |= {"BLOCK_N": 64, "SPLIT": False, "UPCAST": False, "FP8": True, "TMA": False}
ATTENTION |= {"STAGES": 3, "MASKED_STAGES": 2, "kv_desc": None, "partial_output_ptr": None}
ATTENTION |= {"partial_lse_ptr": None, "parts_ptr": None}
TILE = {"RANK": 64, "BLOCK_M": 32, "OVERLAP": aside == "", "UPCAST": False}
SHRINK = TILE | {"IN": 4096, "SPLIT_COLUMNS": 512, "BLOCK_K": 128}
EXPAND = TILE | {"BLOCKS": 3, "SPLITS": 8, "BLOCK_N": 128, "TILES": 4}
for block, width in enumerate((4096, 1024, 1024)):
    EXPAND |= {f"COLUMN{block}": 4096 + 1024 * (block - 1) if block else 0, f"WIDTH{block}": width}
STATISTICS = {"BIASED": True, "CUT": True, "BLOCK": 2048}
kernel, constants = {
    "transition": (transition._transition_kernel, {"CANVAS": 48, "LANES": 64}),
    "layout": (layout._layout_kernel, {"BLOCK": 1024}),
    "allocation": (allocation._allocate_kernel, {"LANES": 64}),
    "serial": (serial._serial_kernel, {"CANVAS": 48, "LANES": 64}),
    "statistics": (token_stats._token_stats_kernel, STATISTICS),
    "combine_tiles": (token_stats._combine_tiles_kernel, {"TILES_PADDED": 32, "ROWS": 1}),
    "acceptance": (acceptance._acceptance_kernel, {"BLOCK": 128}),
    "replayed_rows": (acceptance._replayed_rows_kernel, {"BLOCK": 128}),
    "give_drafts": (serial._give_drafts_kernel, {"CANVAS": 48, "LANES": 64}),
    "forbid": (grammar._forbid_kernel, {"BLOCK": 4096}),
    "find_masks": (mask_lora._find_masks_kernel, {"BLOCK": 1024}),
    "embed_masks": (mask_lora._embed_masks_kernel, {"HIDDEN": 4096, "BLOCK": 1024}),
    "penalties": (penalties._penalties_kernel, {"BLOCK": 2048}),
    "bad_words": (penalties._bad_words_kernel, {}),
    "shrink": (mask_lora._shrink_kernel, SHRINK),
    "expand": (mask_lora._expand_kernel, EXPAND),
    "write_fp8": (write_kv._write_kv_kernel, FP8),
    "attend_fp8": (canvas_attention._canvas_attention_kernel, ATTENTION),
}[name]
FLOATS = {"floats", "picked_prob", "given_prob", "parts", "logits", "factors", "bias"}
FLOATS |= {"k_scale", "v_scale", "temperature", "workspace", "lowest", "slot_threshold"}
FLOATS |= {"quantiles", "slot_chance", "first_chance"}
HALVES = {"x", "y", "a", "b", "embedding", "key", "value", "query", "output"}
LONGS = {
    *("canvas_token", "counters", "idx_mapping", "positions", "reqs", "row_request"),
    *("slot_mapping", "slot_mappings", "seed"),
}


def type_of(name):
    if name in constants:
        return "constexpr"
    if not name.endswith("_ptr"):
        return "fp32" if name in ("scale", "scale_log2") else "i32"
    base = name.removesuffix("_ptr")
    if base == "kv":
        return "*fp8e4nv"
    if base in HALVES:
        return "*bf16"
    return "*fp32" if base in FLOATS else "*i64" if base in LONGS else "*i32"


source = ASTSource(
    fn=kernel,
    signature={name: type_of(name) for name in kernel.arg_names},
    constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
)
assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@pytest.mark.parametrize(
    "kernel",
    [
        *("transition", "layout", "allocation", "give_drafts", "forbid", "penalties", "bad_words"),
        *("serial", "statistics", "combine_tiles", "acceptance", "replayed_rows"),
        *("find_masks", "embed_masks", "shrink", "shrink_aside", "expand", "expand_aside"),
        *("write_fp8", "attend_fp8"),
    ],
)
def test_compiles(kernel, tmp_path):
    environment = dict(
        os.environ,
        TRITON_INTERPRET="0",
        TRITON_BACKENDS_IN_TREE="1",  # keeps the package's interpreter off
        TRITON_CACHE_DIR=str(tmp_path),
    )
    subprocess.run(
        [sys.executable, "-c", PROGRAM, kernel], env=environment, cwd=tmp_path, check=True
    )
