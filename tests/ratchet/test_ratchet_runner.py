"""What CI runners do, with commands that only pretend."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flashmoe.ratchet import cli
from flashmoe.ratchet.ci import runner

# What a gate writes: texts by its options.
Gated = dict[str, str]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "ratchet" / "ci" / "runner.py"


class Pretend:
    """Runs nothing: answers by the first word of `answers` that a command contains, else 0; bench
    writes its output, and each gate the next of `gates`, by its option, if there is one. What is
    called of the ratchet must be a command that exists."""

    def __init__(self, *answers: tuple[str, int, str], gates: Sequence[Gated] = ()) -> None:
        self.answers, self.gates = list(answers), list(gates)
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []

    def __call__(self, command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
        self.commands.append(list(command))
        self.environments.append(environment)
        if "flashmoe.ratchet" in command:
            words = list(command[command.index("flashmoe.ratchet") + 1 :])
            arguments = cli.parser().parse_args(words)
            if words[0] == "bench" and not arguments.build_only:
                arguments.output.write_text("{}")
            if words[0] == "gate" and self.gates:
                for option, text in self.gates.pop(0).items():
                    if path := getattr(arguments, option):
                        path.write_text(text)
        for i, (word, code, text) in enumerate(self.answers):
            if word in command:
                del self.answers[i]
                return code, text
        return 0, ""

    def called(self, word: str) -> list[list[str]]:
        return [c for c in self.commands if word in c and "--build-only" not in c]


@pytest.fixture
def place(tmp_path: Path) -> runner.Place:
    (tmp_path / "baselines").mkdir()
    (tmp_path / "results").mkdir()
    return runner.Place(tmp_path / "baselines", tmp_path / "results")


@pytest.mark.parametrize("code", [0, 1, 2, 4])
def test_the_gates_code_is_the_checks(place: runner.Place, code: int) -> None:
    run = Pretend(("gate", code, ""))
    assert runner.gate(run, place, "quick", 3.5) == code
    assert len(run.called("bench")) == len(run.called("gate")) == 1
    assert run.called("bench")[0][-2:] == ["--price-per-hour", "3.5"]


@pytest.mark.parametrize("action", [runner.gate, runner.baseline])
def test_what_judges_is_the_scripts_and_what_is_judged_is_the_commit_here(
    place: runner.Place, action: Callable[..., int]
) -> None:
    """Its ratchet, suite, thresholds, versions and baselines: nothing of them is the commit's."""
    run = Pretend()
    assert action(run, place, *(("quick", None) if action is runner.gate else ("quick",))) == 0
    requirements, package, build, *rest = run.commands
    assert requirements[-2:] == ["-r", str(ROOT / runner.REQUIREMENTS)]
    assert package[-1] == f"{ROOT}[tune]"
    assert [environment["FLASHMOE_CUDA"] for environment in run.environments[:3]] == [
        "off",
        "off",
        "on",
    ]
    assert "--build-only" in build
    for command in (build, *run.called("bench")):
        assert command[command.index("--build") + 1] == "HEAD"
    # The same build, and nothing else that is installed.
    folders = {c[c.index("--build-folder") + 1] for c in (build, *run.called("bench"))}
    assert folders == {str(place.output / "builds")}
    assert not [command for command in rest if "pip" in command]


