"""SGLang's attention backend "flashmoe", by name from plugins.py.

Written by SGLang 0.5.23. Its pools keep the cache; slots of page_size tokens are pages.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from flashmoe.integrations.pages import attend_to_pages


class _Metadata(NamedTuple):
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    block_table: Tensor
    max_seqlen_q: int


class FlashmoeAttnBackend(AttentionBackend):
    """Prefill, in chunks too, and decoding of models without MLA; no speculative decoding, no
    cross attention, no second pool for windows (--disable-hybrid-swa-memory)."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        if getattr(model_runner, "use_mla_backend", False):
            raise NotImplementedError("flashmoe's backend has no MLA layers; use another backend")
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        if getattr(self.token_to_kv_pool, "swa_layer_nums", 0):
            raise NotImplementedError(
                "flashmoe's backend knows one pool of keys: add --disable-hybrid-swa-memory"
            )
        self.page_size = model_runner.page_size
        self.forward_metadata: _Metadata | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Without a CUDA graph: of the table no more than the longest sequence has."""
        self._describe(forward_batch, int(forward_batch.seq_lens_cpu.max()))

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        self._describe(forward_batch, self.req_to_token_pool.req_to_token.shape[1])

    def _describe(self, forward_batch: Any, longest: int) -> None:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        lengths = forward_batch.seq_lens.to(torch.int32)
        slots = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices]
        table = (slots[:, : longest : self.page_size] // self.page_size).to(torch.int32)
        if mode.is_decode():
            steps = torch.arange(len(lengths) + 1, device=lengths.device, dtype=torch.int32)
            self.forward_metadata = _Metadata(steps, lengths, table, 1)
        elif mode.is_extend_without_speculative():
            new = forward_batch.extend_seq_lens
            ends = F.pad(new.cumsum(0), (1, 0)).to(torch.int32)
            most = max(forward_batch.extend_seq_lens_cpu)
            self.forward_metadata = _Metadata(ends, lengths, table, most)
        else:
            raise NotImplementedError(f"flashmoe's backend has no {mode} (speculative decoding)")

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """What a graph needs, its own steps compute."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def support_triton(self) -> bool:
        return True

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """q (tokens, heads * head_dim) -> (tokens, heads * v_head_dim)."""
        if given := sorted(name for name, x in others.items() if x is not None):
            raise TypeError(f"flashmoe's backend does not know {', '.join(given)}")
        if layer.is_cross_attention:
            raise NotImplementedError("flashmoe's backend has no cross attention")
        if layer.logit_cap and layer.logit_capping_method != "tanh":
            method = layer.logit_capping_method
            raise NotImplementedError(f"logit_capping_method must be 'tanh', got {method!r}")
        if save_kv_cache and k is not None:
            where = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
        k_pages, v_pages = (
            x.view(-1, self.page_size, *x.shape[1:])
            for x in self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        )
        rows = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        assert self.forward_metadata is not None, "init_forward_metadata comes first"
        # SGLang's windows count the keys before a query's own.
        left = -1 if layer.sliding_window_size is None else layer.sliding_window_size
        causal = layer.attn_type == AttentionType.DECODER
        if left >= 0 and not causal:
            raise NotImplementedError(f"sliding_window_size must be -1 in {layer.attn_type}")
        out = attend_to_pages(
            *(rows, k_pages, v_pages, *self.forward_metadata),
            softmax_scale=layer.scaling,
            causal=causal,
            window_size=(left, -1),
            softcap=float(layer.logit_cap),
            sinks=sinks,
        )
        return out.flatten(1)

    forward_decode = forward_extend
