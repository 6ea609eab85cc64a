"""The history and what is seen in it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ratchet_synthetic as synthetic

from flashmoe.measure.stats import Interval
from flashmoe.measure.timing import HOW
from flashmoe.ratchet import cli
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.report.trend import all_series, change_points, sparkline, sparklines
from flashmoe.ratchet.results import history
from flashmoe.ratchet.results.files import save
from flashmoe.ratchet.results.values import slowed

NAME = synthetic.NAMES[0]


def intervals(values: np.ndarray, half: float = 0.004) -> list[Interval]:
    return [Interval(v, v * (1 - half), v * (1 + half)) for v in map(float, values)]


def test_a_level_that_stays_has_no_change_points() -> None:
    rng = np.random.default_rng(0)
    found = sum(
        bool(change_points(intervals(1.2 * np.exp(0.002 * rng.standard_normal(40)))))
        for _ in range(200)
    )
    assert found <= 2


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.01])
def test_changes_are_found_where_they_are(noise: float) -> None:
    rng = np.random.default_rng(1)
    levels = np.repeat([1.2, 1.32, 1.1], [12, 9, 10])
    values = levels * np.exp(noise * rng.standard_normal(len(levels)))
    assert change_points(intervals(values)) == [12, 21]


def test_one_noisy_run_more_is_no_change_but_an_exact_one_is() -> None:
    assert change_points(intervals(np.array([1.2, 1.22]), half=0.02)) == []
    assert change_points(intervals(np.array([1.2, 1.3]), half=0.004)) == [1]
    assert change_points(intervals(np.array([1.2]))) == []


def test_runs_are_appended_once_and_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.jsonl"
    runs = [
        replace(synthetic.results(seed=i), started=f"2026-01-0{i}T00:00:00+00:00")
        for i in (3, 1, 2)
    ]
    assert [history.append(path, history.entry(run)) for run in [*runs, runs[0]]] == [
        True,
        True,
        True,
        False,
    ]
    loaded = history.load(path)
    assert [one.started[:10] for one in loaded] == ["2026-01-01", "2026-01-02", "2026-01-03"]
    assert loaded[2] == history.entry(runs[0])


@pytest.mark.parametrize("line", ["{", "{}", "[]", '{"run": 1}', ""])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "history.jsonl"
    history.append(path, history.entry(synthetic.results()))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"history\.jsonl:2 is damaged"):
        history.load(path)


def test_what_is_not_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "history.jsonl"
    for content, told in ((b"\xff\xfe", "it is not UTF-8 text"), (b"[" * 99999, ":1 is damaged")):
        path.write_bytes(content)
        assert cli.main(["trend", "--history", str(path)]) == 2
        err = capsys.readouterr().err
        assert told in err
        assert "unexpected" not in err


def test_a_line_is_added_to_a_file_that_lacks_its_end(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    runs = [history.entry(synthetic.results(seed=seed)) for seed in range(3)]
    history.append(path, runs[0])
    path.write_text(path.read_text().rstrip("\n"))
    assert history.append(path, runs[1])
    assert history.append(path, runs[2])
    assert history.load(path) == runs
    assert len(path.read_text().splitlines()) == 3


def test_nothing_is_compared_across_environments() -> None:
    entries = [history.entry(synthetic.results(seed=i)) for i in range(6)]
    other = {**entries[0].fingerprint, "torch": "2.14.0"}
    entries[3:] = [
        replace(
            one,
            fingerprint=other,
            speedups={n: Interval(2, 1.99, 2.01) for n in one.speedups},
        )
        for one in entries[3:]
    ]
    series = all_series(entries)[0]
    assert (series.breaks, series.changes) == ((3,), ())
    assert [p.segment for p in series.points()] == [0, 0, 0, 1, 1, 1]


def test_an_entry_that_does_not_tell_was_timed_as_runs_were_before() -> None:
    gpu = replace(synthetic.results(), fingerprint=replace(synthetic.FINGERPRINT, threads=0))
    today = history.entry(replace(gpu, settings={**gpu.settings, "timing": HOW["cuda"]}))
    silent = history.entry(gpu)
    old = replace(
        silent, fingerprint={k: v for k, v in silent.fingerprint.items() if k != "timing"}
    )
    assert old.environment == silent.environment != today.environment


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page, picture = (tmp_path / n for n in ("history.jsonl", "trend.html", "trend.svg"))
    for i in range(8):
        run = replace(synthetic.results(seed=10 * i), started=f"2026-01-0{i + 1}T00:00:00+00:00")
        if i >= 4:
            run = slowed(run, NAME, 0.9)
        if i >= 6:
            run = replace(run, fingerprint=replace(run.fingerprint, driver="590.2"))
        save(run, tmp_path / "current.json")
        command = ["trend", "--history", str(path), "--append", str(tmp_path / "current.json")]
        assert cli.main([*command, "--html", str(page), "--svg", str(picture)]) == 0
    out = capsys.readouterr().out
    assert f"{NAME}: 2026-01-05T00:00, commit c0ffeec0ff: +11.1 % from one run to the next" in out
    assert "another environment (driver 580.1 to 590.2)" in out
    drawn = ElementTree.fromstring(picture.read_text())
    points = drawn.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(points) == 8 * len(synthetic.NAMES)
    assert len(drawn.findall(".//{http://www.w3.org/2000/svg}path")) == 1
    assert "+11.1 %" in page.read_text()
    assert len(path.read_text().splitlines()) == 8
    assert json.loads(path.read_text().splitlines()[0])["fingerprint"]["device"] == "Some GPU"


def test_sparklines_show_what_matters() -> None:
    assert sparkline([1.0, 1.1, 1.2, 1.0]) == "▁▅█▁"
    assert len(set(sparkline([1.2, 1.2004, 1.1998]))) <= 2
    entries = [history.entry(synthetic.results(seed=i)) for i in range(5)]
    other = {**entries[0].fingerprint, "torch": "2.14.0"}
    foreign = replace(entries[4], fingerprint=other)
    lines = sparklines([*entries[:4], foreign], entries[0].environment)
    assert lines[NAME].endswith("1.20 to 1.20, 4 runs")
    assert sparklines([foreign], foreign.environment) == {}


def test_the_gates_report_has_the_history(tmp_path: Path) -> None:
    for i in range(3):
        history.append(tmp_path / "h.jsonl", history.entry(synthetic.results(seed=10 * i)))
    save(synthetic.results(), tmp_path / "base.json")
    save(slowed(synthetic.results(seed=40), NAME, 1.1), tmp_path / "now.json")
    command = ["gate", str(tmp_path / "now.json"), "--baseline", str(tmp_path / "base.json")]
    more = ["--history", str(tmp_path / "h.jsonl"), "--report", str(tmp_path / "report.md")]
    assert cli.main([*command, *more]) == 1
    lines = (tmp_path / "report.md").read_text().splitlines()
    (line,) = (line for line in lines if line.endswith(" 3 runs"))
    assert line.startswith(f"- `{NAME}`: ")
    assert "1.20 to 1.20" in line