def test_commands_run_where_no_checkout_is_taken_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`python -m flashmoe.ratchet` takes a folder `flashmoe` in the current one for the package."""
    folders: list[Path] = []
    running_in = runner.running_in
    monkeypatch.setattr(
        runner, "running_in", lambda folder: folders.append(folder) or (lambda *_: (1, ""))
    )
    monkeypatch.chdir(ROOT)
    output = tmp_path / "results"
    words = ["--baseline", "baselines", "--output", str(output)]
    assert runner.main(["gate", *words]) == 2
    assert folders == [output]
    where = "import os, sys; print(os.getcwd(), flush=True); sys.stdout.buffer.write(bytes([0xb5]))"
    code, log = running_in(output)([sys.executable, "-c", where], {})
    assert (code, log) == (0, f"{output}\n\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("action", [runner.gate, runner.baseline])
def test_no_plan_of_the_machine_has_a_say(place: runner.Place, action: Callable[..., int]) -> None:
    cache = place.output / "cache"
    (cache / "tuned").mkdir(parents=True)
    (place.output / "builds" / "cache").mkdir(parents=True)
    run = Pretend()
    assert runner.prepare(run, place) == 0
    assert not cache.exists()
    assert not (place.output / "builds").exists()
    more = ("quick", None) if action is runner.gate else ("quick",)
    assert action(run, place, *more) == 0
    ours = zip(run.commands, run.environments, strict=True)
    measured = [env for command, env in ours if {"bench", "gate"} & set(command)]
    assert measured
    assert {env["FLASHMOE_CACHE_DIR"] for env in measured} == {str(cache)}


def test_no_price_is_no_cost(place: runner.Place) -> None:
    run = Pretend()
    assert runner.gate(run, place, "quick", 0.0) == 0
    assert not any("--price-per-hour" in command for command in run.commands)


@pytest.mark.parametrize(("second", "code"), [(0, 0), (1, 1), (3, 0)])
def test_an_inconclusive_gate_is_measured_again_with_more(
    place: runner.Place, second: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Pretend(("gate", 3, ""), ("gate", second, ""))
    assert runner.gate(run, place, "quick", None) == code
    assert ["--budget" in command for command in run.called("bench")] == [False, True]
    assert ("::warning::" in capsys.readouterr().out) == (second == 3)


def test_a_failed_build_is_a_failed_check_with_sdpa_on_record(place: runner.Place) -> None:
    log = "compiling\nfwd.cuh(12): error: no such thing\n```\n@someone\n1 error detected\n"
    run = Pretend(("--build-only", 1, log))
    assert runner.gate(run, place, "quick", None) == 1
    text = (place.output / runner.REPORT).read_text()
    assert text.startswith("### 🔴 flashmoe ratchet: the build failed\n\n    fwd.cuh(12): error")
    assert all(line.startswith("    ") for line in text.splitlines()[2:])
    (bench,) = run.called("bench")
    assert bench[bench.index("--yardstick") + 1] == "the build failed"
    assert run.called("gate") == []
    assert runner.baseline(Pretend(("--build-only", 1, log)), place, "quick") == 1


@pytest.mark.parametrize("action", [runner.gate, runner.baseline])
def test_what_measures_and_cannot_be_installed_is_no_regression(
    place: runner.Place, action: Callable[..., int]
) -> None:
    run = Pretend(("install", 1, "no network"))
    assert action(run, place, *(("quick", None) if action is runner.gate else ("quick",))) == 2
    assert run.called("bench") == []
    report = (place.output / runner.REPORT).read_text()
    assert "what measures could not be installed\n\n    no network" in report
    assert runner.prepare(Pretend(("venv", 1, "")), place) == 2


@pytest.mark.parametrize("code", [0, 1, 2, -9])
def test_a_measurement_that_writes_nothing_is_told(place: runner.Place, code: int) -> None:
    def run(command: Sequence[str], _: dict[str, str]) -> tuple[int, str]:
        measures = "bench" in command and "--build-only" not in command
        return (code, "no GPU\n") if measures else (0, "")

    assert runner.gate(run, place, "quick", None) == 2
    assert "the measurement failed\n\n    no GPU" in (place.output / runner.REPORT).read_text()


def _moving(place: runner.Place) -> Callable[..., tuple[int, str]]:
    def run(command: Sequence[str], _: dict[str, str]) -> tuple[int, str]:
        if "gate" in command:
            (place.output / "baselines" / "gpu.json").write_text("new")
            return 0, "table\nbaseline gpu.json: 1 of 2 cases moved forward\n  a: +7 %\n"
        return 0, ""

    return run


def test_baseline_leaves_only_what_moved(place: runner.Place) -> None:
    for name in ("gpu.json", "other.json", "static.json"):
        (place.baseline / name).write_text("old")
    assert runner.baseline(_moving(place), place, "quick") == 0
    assert [p.name for p in (place.output / "baselines").iterdir()] == ["gpu.json"]
    moved = (place.output / "moved.md").read_text()
    assert moved == "baseline gpu.json: 1 of 2 cases moved forward\n  a: +7 %\n"
    assert (place.baseline / "gpu.json").read_text() == "old"


def test_an_accepted_run_is_added_to_the_history(place: runner.Place) -> None:
    run = Pretend()
    assert runner.baseline(run, place, "quick") == 0
    (trend,) = run.called("trend")
    assert (
        trend[trend.index("--append") + 1]
        == run.called("bench")[0][-1]
        == str(place.output / "current.json")
    )
    refused = Pretend(("gate", 1, ""))
    (place.output / "baselines").rmdir()
    assert runner.baseline(refused, place, "quick") == 1
    assert refused.called("trend") == []


def test_a_gate_that_ends_without_a_report_is_no_failed_build(place: runner.Place) -> None:
    """And says nothing by the report of the attempt before."""
    log = "flashmoe.ratchet: error: gpu.json is damaged: the file is empty\n"
    run = Pretend(("gate", 3, ""), ("gate", 2, log), gates=[{"report": "### ⚪ cannot tell"}])
    assert runner.gate(run, place, "quick", None) == 2
    assert (place.output / runner.REPORT).read_text() == (
        f"### 🔴 flashmoe ratchet: the gate could not decide\n\n    {log}"
    )


TARGET = "fwd-b2-h8-s512-d64-float32\n"


@pytest.mark.parametrize("targets", ["", TARGET])
def test_what_moved_is_profiled(place: runner.Place, targets: str) -> None:
    gates = [{"report": "x", "profile_targets": targets}]
    run = Pretend(("gate", 1, ""), ("profile", 3, ""), gates=gates)
    assert runner.gate(run, place, "quick", None) == 1
    assert len(run.called("profile")) == bool(targets)


@pytest.mark.parametrize(
    ("commit", "answers", "bases"),
    [
        ("c" * 40, [], [True]),
        ("c" * 40, [("profile", 3, "")], [True]),
        ("c" * 40, [("profile", 2, "does not build")], [True, False]),
        ("c" * 40, [("cat-file", 128, "")], [False]),
        ("c" * 40 + "+", [], [False]),
        ("", [], [False]),
    ],
)
def test_a_profile_is_beside_the_baselines_commit_where_that_is_here(
    place: runner.Place, commit: str, answers: list[tuple[str, int, str]], bases: list[bool]
) -> None:
    decision = json.dumps({"commits": {"baseline": commit}})
    gates = [{"report": "x", "profile_targets": TARGET, "json": decision}]
    run = Pretend(("gate", 1, ""), *answers, gates=gates)
    assert runner.gate(run, place, "quick", None) == 1
    profiles = run.called("profile")
    assert ["--base" in command for command in profiles] == bases
    assert all(command[command.index("--head") + 1] == "HEAD" for command in profiles)
    assert [commit in command for command in profiles] == bases


@pytest.mark.parametrize("past", [False, True])
def test_the_report_has_the_history_where_there_is_one(place: runner.Place, past: bool) -> None:
    if past:
        (place.baseline / runner.HISTORY).write_text("")
    run = Pretend()
    assert runner.gate(run, place, "quick", None) == 0
    assert ("--history" in run.called("gate")[0]) == past


FOREIGN = "fingerprint: driver: '590.1' here, '580.1' there"
DRIFTED = "the environment changed under every case: nothing was judged"


def decision(*problems: str, verdict: str = "PASS") -> Gated:
    return {"json": json.dumps({"integrity": problems, "cases": [{"verdict": verdict}]})}


@pytest.mark.parametrize(
    ("first", "second", "code", "gates"),
    [
        (decision(FOREIGN), decision(), 0, 3),
        (decision(FOREIGN, DRIFTED, verdict="INCONCLUSIVE"), decision(), 0, 3),
        (decision(FOREIGN), decision(verdict="IMPROVED"), 4, 3),
        (decision(FOREIGN, verdict="INTEGRITY"), decision(), 4, 1),
        (decision("both are the same run", FOREIGN), decision(), 4, 1),
        (decision(DRIFTED), decision(), 4, 1),
    ],
)
def test_another_environment_gets_a_baseline_that_two_runs_agree_on(
    place: runner.Place, first: Gated, second: Gated, code: int, gates: int
) -> None:
    (place.baseline / "gpu.json").write_text("old")
    pretend = Pretend(("gate", 4, ""), gates=[first, decision(), second])

    def run(command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
        if "gate" in command and str(place.output / "fresh") in command:
            (place.output / "fresh").mkdir(exist_ok=True)
            (place.output / "fresh" / "gpu.json").write_text("new")
        return pretend(command, environment)

    assert runner.baseline(run, place, "quick") == code
    assert len(pretend.called("gate")) == gates
    found = list((place.output / "baselines").iterdir())
    assert [path.read_text() for path in found] == ([] if code else ["new"])
    text = (place.output / "moved.md").read_text()
    assert (f"- {FOREIGN}\n" in text) == (gates == 3)
    assert len(pretend.called("trend")) == (code == 0)


def test_another_environment_on_which_two_runs_differ_gets_none(place: runner.Place) -> None:
    run = Pretend(("gate", 4, ""), ("gate", 0, ""), ("gate", 1, ""), gates=[decision(FOREIGN)])
    assert runner.baseline(run, place, "quick") == 1
    assert list((place.output / "baselines").iterdir()) == []


def test_baseline_takes_two_measurements(place: runner.Place) -> None:
    run = Pretend()
    assert runner.baseline(run, place, "quick") == 0
    first, second = (command[-1] for command in run.called("bench"))
    (gate,) = run.called("gate")
    assert gate[gate.index("gate") + 1] == first != second
    assert gate[gate.index("--confirm") + 1] == second


def test_static_builds_with_the_toolkit_of_the_index(place: runner.Place) -> None:
    home = place.output / "venv/lib/python3.11/site-packages/nvidia/cu13"
    home.mkdir(parents=True)
    run = Pretend(("static", 1, ""))
    assert runner.static(run, place) == 1
    assert run.environments[1] == {"FLASHMOE_CUDA": "on", "CUDA_HOME": str(home)}
    assert str(ROOT / ".ci/cuda-toolkit.txt") in run.commands[0]


def test_static_without_a_toolkit_says_so(place: runner.Place) -> None:
    assert runner.static(Pretend(("install", 1, "no network")), place) == 2
    assert "toolkit could not be installed" in (place.output / runner.REPORT).read_text()


def test_it_runs_as_a_script_without_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "A build that fails is a failed check" in done.stdout
