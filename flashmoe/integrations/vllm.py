"""vLLM's attention backend "FLASHMOE", by name from plugins.py.

Written by vLLM 0.33: its FlashAttention backend with another forward. The cache, its layout, what
is written to it and the metadata of a batch stay vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

import flashmoe
from flashmoe.integrations.pages import attend_to_pages
from flashmoe.integrations.plugins import VLLM_NAME


class FlashmoeBackend(FlashAttentionBackend):
    """Paged decoders and encoders, windows, softcap, ALiBi and sinks, in float16 and bfloat16."""

    supported_kv_cache_dtypes = ("auto", "float16", "bfloat16")

    @staticmethod
    def get_name() -> str:
        return VLLM_NAME

    @staticmethod
    def get_impl_cls() -> type[FlashmoeImpl]:
        return FlashmoeImpl

    @staticmethod
    def get_builder_cls() -> type[FlashmoeMetadataBuilder]:
        return FlashmoeMetadataBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        from vllm.v1.attention.backend import MultipleOf

        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return default_block_size

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and head_size <= 256

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        return False

    @classmethod
    def supports_combination(cls, *_: Any, **__: Any) -> str | None:
        return None


class FlashmoeMetadataBuilder(FlashAttentionMetadataBuilder):
    # Batches of unlike queries read lengths on the host where no kernel of their own has them.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.aot_schedule = False  # FlashAttention-3's, of which flashmoe has no need


class FlashmoeImpl(FlashAttentionImpl):
    can_return_lse_for_decode = False
    supports_dcp = False
    supports_quant_query_input = False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query (tokens, heads, head_size), key and value (tokens, kv_heads, head_size), which are
        in kv_cache (blocks, kv_heads, block_size, 2 * head_size) already, -> output, as query."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("output_scale must be None: flashmoe writes no scaled output")
        if attn_metadata is None:  # vLLM measures its memory
            return output.fill_(0)
        if isinstance(attn_metadata.causal, Tensor):
            raise NotImplementedError("causal must be one bool for all requests, got a tensor")
        for name in ("mm_prefix_query_range_tensor", "rswa_prefix_lens"):
            if getattr(attn_metadata, name, None) is not None:
                raise NotImplementedError(f"{name} must be None with flashmoe's backend")
        tokens, is_cached = attn_metadata.num_actual_tokens, self.attn_type not in _WITHOUT_CACHE
        left, right = self.sliding_window or (-1, -1)
        causal = bool(attn_metadata.causal) and is_cached
        if not causal and left >= 0:
            right = left
        if self.alibi_slopes is not None:
            self.alibi_slopes: Tensor | None = self.alibi_slopes.to(query.device)
        options = {
            "softmax_scale": self.scale,
            "causal": causal,
            "window_size": (left, right),
            "softcap": float(self.logits_soft_cap),
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }
        q, out = query[:tokens], output[:tokens].view(tokens, self.num_heads, self.head_size)
        lengths = attn_metadata.query_start_loc, attn_metadata.max_query_len
        if not is_cached:
            cu_seqlens, longest = lengths
            flashmoe.flash_attn_varlen_func(
                *(q, key[:tokens], value[:tokens], cu_seqlens, cu_seqlens, longest, longest),
                out=out,
                **options,
            )
            return output
        k_pages, v_pages = torch.split(kv_cache.transpose(1, 2), self.head_size, -1)
        attend_to_pages(
            *(q, k_pages, v_pages, lengths[0], attn_metadata.seq_lens, attn_metadata.block_table),
            lengths[1],
            out,
            **options,
        )
        return output


_WITHOUT_CACHE = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
