"""The comment's body, from artifacts that mean no good."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import ratchet_synthetic as synthetic

from flashmoe.ratchet import comment, report
from flashmoe.ratchet.gate import decide
from flashmoe.ratchet.results import slowed
from flashmoe.ratchet.thresholds import Thresholds

URL = "https://github.com/someone/flashmoe/actions/runs/1"
SCRIPT = Path(__file__).resolve().parents[2] / "ratchet" / "comment.py"


def archive(folder: Path, **members: str) -> Path:
    path = folder / "ratchet.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, text in members.items():
            opened.writestr(name, text)
    return path


def test_a_real_report_arrives_whole() -> None:
    baseline = synthetic.results()
    current = slowed(baseline, synthetic.NAMES[0], 1.1)
    text = report.markdown(decide(current, baseline, Thresholds()), current, baseline, "")
    body = comment.body(text, "failure", URL)
    assert body.startswith(f"{comment.MARKER}\n[The run]({URL}) ended with: failure.\n\n### 🔴")
    assert body.endswith(text)


def test_it_runs_as_a_script_without_the_package(tmp_path: Path) -> None:
    path = archive(tmp_path, **{comment.MEMBER: "### fine\n"})
    command = [sys.executable, "-I", "-S", str(SCRIPT), str(path)]
    done = subprocess.run(
        [*command, "--conclusion", "success", "--url", URL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{comment.MARKER}\n[The run]({URL}) ended with: success.\n\n### fine\n"


@pytest.mark.parametrize(
    "hostile",
    [
        "@someone @org/team",
        "fixes #12 GH-12",
        "[click](https://evil.example) ![x](http://evil.example/x.png)",
        "[click][ref]\n\n[ref]: https://evil.example",
        "https://evil.example www.evil.example",
        "<a href=//evil.example>x</a> <img src=x> <script>1</script> <!-- hidden",
        "<details onclick=x><DETAILS>",
        "right\u202eleft \x1b[31m \x00",
    ],
)
def test_nothing_active_is_left(hostile: str) -> None:
    tamed = comment.tame(hostile)
    for active in ("@s", "@o", "#1", "GH-", "](", "][", "]:", "://", "www.", "<", "\u202e", "\x1b"):
        assert active not in tamed
    assert "\x00" not in tamed


def test_open_tags_are_closed() -> None:
    body = comment.body("<details>\n<summary>x\nno end", "success", URL)
    assert body.endswith("</summary></details>")


@pytest.mark.parametrize("text", ["@" * 64000, "<details>\n" * 6000, "line\n" * 20000, "@" * 10**6])
def test_a_body_always_fits(tmp_path: Path, text: str) -> None:
    path = archive(tmp_path, **{comment.MEMBER: text})
    assert len(comment.body(comment.read_report(path), "success", URL)) <= 65536


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path, **{comment.MEMBER: "0" * (1 << 28)})
    assert len(comment.read_report(path)) == comment.MAX_BODY


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + b"\x00" * 18])
def test_without_a_report_the_run_is_pointed_to(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ratchet.zip"
    for present in (False, True):
        if present:
            path.write_bytes(content)
        body = comment.body(comment.read_report(path), "failure", URL)
        assert "has no report: the build or the measurement failed" in body
        assert URL in body
    assert comment.read_report(archive(tmp_path, **{"other.md": "x"})) == ""


def test_a_damaged_member_is_no_report(tmp_path: Path) -> None:
    path = archive(tmp_path, **{comment.MEMBER: "x" * 1000 + "y" * 1000})
    data = bytearray(path.read_bytes())
    data[len("ratchet_report.md") + 32] ^= 0xFF
    path.write_bytes(data)
    assert comment.read_report(path) == ""
