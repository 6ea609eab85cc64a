"""The lists of compiled-in tiles (csrc/instances), and what the build makes of a line."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
LINE = "64 128 64 3 1 0 0 0 2 1"


@pytest.fixture
def build_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with lists of this test's."""
    spec = importlib.util.spec_from_file_location("build_config", CSRC / "build_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_config", module)
    spec.loader.exec_module(module)
    shutil.copytree(CSRC / "ptx", tmp_path / "ptx")
    (tmp_path / "instances").mkdir()
    (tmp_path / "torch_ops.cpp").touch()
    for room in ("common", "forward", "backward"):
        (tmp_path / room).mkdir()
    lists = {
        "sm80": "64 128 64 2 4\n",
        "sm90": f"{LINE}\n{LINE} local  # of windows\n",
        "sm90_bwd": "64 128 128 3 3 2 1 local deterministic\n",
    }
    for kernel in module.INSTANCE_FIELDS:
        path = tmp_path / "instances" / f"{kernel}.txt"
        path.write_text(lists.get(kernel, ""), encoding="utf-8")
    monkeypatch.setattr(module, "CSRC", tmp_path)
    return module


def test_a_line_may_name_its_variant(build_config: ModuleType) -> None:
    sm80, plain, local, backward = build_config.instances()
    assert backward.symbol == "bwd_sm90_64_128_128_3_3_2_1_local_deterministic"
    assert sm80.variants == [()]
    general = sm80._replace(is_general=True)  # it decides at run time
    assert general.symbol == sm80.symbol + "_general"
    assert len(general.variants) == 2**5 - 1
    assert {("local",), ("softcap", "alibi"), general.computes} <= {*general.variants}
    assert plain.variants == [()]
    assert local.variants == [("local",)]
    assert plain.to_json() == local.to_json()
    assert local.symbol == plain.symbol + "_local"


def test_a_line_may_end_with_the_head_dim_of_v(build_config: ModuleType, tmp_path: Path) -> None:
    path = build_config.CSRC / "instances" / "sm90.txt"
    path.write_text(f"{LINE} local v32\n", encoding="utf-8")
    (found,) = (x for x in build_config.instances() if x.kernel == "sm90")
    assert (found.variant, found.flags, found.head_dim_v) == (("local", "v32"), ("local",), 32)
    assert found.symbol == "fwd_sm90_64_128_64_3_1_0_0_0_2_1_local_v32"
    generated = build_config.generate(tmp_path / "generated", ("90",), "13.0")
    text = generated.registry.read_text(encoding="utf-8")
    tile = "{64, 128, 64, 3, 1, false, false, 0, 2, true, 32}"
    assert f"nullptr, {tile}, {{.local = true}}, {{{found.symbol}[0]" in text
    info = json.loads(re.search(r'R"\((.*)\)"', text)[1])  # type: ignore[index]
    assert ["local", "v32"] in [y for x in info["instances"] for y in x["variants"]]
    source = generated.instances["sm90"][0].read_text(encoding="utf-8")
    assert f"constexpr Sm90Tile {found.symbol}_tile{tile};" in source
    assert f"constexpr Variant {found.symbol}_variant{{.local = true}};" in source


@pytest.mark.parametrize(
    ("kernel", "line", "message"),
    [
        (
            "sm90",
            f"{LINE} paged",
            r"sm90.txt:1: expected local, .* behind the columns, got '.* paged'",
        ),
        ("sm90", f"{LINE} local local", "sm90.txt:1: expected local, .* behind"),
        ("sm90", f"{LINE} 1", "sm90.txt:1: expected local, .* behind"),
        ("sm90", "64 128 local", "sm90.txt:1: expected integers for head_dim, block_m"),
        ("sm90", f"{LINE} v32 local", "sm90.txt:1: expected local, .* behind"),
        ("sm80", "64 128 64 2 4 local", "sm80.txt:1: expected nothing behind"),
        ("sm80", "64 128 64 2 4 v32", "sm80.txt:1: expected nothing behind"),
        (
            "sm90_bwd",
            "64 128 128 3 3 2 1 deterministic local",
            "expected local, deterministic, softcap, alibi, dropout, mask, whole, packed be",
        ),
    ],
)
def test_a_bad_line_is_named(
    build_config: ModuleType, kernel: str, line: str, message: str
) -> None:
    (build_config.CSRC / "instances" / f"{kernel}.txt").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        build_config.instances()


