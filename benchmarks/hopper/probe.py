"""Builds the Hopper forward kernel alone, checks it, and times it beside SDPA's cuDNN backend.

    python benchmarks/hopper/probe.py --build build/hopper             # nvcc; no GPU needed
    python benchmarks/hopper/probe.py --run build/hopper --output FILE # on a Hopper GPU

Prints one line a problem: median and efficiency (floor over time, MEASURE: the larger of FLOPs over
the matmul rate and bytes over the copy rate, both measured in the same run) of every tile.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# batch, heads_q, heads_kv, seqlen, head_dim, causal
PROBLEMS = (
    (2, 32, 32, 8192, 64, False),
    (2, 32, 32, 8192, 64, True),
    (8, 32, 32, 2048, 64, False),
    (32, 32, 32, 512, 64, False),
    (32, 32, 32, 512, 64, True),
    (2, 16, 16, 8192, 128, False),
    (2, 16, 16, 8192, 128, True),
    (8, 16, 16, 2048, 128, True),
    (32, 16, 16, 512, 128, False),
    (32, 16, 16, 512, 128, True),
    (2, 8, 8, 8192, 256, False),
    (2, 8, 8, 8192, 256, True),
    (32, 8, 8, 512, 256, False),
)
# batch, heads_q, heads_kv, seqlen_q, seqlen_kv, causal
CHECKS = (
    (1, 2, 2, 128, 128, False),
    (2, 4, 2, 300, 411, False),
    (2, 4, 1, 411, 300, True),
    (1, 2, 2, 1000, 1000, True),
    (1, 2, 2, 77, 1500, True),
)


class Params(ctypes.Structure):
    """csrc/attention/params.h."""

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
        ("causal", ctypes.c_int),
    )


def build(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ROOT / "csrc/ptx/generate_wgmma.py", folder], check=True)
    command = ["nvcc", "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-I{folder}", "-shared"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-Xcompiler=-fPIC"]
    command += ["-cudart=static", "-o", str(folder / "probe.so")]
    subprocess.run([*command, str(Path(__file__).with_name("probe.cu"))], check=True)


def run(folder: Path, output: Path | None) -> None:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from flashmoe.device import fingerprint
    from flashmoe.problem import Problem
    from flashmoe.reference import attention_reference, error_bound
    from flashmoe.stats import median_interval
    from flashmoe.timing import measure, measure_limits

    device = torch.device("cuda", 0)
    library = ctypes.CDLL(str((folder / "probe.so").resolve()))
    library.tile_name.restype = ctypes.c_char_p
    names: list[str] = []
    while (name := library.tile_name(len(names))) is not None:
        names.append(name.decode())

    def prepare(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Params, Tensor, Tensor]:
        out = torch.full_like(q, float("nan"))
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"), device=device)
        params = Params(*(x.data_ptr() for x in (q, k, v, out, lse)))
        for tensor, x in zip("qkvo", (q, k, v, out), strict=True):
            for axis, dim in (("batch", 0), ("row", 1), ("head", 2)):
                setattr(params, f"{tensor}_{axis}_stride", x.stride(dim))
        params.batch, params.seqlen_q, params.heads_q, params.head_dim = q.shape
        params.seqlen_kv, params.heads_kv = k.shape[1], k.shape[2]
        params.softmax_scale, params.causal = q.shape[3] ** -0.5, int(causal)
        return params, out, lse

    def launch(tile: int, params: Params) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if error := library.launch(tile, ctypes.byref(params), stream):
            raise RuntimeError(f"{names[tile]}: error {error}")

    def qkv(
        batch: int, heads_q: int, heads_kv: int, seqlen_q: int, seqlen_kv: int, d: int
    ) -> list[Tensor]:
        q = torch.randn(batch, seqlen_q, heads_q, d, device=device).bfloat16()
        shape = (batch, max(seqlen_kv, 1), heads_kv, d)
        return [q, *(torch.randn(shape, device=device).bfloat16()[:, :seqlen_kv] for _ in "kv")]

    for tile, name in enumerate(names):
        head_dim = int(name.partition(":")[0])
        for *shape, causal in CHECKS:
            for d in (head_dim, head_dim - 8):
                q, k, v = qkv(*shape, d)
                params, out, lse = prepare(q, k, v, causal)
                launch(tile, params)
                expected, expected_lse = attention_reference(q, k, v, causal=causal)
                same, _ = attention_reference(q, k, v, causal=causal, dtype=q.dtype)
                error = (out.double() - expected).abs().max().item()
                same_error = (same.double() - expected).nan_to_num().abs().max().item()
                scale = max(1.0, expected.abs().max().item())
                bound = error_bound(q.dtype, same_error, scale)
                torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)
                if not error <= bound:
                    raise SystemExit(f"{name} {shape} d{d} {causal}: {error:.3g} > {bound:.3g}")
    print(f"{len(names)} tiles correct", flush=True)

    limits = measure_limits(device, torch.bfloat16)
    results = {}
    for batch, heads_q, heads_kv, seqlen, d, causal in PROBLEMS:
        q, k, v = qkv(batch, heads_q, heads_kv, seqlen, seqlen, d)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]

        def cudnn(tensors: list[Tensor] = heads_first, causal: bool = causal) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(*tensors, is_causal=causal)

        candidates = {"cudnn": cudnn}
        prepared = prepare(q, k, v, causal)
        for tile, name in enumerate(names):
            if name.startswith(f"{d}:"):
                candidates[name] = lambda tile=tile, p=prepared[0]: launch(tile, p)
        measured = measure(candidates, device, rounds=30 if seqlen <= 2048 else 15)
        problem = Problem(batch, heads_q, heads_kv, seqlen, seqlen, d, "bfloat16", causal)
        floor = limits.floor(problem.flops, problem.bytes)
        line = []
        for name, result in measured.items():
            if result.status != "ok":
                raise SystemExit(f"{name}: {result.reason}")
            median = median_interval(result.samples).value
            line.append((median, f"{name} {median * 1e3:.4f} ms {floor / median:.3f}"))
        print(problem.label, "|", "  ".join(text for _, text in sorted(line)), flush=True)
        results[problem.label] = {name: result.samples for name, result in measured.items()}
    if output:
        document = {"fingerprint": fingerprint(device).to_json(), "samples": results}
        output.write_text(json.dumps(document) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, metavar="FOLDER")
    parser.add_argument("--run", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.build)
    if arguments.run:
        run(arguments.run, arguments.output)


if __name__ == "__main__":
    main()
