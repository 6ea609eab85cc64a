"""What the tuning found: a table, a JSON document, and lines to copy."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from flashmoe.autotune.report.sensitivity import steps
from flashmoe.autotune.schedule.result import STATUSES, Result
from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.measure.stats import Interval
from flashmoe.spec.problem import Problem
from flashmoe.tiles import instances

SCHEMA = 2
# Fewer queries than these over more keys are decoding.
_DECODE_SEQLEN_Q = 16
_CALLS = {
    "dense": "flash_attn_func(q, k, v",
    "packed": "flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
    "max_seqlen_k",
}
_TERMS = {
    "softcap": ", softcap=softcap",
    "alibi": ", alibi_slopes=alibi_slopes",
    "sink": ", sinks=sinks",
    "dropout": ", dropout_p=dropout_p",
    "mask": ", attn_mask=attn_mask",
}


def outcome(result: Result) -> str:
    """One line: what came out, and why."""
    if result.best is None:
        return f"{result.status}: {result.reason}"
    return f"{result.status} {result.best}: {result.reason}"


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    larger = (("s", 1.0), ("ms", 1e3))
    unit, factor = next((x for x in larger if seconds * x[1] >= 1), ("µs", 1e6))
    return f"{seconds * factor:.3g} {unit}"


def ratio(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{interval.value:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"


def apart(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """The results by what their problems are, those that there are."""
    kinds: dict[str, list[Result]] = {"Forward": [], "Backward": [], "Decode": []}
    for result in results:
        problem = result.problem
        forward = "Decode" if problem.seqlen_q < _DECODE_SEQLEN_Q < problem.seqlen_kv else "Forward"
        kinds["Backward" if problem.direction == "bwd" else forward].append(result)
    return [(kind, found) for kind, found in kinds.items() if found]


def table(results: Sequence[Result]) -> Table:
    grid = Table(title="flashmoe.autotune", title_justify="left")
    for name in ("problem", "default tile", "best tile"):
        grid.add_column(name, overflow="fold")
    for name in ("time", "over default", "over SDPA", "outcome"):
        grid.add_column(name, no_wrap=True)
    for _, found in apart(results):
        for result in found:
            grid.add_row(
                result.problem.label,
                str(result.default or "-"),
                str(result.best or "-"),
                duration(result.seconds.value) if result.seconds else "-",
                ratio(result.speedup_default),
                ratio(result.speedup_sdpa),
                result.status,
            )
        grid.add_section()
    return grid


def costs(results: Sequence[Result]) -> list[str]:
    """A line for every problem that was searched: what a candidate cost, all in all."""
    return [
        f"{result.problem.label}: {search.tried} tiles tried of {search.space} legal ones in "
        f"{result.elapsed:.1f} s, {result.elapsed / search.tried:.2f} s each with compilation, "
        "checks and the final"
        for result in results
        if (search := result.search) is not None and search.tried
    ]


def rejections(results: Sequence[Result]) -> list[str]:
    """A line for every tile that computed wrong numbers or failed."""
    return [
        f"{result.problem.label}: {trial.tile} is {trial.status}: {trial.reason}"
        for result in results
        for trial in result.rejected()
    ]


def document(results: Sequence[Result], fingerprint: Fingerprint, **run: object) -> dict[str, Any]:
    """Everything known about a run, of which `run` tells how it went. Times in seconds; intervals
    are [value, low, high]."""
    return {
        "schema": SCHEMA,
        **run,
        "fingerprint": fingerprint.to_json(),
        "results": [_result_json(result) for result in results],
    }


def suggestions_text(
    results: Sequence[Result], fingerprint: Fingerprint, database: Path, command: str
) -> str:
    """Markdown with lines to copy for every result, where the database is not wanted."""
    measured = [result for result in results if result.best is not None]
    tiles = [result.best.tile for result in measured if result.best is not None]
    lines = [
        "# Tuning suggestions",
        "",
        f"{fingerprint.device}, torch {fingerprint.torch}, kernels {fingerprint.kernels}. "
        f"Written by `{command}`.",
        "",
        f"The results are in `{database}`, and flashmoe uses them already: nothing below needs to "
        "be done. The lines pin a choice by hand, for all calls (environment) or for one (Python).",
    ]
    if any(tile is not None and tile.kernel in instances.COLUMNS for tile in tiles):
        lines += [
            "",
            "To have the tiles of CUDA kernels compiled in, in the repository, before you build it "
            "again:",
            "",
            "```sh",
            f"python -m flashmoe.autotune apply --model {shlex.quote(fingerprint.device)}",
            "```",
        ]
    for kind, found in apart(measured):
        lines += ["", f"## {kind}"]
        for result in found:
            lines += ["", f"### {result.problem.label}", "", *_suggestion(result)]
    return "\n".join(lines) + "\n"


def _suggestion(result: Result) -> list[str]:
    best, seconds = result.best, result.seconds
    assert best is not None
    assert seconds is not None
    lines = [
        f"{best}: {duration(seconds.value)}, {ratio(result.speedup_default)} over the default "
        f"({result.default}), {ratio(result.speedup_sdpa)} over SDPA. {result.status}: "
        f"{STATUSES[result.status]}.",
    ]
    if result.problem.direction == "bwd":  # which no argument and no variable names a tile of
        return lines + _sensitivity_lines(result)
    lines += ["", "```sh", f"export FLASHMOE_BACKEND={best.backend}"]
    if best.tile is not None:
        lines.append(f"export FLASHMOE_TILE={best.tile}")
    call = call_text(result.problem)
    tile = f', tile="{best.tile}"' if best.tile is not None else ""
    lines += ["```", "", "```python", f'flashmoe.{call}, backend="{best.backend}"{tile})', "```"]
    return lines + _sensitivity_lines(result)


def call_text(problem: Problem) -> str:
    """A call of a problem's kind, as far as what it computes."""
    mask = problem.mask
    arguments = ""
    if not mask.is_full:
        window = f", window_size=({mask.left}, {mask.right})"
        arguments = ", causal=True" if mask.is_causal else window
    arguments += "".join(_TERMS[term] for term in problem.terms)
    return (
        _CALLS.get(problem.layout, "flash_attn_with_kvcache(q, k_cache, v_cache, ...") + arguments
    )


