"""A sample of flash-attention's own tests through flashmoe's functions, on a GPU or a CPU.

    python tests/gpu/flash_attn_own.py flash-attention/tests/test_flash_attn.py --count 1500
    python tests/gpu/flash_attn_own.py flash-attention/hopper/test_flash_attn.py --count 1500

The file is read where it lies, from a checkout of that project; what it imports as flash_attn and
flash_attn_interface is ours (flashmoe.integrations.flash_attn). A case that raises
NotImplementedError asked for what flashmoe refuses by name, and is counted apart. `--seconds` ends
the run early; `--output` keeps the counts, and what failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flashmoe.integrations import flash_attn


class Sample:
    """Runs `count` of the cases that are collected, in random order, and counts what becomes of
    them."""

    def __init__(self, count: int, seed: int, seconds: float, output: Path | None) -> None:
        self.count, self.seed, self.output = count, seed, output
        self.deadline = time.monotonic() + seconds
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self.collected = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.collected = len(items)
        items[:] = random.Random(self.seed).sample(items, min(self.count, len(items)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
        report = yield
        if report.when == "call" or report.outcome != "passed":
            outcome = report.outcome
            if outcome == "failed":
                assert call.excinfo is not None
                refused = call.excinfo.errisinstance(NotImplementedError)
                outcome = "refused" if refused else "failed"
                why = f"{item.nodeid}: {call.excinfo.exconly()}"[:500]
                if not refused:
                    self.failures.append(why)
                    print(f"\nFAILED {why}", flush=True)
            self.outcomes[outcome] += 1
            if sum(self.outcomes.values()) % 50 == 0:
                self.write()
        if time.monotonic() > self.deadline:
            item.session.shouldstop = "no time left"
        return report

    def write(self) -> None:
        verdict = {
            "line": "every case passes, skips itself or is refused by name: failures",
            "value": len(self.failures),
            "bound": 0,
            "met": not self.failures if sum(self.outcomes.values()) else None,
        }
        document = {
            "collected": self.collected,
            "outcomes": dict(self.outcomes),
            "failures": self.failures,
            "verdicts": [verdict],
        }
        if self.output is not None:
            self.output.write_text(json.dumps(document) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=1500, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    flash_attn.install(replace=True)
    sample = Sample(arguments.count, arguments.seed, arguments.seconds, arguments.output)
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "--disable-warnings"]
    options += ["-c", "/dev/null", f"--rootdir={arguments.file.parent}"]
    code = pytest.main([*options, str(arguments.file)], plugins=[sample])
    sample.write()
    print(f"{sample.collected} cases, of which {dict(sample.outcomes)}")
    return int(bool(sample.failures) or code not in (0, 1))


if __name__ == "__main__":
    sys.exit(main())
