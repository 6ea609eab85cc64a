"""Trains a tiny random Llama of Hugging Face transformers with flashmoe's attention, on the CPU or
a GPU: packed batches of generated text, then greedy generation. Downloads nothing.

python examples/finetune_transformers.py [--steps 80] [--attention flashmoe|eager|sdpa]
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashmoe.integrations import transformers as flashmoe_transformers

# The text to learn: counting up by a step, such as "3 5 7 9", one token a number.
NUMBERS = 32
END = NUMBERS


def sequence(generator: random.Random) -> list[int]:
    start, step, length = (
        generator.randrange(8),
        generator.randrange(1, 4),
        generator.randrange(4, 9),
    )
    return [min(start + step * i, NUMBERS - 1) for i in range(length)] + [END]


def packed_batch(generator: random.Random, tokens: int) -> dict[str, torch.Tensor]:
    """Sequences one behind the other in one row, without padding. position_ids start anew with
    each, from which the attention knows where one ends."""
    ids: list[int] = []
    positions: list[int] = []
    while len(ids) < tokens:
        one = sequence(generator)
        ids += one
        positions += range(len(one))
    return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}


def loss_of(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    # Without a cache, which packed sequences could not share.
    logits = model(**batch, use_cache=False).logits[0, :-1]
    labels = batch["input_ids"][0, 1:].clone()
    labels[batch["position_ids"][0, 1:] == 0] = -100  # no token predicts the next sequence's first
    return torch.nn.functional.cross_entropy(logits.float(), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--attention", default="flashmoe", choices=("flashmoe", "eager", "sdpa"))
    arguments = parser.parse_args()

    flashmoe_transformers.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUMBERS + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
        attn_implementation=arguments.attention,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LlamaForCausalLM(config).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    generator = random.Random(0)
    began = time.perf_counter()
    losses = []
    for step in range(arguments.steps):
        batch = {k: x.to(device) for k, x in packed_batch(generator, 128).items()}
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.3f}")
    print(f"{arguments.steps} steps in {time.perf_counter() - began:.1f} s")

    prompt = torch.tensor([[3, 5, 7]], device=device)
    found = model.eval().generate(prompt, max_new_tokens=4, do_sample=False)[0].tolist()
    print("3 5 7 goes on:", *found[3:])
    if losses[-1] > losses[0] / 2:
        raise SystemExit(f"the loss did not fall: {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
