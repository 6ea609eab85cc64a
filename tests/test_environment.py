"""What flashmoe needs of its surroundings: packages, variables, encodings, and what texts say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmoe.autotune import __main__ as tuner
from flashmoe.machine import environment

ROOT = Path(__file__).resolve().parents[1]
# As `python -c` where the modules BLOCKED cannot be imported.
WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
ATTEND = """
import torch, flashmoe
q, k, v = (torch.randn(1, 33, 2, 40, requires_grad=True) for _ in range(3))
out = flashmoe.flash_attn_func(q, k, v, causal=True)
out.sum().backward()
assert torch.isfinite(q.grad).all()
print(flashmoe.scaled_dot_product_attention(*(x.detach().transpose(1, 2) for x in (q, k, v))).shape)
"""


def sources() -> Iterator[Path]:
    """Python's sources, the tests' among them."""
    for folder in ("flashmoe", "autotune", "ratchet", "benchmarks", "csrc", "tests", ".ci"):
        yield from sorted((ROOT / folder).rglob("*.py"))
    yield ROOT / "setup.py"


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **variables},
    )


def test_attention_needs_nothing_of_the_tools() -> None:
    done = python(WITHOUT.format(blocked=set(environment.TOOL_PACKAGES)) + ATTEND)
    assert done.stdout == "torch.Size([1, 2, 33, 40])\n", done.stderr


def test_the_tuner_names_the_packages_that_are_missing() -> None:
    """All of them: it asks for them before it imports any."""
    code = f"import runpy, sys\nsys.modules.update(dict.fromkeys({[*environment.TOOL_PACKAGES]}))\n"
    done = python(f"{code}runpy.run_module('flashmoe.autotune', run_name='__main__')")
    assert (done.returncode, done.stdout) == (2, "")
    names = [*environment.TOOL_PACKAGES.values()]
    (line,) = done.stderr.splitlines()
    missing = f"not installed: {', '.join(names)}; pip install {' '.join(names)}"
    assert line == f"flashmoe.autotune: error: {missing}"


@pytest.mark.parametrize("module", environment.TOOL_PACKAGES)
def test_the_tuner_names_a_package_that_is_missing(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert tuner.main() == tuner.BAD_USAGE == 2
    package = environment.TOOL_PACKAGES[module]
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert told.out == ""
    assert line == f"flashmoe.autotune: error: not installed: {package}; pip install {package}"


def test_the_extra_brings_what_the_tools_need() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = set(project["optional-dependencies"]["tune"])
    assert {name.strip("'") for name in environment.TOOL_PACKAGES.values()} < extra
    assert not extra & set(project["dependencies"])


def test_nobody_is_sent_to_the_index_for_flashmoe() -> None:
    """That name is somebody else's package there."""
    sent = re.compile(r"pip3? install (-\S+ )*['\"]?flashmoe|'flashmoe\[")
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".ci").iterdir()]
    documents += [*(ROOT / ".github").rglob("*.yml"), ROOT / "pyproject.toml", *sources()]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in documents
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if sent.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(("value", "expected"), [(None, "x"), ("", "x"), ("0", "0")])
def test_an_empty_variable_is_unset(
    value: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASHMOE_TEST", raising=False)
    if value is not None:
        monkeypatch.setenv("FLASHMOE_TEST", value)
    assert environment.variable("FLASHMOE_TEST", "x") == expected


def calls_without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that read or write text in the locale's encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in named:
            continue
        function = ast.unparse(node.func)
        name = function.rpartition(".")[2]
        given = [ast.unparse(x) for x in [*node.args, *filter(None, [named.get("mode")])]]
        modes = [x for x in given if re.fullmatch(r"'[rwax+bt]{1,3}'", x)]
        binary = any("b" in mode for mode in modes)
        opens = function == "open" or (name == "open" and (modes or not (node.args or named)))
        if (
            (name == "read_text" and not node.args)
            or (name == "write_text" and len(node.args) == 1)
            or (opens and not binary)
            or (name.endswith("TemporaryFile") and modes and not binary)
            or "text" in named
        ):
            yield node.lineno


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.write_text(x)", True),
        ("write_text(path, x)", False),
        ("open('x')", True),
        ("open('x', 'rb')", False),
        ("path.open()", True),
        ("path.open('w')", True),
        ("path.open('a+b')", False),
        ("archive.open(member)", False),
        ("tarfile.open(fileobj=file)", False),
        ("tempfile.NamedTemporaryFile(dir='w')", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("subprocess.run(x, text=True)", True),
        ("subprocess.run(x, encoding='utf-8')", False),
    ],
)
def test_the_lint_sees_text_in_the_locales_encoding(code: str, found: bool) -> None:
    assert bool([*calls_without_encoding(ast.parse(code))]) == found


def test_text_is_read_and_written_as_utf_8() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        if "tests" not in path.parts
        for line in calls_without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []
