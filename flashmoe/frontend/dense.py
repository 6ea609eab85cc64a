"""Dense batches with flash-attn's signatures."""

from __future__ import annotations

from torch import Tensor

from flashmoe.frontend.attend import attend, attend_dropping, window_of
from flashmoe.frontend.validation import unpacked
from flashmoe.spec.terms import terms_of
from flashmoe.tiles import Tile


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    rng_state: Tensor | None = None,
    attn_mask: Tensor | None = None,
    backend: str | None = None,
    tile: Tile | str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """softmax(softmax_scale * Q K^T) V, with flash-attn's signature, layout and meaning.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), float32, float16 or bfloat16; head_dim at most
            256. Any strides; without a contiguous last dimension it is copied.
        k, v: (batch, seqlen_kv, heads_kv, head_dim), v's head_dim_v its own, at most 256; heads_q
            must be a multiple of heads_kv, and query head h uses head h // (heads_q // heads_kv).
            What is no multiple of 8 is copied, padded to the next one.
        dropout_p: from 0 to less than 1: the probability that a weight becomes 0; the others are
            divided by 1 - dropout_p, which is rounded to a multiple of 2**-16. softmax_lse has none
            of it. Which ones, torch's generator of q's device decides.
        softmax_scale: positive and at most 2.3e38; default 1 / sqrt(head_dim).
        causal: query i sees key j when j <= i + seqlen_kv - seqlen_q (aligned bottom-right).
        window_size: (left, right); query i sees key j when
            -left <= j - (i + seqlen_kv - seqlen_q) <= right. -1 or None: no limit on that side.
            With `causal`, right is 0.
        softcap: scores become softcap * tanh(score / softcap) after scaling; 0 for none.
        alibi_slopes: (heads_q,) or (batch, heads_q) float32; after softcap, the score of query i
            and key j gets -slope * |i + seqlen_kv - seqlen_q - j|. They have no gradient.
        deterministic: the same gradients bit by bit every time, as under
            `torch.use_deterministic_algorithms(True)`. Otherwise dQ may be added up in any order on
            Hopper, where that is faster. `backend="sdpa"`, whose gradients are torch's own,
            refuses it where gradients are asked for.
        return_attn_probs: also return softmax_lse; (out, softmax_lse, None) as flash-attn does, or
            with dropout (out, softmax_lse, S_dmask), for tests, in quadratic memory.
        sinks: (heads_q,), any floating-point dtype: of each head the score of a key without value,
            which joins the softmax's sum (s_aux or learnable_sink elsewhere). Differentiable.
        rng_state: (2,), int64: which weights are dropped, a function of this alone, in place of a
            state from torch's generator.
        attn_mask: broadcastable to (batch, heads_q, seqlen_q, seqlen_kv), with any strides, and
            read where it lies: bool, True where a query sees a key, or float32 or of q's dtype,
            which is added to the scores last, -inf for a key that is not seen. Beside `causal` and
            `window_size`, which count all keys. Differentiable, where it is added; its gradient
            takes the time of another backward.
        backend, tile: run these instead of the planned ones (see `python -m flashmoe`).

    Returns:
        out (batch, seqlen_q, heads_q, head_dim_v), typed as q, contiguous. softmax_lse is (batch,
        heads_q, seqlen_q) float32, natural logarithm, differentiable; sinks are in it. A row that
        sees no key has out 0 and softmax_lse -inf, or its head's sink. Keys and values that are
        hidden by attn_mask should be finite: they may be read, and 0 * NaN is NaN.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what is allowed.
        NotImplementedError: a gradient of alibi_slopes; nested tensors; forward-mode AD,
            torch.func.grad and its kin; double backward; what no backend here has.

    Source: FlashAttention-2 (arXiv:2307.08691).
    """
    if type(window_size) is not tuple:
        window_size = window_of(causal, window_size)
    asked = (softmax_scale, causal, window_size, deterministic, return_attn_probs, backend, tile)
    terms = terms_of(softcap, alibi_slopes, sinks, dropout_p, rng_state, attn_mask)
    return (attend if dropout_p == 0.0 else attend_dropping)(q, k, v, asked, terms)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    backend: str | None = None,
    tile: Tile | str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """flash_attn_func of qkv (batch, seqlen, 3, heads, head_dim): its q, k and v.

    They are read where they lie, and qkv gets one gradient. Arguments, result and errors are those
    of flash_attn_func.
    """
    q, k, v = unpacked("qkv", qkv, "(batch, seqlen, 3, heads, head_dim)")
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        sinks=sinks,
        attn_mask=attn_mask,
        backend=backend,
        tile=tile,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    backend: str | None = None,
    tile: Tile | str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """flash_attn_func of q and kv (batch, seqlen_kv, 2, heads_kv, head_dim): its k and v.

    They are read where they lie, and kv gets one gradient. Arguments, result and errors are those
    of flash_attn_func.
    """
    k, v = unpacked("kv", kv, "(batch, seqlen_kv, 2, heads_kv, head_dim)")
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        sinks=sinks,
        attn_mask=attn_mask,
        backend=backend,
        tile=tile,
    )
