"""Which problems are measured. A case's name says all about it, and any such name is a case."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from flashmoe.ratchet.errors import UserError
from flashmoe.spec.mask import FULL
from flashmoe.spec.mask import parse as parse_mask
from flashmoe.spec.problem import DTYPE_BYTES, Problem

NAME_FORM = (
    "(fwd|fwdbwd)-bBATCH-hHEADS[kKV_HEADS]-sSEQLEN[xSEQLEN_KV]-dHEAD_DIM-DTYPE"
    "[-causal|-window-LEFT-RIGHT]"
)
_NAME = re.compile(
    r"(?P<mode>fwd|fwdbwd)-b(?P<batch>\d+)-h(?P<heads_q>\d+)(?:k(?P<heads_kv>\d+))?"
    r"-s(?P<seqlen_q>\d+)(?:x(?P<seqlen_kv>\d+))?-d(?P<head_dim>\d+)"
    rf"-(?P<dtype>{'|'.join(DTYPE_BYTES)})(?:-(?P<mask>causal|window-\w+-\w+))?"
)


@dataclass(frozen=True, slots=True)
class Case:
    """A forward problem, and whether its backward is measured with it."""

    problem: Problem
    backward: bool = False

    def __post_init__(self) -> None:
        p = self.problem
        if p.direction != "fwd":
            raise ValueError(f"direction must be fwd, got {p.direction!r}")
        if 0 in (p.batch, p.seqlen_q, p.seqlen_kv):
            raise ValueError("batch, seqlen_q and seqlen_kv must be at least 1")

    @property
    def name(self) -> str:
        """Unique, and parsed back by `parse`."""
        p = self.problem
        mode = "fwdbwd" if self.backward else "fwd"
        heads = f"h{p.heads_q}" + (f"k{p.heads_kv}" if p.heads_kv != p.heads_q else "")
        seqlen = f"s{p.seqlen_q}" + (f"x{p.seqlen_kv}" if p.seqlen_kv != p.seqlen_q else "")
        parts = [mode, f"b{p.batch}", heads, seqlen, f"d{p.head_dim}", p.dtype]
        return "-".join(parts if p.mask.is_full else [*parts, str(p.mask)])

    @property
    def yardstick(self) -> Problem:
        """What SDPA is timed on: this problem where SDPA computes the same. It has no windows, and
        aligns a causal mask top-left: otherwise a full problem with as many keys as a query sees in
        the mean, whose only job is not to change."""
        p = self.problem
        if p.mask.is_full or (p.mask.is_causal and p.seqlen_q == p.seqlen_kv):
            return p
        return replace(p, seqlen_kv=max(1, p.visible_pairs // p.seqlen_q), mask=FULL)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems one timed call solves."""
        if not self.backward:
            return (self.problem,)
        return (self.problem, replace(self.problem, direction="bwd"))

    @property
    def flops(self) -> float:
        return sum(problem.flops for problem in self.problems)

    @property
    def bytes(self) -> float:
        return sum(problem.bytes for problem in self.problems)


