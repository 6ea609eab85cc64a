"""What a process finds around it: environment variables, streams, and packages that tools need."""

from __future__ import annotations

import importlib.util
import io
import os
import sys

# What the command lines import and attention does not, each with the package that brings it. The
# extra `tune` (pyproject.toml) lists the same packages.
TOOL_PACKAGES = {
    "optuna": "optuna>=5",
    "pynvml": "nvidia-ml-py",
    "rich": "rich",
    "scipy": "scipy",
    "threadpoolctl": "threadpoolctl",
}
_BAD_USAGE = 2


def variable(name: str, default: str = "") -> str:
    """The environment variable's value; `default` where it is unset or empty."""
    return os.environ.get(name) or default


def print_anything() -> None:
    """Escape on stdout what its encoding lacks (stderr does that anyway): a character that cannot
    be printed is no reason to lose a run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def require_tool_packages(program: str) -> None:
    """Exit with code 2, naming them, where packages are missing that a command line needs."""
    missing = [
        package
        for module, package in TOOL_PACKAGES.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        names = " ".join(f"'{name}'" if ">" in name else name for name in missing)
        print(f"{program}: error: packages are missing: pip install {names}", file=sys.stderr)
        raise SystemExit(_BAD_USAGE)
