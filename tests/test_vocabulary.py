"""Problem, Tile, Arch: the vocabulary everything else speaks."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe import _extension
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import Arch
from flashmoe.spec.mask import CAUSAL, Mask, causal_if
from flashmoe.spec.problem import DTYPE_BYTES, Problem
from flashmoe.tiles import (
    SM80_HEAD_DIMS,
    Tile,
    grid,
    instance_head_dim,
    sm80_smem_bytes,
    sm90_bwd_smem_bytes,
    sm90_registers,
    sm90_smem_bytes,
)

H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
L4 = Arch("cuda", "NVIDIA L4", (8, 9), 58, 101376)
A100 = Arch("cuda", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912)
RTX5090 = Arch("cuda", "NVIDIA GeForce RTX 5090", (12, 0), 170, 101376)
CPU = Arch("cpu", "a cpu")
PROBLEM = Problem(32, 8, 8, 512, 512, 64, "bfloat16")
ROOT = Path(__file__).resolve().parent.parent


def test_flops_and_bytes():
    assert PROBLEM.flops == 4 * 32 * 8 * 512 * 512 * 64
    assert replace(PROBLEM, mask=CAUSAL).flops == 4 * 32 * 8 * (512 * 513 // 2) * 64
    assert replace(PROBLEM, direction="bwd").flops == PROBLEM.flops * 2.5
    tensor = 32 * 512 * 8 * 64 * 2
    assert PROBLEM.bytes == 4 * tensor + 32 * 8 * 512 * 4
    assert replace(PROBLEM, direction="bwd").bytes == 8 * tensor + 32 * 8 * 512 * 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch", -1, r"batch must be an integer from 0 to 2\*\*63 - 1, got -1"),
        ("heads_q", 0, r"heads_q must be an integer from 1 to 2\*\*63 - 1, got 0"),
        ("heads_kv", 3, r"heads_q must be a multiple of heads_kv \(3\), got 8"),
        ("head_dim", 12, "head_dim must be a multiple of 8 and at most 256, got 12"),
        ("head_dim", 264, "head_dim must be a multiple of 8 and at most 256, got 264"),
        ("dtype", "float64", "dtype must be one of float32, float16, bfloat16, got 'float64'"),
        ("direction", "sideways", "direction must be one of fwd, bwd, got 'sideways'"),
        ("seqlen_q", 1.5, "seqlen_q must be an integer"),
        ("seqlen_kv", 2**63, r"seqlen_kv must be an integer from 0 to 2\*\*63 - 1, got 92233"),
        ("batch", True, "batch must be an integer .*, got True"),
        ("head_dim", 64.0, "head_dim must be an integer .*, got 64.0"),
        ("mask", False, "mask must be a Mask, got False"),
        ("dtype", ["float32"], r"dtype must be one of .*, got \['float32'\]"),
    ],
)
def test_problem_errors(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(PROBLEM, **{field: value})


problems = st.builds(
    Problem,
    batch=st.integers(0, 300),
    heads_q=st.sampled_from([8, 16]),
    heads_kv=st.sampled_from([1, 2, 8]),
    seqlen_q=st.integers(0, 9000),
    seqlen_kv=st.integers(0, 9000),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    mask=st.builds(Mask, st.integers(-1, 9000), st.integers(-1, 9000)),
    direction=st.sampled_from(["fwd", "bwd"]),
)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(-1, 50), st.integers(-1, 50))
def test_flops_count_what_each_query_sees(seqlen_q, seqlen_kv, left, right):
    mask = Mask(left, right)
    pairs = mask.pairs(seqlen_q, seqlen_kv)
    problem = Problem(3, 4, 2, seqlen_q, seqlen_kv, 8, "float32", mask=mask)
    assert problem.mask == mask.reduced(seqlen_q, seqlen_kv)
    assert problem.flops == 4 * 3 * 4 * 8 * pairs
    assert replace(problem, direction="bwd").flops == 10 * 3 * 4 * 8 * pairs


@given(problems)
def test_only_empty_problems_have_no_flops(problem):
    assert bool(problem.flops) == bool(problem.batch and problem.seqlen_q and problem.seqlen_kv)
    assert isinstance(problem.flops, int)


@given(problems)
def test_problem_survives_json(problem):
    assert Problem.from_json(problem.to_json()) == problem


def test_problem_json_errors():
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        Problem.from_json({**PROBLEM.to_json(), "colour": 1})
    with pytest.raises(ValueError, match="incomplete"):
        Problem.from_json({"batch": 1})


@given(problems, problems)
def test_one_bucket_never_mixes_what_changes_a_kernel(a, b):
    if a.bucket == b.bucket:
        for field in ("direction", "dtype", "mask", "head_dim"):
            assert getattr(a, field) == getattr(b, field)
        assert a.heads_q // a.heads_kv == b.heads_q // b.heads_kv
        assert max(a.seqlen_kv, 1) < 2 * max(b.seqlen_kv, 1)


tiles = st.builds(
    Tile,
    kernel=st.sampled_from(["cpu", "sm80", "sm90", "triton"]),
    block_m=st.integers(1, 512),
    block_n=st.integers(1, 512),
    num_stages=st.integers(1, 6),
    num_warps=st.integers(1, 16),
    tma=st.booleans(),
    q_stages=st.integers(1, 3),
    pingpong=st.booleans(),
    q_in_registers=st.booleans(),
    exp2_fma=st.integers(0, 16),
    ctas_per_sm=st.integers(1, 3),
    serial=st.booleans(),
)


@given(tiles)
def test_tile_text_round_trips(tile):
    assert Tile.parse(str(tile)) == tile


def test_tile_text_names_what_the_kernel_has():
    assert str(Tile("sm80", 128, 64, 2, 4)) == "sm80:128x64-stages2-warps4"
    tile = Tile("sm90", 192, 80, 2, pingpong=True)
    assert str(tile) == "sm90:192x80-stages2-q1-pingpong-fma0-ctas1"
    assert Tile.parse("sm90:192x80-stages2-pingpong") == tile


@pytest.mark.parametrize(
    "text",
    [
        "sm90:64",
        "sm90:64x64-stages",
        "sm90:64x64-pingpong1",
        "sm90:64x64-colour3",
        "sm90:64x64-stages2-stages2",
        "sm70:64x64",
    ],
)
def test_tile_text_errors(text):
    with pytest.raises(ValueError, match=rf"KERNEL:MxN\[-stagesS\].*sm90.*got '{text}'"):
        Tile.parse(text)


@given(tiles, problems)
def test_violations_are_sentences(tile, problem):
    for arch in (H200, L4, CPU):
        assert all(isinstance(reason, str) and reason for reason in tile.violations(arch, problem))


def test_violations_name_the_limit():
    big = Tile("sm80", 128, 128, 4, 4)
    assert big.violations(H200, PROBLEM) == []
    assert any("shared memory of 147456 bytes" in x for x in big.violations(L4, PROBLEM))
    wide = replace(PROBLEM, head_dim=256)
    assert any("registers" in x for x in Tile("sm80", 128, 64, 1, 4).violations(H200, wide))
    assert Tile("sm80", 128, 64, 2, 4).violations(CPU, PROBLEM)
    assert Tile("cpu", 64, 64).violations(H200, PROBLEM)
    single = replace(PROBLEM, dtype="float32")
    assert any("dtype" in x for x in Tile("sm80", 128, 64, 2, 4).violations(H200, single))
    assert Tile("magic", 1, 1).violations(H200, PROBLEM)


@pytest.mark.parametrize(
    ("tile", "changes", "arch", "reason"),
    [
        ("triton:48x64-stages2-warps4", {}, H200, "block_m must be a power of two from 16 to 256"),
        ("triton:64x512-stages1-warps8", {}, H200, "block_n must be a power of two .*, got 512"),
        ("triton:256x64-stages1-warps8", {"direction": "bwd"}, H200, "16 to 128 for .*, got 256"),
        ("triton:64x32-stages1-warps8", {"dtype": "float32"}, H200, "16 to 32 for .*, got 64"),
        ("triton:64x64-stages6-warps4", {}, H200, "num_stages must be from 1 to 5, got 6"),
        ("triton:64x64-stages2-warps2", {}, H200, "num_warps must be 4 or 8, got 2"),
        ("triton:64x64-stages2-warps4-tma", {}, L4, r"tma needs .* 9.0, got \(8, 9\)"),
        (
            "triton:32x32-stages2-warps4-tma",
            {"dtype": "float32"},
            H200,
            "tma needs a 16-bit dtype, got float32",
        ),
        (
            "triton:64x64-stages3-warps4",
            {"head_dim": 72},
            L4,
            "shared memory of 115712 bytes exceeds the 101376 of NVIDIA L4",
        ),
        (
            "triton:64x64-stages2-warps4",
            {"direction": "bwd", "head_dim": 128},
            L4,
            "registers: fragments take 256 a thread, at most 208",
        ),
        ("triton:64x128-stages1-warps4", {"head_dim": 256}, H200, "take 224 a thread, at most 192"),
        ("triton:64x64-stages2-warps4", {}, replace(L4, capability=(7, 5)), r"8.0, got \(7, 5\)"),
    ],
)
def test_triton_rules(tile, changes, arch, reason):
    """The reason given is the only one."""
    (given,) = Tile.parse(tile).violations(arch, replace(PROBLEM, **changes))
    assert re.search(reason, given)


@pytest.mark.parametrize(
    ("tile", "changes", "arch", "reason"),
    [
        ("64x64", {}, A100, r"compute capability 9.x, got \(8, 0\)"),
        ("64x64", {}, RTX5090, r"compute capability 9.x, got \(12, 0\)"),
        ("64x64", {"direction": "bwd"}, H200, "no backward"),
        ("64x64", {"dtype": "float32"}, H200, "dtype must be float16 or bfloat16 .*, got float32"),
        ("96x64", {}, H200, "block_m must be 64, 128, 192 or 256, got 96"),
        ("64x72", {}, H200, "block_n must be a multiple of 16 from 32 to 256, got 72"),
        ("64x272", {}, H200, "block_n must be a multiple of 16 from 32 to 256, got 272"),
        ("64x64-stages5", {}, H200, "num_stages must be from 1 to 4, got 5"),
        ("64x64-q3", {}, H200, "q_stages must be from 1 to 2, got 3"),
        ("64x64-fma9", {}, H200, "exp2_fma must be from 0 to 8, got 9"),
        ("64x64-ctas3", {}, H200, "ctas_per_sm must be from 1 to 2, got 3"),
        ("64x64-pingpong", {}, H200, "pingpong needs two groups of 64 rows, got block_m 64"),
        ("64x64-q2-serial", {}, H200, "serial needs one buffer of Q or block_m 256, got q_stages"),
        ("64x64-qreg-serial", {}, H200, "serial with Q in registers needs block_n other than head"),
        ("64x64-qreg-serial", {"head_dim": 56}, H200, "block_n other than head_dim 64"),
        ("64x64-warps8", {}, H200, "num_warps must be 1 for the sm90 kernel, got 8"),
        ("64x64-tma", {}, H200, "tma must be False for the sm90 kernel, got True"),
        (
            "128x128-stages4",
            {"head_dim": 128},
            H200,
            "shared memory of 295424 bytes exceeds the 232448 of NVIDIA H200",
        ),
        ("64x144-stages3-ctas2", {}, H200, "of 119296 bytes each exceeds the 115712"),
        ("192x112-stages1", {"head_dim": 128}, H200, "a thread needs 176, and 160 are there"),
        ("192x112-fma1", {"head_dim": 96}, H200, "a thread needs 164, and 160 are there"),
        ("192x80-qreg", {"head_dim": 128}, H200, "a thread needs 188, and 160 are there"),
        ("192x48", {"head_dim": 192}, H200, "a thread needs 164, and 160 are there"),
        (
            "64x32-stages1-ctas2",
            {"head_dim": 256},
            H200,
            "a wgmma of 256 columns needs 158, and a thread starts with 128",
        ),
    ],
)
def test_sm90_rules(tile, changes, arch, reason):
    """The reason given is the only one."""
    (given,) = Tile.parse(f"sm90:{tile}").violations(arch, replace(PROBLEM, **changes))
    assert re.search(reason, given)


def test_the_fastest_triton_tiles_are_legal_on_an_h200():
    for head_dim, direction, tile in (
        (64, "fwd", "triton:64x128-stages2-warps4-tma"),
        (128, "fwd", "triton:64x64-stages3-warps4-tma"),
        (128, "bwd", "triton:64x64-stages2-warps4-tma"),
        (128, "bwd", "triton:64x128-stages3-warps8"),
    ):
        problem = replace(PROBLEM, head_dim=head_dim, direction=direction)
        assert Tile.parse(tile).violations(H200, problem) == []
        assert Tile.parse(tile) in BACKENDS["triton"].tiles(problem, H200)


@pytest.mark.parametrize("arch", [H200, A100, L4, RTX5090, CPU], ids=lambda arch: arch.name)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_triton_defaults_and_search_spaces_are_legal(arch, direction, dtype):
    triton = BACKENDS["triton"]
    for head_dim in range(8, 257, 8):
        for causal in (False, True):
            for seqlen in (1, 4096):
                problem = Problem(
                    1, 1, 1, seqlen, seqlen, head_dim, dtype, causal_if(causal), direction
                )
                default, space = triton.default_tile(problem, arch), triton.tiles(problem, arch)
                assert default.violations(arch, problem) == []
                assert default in space
        assert all(tile.violations(arch, problem) == [] for tile in space)


def test_every_compiled_tile_is_legal_on_an_h200():
    for (kernel, head_dim, variant), compiled in _extension.load().instances.items():
        own = variant.head_dim_v or None
        problem = replace(PROBLEM, head_dim=head_dim, head_dim_v=own)
        for tile in compiled:
            assert tile.kernel == kernel
            assert tile.violations(H200, problem) == []


def test_every_compiled_backward_tile_is_legal_on_an_h200():
    for (_, head_dim, _), compiled in _extension.load().backward_instances.items():
        problem = replace(PROBLEM, head_dim=head_dim, direction="bwd")
        for tile in compiled:
            assert tile.kernel == "sm90_bwd"
            assert tile.violations(H200, problem) == []


def test_python_and_cpp_agree_on_shared_memory_and_registers():
    """tile.h states the same two formulas; read them rather than trust a comment."""
    text = (ROOT / "csrc" / "forward" / "sm80" / "tile.h").read_text()

    def expression(name):
        return re.search(rf"{name} =\s*([^;]+);", text)[1].replace("/", "//")

    for tile in grid(
        "sm80", block_m=(64, 128), block_n=(32, 64), num_stages=(1, 3), num_warps=(4,)
    ):
        for head_dim in SM80_HEAD_DIMS:
            names = {
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "NUM_STAGES": tile.num_stages,
                "HEAD_DIM": head_dim,
                "M_TILES": tile.block_m // tile.num_warps // 16,
            }
            for name in ("Q_ELEMENTS", "KV_ELEMENTS", "SMEM_BYTES", "SO_REGISTERS"):
                names[name] = eval(expression(name), {}, names)
            assert names["SMEM_BYTES"] == sm80_smem_bytes(tile, head_dim)
            roomy = replace(H200, smem_per_block=1 << 30)
            reasons = tile.violations(roomy, replace(PROBLEM, head_dim=head_dim))
            limit = int(re.search(r"SO_REGISTERS <= (\d+)", text)[1])
            assert bool(reasons) == (names["SO_REGISTERS"] > limit)


CXX = shutil.which("c++") or shutil.which("g++")
INCLUDES = ("-I", str(ROOT / "csrc"))
HEADER = f'#include "{ROOT}/csrc/forward/sm90/tile.h"\n'


def sm90_initializer(tile: Tile, head_dim: int, head_dim_v: int = 0) -> str:
    fields = _extension.load().fields["sm90"]
    values = (head_dim, *(getattr(tile, name) for name in fields), head_dim_v)
    return "flashmoe::Sm90Tile{" + ", ".join(str(value).lower() for value in values) + "}"


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_python_and_cpp_agree_on_the_numbers_of_sm90(tmp_path):
    space = [
        (dims, Tile("sm90", m, n, stages, 1, False, q, False, q_regs, 3, ctas, serial))
        for dims in ((16, 0), (64, 0), (80, 0), (128, 0), (256, 0), (192, 128), (64, 80), (80, 256))
        for m, n in ((64, 32), (128, 176), (192, 80), (256, 64))
        for stages, q, q_regs, ctas, serial in (
            (1, 1, False, 1, False),
            (3, 2, True, 1, False),
            (2, 1, False, 2, True),
        )
    ]
    array = ", ".join(sm90_initializer(tile, *dims) for dims, tile in space)
    (tmp_path / "numbers.cpp").write_text(
        f"#include <cstdio>\n#include <initializer_list>\n{HEADER}"
        f"int main() {{\n  for (const auto& t : {{{array}}}) {{\n"
        '    std::printf("%d %d %d\\n", t.smem_bytes(), t.needed_registers(), '
        "t.consumer_registers());\n  }\n}\n"
    )
    program = tmp_path / "numbers"
    subprocess.run(
        [CXX, "-std=c++20", *INCLUDES, tmp_path / "numbers.cpp", "-o", program], check=True
    )
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    for line, (dims, tile) in zip(said.splitlines(), space, strict=True):
        expected = (sm90_smem_bytes(tile, *dims), *sm90_registers(tile, *dims))
        assert tuple(map(int, line.split())) == expected, (dims, tile)


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("head_dim", "tile", "message"),
    [
        (128, "128x128-stages2", ""),
        (256, "128x80-stages2-pingpong", ""),
        (96, "256x64-stages4-serial", ""),
        (64, "64x64-q2-serial", "serial: "),
        (128, "96x64", "block_m: "),
        (128, "64x72", "block_n: "),
        (64, "64x64-stages5", "num_stages: "),
        (64, "64x64-q3", "q_stages: "),
        (64, "64x64-pingpong", "pingpong: "),
        (64, "64x64-fma9", "exp2_fma: "),
        (64, "64x64-ctas3", "ctas_per_sm: "),
        (128, "128x128-stages4", "shared memory"),
        (64, "64x144-stages3-ctas2", "shared memory"),
        (128, "192x112-stages1", "registers"),
        (256, "64x32-stages1-ctas2", "registers at entry"),
    ],
)
def test_cpp_asserts_what_python_calls_illegal(head_dim, tile, message, tmp_path):
    tile = Tile.parse(f"sm90:{tile}")
    assert bool(tile.violations(H200, replace(PROBLEM, head_dim=head_dim))) == bool(message)
    unit = tmp_path / "tile.cpp"
    initializer = sm90_initializer(tile, head_dim)
    unit.write_text(f"{HEADER}template struct flashmoe::LegalSm90Tile<{initializer}>;\n")
    done = subprocess.run(
        [CXX, "-std=c++20", *INCLUDES, "-fsyntax-only", unit], capture_output=True, text=True
    )
    assert (done.returncode == 0) == (not message)
    assert message in done.stderr


@pytest.mark.parametrize(("head_dim", "instance"), [(8, 32), (64, 64), (80, 96), (200, 256)])
def test_instance_head_dim(head_dim, instance):
    assert instance_head_dim(head_dim) == instance


BACKWARD_TILES = [
    (head_dim, Tile("sm90_bwd", m, n, q, do_stages=do, ds_stages=ds, late_dq=late))
    for head_dim, m, n in ((64, 128, 128), (96, 64, 128), (128, 64, 128), (256, 64, 64))
    for q, do, ds, late in ((2, 2, 1, False), (3, 2, 2, True), (4, 4, 2, False))
]


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_python_and_cpp_agree_on_the_backward_tiles(tmp_path):
    """Shared memory, and what is legal: one program that the compiler must refuse where Python
    does."""
    fields = _extension.load().fields["sm90_bwd"]
    header = f'#include "{ROOT}/csrc/backward/sm90/tile.h"\n'

    def initializer(head_dim, tile):
        values = (head_dim, *(getattr(tile, name) for name in fields))
        return "{" + ", ".join(str(value).lower() for value in values) + "}"

    lines = [
        f'  std::printf("%d\\n", flashmoe::Sm90BackwardTile{initializer(d, tile)}.smem_bytes());\n'
        for d, tile in BACKWARD_TILES
    ]
    source = tmp_path / "numbers.cpp"
    source.write_text(f"#include <cstdio>\n{header}int main() {{\n{''.join(lines)}}}\n")
    program = tmp_path / "numbers"
    subprocess.run([CXX, "-std=c++20", *INCLUDES, source, "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    legal = {}
    for smem, (head_dim, tile) in zip(said, BACKWARD_TILES, strict=True):
        assert sm90_bwd_smem_bytes(tile, head_dim) == int(smem)
        problem = replace(PROBLEM, head_dim=head_dim, direction="bwd")
        legal[head_dim, tile] = not tile.violations(H200, problem)
    assert len(set(legal.values())) == 2, "both kinds must be among them"
    for (head_dim, tile), expected in legal.items():
        legal_tile = f"LegalSm90BackwardTile<{initializer(head_dim, tile)}>"
        source.write_text(f"{header}template struct flashmoe::{legal_tile};")
        command = [CXX, "-std=c++20", *INCLUDES, "-fsyntax-only", source]
        done = subprocess.run(command, capture_output=True, check=False)
        assert (done.returncode == 0) == expected, (head_dim, str(tile))
