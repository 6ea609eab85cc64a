"""A pull request from end to end on one machine, with the workflows' own commands: an event goes
in; a report, a comment's body and an exit code come out."""

from __future__ import annotations

import io
import json
import shlex
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ratchet_synthetic as synthetic
from test_ratchet_github import FakeGitHub, event, pull
from test_ratchet_workflows import load as workflow

from flashmoe.ratchet import cli
from flashmoe.ratchet.ci import github, runner
from flashmoe.ratchet.results.files import load, save
from flashmoe.ratchet.results.values import Results, slowed

NAME = synthetic.NAMES[0]
ROOT = Path(__file__).resolve().parents[2]


def words_of(name: str, script: str) -> list[str]:
    """The arguments that a workflow gives to one of our scripts."""
    for job in workflow(name)["jobs"].values():
        for step in job["steps"]:
            words = shlex.split(step.get("run", ""))
            if called := [word for word in words if word.endswith(f"ratchet/ci/{script}")]:
                return words[words.index(called[0]) + 1 :]
    raise AssertionError(f"{name} does not call {script}")


def uploaded(folder: Path) -> bytes:
    """The artifact, packed as upload-artifact does from the paths the workflow names."""
    (upload,) = (
        step
        for step in workflow("gpu-ratchet")["jobs"]["gate"]["steps"]
        if "upload-artifact" in step.get("uses", "")
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        for pattern in upload["with"]["path"].split():
            for path in sorted(folder.glob(pattern)):
                opened.write(path, path.relative_to(folder / "results"))
    return packed.getvalue()


class Machine:
    """A GPU runner: venv and pip only pretend, each bench writes the next of `measured`, gate is
    the real one. `judges`: what was installed to measure and judge."""

    def __init__(self, *measured: Results, build: tuple[int, str] = (0, "")) -> None:
        self.measured, self.build = list(measured), build
        self.judges: list[str] = []

    def __call__(self, command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
        if "flashmoe.ratchet" not in command:
            self.judges += [command[-1]] if "install" in command else []
            return 0, ""
        words = list(command[command.index("flashmoe.ratchet") + 1 :])
        if "--build-only" in words:
            return self.build
        if words[0] == "bench" and "--yardstick" not in words:
            arguments = cli.parser().parse_args(words)
            assert arguments.build == "HEAD"
            save(self.measured.pop(0), arguments.output)
            return 0, ""
        return (0, "") if words[0] == "bench" else (cli.main(words), "")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    server = FakeGitHub(None)
    monkeypatch.setenv("GITHUB_API_URL", server.api)
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/flashmoe")
    monkeypatch.setenv("GH_TOKEN", "secret")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setenv("PRICE_PER_HOUR", "3.6")
    monkeypatch.chdir(tmp_path)
    yield server
    server.server.shutdown()
    server.server.server_close()


def gpu_job(monkeypatch: pytest.MonkeyPatch, folder: Path, machine: Machine) -> int:
    """The gate step of gpu-ratchet.yml, with the base branch's baseline checked out."""
    words = ["3.6" if w == "$PRICE_PER_HOUR" else w for w in words_of("gpu-ratchet", "runner.py")]
    baselines = folder / words[words.index("--baseline") + 1]
    save(synthetic.results(), baselines / "some-gpu.json")
    monkeypatch.setattr(runner, "running_in", lambda folder: machine)
    return runner.main(words)


def comment_job(folder: Path, owner: str) -> int:
    """The step of comment.yml, from the event of the run that ended."""
    words = words_of("comment", "github.py")
    path = str(event(folder, owner))
    return github.main([path if w == "$GITHUB_EVENT_PATH" else w for w in words])


@pytest.mark.parametrize("owner", ["someone", "forker"])
@pytest.mark.parametrize(
    ("factor", "code", "heading"),
    [
        (1.0, 0, "### ✅ flashmoe ratchet passed (3 PASS)"),
        (1.08, 1, "### 🔴 flashmoe ratchet failed: a kernel got slower or broke (1 FAIL, 2 PASS)"),
    ],
)
def test_a_pull_request(
    hub: FakeGitHub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    owner: str,
    factor: float,
    code: int,
    heading: str,
) -> None:
    measured = replace(slowed(synthetic.results(seed=40), NAME, factor), duration=50.0)
    machine = Machine(measured)
    assert gpu_job(monkeypatch, tmp_path, machine) == code
    # What judges is the checkout that the script lies in: the base's, whoever asks.
    assert machine.judges == [str(ROOT / runner.REQUIREMENTS), f"{ROOT}[tune]"]
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith(heading)
    assert "took 50 s of the machine: 0.0500 at 3.6 an hour" in summary
    assert (tmp_path / "results" / "profile_targets.txt").read_text() == (
        f"{NAME}\n" if code else ""
    )
    decision = json.loads((tmp_path / "results" / "decision.json").read_text())
    assert decision["exit_code"] == code
    assert decision["commits"] == {"current": measured.commit, "baseline": "c0ffee" * 6 + "c0ff"}

    hub.artifact, hub.pulls = uploaded(tmp_path), [pull(7, label=f"{owner}:faster")]
    assert comment_job(tmp_path, owner) == 0
    ((method, path, data),) = hub.sent
    assert (method, path) == ("POST", "/issues/7/comments")
    assert heading in data["body"]


@pytest.mark.parametrize("owner", ["someone", "forker"])
def test_a_pull_request_that_does_not_build(
    hub: FakeGitHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: str
) -> None:
    machine = Machine(build=(1, "fwd_sm90.cuh(7): error: @someone broke it\n"))
    assert gpu_job(monkeypatch, tmp_path, machine) == 1
    hub.artifact, hub.pulls = uploaded(tmp_path), [pull(7, label=f"{owner}:faster")]
    assert comment_job(tmp_path, owner) == 0
    text = hub.sent[0][2]["body"]
    assert "### 🔴 flashmoe ratchet: the build failed" in text
    assert "error: @\u200bsomeone broke it" in text


@pytest.mark.parametrize(("again", "sign"), [(0.2, "⚪"), (1e-4, "✅")])
def test_what_is_inconclusive_is_measured_again_and_then_a_warning(
    hub: FakeGitHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    again: float,
    sign: str,
) -> None:
    noisy = synthetic.results(noise=0.2, seed=40)
    machine = Machine(noisy, synthetic.results(noise=again, seed=80))
    assert gpu_job(monkeypatch, tmp_path, machine) == 0
    assert machine.measured == []
    assert ("::warning::the ratchet cannot tell" in capsys.readouterr().out) == (sign == "⚪")
    hub.artifact, hub.pulls = uploaded(tmp_path), [pull(7)]
    assert comment_job(tmp_path, "someone") == 0
    assert f"### {sign} flashmoe ratchet" in hub.sent[0][2]["body"]


def test_a_baseline_of_another_torch_is_proposed_where_two_runs_agree(
    hub: FakeGitHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = replace(synthetic.FINGERPRINT, torch="2.14.0")
    runs = [replace(synthetic.results(seed=seed), fingerprint=other) for seed in (40, 80)]
    monkeypatch.setattr(runner, "running_in", lambda folder: Machine(*runs))
    before = tmp_path / "baselines" / "some-gpu.json"
    save(synthetic.results(), before)
    hub.files["baselines/some-gpu.json"] = github.blob_hash(before)
    assert runner.main(words_of("baseline", "runner.py")) == 0
    assert load(tmp_path / "results" / "baselines" / "some-gpu.json").run == runs[0].run
    assert github.main(words_of("baseline", "github.py")) == 0
    (method, path, request) = hub.sent[-1]
    assert (method, path, request["base"]) == ("POST", "/pulls", "main")
    assert "torch: '2.14.0' here, '2.13.0' there" in request["body"]


def test_a_foreign_baseline_never_passes(
    hub: FakeGitHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = replace(synthetic.FINGERPRINT, torch="2.14.0")
    machine = Machine(replace(synthetic.results(), fingerprint=other))
    assert gpu_job(monkeypatch, tmp_path, machine) == 4
    assert "torch: '2.14.0' here" in (tmp_path / "summary.md").read_text()
