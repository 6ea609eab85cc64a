"""What CI runners do with one commit. Standard library only, since the package is not there yet:
`python3 -I ratchet/ci/runner.py (gate|baseline|static) --baseline FOLDER --output FOLDER`.

What is measured is the commit that is checked out where this runs. What measures and judges it is
the checkout that this script lies in, with the versions of its .ci/gpu-requirements.txt; for a pull
request that is its base's, so that nothing it changes of the ratchet has a say in its own case.

gate      build, measure, compare with the baseline. A build that fails is a failed check. Its
          report says so, with the compiler's words, and SDPA is measured all the same: whether the
          machine is well is on record for that commit, too.
baseline  build, measure twice, and move the baseline where both agree; the new file and moved.md
          are in the output folder. Where the environment is another (driver, torch) and nothing
          else keeps them from being compared, the new file is the first run, if the second one
          passes against it.
static    build with the CUDA toolkit of .ci/cuda-toolkit.txt, and compare the machine code with
          static.json in the baseline folder; no GPU needed. All of it is the script's checkout.

Exit codes: those of the ratchet's commands, but for gate 3 (inconclusive, also after a second
measurement with twice the budget) is a warning and 0; 1 also for a build that fails; 2 where what
measures cannot be installed. No plans are known but those that the measured commit ships.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPORT = "ratchet_report.md"
HISTORY = "history.jsonl"
REQUIREMENTS = ".ci/gpu-requirements.txt"
# The checkout whose ratchet measures and judges.
HARNESS = Path(__file__).resolve().parents[2]
PACKAGE = f"{HARNESS}[tune]"
_DECISION = "decision.json"
_TARGETS = "profile_targets.txt"
_BAD_INPUT, _INCONCLUSIVE, _NOT_COMPARABLE = 2, 3, 4
_LINES = 30
# A command and variables of its environment, to its exit code and output.
Run = Callable[[Sequence[str], dict[str, str]], tuple[int, str]]


def running_in(folder: Path) -> Run:
    """Runs commands in `folder`, in sight of the log. Not in a checkout: `python -m flashmoe.…`
    would take the folder `flashmoe` there for the installed package."""

    def run(command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
        print("$", *command, flush=True)
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            cwd=folder,
            env={**os.environ, **environment},
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            sys.stdout.write(line)
            lines.append(line)
        return process.wait(), "".join(lines)

    return run


class Place:
    """Folders, absolute, and the commands of the environment in the output folder."""

    def __init__(self, baseline: Path, output: Path) -> None:
        self.baseline, self.output = baseline, output
        python = str(output / "venv" / "bin" / "python")
        self.pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
        self.ratchet = [python, "-m", "flashmoe.ratchet"]
        self.builds = ["--build-folder", str(output / "builds")]
        # Of what builds and measures: no plan that was tuned on the machine by someone else.
        self.environment = {"FLASHMOE_CACHE_DIR": str(output / "cache"), "FLASHMOE_CUDA": "on"}

    def bench(self, suite: str, name: str) -> list[str]:
        """Measures the commit that is checked out, into the file NAME.json."""
        target = ["--output", str(self.output / f"{name}.json")]
        return [*self.ratchet, "bench", "--build", "HEAD", *self.builds, "--suite", suite, *target]


def prepare(run: Run, place: Place) -> int:
    """An environment of its own, in the output folder."""
    for name in ("cache", "builds"):
        shutil.rmtree(place.output / name, ignore_errors=True)
    code, _ = run([sys.executable, "-m", "venv", str(place.output / "venv")], {})
    return _BAD_INPUT if code else 0


def gate(run: Run, place: Place, suite: str, price: float | None) -> int:
    """Build, bench, gate; reports in the output folder."""
    output = place.output
    if code := _ready(run, place):
        if code == 1:
            reason = ["--yardstick", "the build failed"]
            target = ["--output", str(output / "current.json")]
            run([*place.ratchet, "bench", "--suite", suite, *reason, *target], place.environment)
        return code
    for name, budget in (("current", []), ("again", ["--budget", "110"])):
        current = output / f"{name}.json"
        bench = [*place.bench(suite, name), *budget, *_price(price)]
        _, log = run(bench, place.environment)
        if not current.exists():
            _write_failure(output, "the measurement failed", log)
            return _BAD_INPUT
        for stale in (REPORT, _TARGETS, _DECISION):
            (output / stale).unlink(missing_ok=True)
        code, log = run([*_gate(place, current), *_price(price)], place.environment)
        if not (output / REPORT).exists():
            _write_failure(output, "the gate could not decide", log)
        if code != _INCONCLUSIVE:
            _profile(run, place)
            return code
    print("::warning::the ratchet cannot tell: too noisy, or the environment changed")
    return 0


def baseline(run: Run, place: Place, suite: str) -> int:
    """Build, bench twice, and move a copy of the baseline; moved.md tells what moved. A run that
    the gate accepts is added to the history beside it."""
    code = _ready(run, place)
    moved = place.output / "baselines"
    shutil.copytree(place.baseline, moved, ignore=shutil.ignore_patterns("static.json"))
    before = {path.name: path.read_bytes() for path in moved.iterdir()}
    for name in ("current", "confirm"):
        code = code or run(place.bench(suite, name), place.environment)[0]
    if code:
        return code
    files = [str(place.output / f"{name}.json") for name in ("current", "confirm")]
    update = ["--baseline", str(moved), "--update", "--confirm", files[1]]
    told = ["--json", str(place.output / _DECISION)]
    code, log = run([*place.ratchet, "gate", files[0], *update, *told], place.environment)
    text = "".join(log.partition("baseline ")[1:])
    if code == _NOT_COMPARABLE and (changed := _environment_changed(place)):
        code, again = _created_anew(run, place, moved, files)
        lines = ["Another environment:", "", *changed, ""]
        lines += ["The first run against the baseline before:", "", "```", log, "```", ""]
        lines += ["The second run against the first:", "", "```", again, "```"]
        text = "".join(f"{line}\n" for line in lines)
    if code in (0, _INCONCLUSIVE):
        history = ["--history", str(moved / HISTORY), "--append", files[0]]
        run([*place.ratchet, "trend", *history], place.environment)
    for path in list(moved.iterdir()):
        if before.get(path.name) == path.read_bytes():
            path.unlink()
    (place.output / "moved.md").write_text(text, encoding="utf-8")
    return 0 if code == _INCONCLUSIVE else code


def _environment_changed(place: Place) -> list[str]:
    """What differs of the machine and its software, when nothing else keeps the run and the
    baseline from being compared."""
    decision = _decision(place)
    problems: list[str] = decision.get("integrity", [])
    # A new torch may well move SDPA under every case.
    only = all(problem.startswith(("fingerprint: ", "the environment ")) for problem in problems)
    whole = all(case["verdict"] != "INTEGRITY" for case in decision.get("cases", []))
    changed = [f"- {problem}" for problem in problems if problem.startswith("fingerprint: ")]
    return changed if only and whole else []


def _created_anew(run: Run, place: Place, moved: Path, files: Sequence[str]) -> tuple[int, str]:
    """The first run as the baseline of its environment in `moved`, if the second one passes every
    case against it: then both agree. The code, and what the gates said."""
    fresh = place.output / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    gates = [[files[0], "--baseline", str(fresh), "--update"], [files[1], "--baseline", str(fresh)]]
    told = ["--json", str(place.output / _DECISION)]
    log = ""
    for words in gates:
        code, log = run([*place.ratchet, "gate", *words, *told], place.environment)
        if code:
            return code if code != _INCONCLUSIVE else _NOT_COMPARABLE, log
    if any(case["verdict"] != "PASS" for case in _decision(place)["cases"]):
        return _NOT_COMPARABLE, log
    shutil.copytree(fresh, moved, dirs_exist_ok=True)
    return 0, log


def _decision(place: Place) -> dict[str, Any]:
    """What the last gate decided; empty when it could not."""
    path = place.output / _DECISION
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def static(run: Run, place: Place) -> int:
    """Build with CUDA from the package index, and compare the machine code."""
    code, log = run([*place.pip, "-r", str(HARNESS / ".ci" / "cuda-toolkit.txt")], {})
    home = next(place.output.glob("venv/lib/python3*/site-packages/nvidia/cu*"), None)
    if code or home is None:
        _write_failure(place.output, "the CUDA toolkit could not be installed", log)
        return _BAD_INPUT
    code, log = run(
        [*place.pip, PACKAGE], {"FLASHMOE_CUDA": "on", "CUDA_HOME": str(home.resolve())}
    )
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
        "--json": _DECISION,
        "--junit": "junit.xml",
        "--profile-targets": _TARGETS,
    }
    options = [part for key, name in files.items() for part in (key, str(place.output / name))]
    if (past := place.baseline / HISTORY).exists():
        options += ["--history", str(past)]
    return [*place.ratchet, "gate", str(current), "--baseline", str(place.baseline), *options]


def _profile(run: Run, place: Place) -> None:
    """Adds to the report what Nsight Compute says of the cases that moved, if it may; beside the
    baseline's commit, where that is here and builds."""
    targets = place.output / _TARGETS
    if not targets.exists() or not targets.read_text(encoding="utf-8").strip():
        return
    report = ["--report", str(place.output / REPORT)]
    profile = [*place.ratchet, "profile", "--targets", str(targets), *report]
    profile += ["--head", "HEAD", *place.builds]
    commit = _decision(place).get("commits", {}).get("baseline", "")
    if re.fullmatch(r"[0-9a-f]{40}", commit):
        absent, _ = run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], {})
        if not absent:
            code, _ = run([*profile, "--base", commit], place.environment)
            if code != _BAD_INPUT:
                return
    run(profile, place.environment)


