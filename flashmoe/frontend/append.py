"""What is appended to a KV cache: rotated and written on the device, whatever its lengths say."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from flashmoe import _extension
from flashmoe.backends import BACKENDS
from flashmoe.spec.call import Sequences

_append_cuda = _extension.kernel_op("append_cuda")
_TABLE_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqused_k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    rotate_by_row: bool,
) -> tuple[Tensor, Tensor]:
    """Write k, rotated, and v behind the seqused_k keys of each sequence; arguments as
    flash_attn_with_kvcache has them, validated, lengths contiguous. Returns q rotated (empty where
    there is no rotary), by rows seqused_k of the tables, or seqused_k + i with `rotate_by_row`; and
    how many keys each sequence has then."""
    if rotary_cos is not None and rotary_sin is not None:
        if rotary_cos.dtype != rotary_sin.dtype or rotary_cos.dtype not in _TABLE_DTYPES:
            rotary_cos, rotary_sin = rotary_cos.float(), rotary_sin.float()
        rotary_cos, rotary_sin = rotary_cos.contiguous(), rotary_sin.contiguous()
    rotary = rotary_cos, rotary_sin, rotary_interleaved, rotate_by_row
    places = cu_seqlens_q, cu_seqlens_k_new, cache_batch_idx, block_table
    by_kernel = k_cache.is_cuda and _has_kernel(k_cache.device)
    if not by_kernel or k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return _append_by_torch(q, k, v, k_cache, v_cache, seqused_k, *places, *rotary)
    result: tuple[Tensor, Tensor] = _append_cuda(
        q, k, v, k_cache, v_cache, seqused_k, *places, *rotary
    )
    torch.autograd.graph.increment_version((k_cache, v_cache))
    return result


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    return not BACKENDS["cuda"].unavailable(device)


def _append_by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqused_k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    rotate_by_row: bool,
) -> tuple[Tensor, Tensor]:
    positions = _positions_of(k, cu_seqlens_k_new, seqused_k)
    rotated = q.new_empty(0)
    if cos is not None and sin is not None:
        of_q = _positions_of(q, cu_seqlens_q, seqused_k, steps=rotate_by_row)
        rotated = _rotated(q, of_q, cos, sin, interleaved)
        k = _rotated(k, positions, cos, sin, interleaved)
    sequences = Sequences(cache_batch_idx=cache_batch_idx, block_table=block_table)
    _scatter(k, v, positions, k_cache, v_cache, sequences, cu_seqlens_k_new)
    new = k.shape[1] if cu_seqlens_k_new is None else cu_seqlens_k_new.diff()
    return rotated, seqused_k + new


def _rotated(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (…, heads, head_dim) by the rows `positions` (…) of cos and sin, in float32."""
    rows, rotary_dim = positions.clamp(0, cos.shape[0] - 1), 2 * cos.shape[1]
    cos, sin = (table[rows].float().unsqueeze(-2) for table in (cos, sin))
    columns = x[..., :rotary_dim].float()
    if interleaved:
        a, b = columns[..., ::2], columns[..., 1::2]
    else:
        a, b = columns.chunk(2, dim=-1)
    turned = a * cos - b * sin, a * sin + b * cos
    columns = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((columns.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def room_of(k_cache: Tensor, block_table: Tensor | None) -> int:
    """How many keys of a sequence the cache has room for."""
    if isinstance(block_table, Tensor) and block_table.dim() == 2:
        return block_table.shape[1] * k_cache.shape[1]
    return k_cache.shape[1]


def validate_new(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    sequences: Sequences,
) -> None:
    """Raises for what cannot be appended. q, the caches and sequences are valid."""
    if k is None or v is None:
        raise ValueError("k and v must both be given where one is, or rotary_cos and rotary_sin")
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k, got None")
    lengths = sequences.seqused_k
    assert lengths is not None
    batch = lengths.shape[0]
    leading = "total_new" if cu_seqlens_k_new is not None else f"batch={batch}, seqlen_new"
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(x).__name__}")
        heads, head_dim = cache.shape[2:]
        dims = 3 if cu_seqlens_k_new is not None else 4
        if (
            x.dim() != dims
            or x.shape[-2:] != cache.shape[-2:]
            or x.shape[:-2] != k.shape[:-2]
            or (dims == 4 and x.shape[0] != batch)
        ):
            raise ValueError(
                f"{name} must be ({leading}, heads_kv={heads}, head_dim={head_dim}), got shape "
                f"{tuple(x.shape)}"
            )
        if x.dtype != cache.dtype:
            raise TypeError(f"{name} must have the cache's dtype {cache.dtype}, got {x.dtype}")
        if x.device != cache.device:
            raise ValueError(f"{name} must be on the cache's device {cache.device}, got {x.device}")
    if cu_seqlens_k_new is None:
        seqlen_new = k.shape[1]
        if not isinstance(cache_seqlens, Tensor):
            room = room_of(k_cache, sequences.block_table)
            if cache_seqlens + seqlen_new > room:
                raise ValueError(
                    f"cache_seqlens + seqlen_new must be at most {room}, got "
                    f"{cache_seqlens} + {seqlen_new}"
                )
        return
    if not isinstance(cu_seqlens_k_new, Tensor):
        kind = type(cu_seqlens_k_new).__name__
        raise TypeError(f"cu_seqlens_k_new must be a torch.Tensor or None, got {kind}")
    if cu_seqlens_k_new.dtype != torch.int32:
        raise TypeError(f"cu_seqlens_k_new must be int32, got {cu_seqlens_k_new.dtype}")
    if tuple(cu_seqlens_k_new.shape) != (batch + 1,) or cu_seqlens_k_new.device != q.device:
        raise ValueError(
            f"cu_seqlens_k_new must be ({batch + 1},) on {q.device}, got "
            f"{tuple(cu_seqlens_k_new.shape)} on {cu_seqlens_k_new.device}"
        )


def validate_rotary(
    cos: Tensor | None,
    sin: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
) -> None:
    """Raises for tables that cannot rotate q and the new keys."""
    room, head_dim = room_of(k_cache, block_table), q.shape[-1]
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2:
            raise TypeError(
                f"{name} must be a floating-point tensor (seqlen_rotary, rotary_dim / 2), got {x!r}"
            )
        if x.shape[0] < room or not 1 <= 2 * x.shape[1] <= head_dim:
            raise ValueError(
                f"{name} must be (at least {room}, at most {head_dim // 2}), got shape "
                f"{tuple(x.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    assert cos is not None
    assert sin is not None
    if cos.shape != sin.shape:
        raise ValueError(
            f"rotary_sin must have rotary_cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}"
        )


def _positions_of(
    x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor, steps: bool = True
) -> Tensor:
    """The position of each row of x, (batch, seqlen, heads, head_dim) or packed: what its sequence
    has already, and (with `steps`) how far from its sequence's first row it is."""
    if cu_seqlens is None:
        row = torch.arange(x.shape[1] if steps else 1, device=x.device)
        return (lengths.unsqueeze(1) + row).expand(-1, x.shape[1])
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    sequence = _sequence_of(row, cu_seqlens)
    begin = lengths[sequence]
    return begin + row - cu_seqlens[sequence] if steps else begin


def _sequence_of(row: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which sequence each row of a packed tensor belongs to; one of them for a row in none."""
    last = max(cu_seqlens.shape[0] - 2, 0)
    return (torch.searchsorted(cu_seqlens, row, right=True) - 1).clamp(0, last)


def _scatter(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sequences: Sequences,
    cu_seqlens_k_new: Tensor | None,
) -> None:
    """Write each new row to its place in the cache, if it has one."""
    position = positions.flatten()
    if not position.numel() or not k_cache.numel():
        return
    row = torch.arange(position.shape[0], device=position.device)
    has_place = (position >= 0) & (position < room_of(k_cache, sequences.block_table))
    if cu_seqlens_k_new is None:
        sequence = row // k.shape[1]
    else:
        sequence = _sequence_of(row, cu_seqlens_k_new)
        has_place &= (row >= cu_seqlens_k_new[0]) & (row < cu_seqlens_k_new[-1])
    if sequences.block_table is not None:
        page_size, pages = k_cache.shape[1], sequences.block_table.shape[1]
        page = (position // page_size).clamp(0, pages - 1)
        batch, slot = sequences.block_table[sequence, page], position % page_size
    else:
        batch, slot = sequence, position
        if sequences.cache_batch_idx is not None:
            batch = sequences.cache_batch_idx[sequence]
    has_place &= (batch >= 0) & (batch < k_cache.shape[0])
    # A row without a place writes what the first row that has one writes; where none has, all write
    # what is there. So nothing depends on the order of writes, and nobody waits to count rows.
    source = torch.where(has_place, row, has_place.int().argmax())
    batch = batch[source].clamp(0, k_cache.shape[0] - 1)
    slot = slot[source].clamp(0, k_cache.shape[1] - 1)
    for x, cache in ((k, k_cache), (v, v_cache)):
        rows = x.flatten(0, -3)[source]
        cache[batch, slot] = torch.where(has_place.any(), rows, cache[batch, slot])
