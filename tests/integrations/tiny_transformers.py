"""Tiny random models of transformers, and what each is asked for: the cells of a table of models
and uses. A cell raises AssertionError where flashmoe's results are not those of eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from support import DEVICE
from torch import Tensor

from flashmoe.integrations import transformers as ours

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
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WINDOW = {"head_dim": 16, "sliding_window": 5}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}

# Models that write text, by their names here: model class, config class, fields.
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "head_dim_20": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"head_dim": 20}),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        GROUPED | {"hidden_size": 80},  # head_dim 20
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 5}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GROUPED | WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GROUPED
        | WINDOW
        | {
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        GROUPED | WINDOW | {"num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 128,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        SMALL
        | {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
        },
    ),
}
# Models that read text, pictures or both.
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SMALL | NO_DROPOUT),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        SMALL
        | {
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "vit": ("ViTModel", "ViTConfig", VISION | NO_DROPOUT),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": SMALL | {"eos_token_id": 2},
            "vision_config": VISION,
            "projection_dim": 24,
        },
    ),
}
# Models that read one thing and write another.
TRANSLATORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 8,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 30,
            "max_target_positions": 40,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "dropout": 0.0,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
            "eos_token_id": None,
        },
    ),
}
MODELS = DECODERS | ENCODERS | TRANSLATORS


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with eager attention, the same at each call."""
    cls, config, fields = MODELS[name]
    torch.manual_seed(1)
    model = getattr(transformers, cls)._from_config(
        getattr(transformers, config)(**fields),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    if name in ("bert", "modernbert") or name in DECODERS:
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim >= 2 or "sinks" in parameter_name:
                    parameter.normal_(0, 0.3 if "sinks" not in parameter_name else 1.0)
    return model.to(DEVICE, dtype).eval()


def random_ids(batch: int = 2, seqlen: int = 13, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, seqlen), generator=generator).to(DEVICE)


def padding(side: str, lengths: tuple[int, ...] = (13, 7), seqlen: int = 13) -> Tensor:
    mask = torch.zeros(len(lengths), seqlen, dtype=torch.long, device=DEVICE)
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    return mask.flip(1) if side == "left" else mask


