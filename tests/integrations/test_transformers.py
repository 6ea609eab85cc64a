"""Tiny random models of transformers: flashmoe's results are those of eager attention."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import library
from torch import Tensor

transformers = library("transformers")

from flashmoe.integrations import transformers as ours  # noqa: E402

VOCABULARY = 97
# What holds keys, by the name of the day.
_FIELDS = transformers.modeling_outputs.CausalLMOutputWithPast.__annotations__
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"
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
    "mistral": (
        "MistralForCausalLM",
        lambda: _config("MistralConfig", **GROUPED, sliding_window=5),
    ),
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
    return torch.randint(
        3, VOCABULARY, (batch, seqlen), generator=torch.Generator().manual_seed(seed)
    )


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
    wanted = {name: want[where] for name, want in run(exact).items()}
    # Of all, because some gradients are 0 but for rounding.
    scale = max(want.abs().max() for want in wanted.values())
    for name, want in wanted.items():
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


@pytest.mark.parametrize("how", ["positions", "positions of two rows", "lengths"])
@pytest.mark.parametrize("name", DECODERS)
def test_packed(name: str, how: str) -> None:
    if name == "gpt_oss" and how != "lengths":
        pytest.skip("transformers' gpt-oss hands no positions to its mask: eager sees one sequence")
    parts = (6, 1, 6)
    batch = 2 if how == "positions of two rows" else 1
    positions = torch.cat([torch.arange(n) for n in parts]).expand(batch, -1)
    inputs = {"input_ids": _ids(batch), "position_ids": positions, "use_cache": False}
    if how == "lengths":  # as transformers' padding-free collator gives them
        ends = torch.tensor([0, 6, 7, 13], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        inputs |= {"max_length_q": 6, "max_length_k": 6}
    model = _model(name)
    with torch.no_grad():
        alone = [_output(model, input_ids=ids) for ids in inputs["input_ids"].split(parts, 1)]
        model.set_attn_implementation(ours.NAME)
        got = _output(model, **inputs)
    scale = got.abs().max()
    torch.testing.assert_close(got / scale, torch.cat(alone, 1) / scale, rtol=0, atol=1e-5)


def _gradients(**inputs: Any) -> Callable[[Any], dict[str, Tensor]]:
    def run(model: Any) -> dict[str, Tensor]:
        model.train()
        model.zero_grad()
        _output(model, **inputs).float().log_softmax(-1)[..., 3].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    return run


@pytest.mark.parametrize("name", DECODERS | ENCODERS)
def test_gradients(name: str) -> None:
    _check(_model(name), _gradients(input_ids=_ids()))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "modernbert"])
def test_gradients_of_a_packed_batch(name: str) -> None:
    def run(model: Any) -> dict[str, Tensor]:
        # Without the rows of padding, whose outputs mean nothing.
        model.train()
        model.zero_grad()
        out = _output(model, input_ids=_ids(), attention_mask=mask)[mask.bool()]
        out.log_softmax(-1)[..., 3].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    mask = _padding("left", (13, 7))
    _check(_model(name), run)


def _generated(model: Any, **how: Any) -> Tensor:
    found: Tensor = model.generate(max_new_tokens=5, do_sample=False, **how)
    return found


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str, cache: str) -> None:
    model = _model(name)
    mask = _padding("left", (13, 7))
    how = {"input_ids": _ids() * mask, "attention_mask": mask, "cache_implementation": cache}
    without_padding = {"input_ids": _ids(), "cache_implementation": cache}
    want = _generated(model, **how), _generated(model, **without_padding)
    model.set_attn_implementation(ours.NAME)
    assert torch.equal(_generated(model, **how), want[0])
    assert torch.equal(_generated(model, **without_padding), want[1])


@pytest.mark.parametrize("grad", [False, True])
def test_a_prompt_in_pieces(grad: bool) -> None:
    # More than one query, fewer than keys.
    def run(model: Any) -> dict[str, Tensor]:
        with torch.set_grad_enabled(grad):
            first = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
            rest = {"attention_mask": mask, CACHE: first[CACHE]}
            return {"output": model(ids[:, 8:], **rest).logits}

    ids, mask = _ids(), _padding("left", (13, 9))
    for name in ("llama", "mistral", "gemma2"):
        _check(_model(name), run)


def test_padding_on_the_right_and_then_more() -> None:
    # The mask has holes: what is packed is level with eager; under a window torch computes.
    def run(model: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            first = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
            rest = {"attention_mask": mask, CACHE: first[CACHE]}
            return {"output": model(ids[:, 8:], **rest).logits}

    ids, mask = _ids(), torch.ones(2, 13, dtype=torch.long)
    mask[1, 5:8] = 0
    _check(_model("llama"), run)
    with pytest.warns(UserWarning, match="more than causality"):
        _check(_model("mistral"), run)


def test_compile() -> None:
    model = _model("llama")
    ids, mask = _ids(), _padding("right", (13, 7))
    with torch.no_grad():
        want = _output(model, input_ids=ids, use_cache=False)
        padded = _output(model, input_ids=ids, attention_mask=mask, use_cache=False)
        model.set_attn_implementation(ours.NAME)
        compiled = torch.compile(model, backend="aot_eager")
        got = _output(compiled, input_ids=ids, use_cache=False)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        got = _output(compiled, input_ids=ids, attention_mask=mask, use_cache=False)
        torch.testing.assert_close(got[mask.bool()], padded[mask.bool()], rtol=1e-4, atol=1e-4)


def _vision(name: str) -> tuple[Any, dict[str, Tensor]]:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    torch.manual_seed(1)
    if name == "vit":
        model = transformers.ViTModel._from_config(
            _config("ViTConfig", **sizes, **NO_DROPOUT), attn_implementation="eager"
        )
        return model.eval(), {"pixel_values": pixels}
    text = SMALL | {"num_hidden_layers": 2, "eos_token_id": 2}
    config = _config("CLIPConfig", text_config=text, vision_config=sizes, projection_dim=24)
    model = transformers.CLIPModel._from_config(config, attn_implementation="eager").eval()
    mask = _padding("right", (13, 7))
    return model, {"pixel_values": pixels, "input_ids": _ids() * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_vision(name: str) -> None:
    model, inputs = _vision(name)
    with torch.no_grad():
        want = model(**inputs)
        model.set_attn_implementation(ours.NAME)
        got = model(**inputs)
    key = "last_hidden_state" if name == "vit" else "logits_per_image"
    torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)


def _speech() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(1)
    config = _config(
        "WhisperConfig",
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=30,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    features = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(0))
    return model, {"input_features": features, "decoder_input_ids": _ids()}


def test_whisper() -> None:
    model, inputs = _speech()
    _check(model, _logits(**inputs))
    model, inputs = _speech()
    mask = _padding("right", (13, 7))
    _check(model, _logits(**inputs, decoder_attention_mask=mask), mask.bool())
    _check(_speech()[0], _gradients(**inputs))


def test_whisper_generates() -> None:
    model, inputs = _speech()
    how = {"input_features": inputs["input_features"], "max_new_tokens": 6, "do_sample": False}
    want = model.generate(**how)
    model.set_attn_implementation(ours.NAME)
    assert torch.equal(model.generate(**how), want)


def test_t5_is_computed_by_torch_and_says_so() -> None:
    torch.manual_seed(1)
    config = _config(
        "T5Config",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    )
    mask = _padding("right", (13, 7))
    run = _logits(input_ids=_ids(), attention_mask=mask, decoder_input_ids=_ids(seed=3))
    with pytest.warns(UserWarning, match="position_bias"):
        _check(model.eval(), run)


def test_dropout_is_computed_by_torch_and_says_so() -> None:
    model = _model("bert").train()
    for module in model.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.dropout.p = 0.5
    model.set_attn_implementation(ours.NAME)
    ids = _ids()
    with pytest.warns(UserWarning, match=r"dropout=0\.5"):
        first = _output(model, input_ids=ids)
    assert not torch.equal(first, _output(model, input_ids=ids))
    assert torch.equal(_output(model.eval(), input_ids=ids), _output(model, input_ids=ids))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_mask_of_ones_own(name: str, kind: str) -> None:
    mask = torch.rand(2, 1, 13, 13, generator=torch.Generator().manual_seed(2)) > 0.5
    mask |= torch.eye(13, dtype=torch.bool)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    eager, given = ({"input_ids": _ids(), "attention_mask": x} for x in (additive, mask))
    model = _model(name)
    with torch.no_grad():
        want = _output(model, **eager)
        model.set_attn_implementation(ours.NAME)
        got = _output(model, **(given if kind == "boolean" else eager))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_continuous_batching(name: str) -> None:
    model = _model(name)
    prompts = [ids[:n].tolist() for ids, n in zip(_ids(3), (13, 5, 9), strict=True)]
    want = [_generated(model, input_ids=torch.tensor([p]))[0, len(p) :].tolist() for p in prompts]
    model.set_attn_implementation(ours.NAME)
    how = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    paging = transformers.ContinuousBatchingConfig(page_size=8, num_blocks=64, max_batch_tokens=32)
    found = model.generate_batch(prompts, how, continuous_batching_config=paging)
    assert [each.generated_tokens for each in found.values()] == want
    assert model.config._attn_implementation == ours.NAME


def test_from_pretrained_and_back(tmp_path: Any) -> None:
    _model("llama").save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, attn_implementation=ours.NAME)
    assert model.config._attn_implementation == ours.NAME
    with torch.no_grad():
        got = _output(model, input_ids=_ids())
        want = _output(load(tmp_path, attn_implementation="eager"), input_ids=_ids())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    ours.unregister()
    with pytest.raises((ValueError, KeyError), match=ours.NAME):
        load(tmp_path, attn_implementation=ours.NAME)


def test_it_is_flashmoe_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import flashmoe

    seen: list[str] = []

    def counted(name: str) -> Any:
        run = getattr(flashmoe, name)

        def call(*given: Any, **more: Any) -> Any:
            seen.append(name)
            return run(*given, **more)

        return call

    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        monkeypatch.setattr(flashmoe, name, counted(name))
    model = _model("gpt_oss")
    model.set_attn_implementation(ours.NAME)
    mask = _padding("left", (13, 7))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        _output(model, input_ids=_ids())
        assert seen == ["flash_attn_func"] * 2
        seen.clear()
        _output(model, input_ids=_ids(), attention_mask=mask)
        assert seen == ["flash_attn_varlen_func"] * 2
        seen.clear()
        _generated(model, input_ids=_ids(), attention_mask=mask, cache_implementation="static")
        # A step's window is full of keys of its own; full attention has lengths.
        assert seen.count("flash_attn_with_kvcache") == 5
        assert seen.count("flash_attn_func") == 4


def test_errors() -> None:
    model = _model("llama")
    model.set_attn_implementation(ours.NAME)
    with pytest.raises(TypeError, match=r"does not know alibi.*LlamaAttention"):
        model(_ids(), alibi=torch.ones(4))
    with pytest.raises((ValueError, NotImplementedError), match="output_attentions"):
        model(_ids(), output_attentions=True)
    with pytest.raises(ValueError, match="given together"):
        model(_ids(), cu_seq_lens_q=torch.tensor([0, 26]))
