"""What cannot be compared never passes, and says in words of its own why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ratchet_synthetic as synthetic

from flashmoe.ratchet import cli
from flashmoe.ratchet.results import schema

NAME = synthetic.NAMES[0]
Edit = Callable[[Any], None]


def in_first_case(key: str, value: Any) -> Edit:
    return lambda data: data["cases"][0].__setitem__(key, value)


def in_fingerprint(key: str, value: str) -> Edit:
    return lambda data: data["fingerprint"].__setitem__(key, value)


def renamed(data: Any) -> None:
    first = data["cases"][0]
    first["name"] = NAME.replace("s512", "s513")
    first["problem"]["seqlen_q"] = first["problem"]["seqlen_kv"] = 513


# How the current run or the baseline is changed, as JSON or to so many characters; the exit code; a
# part of the message.
CASES: dict[str, tuple[Edit | int, int, str]] = {
    "missing case": (lambda data: data["cases"].pop(0), 4, f"{NAME}: "),
    "renamed case": (renamed, 4, "renamed "),
    "other GPU": (in_fingerprint("device", "Another GPU"), 4, "fingerprint: device: "),
    "other torch": (in_fingerprint("torch", "2.14.0"), 4, "fingerprint: torch: "),
    "changed SDPA backend": (in_first_case("sdpa_backend", "math"), 4, "SDPA ran by its "),
    "truncated JSON": (2000, 2, "no whole JSON document"),
    "NaN samples": (
        lambda data: data["cases"][0]["ours"]["samples"][1].__setitem__(2, float("nan")),
        2,
        "must be finite",
    ),
    "empty file": (0, 2, "the file is empty"),
    "no cases": (lambda data: data["cases"].clear(), 2, "cases is empty"),
}


@pytest.mark.parametrize("changed", ["current", "baseline"])
@pytest.mark.parametrize("name", CASES)
def test_it_never_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, changed: str
) -> None:
    edit, code, message = CASES[name]
    paths = {side: tmp_path / f"{side}.json" for side in ("current", "baseline")}
    for seed, (side, path) in enumerate(paths.items()):
        data = json.loads(json.dumps(schema.to_json(synthetic.results(seed=9 * seed))))
        if side == changed and not isinstance(edit, int):
            edit(data)
        text = json.dumps(data)
        path.write_text(text[:edit] if side == changed and isinstance(edit, int) else text)
    before = paths["baseline"].read_bytes()
    arguments = ["gate", str(paths["current"]), "--baseline", str(paths["baseline"]), "--update"]
    assert cli.main(arguments) == code
    told = capsys.readouterr()
    text = told.out + told.err
    assert message in text
    others = {m for _, _, m in CASES.values()} - {message, f"{NAME}: "}
    assert not [other for other in others if other in text]
    assert paths["baseline"].read_bytes() == before