def _ready(run: Run, place: Place) -> int:
    """Installs what measures, with the baselines' versions, and builds what is measured. Where the
    latter does not build, 1; the report tells what failed."""
    for wanted in (["-r", str(HARNESS / REQUIREMENTS)], ["--no-build-isolation", PACKAGE]):
        code, log = run([*place.pip, *wanted], {"FLASHMOE_CUDA": "off"})
        if code:
            _write_failure(place.output, "what measures could not be installed", log)
            return _BAD_INPUT
    build = [*place.ratchet, "bench", "--build", "HEAD", *place.builds, "--build-only", "--debug"]
    code, log = run(build, place.environment)
    if code:
        _write_failure(place.output, "the build failed", log)
    return code


def _price(price: float | None) -> list[str]:
    return ["--price-per-hour", f"{price:g}"] if price else []


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a compiler may write what the locale lacks
    place = Place(arguments.baseline.resolve(), arguments.output.resolve())
    place.output.mkdir(parents=True, exist_ok=True)
    run = running_in(place.output)
    actions = {
        "gate": lambda: gate(run, place, arguments.suite, arguments.price_per_hour),
        "baseline": lambda: baseline(run, place, arguments.suite),
        "static": lambda: static(run, place),
    }
    code = prepare(run, place) or actions[arguments.action]()
    summary, report = os.environ.get("GITHUB_STEP_SUMMARY"), place.output / REPORT
    if summary and report.exists():
        with open(summary, "a", encoding="utf-8") as opened:
            opened.write(report.read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    sys.exit(main())
