"""Profiles by Nsight Compute, from its answers written down."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from flashmoe.ratchet import cli
from flashmoe.ratchet.machine_code import ncu
from flashmoe.ratchet.machine_code.ncu import CannotProfile, differences, parse
from flashmoe.ratchet.measuring.processes import Source

CASE = "fwd-b1-h2-s64-d64-bfloat16"
TIME, TENSOR = ncu.METRICS["time (us)"], ncu.METRICS["tensor pipes (%)"]
BYTES, SHARED = ncu.METRICS["memory (MB)"], ncu.METRICS["shared memory (KB)"]


def answer(*kernels: tuple[str, str, str, str, str]) -> str:
    """ncu's raw page: its own messages, names, units, and a row a kernel."""
    rows = [
        ("ID", "Kernel Name", TIME, TENSOR, BYTES, SHARED),
        ("", "", "usecond", "%", "Mbyte", "Kbyte/block"),
        *((str(i), *row) for i, row in enumerate(kernels)),
    ]
    table = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    return f"==PROF== Connected to process 1\nsomething else\n{table}\n"


BASE = answer(("fwd_kernel<64>(Params)", "1,000.0", "80.0", "12.5", "64"))
HEAD = answer(
    ("fwd_kernel<64>(Params)", "1100.0", "60.0", "12.6", "64"), ("add()", "100", "0", "1", "0")
)


def test_values_are_of_the_whole_call() -> None:
    base, head = parse(BASE), parse(HEAD)
    assert base.kernels == ("fwd_kernel<64>",)
    assert base.values == pytest.approx(
        {"time (us)": 1000, "tensor pipes (%)": 80, "memory (MB)": 12.5, "shared memory (KB)": 64}
    )
    assert head.values["time (us)"] == pytest.approx(1200)
    assert head.values["memory (MB)"] == pytest.approx(13.6)
    assert head.values["tensor pipes (%)"] == pytest.approx(60 * 11 / 12)


def test_units_are_ncus_to_choose() -> None:
    text = BASE.replace("usecond", "msecond").replace("Mbyte", "Gbyte")
    assert parse(text).values["time (us)"] == pytest.approx(1e6)
    assert parse(text).values["memory (MB)"] == pytest.approx(12500)


def test_what_differs_comes_after_time_largest_first() -> None:
    found = differences(parse(BASE), parse(HEAD))
    assert [label for label, _, _ in found] == [
        "time (us)",
        "tensor pipes (%)",
        "shared memory (KB)",
        "memory (MB)",
    ]


@pytest.mark.parametrize("text", ["", "==PROF== nothing", '"ID","Kernel Name"\n"",""\n'])
def test_no_kernel_is_no_profile(text: str) -> None:
    with pytest.raises(CannotProfile, match="no kernel"):
        parse(text)


def pretend(monkeypatch: pytest.MonkeyPatch, code: int, *texts: str) -> list[list[str]]:
    """ncu that answers with `texts`, one a call."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, code, texts[(len(calls) - 1) % len(texts)], "")

    monkeypatch.setattr(ncu.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(ncu, "captured", run)
    return calls


def test_the_report_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = pretend(monkeypatch, 0, BASE)
    targets, report = tmp_path / "profile_targets.txt", tmp_path / "report.md"
    targets.write_text(f"{CASE}\n{CASE}\n")
    report.write_text("### failed\n")
    assert cli.main(["profile", "--targets", str(targets), "--report", str(report)]) == 0
    assert len(calls) == 1
    assert calls[0][1:3] == ["--clock-control", "none"]
    assert calls[0][-1] == CASE
    text = report.read_text()
    assert text.startswith("### failed\n\n### Profiles")
    assert "| tensor pipes (%) | 80 |" in text


def test_two_commits_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 0, BASE, HEAD)
    builds = "flashmoe.ratchet.commands.profile.builds"
    monkeypatch.setattr(f"{builds}.resolve", lambda ref: f"commit-{ref}")
    monkeypatch.setattr(f"{builds}.compiler", lambda extension: "13.0")
    for ref in ("main", "mine"):
        package = tmp_path / f"commit-{ref}" / "site" / "flashmoe"
        package.mkdir(parents=True)
        (package / "_C.abi3.so").touch()
    monkeypatch.setattr(f"{builds}.build", lambda name, folder, debug: tmp_path / name / "site")
    assert cli.main(["profile", "--case", CASE, "--base", "main", "--head", "mine"]) == 0
    out = capsys.readouterr().out
    assert "| time (us) | 1000 | 1200 | +20 % |" in out
    assert "Kernels: `fwd_kernel<64>`, `add`; in the base `fwd_kernel<64>`\n" in out
    # Alone, a build is what is profiled, not what is installed.
    sources: list[Source] = []
    monkeypatch.setattr(
        "flashmoe.ratchet.commands.profile.profile",
        lambda case, source: sources.append(source) or ncu.parse(BASE),
    )
    assert cli.main(["profile", "--case", CASE, "--head", "mine"]) == 0
    assert [source.folder for source in sources] == [str(tmp_path / "commit-mine" / "site")]


@pytest.mark.parametrize(
    ("code", "text", "told"),
    [
        (1, "==ERROR== ERR_NVGPUCTRPERM", "NVreg_RestrictProfilingToAdminUsers=0"),
        (9, "==ERROR== odd", "ncu failed with exit code 9: ==ERROR== odd"),
    ],
)
def test_without_counters_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    text: str,
    told: str,
) -> None:
    pretend(monkeypatch, code, text)
    assert cli.main(["profile", "--case", CASE]) == 3
    out = capsys.readouterr().out
    assert "The gate's verdict stands" in out
    assert told in out


def test_a_case_without_a_profile_takes_none_from_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 0, BASE, "==PROF== nothing", HEAD)
    others = [CASE.replace("s64", size) for size in ("s96", "s128")]
    assert cli.main(["profile", "--case", CASE, *others]) == 3
    out = capsys.readouterr().out
    assert out.startswith("### Profiles\n")
    assert out.count("<details>") == 2
    assert f"The gate's verdict stands.\n\nNo profile of {others[0]}: ncu profiled no kernel" in out


def test_a_metric_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[command.index("--metrics") + 1])
        missing = [m for m in (BYTES, SHARED) if m in asked[-1]]
        told = "".join(f"==ERROR== Failed to find metric {m}\n" for m in missing[:1])
        return subprocess.CompletedProcess(command, int(bool(missing)), told or BASE, "")

    monkeypatch.setattr(ncu.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(ncu, "captured", run)
    assert ncu.profile(CASE, Source("this")).kernels == ("fwd_kernel<64>",)
    assert len(asked) == 3
    assert asked[-1].split(",") == [m for m in ncu.METRICS.values() if m not in (BYTES, SHARED)]


def test_without_ncu_it_says_where_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ncu.shutil, "which", lambda name: None)
    assert cli.main(["profile", "--case", CASE]) == 3
    assert "ncu was not found" in capsys.readouterr().out


def test_nothing_to_profile_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "targets.txt").write_text("")
    assert cli.main(["profile", "--targets", str(tmp_path / "targets.txt")]) == 0
    assert cli.main(["profile", "--targets", str(tmp_path / "absent.txt")]) == 2
    assert cli.main(["profile", "--case", "nonsense"]) == 2
