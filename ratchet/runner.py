"""What CI runners do with one commit. Standard library only, since the package is not there yet:
`python3 -I ratchet/runner.py (gate|baseline|static) --baseline FOLDER --output FOLDER`.

gate      build, measure, compare with the baseline. A build that fails is a failed check. Its
          report says so, with the compiler's words, and SDPA is measured all the same: whether the
          machine is well is on record for that commit, too.
baseline  build, measure twice, and move the baseline where both agree; the new file and moved.md
          are in the output folder.
static    build with the CUDA toolkit of .ci/cuda-toolkit.txt, and compare the machine code with
          static.json in the baseline folder; no GPU needed.

Exit codes: those of the ratchet's commands, but for gate 3 (inconclusive, also after a second
measurement with twice the budget) is a warning and 0; 1 also for a build that fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPORT = "ratchet_report.md"
HISTORY = "history.jsonl"
_INCONCLUSIVE = 3
_LINES = 30
# A command and variables of its environment, to its exit code and output.
Run = Callable[[Sequence[str], dict[str, str]], tuple[int, str]]


def run_command(command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
    """Runs it in sight of the log."""
    print("$", *command, flush=True)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        lines.append(line)
    return process.wait(), "".join(lines)


@dataclass(frozen=True, slots=True)
class Place:
    """Folders, and the commands of the environment in the output folder."""

    baseline: Path
    output: Path

    @property
    def python(self) -> str:
        return str(self.output / "venv" / "bin" / "python")

    @property
    def pip(self) -> list[str]:
        return [self.python, "-m", "pip", "install", "--disable-pip-version-check"]

    @property
    def ratchet(self) -> list[str]:
        return [self.python, "-m", "flashmoe.ratchet"]


def prepare(run: Run, place: Place) -> int:
    """An environment of its own, in the output folder."""
    place.output.mkdir(parents=True, exist_ok=True)
    code, _ = run([sys.executable, "-m", "venv", str(place.output / "venv")], {})
    return code


def gate(run: Run, place: Place, suite: str, price: float | None) -> int:
    """Build, bench, gate; reports in the output folder."""
    output, ratchet = place.output, place.ratchet
    code, log = run([*place.pip, "."], {"FLASHMOE_CUDA": "on"})
    if code:
        return _failed_build(run, place, log, suite)
    for attempt, budget in (("current", []), ("again", ["--budget", "110"])):
        current = output / f"{attempt}.json"
        bench = [*ratchet, "bench", "--suite", suite, *budget, "--output", str(current)]
        code, log = run([*bench, *_price(price)], {})
        if not current.exists():
            _write_failure(output, "the measurement failed", log)
            return code or 1
        code, _ = run([*_gate(place, current), *_price(price)], {})
        if code != _INCONCLUSIVE:
            _profile(run, place)
            return code
    print("::warning::the ratchet cannot tell: too noisy, or the environment changed")
    return 0


def baseline(run: Run, place: Place, suite: str) -> int:
    """Build, bench twice, and move a copy of the baseline; moved.md tells what moved. A run that
    the gate accepts is added to the history beside it."""
    code, log = run([*place.pip, "."], {"FLASHMOE_CUDA": "on"})
    moved = place.output / "baselines"
    shutil.copytree(place.baseline, moved, ignore=shutil.ignore_patterns("static.json"))
    before = {path.name: path.read_bytes() for path in moved.iterdir()}
    for name in ("current", "confirm"):
        target = ["--output", str(place.output / f"{name}.json")]
        code = code or run([*place.ratchet, "bench", "--suite", suite, *target], {})[0]
    if code:
        return code
    files = [str(place.output / f"{name}.json") for name in ("current", "confirm")]
    update = ["--baseline", str(moved), "--update", "--confirm", files[1]]
    code, log = run([*place.ratchet, "gate", files[0], *update], {})
    if code in (0, _INCONCLUSIVE):
        history = ["--history", str(moved / HISTORY), "--append", files[0]]
        run([*place.ratchet, "trend", *history], {})
    for path in list(moved.iterdir()):
        if before.get(path.name) == path.read_bytes():
            path.unlink()
    _, found, told = log.partition("baseline ")
    (place.output / "moved.md").write_text(found + told, encoding="utf-8")
    return 0 if code == _INCONCLUSIVE else code


def static(run: Run, place: Place) -> int:
    """Build with CUDA from the package index, and compare the machine code."""
    requirements = ["-r", ".ci/cuda-toolkit.txt"]
    code, log = run([*place.pip, *requirements], {})
    home = next(place.output.glob("venv/lib/python3*/site-packages/nvidia/cu*"), None)
    if code or home is None:
        _write_failure(place.output, "the CUDA toolkit could not be installed", log)
        return code or 2
    code, log = run([*place.pip, "."], {"FLASHMOE_CUDA": "on", "CUDA_HOME": str(home.resolve())})
    if code:
        _write_failure(place.output, "the build failed", log)
        return 1
    report = ["--report", str(place.output / REPORT)]
    compared = ["static", "--baseline", str(place.baseline / "static.json")]
    return run([*place.ratchet, *compared, *report], {})[0]


def _gate(place: Place, current: Path) -> list[str]:
    files = {
        "--report": REPORT,
        "--html": "report.html",
        "--json": "decision.json",
        "--junit": "junit.xml",
        "--profile-targets": "profile_targets.txt",
    }
    options = [part for key, name in files.items() for part in (key, str(place.output / name))]
    return [*place.ratchet, "gate", str(current), "--baseline", str(place.baseline), *options]


def _profile(run: Run, place: Place) -> None:
    """Adds to the report what Nsight Compute says of the cases that moved, if it may."""
    targets = place.output / "profile_targets.txt"
    if targets.exists() and targets.read_text(encoding="utf-8").strip():
        report = ["--report", str(place.output / REPORT)]
        run([*place.ratchet, "profile", "--targets", str(targets), *report], {})


def _price(price: float | None) -> list[str]:
    return ["--price-per-hour", f"{price:g}"] if price else []


def _failed_build(run: Run, place: Place, log: str, suite: str) -> int:
    _write_failure(place.output, "the build failed", log)
    code, _ = run([*place.pip, "."], {"FLASHMOE_CUDA": "off"})
    if code == 0:
        reason = ["--yardstick", "the build failed"]
        target = ["--output", str(place.output / "current.json")]
        run([*place.ratchet, "bench", "--suite", suite, *reason, *target], {})
    return 1


def _write_failure(output: Path, what: str, log: str) -> None:
    """The log's lines that name an error, else its last ones, as code that no log can end."""
    lines = log.splitlines()
    shown = [line for line in lines if "error" in line.lower()][:_LINES] or lines[-_LINES:]
    code = "\n".join(f"    {line[:300]}" for line in shown)
    text = f"### 🔴 flashmoe ratchet: {what}\n\n{code}\n"
    (output / REPORT).write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("gate", "baseline", "static"))
    parser.add_argument("--baseline", type=Path, required=True, help="folder of the base branch")
    parser.add_argument("--output", type=Path, required=True, help="folder for reports")
    parser.add_argument("--suite", default="quick", help="default: %(default)s")
    parser.add_argument("--price-per-hour", type=float, help="of the machine: tells the cost")
    arguments = parser.parse_args(argv)
    place = Place(arguments.baseline, arguments.output)
    code = prepare(run_command, place)
    if code == 0 and arguments.action == "gate":
        code = gate(run_command, place, arguments.suite, arguments.price_per_hour)
    elif code == 0 and arguments.action == "baseline":
        code = baseline(run_command, place, arguments.suite)
    elif code == 0:
        code = static(run_command, place)
    summary, report = os.environ.get("GITHUB_STEP_SUMMARY"), arguments.output / REPORT
    if summary and report.exists():
        with open(summary, "a", encoding="utf-8") as opened:
            opened.write(report.read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    sys.exit(main())
