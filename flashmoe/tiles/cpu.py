"""What is legal for the C++ kernel for CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashmoe.spec.problem import Problem

if TYPE_CHECKING:
    from flashmoe.machine.device import Arch
    from flashmoe.tiles.tile import Tile


def rules(tile: Tile, arch: Arch, problem: Problem) -> Iterator[str]:
    if arch.kind != "cpu":
        yield f"the cpu kernel runs on cpu tensors, not on {arch.kind}"
    for name, value in (("block_m", tile.block_m), ("block_n", tile.block_n)):
        if not 1 <= value <= 4096:
            yield f"{name} must be from 1 to 4096, got {value}"
    for name, value in (("num_stages", tile.num_stages), ("num_warps", tile.num_warps)):
        if value != 1:
            yield f"{name} must be 1 for the cpu kernel, got {value}"