def parse(name: str) -> Case:
    """The Case of a name. Raises UserError with the form, or with what is illegal in it."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"case must look like {NAME_FORM}, got {name!r}")
    n = {key: int(value) for key, value in match.groupdict().items() if str(value).isdigit()}
    try:
        problem = Problem(
            n["batch"],
            n["heads_q"],
            n.get("heads_kv", n["heads_q"]),
            n["seqlen_q"],
            n.get("seqlen_kv", n["seqlen_q"]),
            n["head_dim"],
            match["dtype"],
            parse_mask(match["mask"] or "full"),
        )
        return Case(problem, match["mode"] == "fwdbwd")
    except ValueError as error:
        raise UserError(f"case {name!r}: {error}") from None


# Sizes that 2 cores finish in about two minutes of 12 x 120 interleaved rounds.
_CPU_QUICK = (
    # Stands in for the GPU suite's fwd-b32-h8-s512-d64, at a batch a CPU can finish.
    "fwd-b2-h8-s512-d64-float32",
    "fwd-b2-h8-s512-d64-float32-causal",
    "fwd-b1-h8-s1024-d64-float32",
    "fwd-b1-h8-s1024-d64-float32-causal",
    "fwd-b4-h8-s128-d64-float32",
    "fwd-b1-h4-s1024-d128-float32",
    "fwd-b1-h4-s1024-d128-float32-causal",
    "fwd-b1-h4-s512-d256-float32",
    "fwd-b1-h8k2-s512-d64-float32-causal",
    "fwd-b1-h1-s4096-d64-float32-causal",
    # Few queries over many keys, but not one: that is bound by memory, which others share (from
    # process to process its speedup varied by 10 %), and without GQA it is SDPA that runs it.
    "fwd-b1-h8k2-s64x4096-d64-float32",
    "fwd-b2-h8-s512-d64-bfloat16",
    "fwd-b1-h8-s1024-d64-bfloat16-causal",
)
_CPU_MORE = (
    "fwd-b1-h8-s2048-d128-float32",
    "fwd-b1-h2-s4096-d64-float32",
    "fwd-b1-h8-s1000-d80-float32",
    "fwd-b2-h8-s512-d64-float16",
    "fwd-b1-h8k1-s1024-d64-bfloat16",
    "fwd-b1-h8-s2048-d64-float32-window-256-0",
    "fwdbwd-b2-h8-s512-d64-float32",
    "fwdbwd-b1-h8-s512-d64-float32-causal",
    "fwdbwd-b1-h8k2-s512-d128-float32",
)
_CUDA_QUICK = (
    "fwd-b32-h8-s512-d64-bfloat16",
    "fwd-b32-h8-s512-d64-bfloat16-causal",
    "fwd-b32-h8-s512-d64-float16",
    "fwd-b32-h8-s512-d64-float16-causal",
    "fwd-b4-h16-s2048-d128-bfloat16",
    "fwd-b4-h16-s2048-d128-float16-causal",
    "fwd-b2-h16-s8192-d128-bfloat16",
    "fwd-b2-h16-s8192-d128-bfloat16-causal",
    "fwd-b2-h32-s8192-d64-bfloat16",
    "fwd-b4-h8-s2048-d256-bfloat16",
    "fwd-b2-h32k8-s4096-d128-bfloat16-causal",
    "fwd-b8-h16-s128-d64-bfloat16",
    "fwd-b16-h32k8-s1x8192-d128-bfloat16",
)
_CUDA_MORE = (
    "fwd-b2-h32-s8192-d64-float16-causal",
    "fwd-b4-h8-s2048-d256-float16-causal",
    "fwd-b1-h16-s16384-d128-bfloat16-causal",
    "fwd-b2-h32k1-s4096-d128-bfloat16",
    "fwd-b4-h16-s2000-d80-bfloat16",
    "fwd-b2-h16-s8192-d128-bfloat16-window-1024-0",
    "fwd-b2-h32-s8192-d64-bfloat16-window-128-0",
    "fwdbwd-b32-h8-s512-d64-bfloat16",
    "fwdbwd-b32-h8-s512-d64-float16-causal",
    "fwdbwd-b4-h16-s4096-d128-bfloat16",
    "fwdbwd-b4-h16-s4096-d128-bfloat16-causal",
    "fwdbwd-b2-h32k8-s2048-d128-bfloat16-causal",
    "fwdbwd-b2-h16-s8192-d128-bfloat16-window-1024-0",
)
# For `sota`: what papers and other libraries show.
_CPU_SOTA = (
    *_CPU_QUICK[:8],
    "fwd-b1-h8k2-s512-d64-float32-causal",
    "fwd-b4-h8-s1x2048-d64-float32",
    "fwdbwd-b2-h8-s512-d64-float32",
    "fwdbwd-b1-h8-s512-d64-float32-causal",
)
_CUDA_SOTA = (
    "fwd-b32-h16-s512-d64-bfloat16",
    "fwd-b32-h16-s512-d64-bfloat16-causal",
    "fwd-b16-h16-s1024-d128-bfloat16-causal",
    "fwd-b4-h16-s4096-d64-bfloat16",
    "fwd-b4-h16-s4096-d128-bfloat16",
    "fwd-b4-h16-s4096-d128-bfloat16-causal",
    "fwd-b4-h16-s4096-d128-float16-causal",
    "fwd-b1-h16-s16384-d128-bfloat16",
    "fwd-b1-h16-s16384-d128-bfloat16-causal",
    "fwd-b1-h8-s16384-d256-bfloat16-causal",
    "fwd-b2-h32k8-s4096-d128-bfloat16-causal",
    "fwdbwd-b4-h16-s4096-d64-bfloat16-causal",
    "fwdbwd-b4-h16-s4096-d128-bfloat16",
    "fwdbwd-b4-h16-s4096-d128-bfloat16-causal",
    "fwd-b16-h32k8-s1x8192-d128-bfloat16",
    "fwd-b1-h32k8-s1x32768-d128-bfloat16",
)
SUITES: dict[str, dict[str, tuple[str, ...]]] = {
    "quick": {"cpu": _CPU_QUICK, "cuda": _CUDA_QUICK},
    "full": {"cpu": _CPU_QUICK + _CPU_MORE, "cuda": _CUDA_QUICK + _CUDA_MORE},
    "sota": {"cpu": _CPU_SOTA, "cuda": _CUDA_SOTA},
}


def select(suite: str, device_type: str, wanted: Sequence[str] = ()) -> tuple[Case, ...]:
    """The cases of `suite`, or those `wanted`: patterns (`*causal`) over every suite of the device
    and names in full, which need not be in any suite."""
    if not wanted:
        return _distinct(SUITES[suite][device_type])
    known = SUITES["full"][device_type]
    names: list[str] = []
    for want in wanted:
        if "*" not in want and "?" not in want:
            names.append(want)
            continue
        matching = [name for name in known if fnmatchcase(name, want)]
        if not matching:
            raise UserError(f"no case matches {want!r}; there are {', '.join(known)}")
        names += matching
    return _distinct(names)


def _distinct(names: Iterable[str]) -> tuple[Case, ...]:
    return tuple(dict.fromkeys(parse(name) for name in names))
