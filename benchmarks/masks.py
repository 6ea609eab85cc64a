"""Masks as models have them, through scaled_dot_product_attention: our kernels beside torch's, its
own choice and cuDNN's.

    python benchmarks/masks.py --output benchmarks/results/masks-DEVICE.json
    python benchmarks/masks.py --device cpu --shrink 32 --rounds 2

Forward, and forward and backward with the gradients of q, k and v; bfloat16. The times say which
masks our kernels get on a GPU (flashmoe.backends.sdpa.is_slower_under): here they get all.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from tables import Row, Table, measures, parser_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe import api, scaled_dot_product_attention
from flashmoe.spec.mask import FULL
from flashmoe.spec.problem import Problem

Attend = Callable[..., Tensor]


def _lengths(problem: Problem, device: torch.device) -> Tensor:
    """(batch, 1, 1, seqlen_kv): of the first sequence all keys, of the last half of them."""
    lengths = torch.linspace(problem.seqlen_kv, problem.seqlen_kv // 2, problem.batch)
    keys = torch.arange(problem.seqlen_kv, device=device)
    return (keys < lengths.to(device)[:, None])[:, None, None]


def _causal(problem: Problem, device: torch.device) -> Tensor:
    return torch.ones(problem.seqlen_q, problem.seqlen_kv, dtype=torch.bool, device=device).tril()


def _padded_causal(problem: Problem, device: torch.device) -> Tensor:
    return _causal(problem, device) & _lengths(problem, device)


def _window(problem: Problem, device: torch.device) -> Tensor:
    return _causal(problem, device).triu(-problem.seqlen_q // 4)


def _bias(problem: Problem, device: torch.device, batch: int = 1) -> Tensor:
    shape = (batch, problem.heads_q, problem.seqlen_q, problem.seqlen_kv)
    return torch.randn(shape, device=device).bfloat16()


def _bias_of_each(problem: Problem, device: torch.device) -> Tensor:
    return _bias(problem, device, problem.batch)


# Batch, heads, seqlen_q, seqlen_kv, head_dim.
MASKS: dict[str, tuple[tuple[int, int, int, int, int], Callable[..., Tensor]]] = {
    "padding, BERT": ((32, 12, 384, 384, 64), _lengths),
    "padding, short": ((64, 12, 128, 128, 64), _lengths),
    "padding, cross attention": ((8, 20, 448, 1500, 64), _lengths),
    "causal and padding": ((4, 32, 2048, 2048, 128), _padded_causal),
    "causal in a window": ((1, 32, 4096, 4096, 128), _window),
    "bias of heads, short": ((8, 16, 512, 512, 64), _bias),
    "bias of heads": ((2, 16, 2048, 2048, 128), _bias),
    "bias of each, vision": ((256, 4, 49, 49, 32), _bias_of_each),
}


def _always(*_: object) -> bool:
    return True


def _cudnn(*arguments: Tensor, attn_mask: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return F.scaled_dot_product_attention(*arguments, attn_mask=attn_mask)


def attends(device: torch.device) -> dict[str, Attend]:
    found: dict[str, Attend] = {
        "ours": scaled_dot_product_attention,
        "SDPA": F.scaled_dot_product_attention,
    }
    return found | ({"SDPA cudnn": _cudnn} if device.type == "cuda" else {})


@measures
def measured(
    table: Table, section: str, problem: Problem, name: str, mask_of: Callable[..., Tensor]
) -> Row | None:
    def leaf(seqlen: int) -> Tensor:
        shape = (problem.batch, seqlen, problem.heads_q, problem.head_dim)
        x = torch.randn(shape, device=table.device).bfloat16().transpose(1, 2)
        return x.requires_grad_(section == "training")

    leaves = [leaf(n) for n in (problem.seqlen_q, problem.seqlen_kv, problem.seqlen_kv)]
    mask, dout = mask_of(problem, table.device), torch.randn_like(leaves[0])

    def call_of(attend: Attend) -> Callable[[], object]:
        def step() -> object:
            out = attend(*leaves, attn_mask=mask)
            return torch.autograd.grad(out, leaves, dout) if section == "training" else out

        return step

    calls = {peer: call_of(attend) for peer, attend in attends(table.device).items()}
    label = f"{name}: {problem.label}"
    return table.row(section, problem, calls, label=label, floor=0.0)


@mock.patch.object(api, "is_slower_under", _always)
def main() -> int:
    table = Table(parser_of(__doc__, seconds=120).parse_args())
    for section in filter(table.wants, ("forward", "training")):
        for name, ((batch, heads, seqlen_q, seqlen_kv, head_dim), mask_of) in MASKS.items():
            sizes = (batch, heads, heads, seqlen_q, seqlen_kv, head_dim)
            problem = Problem(*sizes, "bfloat16", FULL, terms=("mask",))
            measured(table, section, problem, name, mask_of)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
