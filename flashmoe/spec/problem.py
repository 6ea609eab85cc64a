"""Problem: what one attention call computes, in the field's own terms."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmoe.spec.mask import FULL, Mask, causal_if
from flashmoe.spec.terms import TERMS as TERMS

if TYPE_CHECKING:
    from torch import Tensor

    from flashmoe.spec.call import Call

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DIRECTIONS = ("fwd", "bwd")
# How sequences lie in memory: one by one; one behind the other; or keys in a cache, whose lengths
# are read on the device, dense or in pages, and queries either way.
LAYOUTS = ("dense", "packed", "cache", "paged", "packed-cache", "packed-paged")
MAX_HEAD_DIM = 256


def _ceil_pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length() if n > 0 else 0


@functools.cache
def _field_names() -> frozenset[str]:
    """Of what describes a problem in JSON besides its mask."""
    return frozenset(field.name for field in dataclasses.fields(Problem)) - {"mask"}


def _require_integer(name: str, value: object, least: int) -> None:
    # True is an int to Python; sizes are 64 bits wide to torch.
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ValueError(f"{name} must be an integer from {least} to 2**63 - 1, got {value!r}")


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention problem: q (batch, seqlen_q, heads_q, head_dim), k (batch, seqlen_kv, heads_kv,
    head_dim) and v the same of `value_dim`: head_dim_v, which is None where it is head_dim. `mask`
    says which keys a query sees; limits that hide nothing are dropped. `terms` are some of TERMS.

    Where `layout` is not dense, batch counts the sequences, and seqlen_q and seqlen_kv are upper
    bounds of their lengths. Packed sizes, which differ from call to call, are rounded up to powers
    of two: many calls are one problem, and planned once. `lengths` says which sequences there are,
    as a histogram of (seqlen_q, seqlen_kv, how many of them), where that is known: a recorded or a
    tuned problem. Without it every sequence is as long as may be. A plan does not depend on it.

    Raises ValueError, naming the field, its value and what is allowed.
    """

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    dtype: str
    mask: Mask = FULL
    direction: str = "fwd"
    terms: tuple[str, ...] = ()
    layout: str = "dense"
    lengths: tuple[tuple[int, int, int], ...] = ()
    head_dim_v: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "seqlen_q", "seqlen_kv", "head_dim"):
            _require_integer(name, getattr(self, name), 0)
        for name in ("heads_q", "heads_kv"):
            _require_integer(name, getattr(self, name), 1)
        if self.heads_q % self.heads_kv:
            raise ValueError(
                f"heads_q must be a multiple of heads_kv ({self.heads_kv}), got {self.heads_q}"
            )
        for name in ("head_dim", "head_dim_v"):
            size = getattr(self, name)
            if name == "head_dim_v" and size is None:
                continue
            _require_integer(name, size, 0)
            if size % 8 or not 8 <= size <= MAX_HEAD_DIM:
                raise ValueError(
                    f"{name} must be a multiple of 8 and at most {MAX_HEAD_DIM}, got {size}"
                )
        if not isinstance(self.mask, Mask):
            raise ValueError(f"mask must be a Mask, got {self.mask!r}")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"direction must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}"
            )
        if not isinstance(self.terms, tuple) or not set(self.terms) <= set(TERMS):
            raise ValueError(f"terms must be some of {', '.join(TERMS)}, got {self.terms!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if "mask" in self.terms and self.layout != "dense":
            raise ValueError(
                f"terms must not have mask unless layout is dense, got {self.layout!r}"
            )
        # One problem has one spelling.
        if self.head_dim_v == self.head_dim:
            object.__setattr__(self, "head_dim_v", None)
        object.__setattr__(self, "terms", tuple(t for t in TERMS if t in self.terms))
        if self.layout.startswith("packed"):
            rounded = ("batch", "seqlen_q", "seqlen_kv")
            for name in rounded if self.layout == "packed" else rounded[:2]:
                object.__setattr__(self, name, _ceil_pow2(getattr(self, name)))
        if self.lengths:
            object.__setattr__(self, "lengths", self._checked_lengths())
        object.__setattr__(self, "mask", self.mask.reduced(self.seqlen_q, self.seqlen_kv))

    def _checked_lengths(self) -> tuple[tuple[int, int, int], ...]:
        """Sorted, and each once."""
        if self.layout == "dense":
            raise ValueError(f"lengths must be empty in layout dense, got {self.lengths!r}")
        counts: Counter[tuple[int, int]] = Counter()
        for each in self.lengths:
            for number in each:
                _require_integer("lengths", number, 0)
            seqlen_q, seqlen_kv, count = each
            if seqlen_q > self.seqlen_q or seqlen_kv > self.seqlen_kv:
                bounds = f"seqlen_q ({self.seqlen_q}) and seqlen_kv ({self.seqlen_kv})"
                raise ValueError(f"lengths must be at most {bounds}, got {list(each)}")
            counts[seqlen_q, seqlen_kv] += count
        is_packed = self.layout.startswith("packed")
        if not is_packed and any(seqlen_q != self.seqlen_q for seqlen_q, _ in counts):
            raise ValueError(f"lengths of queries must all be seqlen_q in layout {self.layout}")
        found = sum(counts.values())
        if found > self.batch or not (is_packed or found == self.batch):
            raise ValueError(f"lengths must be of batch ({self.batch}) sequences, got {found}")
        return tuple((*pair, count) for pair, count in sorted(counts.items()) if count)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, mask: Mask = FULL, direction: str = "fwd") -> Problem:
        """The problem of q (batch, seqlen_q, heads_q, head_dim) and k (batch, seqlen_kv, heads_kv,
        head_dim)."""
        batch, seqlen_q, heads_q, head_dim = q.shape
        seqlen_kv, heads_kv = k.shape[1], k.shape[2]
        sizes = (batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim)
        return cls(*sizes, str(q.dtype).removeprefix("torch."), mask, direction)

    @classmethod
    def of_call(cls, call: Call, mask: Mask = FULL, direction: str = "fwd") -> Problem:
        """The problem of `call`, whose lengths are not read."""
        q, k, sequences = call.q, call.k, call.sequences
        batch, seqlen_q, seqlen_kv = q.shape[0], q.shape[-3], k.shape[-3]
        if sequences.block_table is not None:
            seqlen_kv *= sequences.block_table.shape[1]
        if sequences.cu_seqlens_q is not None:
            batch = sequences.cu_seqlens_q.shape[0] - 1
            seqlen_q = min(seqlen_q, sequences.max_seqlen_q)
        if sequences.cu_seqlens_k is not None:
            seqlen_kv = min(seqlen_kv, sequences.max_seqlen_k)
        return cls(
            *(batch, q.shape[-2], k.shape[-2], seqlen_q, seqlen_kv, q.shape[-1]),
            dtype=str(q.dtype).removeprefix("torch."),
            mask=mask,
            direction=direction,
            terms=call.terms.names,
            layout=sequences.layout,
            head_dim_v=call.v.shape[-1],
        )

    @property
    def features(self) -> frozenset[str]:
        """What a kernel must have beyond full and causal attention of equal head counts."""
        window = {"window"} if self.mask.is_local else set()
        own_dim = set() if self.head_dim_v is None else {"head_dim_v"}
        layout = set(self.layout.split("-")) - {"dense"}
        return frozenset(window | own_dim | layout | set(self.terms))

    @property
    def value_dim(self) -> int:
        """The head_dim of v and out."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def padded_dim(self) -> int:
        """The one head_dim that kernels without a head_dim_v run it with."""
        return max(self.head_dim, self.value_dim)

    @property
    def dims(self) -> str:
        """`192`, or `192v128`."""
        return (
            f"{self.head_dim}" if self.head_dim_v is None else f"{self.head_dim}v{self.value_dim}"
        )

    @property
    def kind(self) -> str:
        """Mask, terms and layout in one word: `causal`, `full-softcap-packed`."""
        layout = () if self.layout == "dense" else (self.layout,)
        return "-".join((str(self.mask), *self.terms, *layout))

    @property
    def histogram(self) -> tuple[tuple[int, int, int], ...]:
        """`lengths`, or those of sequences that are all as long as may be."""
        return self.lengths or ((self.seqlen_q, self.seqlen_kv, self.batch),)

    @property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs the mask of one head lets through in a full sequence."""
        return self.mask.pairs(self.seqlen_q, self.seqlen_kv)

    @property
    def flops(self) -> int:
        """Of each visible (query, key) pair of each query head, 2 for every product: head_dim in
        Q K^T and value_dim in P V; backward head_dim in three matmuls and value_dim in two."""
        of_k, of_v = (2, 2) if self.direction == "fwd" else (6, 4)
        pairs = sum(count * self.mask.pairs(q, k) for q, k, count in self.histogram)
        return self.heads_q * pairs * (of_k * self.head_dim + of_v * self.value_dim)

    @property
    def bytes(self) -> float:
        """Bytes of device memory traffic when each tensor is read or written once."""
        size = DTYPE_BYTES[self.dtype]
        rows, keys = (sum(x[i] * x[2] for x in self.histogram) for i in (0, 1))
        columns = self.head_dim + self.value_dim  # q and out, k and v; and their gradients
        both = float(size * columns * (rows * self.heads_q + keys * self.heads_kv))
        lse = 4.0 * rows * self.heads_q
        return (both if self.direction == "fwd" else 2 * both) + lse

    @property
    def bucket(self) -> str:
        """The key under which tuned results are stored.

        Exact in direction, dtype, mask, head dimensions and group size; batch * heads_q, seqlen_q
        and seqlen_kv rounded up to a power of two.
        """
        return "-".join([self.bucket_kind, *(f"{a}{n}" for a, n in self.bucket_sizes.items())])

    @property
    def bucket_kind(self) -> str:
        """The part of the bucket that is exact."""
        group = self.heads_q // self.heads_kv
        return f"{self.direction}-{self.dtype}-{self.kind}-d{self.dims}-g{group}"

    @property
    def bucket_sizes(self) -> dict[str, int]:
        """The part of the bucket that is rounded up to powers of two: batch * heads_q (bh),
        seqlen_q (q) and seqlen_kv (k)."""
        return {
            "bh": _ceil_pow2(self.batch * self.heads_q),
            "q": _ceil_pow2(self.seqlen_q),
            "k": _ceil_pow2(self.seqlen_kv),
        }

    @property
    def label(self) -> str:
        """A short human-readable name, unique per problem but for lengths of the same sums."""
        heads = str(self.heads_q)
        if self.heads_kv != self.heads_q:
            heads += f"/{self.heads_kv}"
        seqlen = str(self.seqlen_q)
        if self.seqlen_kv != self.seqlen_q:
            seqlen += f"x{self.seqlen_kv}"
        kind = "" if self.kind == str(FULL) else f" {self.kind}"
        if self.lengths:
            rows, keys = (sum(x[i] * x[2] for x in self.lengths) for i in (0, 1))
            kind += f" of {rows}x{keys}"
        return f"{self.direction} b{self.batch} h{heads} s{seqlen} d{self.dims} {self.dtype}{kind}"

    def to_json(self) -> dict[str, Any]:
        """Its fields; the mask as `causal`, and `window` [left, right] where it is neither full nor
        causal; terms, layout, lengths and head_dim_v only where there are any."""
        data = dataclasses.asdict(self) | {"causal": self.mask.is_causal}
        if self.mask.is_local:
            data["window"] = [self.mask.left, self.mask.right]
        del data["mask"], data["terms"]
        if self.terms:
            data["terms"] = list(self.terms)
        if self.layout == "dense":
            del data["layout"]
        data["lengths"] = [list(each) for each in self.lengths]
        if not self.lengths:
            del data["lengths"]
        if self.head_dim_v is None:
            del data["head_dim_v"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Problem:
        """Raises ValueError for unknown or missing fields as well as for illegal values."""
        fields = dict(data)
        causal, window = fields.pop("causal", False), fields.pop("window", None)
        if unknown := sorted(fields.keys() - _field_names()):
            known = sorted([*_field_names(), "causal", "window"])
            raise ValueError(f"problem has unknown fields {unknown}; known are {known}")
        if not isinstance(causal, bool):
            raise ValueError(f"causal must be true or false, got {causal!r}")
        mask = causal_if(causal)
        if window is not None:
            if not isinstance(window, list) or len(window) != 2:
                raise ValueError(f"window must be [left, right], got {window!r}")
            left, right = window
            mask = Mask(left, 0 if causal else right)
        terms = fields.pop("terms", [])
        if not isinstance(terms, list) or not all(isinstance(term, str) for term in terms):
            raise ValueError(f"terms must be a list of some of {', '.join(TERMS)}, got {terms!r}")
        lengths = fields.pop("lengths", [])
        if not isinstance(lengths, list) or any(
            not isinstance(each, list) or len(each) != 3 for each in lengths
        ):
            raise ValueError(
                f"lengths must be a list of [seqlen_q, seqlen_kv, count], got {lengths!r}"
            )
        fields["lengths"] = tuple(map(tuple, lengths))
        try:
            return cls(**fields, terms=tuple(terms), mask=mask)
        except TypeError as error:
            raise ValueError(f"problem is incomplete: {error}") from None
