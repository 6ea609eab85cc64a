"""What each technique of the Hopper kernel buys: builds it without one at a time, for probe.py run.

    python benchmarks/hopper/switch_off.py build/off       # nvcc; no GPU needed
    python benchmarks/hopper/probe.py run build/off --output FILE --only 'd64|d96|d128'

A technique is switched off by replacing text of the sources, or by another tile. Tiles in the
results are named by the technique's number (-variant=N, printed here); 0 is the kernel as it is.
What a tile does not have is not switched off: a variant of the same machine code is left out.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import probe

CONSUMER, SOFTMAX = "consumer.cuh", "softmax.cuh"
WORK = "work.cuh"
# Default tiles: long and not causal, causal, and serial ones.
TILES = (
    "64:192x128",
    "64:128x64-stages=3-pingpong=0-ctas=2-serial=1",
    "96:256x64-stages=3-q=2-serial=1",
    "128:128x128-q=2-qreg=1",
    "128:192x64-stages=4-pingpong=0",
)


class Off(NamedTuple):
    """`edits`: (file of csrc/forward/sm90, what it says, what it says without the technique).
    `option`: what is appended to the tile's name instead."""

    technique: str
    edits: tuple[tuple[str, str, str], ...] = ()
    option: str = ""


EXACT = (SOFTMAX, "MAXIMUM_MAY_LAG<__nv_bfloat16> = true", "MAXIMUM_MAY_LAG<__nv_bfloat16> = false")
OFF = (
    Off("(the kernel as it is)"),
    Off(
        "softmax under the matmul of the tile before",
        ((CONSUMER, "finish_S(IntConstant<1>{}", "finish_S(IntConstant<0>{}"),),
    ),
    Off("turns (pingpong)", option="-pingpong=0"),
    Off("more than one stage of K and V", option="-stages=1"),
    Off("Q a block of rows ahead, O through its buffer", option="-q=1"),
    Off("Q in registers", option="-qreg=0"),
    Off("two thread blocks an SM", option="-ctas=1"),
    Off("S, softmax and O one after the other (serial)", option="-serial=0"),
    Off("exponentials beside the maximum of the tiles before", (EXACT,)),
    Off(
        "that and lazy rescaling",
        (EXACT, (SOFTMAX, "inverse_scale_log2, params.slack)", "inverse_scale_log2, 0.f)")),
    ),
    Off("exponentials kept in chunks", ((SOFTMAX, "if (chunk < CHUNKS) ptx::pmevent();", ""),)),
    Off(
        "K and V asked for before they are needed",
        (
            (CONSUMER, "const bool V_there = test_V();", "const bool V_there = false;"),
            (CONSUMER, "const bool K_there = test_K();", "const bool K_there = false;"),
        ),
    ),
    Off(
        "passing what a warpgroup does not see",
        (
            (
                CONSUMER,
                "constexpr bool CAN_SKIP = CONSUMERS > 1;",
                "constexpr bool CAN_SKIP = false;",
            ),
        ),
    ),
    Off(
        "longest blocks first",
        ((WORK, "m_block = params.m_blocks.divisor - 1 - rank;", "m_block = rank;"),),
    ),
    Off(
        "sections of heads whose K and V fit L2",
        (
            (WORK, "params.per_section.divide(index)", "0"),
            (
                WORK,
                "params.section_heads.divide(in_section)",
                "index / (p.batch * p.heads_q)",
            ),
            (WORK, "rank * params.section_heads.divisor", "rank * (p.batch * p.heads_q)"),
        ),
    ),
)


def build(folder: Path) -> None:
    probe.prepare_folder(folder)
    work = [
        (f"{tile}{off.option}-variant={number}", off)
        for tile in TILES
        for number, off in enumerate(OFF)
        if not off.option or bytes(probe.parse(tile + off.option)) != bytes(probe.parse(tile))
    ]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        sources = {}
        for number, off in enumerate(OFF):
            sources[off.technique] = Path(temporary, str(number))
            shutil.copytree(probe.ROOT / "csrc", sources[off.technique])
            for file, old, new in off.edits:
                path = sources[off.technique] / "forward" / "sm90" / file
                text = path.read_text(encoding="utf-8")
                if old not in text:
                    raise SystemExit(f"{off.technique}: {file} does not say {old!r}")
                path.write_text(text.replace(old, new), encoding="utf-8")
            print(number, off.technique)
        lines = pool.map(
            lambda item: probe.compile_tile(
                folder, item[0], item[1][0], sources[item[1][1].technique]
            ),
            enumerate(work),
        )
        for line in lines:
            print(line, flush=True)
    seen = set()
    for number, (name, _) in enumerate(work):
        cubin = folder / f"{number}.cubin"
        if not cubin.exists():
            continue
        code = cubin.read_bytes()
        if code in seen:
            print(f"{name}: the same machine code as another, left out")
            cubin.unlink()
        seen.add(code)
    (folder / "tiles.json").write_text(json.dumps([name for name, _ in work]), encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
