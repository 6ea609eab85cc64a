"""The machine code in the built extension, read without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from flashmoe import _extension
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.machine_code.cubins import find_cuobjdump, shared_operands

INFO = _extension.load()
pytestmark = pytest.mark.skipif(not INFO.cuda_archs, reason="this build has no CUDA kernels")
BACKWARD = sum(len(tiles) for tiles in INFO.backward_instances.values())
HOPPER = sum(len(tiles) for (kernel, *_), tiles in INFO.instances.items() if kernel == "sm90")
# Bytes of a thread's stack. ptxas spills a few of the 255 registers of the widest sm80 tiles, which
# are nevertheless the fastest of theirs, and more where rows are not aligned, beside windows and
# terms. A Hopper tile keeps O and P there while it computes rows again, at most 256 + 176 columns.
STACK_LIMITS = {"sm80": 128, "sm90": 768}
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        find_cuobjdump()
    except UserError as error:
        pytest.skip(str(error))
    return next(Path(_extension.__file__).parent.glob("_C*.so"))


def test_kernels_do_not_spill(library):
    command = [find_cuobjdump(), "--dump-resource-usage", library]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = USAGE.findall(done.stdout)
    hopper = [name for name, *_ in usage if "fwd_sm90" in name or "bwd_sm90" in name]
    backward = [name for name in hopper if "bwd" in name]
    assert len(hopper) - len(backward) == 2 * HOPPER, "each tile in float16 and bfloat16"
    assert len(backward) == 3 * 2 * BACKWARD, "each tile's three kernels, too"
    assert len(usage) > len(hopper)
    for name, _, stack, local in usage:
        limit = STACK_LIMITS["sm90" if name in hopper else "sm80"]
        assert int(stack) <= limit, f"{name} has a stack of {stack} bytes"
        assert local == "0", name


INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)[^;]*?(0x[0-9a-f]+)?\s*;"
)


def innermost_loops(code: list[tuple[int, str, int]], inside: str) -> list[list[str]]:
    """The instructions of every loop around an instruction `inside` that holds no smaller such
    loop; code is (address, instruction, target of a branch)."""
    found: list[range] = []
    loops = [range(to, at + 1) for at, name, to in code if name == "BRA" and 0 < to < at]
    for loop in sorted(loops, key=len):
        holds = any(name == inside and at in loop for at, name, _ in code)
        if holds and not any(other.start in loop for other in found):
            found.append(loop)
    return [[name for at, name, _ in code if at in loop] for loop in found]


@pytest.mark.long
def test_tiles_of_keys_are_visited_without_local_memory(library):
    command = [find_cuobjdump(), "--dump-sass", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = 0
    for part in text.split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        if "HGMMA" not in part or "bwd" in name:
            continue
        code = [
            (int(at, 16), name, int(to, 16) if name == "BRA" and to else 0)
            for at, name, to in INSTRUCTION.findall(part)
        ]
        loops = innermost_loops(code, "HGMMA")
        # Masked tiles and the others; what goes over blocks of rows may compute rows again.
        assert sum(not {"LDL", "STL"} & set(loop) for loop in loops) >= 2, name
        kernels += 1
    assert kernels == 2 * HOPPER


@pytest.mark.long
def test_what_stays_in_registers_is_not_overwritten(library):
    shared = {k: both for k, both in shared_operands(library).items() if "bwd" not in k}
    wanted = [
        tile
        for (kernel, *_), tiles in INFO.instances.items()
        if kernel == "sm90"
        for tile in tiles
        if tile.q_in_registers
    ]
    assert len(shared) == 2 * len(wanted) > 0, "each tile in float16 and bfloat16"
    assert not any(shared.values()), shared
