"""The adapters of other libraries, on stand-ins that take what these take."""

from __future__ import annotations

import pytest
import sota_libraries
import torch

from flashmoe.measure.timing import Limits
from flashmoe.ratchet.measuring.suite import SUITES, parse
from flashmoe.ratchet.sota import comparison as sota
from flashmoe.ratchet.sota.comparison import OURS
from flashmoe.ratchet.sota.providers import PROVIDERS

LIBRARIES = tuple(p for p in PROVIDERS if p.package != "torch")
EVERY = {p.name for p in LIBRARIES}


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("fwd-b2-h4k2-s70-d16-float32", set()),
        ("fwd-b2-h4k2-s40x70-d16-float32-causal", set()),
        ("fwd-b2-h2-s70-d16-float32-window-9-0", set()),
        ("fwd-b2-h2-s70-d16-float32-window-9-5", {"flashinfer"}),
        ("fwd-b2-h2-s70-d16-float32-causal-softcap", {"xformers", "cudnn"}),
        ("fwd-b2-h2-s70-d16-float32-window-9-0-sink", EVERY - {"flash-attn-4", "cudnn"}),
        ("fwd-b2-h2-s70-d16-float32-causal-alibi", EVERY - {"flash-attn-2"}),
        ("fwd-b4-h4k2-s64-d16-float32-causal-packed", set()),
        ("fwd-b4-h4k2-s64x128-d16-float32-causal-packed", set()),
        ("fwd-b2-h4k2-s1x128-d16-float32", set()),
        ("fwd-b2-h4k2-s1x100-d16-float32", {"flashinfer"}),
        ("fwd-b3-h4k2-s1x256-d16-float32-cache", set()),
        ("fwd-b3-h4k2-s1x200-d16-float32-paged", {"cudnn"}),
        ("fwd-b3-h4k2-s4x200-d16-float32-causal-paged", {"cudnn"}),
        ("fwdbwd-b2-h2-s70-d16-float32-causal", {"flashinfer"}),
        ("bwd-b2-h2-s70-d16-float32-causal", {"flashinfer"}),
        ("fwdbwd-b4-h2-s64-d16-float32-causal-packed", {"flashinfer"}),
    ],
)
def test_adapters_compute_what_we_do(
    monkeypatch: pytest.MonkeyPatch, name: str, without: set[str]
) -> None:
    sota_libraries.install(monkeypatch)
    monkeypatch.setattr(sota, "PROVIDERS", LIBRARIES)
    limits = {"float32": Limits(1e11, 1e10)}
    (found,) = sota.compare([parse(name)], torch.device("cpu"), limits, 1, lambda _: None)
    reasons = {row.provider: row.reason for row in found.rows if row.reason}
    assert set(reasons) == without, reasons
    assert {row.provider for row in found.rows if row.samples} == {OURS, *(EVERY - without)}


def test_every_library_is_timed_in_what_it_can() -> None:
    """Each kind of the suite is one that somebody else runs, too."""
    for names in SUITES["sota"].values():
        for case in map(parse, names):
            assert [p for p in PROVIDERS if case.problem.features <= {*p.features.split()}], case
