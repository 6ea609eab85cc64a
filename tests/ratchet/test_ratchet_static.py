"""What the compiler made of every kernel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flashmoe
from flashmoe import _extension
from flashmoe.ratchet import cli
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.machine_code import cubins, static
from flashmoe.ratchet.machine_code.cubins import INSTRUCTIONS, Kernel
from flashmoe.ratchet.machine_code.static import Snapshot, compare
from flashmoe.ratchet.results.files import write_json

COMMITTED = Path(__file__).resolve().parents[2] / "baselines" / "static.json"

# cuobjdump's form, CUDA 13.0.
USAGE = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Zfirst:
  REG:254 STACK:32 SHARED:1024 LOCAL:0 CONSTANT[0]:500 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Function _Zfirst:
  REG:168 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:500
 Function _Zother:
  REG:16 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:500
"""
CODE = """
Fatbin elf code:
================
arch = sm_80

\tcode for sm_80
\t\tFunction : _Zfirst
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x00000a00ff017624 */
                                                                            /* 0x000fe400078e00ff */
        /*0010*/              @!P0 STL.64 [R1+0x8], R2 ;                    /* 0x00007c00000a7a13 */
        /*0020*/               @P1 LDL.64 R2, [R1+0x8] ;                    /* 0x00007c00000a7a13 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;     /* 0x00007c00000a7a13 */
        /*0040*/             @!UP2 MUFU.EX2 R4, R4 ;                        /* 0x00007c00000a7a13 */
        /*12340*/                  BRA 0x12340;                             /* 0x00007c00000a7a13 */
\t\t..........

Fatbin elf code:
================
arch = sm_90a

\t\tFunction : _Zfirst
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ; /* 0x00007c00000a7a1 */
        /*0010*/                   EXIT ;                                   /* 0x00007c00000a7a13 */
\t\tFunction : _Zother
        /*0000*/                   EXIT ;                                   /* 0x00007c00000a7a13 */
"""


def counted(**more: int) -> dict[str, int]:
    return {**dict.fromkeys(INSTRUCTIONS, 0), **more}


def test_cuobjdump_is_read() -> None:
    assert cubins.parse_usage(USAGE) == {
        ("sm_80", "_Zfirst"): (254, 32, 1024),
        ("sm_90a", "_Zfirst"): (168, 0, 0),
        ("sm_90a", "_Zother"): (16, 0, 0),
    }
    assert cubins.parse_code(CODE) == {
        ("sm_80", "_Zfirst"): (0x12350, counted(HMMA=1, MUFU=1, LDL=1, STL=1)),
        ("sm_90a", "_Zfirst"): (0x20, counted(HGMMA=1)),
        ("sm_90a", "_Zother"): (0x10, counted()),
    }


KERNEL = Kernel("sm_90a", "_Zfirst", 168, 0, 0, 4096, counted(HGMMA=32, LDL=2, STL=2))
BASE = Snapshot("13.0", "c0ffee", (KERNEL, replace(KERNEL, arch="sm_80")))


def changed(**changes: Any) -> Snapshot:
    instructions = {**KERNEL.instructions, **changes.pop("instructions", {})}
    kernel = replace(KERNEL, instructions=instructions, **changes)
    return replace(BASE, kernels=(kernel, BASE.kernels[1]))


def test_the_same_code_passes() -> None:
    comparison = compare(BASE, BASE)
    assert (comparison.exit_code, comparison.changes) == (0, ())
    assert comparison.summary == "passed (2 kernels)"


