"""Who may import whom, and what C++ may include: DESIGN's arrows, read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A unit imports itself and units of lower layers, nothing else; units of one layer
# do not know each other.
LAYERS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            {"machine"},
            {"spec", "tuned"},
            {"tiles"},
            {"_extension"},
            {"prediction"},
            {"backends", "measure"},
            {"planning"},
            {"frontend"},
            {"api"},
            {"__init__"},
            {"__main__", "autotune", "integrations", "ratchet"},
        ),
    )
)
LAYER_OF = {unit: number for number, layer in enumerate(LAYERS) for unit in layer}
# Top-level folders that install inside the package.
TOOLS = ("autotune", "ratchet")

TORCH = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")
# Headers from outside that NVRTC understands; it has no C++ standard library.
NVRTC_HEADERS = {"cuda_bf16.h", "cuda_fp16.h", "cuda_fp8.h"}


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Every module of the package by its installed name."""
    for folder, prefix in (("flashmoe", "flashmoe"), *((t, f"flashmoe.{t}") for t in TOOLS)):
        for path in sorted((root / folder).rglob("*.py")):
            parts = [prefix, *path.relative_to(root / folder).with_suffix("").parts]
            yield ".".join(parts), path


def unit_of(module: str) -> str:
    """`flashmoe.backends.cpu` -> backends."""
    return [*module.split("."), "__init__"][1]


def imported(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of flashmoe that a module imports, at any depth of its
    code, also by importlib and for type checking only."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            if (
                function in ("import_module", "__import__")
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
            ):
                names = [first.value]
        for name in names:
            if name.split(".")[0] in ("flashmoe", *TOOLS):
                yield node.lineno, name


def import_violations(root: Path) -> list[str]:
    known = dict(modules(root))
    units = {unit_of(module) for module in known}
    broken = [
        f"flashmoe/{unit}.py is in no layer; give it one in LAYERS"
        for unit in sorted(units - set(LAYER_OF))
    ]
    for module, path in known.items():
        unit = unit_of(module)
        for line, name in imported(module, path):
            where = f"{path.relative_to(root)}:{line}"
            if name.split(".")[0] in TOOLS:
                broken.append(f"{where} imports {name}, which is flashmoe.{name} once installed")
                continue
            target = unit_of(name)
            if target not in units:
                target = "__init__"  # a name that the package itself exports
            if unit == target or unit not in LAYER_OF or target not in LAYER_OF:
                continue
            if LAYER_OF[target] >= LAYER_OF[unit]:
                broken.append(f"{where}: {unit} must not import {target}")
            elif unit in TOOLS and target == "_extension":
                broken.append(f"{where}: {unit} must use public modules only, not {target}")
    return broken


