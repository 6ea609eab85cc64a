"""The suite of the shipped databases: what it holds, and what the measuring of one tells."""

from __future__ import annotations

import json
import lzma
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import load_benchmark

from flashmoe.autotune.running.candidate import SDPA, Candidate
from flashmoe.backends import jit
from flashmoe.machine.device import arch
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.planning import database
from flashmoe.planning.plan import make_plan, reload_databases
from flashmoe.spec import shapes
from flashmoe.spec.mask import CAUSAL
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

ONE, TWO = (Problem(1, 2, 2, n, n, 16, "float32") for n in (64, 200))
DEFAULT, OTHER, THIRD = (Tile("cpu", n, n) for n in (64, 32, 16))
KERNELS = fingerprint(torch.device("cpu")).kernels


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("tuned_suite", monkeypatch)
    monkeypatch.setitem(module.SUITES, "cpu", (ONE, TWO))
    monkeypatch.setattr(module, "default_candidate", lambda *_: Candidate.of_tile(DEFAULT))
    return module


@pytest.fixture
def shipped(script: ModuleType) -> tuple[Problem, ...]:
    """The problems that ship."""
    problems: tuple[Problem, ...] = sys.modules["suites"].SHIPPED
    return problems


def stored(path: Path, tiles: Mapping[Problem, Tile | str | None], **fields: Any) -> str:
    """A database of what won: a tile, DEFAULT, or SDPA."""
    entries = {
        problem.bucket: database.Entry(
            problem,
            tile.backend if isinstance(tile, Tile) else tile or "sdpa",
            str(tile) if isinstance(tile, Tile) else "",
            tile_with_lse="" if tile else str(OTHER),
            **{"default": str(DEFAULT), "storage": "/else", "judged": KERNELS, **fields},
        )
        for problem, tile in tiles.items()
    }
    path.write_text(database.text_of(entries), encoding="utf-8")
    return str(path)


def test_no_two_problems_of_the_suite_share_a_bucket(
    script: ModuleType, shipped: tuple[Problem, ...]
) -> None:
    assert len({problem.bucket for problem in shipped}) == len(shipped) == 45
    assert len(script.SUITES["rows"]) == 27
    assert set(script.SUITES["agree"]) < set(shipped)


