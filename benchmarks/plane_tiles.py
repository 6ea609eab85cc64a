"""The tiles that are measured over the plane: those compiled in, and more that could be."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe import _extension
from flashmoe.machine.device import Arch
from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN, Tile

# An H200 (and an H100), as far as legality goes: to compile where there is none.
HOPPER = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
# Tiles that were the best of many somewhere on the plane, by the head_dim they are compiled for;
# besides those compiled in.
_TILES = {
    32: """
        64x32-stages4-q1-ctas2-serial
        64x48-stages2-q1-ctas2-serial
        64x64-stages2-q1-ctas2-serial
        64x64-stages3-q1-qreg-ctas2
        64x96-stages2-q1-ctas2-serial
        64x128-stages2-q1-ctas2-serial
        128x64-stages3-q1-ctas2-serial
        192x128-stages2-q1-pingpong
        192x192-stages4-q1-serial
        256x48-stages3-q2-serial
        256x64-stages4-q2-serial
    """,
    48: """
        64x32-stages4-q1-ctas2-serial
        64x64-stages3-q1-qreg-ctas2
        64x96-stages2-q1-ctas2-serial
        128x64-stages3-q1-ctas2-serial
        192x128-stages2-q1-pingpong
        256x48-stages3-q2-serial
        256x64-stages4-q2-serial
    """,
    64: """
        64x32-stages4-q1-ctas2-serial
        64x48-stages4-q1-ctas2-serial
        64x64-stages3-q1-qreg-ctas2
        64x96-stages2-q1-ctas2-serial
        64x128-stages3-q1-qreg-ctas2
        128x64-stages2-q1-ctas2-serial
        128x64-stages3-q1-ctas2-serial
        128x80-stages3-q1-ctas2-serial
        128x176-stages2-q1-pingpong
        192x128-stages2-q1-pingpong
        192x128-stages3-q2-pingpong
        192x128-stages4-q1-pingpong
        192x176-stages3-q1-serial
        192x192-stages4-q1-serial
        256x48-stages3-q2-serial
        256x80-stages3-q2-serial
    """,
    80: """
        64x32-stages4-q1-ctas2-serial
        64x48-stages2-q1-ctas2-serial
        64x64-stages3-q1-qreg-ctas2
        64x128-stages3-q1
        128x64-stages2-q1-ctas2-serial
        128x64-stages4-q1-qreg-serial
        128x128-stages3-q1-pingpong-serial
        128x128-stages3-q1-pingpong-qreg
    """,
    96: """
        64x32-stages4-q1-ctas2-serial
        64x64-stages3-q1-qreg-ctas2
        64x128-stages2-q1-qreg
        128x48-stages2-q1-ctas2-serial
        128x64-stages4-q1-qreg-serial
        128x128-stages3-q1-pingpong-qreg
        128x176-stages2-q1-pingpong
    """,
    112: """
        64x48-stages4-q1-ctas2-serial
        64x64-stages3-q1-qreg-ctas2
        64x128-stages3-q1
        128x128-stages3-q1-pingpong-qreg
        192x96-stages3-q1-serial
    """,
    128: """
        64x32-stages4-q1-ctas2-serial
        64x48-stages4-q1-ctas2-serial
        64x64-stages3-q1-qreg-ctas2
        64x64-stages2-q2-qreg-ctas2
        64x96-stages2-q1-qreg-ctas2
        128x64-stages4-q1-qreg-serial
        128x64-stages3-q1-qreg-fma1-serial
        128x128-stages3-q1-pingpong-qreg
        128x160-stages2-q2-pingpong
        192x64-stages3-q2
        192x96-stages3-q1-serial
    """,
    160: """
        64x32-stages2-q1-ctas2
        64x48-stages2-q1-ctas2-serial
        64x64-stages2-q1-ctas2-serial
        64x64-stages3-q1
        128x64-stages2-q1-pingpong-serial
        128x64-stages3-q1-pingpong-qreg
        128x80-stages3-q1-pingpong
        128x112-stages2-q1-pingpong
        192x48-stages3-q1-serial
    """,
    192: """
        64x32-stages2-q1-ctas2
        64x48-stages2-q1-ctas2-serial
        64x64-stages3-q1
        128x64-stages2-q1-pingpong-serial
        128x64-stages3-q1-pingpong-qreg
        128x96-stages2-q1-pingpong
    """,
    256: """
        64x64-stages2-q1
        64x64-stages3-q1
        64x80-stages2-q2
        64x96-stages2-q1-serial
        128x32-stages4-q1-serial
        128x64-stages2-q1-pingpong-serial
        128x80-stages2-q1-pingpong-serial
    """,
}
# Head dimensions that tiles are compiled for, whatever smaller one a problem has. Not all of them
# are among those compiled in: what the others would save is measured.
INSTANCES = tuple(_TILES)


class Kernel(NamedTuple):
    """A tile as it is compiled for head dimensions up to head_dim."""

    head_dim: int
    tile: Tile

    def __str__(self) -> str:
        return f"{self.tile}@{self.head_dim}"


def kernels_at(head_dim: int) -> list[Kernel]:
    """The sm90 kernels of one instance that are legal on an H200, those compiled in first."""
    problem = Problem(1, 1, 1, 1, 1, head_dim, "bfloat16")
    compiled = _extension.load().instances.get(("sm90", head_dim, PLAIN), ())
    more = [Tile.parse(f"sm90:{name}") for name in _TILES[head_dim].split()]
    tiles = [*compiled, *(t for t in more if not t.violations(HOPPER, problem))]
    return [Kernel(head_dim, tile) for tile in dict.fromkeys(tiles)]


def kernels_for(problem: Problem) -> list[Kernel]:
    """The sm90 kernels to measure for a problem: of the smallest instance that is compiled in and
    holds its head_dim, and of one that is not if that is smaller."""
    compiled = {
        d
        for kernel, d, variant in _extension.load().instances
        if (kernel, variant) == ("sm90", PLAIN)
    }
    holding = [d for d in INSTANCES if d >= problem.head_dim]
    first = min(d for d in holding if d in compiled)
    return [k for d in holding if d <= first for k in kernels_at(d)]
