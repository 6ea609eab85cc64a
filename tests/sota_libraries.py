"""Stand-ins for other libraries: the functions that our adapters call, with the parameters and the
meaning that they have there, computed plainly. Releases as ratchet/sota/libraries.py names them."""

from __future__ import annotations

import importlib.metadata
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int | None = None,
    right: int | None = None,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    top_left: bool = False,
) -> Tensor:
    """(rows, heads, head_dim) of one sequence: keys from `left` before to `right` behind a query's
    own, counted from the end."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    shift = 0 if top_left else k.shape[0] - q.shape[0]
    away = torch.arange(k.shape[0]) - torch.arange(q.shape[0])[:, None] - shift
    if slopes is not None:
        scores = scores - slopes[:, None, None] * away.abs()
    if left is not None:
        scores = scores.masked_fill(away < -left, float("-inf"))
    if right is not None:
        scores = scores.masked_fill(away > right, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, q.shape[0], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[0]].nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, v)


def batched(q: Tensor, k: Tensor, v: Tensor, *window: int | None, **terms: Any) -> Tensor:
    return torch.stack([attend(*x, *window, **terms) for x in zip(q, k, v, strict=True)])


def ragged(q: Tensor, k: Tensor, v: Tensor, ends: Any, *window: int | None, **terms: Any) -> Tensor:
    cu_q, cu_k = (x.tolist() for x in ends)
    return torch.cat(
        [
            attend(q[a:b], k[c:d], v[c:d], *window, **terms)
            for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)
        ]
    )


def cached(
    q: Tensor, k: Tensor, v: Tensor, used: Any, table: Tensor | None, *window: Any, **terms: Any
) -> Tensor:
    found = []
    for i, length in enumerate(used):
        keys, values = (
            x[i] if table is None else x[table[i].long().clamp(max=len(x) - 1)].flatten(0, 1)
            for x in (k, v)
        )
        # A weight of 0 times NaN is NaN.
        assert keys.isfinite().all()
        found.append(attend(q[i], keys[:length], values[:length], *window, **terms))
    return torch.stack(found)


def flash_attn_3(module: ModuleType, table: str = "page_table", **more: Any) -> None:
    """Also 2, whose block table has another name."""

    def window(causal: bool, window_size: tuple[int, int]) -> tuple[int | None, int | None]:
        left, right = (None if x < 0 else x for x in window_size)
        return left, 0 if causal else right

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        terms = {"softcap": softcap, "slopes": alibi_slopes}
        return batched(q, k, v, *window(causal, window_size), **terms)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:
        lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        assert [int(x.max()) for x in lengths] == [max_seqlen_q, max_seqlen_k]
        ends = cu_seqlens_q, cu_seqlens_k
        return ragged(q, k, v, ends, *window(causal, window_size), softcap=softcap)

    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        **pages: Tensor,
    ) -> Tensor:
        block_table = pages.pop(table, None)
        assert not pages
        ends = window(causal, window_size)
        used = cache_seqlens.tolist()
        return cached(q, k_cache, v_cache, used, block_table, *ends, softcap=softcap)

    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(module, function.__name__, function)


def flash_attn_4(module: ModuleType) -> None:
    def window(causal: bool, left: int | None, right: int | None) -> tuple[int | None, int | None]:
        """As its _resolve_causal_local_window: an open end is None, or both are negative."""
        if left is not None and right is not None and left < 0 and right < 0:
            left = right = None
        return left, 0 if causal else right

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: Tensor | None = None,
        softcap: float = 0.0,
        num_splits: int = 1,
    ) -> tuple[Tensor, None]:
        ends = window(causal, *window_size)
        return batched(q, k, v, *ends, sinks=learnable_sink, softcap=softcap), None

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqused_k: Tensor | None = None,
        page_table: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: Tensor | None = None,
        softcap: float = 0.0,
        num_splits: int = 1,
    ) -> tuple[Tensor, None]:
        ends, terms = window(causal, *window_size), {"sinks": learnable_sink, "softcap": softcap}
        if seqused_k is not None:
            return cached(q, k, v, seqused_k.tolist(), page_table, *ends, **terms), None
        return ragged(q, k, v, (cu_seqlens_q, cu_seqlens_k), *ends, **terms), None

    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]


class _Bias:
    """Of xformers.ops.fmha.attn_bias: `make` gives a sequence's window."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def xformers(ops: ModuleType, biases: ModuleType) -> None:
    def of_lengths(right: int | None) -> Any:
        class BlockDiagonal:
            @staticmethod
            def from_seqlens(q_seqlen: list[int], kv_seqlen: list[int]) -> _Bias:
                return _Bias(lengths=(q_seqlen, kv_seqlen), right=right, padding=0)

        return BlockDiagonal

    def of_padded(right: int | None) -> Any:
        class PaddedKeys:
            @staticmethod
            def from_seqlens(q_seqlen: list[int], kv_padding: int, kv_seqlen: list[int]) -> _Bias:
                return _Bias(lengths=(q_seqlen, kv_seqlen), right=right, padding=kv_padding)

        return PaddedKeys

    def of_paged(right: int | None) -> Any:
        class Paged:
            @staticmethod
            def from_seqlens(
                q_seqlen: list[int], kv_seqlen: list[int], block_tables: Tensor, page_size: int
            ) -> _Bias:
                table = block_tables, page_size
                return _Bias(lengths=(q_seqlen, kv_seqlen), right=right, table=table)

        return Paged

    def local(window_left: int, window_right: int) -> _Bias:
        assert window_left >= 0
        assert window_right >= 0
        return _Bias(window=(window_left, window_right))

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: _Bias | None = None
    ) -> Tensor:
        if query.dim() == 5:  # (batch, rows, groups, heads, head_dim), keys the same
            assert key.shape[2:4] == query.shape[2:4]
            key, value = key[:, :, :, 0], value[:, :, :, 0]
        q = query.flatten(2, -2)
        if attn_bias is None or hasattr(attn_bias, "window"):
            out = batched(q, key, value, *getattr(attn_bias, "window", ()))
            return out.view(query.shape)
        rows, keys = attn_bias.lengths
        q, k, v = q[0].split(rows), key[0], value[0]
        found = []
        start = 0
        for i, count in enumerate(keys):
            if table := getattr(attn_bias, "table", None):
                pages, size = table[0][i].long(), table[1]
                columns = (pages[:, None] * size + torch.arange(size)).flatten()[:count]
            else:
                first = i * attn_bias.padding or start
                columns = torch.arange(first, first + count)
            start += count
            found.append(attend(q[i], k[columns], v[columns], None, attn_bias.right))
        return torch.cat(found).view(query.shape)

    def causal() -> _Bias:
        return _Bias(window=(None, 0))

    biases.LowerTriangularFromBottomRightMask = causal  # type: ignore[attr-defined]
    biases.LocalAttentionFromBottomRightMask = local  # type: ignore[attr-defined]
    biases.BlockDiagonalMask = of_lengths(None)  # type: ignore[attr-defined]
    biases.BlockDiagonalCausalFromBottomRightMask = of_lengths(0)  # type: ignore[attr-defined]
    for word, right in (("", None), ("CausalWithOffset", 0)):
        setattr(biases, f"BlockDiagonal{word}PaddedKeysMask", of_padded(right))
        setattr(biases, f"PagedBlockDiagonal{word}PaddedKeysMask", of_paged(right))
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]


