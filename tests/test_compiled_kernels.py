"""The machine code in the built extension, read without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from flashmoe import _extension
from flashmoe.ratchet.cubins import find_cuobjdump, shared_operands
from flashmoe.ratchet.errors import UserError

INFO = _extension.load()
pytestmark = pytest.mark.skipif(not INFO.cuda_archs, reason="this build has no CUDA kernels")
HOPPER = sum(len(tiles) for (kernel, _), tiles in INFO.instances.items() if kernel == "sm90")
# Bytes of a thread's stack. ptxas spills a few of the 255 registers of the widest sm80 tiles, which
# are nevertheless the fastest of theirs.
STACK_LIMITS = {"sm80": 64, "sm90": 0}
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        find_cuobjdump()
    except UserError as error:
        pytest.skip(str(error))
    return next(Path(_extension.__file__).parent.glob("_C*.so"))


def test_kernels_do_not_spill_or_use_local_memory(library):
    command = [find_cuobjdump(), "--dump-resource-usage", library]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = USAGE.findall(done.stdout)
    hopper = [name for name, *_ in usage if "sm90" in name]
    assert len(hopper) == 2 * HOPPER, "each tile of the Hopper kernel in float16 and bfloat16"
    assert len(usage) > len(hopper)
    for name, _, stack, local in usage:
        limit = STACK_LIMITS["sm90" if name in hopper else "sm80"]
        assert int(stack) <= limit, f"{name} has a stack of {stack} bytes"
        assert local == "0", name


def test_what_stays_in_registers_is_not_overwritten(library):
    shared = shared_operands(library)
    wanted = [
        tile
        for (kernel, _), tiles in INFO.instances.items()
        if kernel == "sm90"
        for tile in tiles
        if tile.q_in_registers
    ]
    assert len(shared) == 2 * len(wanted) > 0, "each tile in float16 and bfloat16"
    assert not any(shared.values()), shared
