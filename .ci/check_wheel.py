"""Imports the installed package as a user would, attends, and checks what it added."""

import importlib.metadata
import importlib.util
import sys

import torch

import flashmoe
import flashmoe.autotune
import flashmoe.ratchet
from flashmoe._extension import KERNEL_SOURCES
from flashmoe.measure.reference import attention_reference
from flashmoe.spec.mask import CAUSAL

torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    q = torch.randn(2, 33, 4, 40).to(dtype).requires_grad_()
    k, v = (torch.randn(2, 50, 2, 40).to(dtype).requires_grad_() for _ in range(2))
    out = flashmoe.flash_attn_func(q, k, v, causal=True)
    expected, _ = attention_reference(q, k, v, mask=CAUSAL)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    out.float().sum().backward()
    assert torch.isfinite(q.grad).all()

files = importlib.metadata.files("flashmoe") or []
top = {file.parts[0] for file in files if not file.parts[0].startswith(("..", "__"))}
extra = {name for name in top if not name.startswith("flashmoe")}
assert not extra, f"the wheel adds {extra} to site-packages"
for header in ("wgmma.cuh", "forward/sm90/kernel.cuh", "ptx/tensor_map.h"):
    assert (KERNEL_SOURCES / header).is_file(), f"{header}: tiles cannot be compiled at run time"
assert importlib.util.find_spec("flashmoe.autotune.__main__")
assert importlib.util.find_spec("flashmoe.ratchet.__main__")
print(f"ok: Python {sys.version.split()[0]}, torch {torch.__version__}, {flashmoe.__file__}")
