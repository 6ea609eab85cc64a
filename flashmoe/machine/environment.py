"""What a process finds around it: environment variables, and packages that tools need."""

from __future__ import annotations

import importlib.util
import os

# Modules that the tools need and attention does not, and the packages that bring them: those of the
# extra `tune` (pyproject.toml).
TOOL_PACKAGES = {
    "optuna": "'optuna>=5'",
    "pynvml": "nvidia-ml-py",
    "rich": "rich",
    "scipy": "scipy",
    "threadpoolctl": "threadpoolctl",
}


def variable(name: str, default: str = "") -> str:
    """The environment variable's value; `default` where it is unset or empty."""
    return os.environ.get(name) or default


def missing_packages(*modules: str) -> str:
    """Which of these modules of TOOL_PACKAGES are not installed, in one line that says what to do;
    empty when all are."""
    names = [TOOL_PACKAGES[name] for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(names)}; pip install {' '.join(names)}" if names else ""
