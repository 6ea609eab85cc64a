"""The decode kernel beside SDPA on one GPU: every tile with several splits, pages, host cost.

    python benchmarks/decode.py --output benchmarks/results/decode-DEVICE.json [--quick]

`device` is events around one call with L2 flushed (flashmoe.measure.timing), `kernel` the sum of
the durations of the call's kernels as CUPTI has them (torch.profiler), L2 flushed too; medians in
us. TB/s are the bytes of K and V over `kernel`. First each tile and split is compared with float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.timing import cuda_sampler
from flashmoe.spec.call import Call, Sequences
from flashmoe.spec.mask import CAUSAL, FULL
from flashmoe.spec.problem import Problem

DEVICE = torch.device("cuda", 0)
PEAK = 4.28  # TB/s that an H200's memory delivered in the run of the listed times
# batch, heads_q, heads_kv, seqlen_kv, head_dim, seqlen_q; what cuDNN and FlashAttention-3 took on
# an H200 (29 November 2026, one run), us
ROWS = [
    ((1, 32, 8, 1024, 128, 1), 11.2, 16.6),
    ((1, 32, 8, 8192, 128, 1), 20.5, 25.8),
    ((1, 32, 8, 32768, 128, 1), 47.5, 55.7),
    ((8, 32, 8, 4096, 128, 1), 46.7, 52.8),
    ((16, 32, 8, 8192, 128, 1), 132, 144),
    ((64, 32, 8, 4096, 128, 1), 254, 271),
    ((128, 32, 8, 1024, 128, 1), 136, 158),
    ((1, 64, 8, 32768, 128, 1), 47.0, 55.7),
    ((8, 32, 32, 4096, 128, 1), 134, 147),
    ((1, 8, 1, 65536, 128, 1), 24.0, 31.2),
    ((4, 32, 8, 8192, 128, 4), None, 52.4),
    ((4, 16, 2, 8192, 256, 1), 41.6, None),
    ((16, 64, 8, 4096, 64, 1), 49.8, None),
]
PAGED = [(1, 32, 8, 8192, 128, 1), (8, 32, 8, 4096, 128, 1), (16, 32, 8, 8192, 128, 1)]
DECODE = BACKENDS["decode"]


def tensors(shape, page_size=0):
    batch, heads_q, heads_kv, seqlen_kv, head_dim, seqlen_q = shape
    kind = {"device": DEVICE, "dtype": torch.bfloat16}
    q = torch.randn(batch, seqlen_q, heads_q, head_dim, **kind)
    k, v = (torch.randn(batch, seqlen_kv, heads_kv, head_dim, **kind) for _ in "kv")
    if not page_size:
        return Call(q, k, v, head_dim**-0.5), "dense"
    pages = batch * (seqlen_kv // page_size)
    order = torch.randperm(pages, device=DEVICE)
    places = torch.empty_like(order)
    places[order] = torch.arange(pages, device=DEVICE)
    k, v = (x.reshape(pages, page_size, heads_kv, head_dim)[order].contiguous() for x in (k, v))
    used = torch.full((batch,), seqlen_kv, dtype=torch.int32, device=DEVICE)
    table = places.reshape(batch, -1).int().contiguous()
    sequences = Sequences(seqused_k=used, block_table=table)
    return Call(q, k, v, head_dim**-0.5, sequences=sequences), "paged"


def problem_of(shape, layout):
    batch, heads_q, heads_kv, seqlen_kv, head_dim, seqlen_q = shape
    mask = CAUSAL if seqlen_q > 1 else FULL
    sizes = (batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim)
    return Problem(*sizes, "bfloat16", mask, layout=layout)


class Timer:
    def __init__(self, rounds):
        self.rounds = rounds
        self.sampler = cuda_sampler(DEVICE)
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)

    def device(self, call):
        call()
        return 1e6 * statistics.median(self.sampler(call) for _ in range(self.rounds))

    def kernel(self, calls):
        """Of each call by name: the median sum of its kernels' durations. One profile for all."""
        names = list(calls)
        for call in calls.values():
            call()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(self.rounds):
                for name in names:
                    self.flush.zero_()
                    calls[name]()
            torch.cuda.synchronize()
        events = [
            e
            for e in profile.events()
            if e.device_type == torch.autograd.DeviceType.CUDA
            and not e.name.startswith("ProfilerStep")
            and "Activity" not in e.name
        ]
        events.sort(key=lambda e: e.time_range.start)
        # A flush is the only memset, or fill, that takes as long as 256 MB do.
        groups, current = [], None
        for event in events:
            duration = event.time_range.elapsed_us()
            if duration > 40 and ("emset" in event.name or "ill" in event.name):
                current = []
                groups.append(current)
            elif current is not None:
                current.append(duration)
        if len(groups) != self.rounds * len(names):
            raise RuntimeError(f"{len(groups)} flushes, not {self.rounds * len(names)}")
        found = defaultdict(list)
        for i, group in enumerate(groups):
            found[names[i % len(names)]].append(sum(group))
        return {name: statistics.median(values) for name, values in found.items()}


def sdpa_calls(call, shape):
    q, k, v = (x.transpose(1, 2) for x in call[:3])
    gqa = shape[1] != shape[2]
    found = {}
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("fa2", SDPBackend.FLASH_ATTENTION),
    ):

        def run(backend=backend):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

        try:
            run()
            torch.cuda.synchronize()
            found[name] = run
        except RuntimeError:
            pass
    return found


