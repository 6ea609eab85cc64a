"""The command line end to end, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ratchet_synthetic as synthetic

from flashmoe.ratchet import cli
from flashmoe.ratchet.commands import common
from flashmoe.ratchet.results.files import check_writable, load, save
from flashmoe.ratchet.results.values import Results, slowed

# The exit codes that each command's help documents.
CODES = {
    "bench": "012",
    "gate": "01234",
    "ab": "01234",
    "static": "0124",
    "selftest": "01234",
    "trend": "02",
    "profile": "023",
    "sota": "02",
}
CASES = ("fwd-b1-h2-s64-d16-float32", "fwd-b1-h2-s96-d32-float32-causal")


def ratchet(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashmoe.ratchet", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two tiny cases were measured for real."""
    folder = tmp_path_factory.mktemp("measured")
    options = ["--device", "cpu", "--rounds", "3", "--warmup", "1", "--processes", "2"]
    done = ratchet(folder, "bench", "--case", *CASES, *options)
    assert done.returncode == 0, done.stderr
    for name in CASES:
        assert name in done.stdout
    assert "speedup" in done.stdout
    assert "speedup" not in done.stderr
    return folder


def test_bench_writes_everything(measured: Path) -> None:
    path = measured / "results" / "current.json"
    results, raw = load(path), json.loads(path.read_text())
    assert [case.name for case in results.cases] == list(CASES)
    assert results.command == (
        f"python -m flashmoe.ratchet bench --case {' '.join(CASES)} "
        "--device cpu --rounds 3 --warmup 1 --processes 2"
    )
    assert results.fingerprint.device
    assert results.duration > 0
    assert len(results.run) == 32
    for case, data in zip(results.cases, raw["cases"], strict=True):
        assert [len(process) for process in case.ours.samples] == [3, 3]
        assert data["ours"]["summary"]["efficiency"] > 0
        assert len(data["speedup"]) == 3
    assert str(measured) not in path.read_text()


