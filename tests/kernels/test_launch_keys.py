"""No batch makes a kernel compile anew: what a launch is compiled for does not follow its size."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import collections
import random

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_refusion.decoding.penalties import Penalties
from vllm_refusion.decoding.picking import PickLimits
from vllm_refusion.decoding.speculation import CERTAIN, LEVELS, MAX_PRICE, Speculation
from vllm_refusion.decoding.state import DecodeState, Field
from vllm_refusion.engine.acceptance import Profile, build_tables
from vllm_refusion.triton_kernels import acceptance, allocation, canvas_attention, grammar, layout
from vllm_refusion.triton_kernels import mask_lora, penalties, serial, token_stats, transition
from vllm_refusion.triton_kernels import write_kv
from vllm_refusion.triton_kernels.allocation_twin import TOTALS
from vllm_refusion.triton_kernels.layout_twin import ASKED

CANVAS, MOST, VOCAB, MASK = 32, 256, 49153, 49152
HEADS, KV_HEADS, HEAD, PAGE = 9, 3, 64, 64  # an odd number of heads: parts begin anywhere
ROWS = 8192


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


class Compiled:
    function = packed_metadata = None
    launch_metadata = run = staticmethod(lambda *args: None)


keys = collections.defaultdict(set)


def compiled(self, key, signature, device, *args):
    keys[self.fn.__name__].add(key)
    self.device_caches[device][0][key] = Compiled()
    return Compiled()


driver.set_active(Driver())
JITFunction._do_compile = compiled
torch.Tensor.is_cuda = property(lambda self: True)
torch.cuda.get_device_capability = lambda device: (9, 0)
canvas_attention._processors = lambda device: 132
canvas_attention._is_hopper = lambda device: True

state = DecodeState(MOST, CANVAS, 512, MASK, "cpu")
asked = torch.zeros(ASKED, MOST * CANVAS, dtype=torch.int32)
picked = torch.zeros(MOST * CANVAS, dtype=torch.int32)
picked_prob, given_prob = torch.zeros(2, MOST * CANVAS)
replayed = torch.zeros(2, MOST * CANVAS, dtype=torch.int32)
per_request = torch.zeros(MOST, dtype=torch.int32)
starts = torch.zeros(MOST + 1, dtype=torch.int32)
totals = torch.zeros(TOTALS, dtype=torch.int32)
table = torch.zeros(MOST, 37, dtype=torch.int32)
visibility = torch.zeros(ROWS, 4, dtype=torch.int32)
slot_mappings = torch.zeros(1, ROWS, dtype=torch.int64)
input_ids = torch.zeros(ROWS, dtype=torch.int32)
positions = torch.zeros(ROWS, dtype=torch.int64)
kv_cache = torch.zeros(2, KV_HEADS, PAGE, 2 * HEAD, dtype=torch.bfloat16)
mask_rows, mask_count = torch.zeros(ROWS, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
embedding = torch.zeros(576, dtype=torch.bfloat16)
penalised = Penalties(MOST, VOCAB, "cpu")
drawn = build_tables([Profile(0.5, 0.5)], VOCAB, (MASK, None), "cpu")
limited, plain = PickLimits(MOST, VOCAB, "cpu"), None
limited.add(0, top_p=0.5, bias=torch.zeros(VOCAB))


def statistics(rows, start, limits):
    logits = torch.empty(rows, VOCAB, dtype=torch.bfloat16)
    requests = torch.zeros(start + rows, dtype=torch.int64)
    columns = [column[start:] for column in (*asked, picked, picked_prob, given_prob)]
    token_stats.token_stats(
        logits, requests[start:], *columns[:3], temperature=state.temperature, seed=state.seed,
        min_tokens=state.min_tokens, stop_ids=state.stop_ids, mask_token_id=MASK, limits=limits,
        out=tuple(columns[3:]),
    )
    rows = min(rows, 50)  # of float32 logits there are fewer at once
    row = torch.zeros(start + rows, dtype=torch.int32)[start:]
    requests = requests[start : start + rows]
    penalties.apply_penalties(
        torch.empty(rows, VOCAB), requests, row, asked[0, start : start + rows], state, penalised
    )
    words = torch.zeros(3, -(-VOCAB // 32), dtype=torch.int32)
    grammar.forbid(logits[:rows], row, words)


def step(requests, rows, speculation, start):
    idx = torch.zeros(requests, dtype=torch.int64)
    allocation.allocate(
        state, per_request, idx, per_request, per_request, starts, starts[: requests + 1], totals,
        max(1, requests - 1), rows, 0,
    )
    layout.layout(
        state, idx, starts, starts[: requests + 1], per_request, input_ids[:rows], positions,
        visibility, slot_mappings[:, :rows], asked,
    )
    mask_lora.find_masks(input_ids[:rows], rows, MASK, mask_rows, mask_count)
    mask_lora.embed_masks(
        torch.empty(rows, 576, dtype=torch.bfloat16), embedding, mask_rows, mask_count
    )
    qkv = torch.empty(rows, HEADS + 2 * KV_HEADS, HEAD, dtype=torch.bfloat16)
    query, key, value = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    write_kv.write_kv(key, value, kv_cache, slot_mappings[0, :rows])
    canvas_attention.canvas_attention(
        query, kv_cache, torch.empty(query.shape, dtype=query.dtype), table[:requests],
        starts[: requests + 1], per_request[:requests], visibility[:rows], 0.125,
    )
    decode_rows = min(rows, requests * CANVAS)
    statistics(min(decode_rows, 1000), start, plain)
    statistics(min(decode_rows, 50), start, limited)
    expanded = torch.zeros(decode_rows, dtype=torch.int64)
    acceptance.replayed_rows(state, expanded, expanded.int(), asked[2], replayed)
    acceptance.acceptance_stats(
        expanded, asked[0], asked[1], *replayed, seed=state.seed,
        slot_size=state.ints[:, Field.SLOT_SIZE], slot_threshold=state.slot_threshold,
        resume=state.ints[:, Field.RESUME], tables=drawn, out=(picked, picked_prob, given_prob),
    )
    sampled = torch.zeros(requests, CANVAS, dtype=torch.int32)
    batch = (state, idx, starts, starts[: requests + 1], per_request, per_request)
    results = (sampled, sampled[:, 0].contiguous(), sampled[:, 0].contiguous(), speculation)
    transition.transition(
        *batch, picked, picked_prob, given_prob, per_request[:requests], *results
    )
    serial.serial_transition(*batch, picked, picked_prob, *results)
    serial.give_drafts(state, idx, sampled, speculation)


canvas_attention.compile_for(kv_cache, HEADS, torch.bfloat16, ROWS, MOST)
at_start = {name: set(found) for name, found in keys.items()}
rng = random.Random(0)
rows_of_all = {1, 2, 3, 4, 8, 9, 16, 17, 31, 32, 64, 144, 145, 400, 704, 705, 1024, 4111, ROWS}
for requests in (1, 2, 3, 15, 16, 17, 32, 33, 64, 65, 100, 128, 200, 255, 256):
    for rows in rows_of_all | {rng.randint(1, ROWS)}:
        speculation = Speculation(
            rng.choice((0, 1, 16, 3000)), rng.choice((0, 1, 16, MAX_PRICE)),
            rng.choice((0, 1, 16, CERTAIN)), rng.choice((1, 16, LEVELS - 1)),
        )
        step(requests, rows, speculation, rng.choice((0, 1, 2, 3, 4, 16)))
print({name: len(found) for name, found in keys.items()})
for name, found in keys.items():
    if name in at_start:
        assert found <= at_start[name], f"{name}: {found - at_start[name]} not at start"
    else:
        kinds = 2 if name == "_token_stats_kernel" else 1  # with limits and without
        assert len(found) == kinds, f"{name} is compiled for each of {found}"
"""


def test_batches_of_all_sizes_need_the_kernels_that_the_start_compiles(tmp_path):
    environment = dict(
        os.environ,
        TRITON_INTERPRET="0",
        TRITON_BACKENDS_IN_TREE="1",  # keeps the package's interpreter off
        TRITON_CACHE_DIR=str(tmp_path),
    )
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, check=True)
