"""Sliding windows, forward and backward, beside plain causal attention and FlashAttention-4.

    python benchmarks/windows.py --output benchmarks/results/windows-DEVICE.json
    python benchmarks/windows.py --tiles 64x64-stages4-q1-ctas2-serial 128x64-stages2-q2

Each row: causal, with a window of W keys to the left; ours by the plan and by other `--tiles`, ours
without the window, FlashAttention-4 and 3 where they are installed, and FlexAttention with --flex.
`share` is the time over what the visible pairs' share of the plain causal time would be, 20 us
apart. Each row is compared with the float64 reference before it is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sides import against, ours, timed
from tables import Row, Table, listed, measures, over_peers, parser_of

from flashmoe.measure.inputs import Inputs, make_inputs
from flashmoe.spec.mask import CAUSAL, Mask
from flashmoe.spec.problem import Problem

LAUNCH = 20e-6  # seconds that the share leaves out
WIDE = 1024  # from so many keys on the share is judged


@dataclass(frozen=True)
class Spec:
    """A problem, and milliseconds that FlashAttention-4 4.0.0b36 took on an H200, forward and
    backward (29 November 2026, one run; 0 where they were not measured)."""

    problem: Problem
    fa4: tuple[float, float]


# By head_dim: (batch, heads, seqlen, [(W, forward, backward), ...]).
_LISTED = {
    64: (
        (2, 32, 8192, ((128, 0.183, 0.389), (1024, 0.370, 0.852), (4096, 0.835, 2.069))),
        (1, 32, 32768, ((128, 0.349, 0.763), (1024, 0.745, 1.740), (4096, 1.995, 5.278))),
    ),
    128: (
        (2, 16, 8192, ((128, 0.118, 0.341), (1024, 0.258, 0.712), (4096, 0.625, 1.733))),
        (1, 16, 32768, ((128, 0.221, 0.663), (1024, 0.508, 1.447), (4096, 1.494, 4.381))),
    ),
    256: (
        (2, 8, 8192, ((128, 0.106, 0.428), (1024, 0.245, 1.118), (4096, 0.610, 2.873))),
        (1, 8, 32768, ((128, 0.191, 0.832), (1024, 0.473, 2.282), (4096, 0.0, 0.0))),
    ),
}
SPECS = tuple(
    Spec(
        Problem(batch, heads, heads, seqlen, seqlen, head_dim, "bfloat16", Mask(width, 0)),
        (forward, backward),
    )
    for head_dim, shapes in _LISTED.items()
    for batch, heads, seqlen, widths in shapes
    for width, forward, backward in widths
)


@measures
def window_row(
    table: Table,
    section: str,
    problem: Problem,
    spec: Spec,
    peers: Sequence[str] = ("FA4", "FA3"),
    tiles: Sequence[str] = (),
) -> Row | None:
    """`tiles` are further ones of ours, of a forward."""
    number = ("fwd", "bwd").index(problem.direction)
    inputs = make_inputs(problem, table.device)
    options: dict[str, Any] = {tile: {"tile": f"sm90:{tile}"} for tile in tiles if not number}
    calls, failed, wrong = against(inputs, table.peers(peers), options=options)
    plain = Inputs(replace(problem, mask=CAUSAL), inputs.call, inputs.dout)
    calls["ours, causal"] = timed(ours(plain), plain)
    times = listed(problem, {"FA4": spec.fa4[number]})
    return table.row(section, problem, calls, wrong=wrong, failed=failed, listed=times)


def share(row: Row) -> float:
    """Of the plain causal time by the share of visible pairs, a launch left out."""
    problem = row.problem
    assert problem is not None
    pairs = problem.visible_pairs / replace(problem, mask=CAUSAL).visible_pairs
    return (row.seconds() - LAUNCH) / (pairs * row.seconds("ours, causal"))


def main() -> int:
    parser = parser_of(__doc__, seconds=240)
    parser.add_argument("--tiles", nargs="*", default=[], metavar="TILE", help="of the forward")
    parser.add_argument("--flex", action="store_true", help="FlexAttention, too (it compiles long)")
    table = Table(parser.parse_args())
    peers = ["FA4", "FA3", *(["flex"] if table.arguments.flex else [])]
    for direction, word in (("fwd", "forward"), ("bwd", "backward")):
        if not table.wants(word):
            continue
        rows = [
            window_row(
                *(table, word, replace(spec.problem, direction=direction), spec),
                *(peers, table.arguments.tiles),
            )
            for spec in SPECS
        ]
        table.each(f"{word}: faster than FlashAttention-4's window", rows, over_peers, at_least=1.0)
        wide = [
            row for row, spec in zip(rows, SPECS, strict=True) if spec.problem.mask.left >= WIDE
        ]
        line = f"{word}: share of the plain causal time by visible pairs, W >= {WIDE}, less 20 us"
        table.each(line, wide, share, at_most=1.25)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
