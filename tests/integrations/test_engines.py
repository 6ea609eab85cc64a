"""The adapters of serving engines against stand-ins that have what the adapters use, by the names
and shapes of vLLM 0.33 and SGLang 0.5.23."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import DEVICE
from torch import Tensor

import flashmoe
from flashmoe.integrations import plugins
from flashmoe.integrations.pages import attend_to_pages

HEADS, HEADS_KV, HEAD_DIM, PAGE_SIZE = 4, 2, 16, 16
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def _int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Batch:
    """Requests with so many keys, of which the last ones are the queries', in pages in any order.
    What is in no request is NaN."""

    def __init__(self, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
        self.queries, self.keys = queries, keys
        generator = torch.Generator().manual_seed(sum(keys))
        many = max(-(-n // PAGE_SIZE) for n in keys)
        order = torch.randperm(len(keys) * many + 2, generator=generator)
        self.table = order[: len(keys) * many].view(len(keys), many).int().to(DEVICE)
        shape = (len(order), PAGE_SIZE, HEADS_KV, HEAD_DIM)
        self.k, self.v = (torch.full(shape, float("nan"), device=DEVICE, dtype=DTYPE) for _ in "kv")
        self.rows: list[tuple[Tensor, Tensor]] = []
        for pages, n in zip(self.table.tolist(), keys, strict=True):
            k, v = (torch.randn(n, HEADS_KV, HEAD_DIM, device=DEVICE, dtype=DTYPE) for _ in "kv")
            for i in range(n):
                self.k[pages[i // PAGE_SIZE], i % PAGE_SIZE] = k[i]
                self.v[pages[i // PAGE_SIZE], i % PAGE_SIZE] = v[i]
            self.rows.append((k, v))
        self.q = torch.randn(sum(queries), HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
        ends = torch.tensor([0, *queries]).cumsum(0)
        self.ends = ends.int().to(DEVICE)

    def expected(self, **options: Any) -> Tensor:
        parts = [
            flashmoe.flash_attn_func(q[None], k[None], v[None], **options)[0]
            for q, (k, v) in zip(self.q.split(self.queries), self.rows, strict=True)
        ]
        return torch.cat(parts)


BATCHES = {
    "decode": ((1, 1, 1), (5, 33, 16)),
    "verify": ((3, 3), (20, 3)),
    "mixed": ((1, 7, 1), (40, 7, 2)),
}


@pytest.fixture(params=BATCHES)
def batch(request: pytest.FixtureRequest) -> Batch:
    torch.manual_seed(0)
    return Batch(*BATCHES[request.param])


def _close(got: Tensor, want: Tensor) -> None:
    tolerance = 1e-5 if torch.float32 == DTYPE else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_the_engines_find_the_plugins() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = Path(__file__).parents[2] / "pyproject.toml"
    found = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"]
    names = {group: names["flashmoe"] for group, names in found.items()}
    for group, name in {
        "vllm.general_plugins": plugins.register_vllm,
        "sglang.srt.plugins": plugins.register_sglang,
    }.items():
        assert names[group] == f"{name.__module__}:{name.__name__}"


def test_pages(batch: Batch) -> None:
    call = (batch.q, batch.k, batch.v, batch.ends, _int32(*batch.keys), batch.table)
    want = batch.expected(causal=True)
    _close(attend_to_pages(*call, max(batch.queries), causal=True), want)
    out = torch.full_like(batch.q, float("nan"))
    found = attend_to_pages(*call, max(batch.queries) + 1, out, causal=True)
    assert found.data_ptr() == out.data_ptr()
    _close(out, want)


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    """`name` and its parents, importable, until the test ends."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        if ".".join(parts[:i]) not in sys.modules:
            module = types.ModuleType(".".join(parts[:i]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in names.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    class Impl:
        def __init__(self, **fields: Any) -> None:
            self.__dict__ |= fields

    registered: dict[str, str] = {}
    _module(
        monkeypatch,
        "vllm.v1.attention.backend",
        AttentionCGSupport=Enum("AttentionCGSupport", "ALWAYS UNIFORM_BATCH"),
        AttentionType=Enum("AttentionType", "DECODER ENCODER ENCODER_ONLY ENCODER_DECODER"),
        MultipleOf=SimpleNamespace,
    )
    _module(
        monkeypatch,
        "vllm.v1.attention.backends.flash_attn",
        FlashAttentionBackend=type("FlashAttentionBackend", (), {}),
        FlashAttentionImpl=Impl,
        FlashAttentionMetadataBuilder=type(
            "FlashAttentionMetadataBuilder", (), {"__init__": lambda self: None}
        ),
    )
    _module(
        monkeypatch,
        "vllm.v1.attention.backends.registry",
        AttentionBackendEnum=SimpleNamespace(__members__=registered),
        register_backend=registered.__setitem__,
    )
    module = importlib.import_module("flashmoe.integrations.vllm")
    yield SimpleNamespace(ours=module, registered=registered, backend=sys.modules["vllm.v1"])
    del sys.modules[module.__name__]


def _vllm_impl(vllm: Any, **fields: Any) -> Any:
    kinds = sys.modules["vllm.v1.attention.backend"].AttentionType
    given = {
        "num_heads": HEADS,
        "head_size": HEAD_DIM,
        "scale": 0.3,
        "sliding_window": (-1, -1),
        "logits_soft_cap": 0,
        "alibi_slopes": None,
        "sinks": None,
        "attn_type": kinds.DECODER,
    }
    return vllm.ours.FlashmoeImpl(**given | fields)


def _vllm_metadata(batch: Batch, **fields: Any) -> Any:
    given = {
        "num_actual_tokens": len(batch.q),
        "query_start_loc": batch.ends,
        "max_query_len": max(batch.queries),
        "seq_lens": _int32(*batch.keys),
        "max_seq_len": max(batch.keys),
        "block_table": batch.table,
        "causal": True,
        "mm_prefix_query_range_tensor": None,
        "rswa_prefix_lens": None,
    }
    return SimpleNamespace(**given | fields)


def test_vllm_registers(vllm: Any) -> None:
    plugins.register_vllm()
    plugins.register_vllm()
    assert vllm.registered == {"FLASHMOE": "flashmoe.integrations.vllm.FlashmoeBackend"}
    assert vllm.registered["FLASHMOE"] == f"{vllm.ours.__name__}.FlashmoeBackend"
    backend = vllm.ours.FlashmoeBackend
    assert backend.get_name() == "FLASHMOE"
    assert backend.get_impl_cls() is vllm.ours.FlashmoeImpl
    assert backend.get_builder_cls()().aot_schedule is False
    assert backend.supports_head_size(80)
    assert not backend.supports_head_size(512)
    assert backend.supports_kv_cache_dtype("bfloat16")
    assert not backend.supports_kv_cache_dtype("fp8")


def test_vllm_attends(vllm: Any, batch: Batch) -> None:
    # vLLM's layout: blocks, heads, tokens, keys beside values.
    cache = torch.cat([batch.k, batch.v], -1).transpose(1, 2).contiguous()
    slopes, sinks = torch.rand(HEADS, device=DEVICE), torch.randn(HEADS, device=DEVICE)
    for fields, options in (
        ({}, {}),
        ({"sliding_window": (4, 0), "sinks": sinks}, {"window_size": (4, 0), "sinks": sinks}),
        (
            {"logits_soft_cap": 2.0, "alibi_slopes": slopes},
            {"softcap": 2.0, "alibi_slopes": slopes},
        ),
    ):
        # Behind the tokens comes the padding of a graph.
        q = torch.cat([batch.q, torch.full_like(batch.q[:2], float("nan"))])
        output = torch.full((len(q), HEADS * HEAD_DIM), float("nan"), device=DEVICE, dtype=DTYPE)
        impl = _vllm_impl(vllm, **fields)
        found = impl.forward(None, q, q, q, cache, _vllm_metadata(batch), output)
        assert found is output
        want = batch.expected(softmax_scale=0.3, causal=True, **options)
        _close(output[: len(batch.q)], want.flatten(1))


def test_vllm_encodes_and_refuses(vllm: Any) -> None:
    batch = Batch((5, 9), (5, 9))
    kinds = sys.modules["vllm.v1.attention.backend"].AttentionType
    impl = _vllm_impl(vllm, attn_type=kinds.ENCODER_ONLY, sliding_window=(3, 3))
    k, v = (torch.cat(x) for x in zip(*batch.rows, strict=True))
    output = torch.empty_like(batch.q)
    none = torch.empty(0)
    impl.forward(None, batch.q, k, v, none, _vllm_metadata(batch), output)
    _close(output, batch.expected(softmax_scale=0.3, window_size=(3, 3)))
    call = (None, batch.q, k, v, none)
    assert not impl.forward(*call, None, output).any()
    for fields, match in (
        ({"causal": torch.ones(2, dtype=torch.bool)}, "causal must be one bool"),
        ({"rswa_prefix_lens": none}, "rswa_prefix_lens must be None"),
    ):
        with pytest.raises(NotImplementedError, match=match):
            impl.forward(*call, _vllm_metadata(batch, **fields), output)
    with pytest.raises(NotImplementedError, match="output_scale must be None"):
        impl.forward(*call, _vllm_metadata(batch), output, none)


class _Mode(Enum):
    EXTEND = 1
    DECODE = 2
    IDLE = 3
    TARGET_VERIFY = 4

    def is_idle(self) -> bool:
        return self is _Mode.IDLE

    def is_decode(self) -> bool:
        return self is _Mode.DECODE

    def is_extend_without_speculative(self) -> bool:
        return self is _Mode.EXTEND


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    class Backend:
        def forward(self, q: Tensor, k: Any, v: Any, layer: Any, batch: Any, **more: Any) -> Tensor:
            decodes = batch.forward_mode.is_decode()
            run = self.forward_decode if decodes else self.forward_extend  # type: ignore[attr-defined]
            return run(q, k, v, layer, batch, **more)  # type: ignore[no-any-return]

    registered: dict[str, Any] = {}
    root = "sglang.srt"
    _module(
        monkeypatch,
        f"{root}.layers.attention.attention_registry",
        register_attention_backend=lambda name: lambda made: registered.__setitem__(name, made),
    )
    _module(monkeypatch, f"{root}.layers.attention.base_attn_backend", AttentionBackend=Backend)
    kinds = Enum("AttentionType", "DECODER DECODER_BIDIRECTIONAL ENCODER_ONLY")
    _module(monkeypatch, f"{root}.layers.radix_attention", AttentionType=kinds)
    _module(monkeypatch, f"{root}.mem_cache.memory_pool", KVWriteLoc=lambda loc, swa: loc)
    choices: list[str] = []
    _module(monkeypatch, f"{root}.server_args", add_attention_backend_choices=choices.extend)
    plugins.register_sglang()
    assert choices == ["flashmoe"]
    assert "flashmoe.integrations.sglang" not in sys.modules
    yield SimpleNamespace(make=registered["flashmoe"], kinds=kinds)
    sys.modules.pop("flashmoe.integrations.sglang", None)


class Pool:
    """SGLang's pool of slots, page_size one after the other."""

    def __init__(self, batch: Batch) -> None:
        self.k, self.v = batch.k.flatten(0, 1), batch.v.flatten(0, 1)

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def set_kv_buffer(self, layer: Any, where: Tensor, k: Tensor, v: Tensor) -> None:
        self.k[where], self.v[where] = k, v


def _sglang_runner(batch: Batch) -> Any:
    places = torch.arange(batch.table.shape[1] * PAGE_SIZE, device=DEVICE)
    slots = batch.table[:, places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE
    # Rows of other requests, and behind what is in use anything.
    rows = torch.full((len(slots) + 2, len(places) + PAGE_SIZE), 7, device=DEVICE, dtype=torch.int)
    rows[1:-1, : len(places)] = slots
    return SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=rows),
        token_to_kv_pool=Pool(batch),
        page_size=PAGE_SIZE,
    )


def _sglang_batch(batch: Batch, runner: Any, mode: _Mode) -> Any:
    index = torch.arange(len(batch.keys), device=DEVICE) + 1
    slots = runner.req_to_token_pool.req_to_token
    new = [
        row[n - m : n] for row, n, m in zip(slots[index], batch.keys, batch.queries, strict=True)
    ]
    return SimpleNamespace(
        forward_mode=mode,
        req_pool_indices=index,
        seq_lens=torch.tensor(batch.keys, device=DEVICE),
        seq_lens_cpu=torch.tensor(batch.keys),
        extend_seq_lens=torch.tensor(batch.queries, device=DEVICE),
        extend_seq_lens_cpu=list(batch.queries),
        out_cache_loc=torch.cat(new).long(),
    )


def _sglang_layer(sglang: Any, **fields: Any) -> Any:
    given = {
        "layer_id": 0,
        "tp_q_head_num": HEADS,
        "qk_head_dim": HEAD_DIM,
        "scaling": 0.3,
        "logit_cap": 0.0,
        "logit_capping_method": "tanh",
        "sliding_window_size": -1,
        "is_cross_attention": False,
        "attn_type": sglang.kinds.DECODER,
    }
    return SimpleNamespace(**given | fields)


def test_sglang_attends(sglang: Any, batch: Batch) -> None:
    decodes = set(batch.queries) == {1}
    sinks = torch.randn(HEADS, device=DEVICE)
    for fields, more, options in (
        ({}, {}, {}),
        ({"logit_cap": 2.0, "sliding_window_size": 4}, {}, {"softcap": 2.0, "window_size": (4, 0)}),
        ({}, {"sinks": sinks}, {"sinks": sinks}),
    ):
        runner = _sglang_runner(batch)
        forward = _sglang_batch(batch, runner, _Mode.DECODE if decodes else _Mode.EXTEND)
        # The queries' own keys are not in the cache yet.
        k, v = (
            torch.cat([x[-m:] for x, m in zip(rows, batch.queries, strict=True)])
            for rows in zip(*batch.rows, strict=True)
        )
        pool = runner.token_to_kv_pool
        pool.k[forward.out_cache_loc] = pool.v[forward.out_cache_loc] = float("nan")
        backend = sglang.make(runner)
        backend.init_forward_metadata(forward)
        layer = _sglang_layer(sglang, **fields)
        out = backend.forward(batch.q.flatten(1), k, v, layer, forward, **more)
        want = batch.expected(softmax_scale=0.3, causal=True, **options)
        _close(out, want.flatten(1))
        # What a CUDA graph records: the whole table, nothing read on the host.
        backend.init_forward_metadata_in_graph(forward)
        again = backend.forward(
            batch.q.flatten(1), k, v, layer, forward, save_kv_cache=False, **more
        )
        _close(again, want.flatten(1))


def test_sglang_refuses(sglang: Any) -> None:
    batch = Batch((1, 1), (5, 9))
    runner = _sglang_runner(batch)
    backend = sglang.make(runner)
    forward = _sglang_batch(batch, runner, _Mode.DECODE)
    backend.init_forward_metadata(forward)

    def attend(layer: Any, **more: Any) -> Tensor:
        found: Tensor = backend.forward(batch.q.flatten(1), None, None, layer, forward, **more)
        return found

    for fields, match in (
        ({"is_cross_attention": True}, "no cross attention"),
        ({"logit_cap": 2.0, "logit_capping_method": "other"}, "logit_capping_method must be"),
        (
            {"sliding_window_size": 3, "attn_type": sglang.kinds.ENCODER_ONLY},
            "sliding_window_size must be -1",
        ),
    ):
        with pytest.raises(NotImplementedError, match=match):
            attend(_sglang_layer(sglang, **fields))
    with pytest.raises(TypeError, match="does not know k_rope"):
        attend(_sglang_layer(sglang), k_rope=batch.q)
    verify = _sglang_batch(batch, runner, _Mode.TARGET_VERIFY)
    with pytest.raises(NotImplementedError, match="speculative decoding"):
        backend.init_forward_metadata(verify)
    runner.token_to_kv_pool.swa_layer_nums = 2
    with pytest.raises(NotImplementedError, match="disable-hybrid-swa-memory"):
        sglang.make(runner)
    runner.use_mla_backend = True
    with pytest.raises(NotImplementedError, match="MLA"):
        sglang.make(runner)
