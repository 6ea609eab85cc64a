"""How much slower is too slow: for all cases, and for those a pattern names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from flashmoe.ratchet.errors import UserError


@dataclass(frozen=True, slots=True)
class Thresholds:
    """In percent: `fail` -3 is our time, as a multiple of SDPA's, growing by a factor of 1.03;
    `improve` 5 is its shrinking by a factor of 1.05. `cases` has (pattern, Thresholds) pairs, of
    which the last that matches a case's name replaces these."""

    fail: float
    improve: float
    cases: tuple[tuple[str, Thresholds], ...] = ()

    def __post_init__(self) -> None:
        if not -100 < self.fail < 0:
            raise UserError(f"threshold-fail must be between -100 and 0, got {self.fail}")
        if not 0 < self.improve < math.inf:
            raise UserError(f"threshold-improve must be positive, got {self.improve}")

    def of(self, name: str) -> Thresholds:
        for pattern, thresholds in reversed(self.cases):
            if fnmatchcase(name, pattern):
                return thresholds
        return self

    def check(self, names: Iterable[str]) -> None:
        """Raises UserError when a pattern names none of `names`: it was meant for some case."""
        known = list(names)
        for pattern, _ in self.cases:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UserError(
                    f"threshold {pattern!r} names no case; there are {', '.join(known)}"
                )

    @property
    def log_fail(self) -> float:
        """The size of the slowdown, as a logarithm; positive."""
        return math.log1p(-self.fail / 100)

    @property
    def log_improve(self) -> float:
        return math.log1p(self.improve / 100)

    def __str__(self) -> str:
        return f"{self.fail:+g} % / {self.improve:+g} %"


# By the kind of device. A CPU's processes differ more; what that means is in docs/ratchet.md.
DEFAULTS = {"cuda": Thresholds(-3.0, 5.0), "cpu": Thresholds(-8.0, 8.0)}


def with_cases(fail: float, improve: float, texts: Sequence[str]) -> Thresholds:
    """`texts` as PATTERN=FAIL or PATTERN=FAIL/IMPROVE, in percent."""
    cases = []
    for text in texts:
        pattern, _, values = text.rpartition("=")
        low, slash, high = values.partition("/")
        try:
            one = Thresholds(float(low), float(high) if slash else improve)
        except ValueError:
            one = None
        if one is None or not pattern:
            raise UserError(
                f"threshold must look like 'fwd-b8-*=-5' or 'fwd-b8-*=-5/+8', got {text!r}"
            )
        cases.append((pattern, one))
    return Thresholds(fail, improve, tuple(cases))


def percent(ratio: float) -> float:
    """A ratio of speeds as people say it: 1.05 is 5 % faster, and 1 / 1.03, for what takes 3 %
    longer, is -3."""
    return 100.0 * (ratio - 1.0) if ratio >= 1 else -100.0 * (1.0 / ratio - 1.0)