def _sensitivity_lines(result: Result) -> list[str]:
    """What one step away from the best tile costs, and what Optuna makes of it all."""
    lines: list[str] = []
    if found := steps(result):
        lines += ["", "| one step in | to | time |", "|---|---|---|"]
        for step in found:
            loss = "not measured" if step.loss is None else f"{step.loss:+.1%}"
            lines.append(f"| {step.axis.upper()} | {step.tile} | {loss} |")
    if result.search is not None and result.search.importances:
        shares = sorted(result.search.importances.items(), key=lambda pair: -pair[1])
        text = ", ".join(f"{name} {share:.0%}" for name, share in shares)
        lines += ["", f"Importance (PED-ANOVA): {text}."]
    return lines


def _result_json(result: Result) -> dict[str, Any]:
    problem, best, search = result.problem, result.best, result.search
    intervals = ("seconds", "speedup_default", "speedup_sdpa")
    return {
        "problem": problem.to_json(),
        "label": problem.label,
        "bucket": problem.bucket,
        "default": result.default and str(result.default),
        "best": best and str(best),
        "backend": best and best.backend,
        "tile": best and best.tile and str(best.tile),
        "tile_with_lse": result.tile_with_lse or None,
        **{name: getattr(result, name) for name in ("status", "reason", "noise", "elapsed")},
        **{name: _interval_json(getattr(result, name)) for name in intervals},
        "stored": result.store,
        "samples": {name: [*map(list, runs)] for name, runs in result.samples.items()},
        "sampler": search and search.sampler,
        "space": search and search.space,
        "tried": search.tried if search else 0,
        "seconds_per_candidate": (
            result.elapsed / search.tried if search and search.tried else None
        ),
        "trials": [
            {
                "tile": str(trial.tile),
                "status": trial.status,
                "time_over_default": _interval_json(trial.ratio),
                "reason": trial.reason,
            }
            for trial in (search.trials if search else ())
        ],
    }


def _interval_json(interval: Interval | None) -> list[float] | None:
    return None if interval is None else interval.to_json()
