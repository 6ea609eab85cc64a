"""What docs/integrations.md says of training libraries, with the real ones."""

from __future__ import annotations

import pytest
import torch
from support import DEVICE, library

library("transformers")

from tiny_transformers import random_ids, tiny  # noqa: E402

from flashmoe.integrations import transformers as ours  # noqa: E402


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_trl_packs_without_padding(name: str) -> None:
    """The batch of TRL's padding-free collator gives the loss, and the gradients, of its sequences
    one by one."""
    library("trl")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(
        pad_token_id=0, padding_free=True, pad_to_multiple_of=8
    )
    sequences = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 9, 3, 12)]
    # Two rows, of which one was packed from two documents before.
    rows = [{"input_ids": [*sequences[0], *sequences[1]], "seq_lengths": [5, 9]}]
    rows += [{"input_ids": [*sequences[2], *sequences[3]], "seq_lengths": [3, 12]}]
    batch = collate(rows)
    assert {"cu_seq_lens_q", "position_ids", "seq_idx"} <= set(batch)
    batch = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in batch.items()}

    eager, packed = tiny(name).train(), tiny(name).train()
    wanted = torch.zeros((), device=DEVICE)
    for ids in sequences:
        row = torch.tensor([ids], device=DEVICE)
        wanted = wanted + eager(row, labels=row).loss * (len(ids) - 1)
    wanted = wanted / sum(len(ids) - 1 for ids in sequences)
    ours.register()
    try:
        packed.set_attn_implementation(ours.NAME)
        loss = packed(**batch, use_cache=False).loss
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        loss.backward()
        wanted.backward()
    finally:
        ours.unregister()
    for (key, got), want in zip(packed.named_parameters(), eager.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None), key
        if got.grad is not None and want.grad is not None:
            atol = 1e-4 * float(want.grad.abs().max()) + 1e-5
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=atol)
