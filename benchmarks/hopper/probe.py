"""Builds tiles of the Hopper forward kernel by themselves, checks them, and times them beside SDPA.

    python benchmarks/hopper/probe.py build FOLDER TILE...            # nvcc; no GPU needed
    python benchmarks/hopper/probe.py run FOLDER [--output FILE]      # on a Hopper GPU

A TILE is HEAD_DIM:BLOCK_MxBLOCK_N-key=value..., as 128:128x176-stages=2-q=1-pingpong=1-qreg=0-fma=0
-ctas=1-serial=0; variant=N defines FLASHMOE_VARIANT, to time two ways of writing it in one run.
`run` prints one line a problem: median and efficiency (floor over time, both limits measured in the
same run) of every tile, best first.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flashmoe.spec.mask import causal_if
from flashmoe.tiles import FLAGS, columns

ROOT = Path(__file__).resolve().parents[2]
NVCC = ("nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr")
OPTIONS = {
    "stages": 2,
    "q": 1,
    "pingpong": 1,
    "qreg": 0,
    "fma": 0,
    "ctas": 1,
    "serial": 0,
    "trace": 0,
    "variant": 0,
}
# batch, heads_q, heads_kv, seqlen_q, seqlen_kv, causal
CHECKS = (
    (1, 2, 2, 128, 128, False),
    (2, 4, 2, 300, 411, False),
    (2, 4, 1, 411, 300, True),
    (1, 2, 2, 1000, 1000, True),
    (1, 2, 2, 77, 1500, True),
    (16, 16, 16, 640, 640, True),
    (8, 32, 32, 500, 520, False),
)
SOURCE = """\
#include "forward/sm90/kernel.cuh"
extern "C" __global__ void __launch_bounds__({threads}, {ctas}) attention(
    const __grid_constant__ flashmoe::Sm90Params params) {{
  flashmoe::sm90::attention_forward<__nv_bfloat16, flashmoe::Sm90Tile{{{fields}}}>(params);
}}
"""


class Params(ctypes.Structure):
    """csrc/common/params.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "softmax_lse")),
        *(
            (f"{tensor}_{axis}_stride", ctypes.c_longlong)
            for tensor in "qkvo"
            for axis in ("batch", "row", "head")
        ),
        *(
            (name, ctypes.c_int)
            for name in ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_kv", "head_dim")
        ),
        ("softmax_scale", ctypes.c_float),
        ("is_causal", ctypes.c_int),
        ("window_left", ctypes.c_int),
        ("window_right", ctypes.c_int),
        ("head_dim_v", ctypes.c_int),
    )


class Sm90Tile(ctypes.Structure):
    """csrc/forward/sm90/tile.h."""

    _fields_ = tuple(
        (name, ctypes.c_bool if name in FLAGS else ctypes.c_int)
        for name in ("head_dim", *columns("sm90"), "head_dim_v")
    )


def parse(name: str) -> Sm90Tile:
    match = re.fullmatch(r"(\d+):(\d+)x(\d+)((?:-\w+=\d+)*)", name)
    if match is None:
        raise SystemExit(f"a tile looks like 128:128x176-stages=2, got {name!r}")
    options = OPTIONS | {key: int(value) for key, value in re.findall(r"-(\w+)=(\d+)", match[4])}
    if unknown := set(options) - set(OPTIONS):
        raise SystemExit(f"{name}: unknown {unknown}; known are {list(OPTIONS)}")
    d, m, n = map(int, match.groups()[:3])
    o = options
    pingpong, q_in_registers, serial = (bool(o[key]) for key in ("pingpong", "qreg", "serial"))
    shape = (d, m, n, o["stages"], o["q"])
    return Sm90Tile(*shape, pingpong, q_in_registers, o["fma"], o["ctas"], serial)


