"""The sides of a comparison on the same inputs: ours, checked against the float64 reference, and
every other implementation that has what the problem asks for. Another is left out, with the reason,
where it raises or where its results are not ours.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe import flash_attn_func, flash_attn_varlen_func
from flashmoe.backends.sdpa import torch_sdpa
from flashmoe.measure.check import Checker
from flashmoe.measure.inputs import Inputs
from flashmoe.measure.reference import attention_reference, error_bound
from flashmoe.ratchet.measuring.suite import Case
from flashmoe.ratchet.sota.providers import PROVIDERS
from flashmoe.spec.problem import Problem

# q, k, v in a side's own layout to out, in that layout.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Timed = Callable[[], tuple[Tensor, ...]]
NAMES = ("out", "dq", "dk", "dv")
# Of a backward with more scores than this a sequence, gradients are compared with peers' only.
_MOST_CHECKED = 1 << 25


def timed(
    attend: Attend, inputs: Inputs, *, heads_first: bool = False, step: bool = False
) -> Timed:
    """What is timed of `attend`: the forward; where there is a dout the backward alone, of a
    forward that ran here, or with `step` both. Results are laid out as ours."""
    tensors = [*inputs.call[:3], *(() if inputs.dout is None else (inputs.dout,))]
    if heads_first:
        tensors = [x.transpose(1, 2).contiguous() for x in tensors]
    q, k, v, *dout = (x.detach() for x in tensors)

    def ours_is(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if heads_first else x

    if not dout:
        return lambda: (ours_is(attend(q, k, v)),)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    kept = None if step else attend(*leaves)

    def call() -> tuple[Tensor, ...]:
        out = attend(*leaves) if kept is None else kept
        found = torch.autograd.grad(out, leaves, *dout, retain_graph=kept is not None)
        return (ours_is(out.detach()), *map(ours_is, found))

    return call


def window_of(problem: Problem) -> dict[str, Any]:
    """Our arguments for its mask."""
    mask = problem.mask
    return {"causal": True} if mask.is_causal else {"window_size": (mask.left, mask.right)}


def ours(inputs: Inputs, **options: Any) -> Attend:
    """flash_attn_func or, of packed inputs, flash_attn_varlen_func, as users call it."""
    call = inputs.call
    terms = {name: x for name, x in call.terms._asdict().items() if isinstance(x, Tensor) or x}
    arguments = window_of(inputs.problem) | terms | options
    function: Callable[..., Any] = flash_attn_func
    if inputs.problem.layout == "packed":
        function = flash_attn_varlen_func
        sequences = call.sequences
        arguments |= {
            name: getattr(sequences, name)
            for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        }
    return lambda q, k, v: function(q, k, v, softmax_scale=call.softmax_scale, **arguments)


def _refuse(inputs: Inputs, *terms: str) -> None:
    for term in terms:
        if term in inputs.problem.terms:
            raise NotImplementedError(f"has no {term}")


def _bias_of(inputs: Inputs) -> Tensor | None:
    """What SDPA takes for the mask and ALiBi: causal is in it, since it takes one of the two."""
    p, terms = inputs.problem, inputs.call.terms
    mask = terms.attn_mask
    if mask is None and terms.alibi_slopes is None:
        return None
    i, j = (torch.arange(n, device=inputs.call.q.device) for n in (p.seqlen_q, p.seqlen_kv))
    hidden = p.mask.hides(i[:, None], j, p.seqlen_q, p.seqlen_kv)
    if terms.alibi_slopes is None:
        assert mask is not None
        if p.mask.is_full:
            return mask
        if mask.dtype == torch.bool:
            return mask & ~hidden
        return mask.masked_fill(hidden, -torch.inf)
    distance = (i[:, None] + p.seqlen_kv - p.seqlen_q - j).abs()
    bias = -(terms.alibi_slopes[:, None, None] * distance).to(inputs.call.q.dtype)
    return bias.masked_fill(hidden, -torch.inf).unsqueeze(0)


def _sdpa(backend: SDPBackend) -> Callable[[Inputs], Attend]:
    def make(inputs: Inputs) -> Attend:
        p, terms = inputs.problem, inputs.call.terms
        _refuse(inputs, "softcap", "sink")
        if p.mask.is_local or (p.mask.is_causal and p.seqlen_q != p.seqlen_kv):
            raise NotImplementedError("has no windows, and aligns causal masks top-left")
        bias = _bias_of(inputs)
        causal = p.mask.is_causal and bias is None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return torch_sdpa(
                    *(q, k, v, bias, terms.dropout_p, causal),
                    scale=inputs.call.softmax_scale,
                    enable_gqa=p.heads_q != p.heads_kv,
                )

        return attend

    return make


def _flex(inputs: Inputs) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    p, call = inputs.problem, inputs.call
    softcap, slopes, sinks, bias = (getattr(call.terms, x) for x in _FLEX_TERMS)
    _refuse(inputs, "dropout")
    kept = bias if bias is not None and bias.dtype == torch.bool else None
    added = bias if kept is None else None

    def at(x: Tensor, *index: Any) -> Tensor:
        found: Tensor = x[tuple(0 if n == 1 else i for n, i in zip(x.shape, index, strict=True))]
        return found

    def score_mod(score: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[h] * (i + (p.seqlen_kv - p.seqlen_q) - j).abs()
        return score if added is None else score + at(added, b, h, i, j)

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Tensor:
        seen: Tensor = ~p.mask.hides(i, j, p.seqlen_q, p.seqlen_kv)
        return seen if kept is None else seen & at(kept, b, h, i, j)

    mask = None
    if not p.mask.is_full or kept is not None:
        batch = None if kept is None or kept.shape[0] == 1 else p.batch
        sizes = (batch, None, p.seqlen_q, p.seqlen_kv)
        mask = create_block_mask(mask_mod, *sizes, device=call.q.device)  # type: ignore[arg-type]
    scores = score_mod if softcap or slopes is not None or added is not None else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = p.heads_q != p.heads_kv
        options: dict[str, Any] = {"block_mask": mask, "enable_gqa": grouped}
        options |= {"score_mod": scores, "scale": call.softmax_scale}
        if sinks is None:
            out = flex_attention(q, k, v, **options)
            assert isinstance(out, Tensor)
            return out
        # A sink is in the sum alone, so that it can be added afterwards.
        out, lse = flex_attention(q, k, v, return_lse=True, **options)
        share = torch.sigmoid(lse - sinks[:, None])
        return out * share.unsqueeze(-1).to(out.dtype)

    if not call.q.is_cuda:
        return run
    # Compiled for each shape: general over shapes it is slower, and after a few shapes of one
    # function torch gives up and runs it uncompiled.
    torch.compiler.reset()
    compiled: Attend = torch.compile(run, dynamic=False)
    return compiled


_FLEX_TERMS = ("softcap", "alibi_slopes", "sinks", "attn_mask")


def _provider(name: str) -> Callable[[Inputs], Attend]:
    """One that `python -m flashmoe.ratchet sota` knows, too."""
    (provider,) = (provider for provider in PROVIDERS if provider.name == name)

    def make(inputs: Inputs) -> Attend:
        p = inputs.problem
        return provider.call(Case(replace(p, direction="fwd"), p.direction), inputs.call)

    return make


def _torch_varlen(inputs: Inputs) -> Attend:
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(function).parameters
    p, s = inputs.problem, inputs.call.sequences
    _refuse(inputs, *p.terms)
    given: dict[str, Any] = {"is_causal": p.mask.is_causal}
    if "window_size" in known:
        given = {"window_size": (p.mask.left, p.mask.right)}
    if p.heads_q != p.heads_kv:
        given["enable_gqa"] = True
    if unknown := sorted(set(given) - set(known)):
        raise NotImplementedError(f"has no argument {', '.join(unknown)}")
    lengths = (s.cu_seqlens_q, s.cu_seqlens_k, s.max_seqlen_q, s.max_seqlen_k)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = function(q, k, v, *lengths, **given)
        return out

    return attend


@dataclass(frozen=True)
class Peer:
    """`make(inputs)` gives the call, and raises NotImplementedError for what it cannot do.
    `heads_first`: (batch, heads, seqlen, head_dim), as SDPA has it, and not flash-attn's layout."""

    make: Callable[[Inputs], Attend]
    heads_first: bool = False


