"""The parts of the vLLM-facing classes that can be tested without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams

from vllm_refusion.config import DecodingParams
from vllm_refusion.decoding import DecodeState
from vllm_refusion.picking import PickLimits
from vllm_refusion.scheduler import ReFusionScheduler
from vllm_refusion.state import LOGITS_CHUNK_BYTES, CanvasSampler


def scheduler(async_scheduling=False):
    made = object.__new__(ReFusionScheduler)
    made.decoding_defaults = DecodingParams(8, 32)
    made.scheduler_config = SimpleNamespace(async_scheduling=async_scheduling)
    return made


def request(prompt=10, emitted=0, max_tokens=100, **extra_args):
    return SimpleNamespace(
        num_prompt_tokens=prompt,
        num_output_tokens=emitted,
        num_tokens=prompt + emitted,
        max_tokens=max_tokens,
        sampling_params=SamplingParams(extra_args=extra_args or None),
    )


@pytest.mark.parametrize(
    ("emitted", "width", "async_width"),
    [(0, 32, 32), (5, 27, 32), (32, 32, 32), (90, 6, 14), (96, 8, 8), (100, 4, 4)],
)
def test_canvas_width(emitted, width, async_width):
    """What is left of the block; while a pass is in flight, a whole block. 100 tokens: 13 slots."""
    assert scheduler().canvas_width(request(emitted=emitted)) == width
    assert scheduler(async_scheduling=True).canvas_width(request(emitted=emitted)) == async_width
    own = request(slot_size=4, block_length=16)
    assert scheduler().canvas_width(own) == 16


def test_a_prompt_is_admitted_with_room_for_its_canvas():
    made = scheduler()
    assert made._lookahead(request(prompt=10), 7) == 32
    assert made._lookahead(request(prompt=10), 10) == 32
    assert made._lookahead(request(prompt=10, max_tokens=3), 10) == 8


def test_pages_are_not_reserved_past_the_last_slot():
    made = scheduler(async_scheduling=True)
    assert made._lookahead(request(emitted=32), 10 + 32 + 32) == 0
    # two canvases of 14 from position 90: the response ends at 104
    assert made._lookahead(request(emitted=90), 10 + 90 + 28) == -14


class Model:
    """Records the rows whose logits were asked for."""

    def __init__(self):
        self.rows = []

    def row_logits(self, hidden_states):
        self.rows.append(hidden_states.shape[0])
        return torch.randn(hidden_states.shape[0], 50)


def sampler(max_requests=4, canvas=16, vocab_size=50):
    state = DecodeState(max_requests, canvas, 64, 49, "cpu")
    lengths = SimpleNamespace(gpu=torch.zeros(max_requests, dtype=torch.int32))
    from vllm_refusion.triton_kernels.dispatch import operations

    return CanvasSampler(
        SimpleNamespace(
            model=Model(),
            operations=operations(torch.device("cpu")),
            decode_state=state,
            limits=PickLimits(max_requests, vocab_size, "cpu"),
            records={},
            req_states=SimpleNamespace(num_computed_tokens=lengths, prefill_len=lengths),
            model_config=SimpleNamespace(get_vocab_size=lambda: vocab_size),
            dtype=torch.float32,
        )
    )


def batch(requests, drafts):
    """A batch of idle requests with ``drafts`` canvas rows each."""
    starts = torch.arange(requests + 1, dtype=torch.int32) * max(drafts, 1)
    return SimpleNamespace(
        num_reqs=requests,
        num_draft_tokens=requests * drafts,
        idx_mapping=torch.arange(requests),
        query_start_loc=starts,
        cu_num_logits=torch.arange(requests + 1, dtype=torch.int32) * drafts,
        expanded_idx_mapping=torch.arange(requests).repeat_interleave(drafts),
        expanded_local_pos=torch.arange(drafts, dtype=torch.int32).repeat(requests),
    )


def test_memory_profiling_pays_for_the_widest_chunk_of_logits():
    """vLLM profiles with one row a request, where a step has as many as the canvas."""
    made = sampler()
    made(torch.zeros(4, 8), batch(4, 0))
    assert made.model.rows == [4 * 16]


def test_logits_are_read_in_chunks():
    made = sampler()
    made.chunk_rows = 24
    made(torch.zeros(64, 8), batch(4, 16))
    assert made.model.rows == [24, 24, 16]


def test_chunks_of_a_real_vocabulary_are_bounded():
    made = sampler(max_requests=256, canvas=128, vocab_size=151936)
    assert made.chunk_rows * 151936 * 4 <= LOGITS_CHUNK_BYTES
    assert made.chunk_rows >= 512


def test_idle_requests_neither_emit_nor_keep_rows():
    made = sampler()
    output = made(torch.zeros(64, 8), batch(4, 16))
    assert output.num_sampled.tolist() == [0] * 4
    assert output.num_rejected.tolist() == [16] * 4