def includes(path: Path) -> Iterator[tuple[str, bool]]:
    """(header, whether in quotes) of every include that is not in a comment."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    for match in re.finditer(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', text, re.MULTILINE):
        yield match[2], match[1] == '"'


def nvrtc_files(csrc: Path) -> set[Path]:
    """What is compiled at run time: device code and all it includes. Launchers are host code."""
    seeds = [path for path in csrc.rglob("*.cuh") if path.stem != "launch"]
    seeds += [*csrc.rglob("params.h"), *csrc.rglob("tile.h")]
    found: set[Path] = set()
    while seeds:
        path = seeds.pop().resolve()
        if path in found:
            continue
        found.add(path)
        for header, quoted in includes(path):
            if quoted and (csrc / header).exists():
                seeds.append(csrc / header)
    return found


def include_violations(root: Path) -> list[str]:
    csrc = (root / "csrc").resolve()
    broken = []
    runtime = nvrtc_files(csrc)
    for path in sorted(x for x in csrc.rglob("*") if x.suffix in (".cpp", ".cu", ".h", ".cuh")):
        name = path.relative_to(csrc.parent)
        for header, quoted in includes(path):
            if TORCH.search(header) and path != csrc / "torch_ops.cpp":
                broken.append(f"{name} includes {header}; only csrc/torch_ops.cpp may know torch")
            elif path in runtime and not quoted and header not in NVRTC_HEADERS:
                broken.append(f"{name} includes <{header}>, which NVRTC does not have")
    return broken


def test_imports_follow_the_arrows() -> None:
    assert import_violations(ROOT) == []


def test_includes_follow_the_rules() -> None:
    assert include_violations(ROOT) == []


def test_the_checks_see_the_whole_repository() -> None:
    seen = {module for module, _ in modules(ROOT)}
    assert {"flashmoe.api", "flashmoe.backends.cpu", "flashmoe.ratchet.gate.decide"} <= seen
    assert any(name.startswith("flashmoe.autotune.") for name in seen)
    runtime = {path.name for path in nvrtc_files((ROOT / "csrc").resolve())}
    assert {"params.h", "tile.h", "mma.cuh", "kernel.cuh", "consumer.cuh"} <= runtime


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small repository in which every rule is kept."""
    files = {
        "flashmoe/__init__.py": "from flashmoe.api import attend\n",
        "flashmoe/spec/problem.py": "import math\n",
        "flashmoe/tiles.py": "from flashmoe.spec.problem import Problem\n",
        "flashmoe/_extension.py": "from flashmoe.tiles import Tile\n",
        "flashmoe/backends/__init__.py": "from flashmoe.backends.cpu import Cpu\n",
        "flashmoe/backends/cpu.py": "from flashmoe import tiles, _extension\n",
        "flashmoe/planning/plan.py": "from flashmoe.backends import cpu\n",
        "flashmoe/api.py": "def attend():\n    from flashmoe import planning\n",
        "autotune/search/search.py": "import flashmoe\nfrom flashmoe import attend, tiles\n",
        "ratchet/gate/decide.py": "from flashmoe.ratchet import stats\n",
        "ratchet/gate/stats.py": "import numpy\n",
        "csrc/torch_ops.cpp": "#include <torch/library.h>\n#include <vector>\n",
        "csrc/forward/kernel.cuh": '#include "ptx/mma.cuh"\n#include "common/params.h"\n',
        "csrc/forward/launch.cuh": "#include <atomic>\n",
        "csrc/forward/cpu/dispatch.cpp": "#include <vector>\n// #include <torch/library.h>\n",
        "csrc/common/params.h": "struct Params;\n",
        "csrc/forward/sm80/tile.h": "/*\n#include <vector>\n*/\n",
        "csrc/ptx/mma.cuh": "#include <cuda_bf16.h>\n",
        "csrc/common/plain.h": "#include <cstdint>\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_tree_that_keeps_the_rules_is_clean(tree: Path) -> None:
    assert import_violations(tree) == []
    assert include_violations(tree) == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (
            "flashmoe/tiles.py",
            "from flashmoe.planning.plan import make_plan",
            "tiles must not import planning",
        ),
        ("flashmoe/tiles.py", "import flashmoe.api", "tiles must not import api"),
        ("flashmoe/tiles.py", "import flashmoe", "tiles must not import __init__"),
        ("flashmoe/spec/problem.py", "from flashmoe import tiles", "spec must not import tiles"),
        ("flashmoe/spec/problem.py", "from ..tiles import Tile", "spec must not import tiles"),
        ("flashmoe/spec/problem.py", "from .. import tiles", "spec must not import tiles"),
        ("flashmoe/backends/cpu.py", "from .. import planning", "must not import planning"),
        ("flashmoe/backends/cpu.py", "from flashmoe import attend", "must not import __init__"),
        (
            "flashmoe/planning/plan.py",
            "def f():\n    import flashmoe.api",
            "plan.py:3: planning must not imp",
        ),
        ("flashmoe/planning/plan.py", "import_module('flashmoe.api')", "must not import api"),
        (
            "flashmoe/planning/plan.py",
            "if TYPE_CHECKING:\n    from flashmoe import api",
            "import api",
        ),
        (
            "flashmoe/planning/plan.py",
            "import flashmoe.ratchet.gate.decide",
            "must not import ratchet",
        ),
        (
            "autotune/search/search.py",
            "from flashmoe.ratchet import gate",
            "must not import ratchet",
        ),
        (
            "ratchet/gate/decide.py",
            "import flashmoe.autotune.search.search",
            "ratchet must not import autotune",
        ),
        (
            "ratchet/gate/decide.py",
            "from flashmoe import _extension",
            "must use public modules only",
        ),
        (
            "ratchet/gate/decide.py",
            "import autotune.search",
            "which is flashmoe.autotune.search once",
        ),
        ("flashmoe/novel.py", "import math", "flashmoe/novel.py is in no layer"),
        ("csrc/forward/cpu/dispatch.cpp", "#include <torch/library.h>", "only csrc/torch_ops.cpp"),
        ("csrc/common/params.h", "#include <ATen/ATen.h>", "only csrc/torch_ops.cpp"),
        ("csrc/ptx/mma.cuh", '  #  include "c10/util/Half.h"', "only csrc/torch_ops.cpp"),
        ("csrc/instances/registry.cu", "#include <torch/library.h>", "only csrc/torch_ops.cpp"),
        ("csrc/common/params.h", "#include <cstdint>", "which NVRTC does not have"),
        ("csrc/forward/sm80/tile.h", "#include <type_traits>", "which NVRTC does not have"),
        ("csrc/ptx/mma.cuh", "#include <cuda_runtime.h>", "which NVRTC does not have"),
        ("csrc/common/params.h", '#include "common/plain.h"', "plain.h includes <cstdint>"),
    ],
)
def test_a_planted_violation_is_found(tree: Path, file: str, line: str, message: str) -> None:
    path = tree / file
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}{line}\n")
    found = import_violations(tree) + include_violations(tree)
    assert len(found) == 1
    assert message in found[0]


