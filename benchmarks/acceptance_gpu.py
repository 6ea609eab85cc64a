"""The one entry for a GPU: tests, then every table, by topic, within a budget of minutes.

    python benchmarks/acceptance_gpu.py --list
    python benchmarks/acceptance_gpu.py --output results
    python benchmarks/acceptance_gpu.py training serving --minutes 9 --output results
    python benchmarks/acceptance_gpu.py --parts backward models --output results

Topics are defaults, window, training, serving, terms, libraries and tools; without any, all. Parts
run in the order of their worth, each as a command with its own limit of seconds, and one that no
longer fits is left out and named at the end, with the command that runs the rest. After each,
OUTPUT/acceptance.json holds the documents of all so far, with verdicts, and OUTPUT/acceptance.log
what they printed; OUTPUT/current.json is the part's that runs: a run that is cut short loses
nothing. With --flash-attention FOLDER, a checkout, that project's own tests run through ours, too.
The code is 1 where a part failed or a result was wrong; bounds that are not met are findings.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# Seconds before its end when a table begins no further row.
_GRACE = 25.0
_LEAST = 0.5  # of a part's seconds: with less it is not begun
_LARGEST = 4 << 20  # bytes of a file that is kept in acceptance.json
PYTHON = (sys.executable, "-u")


@dataclass(frozen=True)
class Part:
    """One command. `seconds`: what it takes at most; `worth`: 1 first; `is_table`: one of the
    scripts that take --seconds and --output; `needs`: modules without which it is left out."""

    name: str
    topic: str
    worth: int
    seconds: float
    command: tuple[str, ...]
    is_table: bool = False
    needs: tuple[str, ...] = field(default=())


def _table(
    name: str, topic: str, worth: int, seconds: float, script: str, *options: str, **more: Any
) -> Part:
    command = (*PYTHON, f"benchmarks/{script}.py", *options)
    return Part(name, topic, worth, seconds, command, is_table=True, **more)


def _tests(name: str, topic: str, worth: int, seconds: float, *paths: str, **more: Any) -> Part:
    command = (*PYTHON, "-m", "pytest", "-q", "--maxfail=20", "--durations=5")
    return Part(name, topic, worth, seconds, (*command, *paths), **more)


def _ratchet(name: str, worth: int, seconds: float, *arguments: str) -> Part:
    command = (*PYTHON, "-m", "flashmoe.ratchet", *arguments)
    return Part(name, "tools", worth, seconds, command)


GPU = "tests/gpu/test_gpu_"
# {} stands for a folder of the run; what JSON is in it is kept.
PARTS = (
    # Whether results are right comes first.
    _tests("tests-kernels", "defaults", 1, 150, f"{GPU}kernels.py", f"{GPU}hopper.py"),
    _tests("tests-decode", "serving", 1, 120, f"{GPU}decode.py", f"{GPU}cache.py"),
    _tests("tests-packed", "serving", 1, 120, f"{GPU}packed.py"),
    _tests("tests-terms", "terms", 1, 200, f"{GPU}terms.py", f"{GPU}dropout.py", f"{GPU}mask.py"),
    _tests("tests-masks", "terms", 1, 120, f"{GPU}masks.py", "tests/test_head_dim_v.py"),
    _tests("tests-sdpa", "defaults", 2, 60, f"{GPU}sdpa.py", f"{GPU}counters.py"),
    Part(
        *("check-backward", "training", 1, 90),
        (*PYTHON, "benchmarks/hopper/backward.py", "--check-only", "--random", "60"),
    ),
    # What users feel most, next.
    _table("backward", "training", 2, 150, "training", "--only", "rows"),
    _table("decode", "serving", 2, 90, "decode"),
    _table("packed", "serving", 2, 150, "packed", "--only", "equal", "mixed", "short", "empty"),
    _table("terms", "terms", 2, 330, "terms"),
    _table("host", "training", 2, 60, "overhead"),
    _table("masks", "terms", 3, 60, "masks"),
    _table("step", "training", 3, 120, "training", "--only", "step", "gqa", "windows", "memory"),
    _table("defaults", "defaults", 3, 150, "defaults"),
    _table("windows", "window", 3, 150, "windows"),
    _table("models", "training", 3, 240, "models"),
    _table("chunks", "serving", 4, 40, "packed", "--only", "chunks"),
    _table("serving", "serving", 4, 120, "serving", needs=("transformers",)),
    _tests(
        *("tests-transformers", "libraries", 3, 240),
        *("tests/integrations/test_transformers.py", "-m", "long or not long"),
        needs=("transformers",),
    ),
    _tests(
        *("tests-diffusers", "libraries", 3, 120),
        *("tests/integrations/test_diffusers.py", "-m", "long or not long"),
        needs=("diffusers",),
    ),
    _tests(
        *("tests-libraries", "libraries", 3, 120),
        *("tests/integrations/test_torch.py", "tests/integrations/test_flash_attn.py"),
    ),
    _tests(
        *("tests-api", "terms", 4, 240),
        *(f"tests/test_{name}.py" for name in ("attention", "varlen", "kvcache", "terms_api")),
        *(f"tests/test_{name}.py" for name in ("attn_mask", "dropout", "extreme_inputs")),
    ),
    _ratchet("bench", 3, 100, "bench", "--budget", "60", "--output", "{}/bench.json"),
    _ratchet("gate", 3, 30, "gate", "{}/bench.json", "--baseline", "baselines"),
    _ratchet("sota", 4, 240, "sota", "--rounds", "30", "--output", "{}/performance.md"),
    Part("tuner", "tools", 4, 150, (*PYTHON, "-m", "flashmoe.autotune", "--budget", "100")),
    Part(
        *("plane", "defaults", 5, 300),
        (
            *(*PYTHON, "benchmarks/plane.py", "--sets", "random,table,short", "--no-triton"),
            *("--seconds", "260", "--output", "{}/plane.jsonl"),
        ),
    ),
    Part(
        *("plane-report", "defaults", 5, 20),
        (*PYTHON, "benchmarks/plane_report.py", "{}/plane.jsonl"),
    ),
)
TOPICS = tuple(dict.fromkeys(part.topic for part in PARTS))


def of_flash_attention(folder: Path) -> Iterator[Part]:
    """Its own tests, a sample of each file that there is."""
    for name, path in (("fa2", "tests/test_flash_attn.py"), ("fa3", "hopper/test_flash_attn.py")):
        if (folder / path).exists():
            runner = (*PYTHON, "tests/gpu/flash_attn_own.py", str(folder / path))
            yield Part(f"tests-{name}", "libraries", 2, 300, runner, is_table=True)


def chosen(
    topics: Sequence[str], names: Sequence[str], flash_attention: Path | None
) -> tuple[Part, ...]:
    """Those that are asked for, the worthiest first."""
    parts = [*PARTS, *(() if flash_attention is None else of_flash_attention(flash_attention))]
    if unknown := sorted(set(names) - {part.name for part in parts}):
        raise SystemExit(f"parts must be some of {', '.join(p.name for p in parts)}: {unknown}")
    wanted = [p for p in parts if (p.name in names if names else p.topic in (topics or TOPICS))]
    return tuple(sorted(wanted, key=lambda part: part.worth))


@dataclass
class Done:
    """What became of a part: `code` is its exit code, or why there is none."""

    part: Part
    code: int | str
    seconds: float
    document: dict[str, Any]

    @property
    def failed(self) -> bool:
        return self.code != 0

    @property
    def line(self) -> str:
        verdicts = self.document.get("verdicts", [])
        counts = [sum(v["met"] is x for v in verdicts) for x in (True, False, None)]
        text = f"{self.part.name} ({self.part.topic}): {self.code}, {self.seconds:.0f} s"
        if verdicts:
            text += ", met {}, not met {}, open {}".format(*counts)
        return text

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.part.name,
            "topic": self.part.topic,
            "command": shlex.join(self.part.command),
            "code": self.code,
            "seconds": round(self.seconds, 1),
            "document": self.document,
        }


class Run:
    """Parts one after the other, in `folder`."""

    def __init__(self, folder: Path, seconds: float, options: Sequence[str]) -> None:
        self.folder, self.options = folder, options
        self.deadline = time.monotonic() + seconds
        self.done: list[Done] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.files = Path(tempfile.mkdtemp(prefix="acceptance-"))

    def fits(self, part: Part) -> bool:
        return self.deadline - time.monotonic() >= _LEAST * part.seconds

    def run(self, part: Part) -> None:
        current, log = self.folder / "current.json", self.folder / "acceptance.log"
        limit = min(part.seconds, self.deadline - time.monotonic())
        command = [word.replace("{}", str(self.files)) for word in part.command]
        if "pytest" in command and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, max(len(os.sched_getaffinity(0)) // 2, 1)))]
        if part.is_table:
            stop = max(limit - _GRACE, limit / 2)
            command += ["--seconds", f"{stop:.0f}", "--output", str(current)]
            command += self.options if "benchmarks" in part.command[len(PYTHON)] else []
        print(f"\n== {part.name}: {shlex.join(command)} (at most {limit:.0f} s)", flush=True)
        began, end = time.monotonic(), log.stat().st_size if log.exists() else 0
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n== {part.name}: {shlex.join(command)}\n")
            file.flush()
            code = _finished(command, file, limit)
        with log.open(encoding="utf-8", errors="replace") as file:
            file.seek(end)
            print("".join(file.readlines()[-25:]), flush=True)
        document = json.loads(current.read_text(encoding="utf-8")) if current.exists() else {}
        current.unlink(missing_ok=True)
        self.done.append(Done(part, code, time.monotonic() - began, document))
        self.write()

    def write(self) -> None:
        files = {
            path.name: path.read_text(encoding="utf-8")
            for path in sorted(self.files.rglob("*.json*"))
            if path.stat().st_size <= _LARGEST
        }
        whole = {"parts": [done.to_json() for done in self.done], "files": files}
        partial = self.folder / "acceptance.json.part"
        partial.write_text(json.dumps(whole, separators=(",", ":")) + "\n", encoding="utf-8")
        partial.replace(self.folder / "acceptance.json")


def _finished(command: Sequence[str], file: Any, limit: float) -> int | str:
    """Its exit code, or that it ran too long and was ended with all that it started."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"ended after {limit:.0f} s"


