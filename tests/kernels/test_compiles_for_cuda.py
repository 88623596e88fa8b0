"""The step kernels compile for a GPU, also where there is none: the interpreter takes more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
import sys
import traceback

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


# A kernel and its constants; ``_aside`` for the way on a stream of its own.
def chosen(argument):
    name, _, aside = argument.partition("_aside")
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
        column = 4096 + 1024 * (block - 1) if block else 0
        EXPAND |= {f"COLUMN{block}": column, f"WIDTH{block}": width}
    STATISTICS = {"BIASED": True, "CUT": True, "BLOCK": 2048}
    return {
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


def type_of(name, constants):
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


failed = {}
for argument in sys.argv[1:]:
    kernel, constants = chosen(argument)
    source = ASTSource(
        fn=kernel,
        signature={name: type_of(name, constants) for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    try:
        assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    except Exception:
        failed[argument] = traceback.format_exc()
print(json.dumps(failed))
"""
KERNELS = (
    *("transition", "layout", "allocation", "give_drafts", "forbid", "penalties", "bad_words"),
    *("serial", "statistics", "combine_tiles", "acceptance", "replayed_rows"),
    *("find_masks", "embed_masks", "shrink", "shrink_aside", "expand", "expand_aside"),
    *("write_fp8", "attend_fp8"),
)


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """Of those that do not compile, what is said. All in one process, which takes long to start."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = dict(
        os.environ,
        TRITON_INTERPRET="0",
        TRITON_BACKENDS_IN_TREE="1",  # keeps the package's interpreter off
        TRITON_CACHE_DIR=str(folder),
    )
    command = [sys.executable, "-c", PROGRAM, *KERNELS]
    ended = subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.PIPE)
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles(kernel, failed):
    assert kernel not in failed, failed[kernel]
