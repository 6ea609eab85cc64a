"""Compares Tile.violations of the sm90 kernel with what the compiler makes of a random sample.

    python benchmarks/hopper/check_tiles.py --legal 60 --illegal 20 --output FILE    # no GPU needed
    python benchmarks/hopper/check_tiles.py --instances --workers 1    # what is compiled in

A legal tile must compile without spills, stack, serialized wgmma or registers that Q and P share;
an illegal one must name its reason, and one whose reason is registers is compiled all the same, to
see how close the rule is.
Exit code 1 if a legal tile fails. Uses nvcc (CUDA_HOME or PATH).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flashmoe import _extension
from flashmoe._extension import KERNEL_SOURCES
from flashmoe.backends import jit
from flashmoe.machine.device import Arch
from flashmoe.ratchet.machine_code.cubins import kernels, shared_operands
from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN, Tile, sm90_registers

H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float16")


def random_tile(rng: random.Random) -> Tile:
    block_m = rng.choice((64, 128, 192, 256))
    return Tile(
        "sm90",
        block_m,
        rng.randrange(32, 257, 16),
        num_stages=rng.choice((1, 2, 2, 3, 4)),
        q_stages=rng.choice((1, 2)),
        pingpong=block_m > 64 and rng.random() < 0.5,
        q_in_registers=rng.random() < 0.2,
        exp2_fma=rng.choice((0, 0, *range(1, 9))),
        ctas_per_sm=rng.choice((1, 1, 1, 2)),
        serial=rng.random() < 0.25,
    )


def sample(seed: int, legal: int, illegal: int, close: int) -> list[dict[str, Any]]:
    """So many legal tiles, over the head dimensions in turn and mostly at most `close` registers
    from the limit, and so many whose only violation is that limit, by as little."""
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    while legal + illegal > 0:
        head_dim = HEAD_DIMS[(legal + illegal) % len(HEAD_DIMS)]
        if rng.random() < 0.1:
            head_dim = rng.randrange(16, 257, 16)
        tile, dtype = random_tile(rng), rng.choice(DTYPES[::-1])
        reasons = tile.violations(H200, Problem(1, 1, 1, 1, 1, head_dim, dtype))
        needed, given = sm90_registers(tile, head_dim)
        spare = given - needed
        if not reasons and legal and (spare <= close or rng.random() < 0.05):
            legal -= 1
        elif (
            len(reasons) == 1 and reasons[0].startswith("registers") and illegal and spare >= -close
        ):
            illegal -= 1
        else:
            continue
        found.append(
            {
                "head_dim": head_dim,
                "tile": str(tile),
                "dtype": dtype,
                "needed": needed,
                "given": given,
                "reasons": reasons,
            }
        )
    return found


def compile_tile(item: dict[str, Any]) -> dict[str, Any]:
    """`item` with what ptxas said: bytes of spills and stack, and whether it serialized wgmma; and
    the registers that it gave to Q and P both."""
    target = jit.Target(Tile.parse(item["tile"]), item["head_dim"], item["dtype"])
    # Without the assertions of what is legal, which is what is put to the test.
    text = re.sub(r"template struct .*;\n", "", jit.source(target))
    nvcc = f"{os.environ['CUDA_HOME']}/bin/nvcc" if os.environ.get("CUDA_HOME") else "nvcc"
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder, "attention.cu")
        unit.write_text(text, encoding="utf-8")
        output = Path(folder, "attention.cubin")
        command = [nvcc, *jit.NVCC_OPTIONS, "-Xptxas=-v", f"-I{KERNEL_SOURCES}", "-o", output, unit]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        seconds = time.perf_counter() - start
        shared = shared_operands(output) if done.returncode == 0 else {}
        code = sum(kernel.code for kernel in kernels(output)) if done.returncode == 0 else 0
    log = done.stderr
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    return {
        **item,
        "compiled": done.returncode == 0,
        "seconds": round(seconds, 1),
        "code": code,
        "stack": int(stack[1]) if stack else None,
        "spills": int(stack[2]) if stack else None,
        "serialized": "serialized" in log,
        "shared": [register for found in shared.values() for register in found],
        "error": next((line for line in log.splitlines() if "error" in line or "fatal" in line), "")
        if done.returncode
        else "",
    }


def refuse_stale_sources() -> None:
    """What is compiled is the package's copy of csrc, made by the last build."""
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    for copy in sorted(path for path in KERNEL_SOURCES.rglob("*") if path.is_file()):
        original = csrc / copy.relative_to(KERNEL_SOURCES)
        if original.exists() and original.read_bytes() != copy.read_bytes():
            raise SystemExit(f"{original} has changed since the last build: install flashmoe again")


def print_instances(workers: int) -> None:
    """A row for each compiled-in tile: seconds in bfloat16, machine code in both dtypes."""
    found = _extension.load().instances.items()
    rows = [
        [{"head_dim": head_dim, "tile": str(tile), "dtype": dtype} for dtype in DTYPES]
        for (kernel, head_dim, variant), tiles in found
        if (kernel, variant) == ("sm90", PLAIN)
        for tile in tiles
    ]
    with ThreadPoolExecutor(workers) as pool:
        for bf16, fp16 in pool.map(lambda row: [compile_tile(item) for item in row], rows):
            name = re.sub("-fma0|-ctas1", "", bf16["tile"].removeprefix("sm90:"))
            sizes = " | ".join(f"{item['code'] / 1024:.0f} KiB" for item in (bf16, fp16))
            print(f"| {bf16['head_dim']} | {name} | {bf16['seconds']} s | {sizes} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--legal", type=int, default=60)
    parser.add_argument("--illegal", type=int, default=20)
    parser.add_argument("--close", type=int, default=16, metavar="REGISTERS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--instances", action="store_true", help="the compiled-in tiles instead")
    arguments = parser.parse_args()
    refuse_stale_sources()
    if arguments.instances:
        print_instances(arguments.workers)
        return 0
    items = sample(arguments.seed, arguments.legal, arguments.illegal, arguments.close)
    results, wrong, strict = [], 0, 0
    with ThreadPoolExecutor(arguments.workers) as pool:
        for result in pool.map(compile_tile, items):
            results.append(result)
            clean = (
                result["compiled"]
                and not result["stack"]
                and not result["spills"]
                and not result["serialized"]
                and not result["shared"]
            )
            verdict = "legal" if not result["reasons"] else "illegal"
            wrong += verdict == "legal" and not clean
            strict += verdict == "illegal" and clean
            print(
                f"{verdict:7} {'clean' if clean else 'BROKEN':6} needs {result['needed']:3} of "
                f"{result['given']:3}  spills {result['spills']}  "
                f"{'SERIALIZED ' if result['serialized'] else ''}"
                f"{'SHARED ' if result['shared'] else ''}{result['head_dim']} "
                f"{result['tile']} {result['dtype']} {result['error']}",
                flush=True,
            )
    print(
        f"{arguments.legal} legal, {wrong} of them not clean; {arguments.illegal} illegal by "
        f"registers alone, {strict} of them clean"
    )
    if arguments.output:
        arguments.output.write_text(
            "".join(json.dumps(result) + "\n" for result in results), encoding="utf-8"
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
