"""The decode kernel's tiles, backend and plans, as far as they can be judged without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashmoe.planning.plan
from flashmoe import _extension
from flashmoe.backends import BACKENDS
from flashmoe.backends.base import BATCH_INVARIANT
from flashmoe.machine.device import Arch
from flashmoe.planning import plan
from flashmoe.spec.mask import CAUSAL, Mask
from flashmoe.spec.problem import Problem
from flashmoe.tiles import DECODE_HEAD_DIMS, Tile, Variant, decode_smem_bytes

H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
L4 = Arch("cuda", "NVIDIA L4", (8, 9), 58, 101376)
TURING = Arch("cuda", "NVIDIA T4", (7, 5), 40, 65536)
ROOT = Path(__file__).resolve().parents[1]
PROBLEM = Problem(16, 32, 8, 1, 8192, 128, "bfloat16")
CXX = shutil.which("c++") or shutil.which("g++")
DECODE = BACKENDS["decode"]
# Head dimension, then (block_m, block_n, num_stages, num_warps, ctas_per_sm), as the lists of
# compiled-in tiles have them.
SHAPES = [
    tuple(map(int, line.split()))
    for line in (ROOT / "csrc/instances/decode.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def tile_of(m, n, stages, warps, ctas):
    return Tile("decode", m, n, stages, warps, ctas_per_sm=ctas)


def cpp_tile(head_dim, tile):
    shape = (tile.block_m, tile.block_n, tile.num_stages, tile.num_warps, tile.ctas_per_sm)
    return f"flashmoe::DecodeTile<{', '.join(map(str, (head_dim, *shape)))}>"


def test_tile_text():
    tile = Tile("decode", 16, 64, 3, 4, ctas_per_sm=2)
    assert str(tile) == "decode:16x64-stages3-warps4-ctas2"
    assert Tile.parse(str(tile)) == tile
    assert tile.backend == "decode"


@pytest.mark.parametrize(("head_dim", "shape"), [(x[0], x[1:]) for x in SHAPES])
def test_listed_tiles_are_legal(head_dim, shape):
    assert head_dim in DECODE_HEAD_DIMS
    assert tile_of(*shape).violations(H200, replace(PROBLEM, head_dim=head_dim)) == []


@pytest.mark.parametrize("head_dim", DECODE_HEAD_DIMS)
@pytest.mark.parametrize("here", [H200, L4])
def test_every_gpu_has_a_tile(here, head_dim):
    listed = [tile_of(*shape) for d, *shape in SHAPES if d == head_dim]
    assert any(not t.violations(here, replace(PROBLEM, head_dim=head_dim)) for t in listed)


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
def test_python_and_cpp_agree_on_shared_memory(tmp_path):
    lines = [
        f'  std::printf("%d\\n", {cpp_tile(d, tile_of(*shape))}::SMEM_BYTES);\n'
        for d, *shape in SHAPES
    ]
    source, program = tmp_path / "numbers.cpp", tmp_path / "numbers"
    source.write_text(
        f'#include <cstdio>\n#include "decode/tile.h"\nint main() {{\n{"".join(lines)}}}\n'
    )
    subprocess.run([CXX, "-std=c++20", "-I", ROOT / "csrc", source, "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    for smem, (head_dim, *shape) in zip(said, SHAPES, strict=True):
        assert int(smem) == decode_smem_bytes(tile_of(*shape), head_dim)


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("head_dim", "shape", "python", "cpp"),
    [
        (128, (16, 128, 3, 4, 1), "", ""),
        (64, (64, 64, 5, 4, 2), "", ""),
        (128, (48, 64, 3, 4, 2), "block_m must be", "BLOCK_M: "),
        (128, (16, 64, 3, 3, 2), "num_warps must be", "NUM_WARPS: "),
        (128, (16, 192, 3, 4, 2), "block_n must be", "BLOCK_N: "),
        (128, (16, 64, 9, 4, 2), "num_stages must be", "NUM_STAGES: "),
        (64, (16, 128, 2, 8, 5), "ctas_per_sm must be", "CTAS_PER_SM: "),
        (64, (64, 64, 4, 4, 2), "the ring of a warp", "a warp's ring must hold its O"),
        (128, (64, 64, 8, 4, 1), "registers", "exceed the registers"),
        (96, (16, 64, 2, 4, 4), "", ""),
        (128, (32, 64, 3, 4, 3), "registers", "exceed the registers"),
    ],
)
def test_cpp_asserts_what_python_calls_illegal(head_dim, shape, python, cpp, tmp_path):
    """All but the size of shared memory, which the compiler does not know."""
    tile = tile_of(*shape)
    roomy = replace(H200, smem_per_block=1 << 30)
    broken = tile.violations(roomy, replace(PROBLEM, head_dim=head_dim))
    assert bool(broken) == bool(python)
    assert not broken or python in broken[0]
    unit = tmp_path / "tile.cpp"
    unit.write_text(f'#include "decode/tile.h"\ntemplate struct {cpp_tile(head_dim, tile)};\n')
    done = subprocess.run(
        [CXX, "-std=c++20", "-I", ROOT / "csrc", "-fsyntax-only", unit],
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (not cpp), done.stderr
    assert cpp in done.stderr


@pytest.mark.parametrize(
    ("arch", "problem", "message"),
    [
        (TURING, PROBLEM, "compute capability 8.0"),
        (H200, replace(PROBLEM, direction="bwd"), "no backward"),
        (H200, replace(PROBLEM, dtype="float32"), "dtype must be"),
        (L4, PROBLEM, "shared memory of 102400 bytes exceeds"),
    ],
)
def test_a_tile_is_refused(arch, problem, message):
    broken = tile_of(16, 64, 3, 4, 2).violations(arch, problem)
    assert any(message in x for x in broken), broken


@pytest.fixture
def gpu(monkeypatch):
    """As on an H200 whose build has the listed tiles."""
    info = _extension.load()
    instances, handles = {}, {}
    words = ("local", "softcap", "alibi", "sink", "packed")
    variants = [
        Variant.named(w for i, w in enumerate(words) if bits >> i & 1) for bits in range(32)
    ]
    for handle, (head_dim, *shape) in enumerate(SHAPES):
        for variant in variants:
            key = "decode", head_dim, variant
            instances[key] = (*instances.get(key, ()), tile_of(*shape))
            handles[head_dim, tile_of(*shape), variant] = handle
    built = replace(
        info, cuda_archs=("80", "90"), decode_instances=instances, decode_handles=handles
    )
    monkeypatch.setattr(_extension, "load", lambda: built)
    monkeypatch.setattr(flashmoe.planning.plan, "arch", lambda _: H200)
    for name in ("cuda", "decode", "sdpa"):
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda _: "")
    monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda _: "not here")
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("problem", "block_m"),
    [
        (PROBLEM, 16),
        (replace(PROBLEM, seqlen_q=4), 16),
        (replace(PROBLEM, seqlen_q=8), 32),
        (replace(PROBLEM, seqlen_q=16), 32),
        (replace(PROBLEM, seqlen_q=16, head_dim=56), 64),
        (replace(PROBLEM, seqlen_q=512, layout="paged"), 32),
        (replace(PROBLEM, head_dim=192), 16),
    ],
)
def test_the_default_holds_the_rows(gpu, problem, block_m):
    tile = DECODE.default_tile(problem, H200)
    assert tile is not None
    assert tile.block_m == block_m
    assert DECODE.rejects(tile, problem, H200) == ""


@pytest.mark.parametrize(
    ("batch", "head_dim", "tile"),
    [
        (16, 128, "decode:16x128-stages3-warps8-ctas1"),
        (17, 128, "decode:16x64-stages3-warps4-ctas2"),
        (1, 64, "decode:16x128-stages3-warps4-ctas2"),
        (1, 256, "decode:16x64-stages3-warps4-ctas1"),
    ],
)
def test_few_blocks_have_an_sm_each(gpu, batch, head_dim, tile):
    problem = replace(PROBLEM, batch=batch, head_dim=head_dim)
    assert str(DECODE.default_tile(problem, H200)) == tile


def test_few_queries_are_planned_for_it(gpu):
    assert plan.heuristic(PROBLEM, gpu).backend == "decode"
    assert plan.heuristic(PROBLEM, gpu, need_lse=True).backend == "decode"
    assert [c.backend for c in plan.candidates(PROBLEM, gpu)][:2] == ["decode", "sdpa"]
    assert plan.heuristic(replace(PROBLEM, dtype="float32"), gpu).backend == "sdpa"
    tile = "decode:16x64-stages2-warps4-ctas3"
    assert str(plan.make_plan(PROBLEM, gpu, tile=tile).tile) == tile


@given(
    layout=st.sampled_from(["cache", "paged"]),
    seqlen_q=st.integers(1, 300),
    head_dim=st.integers(1, 32),
    window=st.booleans(),
    terms=st.sets(st.sampled_from(["softcap", "alibi", "sink"])),
)
def test_any_cache_runs_on_it(layout, seqlen_q, head_dim, window, terms):
    mask = Mask(100, 0) if window else CAUSAL
    problem = Problem(
        *(4, 8, 2, seqlen_q, 1000, 8 * head_dim, "float16"),
        mask=mask,
        terms=tuple(terms),
        layout=layout,
    )
    features = DECODE.features["fwd"]
    assert problem.features <= features


def test_what_it_refuses(gpu):
    many = replace(PROBLEM, seqlen_q=17)
    assert "computes up to 64 rows of a head of k without a cache, got 68" in DECODE.unsupported(
        many, H200
    )
    assert DECODE.unsupported(replace(many, layout="cache"), H200) == ""
    assert "float32" in DECODE.unsupported(replace(PROBLEM, dtype="float32"), H200)
    assert "packed" in DECODE.unsupported(replace(PROBLEM, layout="packed"), H200)
    other = Tile.parse("decode:16x32-stages3-warps2-ctas2")
    assert "not compiled in; compiled are decode:16x64" in DECODE.rejects(other, PROBLEM, H200)


@pytest.mark.parametrize(
    ("deterministic", "num_splits", "expected"),
    [(False, 0, 0), (False, 5, 5), (True, 0, BATCH_INVARIANT), (True, 5, 5)],
)
def test_splits_are_what_is_asked_for(gpu, monkeypatch, deterministic, num_splits, expected):
    bound = []

    def bind_split(problem, tile, num_splits):
        bound.append((problem, tile, num_splits))
        return lambda call: None

    monkeypatch.setattr(DECODE, "bind_split", bind_split)
    plan.planned.cache_clear()
    for problem in (PROBLEM, replace(PROBLEM, layout="paged", seqlen_q=512)):
        plan.planned(problem, gpu, deterministic=deterministic, num_splits=num_splits)
    plan.planned.cache_clear()
    (dense, _, of_dense), (paged, tile, of_paged) = bound
    assert (dense.layout, paged.layout) == ("dense", "paged")
    assert of_dense == of_paged == expected
    # Not by how many queries another sequence has.
    assert tile.block_m == (16 if deterministic else 32)
