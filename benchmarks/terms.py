"""Terms of scores, forward and backward, beside FlexAttention (compiled), FlashAttention-4 where it
is installed, SDPA's backends that have the feature, and the same problem without its term.

    python benchmarks/terms.py --output benchmarks/results/terms-DEVICE.json
    python benchmarks/terms.py --only softcap sink --seconds 120
    python benchmarks/terms.py --device cpu --shrink 128 --rounds 2

Softcap, sinks with a window of 128 (64/8 heads of 64, as gpt-oss), ALiBi, masks of padded keys,
additive biases, head_dim 192 with values of 128, dropout, and plain rows; bfloat16. Of a backward
the gradients of q, k and v are timed. Floors count the pairs that are visible, of a padding mask
those of kept keys. Whether the plain rows are what they were, `python -m flashmoe.ratchet ab` says.
Sections are in the order of their worth, so that a cut run has the first ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from sides import PEERS, against, ours, timed
from tables import LISTED_LIMITS, Row, Table, measures, over_peers, parser_of
from torch import Tensor

from flashmoe.measure.inputs import Inputs, make_inputs
from flashmoe.measure.timing import Limits
from flashmoe.spec.call import NO_TERMS
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import DTYPE_BYTES, Problem


def _bf16(
    batch: int, heads_q: int, heads_kv: int, seqlen: int, head_dim: int, mask: Mask, *terms: str
) -> Problem:
    sizes = (batch, heads_q, heads_kv, seqlen, seqlen, head_dim)
    return Problem(*sizes, "bfloat16", mask, terms=terms)


@dataclass(frozen=True)
class Spec:
    """A row: milliseconds that FlashAttention-4 4.0.0b36 and cuDNN took on an H200 forward and
    backward (29 November 2026, one run; 0 where they were not measured), the head_dim of values (0:
    the problem's), and which bias is added: of `heads` or of one head, with a gradient or not."""

    section: str
    problem: Problem
    fa4: tuple[float, float] = (0.0, 0.0)
    cudnn: tuple[float, float] = (0.0, 0.0)
    head_dim_v: int = 0
    bias: str = ""

    def label(self, problem: Problem) -> str:
        values = f", values of {self.head_dim_v}" if self.head_dim_v else ""
        return problem.label + values + (f", bias {self.bias}" if self.bias else "")


WINDOW = Mask(128, 0)
SPECS = (
    Spec("sink", _bf16(4, 64, 8, 4096, 64, WINDOW, "sink"), (0.282, 0.879)),
    Spec("sink", _bf16(1, 64, 8, 32768, 64, WINDOW, "sink"), (0.555, 1.848)),
    Spec("sink", _bf16(2, 64, 8, 8192, 64, WINDOW, "sink")),
    Spec("sink", _bf16(1, 64, 8, 16384, 64, WINDOW, "sink")),
    Spec("sink", _bf16(4, 64, 8, 4096, 64, CAUSAL, "sink"), (1.093, 2.833)),
    Spec("softcap", _bf16(4, 16, 8, 4096, 128, CAUSAL, "softcap"), (0.986, 2.005)),
    Spec("softcap", _bf16(4, 8, 4, 4096, 256, CAUSAL, "softcap"), (0.610, 2.186)),
    Spec("softcap", _bf16(4, 16, 8, 4096, 128, Mask(1024, 0), "softcap")),
    Spec("values", _bf16(4, 16, 16, 4096, 192, CAUSAL), (0.489, 1.894), (0.596, 1.988), 128),
    Spec("values", _bf16(1, 16, 16, 16384, 192, CAUSAL), (1.711, 6.506), (2.187, 6.626), 128),
    Spec("alibi", _bf16(4, 16, 16, 4096, 128, CAUSAL, "alibi")),
    Spec("alibi", _bf16(4, 32, 32, 2048, 64, CAUSAL, "alibi")),
    Spec("padding", _bf16(32, 12, 12, 512, 64, FULL, "mask")),
    Spec("padding", _bf16(4, 16, 16, 4096, 128, FULL, "mask")),
    Spec("padding", _bf16(4, 16, 16, 4096, 128, CAUSAL, "mask")),
    Spec("bias", _bf16(4, 16, 16, 2048, 64, FULL, "mask"), bias="of heads"),
    Spec("bias", _bf16(2, 16, 16, 4096, 128, FULL, "mask"), bias="of one head"),
    Spec("dropout", _bf16(4, 16, 16, 4096, 128, CAUSAL, "dropout")),
    Spec("dropout", _bf16(16, 16, 16, 512, 64, FULL, "dropout")),
    Spec("plain", _bf16(4, 64, 8, 4096, 64, CAUSAL)),
    Spec("plain", _bf16(4, 16, 8, 4096, 128, CAUSAL)),
    Spec("plain", _bf16(4, 8, 4, 4096, 256, CAUSAL)),
)
# What must be ahead of every peer.
JUDGED = ("sink", "softcap", "values", "alibi", "padding")


def inputs_of(spec: Spec, problem: Problem, device: torch.device) -> Inputs:
    """As make_inputs, but for what a Problem does not say: biases, and other values' head_dim."""
    made = make_inputs(problem, device)
    call, dout = made.call, made.dout
    if spec.bias:
        heads = problem.heads_q if spec.bias == "of heads" else 1
        shape = (1, heads, problem.seqlen_q, problem.seqlen_kv)
        bias = torch.randn(shape, device=device).to(call.q.dtype)
        call = call._replace(terms=NO_TERMS._replace(attn_mask=bias))
    if spec.head_dim_v:
        call = call._replace(v=call.v[..., : spec.head_dim_v].contiguous())
        if dout is not None:
            dout = dout[..., : spec.head_dim_v].contiguous()
    return Inputs(problem, call, dout)


def floor_of(spec: Spec, problem: Problem, inputs: Inputs, limits: Limits) -> float:
    """Of a backward 2 * pairs for each of five products: three of head_dim, two of head_dim_v."""
    backward = problem.direction == "bwd"
    flops, nbytes = float(problem.flops), problem.bytes
    d, dv = problem.head_dim, spec.head_dim_v or problem.head_dim
    flops *= (3 * d + 2 * dv) / (5 * d) if backward else (d + dv) / (2 * d)
    if dv != d:
        rows = problem.batch * problem.seqlen_q * problem.heads_q
        keys = problem.batch * problem.seqlen_kv * problem.heads_kv
        tensors = 2 if backward else 1  # out and dout, or out; v and dv, or v
        nbytes -= (d - dv) * tensors * (rows + keys) * DTYPE_BYTES[problem.dtype]
    mask = inputs.call.terms.attn_mask
    if mask is None:
        return limits.floor(flops, nbytes)
    if mask.dtype == torch.bool:
        kept = mask.expand(problem.batch, 1, 1, problem.seqlen_kv)[:, 0, 0]
        return limits.floor(flops * _kept(problem, kept.sum(-1).tolist()), nbytes)
    return limits.floor(flops, nbytes + mask.numel() * mask.element_size())


def _kept(problem: Problem, lengths: list[int]) -> float:
    """The share of the visible pairs whose keys are before each sequence's length."""
    columns = problem.seqlen_kv
    if problem.mask.is_full:
        return fmean(lengths) / columns
    # Causal, as many queries as keys: below a diagonal, row i sees min(i + 1, length) keys.
    pairs = [n * (n + 1) // 2 + (columns - n) * n for n in lengths]
    return fmean(pairs) / problem.visible_pairs


def plain_of(spec: Spec, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]] | None:
    """Ours without the term, on the same tensors; None where there is none to leave out."""
    if not inputs.problem.terms or spec.bias:
        return None
    plain = replace(inputs.problem, terms=())
    without = Inputs(plain, inputs.call._replace(terms=NO_TERMS), inputs.dout)
    return timed(ours(without), without)


@measures
def measured(table: Table, section: str, problem: Problem, spec: Spec) -> Row | None:
    inputs = inputs_of(spec, problem, table.device)
    calls, failed, wrong = against(inputs, table.peers(PEERS))
    if (plain := plain_of(spec, inputs)) is not None:
        calls["ours, plain"] = plain
    number = ("fwd", "bwd").index(problem.direction)
    times = {"FA4": spec.fa4[number], "cuDNN": spec.cudnn[number]}
    listed = floor_of(spec, problem, inputs, LISTED_LIMITS)
    return table.row(
        *(section, problem, calls),
        label=spec.label(problem),
        floor=floor_of(spec, problem, inputs, table.limits),
        wrong=wrong,
        failed=failed,
        listed={name: listed / (ms * 1e-3) for name, ms in times.items() if ms},
    )


def main() -> int:
    table = Table(parser_of(__doc__, seconds=420).parse_args())
    rows: dict[str, list[Row | None]] = {}
    for spec in SPECS:
        if table.wants(spec.section):
            rows.setdefault(spec.section, []).extend(
                measured(table, spec.section, replace(spec.problem, direction=direction), spec)
                for direction in ("fwd", "bwd")
            )
    for section in JUDGED:
        for number, direction in enumerate(("forward", "backward")):
            if some := rows.get(section, [])[number::2]:
                line = f"{section} {direction}: ahead of the best peer on each row"
                table.each(line, some, over_peers, at_least=1.0)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
