"""The suite of the shipped databases: what it holds, and what the measuring of one tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import load_benchmark

from flashmoe import database, shapes
from flashmoe.autotune.candidate import SDPA, Candidate
from flashmoe.problem import Problem
from flashmoe.tiles import Tile

ONE, TWO = (Problem(1, 2, 2, n, n, 16, "float32") for n in (64, 200))
DEFAULT, OTHER = Tile("cpu", 64, 64), Tile("cpu", 32, 32)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("tuned_suite", monkeypatch)
    monkeypatch.setitem(module.SUITES, "cpu", (ONE, TWO))
    monkeypatch.setattr(module, "default_candidate", lambda *_: Candidate.of_tile(DEFAULT))
    return module


def stored(path: Path, tiles: Mapping[Problem, Tile | None]) -> str:
    entries = {
        problem.bucket: database.Entry(
            problem,
            tile.backend if tile else "sdpa",
            str(tile or ""),
            str(DEFAULT),
            tile_with_lse="" if tile else str(OTHER),
            storage="/somewhere/else",
        )
        for problem, tile in tiles.items()
    }
    path.write_text(database.text_of(entries))
    return str(path)


def test_no_two_problems_of_the_suite_share_a_bucket(script: ModuleType) -> None:
    assert len({problem.bucket for problem in script.SHIPPED}) == len(script.SHIPPED) == 45
    assert len(script.SUITES["rows"]) == 27
    assert set(script.SUITES["agree"]) < set(script.SHIPPED)


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
    ) -> dict[Problem, dict[str, list[float]]]:
        return {
            problem: {name: [microseconds[c]] * rounds for name, c in field.items()}
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
        assert script.main([*words, "--database", stored(tmp_path / "db.json", tiles)]) == 0
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
        assert {name: len(x) for name, x in samples.items()} == {"chosen": 6, "sdpa": 6}
        assert min(map(min, samples.values())) > 0


def test_what_ships_is_of_the_suite_and_names_no_storage(
    script: ModuleType, tmp_path: Path
) -> None:
    mine = script.SHIPPED[0]
    early = stored(tmp_path / "early.json", {mine: OTHER, ONE: OTHER})
    late = stored(tmp_path / "late.json", {mine: DEFAULT})
    output = tmp_path / "tuned" / "gpu.json"
    assert script.main(["ship", "--databases", early, late, "--output", str(output)]) == 0
    (entry,) = database.load(output).values()
    assert (entry.problem, entry.tile, entry.storage) == (mine, str(DEFAULT), "")


def test_what_was_measured_slower_than_the_default_does_not_ship(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast, same = script.SHIPPED[:3]
    monkeypatch.setitem(script.SUITES, "cpu", (slow, fast, same))
    tile, third = Candidate.of_tile, Tile("cpu", 16, 16)
    times(
        script,
        monkeypatch,
        {tile(DEFAULT): 100.0, tile(OTHER): 100.5, tile(third): 99.5, SDPA: 200.0},
    )
    found = stored(tmp_path / "db.json", {slow: OTHER, fast: third, same: DEFAULT})
    worth, output = tmp_path / "worth.json", tmp_path / "gpu.json"
    words = ["measure", "--suite", "cpu", "--device", "cpu", "--database", found]
    assert script.main([*words, "--output", str(worth)]) == 0
    words = ["ship", "--databases", found, "--judged", str(worth), "--output", str(output)]
    assert script.main(words) == 0
    assert set(database.load(output)) == {fast.bucket, same.bucket}
    # What was judged is the choice, not the problem: another may ship.
    late = stored(tmp_path / "late.json", {slow: third})
    words = ["ship", "--databases", found, late, "--judged", str(worth), "--output", str(output)]
    assert script.main(words) == 0
    assert database.load(output)[slow.bucket].tile == str(third)


def test_sdpa_is_no_rival_where_it_computes_something_else(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chunk = Problem(1, 2, 2, 64, 200, 16, "float32", causal=True)
    monkeypatch.setitem(script.SUITES, "cpu", (chunk,))
    tile = Candidate.of_tile
    times(script, monkeypatch, {tile(DEFAULT): 200.0, tile(OTHER): 100.0, SDPA: 1.0})
    database_path = stored(tmp_path / "db.json", {chunk: OTHER})
    words = ["measure", "--suite", "cpu", "--device", "cpu", "--database", database_path]
    assert script.main([*words, "--output", str(tmp_path / "worth.json")]) == 0
    found = json.loads((tmp_path / "worth.json").read_text())
    assert found["slower_than_sdpa"] == []
    assert found["geometric_means"]["cpu"] == pytest.approx(2.0)
    assert "SDPA cannot" in capsys.readouterr().out
