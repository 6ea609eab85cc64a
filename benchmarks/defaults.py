"""The untuned choice beside every compiled-in tile, the best tile that was found, and the peers.

    python benchmarks/defaults.py --output benchmarks/results/defaults-DEVICE.json
    python benchmarks/defaults.py --only table short

`table`: the problems that showed the gaps of the default of November 2026; `short`: nine problems
of short sequences; `rows`: those that the kernel is judged by. The choice over the whole plane is
benchmarks/plane.py's and plane_report.py's. Forward, bfloat16; results are compared with the
float64 reference before they are timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plane_problems import SHORT, TABLE
from rows import ROWS
from sides import SDPA, against
from tables import Row, Table, listed, measures, over_peers, parser_of

from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.inputs import make_inputs
from flashmoe.spec.problem import Problem

# The best tile of 20 to 40 s of tuning each on an H200; SDPA or not searched where there is none.
FOUND = (
    *("64x48-stages4-q1-fma6-ctas2-serial", "64x64-stages2-q1-ctas2-serial"),
    *("64x64-stages2-q2-qreg-ctas2", "128x64-stages2-q1-ctas2-serial", "", ""),
    *("128x64-stages3-q1-qreg-fma1-serial", "128x144-stages2-q1-pingpong"),
    *("256x48-stages3-q2-fma1-serial", "128x128-stages3-q1-pingpong-serial"),
    *("128x128-stages2-q1-pingpong-qreg", "", ""),
)
# Milliseconds of cuDNN, FlashAttention-3 and FlashAttention-2 on an H200 (29 November 2026, one
# run), by the place in NINE.
NINE = (*(TABLE[n] for n in (0, 1, 2, 3, 5, 6)), *SHORT)
_LISTED = (
    (2.927, 2.765, 2.886),
    (0.788, 1.439, 1.133),
    (0.704, 0.807, 0.799),
    (0.288, 0.372, 0.417),
    (0.493, 0.512, 0.661),
    (0.508, 0.606, 1.016),
    (0.396, 0.799, 0.581),
    (0.0625, 0.111, 0.0896),
    (0.0, 0.0, 0.0),
)


@measures
def measured(
    table: Table,
    section: str,
    problem: Problem,
    tiles: Mapping[str, Any],
    peers: Mapping[str, float],
) -> Row | None:
    """`tiles`: options of further calls of ours; `peers`: listed efficiencies."""
    inputs = make_inputs(problem, table.device)
    others = table.peers((*SDPA, "efficient", "FA3", "FA4"))
    calls, failed, wrong = against(inputs, others, options=tiles)
    return table.row(section, problem, calls, wrong=wrong, failed=failed, listed=peers)


def tiles_of(table: Table, whole: Problem, found: str) -> dict[str, Any]:
    """Every compiled-in tile of the problem, and the one that was found."""
    if table.device.type == "cpu":
        return {}
    here = arch(table.device)
    compiled = [str(tile) for tile in BACKENDS["cuda"].compiled_in(whole, here)]
    names = dict.fromkeys([*compiled, *([f"sm90:{found}"] if found else [])])
    return {name: {"tile": name} for name in names}


def of_best(row: Row) -> float:
    """Of the best that could have been chosen: our tiles, and SDPA's backends."""
    best = min(row.seconds(n) for n in row.samples if n not in ("FA3", "FA4"))
    return best / row.seconds()


def main() -> int:
    table = Table(parser_of(__doc__, seconds=150).parse_args())
    if table.wants("table"):
        rows = [
            measured(table, "table", problem, tiles_of(table, problem, found), {})
            for problem, found in zip(TABLE, FOUND, strict=True)
        ]
        table.each("table: of the best that was found", rows, of_best, at_least=0.95)
        line = "table: not behind a peer by more than 2 %"
        table.each(line, rows, over_peers, at_least=1 / 1.02)
    if table.wants("short"):
        known = [dict(zip(("cuDNN", "FA3", "FA2"), times, strict=True)) for times in _LISTED]
        rows = [
            measured(table, "short", problem, {}, listed(problem, times))
            for problem, times in zip(NINE, known, strict=True)
        ]
        table.each("short: ahead of the best peer", rows, over_peers, at_least=1.0)
        table.mean("short: mean efficiency", rows, Row.efficiency, at_least=0.80)
    if table.wants("rows"):
        rows = [
            measured(table, "rows", row.problem, {}, {row.peer: row.peer_efficiency})
            for row in ROWS
        ]
        table.each("rows: ahead of the best peer", rows, over_peers, at_least=1.0)
        table.mean("rows: mean efficiency", rows, Row.efficiency, at_least=0.83)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
