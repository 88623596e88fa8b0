"""The canvas attention and KV write kernels and their fp32 twins, against the definition.

Without a GPU the kernels run in Triton's interpreter. What must not be read or written holds NaN.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from device import DEVICE, ON_GPU

from vllm_refusion.triton_kernels import canvas_attention as kernels
from vllm_refusion.triton_kernels import canvas_attention_twin as twin
from vllm_refusion.triton_kernels import write_kv as write_kv_module
from vllm_refusion.triton_kernels.tiling import Tiling, choose_tiling

# several tiles in either direction even at the small shapes that the interpreter can afford
SMALL = Tiling(block_m=32, block_n=16)
# the memory order of a cache's (block, head, entry) dimensions
LAYOUTS = {"HND": (0, 1, 2), "NHD": (0, 2, 1), "head-major": (1, 0, 2)}


def causal(context: int, length: int) -> list[tuple[int, int, int, int]]:
    return [(context, 0, 0, context)] * length


def causal_without_context_end(context: int, length: int) -> list[tuple[int, int, int, int]]:
    return [(0, 0, 0, 0)] * length


def isolated_slots(context: int, length: int) -> list[tuple[int, int, int, int]]:
    return [(context, 0, 0, context + row // 5 * 5) for row in range(length)]


def drafts_and_branches(context: int, length: int) -> list[tuple[int, int, int, int]]:
    """A causal draft, then branches of three rows that each see a longer accepted prefix of it."""
    draft = length // 2
    rows = causal(context, draft)
    for row in range(length - draft):
        branch = row // 3
        rows.append(
            (context, context, context + min(branch + 1, draft), context + draft + 3 * branch)
        )
    return rows


def every_third_unused(context: int, length: int) -> list[tuple[int, int, int, int]]:
    """Unused rows see nothing, and no one sees them: their entries keep the NaN."""
    rows = []
    for row in range(length):
        own = context + row
        rows.append((0, 0, 0, own + 1) if row % 3 == 1 else (context, 0, 0, own))
    return rows


def context_alone(context: int, length: int) -> list[tuple[int, int, int, int]]:
    return [(context, 0, 0, context + length)] * length


def nothing(context: int, length: int) -> list[tuple[int, int, int, int]]:
    return [(0, 0, 0, context + length)] * length


def arbitrary(context: int, length: int) -> list[tuple[int, int, int, int]]:
    """Anything goes: gaps, empty and reversed runs, indices below 0 and past the end."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(-3, context + length + 4, (length, 4), generator=generator).tolist()


@dataclass(frozen=True)
class Case:
    """``requests``: (entries in the cache before this pass, rows of this pass) of each request."""

    id: str
    requests: tuple[tuple[int, int], ...] = ((21, 19), (0, 7), (33, 1))
    view: object = causal
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    page: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "HND"
    tiling: Tiling | None = SMALL


