"""Two commits built apart and compared; and the gate's proof of itself."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import ratchet_synthetic as synthetic
import torch
from test_architecture import ROOT, imported, modules, unit_of

from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.timing import Measurement
from flashmoe.planning.plan import Plan
from flashmoe.ratchet import cli
from flashmoe.ratchet.commands import ab, common, selftest
from flashmoe.ratchet.commands import bench as command_bench
from flashmoe.ratchet.commands.selftest import ending
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate.decide import decide
from flashmoe.ratchet.gate.thresholds import DEFAULTS
from flashmoe.ratchet.measuring import builds, slow, worse
from flashmoe.ratchet.measuring.suite import SUITES, parse
from flashmoe.ratchet.results.files import load
from flashmoe.ratchet.results.values import Results, slowed
from flashmoe.tiles import Tile

NAME, OTHER, THIRD = synthetic.NAMES
CPU = torch.device("cpu")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of one file, and a change that is not committed."""
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "someone@example.org")
    run = lambda *words: subprocess.run(["git", *words], check=True, capture_output=True)  # noqa: E731
    run("init", "-b", "main")
    for text in ("one", "two"):
        (folder / "file").write_text(text)
        run("add", "file")
        run("commit", "-m", text)
    (folder / "file").write_text("three")
    return folder


def test_the_working_tree_is_built_without_touching_it(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[str] = []

    def install(source: Path, site: Path, debug: bool) -> None:
        installed.append((source / "file").read_text())
        (site / "flashmoe").mkdir(parents=True)

    monkeypatch.setattr(builds, "_install", install)
    folder = tmp_path / "builds"
    commits = [builds.resolve("main~1"), builds.resolve("main"), builds.working_tree()]
    assert len(set(commits)) == 3
    sites = [builds.build(commit, folder) for commit in commits]
    assert installed == ["one", "two", "three"]
    assert (repository / "file").read_text() == "three"
    assert builds.build(commits[0], folder) == sites[0]
    assert len(installed) == 3  # built once
    for site in sites:
        # The harness is this one, whatever the commit's own was, and touches nothing of it.
        for name in (
            "ratchet/measuring/worker.py",
            "ratchet/commands/gate.py",
            "measure/timing.py",
        ):
            text = (site / "flashmoe_harness" / name).read_text()
            assert "flashmoe_harness." in text or name == "measure/timing.py"
            assert not re.search(r"\bflashmoe\.(ratchet|measure|spec|machine)\b", text)
        assert not list((site / "flashmoe").iterdir())
        assert not (site.parent / "source").exists()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "libraries", str(tmp_path)]))
    source = builds.source("base", sites[0], cuda=False)
    assert source.folder == str(sites[0])
    # Workers start in another folder, and need what this process was given.
    others = [str(repository / "libraries"), str(tmp_path)]
    assert source.environment["PYTHONPATH"].split(os.pathsep) == [str(sites[0]), *others]
    assert sites[0].parent in Path(source.environment["FLASHMOE_CACHE_DIR"]).parents