def flashinfer(module: ModuleType) -> None:
    class Wrapper:
        def __init__(
            self, float_workspace_buffer: Tensor, kv_layout: str, use_tensor_cores: bool = False
        ) -> None:
            assert float_workspace_buffer.dtype == torch.uint8
            assert kv_layout == "NHD"

        def _window(
            self,
            causal: bool,
            window_left: int = -1,
            logits_soft_cap: float = 0.0,
            q_data_type: torch.dtype = torch.float16,
            kv_data_type: torch.dtype | None = None,
        ) -> None:
            self.dtype, self.softcap = q_data_type, logits_soft_cap
            self.window = None if window_left < 0 else window_left, 0 if causal else None

    class Ragged(Wrapper):
        def plan(
            self,
            qo_indptr: Tensor,
            kv_indptr: Tensor,
            num_qo_heads: int,
            num_kv_heads: int,
            head_dim_qk: int,
            causal: bool = False,
            **options: Any,
        ) -> None:
            self.ends, self.heads = (qo_indptr, kv_indptr), (num_qo_heads, num_kv_heads)
            self._window(causal, **options)

        def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert (q.shape[1], k.shape[1], q.dtype) == (*self.heads, self.dtype)
            return ragged(q, k, v, self.ends, *self.window, softcap=self.softcap)

    class Paged(Wrapper):
        def _pages(self, indptr: Tensor, indices: Tensor, last: Tensor, page_size: int) -> None:
            assert {x.dtype for x in (indptr, indices, last)} == {torch.int32}
            starts = indptr.tolist()
            self.pages = [indices[a:b] for a, b in pairwise(starts)]
            self.used = [
                (len(own) - 1) * page_size + count
                for own, count in zip(self.pages, last.tolist(), strict=True)
            ]

        def attend(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
            """q (batch, rows, heads, head_dim)."""
            return torch.stack(
                [
                    cached(
                        *(q[i : i + 1], *cache, [used], pages[None]),
                        *self.window,
                        softcap=self.softcap,
                    )[0]
                    for i, (pages, used) in enumerate(zip(self.pages, self.used, strict=True))
                ]
            )

    class Prefill(Paged):
        def plan(
            self,
            qo_indptr: Tensor,
            paged_kv_indptr: Tensor,
            paged_kv_indices: Tensor,
            paged_kv_last_page_len: Tensor,
            num_qo_heads: int,
            num_kv_heads: int,
            head_dim_qk: int,
            page_size: int,
            causal: bool = False,
            **options: Any,
        ) -> None:
            self._pages(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
            self.rows = int(qo_indptr[1])
            self._window(causal, **options)

        def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
            return self.attend(q.unflatten(0, (-1, self.rows)), paged_kv_cache).flatten(0, 1)

    class Decode(Paged):
        def plan(
            self,
            indptr: Tensor,
            indices: Tensor,
            last_page_len: Tensor,
            num_qo_heads: int,
            num_kv_heads: int,
            head_dim: int,
            page_size: int,
            **options: Any,
        ) -> None:
            self._pages(indptr, indices, last_page_len, page_size)
            self._window(True, **options)

        def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
            return self.attend(q[:, None], paged_kv_cache)[:, 0]

    module.BatchPrefillWithRaggedKVCacheWrapper = Ragged  # type: ignore[attr-defined]
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill  # type: ignore[attr-defined]
    module.BatchDecodeWithPagedKVCacheWrapper = Decode  # type: ignore[attr-defined]


def cudnn(module: ModuleType) -> None:
    def sdpa_torch(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        causal_bottom_right: bool = False,
        window_left: int = -1,
        window_right: int = -1,
        sinks: Tensor | None = None,
        seq_len_q: Tensor | None = None,
        seq_len_kv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int = 0,
        max_seqlen_kv: int = 0,
        return_lse: bool = False,
    ) -> Any:
        band = is_causal or window_left >= 0 or window_right >= 0
        assert band or not causal_bottom_right
        assert not (is_causal and window_right > 0)
        assert return_lse or not query.requires_grad
        right = window_right if window_right >= 0 else (0 if is_causal else None)
        # Its left bound counts the query itself.
        window = window_left - 1 if window_left >= 0 else None, right
        terms: dict[str, Any] = {"sinks": sinks, "top_left": not causal_bottom_right}
        if cu_seqlens_q is not None:
            out = ragged(query, key, value, (cu_seqlens_q, cu_seqlens_kv), *window, **terms)
            return (out, None) if return_lse else out
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        used = [k.shape[1]] * len(k) if seq_len_kv is None else seq_len_kv.tolist()
        assert seq_len_q is None or seq_len_q.tolist() == [q.shape[1]] * len(q)
        out = cached(q, k, v, used, None, *window, **terms).transpose(1, 2)
        return (out, None) if return_lse else out

    module.sdpa_torch = sdpa_torch  # type: ignore[attr-defined]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, as if they were installed."""
    names = ("flash_attn", "flash_attn_interface", "flash_attn.cute", "xformers", "xformers.ops")
    names += ("xformers.ops.fmha", "xformers.ops.fmha.attn_bias", "flashinfer", "cudnn")
    made = SimpleNamespace(**{name.replace(".", "_"): ModuleType(name) for name in names})
    for name in names:
        monkeypatch.setitem(sys.modules, name, getattr(made, name.replace(".", "_")))
    flash_attn_3(made.flash_attn, "block_table")
    flash_attn_3(made.flash_attn_interface)
    flash_attn_4(made.flash_attn_cute)
    xformers(made.xformers_ops, made.xformers_ops_fmha_attn_bias)
    flashinfer(made.flashinfer)
    cudnn(made.cudnn)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0")