# combining splits takes a program per row and head
FEW_ROWS = ((90, 6), (0, 0), (21, 3), (0, 2))
CASES = [
    Case("one-row-alone", ((0, 1),)),
    Case("one-row-after-context", ((45, 1),)),
    Case("no-context", ((0, 23),)),
    Case("empty-request-in-the-middle", ((9, 6), (0, 0), (17, 11))),
    Case("empty-requests-at-the-end", ((9, 6), (17, 11), (0, 0), (0, 0), (0, 0))),
    Case("empty-request-first", ((5, 0), (17, 11))),
    Case("empty-requests-alone", ((0, 0), (0, 0))),
    Case("many-short-requests", tuple((7 * i % 23, i % 3) for i in range(11))),
    Case("causal-without-context-end", view=causal_without_context_end),
    Case("isolated-slots", view=isolated_slots),
    Case("drafts-and-branches", view=drafts_and_branches),
    Case("every-third-row-unused", view=every_third_unused),
    Case("context-alone", view=context_alone),
    Case("all-rows-unused", view=nothing),
    Case("arbitrary-runs", ((21, 19), (0, 40)), arbitrary),
    Case("arbitrary-runs-gqa-3", ((50, 23),), arbitrary, heads=3, kv_heads=1),
    Case("heads-equal-kv-heads", heads=2, kv_heads=2),
    Case("gqa-2-one-kv-head", heads=2, kv_heads=1),
    Case("gqa-3", heads=6, kv_heads=2),
    Case("gqa-7", heads=7, kv_heads=1),
    Case("gqa-8", heads=8, kv_heads=1),
    Case("gqa-32", heads=32, kv_heads=1),
    Case("head-64", head_size=64),
    Case("head-80", head_size=80),
    Case("head-96", head_size=96),
    Case("head-128", head_size=128),
    Case("head-256", head_size=256),
    Case("page-1", page=1),
    Case("page-3", page=3, view=isolated_slots),
    Case("page-48", page=48, view=drafts_and_branches),
    Case("page-128", page=128, view=isolated_slots),
    Case("page-smaller-than-tile", page=16, tiling=Tiling(32, 64)),
    Case("cache-nhd", layout="NHD", view=isolated_slots),
    Case("cache-head-major", layout="head-major", page=3),
    Case("default-tiling", view=arbitrary, tiling=None),
    Case("bf16", dtype=torch.bfloat16, view=drafts_and_branches),
    Case(
        "bf16-head-80-gqa-7-page-3", heads=7, kv_heads=1, head_size=80, page=3, dtype=torch.bfloat16
    ),
    Case("bf16-nhd", dtype=torch.bfloat16, layout="NHD", view=arbitrary),
    Case("fp16", dtype=torch.float16, view=isolated_slots),
    Case("fp16-head-96-unused-rows", dtype=torch.float16, head_size=96, view=every_third_unused),
    Case("splits-2", FEW_ROWS, isolated_slots, tiling=replace(SMALL, num_splits=2)),
    Case("splits-more-than-tiles", FEW_ROWS, tiling=replace(SMALL, num_splits=16)),
    Case(
        "splits-head-80-gqa-3",
        FEW_ROWS,
        arbitrary,
        3,
        1,
        80,
        3,
        tiling=replace(SMALL, num_splits=4),
    ),
    Case("splits-unused-rows", FEW_ROWS, every_third_unused, tiling=replace(SMALL, num_splits=4)),
    Case("splits-nothing-seen", FEW_ROWS, nothing, tiling=replace(SMALL, num_splits=2)),
    Case("splits-shorter-than-asked", FEW_ROWS, tiling=replace(SMALL, num_splits=6, min_steps=3)),
    Case("splits-one-has-all", FEW_ROWS, tiling=replace(SMALL, num_splits=3, min_steps=64)),
    Case("descriptors", page=48, tiling=replace(SMALL, tma=True)),
    Case("descriptors-nhd", layout="NHD", view=every_third_unused, tiling=replace(SMALL, tma=True)),
    Case("splits-by-tiles", FEW_ROWS, tiling=replace(SMALL, num_splits=6, work_items=9)),
    Case("splits-of-one-tile", ((300, 3),), tiling=replace(SMALL, num_splits=6, work_items=9)),
    Case("descriptors-splits", FEW_ROWS, tiling=replace(SMALL, tma=True, num_splits=3)),
    Case("splits-bf16", FEW_ROWS, dtype=torch.bfloat16, tiling=replace(SMALL, num_splits=4)),
]
# what only a GPU can afford: the shapes that choose_tiling distinguishes
GPU_CASES = [
    Case(
        f"{name}-{str(dtype)[6:]}-head-{head_size}-gqa-{group}",
        requests,
        view,
        2 * group,
        2,
        head_size,
        page,
        dtype,
        layout,
        None,
    )
    for name, requests, view, page, layout in [
        ("one-row", ((3001, 1),), causal, 16, "NHD"),
        ("canvas", ((777, 128),), drafts_and_branches, 16, "HND"),
        ("long-prompt", ((0, 2500), (1000, 1), (0, 0)), causal, 64, "NHD"),
        ("many-canvases", ((300, 128),) * 40, isolated_slots, 48, "HND"),
        ("one-row-pages-of-64", ((3001, 1),), causal, 64, "NHD"),
        ("canvases-pages-of-64", ((777, 128), (2000, 5)), drafts_and_branches, 64, "HND"),
        ("unused-rows-pages-of-128", ((500, 64),) * 3, every_third_unused, 128, "NHD"),
    ]
    for dtype, head_size, group in [
        (torch.bfloat16, 64, 1),
        (torch.bfloat16, 80, 7),
        (torch.bfloat16, 128, 4),
        (torch.bfloat16, 256, 2),
        (torch.float16, 128, 4),
        (torch.float32, 80, 7),
        (torch.float32, 128, 4),
        (torch.float32, 256, 2),
    ]
]


