"""The twins of the runner's kernels against vLLM's own, which the interpreter runs here."""

from __future__ import annotations

import inspect

import pytest
import torch
from device import ON_GPU
from torch import Tensor
from vllm.v1.worker.cpu import shm  # noqa: F401 a CPU's buffers
from vllm.v1.worker.gpu import input_batch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from vllm_refusion import register
from vllm_refusion.engine import cpu_step

pytestmark = pytest.mark.skipif(ON_GPU, reason="of engines on a CPU")
CAPACITY, LONGEST, PAGE = 8, 64, 4


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


class Batch:
    """Requests of so many rows each, in an order of their own; tables of CAPACITY requests."""

    def __init__(self, lengths: list[int]) -> None:
        self.generator = torch.Generator().manual_seed(len(lengths))
        self.requests = len(lengths)
        self.order = torch.randperm(CAPACITY, generator=self.generator)[: self.requests].int()
        self.starts = self._starts(lengths)
        self.logits_starts = self._starts([min(length, 4) for length in lengths])
        self.rows, self.logits = int(self.starts[-1]), int(self.logits_starts[-1])
        self.computed, self.prompts = self.draw(20, CAPACITY), self.draw(30, CAPACITY)

    def _starts(self, lengths: list[int]) -> Tensor:
        ends = torch.tensor(lengths).cumsum(0)
        return torch.cat((ends.new_zeros(1), ends)).int()

    def draw(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator, dtype=torch.int32)


@pytest.fixture(params=[[5], [3, 1, 7], [2, 0, 4, 1]], ids=str)
def batch(request):
    return Batch(request.param)


def check(theirs, ours, shared: list, more=()) -> None:
    """Both return the same and leave the same in their arguments, ``more`` being only theirs."""
    results = []
    for function, last in ((theirs, more), (ours, ())):
        own = [value.clone() if isinstance(value, Tensor) else value for value in shared]
        returned = function(*own, *last)
        values = returned if isinstance(returned, tuple) else (returned,)
        results.append([v for v in (*own, *values) if isinstance(v, Tensor)])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found) and expected.dtype == found.dtype


def test_prompts(batch):
    ids, ahead = torch.zeros(20, dtype=torch.int32), torch.zeros(2, CAPACITY, dtype=torch.int32)
    tokens = batch.draw(99, CAPACITY, LONGEST)
    shared = [ids, ahead, batch.order, batch.starts, tokens, batch.prompts, batch.computed]
    check(input_batch.prepare_prefill_inputs, cpu_step.prepare_prefill_inputs, shared)


def test_positions(batch):
    positions, lengths = torch.zeros(20, dtype=torch.int64), batch.draw(9, CAPACITY)
    shared = [batch.order, batch.starts, batch.computed, positions, lengths]
    check(input_batch.prepare_pos_seq_lens, cpu_step.prepare_pos_seq_lens, shared)


def test_drafts(batch):
    last, ids = torch.zeros(CAPACITY, dtype=torch.int64), batch.draw(99, 20)
    lengths, drafts = batch.draw(40, CAPACITY), batch.draw(99, CAPACITY, 6).long()
    shared = [ids, batch.order, last, batch.starts, lengths, batch.prompts, drafts]
    shared += [batch.logits_starts, batch.logits]
    theirs, ours = input_batch, cpu_step
    check(
        theirs.combine_sampled_and_draft_tokens, ours.combine_sampled_and_draft_tokens, shared, [0]
    )


def test_rows_of_logits(batch):
    shared = [batch.order, batch.logits, batch.logits_starts, 4]
    check(input_batch.expand_idx_mapping, cpu_step.expand_idx_mapping, shared)


@pytest.mark.parametrize("left", [False, True])
def test_tokens_of_a_step(batch, left):
    """``left``: a request that ended while the step ran."""
    order = batch.order.clone()
    if left:
        order[0] = -1
    shared = [order, batch.computed, torch.zeros(CAPACITY, 1, dtype=torch.int64)]
    shared += [batch.draw(99, batch.requests, 6), batch.draw(7, batch.requests)]
    shared += [batch.draw(3, batch.requests), batch.starts]
    shared += [batch.draw(99, CAPACITY, LONGEST), batch.draw(20, CAPACITY)]

    def theirs(idx_mapping, computed, last, *others):
        return input_batch.post_update(idx_mapping, computed, last, None, *others)

    check(theirs, cpu_step.post_update, shared)


def test_staged_writes():
    writes = [(2, 1, [5, 6]), (0, 3, [7]), (2, 3, [8, 9, 10])]
    found = []
    for apply in (inspect.unwrap(StagedWriteTensor.apply_write), StagedWriteTensor.apply_write):
        staged = StagedWriteTensor((4, 8), torch.int32, torch.device("cpu"))
        for write in writes:
            staged.stage_write(*write)
        apply(staged)
        apply(staged)  # nothing is staged any more
        found.append(staged.gpu)
    assert torch.equal(*found) and found[0][2].tolist() == [0, 5, 6, 8, 9, 10, 0, 0]


def test_staged_numbers():
    staged = StagedWriteTensor(4, torch.float32, torch.device("cpu"))
    staged.stage_write_elem(2, 0.5)
    staged.apply_write()
    assert staged.gpu.tolist() == [0, 0, 0.5, 0]


def test_block_tables(batch):
    """Of a batch that is smaller than the one before it, with a request that is padding."""
    pages, found = batch.draw(99, CAPACITY, LONGEST // PAGE), []
    order = batch.order.clone()
    order[-1] = -1
    positions = torch.cat([torch.arange(n) for n in batch.starts.diff()]) + 3
    for unwrap in (inspect.unwrap, lambda function: function):
        tables = BlockTables([PAGE], CAPACITY, 20, [LONGEST // PAGE], torch.device("cpu"))
        for req, row in enumerate(pages.tolist()):
            tables.append_block_ids(req, (row,), overwrite=True)
        tables.apply_staged_writes()
        gather = unwrap(BlockTables.gather_block_tables)
        gather(tables, torch.arange(CAPACITY, dtype=torch.int32), num_reqs_padded=CAPACITY)
        (gathered,) = gather(tables, batch.order, num_reqs_padded=CAPACITY)
        slots = unwrap(BlockTables.compute_slot_mappings)(
            tables, order, batch.starts, positions, num_tokens_padded=batch.rows + 2
        )
        found.append((gathered.clone(), slots.clone()))
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs, ours)
    assert found[0][1][0, batch.rows :].eq(-1).all()