def inputs_of(name: str) -> dict[str, Tensor]:
    """What the model reads: two of each, without padding."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16, generator=generator).to(DEVICE)
    features = torch.randn(2, 8, 60, generator=generator).to(DEVICE)
    if name == "vit":
        return {"pixel_values": pixels}
    if name == "clip":
        return {"pixel_values": pixels, "input_ids": random_ids()}
    if name == "whisper":
        return {"input_features": features, "decoder_input_ids": random_ids()}
    if name == "t5":
        return {"input_ids": random_ids(), "decoder_input_ids": random_ids(seed=3)}
    return {"input_ids": random_ids()}


def output(model: Any, **inputs: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    result = model(**{k: _as(dtype, x) for k, x in inputs.items()})
    for key in ("logits", "logits_per_image"):
        if getattr(result, key, None) is not None:
            found: Tensor = result[key]
            return found
    found = result[0]
    return found


def _as(dtype: torch.dtype, x: Any) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def check(
    model: Any,
    run: Callable[[Any], dict[str, Tensor]],
    where: Tensor | slice = slice(None),
    eager_run: Callable[[Any], dict[str, Tensor]] | None = None,
) -> None:
    """Judge what `run` gives with flashmoe's attention: no further from eager attention in float32
    than twice what eager attention in the model's dtype is. The model has flashmoe's afterwards."""
    eager_run = eager_run or run
    exact, dtype = copy.deepcopy(model).float(), next(model.parameters()).dtype
    eager = eager_run(model)
    model.set_attn_implementation(ours.NAME)
    got, wanted = run(model), eager_run(exact)
    # Of all, because some gradients are 0 but for rounding.
    rounding = max(64 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 4)
    scale = max(want.abs().max() for want in wanted.values())
    for name, want in wanted.items():
        if name == "output":
            want, got[name], eager[name] = (x[where] for x in (want, got[name], eager[name]))
        # The worst of many gradients behind a kink says nothing of attention.
        size = _worst if name == "output" else torch.linalg.vector_norm
        allowed = 2 * size(eager[name].float() - want)
        allowed += rounding * scale * want.numel() ** 0.5
        assert got[name].isfinite().all(), name
        error = size(got[name].float() - want)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


def _worst(x: Tensor) -> Tensor:
    return x.abs().max()


def logits(**inputs: Any) -> Callable[[Any], dict[str, Tensor]]:
    @torch.no_grad()
    def run(model: Any) -> dict[str, Tensor]:
        return {"output": output(model, **inputs)}

    return run


def gradients(where: Tensor | slice = slice(None), **inputs: Any) -> Callable[[Any], Any]:
    """Of all parameters, of something in the rows `where` of the output."""

    def run(model: Any) -> dict[str, Tensor]:
        model.train()
        model.zero_grad()
        output(model, **inputs)[where].float().log_softmax(-1)[..., 1].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    return run


def plain(name: str, dtype: torch.dtype) -> None:
    check(tiny(name, dtype), logits(**inputs_of(name)))


def padded(name: str, dtype: torch.dtype) -> None:
    for side in ("left", "right"):
        mask, inputs = padding(side), inputs_of(name)
        where: Tensor | slice = mask.bool()
        if name == "whisper":
            inputs["decoder_attention_mask"] = mask
        else:
            inputs["attention_mask"] = mask
        if name == "clip":
            if side == "left":  # its text ends at the last token
                continue
            inputs["input_ids"] = inputs["input_ids"] * mask
        if name in ("clip", "t5"):
            where = slice(None)
        check(tiny(name, dtype), logits(**inputs), where)


def packed(name: str, dtype: torch.dtype) -> None:
    for how in PACKINGS:
        if name != "gpt_oss" or how == "lengths":
            packed_by(how, name, dtype)


PACKINGS = ("positions", "positions of two rows", "lengths")


def packed_by(how: str, name: str, dtype: torch.dtype) -> None:
    """Sequences one behind the other, against each alone."""
    parts = (6, 1, 6)
    ids = random_ids(2 if how == "positions of two rows" else 1)
    positions = torch.cat([torch.arange(n) for n in parts]).to(DEVICE).expand(len(ids), -1)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if how == "lengths":  # as transformers' padding-free collator gives them
        ends = torch.tensor([0, 6, 7, 13], dtype=torch.int32, device=DEVICE)
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        inputs |= {"max_length_q": 6, "max_length_k": 6}

    @torch.no_grad()
    def alone(model: Any) -> dict[str, Tensor]:
        return {"output": torch.cat([output(model, input_ids=x) for x in ids.split(parts, 1)], 1)}

    check(tiny(name, dtype), logits(**inputs), eager_run=alone)


def generate(name: str, dtype: torch.dtype) -> None:
    mask = padding("left")
    for cache in ("dynamic", "static"):
        for hides in (False, True):
            inputs = inputs_of(name)
            inputs.pop("decoder_input_ids", None)
            if hides and name == "whisper":
                continue
            if hides:
                inputs |= {"attention_mask": mask, "input_ids": inputs["input_ids"] * mask}
            generated(tiny(name, dtype), inputs, cache)


def generated(model: Any, inputs: dict[str, Tensor], cache: str) -> None:
    """In float32 the tokens of eager attention; otherwise, because words of one score are many, the
    scores that eager attention in float32 gives what was written, as close as `check` allows."""
    exact, dtype = copy.deepcopy(model).float(), next(model.parameters()).dtype
    how = {k: _as(dtype, x) for k, x in inputs.items()} | {"cache_implementation": cache}
    if cache == "dynamic":
        del how["cache_implementation"]
    eager = _written(model, how)
    model.set_attn_implementation(ours.NAME)
    got = _written(model, how)
    if dtype == torch.float32:
        assert torch.equal(got.sequences, eager.sequences)
        return
    errors = [_error_of(exact, inputs, each) for each in (eager, got)]
    assert errors[1] <= 2 * errors[0] + 1e-3, f"{errors[1]:.3g} > 2 * {errors[0]:.3g}"


NEW_TOKENS = 5


def _written(model: Any, how: dict[str, Any]) -> Any:
    return model.generate(
        **how,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


@torch.no_grad()
def _error_of(exact: Any, inputs: dict[str, Tensor], written: Any) -> float:
    found = torch.stack(written.logits, 1).float()
    tokens = written.sequences
    if exact.config.is_encoder_decoder:
        wanted = exact(**inputs, decoder_input_ids=tokens[:, :-1]).logits
        # Whisper's begin with what it was told, which the scores do not have.
        return float((found - wanted[:, -found.shape[1] :]).abs().max())
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = exact(tokens, attention_mask=mask, position_ids=positions).logits
    return float((found - wanted[:, -found.shape[1] - 1 : -1]).abs().max())


def train(name: str, dtype: torch.dtype) -> None:
    check(tiny(name, dtype), gradients(**inputs_of(name)))
    if name not in DECODERS and name not in ("bert", "modernbert"):
        return
    # Without the rows of padding, whose outputs mean nothing.
    mask = padding("left")
    check(tiny(name, dtype), gradients(mask.bool(), **inputs_of(name), attention_mask=mask))


def compiled(name: str, dtype: torch.dtype, backend: str = "eager") -> None:
    inputs = inputs_of(name)
    if name in DECODERS:
        inputs["use_cache"] = False

    def run(model: Any) -> dict[str, Tensor]:
        torch._dynamo.reset()
        return logits(**inputs)(torch.compile(model, backend=backend))

    check(tiny(name, dtype), run, eager_run=logits(**inputs))


CELLS: dict[str, Callable[[str, torch.dtype], None]] = {
    "plain": plain,
    "padded": padded,
    "packed": packed,
    "generate": generate,
    "train": train,
    "compile": compiled,
}
# What a model has no such use for.
WITHOUT = {
    "packed": {*ENCODERS, *TRANSLATORS},
    "generate": {*ENCODERS},
    "padded": {"vit"},
}


def table() -> list[tuple[str, str]]:
    """(cell, model) of all that there is."""
    return [(cell, name) for cell in CELLS for name in MODELS if name not in WITHOUT.get(cell, ())]
