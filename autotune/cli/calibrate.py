"""`--calibrate`: measures the predictor's constants on this GPU and stores them."""

from __future__ import annotations

import json
import math
import time
from statistics import median

import torch
from rich.console import Console

from flashmoe import api
from flashmoe.autotune.calibration import calibrated, measured
from flashmoe.autotune.cli.arguments import DONE, NOTHING_MEASURED, UsageError
from flashmoe.autotune.cli.progress import shown
from flashmoe.machine.cache import make_folder, require_writable
from flashmoe.machine.device import arch
from flashmoe.machine.files import write_whole
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.prediction import costs
from flashmoe.prediction.predict import microseconds

# Of two minutes; the rest is for starting, compiling a first kernel and fitting.
_SECONDS = 80.0


def run(target: torch.device, command: str) -> int:
    """Measure, fit and store; returns the exit code. Raises UsageError on a CPU."""
    if target.type != "cuda":
        raise UsageError(
            "--calibrate must be used with a CUDA device, for nothing is predicted on "
            f"others, got {target}"
        )
    require_writable()
    start, here, prints = time.perf_counter(), arch(target), fingerprint(target)
    with shown(Console(stderr=True)) as watch, torch.inference_mode():
        watch.begin(_SECONDS)
        pairs = measured(target, here, _SECONDS, watch.stage)
        watch.stage("fitting")
        table = calibrated(costs.shipped(here), pairs)
    if not pairs:
        print("nothing could be measured")
        return NOTHING_MEASURED
    path = costs.user_path(here.name)
    make_folder(path.parent)
    data = table.to_json() | {"kernels": prints.kernels, "command": command}
    write_whole(path, json.dumps({**data, "fingerprint": prints.to_json()}, indent=1) + "\n")
    api.forget_plans()
    errors = [
        abs(math.log(microseconds(work, table.costs[name]) / us))
        for name, found in pairs.items()
        for work, us in found
    ]
    print(
        f"{len(pairs)} kernels, {len(errors)} times, {time.perf_counter() - start:.0f} s; "
        f"half of them are predicted within {median(errors):.1%}"
    )
    print(f"costs: {path}")
    return DONE
