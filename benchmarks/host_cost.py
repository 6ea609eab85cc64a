"""What a call costs the host, ours beside SDPA's, by function, on any device.

    python benchmarks/host_cost.py [--device cpu] [--only TEXT]

Microseconds a call on inputs so small that no kernel is waited for: batches of calls back to back,
all rows in turn, the device idle before each. `least` is the least of the rounds, which other
programs on the machine move least, `median` theirs; `ratio` is that of the least to SDPA's least,
whose fastest backend counts. On a CPU the steps' backward computes nothing, for the real one is
torch operations that take longer than all else.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flashmoe._extension import training_plan
from flashmoe.frontend.gradients import Training
from flashmoe.frontend.node import attention_under_node, has_node

LIBRARIES: list[torch.library.Library] = []  # which live as long as the process
BACKENDS = (None, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


class Row(NamedTuple):
    """A call, and what is entered around a batch of it."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


class Nothing(torch.autograd.Function):
    """What a node in Python costs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dout, dout, dout


def forward(call: Callable[..., object], *arguments: object, **named: object) -> Row:
    return Row(partial(call, *arguments, **named), torch.no_grad)


def step(attend: Callable[..., Any], inputs: list[Tensor], dout: Tensor) -> Row:
    return Row(lambda: torch.autograd.grad(attend(*inputs), inputs, dout))


def sdpa(inputs: list[Tensor]) -> dict[str, Row]:
    """Forward and step of each of SDPA's backends that runs here, and of its choice."""
    inputs = [x.detach().transpose(1, 2).requires_grad_() for x in inputs]
    attend = F.scaled_dot_product_attention
    rows = {}
    for backend in BACKENDS:

        def chosen(
            backend: SDPBackend | None = backend, gradients: bool = True
        ) -> AbstractContextManager[object]:
            stack = contextlib.ExitStack()
            if not gradients:
                stack.enter_context(torch.no_grad())
            if backend is not None:
                stack.enter_context(sdpa_kernel(backend))
            return stack

        name = "default" if backend is None else backend.name.split("_")[0].lower()
        with chosen():
            try:
                attend(*inputs).sum().backward()
            except RuntimeError:
                continue
        rows[f"forward, SDPA {name}"] = Row(
            partial(attend, *inputs), partial(chosen, gradients=False)
        )
        rows[f"step, SDPA {name}"] = step(attend, inputs, torch.randn_like(inputs[0]))._replace(
            context=chosen
        )
    return rows


def rows_of(device: torch.device) -> dict[str, Row]:
    is_cuda = device.type == "cuda"
    batch, seqlen, heads, head_dim = (1, 128, 8, 64) if is_cuda else (1, 1, 1, 8)
    kind: dict[str, Any] = {
        "device": device,
        "dtype": torch.bfloat16 if is_cuda else torch.float32,
    }
    q, k, v = (torch.randn(batch, seqlen, heads, head_dim, **kind) for _ in "qkv")
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    flat = [x.detach()[0].clone().requires_grad_() for x in inputs]
    ends = torch.tensor([0, seqlen], dtype=torch.int32, device=device)
    lengths = (ends, ends, seqlen, seqlen)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> object:
        return flash_attn_varlen_func(q, k, v, *lengths)

    page_size = 16
    pages = torch.randn(2, 8, page_size, heads, head_dim, **kind)
    one, *new = torch.randn(3, batch, 1, heads, head_dim, **kind)
    table = torch.arange(8, dtype=torch.int32, device=device).unsqueeze(0)
    used = torch.full((1,), 9, dtype=torch.int32, device=device)
    cos, sin = torch.randn(2, 8 * page_size, head_dim // 2, **kind)
    cached = partial(
        flash_attn_with_kvcache, one, *pages, cache_seqlens=used, block_table=table, causal=True
    )
    return {
        "forward": forward(flash_attn_func, q, k, v),
        "forward, packed": forward(packed, q[0], k[0], v[0]),
        "cache, paged": forward(cached),
        "cache, appended to": forward(cached, *new),
        "cache, appended to, rotated": forward(cached, *new, rotary_cos=cos, rotary_sin=sin),
        "step": step(flash_attn_func, inputs, torch.randn_like(q)),
        "step with softmax_lse": step(
            lambda *x: flash_attn_func(*x, return_attn_probs=True)[0], inputs, torch.randn_like(q)
        ),
        "step, packed": step(packed, flat, torch.randn_like(q[0])),
        "step, a node in Python that does nothing": step(Nothing.apply, inputs, q),
        "step, a view": step(lambda x: x.view_as(q), inputs[:1], q),
        **sdpa(inputs),
    }


def measure(
    rows: dict[str, Row], device: torch.device, calls: int, rounds: int
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(-3, rounds):
        for name, row in rows.items():
            call = row.call
            with row.context():
                for _ in range(3):  # the row before left its own in the processor's caches
                    call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                seconds = time.perf_counter() - start
            if number >= 0:
                samples[name].append(seconds / calls * 1e6)
    return samples


def compute_nothing() -> dict[str, Row]:
    """In the backward of every call, on a CPU; and the step under the node in C++ that calls of
    CUDA's kernels have."""

    def backward(dout: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in arguments[:3])

    library = torch.library.Library("flashmoe", "FRAGMENT")
    library.impl("bwd_cuda_dense", backward, "CPU")
    LIBRARIES.append(library)
    Training.gradients = lambda _, call, saved: backward(saved.dout, *call)  # type: ignore
    if not has_node():
        return {}
    number = training_plan(-1, -1, 64, 0, False, "")
    inputs = [torch.randn(1, 1, 1, 8, requires_grad=True) for _ in "qkv"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_under_node(q, k, v, None, number, scale=0.3)[0]

    return {"step, under the node in C++": step(attend, inputs, torch.randn(1, 1, 1, 8))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--only", default="", help="rows that have this in their name")
    parser.add_argument("--calls", type=int, default=20, help="a batch")
    parser.add_argument("--rounds", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of(arguments.device)
    if arguments.device.type == "cpu":
        rows |= compute_nothing()
    rows = {name: row for name, row in rows.items() if arguments.only in name}
    samples = measure(rows, arguments.device, arguments.calls, arguments.rounds)
    least = {name: min(values) for name, values in samples.items()}
    print(f"{'us a call':42} {'least':>7} {'median':>7} {'ratio':>6}")
    for name, values in samples.items():
        peers = [x for key, x in least.items() if key.startswith(f"{name.split(',')[0]}, SDPA")]
        ratio = f"{least[name] / min(peers):6.2f}" if peers else ""
        print(f"{name:42} {least[name]:7.2f} {statistics.median(values):7.2f} {ratio}")


if __name__ == "__main__":
    main()
