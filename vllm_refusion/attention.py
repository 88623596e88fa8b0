"""Attention backend: paged context and canvas, with visibility per query row."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
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

from vllm_refusion.integration import position_slack
from vllm_refusion.triton_kernels.dispatch import operations


@dataclass(frozen=True, kw_only=True)
class CanvasAttentionSpec(FullAttentionSpec):
    """Full attention whose requests may use a few positions past max_model_len."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        length = vllm_config.model_config.max_model_len + position_slack(vllm_config)
        return cdiv(length, self.block_size) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return super().max_num_blocks_per_req(vllm_config, max_len + position_slack(vllm_config))


@dataclass
class CanvasAttentionMetadata:
    """Inputs of ``canvas_attention`` that all layers share."""

    query_start_loc: torch.Tensor  # [R+1] int32
    seq_lens: torch.Tensor  # [R] int32
    block_table: torch.Tensor  # [R, max_pages] int32
    num_actual_tokens: int
    visibility: torch.Tensor | None = None  # [N, 4] int32, set by ReFusionModelState


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
        }
        present = {name: value for name, value in unsupported.items() if value is not None}
        if present:
            raise ValueError(f"ReFusion's attention does not support {present}.")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype

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
        operations(key.device).write_kv(key[:rows], value[:rows], kv_cache, slot_mapping)

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
        rows = attn_metadata.num_actual_tokens
        operations(query.device).canvas_attention(
            query[:rows],
            kv_cache,
            output[:rows],
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.visibility,
            self.scale,
        )
        return output


class CanvasAttentionBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks the name up in its enum

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

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
