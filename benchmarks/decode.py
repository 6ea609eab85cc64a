"""Decoding beside SDPA, FlashAttention-3 and 4 where they are installed, pages beside a contiguous
cache; with --tiles every tile with several splits.

    python benchmarks/decode.py --output benchmarks/results/decode-DEVICE.json
    python benchmarks/decode.py --only tiles --output benchmarks/results/decode-tiles-DEVICE.json

Rows are events around one call of what is planned, with L2 flushed (flashmoe.measure.timing);
`kernels` is the median sum of the durations of a call's kernels as CUPTI has them (torch.profiler),
L2 flushed too, us. `tiles` has these alone. All is compared with the float64 reference first.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sides import PEERS, Timed, against, judged, ours, timed
from tables import Row, Table, listed, measures, over_peers, parser_of

from flashmoe import flash_attn_with_kvcache
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.inputs import Inputs, make_inputs
from flashmoe.spec.call import Call, Sequences
from flashmoe.spec.mask import CAUSAL, FULL
from flashmoe.spec.problem import Problem

PAGE_SIZES = {16: 0.90, 64: 0.95, 256: 0.97}  # and what is wanted of the contiguous cache's speed


@dataclass(frozen=True)
class Spec:
    """A problem; milliseconds that cuDNN and FlashAttention-3 took on an H200 (29 November 2026,
    one run; 0 where they were not measured); whether it is of those that the mean is taken of."""

    problem: Problem
    cudnn: float = 0.0
    fa3: float = 0.0
    in_mean: bool = True


def _decode(
    batch: int, heads_q: int, heads_kv: int, seqlen_kv: int, head_dim: int = 128, seqlen_q: int = 1
) -> Problem:
    mask = CAUSAL if seqlen_q > 1 else FULL
    return Problem(batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim, "bfloat16", mask)


SHORT, LONG = _decode(1, 32, 8, 1024), _decode(1, 32, 8, 8192)
SPECS = (
    Spec(LONG, 0.0205, 0.0258),
    Spec(_decode(1, 32, 8, 32768), 0.0475, 0.0557),
    Spec(_decode(8, 32, 8, 4096), 0.0467, 0.0528),
    Spec(_decode(16, 32, 8, 8192), 0.132, 0.144),
    Spec(_decode(64, 32, 8, 4096), 0.254, 0.271),
    Spec(_decode(128, 32, 8, 1024), 0.136, 0.158),
    Spec(_decode(1, 64, 8, 32768), 0.0470, 0.0557),
    Spec(_decode(8, 32, 32, 4096), 0.134, 0.147),
    Spec(_decode(4, 32, 8, 8192, seqlen_q=4), 0.0, 0.0524),
    Spec(SHORT, 0.0112, 0.0166, in_mean=False),
    Spec(_decode(1, 8, 1, 65536), 0.0240, 0.0312, in_mean=False),
    Spec(_decode(4, 16, 2, 8192, 256), 0.0416, in_mean=False),
    Spec(_decode(16, 64, 8, 4096, 64), 0.0498, in_mean=False),
)
PAGED = tuple(spec.problem for spec in SPECS[:4])
DECODE = BACKENDS["decode"]


def in_cache(inputs: Inputs, page_size: int = 0) -> Inputs:
    """The same dense keys as a cache with lengths, contiguous or in pages in random order."""
    p, call = inputs.problem, inputs.call
    lengths = torch.full((p.batch,), p.seqlen_kv, dtype=torch.int32, device=call.q.device)
    if not page_size:
        cached = replace(p, layout="cache")
        return Inputs(cached, call._replace(sequences=Sequences(seqused_k=lengths)))
    columns = -(-p.seqlen_kv // page_size)
    padding = (0, 0, 0, 0, 0, columns * page_size - p.seqlen_kv)
    places = torch.randperm(p.batch * columns, device=call.q.device)
    k, v = (
        torch.nn.functional.pad(x, padding).reshape(-1, page_size, *x.shape[2:])[places.argsort()]
        for x in (call.k, call.v)
    )
    table = places.reshape(p.batch, columns).int()
    sequences = Sequences(seqused_k=lengths, block_table=table)
    paged = replace(p, layout="paged", seqlen_kv=columns * page_size)
    return Inputs(paged, Call(call.q, k, v, call.softmax_scale, sequences=sequences))


def of_cache(inputs: Inputs) -> Timed:
    """flash_attn_with_kvcache, as users call it."""
    call, p = inputs.call, inputs.problem
    options: dict[str, Any] = {"cache_seqlens": call.sequences.seqused_k, "causal": True}
    if call.sequences.block_table is not None:
        options["block_table"] = call.sequences.block_table
    if not p.mask.is_causal:
        assert p.seqlen_q == 1, "one query sees all keys, causal or not"
    function: Callable[..., Any] = flash_attn_with_kvcache
    return timed(lambda q, k, v: function(q, k, v, **options), inputs)


def kernels(calls: Mapping[str, Timed], device: torch.device, rounds: int) -> dict[str, float]:
    """Of each call by name: the median sum of its kernels' durations in us. One profile for all."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(rounds):
            for call in calls.values():
                flush.zero_()
                call()
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
    groups: list[list[float]] = []
    for event in events:
        duration = event.time_range.elapsed_us()
        if duration > 40 and ("emset" in event.name or "ill" in event.name):
            groups.append([])
        elif groups:
            groups[-1].append(duration)
    names = list(calls)
    if len(groups) != rounds * len(names):
        raise RuntimeError(f"{len(groups)} flushes, not {rounds * len(names)}")
    found = defaultdict(list)
    for i, group in enumerate(groups):
        found[names[i % len(names)]].append(sum(group))
    return {name: statistics.median(values) for name, values in found.items()}


