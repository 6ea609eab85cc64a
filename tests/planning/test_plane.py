"""What the shipped constants choose, by what was measured over the plane on an H200; and the
scripts that measure, fit and choose."""

from __future__ import annotations

import json
import lzma
from types import ModuleType

import pytest
from support import load_benchmark

from flashmoe import _extension
from flashmoe.machine.device import Arch
from flashmoe.prediction.costs import Table, from_logs, table, to_logs
from flashmoe.prediction.kernels import features
from flashmoe.prediction.predict import Costs, fastest
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

if not _extension.load().cuda_archs:
    pytest.skip("this build has no CUDA kernels", allow_module_level=True)

H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
COSTS = Costs(5.0, 1.0, 1.5, 0.5, 0.2, 0.8, 0.3, 0.1, 3e6)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("plane_report", monkeypatch)


def judged(report: ModuleType) -> dict[str, list]:
    (path,) = (report.ROOT / "benchmarks" / "results").glob("plane-nvidia-h200.jsonl.xz")
    rows, sm_count = report.load([path])
    known, tiles = table(H200), report.listed()
    assert known is not None
    sets: dict[str, list] = {}
    for row in rows:
        kind = "held out" if row.held_out else row.name.partition(" ")[0]
        sets.setdefault(kind, []).append(report.choose(row, known, tiles, sm_count))
    return sets


def test_the_untuned_choice_is_right_over_the_plane(report):
    """The constants have not seen the problems that are held out."""
    sets = judged(report)
    held_out = report.summary(sets["held out"])
    assert held_out["problems"] == 200
    assert held_out["of the best, geometric mean"] >= 0.97
    assert held_out["at least 0.90 of it"] >= 0.95
    assert held_out["over SDPA's best backend, mean"] >= 1.2
    assert held_out["not slower than it by 2 %"] >= 0.99
    for kind in ("row", "table"):
        assert all(choice.of_best >= 0.95 for choice in sets[kind]), kind


def test_the_problems_are_those_that_were_measured(report, monkeypatch):
    problems = load_benchmark("plane_problems", monkeypatch).cases()
    text = lzma.decompress(
        (report.ROOT / "benchmarks" / "results" / "plane-nvidia-h200.jsonl.xz").read_bytes()
    )
    measured = {row["name"]: row["problem"] for row in map(json.loads, text.splitlines()[1:])}
    drawn = {case.name: case.problem for cases in problems.values() for case in cases}
    assert len(measured) >= 443
    for name, problem in measured.items():
        assert drawn[name] == Problem.from_json(problem), name


def test_the_random_problems_are_of_the_plane(monkeypatch):
    module = load_benchmark("plane_problems", monkeypatch)
    found = module.random_problems(400)
    assert len(set(found)) == 400
    assert module.random_problems(50) == found[:50]
    for problem in found:
        assert 16 <= problem.seqlen_q <= 65536
        assert 16 <= problem.seqlen_kv <= 65536
        assert problem.seqlen_q <= problem.seqlen_kv or not problem.mask.is_causal
        assert problem.batch * problem.heads_q <= 66_000
        assert module.expected_seconds(problem) <= 2e-3
    for share in (
        sum(p.seqlen_q != p.seqlen_kv for p in found),
        sum(p.heads_q != p.heads_kv for p in found),
    ):
        assert 100 <= share <= 170


def test_costs_are_their_logarithms():
    assert from_logs(to_logs(COSTS)) == pytest.approx(COSTS)
    low = from_logs([-1e9] * len(COSTS))
    assert (low.alone, low.idle) == pytest.approx((0.3, 0.0), abs=1e-6)
    high = from_logs([1e9] * len(COSTS))
    assert (high.alone, high.idle) == pytest.approx((1.0, 0.8))


def test_every_tile_that_is_compiled_in_has_costs(report):
    known = table(H200)
    assert known is not None
    names = [name for listed in report.listed().values() for name in listed]
    for name in names:
        tile, _, head_dim = name.partition("@")
        assert known.of_tile(Tile.parse(tile), int(head_dim)) is not None, name
    covering = (report.ROOT / "csrc" / "instances" / "covering.txt").read_text(encoding="utf-8")
    assert sum(known.named(name) is not None for name in names) >= len(covering.splitlines()) - 2


def test_a_tile_that_nobody_measured_follows_the_formula():
    others = [0.0] * (len(features("sm90:128x64-stages2", 64)) - 1)
    constant = [[x, *others] for x in to_logs(COSTS)]
    made = Table({}, constant)
    assert made.of_tile(Tile.parse("sm90:128x64-stages2"), 64) == pytest.approx(COSTS)
    assert made.of_tile(Tile.parse("sm80:128x64-stages2-warps4"), 64) is None


def test_other_hopper_gpus_are_scaled():
    h100 = Arch("cuda", "NVIDIA H100", (9, 0), 114, 232448, 990_000, 4.917e12 / 2)
    mine, theirs = table(H200), table(h100)
    assert mine is not None
    assert theirs is not None
    name = next(iter(mine.costs))
    here, there = mine.named(name), theirs.named(name)
    assert here is not None
    assert there is not None
    assert there.step == pytest.approx(2 * here.step)
    assert there.bytes_per_us == pytest.approx(here.bytes_per_us / 2)
    assert there.launch == here.launch
    assert table(Arch("cuda", "NVIDIA A100", (8, 0), 108, 166912)) is None
    assert table(Arch("cpu", "a cpu")) is None


def test_of_what_takes_as_long_the_first_is_taken():
    assert fastest({"a": 100.9, "b": 100.0}) == "a"
    assert fastest({"a": 101.1, "b": 100.5, "c": 100.0}) == "b"


def test_tables_of_other_schemas_are_refused():
    data = Table({"x": COSTS}, []).to_json()
    assert Table.from_json(json.loads(json.dumps(data))).costs == {"x": COSTS}
    with pytest.raises(ValueError, match="schema must be 1, got 2"):
        Table.from_json(data | {"schema": 2})


def test_the_script_covers_what_it_is_given(monkeypatch):
    select = load_benchmark("plane_select", monkeypatch)
    times = [
        select.Times("random 0", 64, {"a": 1.0, "b": 2.0, "c": 4.0}, 8.0),
        select.Times("random 1", 64, {"a": 4.0, "b": 2.0, "c": 1.9}, 8.0),
        select.Times("table 0", 64, {"a": 1.2, "b": 1.1, "d": 1.0}, 8.0),
    ]
    assert select.choose(times, 1, []) == ["d"]  # the table's problem first
    assert select.choose(times, 3, []) == ["d", "a", "c"]
    assert select.choose(times, 2, ["b"]) == ["b", "d"]
    assert select.choose(times, 9, []) == ["d", "a", "c"]  # no other takes any less
    assert select.loss(times, ["d", "a", "c"]) == pytest.approx(0.0)
    assert select.loss(times[:1], ["b"]) == pytest.approx(1.0)
