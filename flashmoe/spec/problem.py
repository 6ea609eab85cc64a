"""Problem: what one attention call computes, in the field's own terms."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DIRECTIONS = ("fwd", "bwd")
MAX_HEAD_DIM = 256


def _ceil_pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length() if n > 0 else 0


def _require_integer(name: str, value: object, least: int) -> None:
    # True is an int to Python; sizes are 64 bits wide to torch.
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ValueError(f"{name} must be an integer from {least} to 2**63 - 1, got {value!r}")


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention problem: q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_kv,
    heads_kv, head_dim). `causal` is aligned bottom-right: query i sees key j when
    j <= i + seqlen_kv - seqlen_q.

    Raises ValueError, naming the field, its value and what is allowed.
    """

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    dtype: str
    causal: bool = False
    direction: str = "fwd"

    def __post_init__(self) -> None:
        for name in ("batch", "seqlen_q", "seqlen_kv", "head_dim"):
            _require_integer(name, getattr(self, name), 0)
        for name in ("heads_q", "heads_kv"):
            _require_integer(name, getattr(self, name), 1)
        if self.heads_q % self.heads_kv:
            raise ValueError(
                f"heads_q must be a multiple of heads_kv ({self.heads_kv}), got {self.heads_q}"
            )
        if self.head_dim % 8 or not 8 <= self.head_dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim must be a multiple of 8 and at most {MAX_HEAD_DIM}, got {self.head_dim}"
            )
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal must be true or false, got {self.causal!r}")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"direction must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}"
            )

    @property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs the mask of one head lets through."""
        if not self.causal:
            return self.seqlen_q * self.seqlen_kv
        # The last rows see all keys, all but one, ...; rows before the first key see none.
        rows = min(self.seqlen_q, self.seqlen_kv)
        return rows * self.seqlen_kv - rows * (rows - 1) // 2

    @property
    def flops(self) -> int:
        """4 * head_dim for each visible (query, key) pair of each query head; backward 2.5 times
        that."""
        each = 4 if self.direction == "fwd" else 10
        return each * self.batch * self.heads_q * self.visible_pairs * self.head_dim

    @property
    def bytes(self) -> float:
        """Bytes of device memory traffic when each tensor is read or written once."""
        size = DTYPE_BYTES[self.dtype]
        q = float(self.batch * self.seqlen_q * self.heads_q * self.head_dim * size)
        kv = float(self.batch * self.seqlen_kv * self.heads_kv * self.head_dim * size)
        lse = 4.0 * self.batch * self.heads_q * self.seqlen_q
        if self.direction == "fwd":
            return 2 * q + 2 * kv + lse  # q, out; k, v
        return 4 * q + 4 * kv + lse  # q, out, dout, dq; k, v, dk, dv

    @property
    def bucket(self) -> str:
        """The key under which tuned results are stored.

        Exact in direction, dtype, causal, head_dim and group size; batch * heads_q, seqlen_q and
        seqlen_kv rounded up to a power of two.
        """
        return "-".join([self.bucket_kind, *(f"{a}{n}" for a, n in self.bucket_sizes.items())])

    @property
    def bucket_kind(self) -> str:
        """The part of the bucket that is exact."""
        mask = "causal" if self.causal else "full"
        group = self.heads_q // self.heads_kv
        return f"{self.direction}-{self.dtype}-{mask}-d{self.head_dim}-g{group}"

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
        """A short human-readable name, unique per problem."""
        heads = str(self.heads_q)
        if self.heads_kv != self.heads_q:
            heads += f"/{self.heads_kv}"
        seqlen = str(self.seqlen_q)
        if self.seqlen_kv != self.seqlen_q:
            seqlen += f"x{self.seqlen_kv}"
        mask = " causal" if self.causal else ""
        return (
            f"{self.direction} b{self.batch} h{heads} s{seqlen} d{self.head_dim} {self.dtype}{mask}"
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Problem:
        """Raises ValueError for unknown or missing fields as well as for illegal values."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - names):
            raise ValueError(f"problem has unknown fields {unknown}; known are {sorted(names)}")
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"problem is incomplete: {error}") from None
