"""The workflows: they are valid, ask for little, and call commands that exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_architecture import modules, unit_of

from flashmoe.ratchet.ci import github, machine, runner

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github" / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yml"))
# What each may write, over all its jobs.
WRITES = {
    "baseline": {"contents", "pull-requests"},
    "comment": {"pull-requests"},
    "wake": {"id-token"},
    "wheels": {"contents"},
}
# What may change a figure: the kernels, all that runs or times them, and what builds them.
MEASURED = [
    "csrc/**",
    "flashmoe/**",
    "ratchet/**",
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    runner.REQUIREMENTS,
]
SCRIPTS = {"github.py": github, "machine.py": machine, "runner.py": runner}


def load(name: str) -> dict[Any, Any]:
    data = yaml.safe_load((FOLDER / f"{name}.yml").read_text())
    assert isinstance(data, dict)
    return data


def jobs(name: str) -> Iterator[dict[str, Any]]:
    yield from load(name)["jobs"].values()


def steps(name: str) -> Iterator[dict[str, Any]]:
    for job in jobs(name):
        yield from job["steps"]


def test_all_are_here() -> None:
    assert NAMES == ["baseline", "ci", "comment", "gpu-ratchet", "wake", "wheels"]


@pytest.mark.parametrize("name", NAMES)
def test_rights_and_limits(name: str) -> None:
    workflow = load(name)
    writes = set()
    for rights in (workflow["permissions"], *(job.get("permissions", {}) for job in jobs(name))):
        writes |= {scope for scope, right in rights.items() if right == "write"}
    assert "write" not in workflow["permissions"].values()
    assert writes == WRITES.get(name, set())
    assert workflow["concurrency"]["group"]
    assert all(job["timeout-minutes"] <= 60 for job in jobs(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_runner_never_holds_a_right_to_write(name: str) -> None:
    for job in jobs(name):
        if "self-hosted" in job["runs-on"]:
            assert "write" not in job.get("permissions", {}).values()
            assert job["environment"]


@pytest.mark.parametrize("name", NAMES)
def test_actions_are_pinned_and_keep_no_credentials(name: str) -> None:
    text = (FOLDER / f"{name}.yml").read_text()
    for line in re.findall(r"uses: (.*)", text):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)
    for step in steps(name):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", NAMES)
def test_no_logic_and_no_expression_in_a_script(name: str) -> None:
    """Each step is one command. What a pull request names (a branch, a title) reaches it as
    environment only."""
    for step in steps(name):
        script = step.get("run", "").strip()
        assert "${{" not in script
        assert not re.search(r"\n|&&|\|\||;|\$\(|`|\bif\b", script)


def test_scripts_are_ours_and_take_these_arguments() -> None:
    found = set()
    for name in NAMES:
        for step in steps(name):
            words = shlex.split(step.get("run", ""))
            if "-I" not in words:
                continue
            script = Path(words[words.index("-I") + 1].removeprefix("results/base/"))
            found.add(script.name)
            help = subprocess.run(
                [sys.executable, "-I", str(ROOT / script), "--help"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            if script.name == "github.py":
                command = words[words.index("-I") + 2]
                assert command in help
                help = subprocess.run(
                    [sys.executable, "-I", str(ROOT / script), command, "--help"],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            for word in words[words.index("-I") + 2 :]:
                assert not word.startswith("--") or word in help, (name, word)
    assert found == set(SCRIPTS)


def test_the_comment_checks_out_nothing_of_the_pull_request() -> None:
    for name in ("comment", "wake"):
        assert "pull_request" not in load(name)[True]  # YAML 1.1 reads the key `on` as true
        for step in steps(name):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert not {"ref", "repository"} & set(step["with"])


def test_what_may_change_a_figure_is_measured() -> None:
    """One list, which covers every module that the ratchet imports or may import."""
    events = [on for name in ("gpu-ratchet", "baseline") for on in load(name)[True].values() if on]
    assert [on["paths"] for on in events] == [MEASURED] * 3
    folders = tuple(pattern.removesuffix("**") for pattern in MEASURED if pattern.endswith("/**"))
    for module, path in modules(ROOT):
        if unit_of(module) != "autotune":
            assert path.relative_to(ROOT).as_posix().startswith(folders), path


def test_what_was_measured_is_kept() -> None:
    (upload,) = (s for s in steps("gpu-ratchet") if s.get("uses", "").startswith("actions/upload"))
    assert upload["with"]["retention-days"] == 90
    assert upload["with"]["name"] == github.ARTIFACT
    assert f"results/{runner.REPORT}" in upload["with"]["path"].split()
    assert runner.REPORT == github.MEMBER
    assert set(machine.WORKFLOWS) == {"gpu-ratchet.yml", "baseline.yml"}


@pytest.mark.parametrize("pattern", MEASURED)
def test_every_path_that_is_watched_is_there(pattern: str) -> None:
    assert (ROOT / pattern.removesuffix("/**")).exists()


def test_a_pull_request_is_judged_by_its_base() -> None:
    """Script and baselines are of the base's checkout, all of it; the pull request's is what lies
    where the script runs, with the history that its build is taken from."""
    (job,) = jobs("gpu-ratchet")
    own, base = (s["with"] for s in job["steps"] if "actions/checkout@" in s.get("uses", ""))
    assert base["ref"] == "${{ github.event.pull_request.base.sha || github.sha }}"
    assert "sparse-checkout" not in base
    assert not {"ref", "path", "repository"} & set(own)
    assert own["fetch-depth"] == 0
    (words,) = (shlex.split(step["run"]) for step in job["steps"] if "run" in step)
    script = words[words.index("-I") + 1]
    assert script == f"{base['path']}/ratchet/ci/runner.py"
    assert words[words.index("--baseline") + 1] == f"{base['path']}/baselines"
    # Below the folder that its commands run in, which git finds the pull request from.
    assert Path(base["path"]).parent == Path(words[words.index("--output") + 1])


def test_a_baseline_is_proposed_by_what_it_was_measured_against() -> None:
    measure, propose = load("baseline")["jobs"]["measure"], load("baseline")["jobs"]["propose"]
    (run,) = (step["run"] for step in measure["steps"] if "run" in step)
    measured = run.split()[run.split().index("--baseline") + 1]
    (run,) = (step["run"] for step in propose["steps"] if "run" in step)
    assert run.split()[run.split().index("--against") + 1] == measured
    (checkout,) = (s for s in propose["steps"] if s.get("uses", "").startswith("actions/checkout"))
    assert measured in checkout["with"]["sparse-checkout"].split()
    assert "ref" not in checkout["with"]


def test_a_release_that_is_there_already_gets_the_wheel() -> None:
    create, upload = (s for s in load("wheels")["jobs"]["release"]["steps"] if "run" in s)
    assert create["run"].startswith("gh release create ")
    assert create["continue-on-error"]
    assert upload["run"].startswith("gh release upload ")
    assert "dist/*.whl" in upload["run"].split()
    assert "continue-on-error" not in upload


def test_the_machine_is_tended_with_the_providers_credentials() -> None:
    (job,) = jobs("wake")
    guards = " ".join(step.get("if", "") for step in job["steps"] if "uses" in step)
    for provider in machine.PROVIDERS:
        assert f"vars.GPU_PROVIDER == '{provider}'" in guards
    assert "'schedule' && 'tend' || 'wake'" in job["steps"][-1]["env"]["ACTION"]


def test_foreign_code_waits_for_approval() -> None:
    (job,) = jobs("gpu-ratchet")
    assert "head.repo.fork && 'gpu-fork'" in job["environment"]


def test_zizmor_finds_nothing() -> None:
    tool = shutil.which("zizmor", path=str(Path(sys.executable).parent)) or shutil.which("zizmor")
    if tool is None:
        pytest.skip("zizmor is not installed")
    done = subprocess.run(
        [tool, "--offline", "--no-progress", str(FOLDER)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_holds() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    command = [sys.executable, "-m", "check_jsonschema"]
    files = [str(FOLDER / f"{name}.yml") for name in NAMES]
    done = subprocess.run(
        [*command, "--builtin-schema", "vendor.github-workflows", *files],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