def decode_calls(call, shape, layout):
    """By (tile, num_splits): the default first, then every tile with a few numbers of splits."""
    problem, here = problem_of(shape, layout), arch(DEVICE)
    default = DECODE.default_tile(problem, here)
    slots = {t: t.ctas_per_sm * here.sm_count for t in DECODE.compiled_in(problem, here)}
    found = {("default", 0): DECODE.bind(problem, default)}
    for tile, slot in slots.items():
        rows = shape[5] * shape[1] // shape[2]
        trees = shape[0] * shape[2] * -(-rows // tile.block_m)
        steps = -(-shape[3] // tile.block_n)
        chosen = {0, 1} if trees * 4 > slot else {0}
        chosen |= {
            max(min(x, steps), 1)
            for x in (slot // trees, 2 * slot // trees, 3 * slot // trees, slot // (2 * trees), 16)
        }
        for splits in sorted(chosen):
            found[str(tile), splits] = DECODE.bind_split(problem, tile, splits)
    return {name: (lambda run=run: run(call)) for name, run in found.items()}


def right(call, shape, layout):
    """The largest difference of any tile and split from float32 attention."""
    k, v = call.k, call.v
    if layout == "paged":
        table = call.sequences.block_table.long()
        k, v = (x[table].flatten(1, 2) for x in (k, v))
    group = shape[1] // shape[2]
    q, k, v = (x.float().transpose(1, 2) for x in (call.q, k, v))
    worst = 0.0
    outs = {name: run()[0].float() for name, run in decode_calls(call, shape, layout).items()}
    for h in range(shape[1]):
        scores = (q[:, h] @ k[:, h // group].transpose(1, 2)) * call.softmax_scale
        if shape[5] > 1:
            i = torch.arange(shape[5], device=DEVICE).unsqueeze(1)
            j = torch.arange(shape[3], device=DEVICE)
            scores.masked_fill_(j > i + shape[3] - shape[5], -torch.inf)
        expected = torch.softmax(scores, -1) @ v[:, h // group]
        worst = max(worst, *((o[:, :, h] - expected).abs().max().item() for o in outs.values()))
    return worst


def host_cost():
    shape = (1, 32, 8, 64, 128, 1)
    found = {}
    for page_size in (0, 16):
        call, layout = tensors(shape, page_size)
        problem = problem_of(shape, layout)
        run = DECODE.bind(problem, DECODE.default_tile(problem, arch(DEVICE)))
        for _ in range(200):
            run(call)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(1000):
            run(call)
        found[layout] = (time.perf_counter() - begin) * 1e3
        torch.cuda.synchronize()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, the default tile only")
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    timer = Timer(10 if arguments.quick else 25)
    data, lines = [], []
    with torch.no_grad():
        for shape, cudnn_then, fa3_then in ROWS:
            call, layout = tensors(shape)
            error = right(call, shape, layout)
            calls = decode_calls(call, shape, layout)
            if arguments.quick:
                calls = {("default", 0): calls["default", 0]}
            calls |= {(name, 0): run for name, run in sdpa_calls(call, shape).items()}
            kernel = timer.kernel(calls)
            ours = {n: t for n, t in kernel.items() if n[0] not in ("cudnn", "fa2")}
            best = min(ours, key=ours.__getitem__)
            device = {
                n: timer.device(calls[n])
                for n in {("default", 0), best, *(kernel.keys() - ours.keys())}
            }
            nbytes = 4 * shape[0] * shape[2] * shape[3] * shape[4]
            for name, us in sorted(ours.items(), key=lambda pair: pair[1]):
                print(f"  {shape} {name[0]} splits {name[1]}: {us:.2f}", flush=True)
            rate = nbytes / ours["default", 0] / 1e6
            others = "  ".join(
                f"{n[0]} {t:.1f} ({device[n]:.1f})" for n, t in kernel.items() if n not in ours
            )
            lines.append(
                f"{shape!s:32} error {error:.4f}  default {ours['default', 0]:7.2f} "
                f"({device['default', 0]:.1f}) {rate:.2f} TB/s {rate / PEAK:.2f}  "
                f"best {ours[best]:7.2f} ({device[best]:.1f}) {best[0]} splits {best[1]}  "
                f"{others}  "
                f"[listed: cudnn {cudnn_then} fa3 {fa3_then}]"
            )
            data.append(
                {
                    "shape": shape,
                    "error": error,
                    "cudnn_then": cudnn_then,
                    "fa3_then": fa3_then,
                    "kernel_us": {str(n): t for n, t in kernel.items()},
                    "device_us": {str(n): t for n, t in device.items()},
                }
            )
            del call, calls
        for shape in PAGED:
            dense, layout = tensors(shape)
            problem = problem_of(shape, layout)
            tile = DECODE.default_tile(problem, arch(DEVICE))
            run = DECODE.bind(problem, tile)
            calls = {"dense": lambda run=run, call=dense: run(call)}
            errors = []
            for page_size in (16, 64, 256):
                call, layout = tensors(shape, page_size)
                errors.append(right(call, shape, layout))
                run = DECODE.bind(problem_of(shape, layout), tile)
                calls[page_size] = lambda run=run, call=call: run(call)
            kernel = timer.kernel(calls)
            ratios = "  ".join(
                f"{n}: {t:.2f} ({kernel['dense'] / t:.3f})" for n, t in kernel.items()
            )
            lines.append(f"pages, {shape!s:32} error {max(errors):.4f}  {ratios}")
            data.append({"pages": shape, "kernel_us": {str(n): t for n, t in kernel.items()}})
    host = host_cost()
    lines.append("host, us a call: " + ", ".join(f"{n} {t:.1f}" for n, t in host.items()))
    if arguments.output:
        text = json.dumps({"rows": data, "host": host}, indent=1)
        arguments.output.write_text(text, encoding="utf-8")
    print("\nkernel us (device us, events around one call)")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
