"""Attention backend: paged context and canvas, with visibility per query row."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_refusion.engine import compat
from vllm_refusion.engine.settings import position_slack
from vllm_refusion.triton_kernels.dispatch import operations
from vllm_refusion.triton_kernels.tiling import HOPPER_PAGE

FLASH_DTYPES = (torch.float16, torch.bfloat16)
PLAIN_KV_DTYPES = ("auto", "float32", "bfloat16", "float16")
FP8_KV_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
KV_DTYPES = (*PLAIN_KV_DTYPES, *FP8_KV_DTYPES)  # a quantised checkpoint may ask for another


@dataclass(frozen=True, kw_only=True)
class CanvasAttentionSpec(FullAttentionSpec):
    """Full attention whose requests may use a few positions past max_model_len."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        length = vllm_config.model_config.max_model_len + position_slack(vllm_config)
        return cdiv(length, self.block_size) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return super().max_num_blocks_per_req(vllm_config, max_len + position_slack(vllm_config))


@dataclass(frozen=True)
class PromptTail:
    """The requests that end a batch, all of them prompts: their rows are plainly causal."""

    first_request: int
    first_row: int
    max_query_len: int
    max_seq_len: int

    @classmethod
    def of_batch(
        cls, is_prompt: np.ndarray, query_start_loc: np.ndarray, seq_lens: np.ndarray
    ) -> PromptTail | None:
        """The longest tail of prompts; None when the last request is not one.

        Args:
            is_prompt: [R] bool.
            query_start_loc: [>= R+1].
            seq_lens: [R], exact where ``is_prompt``.
        """
        requests = len(is_prompt)
        others = np.flatnonzero(~is_prompt)
        first = int(others[-1]) + 1 if len(others) else 0
        if first == requests:
            return None
        starts = query_start_loc[first : requests + 1]
        return cls(first, int(starts[0]), int(np.diff(starts).max()), int(seq_lens[first:].max()))


@dataclass
class CanvasAttentionMetadata:
    """Inputs of ``canvas_attention`` that all layers share."""

    query_start_loc: torch.Tensor  # [R+1] int32
    seq_lens: torch.Tensor  # [R] int32
    block_table: torch.Tensor  # [R, max_pages] int32
    num_actual_tokens: int
    visibility: torch.Tensor | None = None  # [N, 4] int32, set by ReFusionModelState
    # set by it too where no CUDA graph would keep it
    prompt_tail: PromptTail | None = None
    feeds_masks: bool = True  # false where the host knows that no row is a mask


class CanvasAttentionMetadataBuilder(AttentionMetadataBuilder[CanvasAttentionMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CanvasAttentionMetadata:
        return CanvasAttentionMetadata(
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> CanvasAttentionMetadata:
        return self.build(0, common_attn_metadata)


class CanvasAttentionImpl(AttentionImpl):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        unsupported = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            "attn_type": attn_type if attn_type != AttentionType.DECODER else None,
            "kv_cache_dtype": None if kv_cache_dtype in KV_DTYPES else kv_cache_dtype,
        }
        present = {name: value for name, value in unsupported.items() if value is not None}
        if present:
            raise ValueError(f"ReFusion's attention does not support {present}.")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.fp8 = FP8_KV_DTYPES.get(kv_cache_dtype)
        # with FP8 entries it wants queries in FP8 too
        self.flash_attention = None if self.fp8 else compat.flash_attention_3(head_size)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes the rows' K and V at their slots; slot -1 writes nothing.

        Args:
            key, value: [N, Hkv, D].
            kv_cache: [num_blocks, Hkv, page, 2*D] under any strides.
            slot_mapping: [<=N] int64; rows past its end are CUDA-graph padding.
        """
        rows = slot_mapping.shape[0]
        operations(key.device).write_kv(
            key[:rows],
            value[:rows],
            self._entries(kv_cache),
            slot_mapping,
            *self._scales(layer),
        )

    def compile_for(
        self, layer: Any, dtype: torch.dtype, most_rows: int, most_requests: int
    ) -> None:
        """Compiles what any step of at most so many rows and requests needs."""
        from vllm_refusion.triton_kernels.canvas_attention import compile_for

        compile_for(
            self._entries(layer.kv_cache),
            self.num_heads,
            dtype,
            most_rows,
            most_requests,
            *self._scales(layer),
        )

    def _entries(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """vLLM allocates FP8 as bytes."""
        return kv_cache if self.fp8 is None else kv_cache.view(self.fp8)

    def _scales(self, layer: Any) -> tuple[torch.Tensor, ...]:
        return () if self.fp8 is None else (layer._k_scale, layer._v_scale)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CanvasAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the rows [N, Hq, D] over the paged KV, into ``output``."""
        assert output_scale is None and output_block_scale is None
        if attn_metadata is None:  # memory profiling
            return output.fill_(0)
        rows, requests = attn_metadata.num_actual_tokens, len(attn_metadata.seq_lens)
        tail = attn_metadata.prompt_tail
        if tail is not None and self.flash_attention and query.dtype in FLASH_DTYPES:
            self._attend_to_prompts(query[:rows], kv_cache, attn_metadata, tail, output[:rows])
            rows, requests = tail.first_row, tail.first_request
        operations(query.device).canvas_attention(
            query[:rows],
            self._entries(kv_cache),
            output[:rows],
            attn_metadata.block_table[:requests],
            attn_metadata.query_start_loc[: requests + 1],
            attn_metadata.seq_lens[:requests],
            attn_metadata.visibility[:rows],
            self.scale,
            *self._scales(layer),
        )
        return output

    def _attend_to_prompts(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CanvasAttentionMetadata,
        tail: PromptTail,
        output: torch.Tensor,
    ) -> None:
        """FlashAttention for the requests of ``tail``, which is faster there."""
        key, value = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        first = tail.first_request
        self.flash_attention(
            query,
            # its descriptors refuse the strides that PyTorch leaves on dimensions of one
            canonicalize_singleton_dim_strides(key),
            canonicalize_singleton_dim_strides(value),
            out=output,
            cu_seqlens_q=attn_metadata.query_start_loc[first:],
            max_seqlen_q=tail.max_query_len,
            seqused_k=attn_metadata.seq_lens[first:],
            max_seqlen_k=tail.max_seq_len,
            block_table=attn_metadata.block_table[first:],
            softmax_scale=self.scale,
            causal=True,
        )


class CanvasAttentionBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(KV_DTYPES)
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks the name up in its enum

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Entries of a KV page where the user names none."""
        if current_platform.is_device_capability_family(90):
            return math.lcm(default_block_size, HOPPER_PAGE)
        return super().get_preferred_block_size(default_block_size)

    @staticmethod
    def get_impl_cls() -> type[CanvasAttentionImpl]:
        return CanvasAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CanvasAttentionMetadataBuilder]:
        return CanvasAttentionMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        values = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return CanvasAttentionSpec(**values)
