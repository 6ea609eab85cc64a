"""Tokens a second of examples/serve_transformers.py: continuous batching over a paged cache with
our attention, beside SDPA with transformers' static cache; and whether the tokens are the same.

    python benchmarks/serving.py --output benchmarks/results/serving-DEVICE.json

`equal`: the example's tiny random Llama in float32, whose tokens must be those of dense attention
without a cache. `speed`: one of a billion parameters' shape in bfloat16, the two in turns; wall
time of all requests, so transformers' own part is in it. Needs transformers.
"""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tables import Row, Table, parser_of

from flashmoe.spec.mask import CAUSAL
from flashmoe.spec.problem import Problem

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def example() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module("serve_transformers")


def model_of(serve: Any, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = serve.LlamaConfig(
        vocab_size=serve.VOCABULARY,
        max_position_embeddings=4096,
        initializer_range=0.2 if sizes is TINY else 0.02,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=serve.PADDING,
        **sizes,
    )
    return serve.LlamaForCausalLM(config).to(device, dtype).eval()


def requests_of(serve: Any, count: int, prompt: int, tokens: int) -> list[Any]:
    """Prompts of 4 to `prompt` tokens that want 4 to `tokens` more; the same every time."""
    draw = random.Random(0)
    return [
        serve.Request(
            [draw.randrange(1, serve.VOCABULARY) for _ in range(draw.randrange(4, prompt))],
            draw.randrange(4, tokens),
        )
        for _ in range(count)
    ]


def pages_for(serve: Any, requests: list[Any], slots: int) -> int:
    longest = max(len(r.prompt) + r.new_tokens for r in requests)
    return slots * -(-longest // serve.PAGE_SIZE)


def state_equal(table: Table, serve: Any) -> None:
    model = model_of(serve, TINY, torch.float32, table.device)
    requests = requests_of(serve, 6 if table.arguments.shrink > 1 else 24, 100, 40)
    serve.serve(model, requests, 8, pages_for(serve, requests, 4))
    right = sum(r.written == serve.by_dense_attention(model, r) for r in requests)
    table.one("requests with the tokens of dense attention", right / len(requests), at_least=1.0)


def state_speed(table: Table, serve: Any) -> None:
    by = table.arguments.shrink
    sizes = LARGE if by == 1 else TINY
    slots, longest, wanted = (32, 1024, 128) if by == 1 else (4, 32, 8)
    model = model_of(serve, sizes, torch.bfloat16, table.device)

    def fresh() -> list[Any]:
        return requests_of(serve, 2 * slots, longest, wanted)

    pages = pages_for(serve, fresh(), slots)
    sides = {
        "ours": lambda: serve.serve(model, fresh(), slots, pages),
        "SDPA": lambda: serve.by_static_cache(model, fresh(), slots),
    }
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, table.arguments.rounds):
        for name, run in sides.items():
            seconds = serve.timed(run)
            if number >= 0:
                samples[name].append(seconds)
        if number >= 0 and table.elapsed > table.arguments.seconds:
            break
    tokens = sum(request.new_tokens for request in fresh())
    heads = (sizes["num_attention_heads"], sizes["num_key_value_heads"])
    head_dim = sizes["hidden_size"] // heads[0]
    problem = Problem(slots, *heads, 1, longest + wanted, head_dim, "bfloat16", CAUSAL)
    found = {name: tuple(times) for name, times in samples.items()}
    label = f"{2 * slots} requests, {tokens} tokens, {slots} at a time"
    row = table.add(Row("speed", label, 0.0, found, problem=problem))
    rates = {name: tokens / row.seconds(name) for name in found}
    note = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items())
    line = "serving: tokens a second, times SDPA with a static cache"
    table.one(line, row.ratio("SDPA").value, at_least=1.0, note=note)


def main() -> int:
    table = Table(parser_of(__doc__, rounds=5, seconds=90).parse_args())
    serve = example()
    if table.wants("equal"):
        state_equal(table, serve)
    if table.wants("speed"):
        state_speed(table, serve)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
