"""Serves random requests with a tiny random Llama of Hugging Face transformers over a paged KV
cache by continuous batching: prompts and single tokens of all running requests go through the model
in one row, and each layer is one call of flashmoe.flash_attn_with_kvcache. Compares the tokens with
those of dense attention, and the speed with SDPA over a static cache. Downloads nothing.

python examples/serve_transformers.py [--requests 24] [--slots 8] [--dtype float32|bfloat16]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
)

import flashmoe

PAGE_SIZE = 16
VOCABULARY = 512
# Stands for padding alone: no request has it.
PADDING = 0


@dataclass
class Request:
    prompt: list[int]
    new_tokens: int
    written: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys are in the cache

    @property
    def todo(self) -> list[int]:
        """Tokens that the next step has to compute: the prompt, later what was written last."""
        return [*self.prompt, *self.written][self.cached :]

    @property
    def is_done(self) -> bool:
        return len(self.written) == self.new_tokens


class PagedCache:
    """Keys and values of all layers in pages, and which of them are free."""

    def __init__(self, config: LlamaConfig, num_pages: int, like: torch.Tensor) -> None:
        shape = (
            *(config.num_hidden_layers, num_pages, PAGE_SIZE),
            *(config.num_key_value_heads, config.head_dim),
        )
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.free = list(range(num_pages))
        self.call: dict[str, Any] = {}
        self.last = torch.empty(0)  # the row of each request's last token

    def admits(self, request: Request) -> bool:
        """Whether there are pages for all that the request may need; it gets them."""
        count = -(-(len(request.prompt) + request.new_tokens) // PAGE_SIZE)
        if count > len(self.free):
            return False
        request.pages = [self.free.pop() for _ in range(count)]
        return True

    def describe(self, requests: list[Request]) -> None:
        """What every layer of the next step says of its row: lengths and pages."""
        ends = [0]
        for request in requests:
            ends.append(ends[-1] + len(request.todo))
        most = max(len(request.pages) for request in requests)
        table = [request.pages + [0] * (most - len(request.pages)) for request in requests]
        lengths = [request.cached for request in requests]
        cu_seqlens, block_table, cache_seqlens = (
            torch.tensor(x, dtype=torch.int32, device=self.k.device) for x in (ends, table, lengths)
        )
        self.last = cu_seqlens[1:].long() - 1
        self.call = {"cache_seqlens": cache_seqlens, "block_table": block_table, "causal": True}
        longest = max(len(request.todo) for request in requests)
        if longest > 1:
            self.call |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k_new": cu_seqlens}
            self.call["max_seqlen_q"] = longest

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """The attention function of transformers' AttentionInterface: (1, heads, tokens, head_dim)
        in, (1, tokens, heads, head_dim) out."""
        layer: Any = module.layer_idx
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if "cu_seqlens_q" not in self.call:  # one token each: requests are a batch
            q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        out = flashmoe.flash_attn_with_kvcache(
            q, self.k[layer], self.v[layer], k, v, softmax_scale=scaling, **self.call
        )
        assert isinstance(out, torch.Tensor)
        return out.view(1, -1, *out.shape[-2:]), None


@torch.inference_mode()
def serve(model: LlamaForCausalLM, requests: list[Request], slots: int, num_pages: int) -> int:
    """Write what all requests ask for, at most `slots` of them at a time. Returns the steps."""
    cache = PagedCache(model.config, num_pages, next(model.parameters()))
    AttentionInterface.register("paged", cache.attention)
    AttentionMaskInterface.register("paged", lambda *_, **__: None)
    model.set_attn_implementation("paged")
    waiting, running, steps = requests[::-1], [], 0
    while waiting or running:
        while waiting and len(running) < slots and cache.admits(waiting[-1]):
            running.append(waiting.pop())
        if not running:
            raise ValueError(f"a request needs more than the {num_pages} pages that there are")
        cache.describe(running)
        ids = [token for request in running for token in request.todo]
        positions = [request.cached + i for request in running for i in range(len(request.todo))]
        row, places = torch.tensor([[ids], [positions]], device=model.device)
        found = model(row, position_ids=places, use_cache=False, logits_to_keep=cache.last)
        for request, token in zip(running, found.logits[0].argmax(-1).tolist(), strict=True):
            request.cached += len(request.todo)
            request.written.append(token)
            if request.is_done:
                cache.free += request.pages
        running = [request for request in running if not request.is_done]
        steps += 1
    return steps


@torch.inference_mode()
def by_static_cache(model: LlamaForCausalLM, requests: list[Request], slots: int) -> None:
    """The same by SDPA and transformers' static cache: batches whose requests start together,
    padded on the left to the longest, and end with the longest."""
    model.set_attn_implementation("sdpa")
    for batch in (requests[i : i + slots] for i in range(0, len(requests), slots)):
        longest = max(len(request.prompt) for request in batch)
        rows = [[PADDING] * (longest - len(r.prompt)) + r.prompt for r in batch]
        ids = torch.tensor(rows, device=model.device)
        found = model.generate(
            ids,
            attention_mask=(ids != PADDING).long(),
            max_new_tokens=max(request.new_tokens for request in batch),
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
        )
        for request, row in zip(batch, found[:, longest:].tolist(), strict=True):
            request.written = row[: request.new_tokens]


@torch.inference_mode()
def by_dense_attention(model: LlamaForCausalLM, request: Request) -> list[int]:
    """Each token by eager attention to all before it, without any cache."""
    model.set_attn_implementation("eager")
    ids = list(request.prompt)
    for _ in range(request.new_tokens):
        row = torch.tensor([ids], device=model.device)
        ids.append(int(model(row, use_cache=False).logits[0, -1].argmax()))
    return ids[len(request.prompt) :]


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--pages", type=int, default=64)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,  # so that tokens differ
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PADDING,
    )
    dtype = getattr(torch, arguments.dtype)
    model = LlamaForCausalLM(config).to("cuda" if on_gpu else "cpu", dtype).eval()

    def requests() -> list[Request]:
        generator = random.Random(0)
        return [
            Request(
                [generator.randrange(1, VOCABULARY) for _ in range(generator.randrange(4, 100))],
                generator.randrange(4, 40),
            )
            for _ in range(arguments.requests)
        ]

    paged, static = requests(), requests()
    serve(model, requests()[:2], arguments.slots, arguments.pages)  # warm up
    by_static_cache(model, requests()[:2], arguments.slots)
    steps: list[int] = []
    seconds = timed(lambda: steps.append(serve(model, paged, arguments.slots, arguments.pages)))
    seconds_static = timed(lambda: by_static_cache(model, static, arguments.slots))
    tokens = sum(request.new_tokens for request in paged)
    print(f"{len(paged)} requests, {tokens} tokens in {steps[0]} steps")
    print(f"flashmoe, paged, continuous batching: {tokens / seconds:.0f} tokens/s")
    print(f"SDPA, static cache, batches: {tokens / seconds_static:.0f} tokens/s")

    wanted = [by_dense_attention(model, request) for request in paged]
    for name, found in (("flashmoe", paged), ("SDPA", static)):
        equal = sum(r.written == want for r, want in zip(found, wanted, strict=True))
        print(f"{name}: tokens equal those of dense attention in {equal} of {len(wanted)} requests")
    # Rounding decides between words whose scores are alike in bfloat16.
    if dtype == torch.float32 and [request.written for request in paged] != wanted:
        raise SystemExit("the tokens differ from those of dense attention")


if __name__ == "__main__":
    main()
