"""Training whole models of random weights under torch.compile with our attention, SDPA's default,
its cuDNN backend and FlashAttention-4: tokens a second, and whether the losses are the same.

    python benchmarks/models.py --output benchmarks/results/models-DEVICE.json

`gpt2`: 124M parameters as GPT-2's; `llama`: rotary positions, grouped heads of 128, sequences of
4096. float32 weights, bfloat16 by autocast, AdamW; blocks and the loss are compiled each once. A
round is one step of each, in random order, on the same tokens: chains in which four tokens may
follow each one, whose second half repeats the first. --shrink makes layers, too, smaller.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean

import torch
import torch.nn.functional as F
from tables import Row, Table, parser_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe import flash_attn_func
from flashmoe.backends.sdpa import torch_sdpa
from flashmoe.spec.mask import CAUSAL
from flashmoe.spec.problem import Problem

# (batch, seqlen, heads, head_dim) to the same.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LAST = 50  # steps whose losses are compared in the mean
# Nats that the losses of two right implementations may be apart, if SDPA's own two are nearer.
APART = 0.005


@dataclass(frozen=True)
class Config:
    kind: str
    vocabulary: int
    layers: int
    hidden: int
    inner: int
    heads: int
    heads_kv: int
    seqlen: int
    batch: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def problem(self) -> Problem:
        """Of one layer."""
        sizes = (self.batch, self.heads, self.heads_kv, self.seqlen, self.seqlen, self.head_dim)
        return Problem(*sizes, "bfloat16", CAUSAL)

    def shrunk(self, by: int) -> Config:
        small = {
            "vocabulary": max(self.vocabulary // by, 64),
            "layers": 2,
            "hidden": 2 * self.heads // self.heads_kv * self.head_dim,
            "inner": 2 * self.head_dim,
            "heads": 2 * self.heads // self.heads_kv,
            "heads_kv": 2,
            "seqlen": max(self.seqlen // by, 16),
            "batch": 2,
        }
        return replace(self, **small)


CONFIGS = (
    Config("gpt2", 50304, 12, 768, 3072, 12, 12, 1024, 16),
    Config("llama", 32000, 6, 2048, 5632, 16, 4, 4096, 4),
)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return torch_sdpa(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Inside of what is compiled, which would take any other backend's code for the same.
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flash_attn_func(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = importlib.import_module("flash_attn.cute").flash_attn_func(q, k, v, causal=True)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


SIDES: dict[str, Attention] = {
    "ours": ours,
    "SDPA": sdpa,
    "cuDNN": cudnn,
    "FA4": flash_attention_4,
}


class Block(nn.Module):
    """Attention and the layers behind it, as GPT-2 or as Llama has them."""

    def __init__(self, config: Config, attend: Attention) -> None:
        super().__init__()
        c, d = config, config.head_dim
        is_llama = c.kind == "llama"
        norm: type[nn.Module] = nn.RMSNorm if is_llama else nn.LayerNorm
        self.config, self.attend = config, attend
        self.first, self.second = norm(c.hidden), norm(c.hidden)
        self.qkv = nn.Linear(c.hidden, (c.heads + 2 * c.heads_kv) * d, bias=not is_llama)
        self.out = nn.Linear(c.hidden, c.hidden, bias=not is_llama)
        self.up = nn.Linear(c.hidden, (1 + is_llama) * c.inner, bias=not is_llama)
        self.down = nn.Linear(c.inner, c.hidden, bias=not is_llama)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.config
        heads = self.qkv(self.first(x)).unflatten(-1, (-1, c.head_dim))
        q, k, v = heads.split((c.heads, c.heads_kv, c.heads_kv), dim=2)
        if c.kind == "llama":
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        x = x + self.out(self.attend(q, k, v).flatten(2))
        inner = self.up(self.second(x))
        if c.kind == "llama":
            gate, inner = inner.chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * inner)
        return x + self.down(F.gelu(inner, approximate="tanh"))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, seqlen, heads, head_dim); cos and sin (seqlen, 1, head_dim / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Model(nn.Module):
    """The same weights whatever attends."""

    def __init__(self, config: Config, attend: Attention, compiles: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.places = nn.Embedding(config.seqlen, config.hidden)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.layers))
        self.last = nn.LayerNorm(config.hidden)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        frequencies = 10000.0 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.arange(config.seqlen)[:, None, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for block in self.blocks:
            block.compile(dynamic=False, backend=compiles)
        self.loss = torch.compile(self.loss_of, dynamic=False, backend=compiles)
        self.has_places = config.kind == "gpt2"

    def loss_of(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.last(x), self.tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(inputs)
        if self.has_places:
            x = x + self.places.weight
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        found: Tensor = self.loss(x, targets)
        return found


def chains(config: Config, count: int, device: torch.device) -> Tensor:
    """(count, seqlen + 1) tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=device, generator=generator)

    used = min(config.vocabulary, 512)
    followers = integers(used, used, 4)
    half = config.seqlen // 2 + 1
    picks = integers(4, half, count)
    found = [integers(used, count)]
    for pick in picks[1:]:
        found.append(followers[found[-1], pick])
    first = torch.stack(found, dim=1)
    return torch.cat((first, first), dim=1)[:, : config.seqlen + 1]


