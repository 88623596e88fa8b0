"""The parts of the vLLM-facing classes that can be tested without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from vllm_refusion.decoding.params import DecodingParams
from vllm_refusion.decoding.penalties import Penalties
from vllm_refusion.decoding.picking import PickLimits
from vllm_refusion.decoding.state import DecodeState
from vllm_refusion.engine.compat import count_passes
from vllm_refusion.engine.grammar_masks import GrammarMasks
from vllm_refusion.engine.sampler import LOGITS_CHUNK_BYTES, CanvasSampler
from vllm_refusion.engine.scheduler import ReFusionScheduler, _CanvasScheduling


def scheduler(async_scheduling=False, fuses_passes=False, running=1):
    made = object.__new__(ReFusionScheduler)
    made.decoding_defaults = DecodingParams(8, 32)
    made.scheduler_config = SimpleNamespace(async_scheduling=async_scheduling)
    made.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))
    made.fuses_passes = fuses_passes
    made.canvas_length = 64
    made.max_num_scheduled_tokens = 300
    made.running = [None] * running
    return made


def request(prompt=10, emitted=0, max_tokens=100, **extra_args):
    return SimpleNamespace(
        num_prompt_tokens=prompt,
        num_output_tokens=emitted,
        num_tokens=prompt + emitted,
        sampling_params=SamplingParams(max_tokens=max_tokens, extra_args=extra_args or None),
    )


@pytest.mark.parametrize(
    ("emitted", "width", "async_width"),
    [(0, 32, 32), (5, 32, 32), (8, 24, 32), (32, 32, 32), (90, 8, 16), (96, 8, 8), (99, 8, 8)],
)
def test_canvas_width(emitted, width, async_width):
    """What is left of the block; while a pass is in flight, a whole block. 100 tokens: 13 slots.

    Of a slot delivered in part nothing need be committed.
    """
    assert scheduler().canvas_width(request(emitted=emitted)) == width
    assert scheduler(async_scheduling=True).canvas_width(request(emitted=emitted)) == async_width
    own = request(slot_size=4, block_length=16)
    assert scheduler().canvas_width(own) == 16


@pytest.mark.parametrize("emitted", [0, 5, 96])
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_canvas_width_with_riders(emitted, async_scheduling):
    """A share of the step, at most the canvas; what the phase may need goes before.

    That is up to a slot of 8 more than without riders, unless block and slot fill the canvas.
    """

    def width(running, **options):
        made = scheduler(async_scheduling, fuses_passes=True, running=running)
        return made.canvas_width(request(emitted=emitted, **options))

    assert [width(running) for running in (0, 1, 4, 5)] == [64, 64, 64, 60]
    needed = scheduler(async_scheduling).canvas_width(request(emitted=emitted))
    assert width(30) == max(10, needed + 8)
    assert width(300) == needed + 8
    assert width(300, block_length=64, max_tokens=160) <= 64


def test_a_prompt_is_admitted_with_room_for_its_canvas():
    made = scheduler()
    assert made._lookahead(request(prompt=10), 7) == 32
    assert made._lookahead(request(prompt=10), 10) == 32
    assert made._lookahead(request(prompt=10, max_tokens=3), 10) == 8
    assert scheduler(fuses_passes=True)._lookahead(request(prompt=10), 7) == 64


def test_pages_are_not_reserved_past_the_last_slot():
    made = scheduler(async_scheduling=True)
    assert made._lookahead(request(emitted=32), 10 + 32 + 32) == 0
    # two canvases of 16 from position 90: the response ends at 104
    assert made._lookahead(request(emitted=90), 10 + 90 + 32) == -18


def test_riders_may_reach_past_the_last_slot():
    made = scheduler(async_scheduling=True, fuses_passes=True)
    assert made._lookahead(request(emitted=90), 10 + 90 + 64) == 0


def test_the_first_canvas_comes_with_the_end_of_the_prompt():
    """Of short prompts that are new and end in this step, while the step has room."""
    made = scheduler(fuses_passes=True)

    def rows(scheduled, max_tokens=100, **changes):
        made.requests = {}
        for name in scheduled:
            made.requests[name] = request(prompt=100, max_tokens=max_tokens)
            vars(made.requests[name]).update({"num_computed_tokens": 0, "num_preemptions": 0})
            vars(made.requests[name]).update(changes)
            count_passes(made.requests[name], canvas_length=32)
        step = SimpleNamespace(
            num_scheduled_tokens=dict(scheduled),
            total_num_scheduled_tokens=sum(scheduled.values()),
            scheduled_spec_decode_tokens={},
        )
        made._plan_with_prompts(step)
        assert sum(step.num_scheduled_tokens.values()) == step.total_num_scheduled_tokens
        drafts = step.scheduled_spec_decode_tokens
        for name, count in scheduled.items():
            assert step.num_scheduled_tokens[name] == count + len(drafts.get(name, ()))
        return step.num_scheduled_tokens

    assert rows({"a": 100}) == {"a": 132}
    assert rows({"a": 99}) == {"a": 99}
    assert rows({"a": 40}, num_computed_tokens=60) == {"a": 72}
    assert rows({"a": 100}, num_preemptions=1) == {"a": 100}
    assert rows({"a": 100, "b": 100, "c": 50}) == {"a": 132, "b": 100, "c": 50}
    assert rows({"a": 100}, max_tokens=3) == {"a": 108}
    made.max_num_scheduled_tokens = 10_000
    assert rows({"a": 2049}, num_prompt_tokens=2049, num_tokens=2049) == {"a": 2049}
    assert rows({"a": 481}, num_prompt_tokens=481, num_tokens=481) == {"a": 481}


class Model:
    """Records the rows whose logits were asked for."""

    def __init__(self):
        self.rows = []

    def row_logits(self, hidden_states, requests=None):
        self.rows.append(hidden_states.shape[0])
        return torch.randn(hidden_states.shape[0], 50)


def sampler(max_requests=4, canvas=16, vocab_size=50):
    state = DecodeState(max_requests, canvas, 64, 49, "cpu")
    lengths = SimpleNamespace(gpu=torch.zeros(max_requests, dtype=torch.int32))
    from vllm_refusion.triton_kernels.dispatch import operations

    on_cpu = operations(torch.device("cpu"))
    return CanvasSampler(
        SimpleNamespace(
            additional_config={},
            model_config=SimpleNamespace(dtype=torch.float32, logprobs_mode="raw_logprobs"),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
        ),
        Model(),
        on_cpu,
        state,
        SimpleNamespace(num_computed_tokens=lengths, prefill_len=lengths),
        PickLimits(max_requests, vocab_size, "cpu"),
        Penalties(max_requests, vocab_size, "cpu"),
        SimpleNamespace(enabled=False),
        {},
        set(),
        set(),
        GrammarMasks(state, on_cpu, {}),
    )


def batch(requests, drafts):
    """A batch of idle requests with ``drafts`` canvas rows each."""
    starts = torch.arange(requests + 1, dtype=torch.int32) * max(drafts, 1)
    return SimpleNamespace(
        num_reqs=requests,
        num_draft_tokens=requests * drafts,
        num_draft_tokens_per_req=np.full(requests, drafts),
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
    made.penalties.add(2, [1], [], presence=1.0)  # beside a copy in float32, smaller ones
    made.model.rows.clear()
    made(torch.zeros(64, 8), batch(4, 16))
    assert made.model.rows == [6] * 10 + [4]


def test_compiling_leaves_nothing_behind():
    made = sampler()
    made.compile(torch.zeros(1, 8))
    assert made.model.rows == [1]
    assert made.limits.used is None and made.penalties.used is None
    assert not made.state.ints.any() and not made.picked.any() and not made.given_prob.any()


def test_chunks_of_a_real_vocabulary_are_bounded():
    made = sampler(max_requests=256, canvas=128, vocab_size=151936)
    assert made.chunk_rows * 151936 * 4 <= LOGITS_CHUNK_BYTES
    assert made.chunk_rows >= 512


def test_steps_without_a_canvas_emit_nothing():
    """vLLM's scheduler expects no tokens of a prefill."""
    made = sampler()
    assert made._emit_limit(batch(3, 0)).tolist() == [0] * 3
    assert made._emit_limit(batch(3, 16)).tolist() == [16] * 3


def test_idle_requests_neither_emit_nor_keep_rows():
    made = sampler()
    output = made(torch.zeros(64, 8), batch(4, 16))
    assert output.num_sampled.tolist() == [0] * 4
    assert output.num_rejected.tolist() == [16] * 4


def test_scores_of_a_prompt_wait_for_tokens_whatever_is_drafted():
    """A step may give a request drafts and no token; to vLLM's scheduler it gave nothing."""
    delivered = []

    class Stock:
        def update_from_output(self, scheduled, output):
            delivered.append(dict(output.prompt_logprobs_dict))
            return {}

    class Scheduling(_CanvasScheduling, Stock):
        def __init__(self):
            self._prompt_scores, self._prompt_token_scores = {}, {}
            self._allowed, self._complete = {}, []
            self.requests = {"a": SimpleNamespace(num_output_tokens=0)}

    scheduling, scores = Scheduling(), {"a": "scores"}
    for tokens in ([-1, 7, 8], [], [5, -1, 7]):
        output = SimpleNamespace(
            req_id_to_index={"a": 0},
            sampled_token_ids=[tokens],
            prompt_logprobs_dict=scores,
            prompt_token_id_logprobs_dict={},
        )
        scheduling.update_from_output(SimpleNamespace(scheduled_spec_decode_tokens={}), output)
        scores = {}
    assert delivered == [{}, {}, {"a": "scores"}]
