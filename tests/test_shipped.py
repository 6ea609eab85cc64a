"""What ships beside the kernels: tuned databases that hold for them, and the list of tiles."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashmoe import _extension
from flashmoe.autotune.running.candidate import default_candidate
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import Arch
from flashmoe.planning import database, plan
from flashmoe.planning.database import Entry
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile, instances

ROOT = Path(__file__).resolve().parents[1]
# The GPUs of which a database may ship, and what tiles must fit there.
ARCHS = {"nvidia-h200": Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)}
# Each tile takes some 5 s of a core to compile, and 0.2 MB of a wheel that may have 20.
MOST_INSTANCES = 72
PROBLEM = Problem(1, 8, 8, 512, 512, 96, "bfloat16")
TILE, OTHER = Tile.parse("sm90:128x64-stages2"), Tile.parse("sm90:128x96-stages2")
SHIPPED = {
    path.stem: database.parse(path.read_text(encoding="utf-8"))
    for path in (ROOT / "flashmoe" / "tuned").glob("*.json")
}

if not _extension.load().cuda_archs:
    pytest.skip("this build has no CUDA kernels", allow_module_level=True)


def load(path: Path) -> ModuleType:
    """A script of csrc as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return load(ROOT / "csrc" / "instances" / "generate.py")


@pytest.fixture(scope="module")
def build_config() -> ModuleType:
    return load(ROOT / "csrc" / "build_config.py")


@pytest.fixture(params=SHIPPED)
def stem(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database's name; plans are made for its GPU."""
    name: str = request.param
    monkeypatch.setattr(plan, "arch", lambda device: ARCHS[name])
    for backend in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[backend], "unavailable", lambda device: "")
    return name


def test_choices_ship_without_their_evidence() -> None:
    files = [*(ROOT / "flashmoe" / "tuned").iterdir()]
    assert {path.stem for path in files} <= set(ARCHS)
    assert sum(path.stat().st_size for path in files) < 300_000
    evidence = {"samples", "fingerprint", "command", "study", "storage", "search", "verified"}
    for entry in (entry for entries in SHIPPED.values() for entry in entries.values()):
        assert not evidence & entry.to_json().keys()
        assert all(ratio < 1 for ratio in entry.over_default.values())


def outdated(entries: Iterable[Entry], kernels: str) -> list[str]:
    """What was judged with other kernels or against another default than today's, and what won and
    is the default by now, but would stay behind when that changes."""
    found = []
    for entry in entries:
        default = str(default_candidate(entry.problem, torch.device("cuda", 0)))
        if entry.judged != kernels:
            found.append(f"{entry.problem.label}: of kernels {entry.judged}, not {kernels}")
        elif entry.default != default:
            found.append(f"{entry.problem.label}: over {entry.default}, not {default}")
        elif not entry.kept and (entry.tile or entry.backend) == default:
            found.append(f"{entry.problem.label}: {default} is the default")
    return found


def test_databases_are_of_these_kernels_and_defaults(stem: str) -> None:
    found = outdated(SHIPPED[stem].values(), _extension.kernel_hash("cuda"))
    assert found == [], "benchmarks/tuned_suite.py: measure, then ship --judged"


def test_what_is_outdated_is_found(stem: str) -> None:
    default = str(default_candidate(PROBLEM, torch.device("cuda", 0)))
    good = [
        Entry(PROBLEM, "default", "", default, judged="x"),
        Entry(PROBLEM, "cuda", str(TILE), default, judged="x"),
    ]
    bad = [
        Entry(PROBLEM, "default", "", default, judged="y"),
        Entry(PROBLEM, "cuda", str(TILE), str(OTHER), judged="x"),
        Entry(PROBLEM, "cuda", default, default, judged="x"),
    ]
    assert default not in (str(TILE), str(OTHER))
    assert outdated(good, "x") == []
    assert len(outdated(bad, "x")) == 3


def test_a_winner_of_more_than_a_percent_runs_without_a_compiler(stem: str) -> None:
    lines = (ROOT / "csrc" / "instances" / "sm90.txt").read_text(encoding="utf-8").splitlines()
    for entry in SHIPPED[stem].values():
        if entry.backend != "cuda":
            continue
        tile = Tile.parse(entry.tile)
        assert not tile.violations(ARCHS[stem], entry.problem)
        assert entry.speedup_default is not None
        if entry.speedup_default[0] > 1.01:
            assert instances.line_of(entry.problem, tile) in lines


def test_the_list_is_what_the_script_says(generate: ModuleType) -> None:
    listed = (ROOT / "csrc" / "instances" / "sm90.txt").read_text(encoding="utf-8")
    assert listed == generate.generated(), "run csrc/instances/generate.py, then build again"


def test_what_is_listed_is_legal_and_not_too_much(build_config: ModuleType) -> None:
    listed = [x for x in build_config.instances() if x.kernel == "sm90"]
    assert len(set(listed)) == len(listed) <= MOST_INSTANCES
    for one in listed:
        fields = one.to_json()
        head_dim = fields.pop("head_dim")
        tile = Tile(**fields)
        own = one.head_dim_v or None
        problem = Problem(1, 1, 1, 512, 512, head_dim, "bfloat16", head_dim_v=own)
        assert not tile.violations(ARCHS["nvidia-h200"], problem), f"{head_dim}: {tile}"


def entry(backend: str, tile: str, default: str, gain: float | None = None) -> Entry:
    speedup = None if gain is None else (gain, gain, gain)
    return Entry(PROBLEM, backend, tile, default, speedup_default=speedup)


@pytest.mark.parametrize(
    ("stored", "earned"),
    [
        (entry("cuda", str(TILE), str(OTHER), 1.02), [TILE]),
        (entry("cuda", str(TILE), str(OTHER), 1.01), []),
        (entry("default", "", str(OTHER)), [OTHER]),
        (entry("default", "", "sdpa"), []),
        (entry("sdpa", "", str(OTHER), 1.5), []),
        (entry("triton", "triton:64x64", str(OTHER), 1.5), []),
    ],
)
def test_what_earns_its_place(generate: ModuleType, stored: Entry, earned: list[Tile]) -> None:
    lines = [instances.line(96, tile) for tile in earned]
    assert [*generate.earned({"x": stored})] == lines


def test_which_tiles_are_listed_changes_no_kernel(
    build_config: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else entries that ship would be of other kernels as soon as their tiles are compiled in."""
    before = build_config.source_hashes()
    csrc = tmp_path / "csrc"
    for source in build_config.CSRC.rglob("*"):
        if source.is_file():
            copy = csrc / source.relative_to(build_config.CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    monkeypatch.setattr(build_config, "CSRC", csrc)
    assert build_config.source_hashes() == before
    (csrc / "instances" / "sm90.txt").write_text("", encoding="utf-8")
    assert build_config.source_hashes() == before
    (csrc / "forward" / "sm90" / "kernel.cuh").write_text("", encoding="utf-8")
    assert build_config.source_hashes() != before
