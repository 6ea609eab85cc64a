"""show, export, import and apply."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from autotune_simulated import PROBLEM

from flashmoe.autotune.cli.apply import winning_lines, with_first
from flashmoe.autotune.cli.dispatch import main
from flashmoe.machine.device import cpu_name
from flashmoe.measure.fingerprint import kernel_hash
from flashmoe.planning import database
from flashmoe.spec.mask import Mask
from flashmoe.tiles import Tile

OTHER = dataclasses.replace(PROBLEM, head_dim=120, dtype="bfloat16")
THIRD = dataclasses.replace(OTHER, seqlen_q=64, seqlen_kv=64)
SM80 = Tile("sm80", 128, 64, 2, 4)
INSTANCES = """\
# head_dim block_m block_n num_stages num_warps
64 128 64 2 4
128 64 64 2 4
128 128 64 2 4
# the large ones
256 64 32 1 4
"""


def entry(problem=PROBLEM, tile="cpu:48x160", device="Some CPU", **changes):  # type: ignore[no-untyped-def]
    fields = {
        "backend": Tile.parse(tile).backend if tile else "sdpa",
        "samples": {tile: (1e-3, 1.1e-3)},
        "seconds": (1e-3, 0.9e-3, 1.1e-3),
        "speedup_default": (1.25, 1.2, 1.3),
        "runner_up": "sdpa",
        "fingerprint": {"device": device},
        "default": "x",
    }
    return database.Entry(problem=problem, tile=tile, **{**fields, **changes})


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def store(*entries: database.Entry, device: str = "Some CPU") -> Path:
    path = database.user_path(device)
    database.update(path, {e.problem.bucket: e for e in entries})
    return path


def test_show_tells_what_is_tuned_here(capsys: pytest.CaptureFixture[str]) -> None:
    path = store(entry(), device=cpu_name())
    assert main(["show", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for text in (PROBLEM.label, "cpu:48x160", "1.25x [1.20, 1.30]", "1 ms", "yours", str(path)):
        assert text in out


@pytest.mark.parametrize(("judged", "used"), [("", False), (kernel_hash("cpu"), True)])
def test_show_tells_what_is_of_other_kernels(
    judged: str, used: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = entry(tile="", backend="default", default="cpu:64x64", judged=judged)
    store(kept, device=cpu_name())
    assert main(["show", "--device", "cpu"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the default, cpu:64x64 then" in out
    assert ("yours, of other kernels: not used" in out) != used


def test_show_tells_of_another_model_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    store(entry())
    assert main(["show", "--model", "Some CPU", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["entries"]
    assert (shown["tile"], shown["source"]) == ("cpu:48x160", "yours")
    assert "samples" not in shown


def test_a_database_moves_between_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store(entry(), entry(OTHER))
    assert main(["export", "--model", "Some CPU", "moved.json"]) == 0
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "elsewhere"))
    mine = entry(tile="cpu:64x64")
    store(mine)
    assert main(["import", "moved.json"]) == 0
    assert "1 problems taken over, 1 kept" in capsys.readouterr().out
    found = database.load(database.user_path("Some CPU"))
    assert found == {PROBLEM.bucket: mine, OTHER.bucket: entry(OTHER)}
    assert main(["import", "moved.json", "--replace"]) == 0
    assert database.load(database.user_path("Some CPU"))[PROBLEM.bucket] == entry()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["export", "--model", "No Such", "x.json"], ["nothing is tuned", "No Such"]),
        (["export", "--model", "Some CPU", "no/x.json"], ["file", "no/x.json"]),
        (["import", "absent.json"], ["file", "absent.json"]),
        (["import", "bad.json"], ["file", "bad.json"]),
        (["apply", "--model", "Some CPU"], ["no CUDA tile", "Some CPU"]),
        (["apply", "--model", "GPU", "--instances", "nowhere"], ["--instances", "nowhere"]),
        (["show", "--frobnicate"], ["--frobnicate"]),
    ],
)
def test_bad_usage_is_one_line_and_code_2(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.json").write_text('{"schema": 77}')
    store(entry())
    store(entry(OTHER, str(SM80), "GPU"), device="GPU")
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flashmoe.autotune: error: ")
    assert all(part in line for part in parts), line


def test_apply_puts_the_winner_first_of_its_head_dimension(tmp_path: Path) -> None:
    store(entry(OTHER, str(SM80), "GPU"), device="GPU")
    Path("sm80.txt").write_text(INSTANCES)
    assert main(["apply", "--model", "GPU", "--instances", ".", "--dry-run"]) == 0
    assert Path("sm80.txt").read_text() == INSTANCES
    assert main(["apply", "--model", "GPU", "--instances", "."]) == 0
    lines = Path("sm80.txt").read_text().splitlines()
    assert lines[2:4] == ["128 128 64 2 4", "128 64 64 2 4"]
    assert sorted(lines) == sorted(INSTANCES.splitlines())
    assert with_first("\n".join(lines) + "\n", {128: ["128 128 64 2 4"]}) == "\n".join(lines) + "\n"


def test_a_hopper_tile_joins_the_list_that_the_others_are_generated_from(tmp_path: Path) -> None:
    store(entry(OTHER, "sm90:128x64-stages2", "GPU"), device="GPU")
    folder = Path(__file__).parents[2] / "csrc" / "instances"
    lists = shutil.copytree(folder, tmp_path / "instances")
    line = "128 128 64 2 1 0 0 0 1 0"
    covering, generated = lists / "covering.txt", lists / "sm90.txt"
    before = generated.read_text(encoding="utf-8").splitlines()
    assert line not in before
    words = ["apply", "--model", "GPU", "--instances", str(lists)]
    assert main([*words, "--dry-run"]) == 0
    assert line not in covering.read_text(encoding="utf-8").splitlines()
    assert main(words) == 0
    assert line in covering.read_text(encoding="utf-8").splitlines()
    assert set(generated.read_text(encoding="utf-8").splitlines()) == {*before, line}


def test_a_tile_that_is_not_listed_is_added() -> None:
    more = with_first(INSTANCES, {256: ["256 64 128 1 4"]})
    assert "256 64 128 1 4\n256 64 32 1 4\n" in more
    assert with_first(INSTANCES, {32: ["32 64 128 1 4"]}).endswith("256 64 32 1 4\n32 64 128 1 4\n")


def test_the_tile_that_won_most_problems_comes_first() -> None:
    rare = Tile("sm80", 64, 64, 1, 4)
    problems = [dataclasses.replace(OTHER, batch=2**n) for n in range(3)]
    entries = [entry(problems[0], str(rare)), *(entry(p, str(SM80)) for p in problems[1:])]
    entries.append(entry(THIRD, "", tile_with_lse=str(SM80)))
    found = winning_lines({str(n): e for n, e in enumerate(entries)})
    assert found == {"sm80": {128: ["128 128 64 2 4", "128 64 64 1 4"]}}


def test_a_tile_that_won_with_a_window_is_listed_with_its_variant() -> None:
    window = dataclasses.replace(OTHER, mask=Mask(100, 0))
    for tile, line in (
        ("sm90:128x64-stages2", "128 128 64 2 1 0 0 0 1 0 local"),
        (str(SM80), "128 128 64 2 4"),
    ):
        kernel = tile.partition(":")[0]
        assert winning_lines({"x": entry(window, tile)}) == {kernel: {128: [line]}}