def steady(measured: Path, folder: Path, seed: int = 0) -> Results:
    """The measured run with its noise taken out, so that its verdicts are certain."""
    run = load(measured / "results" / "current.json")
    quiet = [synthetic.case(case.name, processes=3, seed=seed) for case in run.cases]
    cases = [
        replace(case, ours=calm.ours, sdpa=calm.sdpa)
        for case, calm in zip(run.cases, quiet, strict=True)
    ]
    steady_run = replace(run, cases=tuple(cases))
    save(steady_run, folder / "current.json")
    return steady_run


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """In this process: starting another costs seconds."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("threads", "factor", "options", "code"),
    [
        (0, 1.05, "", 1),
        (2, 1.05, "", 0),
        (2, 1.10, "", 1),
        (0, 1.05, "--threshold-fail -8", 0),
        (2, 1.05, "--threshold-fail -3", 1),
        (2, 1.05, "--threshold fwd-*=-3", 1),
    ],
)
def test_the_thresholds_are_those_of_the_results_device(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    threads: int,
    factor: float,
    options: str,
    code: int,
) -> None:
    run = synthetic.results()
    run = replace(run, fingerprint=replace(run.fingerprint, threads=threads))
    paths = [tmp_path / "current.json", tmp_path / "baseline.json"]
    save(slowed(run, synthetic.NAMES[0], factor), paths[0])
    save(run, paths[1])
    report = tmp_path / "report.md"
    gate = ["gate", paths[0], "--baseline", paths[1], "--report", report, *options.split()]
    assert call(capsys, *gate)[0] == code
    fail = "3" if threads == 0 else "8"
    if not options:
        assert f"one of {fail} % is not excluded" in report.read_text()


def test_gate_passes_fails_and_refuses(
    measured: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = steady(measured, tmp_path)
    monkeypatch.chdir(tmp_path)
    gate = ["gate", "--baseline", "baseline.json", "--report", "out/report.md"]
    gate += ["--profile-targets", "out/targets.txt"]

    assert call(capsys, *gate, "current.json") == (
        2,
        "",
        "flashmoe.ratchet: error: there is no baseline baseline.json; "
        "the same command with --update makes it\n",
    )
    code, out, _ = call(capsys, *gate, "current.json", "--update")
    assert code == 0
    assert "created baseline baseline.json with 2 cases" in out

    code, out, _ = call(capsys, *gate, "current.json")
    assert code == 4
    assert "both are the same run" in out
    save(replace(run, run="1"), Path("current.json"))
    assert call(capsys, *gate, "current.json")[0] == 0
    assert Path("out/targets.txt").read_text() == ""

    save(slowed(run, CASES[0], 1.1), Path("slower.json"))
    before = Path("baseline.json").read_bytes()
    code, out, _ = call(capsys, *gate, "slower.json", "--update")
    assert code == 1
    assert "baseline baseline.json stays" in out
    assert Path("baseline.json").read_bytes() == before
    assert Path("out/targets.txt").read_text() == f"{CASES[0]}\n"
    assert f"`{CASES[0]}` | 🔴 FAIL" in Path("out/report.md").read_text()

    save(replace(run, run="2", cases=run.cases[1:]), Path("fewer.json"))
    code, out, _ = call(capsys, *gate, "fewer.json", "--update")
    assert code == 4
    assert f"{CASES[0]}: missing from the current run" in out
    assert Path("baseline.json").read_bytes() == before

    save(slowed(run, CASES[1], 0.8), Path("faster.json"))
    code, out, _ = call(capsys, *gate, "faster.json", "--update")
    assert code == 0
    assert f"1 cases improved ({CASES[1]}); bench once more and pass that file as --conf" in out
    code, _, err = call(capsys, *gate, "faster.json", "--update", "--confirm", "faster.json")
    assert code == 2
    assert "a run cannot confirm itself" in err
    assert Path("baseline.json").read_bytes() == before

    save(slowed(steady(measured, tmp_path, 9), CASES[1], 0.81), Path("again.json"))
    code, out, _ = call(capsys, *gate, "faster.json", "--update", "--confirm", "again.json")
    assert code == 0
    assert "1 of 2 cases moved forward" in out
    assert f"{CASES[1]}: speedup over SDPA +23.5 %" in out
    assert "confirmed after +25.0 %" in out
    save(replace(run, run="1"), Path("current.json"))
    assert call(capsys, *gate, "current.json")[0] == 1
    assert call(capsys, *gate, "again.json", "--update")[0] == 4


def test_exit_codes_reach_the_shell(measured: Path, tmp_path: Path) -> None:
    run = steady(measured, tmp_path)
    save(slowed(run, CASES[0], 1.1), tmp_path / "slower.json")
    slower = ratchet(tmp_path, "gate", "slower.json", "--baseline", "current.json")
    assert slower.returncode == 1
    assert "1 FAIL, 1 PASS" in slower.stdout


@pytest.mark.parametrize("damaged", ["current", "baseline"])
def test_damaged_files_are_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("current", "baseline")}
    for path in paths.values():
        save(synthetic.results(), path)
    paths[damaged].write_text(paths[damaged].read_text()[:1000])
    before = paths[damaged].read_bytes()
    for extra in ([], ["--update"]):
        code, out, err = call(
            capsys, "gate", paths["current"], "--baseline", paths["baseline"], *extra
        )
        assert (code, out) == (2, "")
        assert err.startswith(f"flashmoe.ratchet: error: {paths[damaged]} is damaged: ")
        assert err.count("\n") == 1
        assert paths[damaged].read_bytes() == before


def test_a_folder_of_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(synthetic.results(), tmp_path / "current.json")
    gate = ("gate", tmp_path / "current.json", "--baseline", tmp_path / "baselines")
    code, _, err = call(capsys, *gate)
    assert code == 2
    assert f"there is no baseline {tmp_path / 'baselines' / 'some-gpu.json'}" in err
    assert call(capsys, *gate, "--update")[0] == 0
    assert (tmp_path / "baselines" / "some-gpu.json").exists()
    save(synthetic.results(seed=9), tmp_path / "current.json")
    assert call(capsys, *gate)[0] == 0


@pytest.mark.parametrize(
    "command",
    [
        "bench --output FILE",
        "gate current.json --baseline current.json --report FILE",
        "gate current.json --baseline current.json --html FILE",
        "gate current.json --baseline current.json --json FILE",
        "gate current.json --baseline current.json --junit FILE",
        "gate current.json --baseline current.json --profile-targets FILE",
        "ab --base HEAD --output FILE",
        "ab --base HEAD --report FILE",
        "ab --base HEAD --profile-targets FILE",
        "static --extension current.json --report FILE",
        "static --extension current.json --baseline FILE --update",
        "profile --case fwd-b1-h1-s16-d16-float32 --report FILE",
        "trend --history FILE --append current.json",
        "trend --history current.json --html FILE",
        "trend --history current.json --svg FILE",
        "sota --output FILE",
    ],
)
@pytest.mark.parametrize("place", ["current.json/below.json", "folder"])
def test_what_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    place: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("current.json").write_text("", encoding="utf-8")
    Path("folder", "base.json").mkdir(parents=True)
    words = command.replace("FILE", place).split()
    monkeypatch.setattr(cli.command(words[0]), "run", lambda *_: pytest.fail("it runs"))
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"flashmoe.ratchet: error: cannot write {place}")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "current.json"]


def test_a_check_of_a_place_leaves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    check_writable(path)
    assert list(path.parent.iterdir()) == []
    path.write_text("before", encoding="utf-8")
    check_writable(path)
    assert path.read_text(encoding="utf-8") == "before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["bench", "--case", "nonsense"], "case must look like"),
        (["bench", "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["bench", "--device", "cuda:99"], "got 'cuda:99'"),
        (["gate", "absent.json", "--baseline", "x"], "cannot read absent.json: No such file or"),
        (["selftest", "--device", "cpu", "--threshold-fail", "3"], "threshold-fail"),
        (["selftest", "--device", "cpu", "--threshold", "a"], "threshold must look"),
        (["selftest", "--device", "cpu", "--threshold", "x=-3"], "'x' names no case; there are"),
        (["ab", "--base", "a", "--device", "cpu", "--threshold", "x=-3"], "'x' names no case"),
        (["gate", "absent.json", "--baseline", "x", "--confirm", "y"], "--confirm goes with --up"),
    ],
)
def test_bad_usage_is_2_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("flashmoe.ratchet: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "bench", "--rounds", "0", "--debug")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.endswith("flashmoe.ratchet: error: rounds must be at least 1, got 0\n")


def test_what_nobody_expected_is_no_regression(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python itself would exit with 1."""
    monkeypatch.setattr(common, "device", lambda name: 1 // 0)
    code, out, err = call(capsys, "bench")
    assert (code, out) == (2, "")
    assert err == (
        "flashmoe.ratchet: error: unexpected ZeroDivisionError: integer division or modulo by "
        "zero; --debug shows where\n"
    )
    code, _, err = call(capsys, "bench", "--debug")
    assert code == 2
    assert "in <lambda>" in err
    monkeypatch.setattr(cli, "command", lambda name: 1 // 0)  # as one that cannot be imported
    assert call(capsys, "bench")[0] == 2


# As `python -m flashmoe.ratchet --help` where `BROKEN` has been done.
WITHOUT = """
import runpy, sys
BROKEN
sys.argv[1:] = ["--help"]
runpy.run_module("flashmoe.ratchet", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            "sys.modules.update(scipy=None, rich=None, pynvml=None)",
            "not installed: nvidia-ml-py, rich, scipy; pip install nvidia-ml-py rich scipy",
        ),
        (
            "sys.modules['rich.console'] = None",
            "it cannot be imported: ModuleNotFoundError: import of rich.console halted; None in "
            "sys.modules",
        ),
    ],
)
def test_packages_that_are_missing_are_named(broken: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.replace("BROKEN", broken)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"flashmoe.ratchet: error: {message}\n"


@pytest.mark.parametrize("arguments", [[], ["measure"], ["bench", "--suite", "huge"], ["gate"]])
def test_usage_errors_are_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(("command", "codes"), [(name, CODES[name]) for name in cli.COMMANDS])
def test_help_documents_exit_codes(
    command: str, codes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    told = " ".join(capsys.readouterr().out.partition("Exit codes:")[2].split())
    for code in codes:
        assert f" {code} " in f" {told}"


def test_the_stored_command_names_no_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["bench", "--output", str(tmp_path / "a" / "b.json"), "--case", "x y"]
    assert common.command(argv) == (
        "python -m flashmoe.ratchet bench --output a/b.json --case 'x y'"
    )
    assert "/" not in common.command(["bench", "--output", "/elsewhere/c.json"])
