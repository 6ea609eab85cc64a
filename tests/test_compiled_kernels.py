"""The machine code in the built extension, read without a GPU: spills and local memory."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from flashmoe import _extension

INFO = _extension.load()
HOPPER = sum(len(tiles) for (kernel, _), tiles in INFO.instances.items() if kernel == "sm90")
# Bytes of a thread's stack. ptxas spills a few of the 255 registers of the widest sm80 tiles, which
# are nevertheless the fastest of theirs.
STACK_LIMITS = {"sm80": 64, "sm90": 0}
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def cuobjdump(*arguments: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("needs triton, which brings cuobjdump")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.skipif(not INFO.cuda_archs, reason="this build has no CUDA kernels")
def test_kernels_do_not_spill_or_use_local_memory():
    library = next(Path(_extension.__file__).parent.glob("_C*.so"))
    usage = USAGE.findall(cuobjdump("--dump-resource-usage", str(library)))
    hopper = [name for name, *_ in usage if "sm90" in name]
    assert len(hopper) == 2 * HOPPER, "each tile of the Hopper kernel in float16 and bfloat16"
    assert len(usage) > len(hopper)
    for name, _, stack, local in usage:
        limit = STACK_LIMITS["sm90" if name in hopper else "sm80"]
        assert int(stack) <= limit, f"{name} has a stack of {stack} bytes"
        assert local == "0", name
