"""The tables of fields (flashmoe/tiles) against what follows them by hand: the C++ structs and the
lists of compiled-in tiles."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from flashmoe import _extension
from flashmoe.tiles import FAMILIES, FLAGS, Tile, Variant, columns, variant

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CXX = shutil.which("c++") or shutil.which("g++")


def declared(path: str, struct: str) -> list[tuple[str, str]]:
    """(type, name) of the ints and bools that a struct begins with, in its order."""
    text = (CSRC / path).read_text(encoding="utf-8")
    body = re.search(rf"^struct {struct} {{\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert body is not None
    return [
        (kind, name.partition("=")[0].strip())
        for kind, names in re.findall(r"^  (int|bool) ([^;]+);", body[1], re.MULTILINE)
        for name in names.split(",")
    ]


@pytest.mark.parametrize(
    ("kernel", "path", "struct"),
    [
        ("sm90", "forward/sm90/tile.h", "Sm90Tile"),
        ("sm90_bwd", "backward/sm90/tile.h", "Sm90BackwardTile"),
    ],
)
def test_structs_have_the_fields_of_the_table(kernel: str, path: str, struct: str) -> None:
    own = ("head_dim_v",) if kernel in variant.OWN_HEAD_DIM_V else ()
    expected = [("bool" if name in FLAGS else "int", name) for name in (*columns(kernel), *own)]
    assert declared(path, struct) == [("int", "head_dim"), *expected]


@pytest.mark.parametrize(
    ("kernel", "path", "struct"),
    [("sm80", "forward/sm80/tile.h", "Sm80Tile"), ("decode", "decode/tile.h", "DecodeTile")],
)
def test_templates_have_the_fields_of_the_table(kernel: str, path: str, struct: str) -> None:
    text = (CSRC / path).read_text(encoding="utf-8")
    names = [name.upper() for name in ("head_dim", *columns(kernel))]
    parameters = re.search(rf"template <([^>]*)>\nstruct {struct} {{", text)
    assert parameters is not None
    assert re.findall(r"int (\w+)_", parameters[1]) == names
    found = dict(re.findall(r"static constexpr int (\w+) = (\w+);", text))
    assert {name: found[name] for name in names} == {name: f"{name}_" for name in names}


def test_the_variant_has_the_fields_of_the_table() -> None:
    names = variant.FLAGS
    assert declared("common/variant.h", "Variant") == [("bool", name) for name in names]
    for table in (variant.COMPILED, variant.RUNTIME):
        assert {*table} <= {*FAMILIES}
        assert {name for some in table.values() for name in some} <= {*names}


@pytest.mark.parametrize("path", sorted((CSRC / "instances").glob("*.txt")), ids=lambda p: p.stem)
def test_lists_name_their_columns(path: Path) -> None:
    kernel = "sm90" if path.stem == "covering" else path.stem
    lines = path.read_text(encoding="utf-8").splitlines()
    heads = [line for line in lines if line.startswith("# head_dim")]
    assert heads == [" ".join(("# head_dim", *columns(kernel)))]


@pytest.mark.parametrize("kernel", FAMILIES)
def test_columns_are_fields_in_their_order(kernel: str) -> None:
    family = FAMILIES[kernel]
    names = [field.name for field in fields(Tile)]
    for some in (family.columns, family.at_launch):
        assert list(some) == [name for name in names if name in some]


PROGRAM = """\
#include <cstdio>
#include "backward/sm90/tile.h"
#include "forward/sm90/tile.h"
template <typename T>
T read() {
  T x;
  return std::fread(&x, 1, sizeof x, stdin) == sizeof x ? x : T{};
}
int main() {
  const auto t = read<flashmoe::Sm90Tile>();
  std::printf("%d %d %d %d %d %d %d %d %d %d\\n", t.head_dim, t.block_m, t.block_n, t.num_stages,
              t.q_stages, t.pingpong, t.q_in_registers, t.exp2_fma, t.ctas_per_sm, t.serial);
  const auto b = read<flashmoe::Sm90BackwardTile>();
  std::printf("%d %d %d %d %d %d %d\\n", b.head_dim, b.block_m, b.block_n, b.num_stages,
              b.do_stages, b.ds_stages, b.late_dq);
  const auto v = read<flashmoe::Variant>();
  std::printf("%d %d %d %d\\n", v.local, v.dropout, v.packed, std::getchar() == EOF);
}
"""


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_cpp_reads_the_structs_that_python_writes(tmp_path: Path) -> None:
    source, program = tmp_path / "structs.cpp", tmp_path / "structs"
    source.write_text(PROGRAM, encoding="utf-8")
    subprocess.run([str(CXX), "-std=c++20", "-I", CSRC, source, "-o", program], check=True)
    forward = Tile("sm90", 128, 176, 2, pingpong=True, exp2_fma=5, ctas_per_sm=2, serial=True)
    backward = Tile("sm90_bwd", 64, 128, 3, do_stages=2, ds_stages=4, late_dq=True)
    structs = (
        _extension.tile_struct(forward, 96),
        _extension.tile_struct(backward, 80),
        _extension.variant_struct(Variant(local=True, packed=True)),
    )
    given = b"".join(map(bytes, structs))
    said = subprocess.run([program], input=given, capture_output=True, check=True).stdout.decode()
    assert said == "96 128 176 2 1 1 0 5 2 1\n80 64 128 3 2 4 1\n1 0 1 1\n"
