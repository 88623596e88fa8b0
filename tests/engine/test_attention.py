"""The attention backend: which rows FlashAttention gets, and that every row is attended to once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from device import DEVICE

from vllm_refusion.engine import compat
from vllm_refusion.engine.attention import (
    CanvasAttentionBackend,
    CanvasAttentionImpl,
    CanvasAttentionMetadata,
    PromptTail,
)
from vllm_refusion.engine.model_state import ReFusionModelState
from vllm_refusion.triton_kernels import canvas_attention as kernel_module
from vllm_refusion.triton_kernels.canvas_attention_twin import canvas_attention_twin

HEADS, KV_HEADS, HEAD_SIZE, PAGE = 4, 2, 64, 16
SCALE = HEAD_SIZE**-0.5
# (entries before this pass, rows of this pass): two canvases, then two prompts
REQUESTS = ((40, 8), (21, 5), (0, 37), (16, 20))


def flash_double(q, k, v, *, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, **options):
    """FlashAttention's arguments, the twin's arithmetic."""
    assert options.pop("causal") and options.pop("softmax_scale") == SCALE
    lengths = cu_seqlens_q.diff()
    assert len(lengths) == len(seqused_k)
    assert (max_seqlen_q, max_seqlen_k) == (lengths.max(), seqused_k.max())
    kv_cache = torch.cat((k, v), dim=-1).transpose(1, 2)
    causal = torch.zeros(len(q), 4, dtype=torch.int32, device=q.device)
    canvas_attention_twin(
        q, kv_cache, out, options.pop("block_table"), cu_seqlens_q, seqused_k, causal, SCALE
    )
    assert not options


def batch(tail: PromptTail | None) -> tuple[tuple, CanvasAttentionMetadata]:
    """Arguments of ``forward`` and metadata; canvases are isolated slots of four rows."""
    generator = torch.Generator().manual_seed(0)
    rows = [length for _, length in REQUESTS]
    pages = [-(-sum(request) // PAGE) for request in REQUESTS]
    shape = (sum(pages), KV_HEADS, PAGE, 2 * HEAD_SIZE)
    kv_cache = torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)
    query = torch.randn(sum(rows), HEADS, HEAD_SIZE, generator=generator).to(DEVICE, torch.bfloat16)
    table = torch.zeros(len(rows), max(pages), dtype=torch.int32)
    for index, numbers in enumerate(torch.arange(sum(pages)).split(pages)):
        table[index, : len(numbers)] = numbers
    view = []
    for index, (context, length) in enumerate(REQUESTS):
        canvas = index < 2
        view += [
            (context, 0, 0, context + row // 4 * 4) if canvas else (0, 0, 0, 0)
            for row in range(length)
        ]
    metadata = CanvasAttentionMetadata(
        query_start_loc=torch.tensor([0, *np.cumsum(rows)], dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor([sum(r) for r in REQUESTS], dtype=torch.int32, device=DEVICE),
        block_table=table.to(DEVICE),
        num_actual_tokens=sum(rows),
        visibility=torch.tensor(view, dtype=torch.int32, device=DEVICE),
        prompt_tail=tail,
    )
    return (None, query, None, None, kv_cache), metadata


def attend(flash, tail: PromptTail | None) -> torch.Tensor:
    impl = CanvasAttentionImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS)
    impl.flash_attention = flash
    arguments, metadata = batch(tail)
    output = torch.full_like(arguments[1], float("nan"))
    return impl.forward(*arguments, metadata, output)


TAIL = PromptTail(first_request=2, first_row=13, max_query_len=37, max_seq_len=37)


def test_prompts_go_to_flash_attention_and_canvases_do_not():
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["cu_seqlens_q"].tolist())
        flash_double(*args, **kwargs)

    expected = attend(None, None)
    assert not expected.isnan().any()
    torch.testing.assert_close(attend(counted, TAIL), expected, rtol=2**-7, atol=2**-7)
    assert calls == [[13, 50, 70]]
    attend(counted, None)
    attend(None, TAIL)
    assert len(calls) == 1


@pytest.mark.skipif(
    DEVICE == "cpu" or compat.flash_attention_3(HEAD_SIZE) is None, reason="FlashAttention 3"
)
def test_flash_attention_3_takes_the_end_of_a_batch():
    expected = attend(None, None)
    actual = attend(compat.flash_attention_3(HEAD_SIZE), TAIL)
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)


def test_compiling_launches_every_kind_of_tiles_without_rows(monkeypatch):
    launched = []

    def launch(query, kv_cache, output, block_table, starts, seq_lens, *others):
        assert not starts.any() and len(block_table) == len(seq_lens) == len(starts) - 1
        assert kv_cache.dtype == torch.float8_e4m3fn and others[2:] == (1, 2)
        launched.append((len(query), len(seq_lens)))

    monkeypatch.setattr(kernel_module, "canvas_attention", launch)
    impl = CanvasAttentionImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, kv_cache_dtype="fp8")
    kv_cache = torch.zeros(2, KV_HEADS, PAGE, 2 * HEAD_SIZE, dtype=torch.uint8, device=DEVICE)
    layer = SimpleNamespace(kv_cache=kv_cache, _k_scale=1, _v_scale=2)
    impl.compile_for(layer, torch.bfloat16, most_rows=100, most_requests=40)
    assert (1, 1) in launched and (33, 33) in launched
    assert len(set(launched)) == len(launched) < 20


def test_float32_prompts_stay_with_our_kernel():
    impl = CanvasAttentionImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS)
    impl.flash_attention = lambda *args, **kwargs: pytest.fail("called")
    arguments, metadata = batch(TAIL)
    arguments = tuple(x if x is None else x.float() for x in arguments)
    output = torch.full_like(arguments[1], float("nan"))
    assert not impl.forward(*arguments, metadata, output).isnan().any()


@pytest.mark.parametrize(
    ("is_prompt", "expected"),
    [
        ([1, 1, 1], PromptTail(0, 0, 9, 30)),
        ([0, 1, 1], PromptTail(1, 4, 9, 30)),
        ([1, 0, 1], PromptTail(2, 13, 7, 20)),
        ([1, 1, 0], None),
        ([0, 0, 0], None),
    ],
)
def test_the_tail_is_the_longest_run_of_prompts_at_the_end(is_prompt, expected):
    starts, lengths = np.array([0, 4, 13, 20, 20]), np.array([5, 30, 20])
    assert PromptTail.of_batch(np.array(is_prompt, dtype=bool), starts, lengths) == expected


def test_a_prefill_that_repeats_committed_tokens_is_no_prompt():
    state = object.__new__(ReFusionModelState)
    state._repeats_tokens = np.array([False, False, True, False])
    state.serial = set()
    input_batch = SimpleNamespace(
        is_prefilling_np=np.array([True, True, True]),
        idx_mapping_np=np.array([3, 2, 0]),
        num_draft_tokens_per_req=None,
        query_start_loc_np=np.array([0, 8, 16, 28]),
        num_computed_prefill_tokens_np=np.array([0, 0, 5]),
        num_scheduled_tokens=np.array([8, 8, 12]),
    )
    assert state._causal_tail(input_batch) == PromptTail(2, 16, 12, 17)
    input_batch.num_draft_tokens_per_req = np.array([0, 0, 4])
    assert state._causal_tail(input_batch) is None


def test_first_canvases_of_serial_mode_are_causal_where_all_of_a_batch_is():
    state = object.__new__(ReFusionModelState)
    state._repeats_tokens = np.zeros(4, dtype=bool)
    state.serial = {0, 2}
    input_batch = SimpleNamespace(
        is_prefilling_np=np.array([True, True, True]),
        idx_mapping_np=np.array([2, 3, 0]),
        num_draft_tokens_per_req=np.array([4, 0, 4]),
        query_start_loc_np=np.array([0, 12, 20, 32]),
        num_computed_prefill_tokens_np=np.array([0, 0, 0]),
        num_scheduled_tokens=np.array([12, 8, 12]),
    )
    assert state._causal_tail(input_batch) == PromptTail(0, 0, 12, 12)
    # rows of canvases before it are dealt on the device
    input_batch.is_prefilling_np = np.array([False, True, True])
    assert state._causal_tail(input_batch) is None
    input_batch.is_prefilling_np = np.array([True, True, True])
    state.serial = {0}  # a canvas of parallel mode is not causal
    assert state._causal_tail(input_batch) is None


def test_pages_are_a_multiple_of_what_the_kernel_likes(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(
        type(current_platform), "is_device_capability_family", lambda *a, **k: True, raising=False
    )
    assert CanvasAttentionBackend.get_preferred_block_size(16) == 64
    assert CanvasAttentionBackend.get_preferred_block_size(128) == 128