def missing(part: Part) -> str:
    return ", ".join(name for name in part.needs if importlib.util.find_spec(name) is None)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("topics", nargs="*", choices=[[], *TOPICS], metavar="TOPIC", help=", ".join(TOPICS))
    add("--minutes", type=float, default=25.0, help="for all (default: %(default)s)")
    add("--parts", nargs="+", default=[], metavar="PART", help="these parts, by name")
    add("--list", action="store_true", help="show the parts, run nothing")
    add("--output", type=Path, default=Path("results"), metavar="FOLDER")
    add("--flash-attention", type=Path, metavar="FOLDER", help="a checkout of flash-attention")
    add("--without", nargs="+", default=[], metavar="PEER", help="of all tables")
    add("--shrink", type=int, default=1, metavar="N", help="tables on small problems")
    arguments = parser.parse_args()
    parts = chosen(arguments.topics, arguments.parts, arguments.flash_attention)
    if arguments.list:
        for part in parts:
            print(f"{part.worth} {part.name:20} {part.topic:10} {part.seconds:4.0f} s")
        print(f"{sum(part.seconds for part in parts) / 60:.0f} minutes at most")
        return 0
    options = ["--shrink", str(arguments.shrink)] if arguments.shrink != 1 else []
    if arguments.without:
        options += ["--without", *arguments.without]
    if not torch.cuda.is_available():
        print("no GPU is here: tables run on the CPU, tests for GPUs are skipped", flush=True)
    run = Run(arguments.output.resolve(), arguments.minutes * 60, options)
    left = []
    for part in parts:
        if names := missing(part):
            print(f"\n== {part.name}: needs {names}", flush=True)
        elif run.fits(part):
            run.run(part)
        else:
            left.append(part.name)
    print("\n" + "\n".join(done.line for done in run.done))
    for done in run.done:
        for verdict in done.document.get("verdicts", []):
            if verdict["met"] is not True:
                word = "not met" if verdict["met"] is False else "open"
                print(f"{word}: {verdict['line']}: {verdict['value']} ({verdict['bound']})")
    if left:
        print(f"left out for want of time: --parts {' '.join(left)}")
    return int(any(done.failed for done in run.done))


if __name__ == "__main__":
    raise SystemExit(main())
