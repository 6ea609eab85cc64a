"""The examples run, and learn what they are to learn."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import library

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What an example prints: in this process, which has imported the libraries already."""

    def said(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return said


@pytest.fixture
def transformers() -> Iterator[None]:
    library("transformers")
    from flashmoe.integrations import transformers as ours

    yield
    ours.unregister()


@pytest.fixture
def diffusers() -> Iterator[None]:
    library("diffusers")
    from flashmoe.integrations import diffusers as ours

    yield
    ours.unregister()


@pytest.mark.usefixtures("transformers")
def test_finetune_transformers(run: Callable[..., str]) -> None:
    assert "3 5 7 goes on: 9" in run("finetune_transformers.py", "--steps", "50")


@pytest.mark.usefixtures("transformers")
def test_serve_transformers(run: Callable[..., str]) -> None:
    # As few pages as make requests wait for those of others.
    said = run("serve_transformers.py", "--requests", "9", "--slots", "4", "--pages", "14")
    for name in ("flashmoe", "SDPA"):
        assert f"{name}: tokens equal those of dense attention in 9 of 9 requests" in said
    assert said.count("tokens/s") == 2


@pytest.mark.usefixtures("diffusers")
def test_diffusion_step(run: Callable[..., str]) -> None:
    said = run("diffusion_step.py", "--size", "12", "--steps", "2")
    assert "flashmoe: 2 steps" in said
