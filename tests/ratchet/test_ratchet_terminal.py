"""A command's files and exit code do not depend on who reads what it shows, or in which locale."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ratchet_synthetic as synthetic

from flashmoe.ratchet import cli
from flashmoe.ratchet.commands import common
from flashmoe.ratchet.measuring import processes
from flashmoe.ratchet.report import console
from flashmoe.ratchet.results.files import save
from flashmoe.ratchet.results.values import Results, Series, slowed

NAME = synthetic.NAMES[0]
# A traceback's text, as a failed case's reason has it: markup of rich's, and no ASCII.
WORDS = "RuntimeError: [/path/to/kernel] took 5 µs [bold] :smile: 🔴"


def failed(reason: str) -> Results:
    run = synthetic.results(seed=9)
    broken = replace(run.cases[0], ours=Series("failed", (), reason))
    return replace(run, cases=(broken, *run.cases[1:]))


@pytest.fixture
def gate(tmp_path: Path) -> Callable[[Results], list[str]]:
    """The arguments that gate `current`, with its report in tmp_path/report.md."""

    def command(current: Results) -> list[str]:
        paths = {name: tmp_path / f"{name}.json" for name in ("current", "baseline")}
        save(current, paths["current"])
        save(synthetic.results(), paths["baseline"])
        report = ["--report", str(tmp_path / "report.md")]
        return ["gate", str(paths["current"]), "--baseline", str(paths["baseline"]), *report]

    return command


def pipe_without_a_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("opened", [pipe_without_a_reader, full_disk])
@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.2, 1)])
def test_what_nobody_reads_changes_no_code(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gate: Callable[[Results], list[str]],
    opened: Callable[[], int],
    factor: float,
    code: int,
) -> None:
    command = gate(slowed(synthetic.results(seed=9), NAME, factor))
    with os.fdopen(opened(), "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(command) == code
    assert NAME in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_closed_streams_change_no_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gate: Callable[[Results], list[str]]
) -> None:
    """Python has None for what was closed when it started."""
    command = gate(failed(WORDS))
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(command) == 1
    assert cli.main(["gate", "absent.json", "--baseline", "x"]) == 2
    assert (tmp_path / "report.md").exists()


def test_the_shell_gets_the_code(gate: Callable[[Results], list[str]]) -> None:
    """`gate … | head -1`, whose reader is gone before the first line comes."""
    command = [sys.executable, "-m", "flashmoe.ratchet", *gate(synthetic.results(seed=9))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, told) == (0, b"")


def test_a_reason_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gate: Callable[[Results], list[str]]
) -> None:
    assert cli.main(gate(failed(WORDS))) == 1
    assert set(WORDS.split()) <= set(capsys.readouterr().out.split())
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert WORDS in report.replace("\\", "")


def test_results_and_progress_show_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    common.stdout().print(console.results_table(failed(WORDS)))
    assert set(WORDS.split()) <= set(capsys.readouterr().out.split())
    with common.progress(40) as step:
        for _ in range(40):
            step(WORDS)
    told = capsys.readouterr().err
    # A log shows that it goes on, not each step.
    assert told.count(" of 40: ") == 10
    assert set(WORDS.split()) <= set(told.split())


def test_a_locale_without_utf8_ends_nothing(
    tmp_path: Path, gate: Callable[[Results], list[str]]
) -> None:
    more = ["--html", str(tmp_path / "report.html"), "--junit", str(tmp_path / "junit.xml")]
    command = [sys.executable, "-m", "flashmoe.ratchet", *gate(failed(WORDS)), *more]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"took 5 ?s" in done.stdout
    for name in ("report.md", "report.html", "junit.xml"):
        assert "took 5 µs" in (tmp_path / name).read_text(encoding="utf-8").replace("\\", "")


# In every process with this folder on its path: a worker interrupts who started it, as Ctrl-C does
# that reaches nobody else, and then says nothing.
INTERRUPTING = """
import os, signal, sys
if any(word.endswith(".measuring.worker") for word in sys.orig_argv):
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
"""


# Runs each of its arguments as a command line, and tells their exit codes.
COMMANDS = """
import sys
from flashmoe.ratchet import cli
print([cli.main(words.split()) for words in sys.argv[1:]])
"""


def test_an_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    """Not when the time is over that a worker may say nothing, which is longer than this waits."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING, encoding="utf-8")
    build = f"{'c' * 40}-{'0' * 8}"
    (tmp_path / "build/ab" / build / "site/flashmoe").mkdir(parents=True)
    (tmp_path / "build/ab" / build / "built").touch()
    commands = ["bench", f"ab --base {build} --head {build}", "selftest"]
    options = "--device cpu --case fwd-b1-h1-s16-d16-float32"
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *(f"{command} {options}" for command in commands)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        timeout=processes._SILENCE / 2,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[130, 130, 130]\n"), done.stderr
    assert "Traceback" not in done.stderr
