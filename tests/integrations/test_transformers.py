"""Tiny random models of transformers: flashmoe's results are those of eager attention."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import DEVICE, library
from torch import Tensor

transformers = library("transformers")

from tiny_transformers import (  # noqa: E402
    CELLS,
    MODELS,
    NEW_TOKENS,
    PACKINGS,
    check,
    gradients,
    inputs_of,
    logits,
    output,
    packed_by,
    padding,
    random_ids,
    table,
    tiny,
)

from flashmoe.integrations import transformers as ours  # noqa: E402

# What holds keys, by the name of the day.
_FIELDS = transformers.modeling_outputs.CausalLMOutputWithPast.__annotations__
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    ours.register()
    yield
    ours.unregister()


@pytest.mark.filterwarnings("ignore:.*computed by torch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cell", "name"), [x for x in table() if x[0] != "compile"])
def test_table(cell: str, name: str, dtype: torch.dtype) -> None:
    CELLS[cell](name, dtype)


_COMPILED = ("llama", "bert")


@pytest.mark.filterwarnings("ignore:.*computed by torch")
@pytest.mark.parametrize(
    "name", [x if x in _COMPILED else pytest.param(x, marks=pytest.mark.long) for x in MODELS]
)
def test_compile(name: str) -> None:
    CELLS["compile"](name, torch.float32)


@pytest.mark.long
def test_compile_differentiates_what_is_padded() -> None:
    model, ids, mask = tiny("llama"), random_ids(), padding("right")
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    def run(model: Any) -> dict[str, Tensor]:
        compiled = torch.compile(model, backend="aot_eager")
        return gradients(mask.bool(), **inputs)(compiled)

    want = gradients(mask.bool(), **inputs)(tiny("llama"))
    model.set_attn_implementation(ours.NAME)
    for name, got in run(model).items():
        expected = want[name.removeprefix("_orig_mod.")]
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


@pytest.mark.parametrize("how", PACKINGS)
def test_gpt_oss_hands_no_positions_to_its_mask(how: str) -> None:
    """transformers' own: its eager attention sees one sequence, too."""
    if how == "lengths":
        packed_by(how, "gpt_oss", torch.float32)
        return
    with pytest.raises(AssertionError, match=r"output: .* > "):
        packed_by(how, "gpt_oss", torch.float32)


def _generated(model: Any, **how: Any) -> Tensor:
    found: Tensor = model.generate(max_new_tokens=NEW_TOKENS, do_sample=False, **how)
    return found


@pytest.mark.parametrize("grad", [False, True])
def test_a_prompt_in_pieces(grad: bool) -> None:
    # More than one query, fewer than keys.
    def run(model: Any) -> dict[str, Tensor]:
        with torch.set_grad_enabled(grad):
            first = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
            rest = {"attention_mask": mask, CACHE: first[CACHE]}
            return {"output": model(ids[:, 8:], **rest).logits}

    ids, mask = random_ids(), padding("left", (13, 9))
    for name in ("llama", "mistral", "gemma2"):
        check(tiny(name), run)