@pytest.mark.parametrize(
    ("now", "verdict", "code", "what"),
    [
        (changed(instructions={"LDL": 3}), "FAIL", 1, "LDL 2 to 3"),
        (changed(instructions={"HGMMA": 0}), "FAIL", 1, "HGMMA 32 to 0"),
        (changed(instructions={"HGMMA": 0, "HMMA": 9}), "CHANGED", 0, "HGMMA 32 to 0, HMMA 0 to 9"),
        (
            changed(registers=255, code=5120),
            "CHANGED",
            0,
            "registers 168 to 255, code 4096 to 5120",
        ),
        (changed(instructions={"LDL": 0}), "IMPROVED", 0, "LDL 2 to 0"),
    ],
)
def test_changes(now: Snapshot, verdict: str, code: int, what: str) -> None:
    comparison = compare(now, BASE)
    assert [(c.verdict, c.what) for c in comparison.changes] == [(verdict, what)]
    assert comparison.exit_code == code
    assert what in static.markdown(comparison)


SM80 = "_ZN8flashmoe4sm8024attention_forward_kernelI6__halfNS_8Sm80TileILi96ELi128ELi32ELi2ELi4EEEE"
SM90 = "_ZN8flashmoe46fwd_sm90_96_192_112_2_1_1_0_0_1_0__nv_bfloat16ENS_10Sm90ParamsE"
BACKWARD = (
    "_ZN8flashmoe60bwd_sm90_128_64_128_3_2_2_1_local_packed_attention_backward__half"
    "ENS_18Sm90BackwardParamsE"
)
LOCAL = SM90.replace("46fwd", "52fwd").replace("__nv", "_local__nv")
NARROW_V = SM90.replace("46fwd", "56fwd").replace("__nv", "_local_v64__nv")


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [
        # Q and two buffers each of K and V, 16-bit; Hopper's in rows of 128 columns, and 512 more.
        (SM80, 2 * 96 * (128 + 2 * 2 * 32)),
        (SM90, 512 + 2 * 128 * (192 + 2 * 2 * 112)),
        (LOCAL, 512 + 2 * 128 * (192 + 2 * 2 * 112)),
        (NARROW_V, 512 + 2 * 128 * (192 + 2 * 112) + 2 * 64 * 2 * 112),
        # K and V, three buffers of Q and two of dO and dS, and 256 for what is told in between.
        (BACKWARD, 256 + 256 * (2 * 128 + 64 * (3 + 2)) + 2 * 64 * 128 * 2 + 8 * 64 * 3),
        (BACKWARD.replace("attention_backward", "finish"), 0),
        ("_Zfirst", 0),
    ],
)
def test_rows_tell_the_dynamic_shared_memory(name: str, bytes_: int) -> None:
    assert static.dynamic_shared(name) == bytes_
    now = replace(BASE, kernels=(replace(KERNEL, name=name, registers=9),))
    (change,) = compare(now, replace(BASE, kernels=(replace(KERNEL, name=name),))).changes
    assert change.label.endswith(f"({bytes_} bytes of dynamic shared memory)") == bool(bytes_)


def test_symbols_spell_tiles_as_the_build_does() -> None:
    for kernel, (_, fields) in static._TILES.items():
        assert _extension.load().fields[kernel][: len(fields)] == fields
    names = {key.partition(":")[2] for key in json.loads(COMMITTED.read_text())["kernels"]}
    # What goes before and after a backward, what lists blocks or tiles, and what appends, has none.
    others = ("_prepare__", "_finish__", "list_blocks", "list_mask_tiles", "append_kernel")
    tiled = [name for name in names if not any(other in name for other in others)]
    assert all(map(static.dynamic_shared, tiled))


def test_the_committed_baseline_has_every_kind_of_kernel() -> None:
    names = json.loads(COMMITTED.read_text())["kernels"]
    for kind in (
        *(
            "fwd_sm90_",
            "Sm80Tile",
            "DecodeTile",
            "list_blocks",
            "_packed__",
            "_local__",
            "_softcap",
        ),
        *("_attention_backward__", "_packed_attention_backward__", "_local_attention_backward__"),
    ):
        assert any(kind in name for name in names), kind


