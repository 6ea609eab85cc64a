"""A forward and its backward as two functions, for libraries that bring their own autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe.frontend import ops
from flashmoe.frontend.attend import attend, attend_dropping, new_rng_state
from flashmoe.frontend.validation import Asked, mask_of
from flashmoe.spec.call import DENSE, NO_TERMS, Saved, Sequences, Terms


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asked: Asked,
    terms: Terms = NO_TERMS,
    sequences: Sequences = DENSE,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """out and softmax_lse of flash_attn_func, or of packed `sequences` of flash_attn_varlen_func;
    with dropout, S_dmask where return_weights asks for it; and the state of dropout, which is drawn
    here and says nothing without. Records nothing for autograd."""
    asked = asked._replace(return_lse=True)
    if terms.dropout_p == 0.0:
        out, lse, _ = attend(q, k, v, asked, terms, sequences)
        return out, lse, None, torch.zeros(2, dtype=torch.int64, device=q.device)
    state = new_rng_state(q.device)
    run = attend_dropping if return_weights else attend
    out, lse, weights = run(q, k, v, asked, terms._replace(rng_state=state), sequences)
    return out, lse, weights, state


@torch.no_grad()
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Saved,
    asked: Asked,
    terms: Terms = NO_TERMS,
    sequences: Sequences = DENSE,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, shaped and typed as q, k, v, of what `forward` gave for the same arguments, with
    rng_state where there is dropout."""
    if terms.dropout_p == 0.0:
        terms = terms._replace(rng_state=None)
    elif terms.rng_state is None:
        raise ValueError("rng_state must be the forward's, with dropout_p, got None")
    scale, mask = asked.softmax_scale, mask_of(asked.causal, asked.window_size)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    # Kernels have head dimensions that are multiples of 8, and one for all.
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    wide = -(-max(sizes) // 8) * 8
    tensors = (saved.dout, q, k, v, saved.out)
    padded = (F.pad(x, (0, wide - x.shape[-1])) for x in tensors)
    given = (*padded, saved.softmax_lse.contiguous(), None)
    how = (scale, mask.left, mask.right, "", asked.deterministic, *terms)
    if sequences is DENSE:
        found = ops.attention_backward(*given, *how)
    else:
        found = ops.attention_packed_backward(*given, *how, *sequences)
    dq, dk, dv = (x[..., :size] for x, size in zip(found, sizes, strict=True))
    return dq, dk, dv
