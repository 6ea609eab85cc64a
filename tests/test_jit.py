"""Tiles compiled at run time: the cache, the compilers, and what the cuda backend makes of them."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from flashmoe import _extension
from flashmoe.backends import BACKENDS, jit
from flashmoe.backends import cuda as cuda_backend
from flashmoe.backends.base import Default, first_default
from flashmoe.machine.device import Arch
from flashmoe.planning import database, plan
from flashmoe.prediction import costs
from flashmoe.spec.call import Call, Saved, Terms
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN, Tile, Variant

H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
A100 = Arch("cuda", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912)
DEVICE = torch.device("cuda", 0)
PROBLEM = Problem(2, 16, 16, 8192, 8192, 128, "bfloat16")
COMPILED = Tile.parse("sm90:128x128-stages2-q2-pingpong-qreg")
SM80 = Tile("sm80", 128, 64, 1, 4)
BUILT_IN = (COMPILED, Tile.parse("sm90:192x64-stages4-q1"), Tile.parse("sm90:64x64-ctas2-serial"))
SMALL = Tile.parse("sm90:64x48-stages1")
# One tile of both variants: kernels of their own.
WINDOWED, LOCAL = BUILT_IN[1], Variant(local=True)
CUDA = BACKENDS["cuda"]
TARGET = jit.Target(SMALL, 64, "bfloat16")


class FakeCompiler:
    identity = "fake-1"

    def __init__(self):
        self.compiled = []

    def compile(self, text):
        self.compiled.append(text)
        if "Sm90Tile{64, 64, 32" in text.replace("TILE", "Sm90Tile"):
            raise jit.CompilationFailed("fake-1: 32 keys are too few")
        return b"code of " + text.encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FLASHMOE_COMPILER", raising=False)
    monkeypatch.delenv("FLASHMOE_COMPILE", raising=False)
    return tmp_path / "kernels"


@pytest.fixture
def compiler(monkeypatch):
    fake = FakeCompiler()
    monkeypatch.setattr(jit, "_compiler", lambda name: fake)
    return fake


@pytest.fixture
def no_compiler(monkeypatch):
    def missing(name):
        raise jit.CompilerUnavailable("cuda.core is not installed")

    monkeypatch.setattr(jit, "_compiler", missing)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """An H200 and a build with four sm90 kernels, one of them for windows, an sm80 one, and a
    backward; nothing is shipped."""
    backward = Tile("sm90_bwd", 64, 128, 3, do_stages=2, ds_stages=2, late_dq=True)
    info = replace(
        _extension.load(),
        cuda_archs=("80", "90"),
        instances={
            ("sm80", 128, PLAIN): (SM80,),
            ("sm90", 128, PLAIN): BUILT_IN,
            ("sm80", 128, LOCAL): (SM80,),
            ("sm90", 128, LOCAL): (WINDOWED,),
        },
        handles={(128, tile, PLAIN): handle for handle, tile in enumerate((SM80, *BUILT_IN))}
        | {(128, SM80, LOCAL): 0, (128, WINDOWED, LOCAL): 4},
        backward_instances={("sm90_bwd", 128, PLAIN): (backward,)},
        backward_handles={(128, backward, PLAIN): 0},
    )
    monkeypatch.setattr(_extension, "load", lambda: info)
    monkeypatch.setattr(plan, "arch", lambda device: H200)
    monkeypatch.setattr(plan.database, "shipped_path", lambda name: tmp_path / "nothing.json")
    for backend in (CUDA, BACKENDS["decode"], BACKENDS["triton"]):
        monkeypatch.setattr(backend, "unavailable", lambda device: "")
    plan.reload_databases()
    cuda_backend._handle.cache_clear()
    yield info
    plan.reload_databases()
    cuda_backend._handle.cache_clear()


def store(tile):
    judged = _extension.kernel_hash("cuda")
    entry = database.Entry(PROBLEM, "cuda", str(tile), "", judged=judged)
    database.update(database.user_path(H200.name), {PROBLEM.bucket: entry})
    plan.reload_databases()


def test_a_tile_is_compiled_once_and_kept(cache, compiler):
    assert not jit.is_cached(TARGET)
    code = jit.cubin(TARGET)
    assert jit.is_cached(TARGET)
    assert jit.cubin(TARGET) == code
    assert len(compiler.compiled) == 1
    (path,) = cache.iterdir()
    assert path.read_bytes().startswith(code)
    assert path.name.endswith("-fake-1.cubin")


def test_the_key_is_all_that_the_code_depends_on(compiler, monkeypatch):
    names = {jit._stem(TARGET)}
    changes = ({"head_dim": 128}, {"dtype": "float16"}, {"tile": replace(SMALL, exp2_fma=1)})
    for change in (*changes, {"variant": LOCAL}):
        names.add(jit._stem(TARGET._replace(**change)))
    monkeypatch.setattr(jit, "_headers_digest", lambda: "other headers")
    names.add(jit._stem(TARGET))
    monkeypatch.setattr(jit, "NVCC_OPTIONS", ("-O0",))
    names.add(jit._stem(TARGET))
    assert len(names) == 7


def test_another_compiler_compiles_anew_but_running_takes_none(compiler):
    jit.cubin(TARGET)
    compiler.identity = "fake-2"
    jit.cubin(TARGET)
    assert len(compiler.compiled) == 1
    for _ in range(2):
        jit.precompile(TARGET)
    assert len(compiler.compiled) == 2


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"x" + b[1:]])
def test_a_damaged_kernel_is_set_aside_named_and_compiled_again(cache, compiler, damage):
    code = jit.cubin(TARGET)
    (path,) = cache.iterdir()
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.warns(jit.DamagedKernel, match=str(path)):
        assert jit.cubin(TARGET) == code
    (aside,) = cache.glob("*.damaged-*")
    assert aside.read_bytes() == damaged
    assert path.read_bytes().startswith(code)


def test_a_damaged_kernel_that_cannot_be_set_aside_is_not_used(cache, compiler, monkeypatch):
    code = jit.cubin(TARGET)
    (path,) = cache.iterdir()
    path.write_bytes(b"x")

    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(jit, "set_aside", read_only)
    with pytest.warns(jit.DamagedKernel, match=r"stays where it is \(.*Read-only"):
        assert jit.cubin(TARGET) == code


def open_folder(path):
    path.parent.chmod(0o777)


def open_file(path):
    path.chmod(0o666)


def link(path):
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def give_away(path):
    if os.geteuid():
        pytest.skip("only root gives files away")
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize("spoil", [open_folder, open_file, link, give_away])
def test_what_others_may_have_written_is_never_loaded(cache, compiler, spoil):
    code = jit.cubin(TARGET)
    (path,) = cache.iterdir()
    evil = b"evil code"
    path.write_bytes(evil + hashlib.sha256(evil).digest())
    assert jit.cubin(TARGET) == evil
    spoil(path)
    with pytest.warns(jit.UnusedCache, match=f"kernels in {cache} are not loaded: {cache}"):
        assert not jit.is_cached(TARGET)
    with pytest.warns(jit.UnusedCache):
        assert jit.cubin(TARGET) == code


def test_a_kernel_that_cannot_be_kept_runs_and_the_variable_is_named(cache, compiler, monkeypatch):
    cache.mkdir(mode=0o700)
    cache.chmod(0o770)
    for _ in range(2):
        with pytest.warns(jit.UnusedCache, match=rf"chmod go-w {cache}.*FLASHMOE_CACHE_DIR"):
            assert jit.cubin(TARGET)
    with pytest.raises(OSError, match="FLASHMOE_CACHE_DIR names another folder"):
        jit.precompile(TARGET)
    assert len(compiler.compiled) == 2
    assert not list(cache.iterdir())
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", "~no-such-user/cache")
    with pytest.warns(jit.UnusedCache, match="set FLASHMOE_CACHE_DIR"):
        assert jit.cubin(TARGET)


def test_kernels_are_kept_for_the_user_alone(cache, compiler):
    before = os.umask(0)
    try:
        jit.cubin(TARGET)
    finally:
        os.umask(before)
    (path,) = cache.iterdir()
    assert [stat.S_IMODE(x.stat().st_mode) for x in (cache, path)] == [0o700, 0o600]


def test_what_a_compiler_refuses_is_not_kept(cache, compiler):
    target = jit.Target(Tile("sm90", 64, 32), 64, "float16")
    for attempt in (jit.precompile, jit.cubin):
        with pytest.raises(jit.CompilationFailed, match="32 keys are too few"):
            attempt(target)
    assert not jit.is_cached(target)


def test_concurrent_writers_of_one_kernel(cache, compiler):
    with ThreadPoolExecutor(8) as pool:
        codes = set(pool.map(jit.cubin, [TARGET] * 32))
    assert len(codes) == 1
    assert len(list(cache.iterdir())) == 1  # nor is a half-written file left


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    jit._compiler.cache_clear()
    assert "pip install cuda-core cuda-bindings nvidia-cuda-nvrtc" in jit.unavailable()
    with pytest.raises(jit.CompilerUnavailable, match="is not installed"):
        jit.cubin(TARGET)
    monkeypatch.setenv("FLASHMOE_COMPILER", "gcc")
    assert jit.unavailable() == "FLASHMOE_COMPILER must be nvrtc or nvcc, got 'gcc'"
    monkeypatch.setenv("FLASHMOE_COMPILER", "nvcc")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert "nvcc is not in /nowhere/bin" in jit.unavailable()
    jit._compiler.cache_clear()


def test_default_tile_and_tiles_on_hopper(hopper, compiler):
    assert CUDA.default_tile(PROBLEM, H200) == COMPILED
    assert CUDA.default_tile(PROBLEM, A100).kernel == "sm80"
    space = CUDA.tiles(PROBLEM, H200)
    assert len(space) > 500
    assert COMPILED in space
    assert all(tile.kernel == "sm90" for tile in space)
    assert [tile.kernel for tile in CUDA.tiles(PROBLEM, A100)] == ["sm80"]
    # A smaller head_dim runs on the next instance.
    assert CUDA.default_tile(replace(PROBLEM, head_dim=104), H200).kernel == "sm90"


def test_without_a_compiler_only_compiled_tiles_are_tried(hopper, no_compiler):
    assert CUDA.tiles(PROBLEM, H200) == [
        *hopper.instances["sm90", 128, PLAIN],
        *hopper.instances["sm80", 128, PLAIN],
    ]
    assert CUDA.rejects(COMPILED, PROBLEM, H200) == ""
    reason = CUDA.rejects(SMALL, PROBLEM, H200)
    assert reason == "not compiled in, and cannot be compiled here: cuda.core is not installed"
    with pytest.raises(ValueError, match=r"tile sm90:64x48.* cannot run .*cannot be compiled here"):
        plan.make_plan(PROBLEM, DEVICE, tile=SMALL)


def test_hopper_prefers_its_own_kernel_to_triton(hopper):
    for direction in ("fwd", "bwd"):
        found = plan.heuristic(replace(PROBLEM, direction=direction), DEVICE)
        assert found.backend == "cuda", direction
    newer = replace(H200, capability=(10, 0))
    assert plan._preference(PROBLEM, newer)[0] == "triton"
    float32 = replace(PROBLEM, dtype="float32")
    assert plan._preference(float32, H200)[0] == "sdpa"


def test_a_tuned_tile_that_is_not_compiled_never_waits(hopper, compiler, monkeypatch):
    store(SMALL)
    planned = plan.make_plan(PROBLEM, DEVICE)
    assert planned.tile == CUDA.default_tile(PROBLEM, H200)
    assert planned.source == f"predicted: {SMALL} of the user database: not compiled here"
    assert not compiler.compiled
    with monkeypatch.context() as patch:
        patch.setenv("FLASHMOE_COMPILE", "1")
        assert plan.make_plan(PROBLEM, DEVICE).tile == SMALL
    for tile in (SMALL, COMPILED):
        CUDA.precompile(tile, PROBLEM, DEVICE)
    assert len(compiler.compiled) == 1
    planned = plan.make_plan(PROBLEM, DEVICE)
    assert (planned.tile, planned.source) == (SMALL, "user database")


def test_a_cached_tile_runs_without_a_compiler(hopper, compiler, monkeypatch):
    store(SMALL)
    CUDA.precompile(SMALL, PROBLEM, DEVICE)

    def missing(name):
        raise jit.CompilerUnavailable("gone")

    monkeypatch.setattr(jit, "_compiler", missing)
    assert plan.make_plan(PROBLEM, DEVICE).tile == SMALL


def test_a_damaged_kernel_without_a_compiler_leaves_the_default(
    hopper, cache, compiler, monkeypatch
):
    store(SMALL)
    CUDA.precompile(SMALL, PROBLEM, DEVICE)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-1])

    def missing(name):
        raise jit.CompilerUnavailable("gone")

    monkeypatch.setattr(jit, "_compiler", missing)
    with pytest.warns(jit.DamagedKernel, match=str(path)):
        planned = plan.make_plan(PROBLEM, DEVICE)
    assert planned.tile == CUDA.default_tile(PROBLEM, H200)
    assert planned.source == f"predicted: {SMALL} of the user database: not compiled here"


def test_a_plan_looks_for_no_compiler(hopper, monkeypatch):
    def looked(name):
        pytest.fail("it takes long")

    store(SMALL)
    monkeypatch.setattr(jit, "_compiler", looked)
    assert plan.make_plan(PROBLEM, DEVICE).tile == CUDA.default_tile(PROBLEM, H200)


def test_a_tile_is_bound_to_its_kernel_once(hopper, compiler, monkeypatch):
    loaded = []

    def load_kernel(cubin, *target):
        loaded.append(target)
        return 77

    monkeypatch.setattr(_extension, "load_kernel", load_kernel)
    monkeypatch.setattr(cuda_backend, "_fwd_dense", lambda *arguments: arguments)
    problem = replace(PROBLEM, head_dim=72, dtype="float16")
    for _ in range(2):
        call = Call("q", "k", "v", 0.5)
        assert CUDA.bind(problem, SMALL)(call) == ("q", "k", "v", 0.5, -1, -1, 77)
    assert loaded == [(SMALL, 80, "float16", PLAIN)]
    causal = replace(problem, mask=CAUSAL)
    assert CUDA.bind(causal, COMPILED)(call) == ("q", "k", "v", 0.5, -1, 0, 1)
    assert len(loaded) == 1


def test_a_window_runs_on_kernels_of_its_variant(hopper, compiler, monkeypatch):
    loaded = []
    monkeypatch.setattr(_extension, "load_kernel", lambda cubin, *target: loaded.append(target))
    monkeypatch.setattr(cuda_backend, "_fwd_dense", lambda *arguments: arguments)
    window = replace(PROBLEM, mask=Mask(100, 7))
    assert CUDA.unsupported(window, H200) == ""
    assert CUDA.compiled_in(window, H200) == [WINDOWED, *hopper.instances["sm80", 128, PLAIN]]
    assert CUDA.default_tile(window, H200) in CUDA.compiled_in(window, H200)
    call = Call("q", "k", "v", 0.5)
    assert CUDA.bind(window, WINDOWED)(call) == ("q", "k", "v", 0.5, 100, 7, 4)
    assert CUDA.bind(PROBLEM, WINDOWED)(call)[-1] == 2
    assert not loaded
    # A tile that is compiled in for other masks is another kernel with a window.
    assert not CUDA.is_compiled(COMPILED, window)
    CUDA.bind(window, COMPILED)
    assert loaded == [(COMPILED, 128, "bfloat16", LOCAL)]
    assert CUDA.is_compiled(COMPILED, window)
    (text,) = compiler.compiled
    assert "VARIANT{.local = true}" in text


TERMS = Terms(30.0, "slopes", "sinks", attn_mask="mask")


def test_terms_that_nothing_is_compiled_in_for_are_compiled_at_first_use(
    hopper, compiler, monkeypatch, caplog
):
    loaded = []
    monkeypatch.setattr(_extension, "load_kernel", lambda cubin, *target: loaded.append(target))
    monkeypatch.setattr(cuda_backend, "_fwd", lambda *arguments: arguments)
    capped = replace(PROBLEM, mask=Mask(100, 7), terms=("softcap", "sink"))
    assert CUDA.unsupported(capped, H200) == ""
    assert CUDA.compiled_in(capped, H200) == []
    # What is the default without terms, and without a window where nothing has that either.
    assert CUDA.default_tile(capped, H200) == WINDOWED
    narrow = {key: x for key, x in hopper.instances.items() if key[2] != LOCAL}
    monkeypatch.setattr(_extension, "load", lambda: replace(hopper, instances=narrow))
    causal = replace(PROBLEM, mask=CAUSAL)
    assert CUDA.default_tile(capped, H200) == CUDA.default_tile(causal, H200)
    chosen = plan.make_plan(capped, DEVICE)
    assert (chosen.backend, chosen.tile) == ("cuda", CUDA.default_tile(capped, H200))
    # One that cannot be compiled here is not the default, however fast it is without terms.
    with monkeypatch.context() as patch:
        patch.setattr(CUDA, "predicted", lambda tile, *_: 1.0 if tile == SM80 else 2.0)
        assert CUDA.default_tile(causal, H200) == SM80
        assert CUDA.default_tile(capped, H200).kernel == "sm90"
    call = Call("q", "k", "v", 0.5, TERMS)
    called = CUDA.bind(capped, SMALL)(call)
    terms = (30.0, "slopes", "sinks", 0.0, None, "mask")
    assert called == ("q", "k", "v", 0.5, 100, 7, None, *terms)
    variant = Variant(local=True, softcap=True, sink=True)
    assert loaded == [(SMALL, 128, "bfloat16", variant)]
    (text,) = compiler.compiled
    assert "VARIANT{.local = true, .softcap = true, .sink = true}" in text
    assert "compiling sm90:64x48" in caplog.text
    assert "bfloat16 local softcap sink" in caplog.text


def test_masks_are_compiled_at_first_use(hopper, compiler, monkeypatch):
    masked = replace(PROBLEM, terms=("mask",))
    assert CUDA.unsupported(masked, H200) == ""
    assert CUDA.compiled_in(masked, H200) == []
    assert CUDA.default_tile(masked, H200) == CUDA.default_tile(PROBLEM, H200)
    assert Variant.of(masked) == Variant(mask=True)
    assert CUDA.unsupported(replace(masked, seqlen_kv=0), H200) == "has no mask of no keys"
    monkeypatch.setattr(_extension, "load_kernel", lambda cubin, *target: 7)
    monkeypatch.setattr(cuda_backend, "_bwd", lambda *arguments: arguments)
    backward = replace(masked, direction="bwd")
    assert CUDA.unsupported(backward, H200) == ""
    (tile,) = CUDA.compiled_in(replace(backward, terms=()), H200)
    assert CUDA.default_tile(backward, H200) == tile
    call, saved = Call("q", "k", "v", 0.5, TERMS), Saved("dout", "out", "lse", "dlse")
    run = CUDA.bind_backward(backward, tile, deterministic=True)
    assert run(call, saved)[10:] == (7, 30.0, "slopes", 0.0, None, "mask")
    (text,) = compiler.compiled
    assert "VARIANT{.deterministic = true, .mask = true}" in text


def test_values_of_another_head_dim_are_compiled_at_first_use(hopper, compiler, monkeypatch):
    loaded = []
    monkeypatch.setattr(_extension, "load_kernel", lambda cubin, *target: loaded.append(target))
    monkeypatch.setattr(cuda_backend, "_fwd_dense", lambda *arguments: arguments)
    narrow = replace(PROBLEM, head_dim=120, head_dim_v=40)
    assert CUDA.unsupported(narrow, H200) == ""
    # mma.sync's kernels are padded.
    assert CUDA.compiled_in(narrow, H200) == [SM80]
    chosen = plan.make_plan(narrow, DEVICE)
    assert (chosen.backend, chosen.tile) == ("cuda", CUDA.default_tile(narrow, H200))
    assert chosen.tile in BUILT_IN
    assert not CUDA.is_compiled(SMALL, narrow)
    arguments = CUDA.bind(narrow, SMALL)(Call("q", "k", "v", 0.5))
    assert arguments == ("q", "k", "v", 0.5, -1, -1, None)
    assert loaded == [(SMALL, 128, "bfloat16", Variant(head_dim_v=48))]
    (text,) = compiler.compiled
    assert "TILE{128, 64, 48, 1, 1, false, false, 0, 1, false, 48};" in text
    assert "VARIANT{};" in text
    assert CUDA.is_compiled(SMALL, narrow)
    # More of its tiles fit than of one head_dim, and they are all legal.
    tiles = CUDA.tiles(narrow, H200)
    assert len(tiles) > len(CUDA.tiles(PROBLEM, H200))
    assert all(not tile.violations(H200, narrow) for tile in tiles[::50])
    wide = replace(PROBLEM, head_dim=64, head_dim_v=128)
    assert CUDA.default_tile(wide, H200) in BUILT_IN
    assert CUDA.unsupported(replace(narrow, seqlen_kv=0), H200) == "has no head_dim_v of no keys"


def test_a_compiled_in_kernel_of_two_head_dims(hopper, compiler, monkeypatch):
    tile, variant = Tile.parse("sm90:128x80-stages2"), Variant(head_dim_v=64)
    own = replace(
        hopper,
        instances=hopper.instances | {("sm90", 128, variant): (tile,)},
        handles=hopper.handles | {(128, tile, variant): 9},
    )
    monkeypatch.setattr(_extension, "load", lambda: own)
    monkeypatch.setattr(cuda_backend, "_fwd_dense", lambda *arguments: arguments)
    narrow = replace(PROBLEM, head_dim=120, head_dim_v=56)
    assert CUDA.compiled_in(narrow, H200) == [tile, SM80]
    assert CUDA.default_tile(narrow, H200) == tile
    assert CUDA.bind(narrow, tile)(Call("q", "k", "v", 0.5))[-1] == 9
    # As long as one of head_dim 96, whose matmuls are together as large.
    assert CUDA.predicted(tile, narrow, H200) == costs.tile_microseconds(tile, 96, narrow, H200)
    # A window is a variant of its own.
    windowed = replace(narrow, mask=Mask(100, 0))
    assert not CUDA.is_compiled(tile, windowed)
    assert CUDA.default_tile(windowed, H200) == tile


def test_without_a_compiler_values_are_padded(hopper, no_compiler, monkeypatch):
    shapes = []

    def forward(q, k, v, *rest):
        shapes.append((q.shape[-1], k.shape[-1], v.shape[-1], rest[-1]))
        return torch.ones_like(v), "softmax_lse"

    monkeypatch.setattr(cuda_backend, "_fwd_dense", forward)
    narrow = replace(PROBLEM, head_dim=120, head_dim_v=40)
    assert CUDA.unsupported(narrow, H200) == ""
    assert CUDA.compiled_in(narrow, H200) == [*BUILT_IN, SM80]
    assert CUDA.default_tile(narrow, H200) == CUDA.default_tile(
        replace(PROBLEM, head_dim=120), H200
    )
    q, v = torch.ones(2, 3, 4, 120), torch.ones(2, 3, 4, 40)
    for tile, handle in ((SM80, 0), (COMPILED, 1)):
        out, lse = CUDA.bind(narrow, tile)(Call(q, q, v, 0.5))
        assert (out.shape, out.is_contiguous(), lse) == (v.shape, True, "softmax_lse")
        assert shapes.pop() == (120, 120, 120, handle)


def test_a_backward_of_two_head_dims_is_padded(hopper, compiler, monkeypatch):
    def backward(dout, q, k, v, out, *rest):
        assert {x.shape[-1] for x in (dout, q, k, v, out)} == {120}
        return q, k, v

    monkeypatch.setattr(cuda_backend, "_bwd_dense", backward)
    for head_dim, head_dim_v in ((120, 40), (40, 120)):
        narrow = replace(PROBLEM, direction="bwd", head_dim=head_dim, head_dim_v=head_dim_v)
        (tile,) = CUDA.compiled_in(narrow, H200)
        q, v = torch.randn(2, 3, 4, head_dim), torch.randn(2, 3, 4, head_dim_v)
        gradients = CUDA.bind_backward(narrow, tile)(Call(q, q, v, 0.5), Saved(v, v, "lse"))
        for actual, given in zip(gradients, (q, q, v), strict=True):
            torch.testing.assert_close(actual, given, rtol=0, atol=0)
            assert actual.is_contiguous()


def test_without_a_compiler_terms_need_a_compiled_in_kernel(hopper, no_compiler, monkeypatch):
    capped = replace(PROBLEM, terms=("softcap",))
    assert CUDA.unsupported(capped, H200) == (
        "no tile is compiled in for bfloat16 softcap, head_dim 128"
    )
    general = replace(
        hopper,
        instances=hopper.instances | {("sm80", 128, Variant(softcap=True)): (SM80,)},
        handles=hopper.handles | {(128, SM80, Variant(softcap=True)): 5},
    )
    monkeypatch.setattr(_extension, "load", lambda: general)
    monkeypatch.setattr(cuda_backend, "_fwd", lambda *arguments: arguments)
    assert CUDA.unsupported(capped, H200) == ""
    assert CUDA.tiles(capped, H200) == [SM80]
    assert CUDA.default_tile(capped, H200) == SM80
    call = Call("q", "k", "v", 0.5, TERMS)
    assert CUDA.bind(capped, SM80)(call)[6:] == (5, 30.0, "slopes", "sinks", 0.0, None, "mask")


def test_a_backward_has_sinks_for_nothing_and_compiles_other_terms(hopper, compiler, monkeypatch):
    loaded = []
    monkeypatch.setattr(_extension, "load_kernel", lambda cubin, *target: loaded.append(target))
    monkeypatch.setattr(cuda_backend, "_bwd", lambda *arguments: arguments)
    monkeypatch.setattr(cuda_backend, "_bwd_dense", lambda *arguments: arguments)
    backward = replace(PROBLEM, direction="bwd")
    (tile,) = CUDA.compiled_in(backward, H200)
    assert tile in CUDA.tiles(backward, H200)
    sinks = replace(backward, terms=("sink",))
    assert Variant.of(sinks) == PLAIN
    assert CUDA.compiled_in(sinks, H200) == [tile]
    call, saved = Call("q", "k", "v", 0.5, TERMS), Saved("dout", "out", "lse", "dlse")
    plain = ("dout", "q", "k", "v", "out", "lse", "dlse", 0.5, -1, -1, 0)
    assert CUDA.bind_backward(backward, tile)(call, saved) == plain
    with_sinks = call._replace(terms=Terms(sinks="sinks"))
    others = (0.0, None, None)  # dropout and a mask
    assert CUDA.bind_backward(sinks, tile)(with_sinks, saved) == (*plain, 0.0, None, *others)
    assert not loaded
    # The default without terms, compiled for them, and for a sum of dQ in one order.
    capped = replace(backward, terms=("softcap", "alibi"), head_dim=112, dtype="float16")
    assert CUDA.default_tile(capped, H200) == tile
    assert CUDA.repeats(tile, capped)
    CUDA.bind_backward(capped, tile, deterministic=True)
    variant = Variant(deterministic=True, softcap=True, alibi=True)
    assert loaded == [(tile, 128, "float16", variant)]
    (text,) = compiler.compiled
    assert "Sm90BackwardTile TILE{128, 64, 128, 3, 2, 2, true};" in text
    assert "VARIANT{.deterministic = true, .softcap = true, .alibi = true}" in text


def test_without_a_compiler_a_backward_has_what_is_compiled_in(hopper, no_compiler):
    backward = replace(PROBLEM, direction="bwd")
    (tile,) = CUDA.tiles(backward, H200)
    assert not CUDA.repeats(tile, backward)
    capped = replace(backward, terms=("softcap", "alibi"))
    assert CUDA.unsupported(capped, H200) == (
        "no tile is compiled in for bfloat16 softcap alibi, head_dim 128"
    )


@pytest.mark.parametrize(
    ("changes", "deterministic", "handle"),
    [
        ({"seqlen_kv": 128}, False, 2),  # all keys in one thread block
        ({"seqlen_kv": 128}, True, 2),
        ({"seqlen_kv": 129}, False, 0),
        ({"seqlen_kv": 129}, True, 1),
        # Many thread blocks, few of each head: the one that keeps an order is faster.
        ({"batch": 64, "seqlen_kv": 512}, False, 1),
        ({"batch": 64, "seqlen_kv": 513}, False, 0),
        ({"batch": 64, "seqlen_kv": 512, "heads_q": 16}, False, 0),
        ({"batch": 31, "seqlen_kv": 512}, False, 0),
        ({"batch": 64, "seqlen_kv": 4096, "mask": CAUSAL}, False, 1),
        ({"batch": 64, "seqlen_kv": 4097, "mask": CAUSAL}, False, 0),
    ],
)
def test_a_backward_runs_the_kernel_that_is_fastest_for_its_keys(
    hopper, monkeypatch, changes, deterministic, handle
):
    ((tile,),) = hopper.backward_instances.values()
    others = {"deterministic": 1, "whole": 2}
    handles = {(128, tile, Variant(**{name: True})): n for name, n in others.items()}
    info = replace(hopper, backward_handles=hopper.backward_handles | handles)
    kinds = {("sm90_bwd", 128, Variant(**{name: True})): (tile,) for name in others}
    info = replace(info, backward_instances=hopper.backward_instances | kinds)
    monkeypatch.setattr(_extension, "load", lambda: info)
    monkeypatch.setattr(cuda_backend, "_bwd_dense", lambda *arguments: arguments[-1])
    shape = {"batch": 1, "heads_q": 8, "heads_kv": 8, "seqlen_q": 512} | changes
    problem = replace(PROBLEM, direction="bwd", **shape)
    run = CUDA.bind_backward(problem, tile, deterministic)
    assert run(Call("q", "k", "v", 0.5), Saved("dout", "out", "lse")) == handle
    assert CUDA.repeats(tile, problem)


def test_the_first_default_that_applies_is_taken():
    a, b, c = (Tile("sm90", 128, n) for n in (32, 64, 96))
    table = [Default(128, a, True, 1000), Default(128, b, min_seqlen_q=2000), Default(256, c)]

    def taken(**changes):
        return first_default(table, replace(PROBLEM, **changes), H200)

    assert taken(mask=CAUSAL) == a
    assert taken(mask=FULL) == b
    assert taken(mask=CAUSAL, seqlen_q=999) == c
    assert taken(head_dim=136) == c
    assert taken(dtype="float32") is None


def test_loading_what_is_no_kernel_is_an_error():
    with pytest.raises(RuntimeError, match=r"loading sm90:64x48\S* for head_dim 64: "):
        _extension.load_kernel(b"not a kernel", SMALL, 64, "bfloat16", PLAIN)


def compiles():
    """A real compiler makes machine code, in several threads at once, and names what it refuses."""
    backward = Tile("sm90_bwd", 64, 128, 2, do_stages=2)
    entries = {
        TARGET: (b"attention",),
        jit.Target(replace(SMALL, exp2_fma=4), 80, "float16", LOCAL): (b"attention",),
        jit.Target(SMALL, 80, "float16", Variant(head_dim_v=48)): (b"attention",),
        jit.Target(backward, 96, "bfloat16", Variant(alibi=True, packed=True)): (
            *(b"prepare", b"attention_backward", b"finish"),
        ),
    }
    with ThreadPoolExecutor(2) as pool:
        for code, names in zip(pool.map(jit.cubin, entries), entries.values(), strict=True):
            assert code.startswith(b"\x7fELF")
            assert all(name + b"\0" in code for name in names)
    illegal = jit.Target(Tile("sm90", 64, 24), 64, "float16")
    with pytest.raises(jit.CompilationFailed, match=r"block_n: a multiple of 16"):
        jit.precompile(illegal)


def test_nvrtc_compiles():
    jit._compiler.cache_clear()
    if reason := jit.unavailable():
        pytest.skip(reason)
    compiles()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not in PATH")
def test_nvcc_compiles(monkeypatch):
    monkeypatch.setenv("FLASHMOE_COMPILER", "nvcc")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    compiles()