def test_kernels_missing_or_extra_and_other_compilers_are_4() -> None:
    fewer = replace(BASE, kernels=BASE.kernels[:1])
    for now, then, what in ((fewer, BASE, "missing from"), (BASE, fewer, "not in the baseline")):
        comparison = compare(now, then)
        assert comparison.exit_code == 4
        assert what in comparison.changes[0].what
    other = compare(replace(BASE, compiler="13.1"), BASE)
    assert other.exit_code == 4
    assert other.problems == ("compiled by CUDA 13.1, the baseline by 13.0",)


def test_a_snapshot_is_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "static.json", static.to_json(BASE))
    loaded = static.load(tmp_path / "static.json")
    assert (loaded.compiler, set(map(repr, loaded.kernels))) == (
        "13.0",
        set(map(repr, BASE.kernels)),
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", 9, "schema must be 1, got 9"),
        ("columns", "x", "columns must be"),
        ("kernels", {}, "kernels is empty"),
        ("kernels", {"a": [1] * 9}, "must be ARCH:NAME with 9 numbers"),
        ("kernels", {"sm:a": [1] * 8}, "must be ARCH:NAME with 9 numbers"),
        ("kernels", {"sm:a": [float("nan")] * 9}, "must be ARCH:NAME with 9 numbers"),
    ],
)
def test_damage_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = tmp_path / "static.json"
    path.write_text(json.dumps({**static.to_json(BASE), key: value}))
    with pytest.raises(UserError, match=rf"static\.json is damaged: .*{message}"):
        static.load(path)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An extension of which cuobjdump tells USAGE and CODE."""
    texts = {"-res-usage": USAGE, "-sass": CODE}
    monkeypatch.setattr(cubins, "_dump", lambda extension, what: texts[what])
    path = tmp_path / "_C.abi3.so"
    path.write_bytes(b'\x00{"cuda_version": "13.0"}\x00')
    return path


def test_the_command(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline, report = tmp_path / "static.json", tmp_path / "report.md"
    command = ["static", "--extension", str(built), "--baseline", str(baseline)]
    assert cli.main(command) == 2
    assert "there is no baseline" in capsys.readouterr().err
    assert cli.main([*command, "--update"]) == 0
    assert cli.main([*command, "--report", str(report)]) == 0
    assert report.read_text().startswith("### ✅ flashmoe static ratchet passed (3 kernels)")

    data = json.loads(baseline.read_text())
    spills = data["columns"].split().index("LDL")
    data["kernels"]["sm_80:_Zfirst"][spills] = 0
    baseline.write_text(json.dumps(data))
    assert cli.main([*command, "--update"]) == 1
    assert "it takes no kernel that got worse" in capsys.readouterr().out
    data["kernels"]["sm_80:_Zfirst"][spills] = 5
    baseline.write_text(json.dumps(data))
    assert cli.main([*command, "--update"]) == 0
    assert "updated: 1 kernels" in capsys.readouterr().out
    assert cli.main(command) == 0

    built.write_bytes(b'\x00{"cuda_version": "13.1"}\x00')
    assert cli.main([*command, "--update"]) == 4
    assert "updated: 0 kernels, now of CUDA 13.1 after 13.0" in capsys.readouterr().out
    assert cli.main(command) == 0


def test_an_extension_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "_C.abi3.so"
    assert cli.main(["static", "--extension", str(path)]) == 2
    assert "there is no extension" in capsys.readouterr().err
    path.write_bytes(b"\x7fELF")
    assert cli.main(["static", "--extension", str(path)]) == 2
    assert "tells no cuda_version" in capsys.readouterr().err


def test_the_installed_extension_is_read_whole() -> None:
    """Usage and code name the same kernels: what cuobjdump says today is still understood."""
    (extension,) = Path(flashmoe.__file__).parent.glob("_C*.so")
    if not cubins.compiler(extension):
        pytest.skip("this build has no CUDA kernels")
    usage = cubins.parse_usage(cubins._dump(extension, "-res-usage"))
    assert len(usage) >= 50
    assert all(0 < registers <= 255 for registers, _, _ in usage.values())
