"""Terms: what is done to scores besides scaling and masking. What users may give and what kernels
take stand here once; csrc/common/terms.h says what kernels compute."""

from __future__ import annotations

import numbers
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Terms(NamedTuple):
    """As kernels take them. Numbers and tensors in this order are arguments of the ops, too."""

    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # (heads_q,) or (batch, heads_q), float32, contiguous
    sinks: Tensor | None = None  # (heads_q,), float32, contiguous
    # The probability that a weight becomes 0; the others are divided by 1 - dropout_p. Which ones,
    # rng_state says: (2,), int64, contiguous, seed and offset (spec/dropout.py).
    dropout_p: float = 0.0
    rng_state: Tensor | None = None
    # (batch, heads_q, seqlen_q, seqlen_kv) or 1 in the place of any of them, with any strides:
    # bool, True where a query sees a key, or float32 or of q's dtype, which is added to scores.
    attn_mask: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those of TERMS that there are."""
        return tuple(
            name
            for name, field in _FIELDS.items()
            if not _is_default(getattr(self, field), self._field_defaults[field])
        )

    @property
    def numbers(self) -> tuple[float, ...]:
        found: tuple[float, ...] = _numbers(self)
        return found

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = _tensors(self)
        return found


# The terms by their names, as a Problem has them, with the fields that say whether they are there.
_FIELDS = {
    "softcap": "softcap",
    "alibi": "alibi_slopes",
    "sink": "sinks",
    "dropout": "dropout_p",
    "mask": "attn_mask",
}
TERMS = tuple(_FIELDS)
NO_TERMS = Terms()


def _is_default(value: Any, default: float | None) -> bool:
    return value is None if default is None else bool(value == default)


def _getter(is_tensor: bool) -> itemgetter[Any]:
    return itemgetter(*(i for i, default in enumerate(NO_TERMS) if (default is None) == is_tensor))


_numbers, _tensors = _getter(False), _getter(True)


def terms_of(
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Terms:
    """As users give them: not validated, and sinks of any dtype. Without any, NO_TERMS itself."""
    if (
        softcap == 0.0
        and alibi_slopes is None
        and sinks is None
        and dropout_p == 0.0
        and rng_state is None
        and attn_mask is None
    ):
        return NO_TERMS
    return Terms(softcap, alibi_slopes, sinks, dropout_p, rng_state, attn_mask)


def as_kernels_take(terms: Terms) -> Terms:
    """Of validated terms those in the dtypes and strides above. Differentiable in sinks and
    attn_mask."""
    softcap, alibi_slopes, sinks, dropout_p, rng_state, attn_mask = terms
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
    if sinks is not None:
        sinks = sinks.float().contiguous()
    if rng_state is not None:
        rng_state = rng_state.contiguous()
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    return Terms(float(softcap), alibi_slopes, sinks, float(dropout_p), rng_state, attn_mask)


# Kernels take numbers as float32, below whose smallest normal number they may become 0, and
# multiply softmax_scale by log2(e), 1.44.
_MIN_NUMBER, _MAX_NUMBER = 2.0**-126, 2.3e38
NORMAL = f"from {_MIN_NUMBER:.3g} to {_MAX_NUMBER:.3g}"


def is_normal(number: float | numbers.Real) -> bool:
    """Whether it, and its product with log2(e), is positive and a normal number in float32."""
    try:
        # float, because NumPy compares in the precision of its own side.
        return _MIN_NUMBER <= float(number) <= _MAX_NUMBER
    except OverflowError:
        return False


def check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_terms(terms: Terms, q: Tensor, batch: int) -> None:
    """Raise for what no kernel may see; of attn_mask's shape and dtype the frontend knows more."""
    import torch

    softcap, alibi_slopes, sinks, dropout_p, rng_state, attn_mask = terms
    check_number("softcap", softcap)
    if softcap != 0 and not is_normal(softcap):
        raise ValueError(f"softcap must be 0 for none, or {NORMAL}, got {softcap}")
    check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be from 0 to less than 1, got {dropout_p}")
    if rng_state is not None and dropout_p == 0:
        raise ValueError("rng_state must be None without dropout_p")
    tensors = (
        ("alibi_slopes", alibi_slopes),
        ("sinks", sinks),
        ("rng_state", rng_state),
        ("attn_mask", attn_mask),
    )
    for name, x in tensors:
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(x).__name__}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    heads = q.shape[-2]
    if alibi_slopes is not None:
        if alibi_slopes.dtype != torch.float32:
            raise TypeError(f"alibi_slopes must be float32, got {alibi_slopes.dtype}")
        if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
            raise ValueError(
                f"alibi_slopes must be (heads={heads},) or (batch={batch}, heads={heads}), "
                f"got shape {tuple(alibi_slopes.shape)}"
            )
    if rng_state is not None and (rng_state.dtype, rng_state.shape) != (torch.int64, (2,)):
        raise TypeError(
            f"rng_state must be (2,) int64, got {rng_state.dtype} of shape {tuple(rng_state.shape)}"
        )
    if sinks is not None:
        if not sinks.is_floating_point():
            raise TypeError(f"sinks must be of a floating-point dtype, got {sinks.dtype}")
        if tuple(sinks.shape) != (heads,):
            raise ValueError(f"sinks must be (heads={heads},), got shape {tuple(sinks.shape)}")
