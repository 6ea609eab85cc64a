"""Tiny random models of transformers: flashmoe's results are those of eager attention."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")

from flashmoe.integrations import transformers as ours  # noqa: E402

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = SMALL | {"num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    ours.register()
    yield
    ours.unregister()


def _config(name: str, **fields: Any) -> Any:
    return getattr(transformers, name)(**fields)


# Models that write text, by their names here: model class, config.
DECODERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: _config("LlamaConfig", **GROUPED)),
    "head_dim_20": ("LlamaForCausalLM", lambda: _config("LlamaConfig", **GROUPED, head_dim=20)),
    "phi3": ("Phi3ForCausalLM", lambda: _config("Phi3Config", **GROUPED)),
    "qwen3": ("Qwen3ForCausalLM", lambda: _config("Qwen3Config", **GROUPED, head_dim=16)),
    "mistral": ("MistralForCausalLM", lambda: _config("MistralConfig", **GROUPED, sliding_window=5)),
    "gemma2": (
        "Gemma2ForCausalLM",
        lambda: _config(
            "Gemma2Config",
            **GROUPED,
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=2.0,
        ),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        lambda: _config(
            "Gemma3TextConfig",
            **GROUPED,
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        lambda: _config(
            "GptOssConfig",
            **GROUPED,
            head_dim=16,
            sliding_window=5,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: _config(
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_positions=128,
            n_embd=64,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        lambda: _config(
            "DeepseekV3Config",
            **SMALL,
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            first_k_dense_replace=2,
        ),
    ),
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Models that read text.
ENCODERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bert": ("BertModel", lambda: _config("BertConfig", **SMALL, **NO_DROPOUT)),
    "modernbert": (
        "ModernBertModel",
        lambda: _config(
            "ModernBertConfig",
            **SMALL,
            local_attention=8,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    ),
}


def _model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    cls, config = (DECODERS | ENCODERS)[name]
    torch.manual_seed(1)
    model = getattr(transformers, cls)._from_config(
        config(), attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or "sinks" in parameter_name:
                parameter.normal_(0, 0.3 if "sinks" not in parameter_name else 1.0)
    return model.to(dtype).eval()


def _ids(batch: int = 2, seqlen: int = 13, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def _padding(side: str, lengths: tuple[int, ...], seqlen: int = 13) -> Tensor:
    mask = torch.zeros(len(lengths), seqlen, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    return mask.flip(1) if side == "left" else mask


def _output(model: Any, **inputs: Any) -> Tensor:
    result = model(**inputs)
    found: Tensor = result[0] if getattr(result, "logits", None) is None else result.logits
    return found


def _check(model: Any, run: Callable[[Any], Any], where: Tensor | slice = slice(None)) -> None:
    """Judge what `run` gives with flashmoe's attention: no further from eager attention in float32
    than twice what eager attention in the model's dtype is."""
    exact = copy.deepcopy(model).float()
    eager = run(model)
    model.set_attn_implementation(ours.NAME)
    got = run(model)
    for name, want in run(exact).items():
        want, scale = want[where], want[where].abs().max()
        allowed = 2 * (eager[name][where].float() - want).abs().max()
        allowed += 64 * torch.finfo(torch.float32).eps * scale
        assert got[name][where].isfinite().all(), name
        worst = (got[name][where].float() - want).abs().max()
        assert worst <= allowed, f"{name}: {worst:.3g} > {allowed:.3g}"


def _logits(**inputs: Any) -> Callable[[Any], dict[str, Tensor]]:
    @torch.no_grad()
    def run(model: Any) -> dict[str, Tensor]:
        return {"output": _output(model, **inputs)}

    return run


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODERS | ENCODERS)
def test_plain(name: str, dtype: torch.dtype) -> None:
    _check(_model(name, dtype), _logits(input_ids=_ids()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS | ENCODERS)
def test_padded(name: str, side: str) -> None:
    mask = _padding(side, (13, 7))
    _check(_model(name), _logits(input_ids=_ids(), attention_mask=mask), mask.bool())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", sorted(DECODERS.keys() - {"gpt2"}))
def test_packed(name: str, batch: int) -> None:
    positions = torch.cat([torch.arange(n) for n in (6, 1, 6)]).expand(batch, -1)
    inputs = {"input_ids": _ids(batch), "position_ids": positions, "use_cache": False}
    _check(_model(name), _logits(**inputs))
