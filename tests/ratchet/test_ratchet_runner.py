"""What CI runners do, with commands that only pretend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flashmoe.ratchet import cli, runner

SCRIPT = Path(__file__).resolve().parents[2] / "ratchet" / "runner.py"


class Pretend:
    """Runs nothing: answers by the first word of `answers` that a command contains, else 0; bench
    writes its output. What is called of the ratchet must be a command that exists."""

    def __init__(self, *answers: tuple[str, int, str]) -> None:
        self.answers = list(answers)
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []

    def __call__(self, command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
        self.commands.append(list(command))
        self.environments.append(environment)
        if "flashmoe.ratchet" in command:
            words = list(command[command.index("flashmoe.ratchet") + 1 :])
            arguments = cli.parser().parse_args(words)
            if words[0] == "bench":
                arguments.output.write_text("{}")
        for i, (word, code, text) in enumerate(self.answers):
            if word in command:
                del self.answers[i]
                return code, text
        return 0, ""

    def called(self, word: str) -> list[list[str]]:
        return [command for command in self.commands if word in command]


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
    assert run.environments[0] == {"FLASHMOE_CUDA": "on"}


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
    run = Pretend(("install", 1, log))
    assert runner.gate(run, place, "quick", None) == 1
    text = (place.output / runner.REPORT).read_text()
    assert text.startswith("### 🔴 flashmoe ratchet: the build failed\n\n    fwd.cuh(12): error")
    assert all(line.startswith("    ") for line in text.splitlines()[2:])
    (bench,) = run.called("bench")
    assert bench[bench.index("--yardstick") + 1] == "the build failed"
    assert run.environments[1] == {"FLASHMOE_CUDA": "off"}
    assert run.called("gate") == []


def test_without_a_build_at_all_nothing_is_measured(place: runner.Place) -> None:
    run = Pretend(("install", 1, "error: x"), ("install", 1, "error: y"))
    assert runner.gate(run, place, "quick", None) == 1
    assert run.called("bench") == []


def test_a_measurement_that_writes_nothing_is_told(place: runner.Place) -> None:
    def run(command: Sequence[str], _: dict[str, str]) -> tuple[int, str]:
        return (2, "no GPU\n") if "bench" in command else (0, "")

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
    assert trend[trend.index("--append") + 1] == run.called("bench")[0][-1]
    refused = Pretend(("gate", 1, ""))
    (place.output / "baselines").rmdir()
    assert runner.baseline(refused, place, "quick") == 1
    assert refused.called("trend") == []


@pytest.mark.parametrize("targets", ["", "fwd-b2-h8-s512-d64-float32\n"])
def test_what_moved_is_profiled(place: runner.Place, targets: str) -> None:
    (place.output / "profile_targets.txt").write_text(targets)
    run = Pretend(("gate", 1, ""), ("profile", 3, ""))
    assert runner.gate(run, place, "quick", None) == 1
    assert len(run.called("profile")) == bool(targets)


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
    assert ".ci/cuda-toolkit.txt" in run.commands[0]


def test_static_without_a_toolkit_says_so(place: runner.Place) -> None:
    assert runner.static(Pretend(("install", 1, "no network")), place) == 1
    assert "toolkit could not be installed" in (place.output / runner.REPORT).read_text()


def test_it_runs_as_a_script_without_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "A build that fails is a failed check" in done.stdout
