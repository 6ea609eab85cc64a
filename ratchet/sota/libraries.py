"""Adapters of other libraries: each gives one call on a case's inputs, laid out as flash-attn has
them. Checked against flash-attn 2.8, flash-attn-3 3.0, flash-attn-4 4.0.0b36, xformers 0.0.35,
flashinfer-python 0.7.4 and nvidia-cudnn-frontend 1.32.

What a library cannot do raises NotImplementedError, from here or from the library.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashmoe.ratchet.measuring.suite import Case
from flashmoe.spec.call import Call

# q, k and v to out, all in the provider's own layout.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Make = Callable[[Case, Call], Attend]

# What FlashInfer recommends for its split keys.
_WORKSPACE_BYTES = 128 << 20
_PAGE_SIZE = 64
# Few queries: the keys have to be split over the GPU.
_FEW = 16


def flash_attn(module: str, *, unbounded: int | None = -1, cache: str = "page_table") -> Make:
    """flash-attn of any generation. `unbounded` is a window's open end; `cache` names the block
    table of its flash_attn_with_kvcache, and is empty where flash_attn_varlen_func takes caches."""

    def make(case: Case, call: Call) -> Attend:
        library = importlib.import_module(module)
        mask, sequences, terms = case.problem.mask, call.sequences, call.terms
        name = "flash_attn_func"
        options: dict[str, Any] = {"causal": mask.is_causal}
        if mask.is_local:
            ends = (x if x >= 0 else unbounded for x in (mask.left, mask.right))
            options = {"window_size": tuple(ends)}
        if terms.softcap:
            options["softcap"] = terms.softcap
        if terms.alibi_slopes is not None:
            options["alibi_slopes"] = terms.alibi_slopes
        if terms.sinks is not None:
            options["learnable_sink"] = terms.sinks
        if not cache and case.problem.seqlen_q < _FEW:
            options["num_splits"] = 0  # it chooses; by default it does not split
        if sequences.layout == "packed":
            name = "flash_attn_varlen_func"
            given = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
            options |= {field: getattr(sequences, field) for field in given}
        elif sequences.layout != "dense":
            name = "flash_attn_with_kvcache" if cache else "flash_attn_varlen_func"
            options["cache_seqlens" if cache else "seqused_k"] = sequences.seqused_k
            if sequences.block_table is not None:
                options[cache or "page_table"] = sequences.block_table
        function = getattr(library, name)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _out(function(q, k, v, **options))

        return attend

    return make


def _out(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    return results[0] if isinstance(results, tuple) else results


def xformers(case: Case, call: Call) -> Attend:
    ops: Any = importlib.import_module("xformers.ops")
    biases: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    p, sequences = case.problem, call.sequences
    causal, local = p.mask.is_causal, p.mask.is_local
    if local and (min(p.mask.left, p.mask.right) < 0 or sequences.layout != "dense"):
        raise NotImplementedError("its windows have two ends, and sequences of one length")
    if sequences.layout == "dense":
        bias = biases.LowerTriangularFromBottomRightMask() if causal else None
        if local:
            bias = biases.LocalAttentionFromBottomRightMask(p.mask.left, p.mask.right)
    elif sequences.layout == "packed":
        kind = biases.BlockDiagonalMask
        if causal:
            kind = biases.BlockDiagonalCausalFromBottomRightMask
        ends = (sequences.cu_seqlens_q, sequences.cu_seqlens_k)
        bias = kind.from_seqlens(*(x.diff().tolist() for x in ends if x is not None))
    else:
        assert sequences.seqused_k is not None
        lengths = [p.seqlen_q] * p.batch, sequences.seqused_k.tolist()
        name = "CausalWithOffset" if causal else ""
        if sequences.block_table is None:
            kind = getattr(biases, f"BlockDiagonal{name}PaddedKeysMask")
            bias = kind.from_seqlens(lengths[0], call.k.shape[1], lengths[1])
        else:
            kind = getattr(biases, f"PagedBlockDiagonal{name}PaddedKeysMask")
            bias = kind.from_seqlens(*lengths, sequences.block_table, call.k.shape[1])
    groups = p.heads_q // p.heads_kv

    def one_batch(x: Tensor) -> Tensor:
        return x if sequences.layout == "dense" else x.flatten(0, -3)[None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = one_batch(q), one_batch(k), one_batch(v)
        if groups > 1:  # (batch, rows, heads_kv, group, head_dim)
            q = q.reshape(*q.shape[:2], p.heads_kv, groups, -1)
            k, v = (x.unsqueeze(3).expand(-1, -1, -1, groups, -1) for x in (k, v))
        out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=bias)
        return out.reshape(shape)

    return attend


def flashinfer(case: Case, call: Call) -> Attend:
    library: Any = importlib.import_module("flashinfer")
    p, sequences = case.problem, call.sequences
    if case.backward:
        raise NotImplementedError("has no backward")
    if p.mask.right > 0 or (p.mask.is_local and p.mask.right < 0):
        raise NotImplementedError("its windows end at the query")
    device, dtype = call.q.device, call.q.dtype
    options: dict[str, Any] = {"q_data_type": dtype, "kv_data_type": dtype}
    if p.mask.is_local:
        options["window_left"] = p.mask.left
    if call.terms.softcap:
        options["logits_soft_cap"] = call.terms.softcap
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    sizes = p.heads_q, p.heads_kv, p.head_dim

    def starts(lengths: Tensor) -> Tensor:
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        return torch.cat([zero, lengths.cumsum(0)]).to(torch.int32)

    rows = torch.full((p.batch,), p.seqlen_q, device=device)
    if p.seqlen_q > 1 and sequences.layout in ("dense", "packed"):
        keys = torch.full((p.batch,), p.seqlen_kv, device=device)
        packed = sequences.layout == "packed"
        ends = (sequences.cu_seqlens_q, sequences.cu_seqlens_k)
        ragged = library.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        ragged.plan(
            *(ends if packed else (starts(rows), starts(keys))),
            *sizes,
            causal=p.mask.right == 0,
            **options,
        )
        return lambda q, k, v: ragged.run(*(x.flatten(0, -3) for x in (q, k, v))).view(q.shape)

    # A cache without pages is one whose pages lie in order.
    used, size, table = sequences.seqused_k, _PAGE_SIZE, sequences.block_table
    if used is None:
        used = torch.full((p.batch,), p.seqlen_kv, dtype=torch.int32, device=device)
    if table is None:
        if p.seqlen_kv % size:
            raise NotImplementedError(f"its pages of {size} keys do not fit {p.seqlen_kv}")
        columns = p.seqlen_kv // size
        table = torch.arange(p.batch * columns, dtype=torch.int32, device=device)
        table = table.view(p.batch, columns)
    else:
        size = call.k.shape[1]
    pages = (used + size - 1) // size
    indices = torch.cat([row[:count] for row, count in zip(table, pages.tolist(), strict=True)])
    paged = (starts(pages), indices, used - (pages - 1) * size, *sizes, size)
    if p.seqlen_q == 1:
        grouped = p.heads_q > p.heads_kv
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=grouped
        )
        wrapper.plan(*paged, **options)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(starts(rows), *paged, causal=p.mask.right == 0, **options)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = tuple(x.reshape(-1, size, *x.shape[-2:]) for x in (k, v))
        out: Tensor = wrapper.run(q.flatten(0, -3), cache).view(q.shape)
        return out

    return attend


def cudnn(case: Case, call: Call) -> Attend:
    """cuDNN's front end, without torch in between."""
    attention: Any = importlib.import_module("cudnn").sdpa_torch
    mask, sequences = case.problem.mask, call.sequences
    options: dict[str, Any] = {
        "scale": call.softmax_scale,
        "is_causal": mask.right == 0,
        # It counts the query itself.
        "window_left": mask.left + 1 if mask.left >= 0 else -1,
        "window_right": max(mask.right, 0) or -1,
        "causal_bottom_right": not mask.is_full
        and any(seqlen_q != seqlen_kv for seqlen_q, seqlen_kv, _ in case.problem.histogram),
        "sinks": call.terms.sinks,
        "return_lse": case.backward,
    }
    packed = sequences.layout == "packed"
    if packed:
        options |= {
            "cu_seqlens_q": sequences.cu_seqlens_q,
            "cu_seqlens_kv": sequences.cu_seqlens_k,
            "max_seqlen_q": sequences.max_seqlen_q,
            "max_seqlen_kv": sequences.max_seqlen_k,
        }
    elif sequences.seqused_k is not None:
        options |= {
            "seq_len_q": torch.full_like(sequences.seqused_k, case.problem.seqlen_q),
            "seq_len_kv": sequences.seqused_k,
        }

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not packed:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = _out(attention(q, k, v, **options))
        return out if packed else out.transpose(1, 2)

    return attend
