"""`python -m flashmoe` as a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys


def run(*arguments):
    command = [sys.executable, "-m", "flashmoe", *arguments]
    # conftest.py sets TRITON_INTERPRET for the tests' own process; users do not.
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_says_what_is_available_and_why_the_rest_is_not():
    result = run()
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\ncpu: " in result.stdout
    assert "  cpu      yes" in result.stdout
    assert "  cuda     no: needs a CUDA device, got cpu" in result.stdout
    assert "  triton   no: needs a CUDA device (or TRITON_INTERPRET=1), got cpu" in result.stdout
    assert "tuned (yours): " in result.stdout


def test_bad_usage():
    result = run("--frobnicate")
    assert result.returncode == 2
    assert "--frobnicate" in result.stderr