def test_a_build_may_be_what_is_installed(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has nothing but builds."""
    monkeypatch.setattr(
        builds, "_install", lambda source, site, debug: (site / "flashmoe").mkdir(parents=True)
    )
    name = builds.resolve("main")
    package = builds.build(name, tmp_path) / "flashmoe"
    before = {path: path.read_bytes() for path in package.rglob("*.py")}
    monkeypatch.setattr(builds, "_PACKAGE", package)
    monkeypatch.setattr(builds, "__file__", str(package / "ratchet" / "measuring" / "builds.py"))
    assert builds.build(name, tmp_path) == package.parent
    assert {path: path.read_bytes() for path in package.rglob("*.py")} == before


@pytest.mark.parametrize("ref", ["nowhere", "--help", "0" * 40])
def test_a_commit_that_is_none_is_bad_input(
    repository: Path, capsys: pytest.CaptureFixture[str], ref: str
) -> None:
    assert cli.main(["ab", "--device", "cpu", f"--base={ref}"]) == 2
    error = f"error: there is no commit {ref!r} here (git rev-parse"
    assert error in capsys.readouterr().err


def test_other_tools_make_another_build(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [builds.resolve("main")]
    for change in (
        lambda: monkeypatch.setattr(torch, "__version__", "9.9.0"),
        lambda: monkeypatch.setattr(builds.platform, "python_version", lambda: "3.99.0"),
        lambda: monkeypatch.setattr(builds, "_nvcc", lambda: "release 99.0, V99.0.1"),
        lambda: monkeypatch.setenv("FLASHMOE_CUDA", "off"),
        lambda: monkeypatch.setenv("FLASHMOE_CUDA_ARCHS", "90"),
    ):
        change()
        names.append(builds.resolve("main"))
    assert len(set(names)) == len(names)
    assert {builds.commit_of(name) for name in names} == {builds.commit_of(names[0])}
    monkeypatch.setenv("FLASHMOE_CUDA_KIND", "")  # as good as not set
    assert builds.resolve("main") == names[-1]
    with pytest.raises(UserError, match=r"there is no build .*, and the tools here would make"):
        builds.build(names[0], tmp_path)


def test_a_build_without_cuda_kernels_is_not_measured_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    no_builds: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(common, "device", lambda name: "cuda")
    monkeypatch.setattr(ab, "bench", lambda *_, **__: pytest.fail("it measures"))
    for name, version in (("main", "13.0"), ("tree", "")):
        package = tmp_path / name / "site" / "flashmoe"
        package.mkdir(parents=True)
        (package / "_C.abi3.so").write_bytes(b'\x00{"cuda_version": "%s"}' % version.encode())
    assert cli.main(["ab", "--base", "main"]) == 2
    assert "tree was built without CUDA kernels: build it" in capsys.readouterr().err


def test_a_build_that_fails_tells_why(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(builds.BuildError, match="does not build: "):
        builds.build(builds.resolve("main"), tmp_path / "builds")


class Fake:
    """Pretends to build and to measure: `runs` are what bench gives, in the order of sources."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, *runs: Results) -> None:
        self.sources: Sequence[Any] = ()

        def bench(*_: Any, sources: Sequence[Any], **__: Any) -> tuple[Results, ...]:
            self.sources = sources
            return runs

        monkeypatch.setattr(module, "bench", bench)


@pytest.fixture
def no_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builds, "resolve", lambda ref: ref)
    monkeypatch.setattr(builds, "working_tree", lambda: "tree")
    monkeypatch.setattr(builds, "build", lambda commit, folder, debug: tmp_path / commit / "site")


@pytest.mark.parametrize(
    ("factor", "options", "code"),
    [(1.0, "", 0), (1.05, "", 0), (1.10, "", 1), (1.05, "--threshold-fail -3", 1)],
)
def test_ab_decides_as_the_gate_does(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    no_builds: None,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    options: str,
    code: int,
) -> None:
    base = synthetic.results(noise=0.002, processes=8)
    head = slowed(synthetic.results(noise=0.002, processes=8, seed=30), NAME, factor)
    fake = Fake(monkeypatch, ab, base, head)
    command = ["ab", "--base", "main", "--device", "cpu", "--output", str(tmp_path / "out")]
    targets = ["--profile-targets", str(tmp_path / "targets.txt")]
    targets += ["--report", str(tmp_path / "report.md")]
    assert cli.main([*command, *targets, "--price-per-hour", "3.6", *options.split()]) == code
    assert [source.folder for source in fake.sources] == [
        str(tmp_path / name / "site") for name in ("main", "tree")
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"base.json", "head.json"}
    assert (tmp_path / "targets.txt").read_text() == (f"{NAME}\n" if code else "")
    # Of both sides, 12.5 s each.
    cost = "took 25 s of the machine: 0.0250 at 3.6 an hour"
    assert cost in capsys.readouterr().out
    assert cost in (tmp_path / "report.md").read_text()


def test_what_measures_needs_nothing_that_an_older_build_may_lack() -> None:
    """But for the package's own exports, and the hash of its kernels."""
    known = dict(modules(ROOT))
    waiting, seen = (
        ["flashmoe.ratchet.measuring.worker", "flashmoe.ratchet.measuring.profiled"],
        set(),
    )
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for _, name in imported(module, known[module]):
            own = next((x for x in (name, name.rpartition(".")[0]) if x in known), "flashmoe")
            if own == "flashmoe":
                assert name == "flashmoe", f"{module} imports {name}"
            elif unit_of(own) in builds.ROOMS:
                waiting.append(own)
            else:
                assert (module, name) == (
                    "flashmoe.measure.fingerprint",
                    "flashmoe._extension.kernel_hash",
                )
    assert len(seen) > 10
    assert "flashmoe.measure.timing" in seen