def tile_smem(tile: Sm90Tile) -> int:
    """Sm90Tile::smem_bytes."""
    row = 128 * -(-tile.head_dim // 64)
    return 512 + row * (tile.block_m * tile.q_stages + 2 * tile.block_n * tile.num_stages)


def prepare_folder(folder: Path) -> None:
    """Empties `folder` of kernels and builds the launcher in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.cubin"):
        old.unlink()
    subprocess.run([sys.executable, ROOT / "csrc/ptx/generate_wgmma.py", folder], check=True)
    parts = ("csrc/forward/sm90/host.cpp", "csrc/common/sm90_launch.cpp")
    launcher = [Path(__file__).with_name("launcher.cpp"), *(ROOT / part for part in parts)]
    shared = ["-shared", "-Xcompiler=-fPIC", "-cudart=static", "-o", folder / "launcher.so"]
    subprocess.run([*NVCC, f"-I{ROOT / 'csrc'}", f"-I{folder}", *shared, *launcher], check=True)


def compile_tile(folder: Path, number: int, name: str, sources: Path) -> str:
    """Compiles a tile of the kernel in `sources` to NUMBER.cubin; what became of it."""
    tile = parse(name)
    fields = ", ".join(str(getattr(tile, field)).lower() for field, _ in Sm90Tile._fields_)
    threads = 128 * (tile.block_m // 64 + 1)
    define = "#define FLASHMOE_TRACE\n" if "-trace=1" in name else ""
    if variant := re.search(r"-variant=(\d+)", name):
        define += f"#define FLASHMOE_VARIANT {variant[1]}\n"
    source = folder / f"{number}.cu"
    source.write_text(
        define + SOURCE.format(threads=threads, ctas=tile.ctas_per_sm, fields=fields),
        encoding="utf-8",
    )
    if tile_smem(tile) > 232448:
        return f"{name}: needs {tile_smem(tile)} bytes of shared memory"
    command = [*NVCC, f"-I{sources}", f"-I{folder}", "-gencode=arch=compute_90a,code=sm_90a"]
    command += ["-Xptxas=-v", "-cubin", "-o", folder / f"{number}.cubin", source]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        return f"{name}: FAILED {done.stderr[:900]}"
    spills = re.search(r"(\d+) bytes spill stores", done.stderr)
    serial = "SERIALIZED " if "serialized" in done.stderr else ""
    return f"{name}: {serial}spills {spills[1] if spills else '?'}"


def build(folder: Path, names: list[str]) -> None:
    prepare_folder(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        numbered = enumerate(names)
        for line in pool.map(lambda x: compile_tile(folder, *x, ROOT / "csrc"), numbered):
            print(line, flush=True)
    (folder / "tiles.json").write_text(json.dumps(names), encoding="utf-8")


def run(
    folder: Path, output: Path | None, rounds: int, only: str, profile: str, trace: list[str]
) -> None:
    import torch
    import torch.nn.functional as F
    from rows import ROWS, UNEVEN
    from torch import Tensor
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from flashmoe.measure.reference import attention_reference, error_bound
    from flashmoe.measure.stats import median_interval
    from flashmoe.measure.timing import measure, measure_limits

    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    library = ctypes.CDLL(str((folder / "launcher.so").resolve()))
    tiles: dict[str, tuple[Sm90Tile, ctypes.c_void_p]] = {}
    for number, name in enumerate(json.loads((folder / "tiles.json").read_text(encoding="utf-8"))):
        cubin = folder / f"{number}.cubin"
        if cubin.exists():
            kernel = ctypes.c_void_p()
            if error := library.load_kernel(str(cubin).encode(), ctypes.byref(kernel)):
                raise SystemExit(f"{name}: loading failed with {error}")
            tiles[name] = (parse(name), kernel)

    def prepare(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Params, Tensor, Tensor]:
        out = torch.full_like(q, float("nan"))
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"), device=device)
        params = Params(*(x.data_ptr() for x in (q, k, v, out, lse)))
        for tensor, x in zip("qkvo", (q, k, v, out), strict=True):
            for axis, dim in (("batch", 0), ("row", 1), ("head", 2)):
                setattr(params, f"{tensor}_{axis}_stride", x.stride(dim))
        params.batch, params.seqlen_q, params.heads_q, params.head_dim = q.shape
        params.head_dim_v = v.shape[3]
        params.seqlen_kv, params.heads_kv = k.shape[1], k.shape[2]
        params.softmax_scale = q.shape[3] ** -0.5
        params.is_causal = int(causal)
        params.window_left, params.window_right = -1, 0 if causal else -1
        return params, out, lse

    def launch(name: str, params: Params) -> None:
        tile, kernel = tiles[name]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if error := library.launch(ctypes.byref(tile), kernel, ctypes.byref(params), stream):
            raise RuntimeError(f"{name}: error {error}")

    def qkv(
        batch: int, heads_q: int, heads_kv: int, seqlen_q: int, seqlen_kv: int, d: int
    ) -> list[Tensor]:
        q = torch.randn(batch, seqlen_q, heads_q, d, device=device).bfloat16()
        shape = (batch, max(seqlen_kv, 1), heads_kv, d)
        return [q, *(torch.randn(shape, device=device).bfloat16()[:, :seqlen_kv] for _ in "kv")]

    if trace:
        traces: dict[str, Any] = {}
        for number, name in enumerate(
            json.loads((folder / "tiles.json").read_text(encoding="utf-8"))
        ):
            if "-trace=1" not in name:
                continue
            for problem in trace:
                batch, heads_q, heads_kv, seqlen, d, causal = ast.literal_eval(problem)
                if not name.startswith(f"{d}:"):
                    continue
                q, k, v = qkv(batch, heads_q, heads_kv, seqlen, seqlen, d)
                params = prepare(q, k, v, causal)[0]
                data = (ctypes.c_uint * (4 * 4096))()
                cubin = str(folder / f"{number}.cubin").encode()
                if error := library.read_trace(
                    cubin,
                    ctypes.byref(parse(name)),
                    ctypes.byref(params),
                    data,
                    ctypes.c_size_t(ctypes.sizeof(data)),
                ):
                    raise SystemExit(f"{name}: {error}")
                traces[f"{name} {problem}"] = [
                    [int(x) for x in data[4096 * w : 4096 * (w + 1)] if x] for w in range(4)
                ]
        output.with_name("trace.json").write_text(json.dumps(traces), encoding="utf-8")
        tiles = {name: tile for name, tile in tiles.items() if "-trace=1" not in name}

    if profile:
        batch, heads_q, heads_kv, seqlen, d, causal = ast.literal_eval(profile)
        q, k, v = qkv(batch, heads_q, heads_kv, seqlen, seqlen, d)
        params = prepare(q, k, v, causal)
        for name in tiles:
            if name.startswith(f"{d}:"):
                launch(name, params[0])
        torch.cuda.synchronize()
        return

    wrong = []
    references: dict[Any, Any] = {}
    for name in list(tiles):
        head_dim = int(name.partition(":")[0])
        print("checking", name, flush=True)
        for *shape, causal in CHECKS:
            for d, growing in ((head_dim, False), (head_dim - 8, False), (head_dim, True)):
                key = (*shape, causal, d, growing)
                if key not in references:
                    torch.manual_seed(0)
                    q, k, v = qkv(*shape, d)
                    if growing:  # scores of hundreds, the largest in the tiles that come last
                        k *= torch.linspace(60, 1, k.shape[1], device=device)[None, :, None, None]
                    expected = attention_reference(q, k, v, mask=causal_if(causal))
                    same, _ = attention_reference(q, k, v, mask=causal_if(causal), dtype=q.dtype)
                    references[key] = (q, k, v, *expected, same)
                q, k, v, expected, expected_lse, same = references[key]
                params, out, lse = prepare(q, k, v, causal)
                launch(name, params)
                error = (out.double() - expected).abs().max().item()
                same_error = (same.double() - expected).nan_to_num().abs().max().item()
                bound = error_bound(q.dtype, same_error, max(1.0, expected.abs().max().item()))
                # Relative where scores are large, as float32 is.
                lse_error = (lse.double() - expected_lse) / expected_lse.abs().clamp(64, 1e6) * 64
                lse_error = lse_error.abs().nan_to_num(0.0).max().item()
                if not error <= bound or not lse_error <= 1e-4:
                    wrong.append(name)
                    print(f"WRONG {name} {key}: {error:.3g} > {bound:.3g}, lse {lse_error:.3g}")
        if name in wrong:
            del tiles[name]
    print(f"{len(tiles)} tiles correct, {len(set(wrong))} wrong", flush=True)
    references.clear()

    limits = measure_limits(device, torch.bfloat16)
    print(
        f"{torch.cuda.get_device_name()}: matmul {limits.matmul_flops / 1e12:.0f} TFLOP/s, "
        f"copy {limits.copy_bytes / 1e12:.2f} TB/s"
    )
    results: dict[str, Any] = {}
    for problem in dict.fromkeys([row.problem for row in ROWS] + [odd for odd, _ in UNEVEN]):
        if only and not re.search(only, problem.label):
            continue
        d, causal = problem.head_dim, problem.mask.is_causal
        q, k, v = qkv(
            problem.batch,
            problem.heads_q,
            problem.heads_kv,
            problem.seqlen_q,
            problem.seqlen_kv,
            d,
        )
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]

        def cudnn(tensors: list[Tensor] = heads_first, causal: bool = causal) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(
                    *tensors,
                    is_causal=causal,
                    enable_gqa=tensors[0].shape[1] != tensors[1].shape[1],
                )

        candidates: dict[str, Any] = {"cudnn": cudnn}
        prepared = prepare(q, k, v, causal)
        for name in tiles:
            if name.startswith(f"{d}:"):
                candidates[name] = lambda name=name, p=prepared[0]: launch(name, p)
        if len(candidates) == 1:
            continue
        measured = measure(candidates, device, rounds=rounds)
        floor = limits.floor(problem.flops, problem.bytes)
        line = []
        for name, result in measured.items():
            if result.status != "ok":
                raise SystemExit(f"{name}: {result.reason}")
            median = median_interval(result.samples).value
            line.append((median, f"{name.partition(':')[2] or name} {floor / median:.3f}"))
        line.sort()
        print(
            problem.label, f"{line[0][0] * 1e3:.4f} ms |", "  ".join(t for _, t in line), flush=True
        )
        results[problem.label] = {
            name: [round(s * 1e6, 2) for s in result.samples] for name, result in measured.items()
        }
    if output:
        from flashmoe.machine.device import fingerprint

        document = {
            "fingerprint": fingerprint(device).to_json(),
            "matmul_flops": limits.matmul_flops,
            "copy_bytes": limits.copy_bytes,
            "microseconds": results,
        }
        output.write_text(json.dumps(document) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build")
    building.add_argument("folder", type=Path)
    building.add_argument("tiles", nargs="+", metavar="TILE")
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--output", type=Path, metavar="FILE")
    running.add_argument("--rounds", type=int, default=15)
    running.add_argument("--only", default="", help="regular expression on the problem's label")
    running.add_argument("--profile", default="", help="launch once on this problem, for ncu")
    running.add_argument("--trace", action="append", default=[], metavar="PROBLEM")
    arguments = parser.parse_args()
    if arguments.command == "build":
        build(arguments.folder, arguments.tiles)
    else:
        run(
            arguments.folder,
            arguments.output,
            arguments.rounds,
            arguments.only,
            arguments.profile,
            arguments.trace,
        )


if __name__ == "__main__":
    main()
