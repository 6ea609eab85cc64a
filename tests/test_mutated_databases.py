"""Whatever stands in a tuned database, attention runs, and right."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashmoe
from flashmoe import _extension, api
from flashmoe.backends import BACKENDS, jit
from flashmoe.machine.device import Arch, arch
from flashmoe.planning import database, plan
from flashmoe.spec.problem import Problem

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
CHANGED_AT_WILL = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def problems(dtype: str) -> list[Problem]:
    """The middle one is asked for by its bucket, the others are its neighbours."""
    return [Problem(1, 2, 2, seqlen, seqlen, 64, dtype) for seqlen in (8, 16, 32)]


def valid(kind: str) -> dict[str, Any]:
    """A database as a tuner writes it."""
    tile, dtype = ("cpu:48x160", "float32") if kind == "cpu" else ("sm90:128x64", "bfloat16")
    entries = {
        problem.bucket: database.Entry(
            problem,
            kind,
            tile,
            "sdpa",
            samples={tile: (1e-3, 1.1e-3)},
            speedup_default=(1.1, 1.0, 1.2),
            fingerprint={"device": "x", "kernels": "y"},
            over_default={tile: 0.9, "sdpa": 1.0},
            verified=(tile,),
            search={"tried": 9, "of": 99, "seconds": 5.0, "ended": "no better tile for long"},
            group=((problem, 1.0),),
            judged=_extension.kernel_hash(kind),
        )
        for problem in problems(dtype)
    }
    data: dict[str, Any] = json.loads(database.text_of(entries))
    return data


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for an H200 without a compiler."""

    def missing(name: str) -> None:
        raise jit.CompilerUnavailable("there is none")

    if not _extension.load().cuda_archs:
        pytest.skip("this build has no CUDA kernels")
    monkeypatch.setattr(plan, "arch", lambda device: arch(CPU) if device == CPU else H200)
    monkeypatch.setattr(jit, "_compiler", missing)
    for name in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda device: "")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    yield tmp_path
    monkeypatch.undo()
    api.forget_plans()


tiles = st.from_regex(r"(cpu|sm80|sm90|triton):\d{1,6}x\d{1,6}(-stages\d)?(-q\d)?", fullmatch=True)
words = st.sampled_from(["default", "sdpa", "cpu", "cuda", "triton", "blocked", "sm90:64x48"])
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, True])
values = st.recursive(
    st.none() | st.text() | tiles | words | numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def mutated(data: dict[str, Any], draw: st.DataObject) -> str:
    """The database with a value or two replaced or gone, mostly of the entry that is asked for, and
    now and then cut off."""
    entries = [*data["entries"].values()]
    wholes = st.sampled_from([data, data["entries"], *entries, *[entries[1]] * 15])
    for _ in range(draw.draw(st.sampled_from([1, 1, 1, 2]))):
        holder: Any = draw.draw(wholes)
        while holder:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            key = draw.draw(st.sampled_from(keys))
            if not isinstance(holder[key], dict | list) or draw.draw(st.booleans()):
                if draw.draw(st.integers(0, 4)):
                    holder[key] = draw.draw(values)
                else:
                    del holder[key]
                break
            holder = holder[key]
    text = json.dumps(data)
    cut_off = not draw.draw(st.integers(0, 9))
    return text[: draw.draw(st.integers(0, len(text)))] if cut_off else text


def written(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    api.forget_plans()


@CHANGED_AT_WILL
@given(st.data())
def test_attention_on_a_cpu(cache: Path, draw: st.DataObject) -> None:
    written(database.user_path(arch(CPU).name), mutated(valid("cpu"), draw))
    q, k, v = (torch.randn(1, 16, 2, 64) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = flashmoe.flash_attn_func(q, k, v)
        _, lse, _ = flashmoe.flash_attn_func(q, k, v, return_attn_probs=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@CHANGED_AT_WILL
@given(st.data())
def test_plans_on_a_gpu(cache: Path, hopper: None, draw: st.DataObject) -> None:
    written(database.user_path(H200.name), mutated(valid("cuda"), draw))
    (_, problem, _) = problems("bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for need_lse in (False, True):
            planned = plan.make_plan(problem, GPU, need_lse=need_lse)
            assert not BACKENDS[planned.backend].rejects(planned.tile, problem, H200)
            assert not (need_lse and planned.backend == "sdpa")