def test_builds_are_taken_along(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    repository: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Built here, measured where there is neither a compiler nor a repository."""
    monkeypatch.setattr(
        builds, "_install", lambda source, site, debug: (site / "flashmoe").mkdir(parents=True)
    )
    command = ["ab", "--device", "cpu", "--build-folder", str(tmp_path / "ab")]
    assert cli.main([*command, "--base", "main~1", "--head", "main", "--build-only"]) == 0
    told = capsys.readouterr().out.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builds, "_install", lambda *_: pytest.fail("it builds again"))
    base = synthetic.results(noise=0.002, processes=8)
    fake = Fake(monkeypatch, ab, base, synthetic.results(noise=0.002, processes=8, seed=30))
    assert cli.main([*command, *told]) == 0
    assert [Path(source.folder).parent.name for source in fake.sources] == told[1::2]


@pytest.mark.parametrize(("broken", "code"), [("main", 2), ("tree", 1)])
def test_a_head_that_does_not_build_fails_and_a_base_is_bad_input(
    monkeypatch: pytest.MonkeyPatch,
    no_builds: None,
    capsys: pytest.CaptureFixture[str],
    broken: str,
    code: int,
) -> None:
    def build(commit: str, folder: Path, debug: bool) -> Path:
        if commit == broken:
            raise builds.BuildError(f"{commit} does not build: error: x")
        return folder

    monkeypatch.setattr(builds, "build", build)
    assert cli.main(["ab", "--base", "main", "--device", "cpu"]) == code
    captured = capsys.readouterr()
    assert f"{broken} does not build: error: x" in captured.out + captured.err


def test_bench_measures_a_commits_build(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    no_builds: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit = "c" * 40
    build, output = f"{commit}-{'0' * 8}", tmp_path / "current.json"
    command = ["bench", "--device", "cpu", "--build", build, "--output", str(output)]
    monkeypatch.setattr(command_bench, "bench", lambda *_, **__: pytest.fail("it measures"))
    assert cli.main([*command, "--build-only"]) == 0
    assert capsys.readouterr().out == f"--build {build}\n"
    fake = Fake(monkeypatch, command_bench, replace(synthetic.results(), commit=commit))
    assert cli.main(command) == 0
    assert [source.folder for source in fake.sources] == [str(tmp_path / build / "site")]
    assert [source.commit for source in fake.sources] == [commit]
    assert load(output).commit == commit
    for wrong in (["--build-only"], ["--build", build, "--yardstick", "x"]):
        with contextlib.suppress(SystemExit):
            assert cli.main(["bench", "--device", "cpu", *wrong]) == 2

    def breaks(name: str, folder: Path, debug: bool) -> Path:
        raise builds.BuildError(f"{name} does not build: error: x")

    monkeypatch.setattr(builds, "build", breaks)
    assert cli.main(command) == 1
    assert "does not build: error: x" in capsys.readouterr().out


def outcome(same: Results, slow_run: Results, *expected: str) -> tuple[int, str]:
    base = synthetic.results(noise=0.002, processes=8)
    first, second = (decide(run, base, DEFAULTS["cuda"]) for run in (same, slow_run))
    return ending(first, second, expected)


def test_outcomes_of_a_selftest() -> None:
    same = synthetic.results(noise=0.002, processes=8, seed=30)
    slower = slowed(same, NAME, 1.06)
    assert outcome(same, slower, NAME)[0] == 0
    missed = outcome(same, same, NAME)
    assert missed == (1, f"the gate missed a slowdown: {NAME}")
    other = outcome(same, slowed(slower, OTHER, 1.06), NAME)
    assert other == (1, f"the gate raised a false alarm: {OTHER}")
    alarm = outcome(slowed(same, OTHER, 1.06), slower, NAME)
    assert alarm == (1, f"the gate raised a false alarm: {OTHER}")
    noisy = synthetic.results(noise=0.2, processes=8, seed=30)
    assert outcome(noisy, slower, NAME)[0] == 3
    unclear = outcome(same, slowed(noisy, NAME, 1.06), NAME)
    assert unclear[0] == 3
    assert f"{NAME} is inconclusive" in unclear[1]
    foreign = replace(same, fingerprint=replace(same.fingerprint, torch="2.14"))
    assert outcome(foreign, slower, NAME)[0] == 4


def test_the_selftest_slows_one_case_and_says_what_it_sees(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "worse_tile", lambda *_: None)
    runs = [synthetic.results(noise=0.002, processes=8, seed=s) for s in (0, 30, 60)]
    fake = Fake(monkeypatch, selftest, runs[0], runs[1], slowed(runs[2], NAME, 1.12))
    command = ["selftest", "--device", "cpu", "--case", NAME, THIRD]
    assert cli.main(command) == 0
    assert [source.job for source in fake.sources] == [
        {},
        {},
        {"slow": {NAME: 12.0}, "options": {}},
    ]
    out = capsys.readouterr().out
    assert f"selftest: the gate fails on {NAME}, and only there" in out
    assert "with 8 processes, a slowdown is seen 19 times of 20 from" in out
    assert cli.main([*command, "--slowdown", "0"]) == 2


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_selftest_slows_a_backward_and_more(kind: str) -> None:
    names = selftest._CASES[kind]
    assert set(names) <= set(SUITES["quick"][kind])
    slowed_kinds = {parse(name).kind for name in names[::2]}
    assert "backward" in slowed_kinds
    assert kind == "cpu" or "decode, paged" in slowed_kinds


def test_a_delay_takes_the_share_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(x * 0.25 for x in range(10**6))
    monkeypatch.setattr(slow.time, "perf_counter", lambda: next(clock))
    done: list[int] = []
    call = slow.delayed(lambda: done.append(1), CPU, 400.0)
    # Every look at the clock takes 0.25 s: the call 0.25 s, the delay four times that.
    done.clear()
    before = next(clock)
    call()
    assert done == [1]
    assert 1.0 <= next(clock) - before <= 1.75
    assert slow.delayed(call, CPU, 0) is call


def test_a_worse_tile_is_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile that is timed runs; what it takes is made up, for this machine may be busy."""
    ran: list[str] = []

    def measure(calls: Any, device: torch.device, *, rounds: int, **_: Any) -> Any:
        for call in calls.values():
            call()
        ran.extend(calls)
        return {
            name: Measurement("ok", (1.0 + number / 10,) * rounds)
            for number, name in enumerate(calls)
        }

    monkeypatch.setattr(worse, "measure", measure)
    case = parse("fwd-b1-h2-s256-d64-float32")
    found = worse.worse_tile(case, CPU, 1.0)
    assert found is not None
    assert (found.tile, found.factor) == (ran[1], pytest.approx(1.1))
    assert Tile.parse(found.tile) in BACKENDS["cpu"].tiles(case.problem, arch(CPU))
    assert len(ran) > 5


def test_a_tile_that_only_seems_slower_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest factor is the unsteady tile's, whose interval reaches below what is asked."""

    def measure(calls: Any, device: torch.device, *, rounds: int, **_: Any) -> Any:
        seconds = ([1.0], [0.9, 1.25, 1.3], [1.4])
        times = dict(zip_longest(calls, seconds, fillvalue=[9.0]))
        return {
            name: Measurement("ok", tuple(x[i % len(x)] for i in range(rounds)))
            for name, x in times.items()
        }

    monkeypatch.setattr(worse, "measure", measure)
    found = worse.worse_tile(parse("fwd-b1-h2-s256-d64-float32"), CPU, 1.2)
    assert found is not None
    assert found.factor == pytest.approx(1.4)


def test_no_tile_is_compiled_for_a_selftest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Hopper kernel's thousands only those that are there, and not all of those."""
    case = parse("fwd-b1-h2-s256-d64-float32")
    backend = BACKENDS["cpu"]
    planned, other, *_ = backend.tiles(case.problem, arch(CPU))
    timed: list[str] = []

    def measure(calls: Any, device: torch.device, *, rounds: int, **_: Any) -> Any:
        timed[:] = calls
        return {name: Measurement("ok", (1.0,) * rounds) for name in calls}

    monkeypatch.setattr(worse, "measure", measure)
    monkeypatch.setattr(backend, "ready", lambda tile, *_: tile == other)
    plan = Plan("cpu", planned, "heuristic")
    monkeypatch.setattr(worse, "make_plan", lambda *_, **__: plan)
    assert worse.worse_tile(case, CPU, 1.0) is None
    assert timed == ["", str(other)]
    monkeypatch.setattr(backend, "ready", lambda *_: True)
    monkeypatch.setattr(worse, "_MOST_TILES", 1)
    worse.worse_tile(case, CPU, 1.0)
    assert len(timed) == 2
