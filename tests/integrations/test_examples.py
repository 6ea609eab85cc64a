"""The examples run, and learn what they are to learn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import library

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_finetune_transformers() -> None:
    library("transformers")
    script = EXAMPLES / "finetune_transformers.py"
    command = [sys.executable, script, "--steps", "50"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "3 5 7 goes on: 9" in found.stdout