def test_the_tuner_reads_the_shapes(script: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "shapes.json"
    assert script.main(["shapes", "--suite", "short", "triton", "--output", str(output)]) == 0
    wanted = [*script.SUITES["short"], *script.SUITES["triton"]]
    assert sorted(map(repr, shapes.read(output))) == sorted(repr((p, 1.0)) for p in wanted)


def times(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, microseconds: Mapping[Candidate, float]
) -> None:
    """Every candidate takes so long, always, in place of being run."""

    def measured(
        fields: Mapping[Problem, Mapping[str, Candidate]], here: torch.device, rounds: int
    ) -> dict[Problem, dict[str, list[list[float]]]]:
        return {
            problem: {name: [[microseconds[c]] * rounds] * 3 for name, c in field.items()}
            for problem, field in fields.items()
        }

    monkeypatch.setattr(script, "measured", measured)


def test_gains_and_losses_are_told(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tile = Candidate.of_tile
    times(script, monkeypatch, {tile(DEFAULT): 200.0, tile(OTHER): 100.0, SDPA: 98.0})
    output = tmp_path / "worth.json"

    def measure(tiles: Mapping[Problem, Tile | None]) -> dict[str, object]:
        words = ["measure", "--suite", "cpu", "--device", "cpu", "--output", str(output)]
        assert script.main([*words, "--databases", stored(tmp_path / "db.json", tiles)]) == 0
        document: dict[str, object] = json.loads(output.read_text())
        return document

    slow = measure({ONE: OTHER, TWO: DEFAULT})
    assert slow["geometric_means"] == pytest.approx(
        {"cpu": 2**0.5, "cpu, tiles alone": 2**0.5, "all": 2**0.5}
    )
    assert slow["slower_than_sdpa"] == [ONE.label, TWO.label]
    fast = measure({ONE: None})
    assert fast["geometric_means"] == pytest.approx(
        {"cpu": 200 / 98, "cpu, tiles alone": 2.0, "all": 200 / 98}
    )
    assert fast["slower_than_sdpa"] == []
    assert f"without ['{TWO.label}']" in capsys.readouterr().out


def test_two_databases_agree_within_a_percent(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = Candidate.of_tile
    output = tmp_path / "agree.json"
    one = stored(tmp_path / "one.json", {ONE: OTHER, TWO: OTHER})
    other = stored(tmp_path / "other.json", {ONE: DEFAULT, TWO: OTHER})
    for time, close in ((100.9, [ONE.label, TWO.label]), (101.2, [TWO.label])):
        times(script, monkeypatch, {tile(DEFAULT): time, tile(OTHER): 100.0})
        words = ["agree", "--databases", one, other, "--device", "cpu", "--output", str(output)]
        assert script.main(words) == 0
        assert sorted(json.loads(output.read_text())["close"]) == sorted(close)


def test_it_measures_in_fresh_processes(script: ModuleType) -> None:
    field = {"chosen": Candidate.of_tile(OTHER), "sdpa": SDPA}
    found = script.measured({ONE: field, TWO: field}, torch.device("cpu"), 6)
    assert set(found) == {ONE, TWO}
    for samples in found.values():
        lengths = {name: [*map(len, processes)] for name, processes in samples.items()}
        assert lengths == {"chosen": [2, 2, 2], "sdpa": [2, 2, 2]}
        assert min(min(map(min, processes)) for processes in samples.values()) > 0


def ship(script: ModuleType, tmp_path: Path, *words: str) -> dict[str, database.Entry]:
    output = tmp_path / "tuned" / "gpu.json"
    assert script.main(["ship", *words, "--output", str(output)]) == 0
    return database.load(output)


def test_choices_ship_and_evidence_is_kept_elsewhere(
    script: ModuleType, shipped: tuple[Problem, ...], tmp_path: Path
) -> None:
    mine, kept = shipped[:2]
    evidence: dict[str, Any] = {
        "samples": {"a": (1.0,) * 99},
        "fingerprint": {"kernels": KERNELS},
        "command": "python",
        "study": "x",
        "verified": (str(OTHER),),
        "search": {"tried": 1},
    }
    ratios = {str(OTHER): 0.9, str(THIRD): 0.8, str(DEFAULT): 1.0}
    known: dict[str, Any] = {"speedup_default": (1.1, 1.0, 1.2), "over_default": ratios}
    early = stored(tmp_path / "early.json", {mine: THIRD, ONE: OTHER})
    late = stored(
        tmp_path / "late.json", {mine: OTHER, kept: database.DEFAULT}, **known, **evidence
    )
    archive = tmp_path / "whole.json.xz"
    words = ["--databases", early, late, "--evidence", str(archive)]
    found = ship(script, tmp_path, *words)
    assert found[mine.bucket] == database.Entry(
        mine,
        "cpu",
        str(OTHER),
        str(DEFAULT),
        # Of what was found to be right, what is faster than the default.
        over_default={str(OTHER): 0.9},
        speedup_default=(1.1, 1.0, 1.2),
        judged=KERNELS,
    )
    assert set(found) == {mine.bucket, kept.bucket}
    assert found[kept.bucket].kept
    whole = database.parse(lzma.decompress(archive.read_bytes()).decode())
    assert whole[mine.bucket].samples == {"a": (1.0,) * 99}
    assert whole[mine.bucket].storage == ""
    # And what ships can be shipped from the archive.
    assert ship(script, tmp_path, "--databases", str(archive)) == found


def test_what_ships_is_what_was_judged(
    script: ModuleType,
    shipped: tuple[Problem, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, fast, same, kept, sdpa, was = shipped[:6]
    monkeypatch.setitem(script.SUITES, "cpu", (slow, fast, same, kept, sdpa, was))
    tile = Candidate.of_tile
    # A gain below half a percent is none.
    microseconds = {tile(DEFAULT): 100.0, tile(OTHER): 99.6, tile(THIRD): 90.0, SDPA: 200.0}
    times(script, monkeypatch, microseconds)
    tiles = {slow: OTHER, fast: THIRD, same: DEFAULT, kept: database.DEFAULT, sdpa: None}
    ratios = {str(OTHER): 0.7, str(THIRD): 0.7}
    old: dict[str, Any] = {"judged": "older kernels", "over_default": ratios}
    early = stored(tmp_path / "early.json", {was: database.DEFAULT}, default=str(THIRD), **old)
    database_path = stored(tmp_path / "db.json", tiles, **old)
    worth = tmp_path / "worth.json"
    words = ["measure", "--suite", "cpu", "--device", "cpu", "--databases", early, database_path]
    assert script.main([*words, "--output", str(worth)]) == 0
    judged = ["--judged", str(worth)]
    found = ship(script, tmp_path, "--databases", early, database_path, *judged)
    assert {e.judged for e in found.values()} == {KERNELS}
    # What was the default when it was kept beats the default of today.
    assert {k for k, e in found.items() if not e.kept} == {fast.bucket, was.bucket}
    assert found[was.bucket].tile == str(THIRD)
    winner = found[fast.bucket]
    assert (winner.tile, winner.default) == (str(THIRD), str(DEFAULT))
    assert winner.speedup_default == pytest.approx((100 / 90,) * 3, rel=0.01)
    # The search's other ratios were of other kernels.
    assert winner.over_default == {str(THIRD): 0.9}
    assert found[slow.bucket].over_default == {}
    # Where a tile is the default nobody needs another for softmax_lse.
    assert found[sdpa.bucket].tile_with_lse == ""
    # Of these kernels and this default they hold on, but for what was measured again.
    current = stored(tmp_path / "now.json", tiles, over_default=ratios)
    found = ship(script, tmp_path, "--databases", current, *judged)
    assert found[slow.bucket].over_default == {str(THIRD): 0.7}
    # What was judged is the choice, not the problem: another ships as it is.
    late = stored(tmp_path / "late.json", {slow: THIRD}, judged="older kernels")
    found = ship(script, tmp_path, "--databases", database_path, late, *judged)
    assert (found[slow.bucket].tile, found[slow.bucket].judged) == (str(THIRD), "older kernels")


def test_a_fresh_install_is_measured_against_earlier_defaults(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Neither the user's database nor a compiler takes part in what it plans."""
    request.addfinalizer(reload_databases)
    cpu = torch.device("cpu")
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    mine = {problem: Tile("cpu", 8, 8) for problem in (ONE, TWO)}
    path = database.user_path(arch(cpu).name)
    path.parent.mkdir(parents=True)
    stored(path, mine)
    reload_databases()
    assert make_plan(ONE, cpu).source == "user database"
    with script.fresh_install():
        planned = {problem: Candidate.of_plan(make_plan(problem, cpu)) for problem in (ONE, TWO)}
        assert "FLASHMOE_COMPILER must be" in jit.unavailable()
    assert make_plan(ONE, cpu).source == "user database"
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "other"))
    reload_databases()
    times(
        script,
        monkeypatch,
        {Candidate.of_tile(OTHER): 121.0, **dict.fromkeys(planned.values(), 100.0)},
    )
    rows = [
        {"problem": ONE.to_json(), "default": str(OTHER)},
        {"problem": TWO.to_json(), "default": str(planned[TWO])},
    ]
    before, output = tmp_path / "before.json", tmp_path / "fresh.json"
    document = {"commit": "abc", "device": arch(cpu).name, "problems": rows}
    before.write_text(json.dumps(document), encoding="utf-8")
    words = ["fresh", "--device", "cpu", "--before", str(before), "--output", str(output)]
    assert script.main(words) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["geometric_mean"] == pytest.approx(1.1)
    assert "a fresh install over the defaults of abc (2): 1.1000" in capsys.readouterr().out
    before.write_text(json.dumps({**document, "device": "NVIDIA H200"}), encoding="utf-8")
    with pytest.raises(SystemExit, match="--before is of NVIDIA H200, this is"):
        script.main(words)


def test_the_earlier_defaults_are_the_shipped_suites(
    script: ModuleType, shipped: tuple[Problem, ...]
) -> None:
    before = json.loads(script.BEFORE.read_text(encoding="utf-8"))
    assert [Problem.from_json(row["problem"]) for row in before["problems"]] == [*shipped]
    assert {row["default"].partition(":")[0] for row in before["problems"]} == {"sm90", "sdpa"}


def test_sdpa_is_no_rival_where_it_computes_something_else(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chunk = Problem(1, 2, 2, 64, 200, 16, "float32", mask=CAUSAL)
    monkeypatch.setitem(script.SUITES, "cpu", (chunk,))
    tile = Candidate.of_tile
    times(script, monkeypatch, {tile(DEFAULT): 200.0, tile(OTHER): 100.0, SDPA: 1.0})
    database_path = stored(tmp_path / "db.json", {chunk: OTHER})
    words = ["measure", "--suite", "cpu", "--device", "cpu", "--databases", database_path]
    assert script.main([*words, "--output", str(tmp_path / "worth.json")]) == 0
    found = json.loads((tmp_path / "worth.json").read_text())
    assert found["slower_than_sdpa"] == []
    assert found["geometric_means"]["cpu"] == pytest.approx(2.0)
    assert "SDPA cannot" in capsys.readouterr().out