class Training:
    """A model with its optimizer; each call is a step on the next batch. Its losses are kept."""

    def __init__(self, config: Config, side: str, data: Tensor, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        compiles = "inductor" if is_gpu else "eager"
        self.model = Model(config, SIDES[side], compiles).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=6e-4, fused=is_gpu)
        self.data, self.batch, self.device = data, config.batch, device
        self.losses: list[Tensor] = []

    def __call__(self) -> Tensor:
        begin = len(self.losses) * self.batch % (len(self.data) - self.batch + 1)
        tokens = self.data[begin : begin + self.batch]
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())
        return loss


def floor_of(config: Config, parameters: int, table: Table) -> float:
    """Seconds of the matrix products of a step: 6 FLOPs a parameter and token, and attention's."""
    layer = config.problem.flops + replace(config.problem, direction="bwd").flops
    flops = 6.0 * parameters * config.batch * config.seqlen + config.layers * layer
    return flops / table.limits.matmul_flops


def gap(losses: dict[str, list[float]], name: str, other: str) -> float:
    """Of the mean of the last losses."""
    return abs(fmean(losses[name][-LAST:]) - fmean(losses[other][-LAST:]))


def train(table: Table, config: Config, seconds: float) -> None:
    """`seconds`: when no further round is begun."""
    torch.compiler.reset()
    data = chains(config, 64 * config.batch, table.device)
    sides: dict[str, Training] = {}
    failed: dict[str, str] = {}
    for name in ("ours", *table.peers(list(SIDES)[1:])):
        try:
            sides[name] = Training(config, name, data, table.device)
            sides[name]()  # compiles
        except Exception as error:  # noqa: BLE001 - what cannot run is a result
            failed[name] = str(error) or type(error).__name__
            sides.pop(name, None)
        print(f"[{table.elapsed:.0f} s] {config.kind}, {name}: ready", flush=True)
    parameters = sum(x.numel() for x in sides["ours"].model.parameters()) if "ours" in sides else 0
    label = f"{config.kind}, {parameters / 1e6:.0f}M parameters, a step"
    calls: dict[str, Callable[[], object]] = dict(sides)
    floor = floor_of(config, parameters, table)
    what = {"label": label, "floor": floor, "failed": failed, "max_seconds": seconds}
    row = table.row("train", config.problem, calls, **what)
    losses = {name: torch.stack(side.losses).float().tolist() for name, side in sides.items()}
    if row is not None:
        state(table, config, row, losses)


def state(table: Table, config: Config, row: Row, losses: dict[str, list[float]]) -> None:
    tokens = config.batch * config.seqlen
    for name in row.samples:
        curve = losses[name]
        shown = ", ".join(f"{curve[i]:.3f}" for i in range(0, len(curve), max(len(curve) // 8, 1)))
        print(f"  {name}: {tokens / row.seconds(name):.0f} tokens/s; losses {shown}", flush=True)
    table.extra[f"losses of {config.kind}"] = losses
    others = [row.seconds(name) for name in row.samples if name != "ours"]
    speed = min(others) / row.seconds() if others else None
    line = f"{config.kind}: tokens a second, times the best of the others"
    table.one(line, speed, at_least=1.0, note=f"{tokens / row.seconds():.0f} tokens/s")
    begin, end = losses["ours"][0], fmean(losses["ours"][-LAST:])
    table.one(f"{config.kind}: the loss falls to so much of the first", end / begin, at_most=0.9)
    if "SDPA" in row.samples:
        bound = APART
        if "cuDNN" in row.samples:
            bound = max(bound, 2 * gap(losses, "cuDNN", "SDPA"))
        line = f"{config.kind}: mean loss of the last {LAST} steps, apart from SDPA's"
        table.one(line, gap(losses, "ours", "SDPA"), at_most=bound)


def main() -> int:
    table = Table(parser_of(__doc__, rounds=200, seconds=240).parse_args())
    by, seconds = table.arguments.shrink, table.arguments.seconds
    wanted = [config for config in CONFIGS if table.wants(config.kind)]
    for number, config in enumerate(wanted):
        if table.elapsed < seconds:
            left = (seconds - table.elapsed) / (len(wanted) - number)
            train(table, config if by == 1 else config.shrunk(by), left)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
