"""What must be chosen before torch and Triton load: how many threads work, and without a GPU
Triton's interpreter."""

from __future__ import annotations

import os
import zlib

import pytest

# pytest-xdist's workers share the cores, and so do processes that they start. Threads of torch that
# find no core free wait for one another, busily, and take several times as long as one thread.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max((os.cpu_count() or 1) // int(workers), 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Inputs differ from test to test and repeat from run to run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
