"""Where files are kept between runs, and what becomes of those that are damaged."""

from __future__ import annotations

import os
import time
from pathlib import Path


def cache_dir() -> Path:
    """FLASHMOE_CACHE_DIR, or flashmoe/ in XDG_CACHE_HOME, or ~/.cache/flashmoe."""
    if explicit := os.environ.get("FLASHMOE_CACHE_DIR"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flashmoe"


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that it is neither used nor lost; returns its new path."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        aside = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
        if not aside.exists():
            path.rename(aside)
            return aside
    raise FileExistsError(f"too many damaged copies beside {path}")
