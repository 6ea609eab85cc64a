"""When the GPU machine is started and stopped."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from flashmoe.ratchet.ci import github, machine
from flashmoe.ratchet.ci.machine import Work, decide

NOW = datetime(2026, 1, 2, 12, 0, tzinfo=timezone.utc)
IDLE = timedelta(minutes=20)


@pytest.mark.parametrize(
    ("action", "running", "active", "ended", "told"),
    [
        ("wake", False, 1, 90, "start"),
        ("wake", True, 1, 90, "1 runs need the machine, which runs already"),
        ("wake", False, 0, 90, "no work is queued"),
        ("wake", True, 0, 90, "no work is queued"),
        ("tend", True, 0, 21, "stop"),
        ("tend", True, 0, None, "stop"),
        ("tend", True, 0, 19, "idle since 11:41 UTC, for less than 20 minutes"),
        ("tend", True, 2, 90, "2 runs need the machine, which runs already"),
        ("tend", False, 2, 90, "start"),
        ("tend", False, 0, 90, "the machine is stopped already"),
    ],
)
def test_decisions(action: str, running: bool, active: int, ended: int | None, told: str) -> None:
    last = None if ended is None else NOW - timedelta(minutes=ended)
    assert decide(action, running, Work(active, last), NOW, IDLE) == told


def test_work_is_what_github_lists() -> None:
    """One that waits for an approval is neither work nor the end of any."""
    listed = {
        "gpu-ratchet.yml": [("waiting", 5), ("queued", 6), ("completed", 30), ("completed", 31)],
        "baseline.yml": [("in_progress", 7), ("requested", 8), ("pending", 9), ("completed", 40)],
    }

    def get(path: str, query: Mapping[str, str]) -> Any:
        runs = [
            {"status": status, "updated_at": f"2026-01-02T11:{60 - minutes:02}:00Z"}
            for status, minutes in listed[path.split("/")[2]]
        ]
        return {"workflow_runs": runs}

    assert machine.work_of(get) == Work(4, NOW - timedelta(minutes=30))


@pytest.mark.parametrize("provider", list(machine.PROVIDERS))
def test_commands_of_providers(provider: str) -> None:
    table = machine.commands(provider, "gpu-1", "europe-west4-a")
    assert set(table) == {"start", "stop", "ask"}
    for command in table.values():
        assert "gpu-1" in command
        assert "europe-west4-a" in command
        assert not any("{" in part for part in command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("azure", "a", "b"), "GPU_PROVIDER must be one of gcloud, aws, got 'azure'"),
        (("aws", "", "b"), "GPU_MACHINE must be letters"),
        (("aws", "a", "--project=x"), "GPU_ZONE must be letters"),
    ],
)
def test_what_is_not_a_name_is_refused(arguments: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        machine.commands(*arguments)


def test_a_dry_run_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("PROVIDER", "gcloud"), ("MACHINE", "gpu-1"), ("ZONE", "a")):
        monkeypatch.setenv(f"GPU_{name}", value)
    monkeypatch.setattr(machine, "work_of", lambda get: Work(1, None))
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: pytest.fail("it ran"))
    assert machine.main(["wake", "--dry-run"]) == 0
    assert capsys.readouterr().out == (
        "would ask: gcloud compute instances describe gpu-1 --zone a --format value(status)\n"
        "would run: gcloud compute instances start gpu-1 --zone a --quiet\n"
    )
    monkeypatch.setenv("GPU_PROVIDER", "")
    assert machine.main(["wake", "--dry-run"]) == 2


def test_an_empty_address_is_githubs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def urlopen(request: urllib.request.Request, timeout: int) -> io.BytesIO:
        asked.append(request.full_url)
        return io.BytesIO(b"{}")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(github, "_comment", lambda hub, *_: bool(hub.get("pulls")))
    for name, value in (("API_URL", ""), ("REPOSITORY", "someone/flashmoe")):
        monkeypatch.setenv(f"GITHUB_{name}", value)
    monkeypatch.setenv("GH_TOKEN", "secret")
    assert machine.get_json("pulls", {}) == {}
    assert github.main(["comment", "--event", "x"]) == 0
    assert {url.rstrip("?") for url in asked} == {
        "https://api.github.com/repos/someone/flashmoe/pulls"
    }
