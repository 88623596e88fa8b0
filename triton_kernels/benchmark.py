"""Times the kernels at the shapes they serve; see the folder's README for how to run it.

Each operation's tests run first, and nothing is timed when one fails. Shapes are Qwen3-8B's: 32
query heads, 8 KV heads, head size 128, vocabulary 151,936, bf16. Calls are captured in CUDA graphs,
one call per layer with that layer's cache, so that K and V come from memory as they do in a model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vllm_refusion.triton_kernels.canvas_attention import canvas_attention
from vllm_refusion.triton_kernels.mask_lora import expand_masks, shrink_masks
from vllm_refusion.triton_kernels.mask_lora_twin import SPLIT, allocate_parts
from vllm_refusion.triton_kernels.tiling import HOPPER_PAGE
from vllm_refusion.triton_kernels.token_stats import token_stats
from vllm_refusion.triton_kernels.token_stats_twin import allocate_stats
from vllm_refusion.triton_kernels.write_kv import write_kv

HEADS, KV_HEADS, HEAD_SIZE, VOCAB = 32, 8, 128, 151_936
SCALE = HEAD_SIZE**-0.5
DEVICE, DTYPE, ITEM = "cuda", torch.bfloat16, 2
REPLAYS = 7
# what one captured graph reads at least, several times a GPU's cache
GRAPH_BYTES = 2**29
MAX_LAYERS = 36
TABLE_ENTRIES = 40_960
TESTS = {
    "canvas_attention": "test_canvas_attention.py",
    "write_kv": "test_canvas_attention.py",
    "token_stats": "test_token_stats.py",
    "mask_lora": "test_mask_lora.py",
}


@dataclass
class Measured:
    """One line of the report; times in microseconds per call."""

    operation: str
    shape: str
    us: float
    gb_per_s: float
    tflop_per_s: float
    roofline_share: float  # the roofline's time over the measured one
    flash_us: float | None = None
    ratio_to_flash: float | None = None


@dataclass(frozen=True)
class Ceilings:
    """Rates measured in this run."""

    bytes_per_s: float
    flop_per_s: float


def time_calls(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of a call when all are captured in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / len(calls))
    return statistics.median(times)


def measure_ceilings() -> Ceilings:
    """The rates of a large copy (bytes read and written) and a large bf16 matrix product."""
    source = torch.randn(2**30, device=DEVICE)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / (time_calls([partial(torch.neg, source, out=target)] * 3) * 1e-6)
    del source, target
    a, b = (torch.randn(8192, 8192, dtype=DTYPE, device=DEVICE) for _ in range(2))
    multiplied = 2 * 8192**3 / (time_calls([lambda: a @ b] * 5) * 1e-6)
    return Ceilings(copied, multiplied)


@dataclass(frozen=True)
class Shape:
    """``batch`` requests of ``width`` rows each after ``context`` committed entries."""

    batch: int
    context: int
    width: int
    page: int = HOPPER_PAGE
    layout: str = "NHD"  # memory order of a page

    def __str__(self) -> str:
        return f"batch {self.batch} context {self.context} rows {self.width} page {self.page}"

    @property
    def flops(self) -> float:
        seen = self.width * self.context + self.width * (self.width + 1) / 2
        return 4.0 * self.batch * HEADS * HEAD_SIZE * seen

    @property
    def bytes(self) -> float:
        entries = 2 * KV_HEADS * (self.context + self.width)
        return self.batch * ITEM * HEAD_SIZE * (entries + 2 * HEADS * self.width)


ATTENTION_SHAPES = [
    Shape(batch, context, width)
    for width in (32, 128, 256)
    for batch in (1, 16)
    for context in (1024, 8192, 32768)
]
ATTENTION_SHAPES += [Shape(1, 0, 1024), Shape(1, 0, 8192)]  # prompts
# what a user who sets vLLM's usual block size gets
ATTENTION_SHAPES += [Shape(1, 8192, 128, page=16), Shape(16, 8192, 128, page=16)]
WRITE_ROWS = (32, 128, 512, 2048, 8192)
STATS_ROWS = (1, 32, 128, 512, 2048)
# of vLLM's linear layers: columns in, widths of the stacked outputs
LINEARS = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (12288, 12288)),
    "down": (12288, (4096,)),
}
MASKS = ((0, 32), (16, 32), (0, 256), (64, 256), (180, 256), (256, 512))  # of rows
ADAPTER_RANK = 64
LAYERS_IN_GRAPH = 8
# how an adapter is computed beside a layer, with the input columns of a split of its shrink
WAYS: dict[str, dict[str, int] | None] = {"without": None}
for _split in (SPLIT, 2 * SPLIT, 4 * SPLIT):
    WAYS[f"in line {_split}"] = {"aside": 0, "split_columns": _split}
    WAYS[f"aside {_split}"] = {"aside": 1, "split_columns": _split}


class Attention:
    """Inputs of one shape: plain causal rows, which FlashAttention can compute too."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        length = shape.context + shape.width
        pages = -(-length // shape.page)
        blocks = shape.batch * pages
        cache_bytes = blocks * shape.page * KV_HEADS * 2 * HEAD_SIZE * ITEM
        layers = max(1, min(MAX_LAYERS, GRAPH_BYTES // cache_bytes))
        self.caches = []
        for _ in range(layers):
            if shape.layout == "HND":
                cache = torch.randn(blocks, KV_HEADS, shape.page, 2 * HEAD_SIZE, **_like_served())
            else:
                cache = torch.randn(blocks, shape.page, KV_HEADS, 2 * HEAD_SIZE, **_like_served())
                cache = cache.transpose(1, 2)
            self.caches.append(cache)
        rows = shape.batch * shape.width
        self.query = torch.randn(rows, HEADS, HEAD_SIZE, **_like_served())
        self.output = torch.empty_like(self.query)
        self.table = torch.randperm(blocks, device=DEVICE).int().view(shape.batch, pages)
        # a row of a served table is as long as max_model_len allows
        unused = TABLE_ENTRIES // shape.page - pages
        self.table = torch.nn.functional.pad(self.table, (0, unused)).contiguous()
        self.starts = torch.arange(0, rows + 1, shape.width, dtype=torch.int32, device=DEVICE)
        self.lengths = torch.full((shape.batch,), length, dtype=torch.int32, device=DEVICE)
        view = torch.tensor([shape.context, 0, 0, shape.context], dtype=torch.int32)
        self.visibility = view.repeat(rows, 1).to(DEVICE)

    def call(self, cache: torch.Tensor, **options: Any) -> Callable[[], None]:
        return lambda: canvas_attention(
            self.query, cache, self.output, self.table, self.starts, self.lengths,
            self.visibility, SCALE, **options,
        )  # fmt: skip

    def time(self, **options: Any) -> float:
        return time_calls([self.call(cache, **options) for cache in self.caches])

    def time_flash(self) -> float:
        """FlashAttention 3 as vLLM calls it, with its schedule made ahead; the best of its modes.

        vLLM bounds the splits by 32 in captured batches and leaves them to a heuristic in others.
        """
        return min(self._time_flash(num_splits) for num_splits in (32, 0))

    def flash_call(self, cache: torch.Tensor, **options: Any) -> Callable[[], None]:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        key, value = cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
        arguments = dict(
            max_seqlen_q=self.shape.width, cu_seqlens_q=self.starts,
            max_seqlen_k=self.shape.context + self.shape.width, seqused_k=self.lengths,
            softmax_scale=SCALE, causal=True, block_table=self.table, fa_version=3,
        )  # fmt: skip
        arguments |= options
        return lambda: flash_attn_varlen_func(self.query, key, value, out=self.output, **arguments)

    def _time_flash(self, num_splits: int) -> float:
        from vllm.vllm_flash_attn import get_scheduler_metadata

        schedule = get_scheduler_metadata(
            batch_size=self.shape.batch, max_seqlen_q=self.shape.width,
            max_seqlen_k=self.shape.context + self.shape.width, num_heads_q=HEADS,
            num_heads_kv=KV_HEADS, headdim=HEAD_SIZE, cache_seqlens=self.lengths,
            qkv_dtype=DTYPE, cu_seqlens_q=self.starts, page_size=self.shape.page,
            causal=True, num_splits=num_splits,
        )  # fmt: skip
        calls = [
            self.flash_call(cache, scheduler_metadata=schedule, num_splits=num_splits)
            for cache in self.caches
        ]
        return time_calls(calls)


def _like_served() -> dict:
    return {"dtype": DTYPE, "device": DEVICE}


def flash_attention_3_is_installed() -> bool:
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported
    except ImportError:
        return False
    return is_fa_version_supported(3)


def measured(
    name: str, shape: object, us: float, moved: float, flops: float, ceilings: Ceilings
) -> Measured:
    floor = max(moved / ceilings.bytes_per_s, flops / ceilings.flop_per_s) * 1e6
    return Measured(name, str(shape), us, moved / us * 1e-3, flops / us * 1e-6, floor / us)


def benchmark_canvas_attention(ceilings: Ceilings) -> list[Measured]:
    flash = flash_attention_3_is_installed()
    lines = []
    for shape in ATTENTION_SHAPES:
        problem = Attention(shape)
        line = measured(
            "canvas_attention", shape, problem.time(), shape.bytes, shape.flops, ceilings
        )
        if flash:
            line.flash_us = problem.time_flash()
            line.ratio_to_flash = line.us / line.flash_us
        lines.append(line)
    return lines


def benchmark_write_kv(ceilings: Ceilings) -> list[Measured]:
    lines = []
    for rows in WRITE_ROWS:
        problem = Attention(Shape(1, 0, rows))
        key, value = torch.randn(2, rows, KV_HEADS, HEAD_SIZE, **_like_served())
        slots = torch.randperm(rows, device=DEVICE)
        calls = [partial(write_kv, key, value, cache, slots) for cache in problem.caches]
        moved = 4 * rows * KV_HEADS * HEAD_SIZE * ITEM
        lines.append(measured("write_kv", f"rows {rows}", time_calls(calls), moved, 0, ceilings))
    return lines


def benchmark_token_stats(ceilings: Ceilings) -> list[Measured]:
    lines = []
    for temperature in (0.0, 1.0):
        for rows in STATS_ROWS:
            copies = max(1, min(8, GRAPH_BYTES // (rows * VOCAB * ITEM)))
            calls = [token_stats_call(rows, temperature) for _ in range(copies)]
            shape = f"rows {rows} temperature {temperature:g}"
            moved = rows * VOCAB * ITEM
            lines.append(measured("token_stats", shape, time_calls(calls), moved, 0, ceilings))
    return lines


def token_stats_call(rows: int, temperature: float) -> Callable[[], object]:
    """A call on random logits, 4 standard deviations wide, of 64 requests."""
    requests = 64

    def integers(count: int, high: int) -> torch.Tensor:
        return torch.randint(high, (count,), dtype=torch.int32, device=DEVICE)

    logits = torch.randn(rows, VOCAB, **_like_served()) * 4
    row_request = torch.arange(rows, device=DEVICE) % requests
    positions, given, draws = integers(rows, 4096), integers(rows, VOCAB), integers(rows, 100)
    state: dict[str, Any] = dict(
        temperature=torch.full((requests,), temperature, device=DEVICE),
        seed=torch.arange(requests, device=DEVICE),
        min_tokens=torch.zeros(requests, dtype=torch.int32, device=DEVICE),
        stop_ids=torch.full((requests, 64), -1, dtype=torch.int32, device=DEVICE),
        mask_token_id=VOCAB - 1,
    )
    out = allocate_stats(logits)
    return lambda: token_stats(logits, row_request, positions, given, draws, **state, out=out)


def benchmark_mask_lora(ceilings: Ceilings) -> list[Measured]:
    """Per linear layer, in line; then a layer's four with their own products, in each way.

    A step has one of each in every layer. What an adapter costs is the time of its way less that
    without one; the bytes and operations of these lines are those of the whole.
    """
    lines = []
    for name, (columns, widths) in LINEARS.items():
        for masks, rows in MASKS:
            problem = Adapted(columns, widths, masks, rows)
            read = problem.adapter_bytes if masks else 0
            layers = max(1, min(MAX_LAYERS, GRAPH_BYTES // max(read, 1)))
            calls = [problem.call(problem.factors()) for _ in range(layers)]
            moved = 4 + read + masks * (columns + 2 * sum(widths)) * ITEM
            shape = f"{name} masks {masks} rows {rows}"
            flops = masks * problem.flops_per_mask
            lines.append(measured("mask_lora", shape, time_calls(calls), moved, flops, ceilings))
    for masks, rows in MASKS:
        problems = [Adapted(*sizes, masks, rows) for sizes in LINEARS.values()]
        moved = sum(problem.weight.nbytes + problem.adapter_bytes for problem in problems)
        flops = sum(
            rows * 2.0 * problem.weight.numel() + masks * problem.flops_per_mask
            for problem in problems
        )
        for way, how in WAYS.items():
            us = sum_of_calls([problem.with_its_product(how) for problem in problems])
            shape = f"layer masks {masks} rows {rows} {way}"
            lines.append(measured("mask_lora", shape, us, moved, flops, ceilings))
    return lines


def sum_of_calls(calls: list[Callable[[], None]]) -> float:
    for call in calls:
        call()  # compiles what a capture must not
    return time_calls(calls * LAYERS_IN_GRAPH) * len(calls)


class Adapted:
    """A linear layer of vLLM's, an adapter's factors of it, and rows of which some are masks."""

    def __init__(self, columns: int, widths: Sequence[int], masks: int, rows: int) -> None:
        self.source, self.x = torch.randn(2, rows, columns, **_like_served())
        self.y = torch.randn(rows, sum(widths), **_like_served())
        listed = torch.randperm(rows, device=DEVICE).int()
        listed[:masks] = listed[:masks].sort().values
        self.masks = listed, torch.tensor([masks], dtype=torch.int32, device=DEVICE)
        self.widths = widths
        self.blocks = [n for i, width in enumerate(widths) for n in (sum(widths[:i]), width)]
        self.weight = torch.randn(sum(widths), columns, **_like_served())
        self.adapter_bytes = ADAPTER_RANK * (len(widths) * columns + sum(widths)) * ITEM
        self.flops_per_mask = 2.0 * self.adapter_bytes / ITEM

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.randn(len(self.widths), ADAPTER_RANK, self.x.shape[1], **_like_served())
        return a, torch.randn(sum(self.widths), ADAPTER_RANK, **_like_served())

    def call(self, factors: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], None]:
        a, b = factors

        def call() -> None:
            parts = allocate_parts(self.x, a)
            shrink_masks(parts, self.x, a, *self.masks, aside=False)
            expand_masks(self.y, parts, b, *self.masks, 1e-4, self.blocks, aside=False)

        return call

    def with_its_product(self, how: dict[str, int] | None) -> Callable[[], None]:
        """With an elementwise kernel in front, as norms and activations are. None: no adapter."""
        a, b = self.factors()

        def call() -> None:
            torch.neg(self.source, out=self.x)
            if how is None:
                torch.mm(self.x, self.weight.T, out=self.y)
                return
            aside = bool(how["aside"])
            parts = allocate_parts(self.x, a, how["split_columns"])
            shrink = partial(shrink_masks, parts, self.x, a, *self.masks, aside=aside)
            if aside:
                shrink()
            torch.mm(self.x, self.weight.T, out=self.y)
            if not aside:
                shrink()
            expand_masks(self.y, parts, b, *self.masks, 1e-4, self.blocks, aside=aside)

        return call


BENCHMARKS = {
    "canvas_attention": benchmark_canvas_attention,
    "write_kv": benchmark_write_kv,
    "token_stats": benchmark_token_stats,
    "mask_lora": benchmark_mask_lora,
}


def run_tests(operations: list[str], folder: Path) -> None:
    """Exits unless the tests of the operations pass."""
    files = sorted({str(folder / TESTS[name]) for name in operations})
    # most of their time is compilation
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", *parallel, *files]
    if subprocess.run(command).returncode:
        sys.exit("a test fails: not timed")


def as_text(line: Measured) -> str:
    text = f"{line.operation + ' ' + line.shape:56}{line.us:9.1f}{line.gb_per_s:8.0f}"
    text += f"{line.tflop_per_s:9.1f}{line.roofline_share:10.1%}"
    if line.flash_us is not None:
        text += f"{line.flash_us:9.1f}{line.ratio_to_flash:7.2f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--tests", type=Path, default=Path("tests"), help="the tests' folder")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    operations = arguments.operations or list(BENCHMARKS)
    if unknown := set(operations) - set(BENCHMARKS):
        parser.error(f"no operation {sorted(unknown)}: allowed are {list(BENCHMARKS)}")
    if not torch.cuda.is_available():
        sys.exit("the benchmark needs a GPU")
    run_tests(operations, arguments.tests)

    ceilings = measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copy {ceilings.bytes_per_s * 1e-12:.2f} TB/s, "
        f"bf16 product {ceilings.flop_per_s * 1e-12:.0f} TFLOP/s"
    )
    print(f"{'':56}{'us':>9}{'GB/s':>8}{'TFLOP/s':>9}{'roofline':>10}{'FA3 us':>9}{'ratio':>7}")
    lines = []
    for name in operations:
        measurements = BENCHMARKS[name](ceilings)
        print("\n".join(map(as_text, measurements)), flush=True)
        lines += measurements
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "ceilings": asdict(ceilings),
            "results": [asdict(line) for line in lines],
        }
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
