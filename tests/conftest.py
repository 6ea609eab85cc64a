"""Without a GPU, Triton's kernels run in its interpreter: it must be chosen before Triton loads."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Inputs differ from test to test and repeat from run to run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
