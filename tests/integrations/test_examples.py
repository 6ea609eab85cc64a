"""The examples run, and learn what they are to learn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import library

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return found.stdout


def test_finetune_transformers() -> None:
    library("transformers")
    assert "3 5 7 goes on: 9" in _run("finetune_transformers.py", "--steps", "50")


def test_serve_transformers() -> None:
    library("transformers")
    # As few pages as make requests wait for those of others.
    said = _run("serve_transformers.py", "--requests", "9", "--slots", "4", "--pages", "14")
    for name in ("flashmoe", "SDPA"):
        assert f"{name}: tokens equal those of dense attention in 9 of 9 requests" in said
    assert said.count("tokens/s") == 2


def test_diffusion_step() -> None:
    library("diffusers")
    said = _run("diffusion_step.py", "--size", "12", "--steps", "2")
    assert "flashmoe: 2 steps" in said