PEERS: Mapping[str, Peer] = {
    "cuDNN": Peer(_sdpa(SDPBackend.CUDNN_ATTENTION), True),
    "FA2": Peer(_sdpa(SDPBackend.FLASH_ATTENTION), True),
    "efficient": Peer(_sdpa(SDPBackend.EFFICIENT_ATTENTION), True),
    "flex": Peer(_flex, True),
    "FA3": Peer(_provider("flash-attn-3")),
    "FA4": Peer(_provider("flash-attn-4")),
    "FlashInfer": Peer(_provider("flashinfer")),
    "cuDNN's front end": Peer(_provider("cudnn")),
}
SDPA = ("cuDNN", "FA2")
PACKED: Mapping[str, Peer] = {
    "torch varlen": Peer(_torch_varlen),
    **{name: PEERS[name] for name in ("FA3", "FA4", "FlashInfer", "cuDNN's front end")},
}


def against(
    inputs: Inputs,
    peers: Iterable[str],
    *,
    step: bool = False,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, Timed], dict[str, str], str]:
    """(calls by name, reasons of what is left out, what is wrong with ours). `options` are of
    further calls of ours, by what is added to their name."""
    known = PACKED if inputs.problem.layout == "packed" else PEERS
    calls = {"ours": timed(ours(inputs), inputs, step=step)}
    expected = calls["ours"]()
    wrong = judged(inputs, expected)
    failed = {}

    def add(name: str, make: Callable[[], Timed]) -> str:
        """Why it has other results than ours."""
        try:
            call = make()
            found = call()
        except Exception as error:  # noqa: BLE001 - what cannot run is a result
            failed[name] = str(error) or type(error).__name__
            return ""
        # Which weights are dropped differs.
        is_ours = name.startswith("ours")
        if (is_ours or "dropout" not in inputs.problem.terms) and (why := differs(found, expected)):
            failed[name] = why
            return why
        calls[name] = call
        return ""

    for what, more in (options or {}).items():
        name = f"ours, {what}"
        why = add(name, lambda more=more: timed(ours(inputs, **more), inputs, step=step))
        wrong = wrong or (f"{name}: {why}" if why else "")
    for name in peers:
        peer = known[name]
        first = peer.heads_first
        add(name, lambda p=peer, f=first: timed(p.make(inputs), inputs, heads_first=f, step=step))
    return calls, failed, wrong