# Whose parameters a call's fields are, one by one: Triton's compiler and torch's dispatcher know no
# structs, and the reference is called with loose tensors. Everybody else has them in one piece.
TAKE_SOFTMAX_SCALE = {
    "flashmoe/backends/triton_bwd.py: _backward_dkdv_kernel",
    "flashmoe/backends/triton_bwd.py: _backward_dq_kernel",
    "flashmoe/frontend/ops.py: a schema",
    "flashmoe/measure/reference.py: attention_reference",
    "csrc/torch_ops.cpp: a schema",
}


def softmax_scale_takers(root: Path) -> Iterator[str]:
    """The functions with that parameter, and the texts of schemas, but for users' functions and
    those that have flash-attn's names."""
    for path in (path for _, path in modules(root)):
        name = path.relative_to(root).as_posix()
        if name.startswith("flashmoe/integrations/flash_attn/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Constant) and "float softmax_scale" in str(node.value):
                yield f"{name}: a schema"
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                function = getattr(node, "name", "lambda")
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if any(x.arg == "softmax_scale" for x in arguments) and not function.startswith(
                    "flash_attn_"
                ):
                    yield f"{name}: {function}"
    for path in sorted((root / "csrc").rglob("*.[ch]*")):
        for line in path.read_text().splitlines():
            if re.search(r"\b(float|double)&? softmax_scale\b(?!;)", line):
                kind = "a schema" if '"' in line else line.strip()
                yield f"{path.relative_to(root).as_posix()}: {kind}"


def test_what_a_call_carries_travels_in_one_piece(tmp_path: Path) -> None:
    assert sorted(softmax_scale_takers(ROOT)) == sorted(TAKE_SOFTMAX_SCALE)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text(
        "void f(int a,\n       double softmax_scale, int b);\n"
    )
    (tmp_path / "flashmoe").mkdir()
    (tmp_path / "flashmoe" / "a.py").write_text("def f(q, *, softmax_scale=1.0): ...\n")
    assert list(softmax_scale_takers(tmp_path)) == [
        "flashmoe/a.py: f",
        "csrc/a.cpp: double softmax_scale, int b);",
    ]
