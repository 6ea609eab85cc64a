"""Mask: which keys a query sees. csrc/common/mask.h says the same in C++."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


def _sum_clamped(count: int, offset: int, limit: int) -> int:
    """The sum over i from 0 to count - 1 of i + offset, clamped to 0 .. limit."""
    rising = max(min(count, limit - offset), 0)  # the first i at which the limit holds
    begin = min(max(-offset, 0), rising)  # the first i at which it is not negative
    return (begin + rising - 1 + 2 * offset) * (rising - begin) // 2 + (count - rising) * limit


@dataclass(frozen=True, slots=True)
class Mask:
    """A window: query i sees key j when -left <= j - (i + seqlen_kv - seqlen_q) <= right. It is
    aligned bottom-right: the last query is level with the last key. -1: no limit on that side.

    Raises ValueError for a limit that is no integer or less than -1.
    """

    left: int = -1
    right: int = -1

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            limit = getattr(self, name)
            if not isinstance(limit, int) or isinstance(limit, bool) or not -1 <= limit < 2**63:
                raise ValueError(f"{name} must be an integer of at least -1, got {limit!r}")

    @property
    def is_full(self) -> bool:
        return self == FULL

    @property
    def is_causal(self) -> bool:
        """Whether it is what attention calls causal, without a window."""
        return self == CAUSAL

    @property
    def is_local(self) -> bool:
        """Whether it is neither full nor causal: what takes a kernel with windows."""
        return self.left >= 0 or self.right > 0

    def reduced(self, seqlen_q: int, seqlen_kv: int) -> Mask:
        """The mask with no limit where a limit hides nothing: the last query sees every key that
        its left limit lets it, and the first one every key that its right limit lets it."""
        return Mask(
            -1 if self.left >= seqlen_kv - 1 else self.left,
            -1 if self.right >= seqlen_q - 1 else self.right,
        )

    def hides(self, i: Any, j: Any, seqlen_q: int, seqlen_kv: int) -> Any:
        """Whether query i does not see key j: of integers a bool, of arrays or tensors that
        broadcast an array of them."""
        ahead = j - (i + (seqlen_kv - seqlen_q))
        hidden = ahead != ahead  # nothing, in the shape of both
        if self.left >= 0:
            hidden = hidden | (ahead < -self.left)
        if self.right >= 0:
            hidden = hidden | (ahead > self.right)
        return hidden

    def visible(
        self, row_begin: int, row_end: int, seqlen_q: int, seqlen_kv: int
    ) -> tuple[int, int]:
        """The keys from the first to before the second number: what any of the rows from row_begin
        to row_end - 1 sees. Equal numbers where there is none."""
        diagonal = seqlen_kv - seqlen_q
        begin, end = 0, seqlen_kv
        if self.right >= 0:
            end = min(end, row_end + diagonal + self.right)
        if self.left >= 0:
            begin = max(begin, row_begin + diagonal - self.left)
        return begin, max(begin, end)

    def of_rows(
        self, row_begin: int, row_end: int, seqlen_q: int, seqlen_kv: int
    ) -> tuple[int, int, Mask]:
        """`visible`, and the mask under which the rows from row_begin to row_end - 1 and those keys
        alone are a problem of their own."""
        begin, end = self.visible(row_begin, row_end, seqlen_q, seqlen_kv)
        if begin == end:
            return begin, end, FULL
        # How much further right the last of these rows stands among these keys: never more than 0.
        shift = row_end + seqlen_kv - seqlen_q - end
        left, right = self.left, self.right
        return (
            begin,
            end,
            Mask(left if left < 0 else left - shift, right if right < 0 else right + shift),
        )

    def pairs(self, seqlen_q: int, seqlen_kv: int) -> int:
        """How many (query, key) pairs are visible."""
        diagonal = seqlen_kv - seqlen_q
        seen = seqlen_q * seqlen_kv
        if self.right >= 0:
            seen = _sum_clamped(seqlen_q, diagonal + self.right + 1, seqlen_kv)
        if self.left >= 0:
            seen -= _sum_clamped(seqlen_q, diagonal - self.left, seqlen_kv)
        return seen

    def __str__(self) -> str:
        """full, causal, or window-LEFT-RIGHT with `any` for no limit."""
        if self.is_full:
            return "full"
        if self.is_causal:
            return "causal"
        return "window-" + "-".join("any" if x < 0 else str(x) for x in (self.left, self.right))


def parse(text: str) -> Mask:
    """The mask that `str` writes so. Raises ValueError for any other text."""
    if text in ("full", "causal"):
        return CAUSAL if text == "causal" else FULL
    match = re.fullmatch(r"window-(any|\d+)-(any|\d+)", text)
    if match is None:
        raise ValueError(f"mask must be full, causal or window-LEFT-RIGHT, got {text!r}")
    return Mask(*(-1 if x == "any" else int(x) for x in match.groups()))


def causal_if(condition: bool) -> Mask:
    return CAUSAL if condition else FULL


FULL = Mask()
CAUSAL = Mask(right=0)