def judged(inputs: Inputs, found: tuple[Tensor, ...]) -> str:
    """What the float64 reference says against results of ours; empty where nothing."""
    p, call = inputs.problem, inputs.call
    if inputs.dout is not None and p.seqlen_q * p.seqlen_kv > _MOST_CHECKED:
        found, inputs = found[:1], Inputs(p, call)
    mask = call.terms.attn_mask
    if call.q.shape[-1] != call.v.shape[-1] or (mask is not None and mask.shape[0] != len(call.q)):
        return _judged_group(inputs, found)
    return Checker(inputs, pairs=2).check(dict(zip(NAMES, found, strict=False))).reason


def _judged_group(inputs: Inputs, found: tuple[Tensor, ...]) -> str:
    """The same of the last sequence's first group of heads, for what the library's Checker does not
    know: a bias that sequences share, values of another head_dim."""
    p, call = inputs.problem, inputs.call
    heads = slice(0, p.heads_q // p.heads_kv), slice(0, 1), slice(0, 1)
    mask = call.terms.attn_mask
    if mask is not None:
        mask = mask[-1:, heads[0]]

    def computed(dtype: torch.dtype) -> list[Tensor]:
        tensors = zip(call[:3], heads, strict=True)
        leaves = [
            x[-1:, :, h].detach().to(dtype).requires_grad_(len(found) > 1) for x, h in tensors
        ]
        out, _ = attention_reference(
            *leaves, softmax_scale=call.softmax_scale, mask=p.mask, dtype=dtype, attn_mask=mask
        )
        if inputs.dout is None:
            return [out]
        dout = inputs.dout[-1:, :, heads[0]].to(dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    sides = zip(NAMES, found, computed(torch.float64), computed(call.q.dtype), strict=False)
    for (name, x, exact, same), h in zip(sides, (heads[0], *heads), strict=False):
        bound = error_bound(
            x.dtype, float((same.double() - exact).abs().max()), float(exact.abs().max())
        )
        error = float((x[-1:, :, h].double() - exact).abs().max())
        if not error <= bound:
            return f"{name} is off by {error:.3g} where at most {bound:.3g} is allowed"
    return ""


def differs(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """Why two sides' results are not the same; both sides' errors count."""
    for name, a, b in zip(NAMES, actual, expected, strict=False):
        scale = float(b.abs().max())
        # As far apart as two computations in this dtype may be.
        bound = 8 * error_bound(b.dtype, 0.0, scale) + 4e-3 * scale
        if a.shape != b.shape or not float((a.float() - b.float()).abs().max()) <= bound:
            return f"{name} differs from ours: wrong, or another problem"
    return ""
