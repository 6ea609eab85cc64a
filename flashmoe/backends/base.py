"""The protocol of a backend: it knows its tiles and runs them; it chooses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from flashmoe.machine.device import Arch
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

# out as q, with v's head_dim (contiguous), and softmax_lse (batch, heads_q, seqlen_q), float32,
# natural logarithm; None where the backend does not return it.
Run = Callable[[Call], tuple[Tensor, Tensor | None]]
# dq, dk, dv, contiguous, as q, k and v.
RunBackward = Callable[[Call, Saved], tuple[Tensor, Tensor, Tensor]]


# What a backend computes beyond full and causal attention, by direction (Problem.features). No
# entry for a direction that it does not have.
Features = Mapping[str, frozenset[str]]


class Backend(Protocol):
    """What a backend does not say itself, it inherits."""

    name: str
    features: ClassVar[Features]

    def unavailable(self, device: torch.device) -> str:
        """Why nothing can run on `device`, in one line; empty when it can."""
        ...

    def unsupported(self, problem: Problem, arch: Arch) -> str:
        """Why `problem` cannot run here whatever the tile; empty when it can."""
        return lacking(self, problem)

    def default_tile(self, problem: Problem, arch: Arch) -> Tile | None:
        """The tile used untuned; None for a backend without tiles. Legal for `problem`."""
        ...

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        """Every tile worth trying for `problem`, all legal; empty for a backend without tiles."""
        ...

    def compiled_in(self, problem: Problem, arch: Arch) -> list[Tile]:
        """The legal tiles that the package brings compiled."""
        return []

    def untuned_tiles(self, problem: Problem, arch: Arch) -> list[Tile | None]:
        """What untuned plans choose from: the compiled-in ones, or else the default."""
        return [*self.compiled_in(problem, arch)] or [self.default_tile(problem, arch)]

    def predicted(self, tile: Tile | None, problem: Problem, arch: Arch) -> float | None:
        """Microseconds that `problem` is predicted to take with `tile`; None where nobody knows."""
        return None

    def ready(self, tile: Tile | None, problem: Problem, arch: Arch) -> bool:
        """Whether `tile`, unless it is rejected, runs `problem` without waiting for a compiler that
        can be done without."""
        return True

    def rejects(self, tile: Tile | None, problem: Problem, arch: Arch) -> str:
        """Why this backend cannot run `problem` with `tile`; empty when it can."""
        ...

    def repeats(self, tile: Tile | None, problem: Problem) -> bool:
        """Whether gradients can be the same bits every time."""
        return True

    def handle(
        self, problem: Problem, tile: Tile | None, deterministic: bool = False
    ) -> int | None:
        """Of the kernel that runs `problem`, in C++ alone; None where it needs Python."""
        return None

    def bind(self, problem: Problem, tile: Tile | None) -> Run:
        """The forward of `problem` with `tile`, with as little left to do in a call as there can
        be."""
        missing = f"the {self.name} backend has no forward kernel"
        raise NotImplementedError(missing)

    def bind_backward(
        self, problem: Problem, tile: Tile | None, deterministic: bool = False
    ) -> RunBackward:
        """The same for the backward of `problem`, whose direction is bwd; deterministic, where
        `repeats` says that it can."""
        missing = f"the {self.name} backend has no backward kernel"
        raise NotImplementedError(missing)


@runtime_checkable
class Precompiles(Protocol):
    """A backend that compiles tiles on the user's machine has this, too."""

    def is_compiled(self, tile: Tile, problem: Problem) -> bool:
        """Whether it runs without a compiler: compiled in, or cached, as far as this is known."""
        ...

    def precompile(self, tile: Tile, problem: Problem, device: torch.device) -> None:
        """Compile what forward needs to run contiguous tensors of `problem` with `tile`, into a
        cache that other processes read. Runs no kernel."""
        ...


# A number of splits: so many that a sequence's results are the same bits whatever else is in the
# batch.
BATCH_INVARIANT = -1


@runtime_checkable
class SplitsKeys(Protocol):
    """A backend that splits the keys of a sequence has this, too."""

    def bind_split(self, problem: Problem, tile: Tile | None, num_splits: int) -> Run:
        """Backend.bind with so many parts at most, each a thread block's; 0: as many as fill the
        GPU."""
        ...


@runtime_checkable
class Enumerates(Protocol):
    """A backend whose tiles are the legal ones of a larger set has this, too."""

    def reasons(self, problem: Problem, arch: Arch) -> Mapping[Tile, str]:
        """Of every tile that `tiles` chose from: why it is out, empty for those that are in."""
        ...


def lacking(backend: Backend, problem: Problem) -> str:
    """What `problem` needs that `backend` does not have, as a reason; empty when it has all."""
    features = backend.features.get(problem.direction)
    if features is None:
        return f"has no {'backward' if problem.direction == 'bwd' else 'forward'} kernel"
    missing = sorted(problem.features - features)
    return f"has no {', '.join(missing)} in this direction" if missing else ""


def reasons_of(
    considered: Iterable[Tile], tiles: Iterable[Tile], problem: Problem, arch: Arch
) -> dict[Tile, str]:
    """Enumerates.reasons of a backend whose `tiles` come from `considered` by Tile.violations, and
    by leaving out what does the same as others."""
    reasons = dict.fromkeys(tiles, "")
    for tile in considered:
        if tile not in reasons:
            broken = tile.violations(arch, problem)
            reasons[tile] = broken[0] if broken else "it does the same as another tile"
    return reasons


class Default(NamedTuple):
    """The default tile for head dimensions up to head_dim, if the mask has a right limit or not as
    causal says (None: either) and there are min_seqlen_q queries."""

    head_dim: int
    tile: Tile
    causal: bool | None = None
    min_seqlen_q: int = 0


def first_default(defaults: Iterable[Default], problem: Problem, arch: Arch) -> Tile | None:
    """The tile of the first entry that applies to `problem` and is legal; None without one."""
    for default in defaults:
        if (
            problem.padded_dim <= default.head_dim
            and default.causal in (None, problem.mask.right >= 0)
            and problem.seqlen_q >= default.min_seqlen_q
            and not default.tile.violations(arch, problem)
        ):
            return default.tile
    return None


def reject_without_tiles(name: str, tile: Tile | None) -> str:
    """The `rejects` of a backend that has no tiles."""
    return "" if tile is None else f"backend {name!r} has no tiles, got {tile}"


def reject_illegal(tile: Tile | None, problem: Problem, arch: Arch) -> str:
    """The `rejects` of a backend that runs every legal tile."""
    return "it needs a tile" if tile is None else "; ".join(tile.violations(arch, problem))


def last_contiguous(x: Tensor) -> Tensor:
    """x, copied only when its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matmuls on x's device are as exact as float32 holds: float64 where torch
    was told to round float32 operands (torch.set_float32_matmul_precision, allow_tf32). The
    operands of TF32 hold 16-bit x exactly, and what is computed from x as exactly as x."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.float32
    # What torch.backends.*.matmul.fp32_precision asks, in a fifth of the time.
    precision = torch._C._get_fp32_precision_getter("cuda" if x.is_cuda else "mkldnn", "matmul")
    return torch.float64 if precision in ("bf16", "tf32") else torch.float32