def by_id(cases: list[Case]) -> dict:
    return {"argvalues": cases, "ids": [case.id for case in cases]}


@dataclass
class Problem:
    """A call's arguments on the device, in order, and each request's visible [rows, seq_len]."""

    arguments: tuple
    sees: list[torch.Tensor]

    def in_fp32(self) -> "Problem":
        query, kv_cache, output, *rest = self.arguments
        return Problem((query.float(), kv_cache.float(), output.float(), *rest), self.sees)

    def run(self, function, **options) -> torch.Tensor:
        query, kv_cache, output, *rest = self.arguments
        output = torch.full_like(output, float("nan"))
        function(query, kv_cache, output, *rest, **options)
        return output


def definition(rows: list[tuple[int, int, int, int]], seq_len: int) -> torch.Tensor:
    """[rows, seq_len] bool, row by row as the interface states it."""
    sees = torch.zeros(len(rows), seq_len, dtype=torch.bool)
    j = torch.arange(seq_len)
    for row, (context_end, run_start, run_end, own_start) in enumerate(rows):
        own = seq_len - len(rows) + row
        sees[row] = (j < context_end) | ((run_start <= j) & (j < run_end))
        sees[row] |= (own_start <= j) & (j <= own)
    return sees


def build(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(len(case.id))
    lengths = [length for _, length in case.requests]
    seq_lens = [sum(request) for request in case.requests]
    rows = [case.view(*request) for request in case.requests]
    sees = [definition(*pair) for pair in zip(rows, seq_lens, strict=True)]
    num_pages = [-(-seq_len // case.page) for seq_len in seq_lens]

    # pages of all requests interleaved at random, NaN in whatever no row may see
    sizes = (sum(num_pages) + 3, case.kv_heads, case.page)
    order = LAYOUTS[case.layout]
    kv_cache = torch.full([sizes[i] for i in order] + [2 * case.head_size], float("nan"))
    kv_cache = kv_cache.permute(*(order.index(i) for i in range(3)), 3)
    free = torch.randperm(sizes[0], generator=generator).int()
    # past a request's pages a table holds anything
    block_table = torch.full((len(lengths), max(num_pages) + 2), 2**31 - 1, dtype=torch.int32)
    for request, pages in enumerate(free[: sum(num_pages)].split(num_pages)):
        block_table[request, : len(pages)] = pages
        index = sees[request].any(0).nonzero()[:, 0]
        seen = torch.randn(len(index), case.kv_heads, 2 * case.head_size, generator=generator)
        kv_cache[pages[index // case.page].long(), :, index % case.page] = seen

    # rows past the last request are padding, and the query is a slice of a fused projection
    padded = sum(lengths) + 3
    fused = torch.randn(padded, case.heads + 2, case.head_size, generator=generator)
    visibility = torch.full((padded, 4), 2**31 - 1, dtype=torch.int32)
    visibility[: sum(lengths)] = torch.tensor(sum(rows, [])).view(-1, 4)
    query_start_loc = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    query = fused.to(DEVICE, case.dtype)[:, : case.heads]
    arguments = (
        query,
        kv_cache.to(DEVICE, case.dtype),
        torch.empty_like(query, memory_format=torch.contiguous_format),
        block_table.to(DEVICE),
        query_start_loc.to(DEVICE),
        torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        visibility.to(DEVICE),
        case.head_size**-0.5,
    )
    return Problem(arguments, sees)


def plain_attention(problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    """Attention as on paper, every operation in ``dtype``; NaN in rows that no one may write."""
    query, kv_cache, _, block_table, query_start_loc, _, _, scale = problem.arguments
    output = torch.full(query.shape, float("nan"), dtype=dtype, device=DEVICE)
    num_kv_heads, page = kv_cache.shape[1:3]
    for request, sees in enumerate(problem.sees):
        rows = slice(*query_start_loc[request : request + 2].tolist())
        index = torch.arange(sees.shape[1], device=DEVICE)
        entries = kv_cache[block_table[request, index // page].long(), :, index % page].to(dtype)
        entries = entries.nan_to_num(0.0).repeat_interleave(query.shape[1] // num_kv_heads, dim=1)
        key, value = entries.transpose(0, 1).chunk(2, dim=-1)  # [Hq, S, D]
        score = query[rows].to(dtype).transpose(0, 1) @ key.transpose(1, 2) * scale
        weight = score.masked_fill(~sees.to(DEVICE), float("-inf")).softmax(-1).nan_to_num(0.0)
        output[rows] = (weight @ value).transpose(0, 1)
    return output


def assert_as_close(actual: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    """``actual`` is at most twice as far from ``expected`` as ``plain`` is, NaN in the same places.

    ``plain`` may be exact by luck (one row, few visible entries). One fp32 ulp of the largest
    output is always allowed for each operation that an output cannot avoid and that is good to an
    ulp on a GPU: exp2, the product with V, the division, and rounding the output.
    """
    written = ~expected.isnan()
    assert torch.equal(~actual.isnan(), written), "wrong rows written, or NaN leaked"
    if not written.any():
        return
    actual, expected, plain = (x[written].double() for x in (actual, expected, plain))
    ulp = torch.finfo(torch.float32).eps * expected.abs().max()
    error, allowed = (actual - expected).abs().max(), 2 * (plain - expected).abs().max() + 4 * ulp
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def check_kernel(case: Case) -> None:
    problem = build(case)
    actual = problem.run(kernels.canvas_attention, tiling=case.tiling)
    plain = plain_attention(problem, case.dtype)
    if case.dtype == torch.float32:
        # the twin is no more exact than plain PyTorch here: measure both from float64
        expected = plain_attention(problem, torch.float64)
    else:
        expected = problem.in_fp32().run(twin.canvas_attention_twin)
    assert_as_close(actual, expected, plain)


@pytest.mark.parametrize("case", **by_id(CASES))
def test_kernel_matches_twin(case):
    check_kernel(case)


@pytest.mark.skipif(not ON_GPU, reason="too large for the interpreter")
@pytest.mark.parametrize("case", **by_id(GPU_CASES))
def test_kernel_matches_twin_at_served_shapes(case):
    check_kernel(case)


@pytest.mark.parametrize("case", **by_id([c for c in CASES if not c.id.startswith("splits")]))
def test_twin_matches_definition(case, monkeypatch):
    monkeypatch.setattr(twin, "_CHUNK_ROWS", 8)
    problem = build(case)
    actual = problem.run(twin.canvas_attention_twin)
    exact = plain_attention(problem, torch.float64)
    assert_as_close(actual, exact, plain_attention(problem, case.dtype))


def test_tiling_changes_nothing_but_rounding():
    case = Case("any", ((40, 9), (0, 5)), drafts_and_branches, heads=6)
    problem = build(case)
    exact, plain = (plain_attention(problem, dtype) for dtype in (torch.float64, torch.float32))
    for block_m, block_n, num_splits in [(16, 16, 1), (16, 64, 2), (64, 32, 1), (128, 128, 4)]:
        tiling = Tiling(block_m, block_n, num_splits)
        assert_as_close(problem.run(kernels.canvas_attention, tiling=tiling), exact, plain)


def test_chosen_tilings_are_launchable():
    for rows, requests in [(1, 1), (5, 5), (128, 1), (200, 3), (8192, 64), (16384, 1)]:
        for group in (1, 3, 7, 8, 32):
            for head_size, dtype in [
                (32, torch.float32),
                (80, torch.bfloat16),
                (256, torch.float16),
            ]:
                for interpreted in (False, True):
                    tiling = choose_tiling(
                        rows, requests, 2, group, head_size, dtype, 132, interpreted=interpreted
                    )
                    for size in (tiling.block_m, tiling.block_n):
                        assert size & (size - 1) == 0, tiling
                    assert min(tiling.block_m, tiling.block_n) >= 16 and tiling.block_m >= group


def test_splits_fill_idle_processors_only():
    def splits(rows, requests):
        chosen = choose_tiling(rows, requests, 8, 4, 128, torch.bfloat16, processors=132, tma=True)
        return chosen.num_splits

    assert splits(1, 1) == splits(1, 100) == 32
    assert splits(32, 1) == 16
    assert splits(128, 1) == splits(128, 128) == 4  # 1 where there are 128 tiles
    assert splits(128 * 64, 64) == splits(128 * 5, 5) == 1


@pytest.mark.parametrize(
    "position, broken",
    [
        pytest.param(0, lambda x: x.transpose(0, 2), id="query-shape"),
        pytest.param(0, lambda x: x.double(), id="query-dtype"),
        pytest.param(1, lambda x: x.half(), id="cache-dtype"),
        pytest.param(1, lambda x: x[..., 1:], id="cache-width"),
        pytest.param(2, lambda x: x[..., ::2], id="output-shape"),
        pytest.param(2, lambda x: x.mT.contiguous().mT, id="output-stride"),
        pytest.param(3, lambda x: x.long(), id="table-dtype"),
        pytest.param(3, lambda x: x.mT.contiguous().mT, id="table-stride"),
        pytest.param(4, lambda x: x[1:], id="query-start-loc-shape"),
        pytest.param(5, lambda x: x.long(), id="seq-lens-dtype"),
        pytest.param(6, lambda x: x[:-1], id="visibility-shape"),
    ],
)
def test_launcher_refuses(position, broken):
    arguments = list(build(Case("any")).arguments)
    arguments[position] = broken(arguments[position])
    with pytest.raises(AssertionError):
        kernels.canvas_attention(*arguments)


@pytest.mark.parametrize("write_kv", [write_kv_module.write_kv, twin.write_kv_twin])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page, heads, head_size", [(1, 1, 32), (3, 5, 80), (16, 2, 128)])
def test_write_kv(write_kv, page, heads, head_size, layout):
    """Every row lands in its slot, -1 rows nowhere, and nothing else of the cache changes."""
    sizes, order = (40, heads, page), LAYOUTS[layout]
    cache = torch.full([sizes[i] for i in order] + [2 * head_size], float("nan"), device=DEVICE)
    cache = cache.permute(*(order.index(i) for i in range(3)), 3)
    expected = cache.clone()
    fused = torch.randn(23, 3 * heads, head_size, device=DEVICE)
    key, value = fused[:, heads : 2 * heads], fused[:, 2 * heads :]
    slots = torch.randperm(40 * page, device=DEVICE)[:23]
    slots[[0, 7, 22]] = -1
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // page, :, slot % page] = torch.cat((key[row], value[row]), dim=-1)
    write_kv(key, value, cache, slots)
    write_kv(key[:0], value[:0], cache, slots[:0])
    torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def scales(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, device=DEVICE) for value in values]


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page, heads, head_size", [(1, 1, 32), (3, 5, 80), (16, 2, 128)])
def test_write_kv_in_fp8(page, heads, head_size, dtype, fp8):
    """The nearest FP8 of value / scale, the largest of those past it; kernel and twin alike."""
    key, value = 3 * torch.randn(2, 23, heads, head_size, device=DEVICE).to(dtype)
    key[2], value[5] = 1e6, -1e6
    units = scales(0.25, 3.0)
    slots = torch.randperm(40 * page, device=DEVICE)[:23]
    slots[[0, 7, 22]] = -1
    caches = []
    for write_kv in (write_kv_module.write_kv, twin.write_kv_twin):
        cache = torch.full((40, heads, page, 2 * head_size), 7, dtype=torch.uint8, device=DEVICE)
        write_kv(key, value, cache.view(fp8), slots, *units)
        caches.append(cache)
    kept = slots[slots >= 0]
    codes = [cache[kept // page, :, kept % page] for cache in caches]
    for cache in caches:
        cache[kept // page, :, kept % page] = 7
        assert (cache == 7).all()
    found = codes[1].view(fp8).float()
    most = torch.finfo(fp8).max
    wanted = torch.cat([x[slots >= 0].float() / unit for x, unit in zip((key, value), units)], -1)
    wanted = wanted.clamp(-most, most)
    half_step = torch.finfo(fp8).eps / 2 * wanted.abs().clamp_min(torch.finfo(fp8).tiny)
    assert ((found - wanted).abs() <= half_step).all()
    compared = torch.ones_like(found, dtype=torch.bool)
    if not ON_GPU:
        # the interpreter loses what a rounding carries into the exponent, rounds ties to the larger
        # and is off below tiny
        step = torch.finfo(fp8).eps * 2 ** found.abs().log2().floor()
        mantissa = 7 if fp8 == torch.float8_e4m3fn else 3
        compared = (codes[1] & mantissa != 0) & (found.abs() >= torch.finfo(fp8).tiny)
        compared &= (found - wanted).abs() < step / 2
    assert compared.float().mean() > 0.5 and torch.equal(*(code[compared] for code in codes))


FP8_CASES = [
    Case("fp8-odd-page", page=3, view=isolated_slots),
    Case("fp8-gqa-7-head-80", heads=7, kv_heads=1, head_size=80, view=drafts_and_branches),
    Case("fp8-unused-rows-bf16", view=every_third_unused, dtype=torch.bfloat16),
    Case("fp8-arbitrary-f16", ((21, 19), (0, 40)), arbitrary, dtype=torch.float16),
    Case("fp8-splits", FEW_ROWS, tiling=replace(SMALL, num_splits=4)),
    Case("fp8-nhd", layout="NHD", view=causal_without_context_end),
]


@pytest.mark.parametrize("case", **by_id(FP8_CASES))
@pytest.mark.parametrize("fp8", FP8)
def test_attention_over_fp8_entries(case, fp8):
    """As over what the entries stand for: with units that are powers of two, in every bit."""
    problem = build(case)
    query, cache, output, *rest = problem.arguments
    exact = case.dtype == torch.float32
    units = scales(0.3, 2.7) if exact else scales(0.5, 4.0)
    values = cache.float() / 4
    values[values.abs() < torch.finfo(fp8).tiny] = 0  # which the interpreter reads wrongly in fp16
    entries = values.to(fp8)
    size = query.shape[-1]
    meant = torch.cat(
        (units[0] * entries[..., :size].float(), units[1] * entries[..., size:].float()), -1
    )
    plain = replace(problem, arguments=(query, meant.to(query.dtype), output, *rest))
    coded = replace(problem, arguments=(query, entries, output, *rest, *units))
    for attention, options in (
        (twin.canvas_attention_twin, {}),
        (kernels.canvas_attention, {"tiling": case.tiling}),
    ):
        actual = coded.run(attention, **options)
        if exact:
            wanted, measure = (plain_attention(plain, t) for t in (torch.float64, torch.float32))
            assert_as_close(actual, wanted, measure)
        else:
            wanted = plain.run(attention, **options)
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def test_addresses_are_64_bit():
    """Blocks further apart than 2**31 elements, in memory that is reserved but hardly touched."""
    stride = 2**31 + 64
    memory = torch.empty(stride + 4 * 64, dtype=torch.float16, device=DEVICE)
    cache = memory.as_strided((2, 1, 4, 64), (stride, 0, 64, 1))
    key, value, query = torch.randn(3, 3, 1, 32, device=DEVICE).half()
    write_kv_module.write_kv(key, value, cache, torch.tensor([4, 5, 6], device=DEVICE))
    assert torch.equal(cache[1, 0, :3], torch.cat((key, value), dim=-1)[:, 0])
    table, start, length = (
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([[1]], [0, 3], [3])
    )
    output = torch.empty_like(query)
    visibility = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    kernels.canvas_attention(query, cache, output, table, start, length, visibility, 1.0)
    torch.testing.assert_close(output[0], value[0], rtol=0, atol=0)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs")
@pytest.mark.parametrize("tiling", [SMALL, replace(SMALL, num_splits=4)], ids=["whole", "splits"])
def test_captured_graph_serves_other_values(tiling):
    """The launch depends on shapes only: a graph captured on one batch is right for another."""
    shape = Case("captured", ((30, 8), (0, 8), (11, 8)), tiling=tiling)
    first = build(shape)
    other = build(replace(shape, id="replayed", requests=((17, 20), (5, 4), (20, 0))))
    output = first.arguments[2]
    graph = torch.cuda.CUDAGraph()
    kernels.canvas_attention(*first.arguments, tiling=tiling)
    with torch.cuda.graph(graph):
        kernels.canvas_attention(*first.arguments, tiling=tiling)
    for target, source in zip(first.arguments[:-1], other.arguments[:-1], strict=True):
        target.copy_(source)
    output.fill_(float("nan"))
    graph.replay()
    exact, plain = (plain_attention(other, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_close(output, exact, plain)
