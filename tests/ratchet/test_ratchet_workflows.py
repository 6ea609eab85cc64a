"""The workflows: they parse, ask for little, and call commands that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmoe.ratchet import cli

yaml = pytest.importorskip("yaml")

FOLDER = Path(__file__).resolve().parents[2] / ".github" / "workflows"
OURS = ("ci", "gpu-ratchet", "comment")


def load(name: str) -> dict[Any, Any]:
    data = yaml.safe_load((FOLDER / f"{name}.yml").read_text())
    assert isinstance(data, dict)
    return data


def steps(workflow: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("name", OURS)
def test_rights_and_limits(name: str) -> None:
    workflow = load(name)
    writes = {scope for scope, right in workflow["permissions"].items() if right == "write"}
    assert writes == ({"pull-requests"} if name == "comment" else set())
    assert workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert "permissions" not in job


@pytest.mark.parametrize("name", OURS)
def test_actions_are_pinned_and_keep_no_credentials(name: str) -> None:
    for step in steps(load(name)):
        if uses := step.get("uses"):
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|[0-9a-f]{40})", uses)
            if uses.startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", OURS)
def test_no_expression_is_pasted_into_a_script(name: str) -> None:
    """What a pull request names (a branch, a title) reaches scripts as environment only."""
    for step in steps(load(name)):
        for script in (step.get("run", ""), step.get("with", {}).get("script", "")):
            assert "${{" not in script


def test_the_comment_checks_out_nothing_of_the_pull_request() -> None:
    workflow = load("comment")
    assert set(workflow[True]) == {"workflow_run"}  # YAML 1.1 reads the key `on` as true
    checkouts = [s for s in steps(workflow) if s.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(not {"ref", "repository"} & set(step["with"]) for step in checkouts)


def test_commands_exist() -> None:
    found = 0
    for step in steps(load("gpu-ratchet")):
        words = shlex.split(step.get("run", ""))
        if "flashmoe.ratchet" in words:
            cli.parser().parse_args(words[words.index("flashmoe.ratchet") + 1 :])
            found += 1
    assert found == 2


def test_changes_of_kernels_are_measured_and_kept() -> None:
    workflow = load("gpu-ratchet")
    wanted = {"csrc/**", "flashmoe/backends/**", "setup.py", "CMakeLists.txt"}
    for event in ("pull_request", "push"):
        assert wanted <= set(workflow[True][event]["paths"])
    (upload,) = (s for s in steps(workflow) if s.get("uses", "").startswith("actions/upload"))
    assert upload["with"]["retention-days"] == 90