def test_kernels_are_registered_with_what_they_can_do(
    build_config: ModuleType, tmp_path: Path
) -> None:
    found = build_config.generate(tmp_path / "generated", ("90",), "13.0")
    text = found.registry.read_text(encoding="utf-8")
    variants = [
        re.search(r"(\{[^{}]*\}), \{[^{}]*\}\},$", row)
        for row in text.splitlines()
        if row.startswith("    {64, ")
    ]
    assert [match and match[1] for match in variants] == [
        "{}",
        "{}",
        "{.local = true}",
        "{.local = true, .softcap = true, .alibi = true, .sink = true, .dropout = true}",
    ]
    info = json.loads(re.search(r'R"\((.*)\)"', text)[1])  # type: ignore[index]
    *listed, general = (x["variants"] for x in info["instances"])
    assert listed == [[[]], [[]], [["local"]]]
    assert ["local", "sink"] in general
    assert [] not in general
    (sm80,) = (path.read_text(encoding="utf-8") for path in found.instances["sm80"])
    plain, general = sm80.split("#include")[1:]
    assert "Sm80Tile<64, 128, 64, 2, 4>, true, false>" in plain
    assert "Sm80Tile<64, 128, 64, 2, 4>, true, true>" in general
    assert "Sm80Tile<64, 128, 64, 2, 4>, false, true>" in general
    assert "late_dq" in info["backward_instances"][0]
    assert "{64, 128, 128, 3, 3, 2, true}, {.local = true, .deterministic = true}, {" in text
    (backward,) = (path.read_text(encoding="utf-8") for path in found.instances["sm90_bwd"])
    name = "bwd_sm90_64_128_128_3_3_2_1_local_deterministic"
    assert f"attention_backward<__half, {name}_tile, {name}_variant>" in backward
    instances, schedule, mask_tiles = found.instances["sm90"]
    assert (schedule.name, mask_tiles.name) == ("schedule.cu", "mask_tiles.cu")
    plain, local = instances.read_text(encoding="utf-8").split("#include")[1:]
    name = "fwd_sm90_64_128_64_3_1_0_0_0_2_1"
    assert f"constexpr Variant {name}_variant{{}};" in plain
    assert f"constexpr Variant {name}_local_variant{{.local = true}};" in local
    assert f"attention_forward<__half, {name}_tile, {name}_variant>" in plain


def test_instances_share_files_and_each_is_in_one(build_config: ModuleType, tmp_path: Path) -> None:
    lines = "".join(f"64 128 {n} 3 1 0 0 0 2 1\n" for n in range(32, 129, 16))
    (build_config.CSRC / "instances" / "sm90.txt").write_text(lines, encoding="utf-8")
    found = build_config.generate(tmp_path / "generated", ("90",), "13.0").instances["sm90"]
    texts = [path.read_text(encoding="utf-8") for path in found if path.stem.startswith("sm90_")]
    counts = [text.count("constexpr Sm90Tile") for text in texts]
    assert counts == [build_config.INSTANCES_A_FILE] * 2 + [7 - 2 * build_config.INSTANCES_A_FILE]
    symbols = re.findall(r"constexpr Sm90Tile (\w+)_tile", "".join(texts))
    assert symbols == [x.symbol for x in build_config.instances() if x.kernel == "sm90"]


def test_machine_code_comes_from_the_oldest_ptx(build_config: ModuleType) -> None:
    flags = build_config.gencode("sm80", ("90a", "80", "100f"))
    codes = [flag.removeprefix("-gencode=arch=compute_80,code=") for flag in flags]
    assert codes == ["sm_80", "sm_90", "sm_100", "compute_80"]
    assert build_config.gencode("sm90", ("90",)) == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert not build_config.gencode("sm90", ("80",))
    assert not build_config.gencode("decode", ())