def facts_of(calls: Mapping[str, Timed], table: Table) -> dict[str, Any]:
    if table.device.type == "cpu":
        return {}
    found = kernels(calls, table.device, table.arguments.rounds)
    return {"kernels": {name: round(us, 2) for name, us in found.items()}}


@measures
def decode_row(table: Table, section: str, problem: Problem, spec: Spec) -> Row | None:
    inputs = make_inputs(problem, table.device)
    peers = [name for name in table.peers(PEERS) if name not in ("efficient", "flex")]
    calls, failed, wrong = against(inputs, peers)
    facts = {} if wrong else facts_of(calls, table)
    times = listed(problem, {"cuDNN": spec.cudnn, "FA3": spec.fa3})
    return table.row(section, problem, calls, wrong=wrong, failed=failed, listed=times, **facts)


def state_decode(table: Table) -> None:
    found = [(spec, decode_row(table, "decode", spec.problem, spec)) for spec in SPECS]
    rows = [row for spec, row in found if spec.in_mean]
    table.mean("decode: mean efficiency (the goal)", rows, Row.efficiency, at_least=0.90)
    table.mean("decode: mean efficiency (enough)", rows, Row.efficiency, at_least=0.84)
    table.each("decode: no row behind cuDNN or FlashAttention-3", rows, over_peers, at_least=1.0)
    limits = ((SHORT, 7.0, "the goal"), (LONG, 11.0, "the goal"), (LONG, 13.5, "enough"))
    for problem, us, what in limits:
        row = next((row for spec, row in found if spec.problem == problem), None)
        line = f"decode: 1 x 32/8 x {problem.seqlen_kv}, us ({what})"
        table.one(line, None if row is None else row.seconds() * 1e6, at_most=us)


@measures
def page_row(table: Table, section: str, problem: Problem) -> Row | None:
    """The contiguous cache is "ours"."""
    dense = make_inputs(problem, table.device)
    caches = {"ours": in_cache(dense)}
    caches |= {f"ours, pages of {n}": in_cache(dense, n) for n in PAGE_SIZES}
    calls = {name: of_cache(inputs) for name, inputs in caches.items()}
    reasons = [judged(inputs, calls[name]()) for name, inputs in caches.items()]
    calls["ours, dense"] = timed(ours(dense), dense)
    wrong = "; ".join(reason for reason in reasons if reason)
    facts = {} if wrong else facts_of(calls, table)
    return table.row(section, problem, calls, wrong=wrong, **facts)


def state_pages(table: Table, what: str, rows: Sequence[Row | None], contiguous: str) -> None:
    for page_size, share in PAGE_SIZES.items():

        def value(row: Row, name: str = f"ours, pages of {page_size}") -> float:
            return row.ratio(contiguous, name).value

        line = f"{what} of {page_size}: share of the contiguous cache's speed"
        table.each(line, rows, value, at_least=share)


@measures
def tile_row(table: Table, section: str, problem: Problem) -> Row | None:
    """Every tile with a few numbers of splits, by kernels alone; the default is "ours"."""
    here = arch(table.device)
    inputs = make_inputs(problem, table.device)
    runs = {"ours": DECODE.bind(problem, DECODE.default_tile(problem, here))}
    rows = problem.seqlen_q * problem.heads_q // problem.heads_kv
    for tile in DECODE.compiled_in(problem, here):
        slots = tile.ctas_per_sm * here.sm_count
        trees = problem.batch * problem.heads_kv * -(-rows // tile.block_m)
        steps = -(-problem.seqlen_kv // tile.block_n)
        tried = {slots // trees * n // 2 for n in (1, 2, 4, 6)} | {16}
        chosen = {0, *({1} if trees * 4 > slots else ())}
        for splits in sorted(chosen | {max(min(n, steps), 1) for n in tried}):
            runs[f"{tile} splits {splits}"] = DECODE.bind_split(problem, tile, splits)
    calls = {
        name: (lambda run=run, call=inputs.call: (run(call)[0],)) for name, run in runs.items()
    }
    for name, call in calls.items():
        if wrong := judged(inputs, call()):
            table.fail(f"{section}, {problem.label}, {name}", wrong)
    times = kernels(calls, table.device, table.arguments.rounds)
    for name, us in sorted(times.items(), key=lambda pair: pair[1]):
        print(f"{problem.label} {name}: {us:.2f} us", flush=True)
    return None


def main() -> int:
    parser = parser_of(__doc__, rounds=25, seconds=150)
    arguments = parser.parse_args()
    if "tiles" in arguments.only and arguments.device == "cpu":
        parser.error("tiles are a GPU's")
    table = Table(arguments)
    with torch.no_grad():
        if table.wants("decode"):
            state_decode(table)
        if table.wants("pages"):
            rows = [page_row(table, "pages", problem) for problem in PAGED]
            state_pages(table, "pages", rows, "ours")
        if "tiles" in arguments.only:
            for spec in SPECS:
                tile_row(table, "tiles", spec.problem)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
