"""Which problems are measured. A case's name says all about it, and any such name is a case."""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from flashmoe.ratchet.errors import UserError
from flashmoe.spec.mask import FULL
from flashmoe.spec.mask import parse as parse_mask
from flashmoe.spec.problem import DTYPE_BYTES, LAYOUTS, TERMS, Problem

# What is timed: a forward, a backward whose forward ran before, or one after the other.
DIRECTIONS = {"fwd": ("fwd",), "bwd": ("bwd",), "fwdbwd": ("fwd", "bwd")}
_WORDS = {"fwd": "forward", "bwd": "backward", "fwdbwd": "training"}
NAME_FORM = (
    f"({'|'.join(DIRECTIONS)})-bBATCH-hHEADS[kKV_HEADS]-sSEQLEN[xSEQLEN_KV]-dHEAD_DIM[vHEAD_DIM_V]"
    "-DTYPE"
    f"[-causal|-window-LEFT-RIGHT]{''.join(f'[-{term}]' for term in TERMS)}"
    f"[-{'|-'.join(LAYOUTS[1:])}]"
)
_NAME = re.compile(
    rf"(?P<mode>{'|'.join(DIRECTIONS)})-b(?P<batch>\d+)-h(?P<heads_q>\d+)(?:k(?P<heads_kv>\d+))?"
    r"-s(?P<seqlen_q>\d+)(?:x(?P<seqlen_kv>\d+))?-d(?P<head_dim>\d+)"
    r"(?:v(?P<head_dim_v>\d+))?"
    rf"-(?P<dtype>{'|'.join(DTYPE_BYTES)})(?:-(?P<mask>causal|window-\w+-\w+))?"
    rf"(?P<terms>{''.join(f'(?:-{term})?' for term in TERMS)})"
    rf"(?:-(?P<layout>{'|'.join(LAYOUTS[1:])}))?"
)
# Below so many queries each, they are tokens that a model decodes.
_DECODED = 16


@dataclass(frozen=True, slots=True)
class Case:
    """A forward problem, and what of it is timed: one of DIRECTIONS."""

    problem: Problem
    mode: str = "fwd"

    def __post_init__(self) -> None:
        p = self.problem
        if p.direction != "fwd":
            raise ValueError(f"direction must be fwd, got {p.direction!r}")
        if 0 in (p.batch, p.seqlen_q, p.seqlen_kv):
            raise ValueError("batch, seqlen_q and seqlen_kv must be at least 1")
        if self.backward and p.layout not in ("dense", "packed"):
            raise ValueError(f"layout must be dense or packed in a backward, got {p.layout!r}")
        object.__setattr__(self, "problem", replace(p, lengths=_lengths(p)))

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS[self.mode]

    @property
    def backward(self) -> bool:
        return "bwd" in self.directions

    @property
    def name(self) -> str:
        """Unique, and parsed back by `parse`."""
        p = self.problem
        heads = f"h{p.heads_q}" + (f"k{p.heads_kv}" if p.heads_kv != p.heads_q else "")
        seqlen = f"s{p.seqlen_q}" + (f"x{p.seqlen_kv}" if p.seqlen_kv != p.seqlen_q else "")
        sizes = "-".join((self.mode, f"b{p.batch}", heads, seqlen, f"d{p.dims}", p.dtype))
        return f"{sizes}-{p.kind}".replace("-full", "")

    @property
    def kind(self) -> str:
        """Direction, layout and features in words, by which reports keep cases apart: `forward`,
        `decode, paged`, `backward, packed, softcap`."""
        p = self.problem
        decoded = p.seqlen_q < _DECODED < p.seqlen_kv and not self.backward
        features = [name for name in (*LAYOUTS, "window", *TERMS) if name in p.features - {"cache"}]
        if p.head_dim_v is not None:
            features.append("head_dim_v")
        return ", ".join(("decode" if decoded else _WORDS[self.mode], *features))

    @property
    def yardstick(self) -> Problem:
        """What SDPA is timed on: this problem where SDPA computes the same, and otherwise a dense
        one of like size, whose only job is not to change. SDPA has no terms, windows and lengths,
        and aligns a causal mask top-left: such a case's has as many rows as a sequence has, and as
        many keys as a query sees, in the mean."""
        p = replace(self.problem, terms=(), layout="dense", lengths=())
        square = p.mask.is_causal and p.seqlen_q == p.seqlen_kv
        if self.problem.layout == "dense" and (p.mask.is_full or square):
            return p
        lengths = self.problem.histogram
        rows = sum(seqlen_q * count for seqlen_q, _, count in lengths)
        pairs = sum(p.mask.pairs(*both) * count for *both, count in lengths)
        seqlen_q, seqlen_kv = max(1, round(rows / p.batch)), max(1, pairs // rows)
        return replace(p, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, mask=FULL)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems one timed call solves."""
        return tuple(replace(self.problem, direction=d) for d in self.directions)

    @property
    def flops(self) -> float:
        return sum(problem.flops for problem in self.problems)

    @property
    def bytes(self) -> float:
        return sum(problem.bytes for problem in self.problems)


def _lengths(p: Problem) -> tuple[tuple[int, int, int], ...]:
    """Where lengths may differ they do: spread evenly up to the problem's bounds."""

    def share(i: int, bound: int) -> int:
        return max(1, round((i + 1) * bound / p.batch))

    if p.layout == "dense":
        return ()
    packed = p.layout.startswith("packed")
    rows = [share(i, p.seqlen_q) if packed else p.seqlen_q for i in range(p.batch)]
    return tuple((seqlen_q, share(i, p.seqlen_kv), 1) for i, seqlen_q in enumerate(rows))


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
            terms=tuple(match["terms"].split("-")[1:]),
            layout=match["layout"] or "dense",
            head_dim_v=n.get("head_dim_v"),
        )
        if (problem.batch, problem.seqlen_q) != (n["batch"], n["seqlen_q"]):
            raise ValueError("batch and seqlen_q must be powers of two where they are packed")
        return Case(problem, match["mode"])
    except ValueError as error:
        raise UserError(f"case {name!r}: {error}") from None


def _suites() -> dict[str, dict[str, tuple[str, ...]]]:
    """The cases' names by suite and kind of device."""
    text = Path(__file__).with_name("suites.ini").read_text(encoding="utf-8")
    read = configparser.ConfigParser(allow_no_value=True)
    read.read_string(text)
    found: dict[str, dict[str, tuple[str, ...]]] = {"quick": {}, "full": {}, "sota": {}}
    for section in read.sections():
        suite, kind = section.split()
        found[suite][kind] = tuple(read[section])
    found["full"] = {kind: found["quick"][kind] + more for kind, more in found["full"].items()}
    return found


SUITES = _suites()


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