def test_padding_on_the_right_and_then_more() -> None:
    # The mask has holes: what is packed is level with eager; under a window it runs as it is.
    def run(model: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            first = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
            rest = {"attention_mask": mask, CACHE: first[CACHE]}
            return {"output": model(ids[:, 8:], **rest).logits}

    ids, mask = random_ids(), torch.ones(2, 13, dtype=torch.long, device=DEVICE)
    mask[1, 5:8] = 0
    for name in ("llama", "mistral", "gemma2"):
        check(tiny(name), run)


def test_t5() -> None:
    model = tiny("t5")
    check(model, logits(**inputs_of("t5"), attention_mask=padding("right")))
    # Its bias is learned.
    tables = [x for name, x in model.named_parameters() if "relative_attention_bias" in name]
    gradients = []
    for name in ("eager", ours.NAME):
        model.set_attn_implementation(name)
        out = model(**inputs_of("t5")).logits
        gradients.append(torch.autograd.grad(out.sin().sum(), tables))
    assert gradients[0][0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("error:.*computed by torch")
def test_attention_dropout() -> None:
    model = tiny("bert").train()
    for module in model.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.dropout.p = 0.5
    model.set_attn_implementation(ours.NAME)
    ids = random_ids()
    torch.manual_seed(1)
    first = output(model, input_ids=ids)
    torch.manual_seed(1)
    assert torch.equal(first, output(model, input_ids=ids))
    assert not torch.equal(first, output(model, input_ids=ids))
    assert torch.equal(output(model.eval(), input_ids=ids), output(model, input_ids=ids))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_mask_of_ones_own(name: str, kind: str) -> None:
    mask = torch.rand(2, 1, 13, 13, generator=torch.Generator().manual_seed(2)) > 0.5
    mask = (mask | torch.eye(13, dtype=torch.bool)).to(DEVICE)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    eager, given = ({"input_ids": random_ids(), "attention_mask": x} for x in (additive, mask))
    model = tiny(name)
    with torch.no_grad():
        want = output(model, **eager)
        model.set_attn_implementation(ours.NAME)
        got = output(model, **(given if kind == "boolean" else eager))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_continuous_batching(name: str) -> None:
    model = tiny(name)
    prompts = [ids[:n].tolist() for ids, n in zip(random_ids(3), (13, 5, 9), strict=True)]
    want = [
        _generated(model, input_ids=torch.tensor([p], device=DEVICE))[0, len(p) :].tolist()
        for p in prompts
    ]
    model.set_attn_implementation(ours.NAME)
    how = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    paging = transformers.ContinuousBatchingConfig(page_size=8, num_blocks=64, max_batch_tokens=32)
    found = model.generate_batch(prompts, how, continuous_batching_config=paging)
    assert [each.generated_tokens for each in found.values()] == want
    assert model.config._attn_implementation == ours.NAME


def test_from_pretrained_and_back(tmp_path: Any) -> None:
    tiny("llama").save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, attn_implementation=ours.NAME)
    assert model.config._attn_implementation == ours.NAME
    with torch.no_grad():
        got = output(model, input_ids=random_ids())
        want = output(load(tmp_path, attn_implementation="eager"), input_ids=random_ids())
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
    model = tiny("gpt_oss")
    model.set_attn_implementation(ours.NAME)
    mask = padding("left")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        output(model, input_ids=random_ids())
        assert seen == ["flash_attn_func"] * 2
        seen.clear()
        output(model, input_ids=random_ids(), attention_mask=mask)
        assert seen == ["flash_attn_varlen_func"] * 2
        seen.clear()
        _generated(
            model, input_ids=random_ids(), attention_mask=mask, cache_implementation="static"
        )
        # A step's window is full of keys of its own; full attention has lengths.
        assert seen.count("flash_attn_with_kvcache") == 5
        assert seen.count("flash_attn_func") == 4


def test_errors() -> None:
    model = tiny("llama")
    model.set_attn_implementation(ours.NAME)
    with pytest.raises(TypeError, match=r"does not know alibi.*LlamaAttention"):
        model(random_ids(), alibi=torch.ones(4))
    with pytest.raises((ValueError, NotImplementedError), match="output_attentions"):
        model(random_ids(), output_attentions=True)
    with pytest.raises(ValueError, match="given together"):
        model(random_ids(), cu_seq_lens_q=torch.tensor([0, 26]))


@pytest.mark.parametrize("is_ours", [False, True])
def test_whose_kernels_run_masks_on_a_gpu(is_ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "is_slower_under", lambda *_: is_ours)
    monkeypatch.setattr(ours, "by_torch", lambda *_: "torch")
    monkeypatch.setattr(ours, "by_masked_kernel", lambda *_: "ours")
    monkeypatch.setattr(ours, "warn_of_torch", lambda *_: None)
    q, k, v = (torch.zeros(1, 2, 5, 16) for _ in "qkv")
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    found, _ = ours.attention(torch.nn.Module(), q, k, v, mask)
    assert found == ("ours" if is_ours else "torch")
