"""The kernels of mask adapters against their fp32 twins, and against the definition.

Without a GPU the kernels run in Triton's interpreter. What must not be read holds NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from device import DEVICE, ON_GPU

from vllm_refusion.triton_kernels import mask_lora as kernels
from vllm_refusion.triton_kernels import mask_lora_twin as twin

MASK = 1000
TWIN = (twin.shrink_masks_twin, twin.expand_masks_twin)
KERNELS = (kernels.shrink_masks, kernels.expand_masks)
IMPLEMENTATIONS = [
    pytest.param(kernels.find_masks, id="kernel"),
    pytest.param(twin.find_masks_twin, id="twin"),
]


@dataclass(frozen=True)
class Shape:
    """``blocks``: (first column, width) of each."""

    rows: int
    masks: int
    columns: int
    out: int
    blocks: tuple[tuple[int, int], ...]
    rank: int = 16

    def __str__(self) -> str:
        blocks = "+".join(str(width) for _, width in self.blocks)
        return f"{self.masks}of{self.rows}-in{self.columns}-{blocks}-rank{self.rank}"

    @property
    def flat(self) -> list[int]:
        return [number for block in self.blocks for number in block]


SHAPES = [
    Shape(1, 1, 1, 1, ((0, 1),)),
    Shape(1, 0, 48, 5, ((0, 5),)),
    Shape(7, 3, 33, 45, ((0, 45),)),
    Shape(70, 70, 130, 200, ((0, 200),), rank=32),
    Shape(200, 65, 100, 77, ((0, 40), (40, 19), (59, 18))),
    Shape(40, 9, 1500, 600, ((0, 520), (520, 80)), rank=64),
    Shape(33, 20, 64, 90, ((10, 30), (61, 29))),  # columns of no block between and around
    Shape(5, 2, 300, 30, ((0, 10), (20, 10)), rank=256),
]


class Problem:
    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(shape.rows + shape.columns)

        def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(dtype).to(DEVICE)

        number, width = len(shape.blocks), sum(width for _, width in shape.blocks)
        self.shape = shape
        self.a = draw(number, shape.rank, shape.columns, scale=shape.columns**-0.5)
        self.b = draw(width, shape.rank, scale=shape.rank**-0.5)
        chosen = torch.randperm(shape.rows, generator=generator)[: shape.masks].sort().values
        self.chosen = chosen.to(DEVICE)
        self.rows = torch.full((shape.rows + 3,), 2**30, dtype=torch.int32, device=DEVICE)
        self.rows[: shape.masks] = self.chosen.int()
        self.count = torch.tensor([shape.masks], dtype=torch.int32, device=DEVICE)
        # of wider buffers, as views of vLLM's are
        self.x = torch.full((shape.rows, shape.columns + 3), torch.nan, dtype=dtype, device=DEVICE)
        self.x = self.x[:, : shape.columns]
        self.x[self.chosen] = draw(shape.masks, shape.columns)
        self.y = draw(shape.rows, shape.out + 5)[:, : shape.out]

    def run(self, shrink, expand, split_columns=twin.SPLIT, aside=True, **options) -> torch.Tensor:
        storage = torch.cat([self.y, self.y[:, :1]], dim=1)
        y, masks = storage[:, :-1], (self.rows, self.count)
        parts = twin.allocate_parts(self.x, self.a, split_columns).fill_(torch.nan)
        if not aside:
            shrink, expand = partial(shrink, aside=False), partial(expand, aside=False)
        shrink(parts, self.x, self.a, *masks)
        assert parts[:, self.shape.masks :].isnan().all()
        expand(y, parts, self.b, *masks, 1.7, self.shape.flat, **options)
        return y

    def others(self) -> torch.Tensor:
        """[N, out], where nothing may change."""
        untouched = torch.ones(self.y.shape, dtype=torch.bool, device=DEVICE)
        for column, width in self.shape.blocks:
            untouched[self.chosen, column : column + width] = False
        return untouched

    def expected(self) -> torch.Tensor:
        """In float64, row by row and block by block."""
        y = self.y.double()
        for row in self.chosen.tolist():
            first = 0
            for i, (column, width) in enumerate(self.shape.blocks):
                b = self.b[first : first + width].double()
                inner = self.a[i].double() @ self.x[row].double()
                y[row, column : column + width] += 1.7 * (b @ inner)
                first += width
        return y


@pytest.fixture(params=SHAPES, ids=str)
def shape(request) -> Shape:
    return request.param


def test_twin(shape):
    problem = Problem(shape)
    y = problem.run(*TWIN)
    torch.testing.assert_close(y.double(), problem.expected(), rtol=1e-5, atol=1e-5)
    assert torch.equal(y[problem.others()], problem.y[problem.others()])


@pytest.mark.parametrize("split_columns", [32, 128, 512])
def test_kernel(shape, split_columns):
    problem = Problem(shape)
    y = problem.run(*KERNELS, split_columns)
    torch.testing.assert_close(y.double(), problem.expected(), rtol=1e-5, atol=1e-5)
    assert torch.equal(y[problem.others()], problem.y[problem.others()])
    assert torch.equal(y, problem.run(*KERNELS, split_columns, aside=False, programs=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernel_in_16_bits(shape, dtype):
    """Its error is at most twice that of plain PyTorch's products in the same type.

    Or one unit in the last place of the result, which the interpreter cuts off where GPUs round.
    """
    problem = Problem(shape, dtype)
    y = problem.run(*KERNELS)
    assert torch.equal(y[problem.others()], problem.y[problem.others()])
    plain, first = problem.y.clone(), 0
    for i, (column, width) in enumerate(shape.blocks):
        b = problem.b[first : first + width]
        delta = 1.7 * (problem.x[problem.chosen] @ problem.a[i].T @ b.T)
        plain[problem.chosen, column : column + width] += delta
        first += width

    def error(found: torch.Tensor) -> float:
        return (found.double() - problem.expected()).abs().max().item()

    last_place = torch.finfo(dtype).eps * problem.expected().abs().max().item()
    assert error(y) <= max(2 * error(plain), last_place)


def test_more_masks_than_rows_of_programs():
    """Programs take turns once there are more tiles of masks than programs."""
    rows = kernels.ROW_PROGRAMS * 64 + 70
    problem = Problem(Shape(rows, rows - 1, 8, 8, ((0, 8),)))
    y = problem.run(*KERNELS)
    torch.testing.assert_close(y.double(), problem.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not ON_GPU, reason="streams are a GPU's")
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_aside_of_a_linear_layer(captured):
    """What the layer reads and writes on the current stream: 50 one behind the other."""
    problem = Problem(Shape(300, 200, 1024, 1024, ((0, 1024),), rank=64))
    weight = torch.randn(1024, 1024, device=DEVICE) / 40
    first = problem.x.nan_to_num().contiguous()

    def layers(x, **how):
        for _ in range(50):
            parts, masks = twin.allocate_parts(x, problem.a), (problem.rows, problem.count)
            kernels.shrink_masks(parts, x, problem.a, *masks, **how)
            y = x @ weight
            kernels.expand_masks(y, parts, problem.b, *masks, 0.5, [0, 1024], **how)
            x = y
        return x

    expected, found = layers(first, aside=False), layers(first, aside=True)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = layers(first, aside=True)
        graph.replay()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("find", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("padded", "num_rows"), [(1, 1), (5, 0), (40, 33), (2500, 2400)])
def test_find_masks(find, dtype, padded, num_rows):
    generator = torch.Generator().manual_seed(padded)
    ids = torch.randint(MASK - 2, MASK + 1, (padded,), generator=generator).to(dtype)
    wanted = [row for row in range(num_rows) if ids[row] == MASK]
    without = torch.where(ids == MASK, 0, ids)
    ids = ids.to(DEVICE)
    rows = torch.full((padded + 2,), -7, dtype=torch.int32, device=DEVICE)
    count = torch.full((1,), 99, dtype=torch.int32, device=DEVICE)
    find(ids, num_rows, MASK, rows, count)
    assert count.item() == len(wanted)
    assert rows.tolist() == wanted + [-7] * (len(rows) - len(wanted))
    assert torch.equal(ids.cpu(), without)


@pytest.mark.parametrize(
    "embed",
    [
        pytest.param(kernels.embed_masks, id="kernel"),
        pytest.param(twin.embed_masks_twin, id="twin"),
    ],
)
@pytest.mark.parametrize(("rows", "hidden", "masks"), [(1, 1, 1), (9, 70, 0), (300, 1100, 200)])
def test_embed_masks(embed, rows, hidden, masks):
    y = torch.randn(rows, hidden, device=DEVICE)
    embedding = torch.randn(hidden, device=DEVICE)
    chosen = torch.randperm(rows)[:masks].sort().values.to(DEVICE)
    listed = torch.full((rows,), 2**30, dtype=torch.int32, device=DEVICE)
    listed[:masks] = chosen.int()
    expected = y.clone()
    expected[chosen] = embedding
    embed(y, embedding, listed, torch.tensor([masks], dtype=torch.int32, device=DEVICE))
    assert torch.equal(y, expected)
