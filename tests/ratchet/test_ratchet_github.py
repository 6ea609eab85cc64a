"""What is written on GitHub, from artifacts that mean no good."""

from __future__ import annotations

import html
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ratchet_synthetic as synthetic

from flashmoe.ratchet.ci import github as comment
from flashmoe.ratchet.gate.decide import decide
from flashmoe.ratchet.gate.thresholds import DEFAULTS
from flashmoe.ratchet.report import markdown as report
from flashmoe.ratchet.results.values import slowed

URL = "https://github.com/someone/flashmoe/actions/runs/1"
SCRIPT = Path(__file__).resolve().parents[2] / "ratchet" / "ci" / "github.py"


def archive(**members: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, text in members.items():
            opened.writestr(name, text)
    return packed.getvalue()


def test_a_real_report_arrives_whole() -> None:
    baseline = synthetic.results()
    current = slowed(baseline, synthetic.NAMES[0], 1.1)
    text = report.markdown(decide(current, baseline, DEFAULTS["cuda"]), current, baseline, "")
    body = comment.body(text, "failure", URL)
    assert body.startswith(f"{comment.MARKER}\n[The run]({URL}) ended with: failure.\n\n### 🔴")
    assert body.endswith(text)


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


@pytest.mark.parametrize("entity", ["&commat;", "&#64;", "&#x40;", "&num;", "&lt;", "&amp;commat;"])
def test_entities_name_nothing(entity: str) -> None:
    """GitHub mentions `&commat;someone`. What is shown is the text as it was."""
    tamed = comment.tame(f"{entity}someone {entity}12")
    assert "&" not in tamed.replace("&amp;", "")
    assert html.unescape(tamed).replace("\u200b", "") == f"{entity}someone {entity}12"


def test_open_tags_are_closed() -> None:
    body = comment.body("<details>\n<summary>x\nno end", "success", URL)
    assert body.endswith("</summary></details>")


@pytest.mark.parametrize("text", ["@" * 64000, "<details>\n" * 6000, "line\n" * 20000, "@" * 10**6])
def test_a_body_always_fits(text: str) -> None:
    path = archive(**{comment.MEMBER: text})
    assert len(comment.body(comment.read_report(path), "success", URL)) <= 65536


def test_a_bomb_is_not_unpacked() -> None:
    path = archive(**{comment.MEMBER: "0" * (1 << 28)})
    assert len(comment.read_report(path)) == comment.MAX_BODY


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + b"\x00" * 18])
def test_without_a_report_the_run_is_pointed_to(content: bytes) -> None:
    body = comment.body(comment.read_report(content), "failure", URL)
    assert "⚪ flashmoe ratchet has no report: the run ended without one" in body
    assert URL in body
    assert comment.read_report(archive(**{"other.md": "x"})) == ""


def test_a_damaged_member_is_no_report() -> None:
    data = bytearray(archive(**{comment.MEMBER: "x" * 1000 + "y" * 1000}))
    data[len("ratchet_report.md") + 32] ^= 0xFF
    assert comment.read_report(bytes(data)) == ""


class FakeGitHub:
    """Answers as GitHub does, from `pulls`, `comments` and an artifact; remembers what was sent."""

    def __init__(self, artifact: bytes | None) -> None:
        self.artifact = artifact
        self.pulls: list[dict[str, Any]] = []
        self.comments: list[dict[str, Any]] = []
        self.files: dict[str, str] = {}
        self.sent: list[tuple[str, str, dict[str, Any]]] = []
        self.leaked = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                if path == "/storage":
                    outer.leaked |= "Authorization" in self.headers
                    self.reply(200, outer.artifact or b"")
                elif path.endswith("/zip"):
                    self.reply(302, b"", {"Location": f"{outer.api}/storage"})
                else:
                    found = outer.answer(path.removeprefix("/repos/someone/flashmoe"), query)
                    self.reply(404 if found is None else 200, json.dumps(found).encode())

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                data = json.loads(self.rfile.read(length))
                path = self.path.removeprefix("/repos/someone/flashmoe")
                outer.sent.append((self.command, path, data))
                self.reply(201, b'{"html_url": "https://github.com/someone/flashmoe/pull/9"}')

            do_PATCH = do_PUT = do_POST

            def reply(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(code)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.api = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, query: str) -> Any:
        if path == "":
            return {"default_branch": "main"}
        if path == "/git/ref/heads/main":
            return {"object": {"sha": "base"}}
        if path.startswith("/contents/"):
            sha = self.files.get(path.removeprefix("/contents/"))
            return None if sha is None else {"sha": sha}
        if path == "/pulls":
            head = urllib.parse.parse_qs(query)["head"][0]
            return [p for p in self.pulls if p["head"]["label"] == head]
        if path.endswith("/comments"):
            page = int(urllib.parse.parse_qs(query)["page"][0])
            return self.comments[100 * (page - 1) : 100 * page]
        assert path == "/actions/runs/77/artifacts"
        size = len(self.artifact or b"")
        listed = [{"name": "ratchet", "id": 5, "size_in_bytes": size}]
        return {"artifacts": [] if self.artifact is None else listed}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGitHub]:
    server = FakeGitHub(archive(**{comment.MEMBER: "### 🔴 slower, says @someone\n"}))
    monkeypatch.setenv("GITHUB_API_URL", server.api)
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/flashmoe")
    monkeypatch.setenv("GH_TOKEN", "secret")
    yield server
    server.server.shutdown()
    server.server.server_close()


def event(folder: Path, owner: str = "someone") -> Path:
    run = {
        "id": 77,
        "conclusion": "failure",
        "html_url": URL,
        "head_branch": "faster",
        "head_sha": "abc",
        "head_repository": {"owner": {"login": owner}},
    }
    path = folder / "event.json"
    path.write_text(json.dumps({"workflow_run": run}))
    return path


def pull(number: int, sha: str = "abc", label: str = "someone:faster") -> dict[str, Any]:
    return {"number": number, "head": {"sha": sha, "label": label}}


@pytest.mark.parametrize("owner", ["someone", "forker"])
def test_a_report_is_posted_once_then_updated(fake: FakeGitHub, tmp_path: Path, owner: str) -> None:
    """Of the repository itself, and of a fork, whose event names no pull request."""
    fake.pulls = [pull(8, sha="older"), pull(4, label=f"{owner}:faster")]
    command = ["comment", "--event", str(event(tmp_path, owner))]
    assert comment.main(command) == 0
    ((method, path, data),) = fake.sent
    assert (method, path) == ("POST", "/issues/4/comments")
    assert data["body"].startswith(f"{comment.MARKER}\n[The run]({URL}) ended with: failure.")
    assert "slower, says @\u200bsomeone" in data["body"]
    assert not fake.leaked

    human = {"id": 1, "user": {"login": "someone"}, "body": comment.MARKER}
    ours = {"id": 2, "user": {"login": "github-actions[bot]"}, "body": comment.MARKER + "x"}
    fake.comments = [human] * 130 + [ours]
    assert comment.main(command) == 0
    assert fake.sent[1][:2] == ("PATCH", "/issues/comments/2")


def test_a_pull_request_that_moved_on_gets_nothing(
    fake: FakeGitHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.pulls = [pull(4, sha="newer")]
    assert comment.main(["comment", "--event", str(event(tmp_path))]) == 0
    assert fake.sent == []
    assert "no open pull request has abc as its head" in capsys.readouterr().out


def test_no_artifact_is_told(fake: FakeGitHub, tmp_path: Path) -> None:
    fake.artifact, fake.pulls = None, [pull(4)]
    assert comment.main(["comment", "--event", str(event(tmp_path))]) == 0
    assert "has no report" in fake.sent[0][2]["body"]


def test_it_runs_as_a_script_without_the_package(fake: FakeGitHub, tmp_path: Path) -> None:
    fake.pulls = [pull(4)]
    command = [sys.executable, "-I", "-S", str(SCRIPT), "comment", "--dry-run"]
    done = subprocess.run(
        [*command, "--event", str(event(tmp_path))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.stdout.startswith(f"{comment.MARKER}\n[The run]({URL}) ended with: failure.\n\n###")
    assert fake.sent == []


def test_a_baseline_is_proposed(
    fake: FakeGitHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    against = tmp_path / "against"
    against.mkdir()
    (against / "nvidia-h200.json").write_text("old\n")
    # What `git hash-object` says of it.
    old = "3367afdbbf91e638efe983616377c60477cc6612"
    fake.files["baselines/nvidia-h200.json"] = old
    (tmp_path / "nvidia-h200.json").write_text("{}")
    (tmp_path / "nvidia-l4.json").write_text("{}")
    (tmp_path / "history.jsonl").write_text("{}\n{}\n")
    (tmp_path / "moved.md").write_text("2 cases moved, says @someone")
    command = ["baseline", "--folder", str(tmp_path), "--moved", str(tmp_path / "moved.md")]
    command += ["--against", str(against), "--branch", "ratchet-baseline-1"]
    assert comment.main(command) == 0
    assert "/pull/9" in capsys.readouterr().out
    steps = [(method, path) for method, path, _ in fake.sent]
    assert steps == [
        ("POST", "/git/refs"),
        ("PUT", "/contents/baselines/history.jsonl"),
        ("PUT", "/contents/baselines/nvidia-h200.json"),
        ("PUT", "/contents/baselines/nvidia-l4.json"),
        ("POST", "/pulls"),
    ]
    assert fake.sent[0][2] == {"ref": "refs/heads/ratchet-baseline-1", "sha": "base"}
    assert fake.sent[2][2]["sha"] == old
    assert "sha" not in fake.sent[3][2]
    assert fake.sent[4][2]["base"] == "main"
    assert "@\u200bsomeone" in fake.sent[4][2]["body"]


@pytest.mark.parametrize("there", [None, "other"])
def test_a_baseline_that_moved_meanwhile_is_not_overwritten(
    fake: FakeGitHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str | None
) -> None:
    against, folder, moved = (tmp_path / name for name in ("against", "new", "moved.md"))
    for made in (against, folder):
        made.mkdir()
    (folder / "nvidia-h200.json").write_text("{}")
    moved.write_text("moved")
    if there is None:
        (against / "nvidia-h200.json").write_text("old")
    else:
        fake.files["baselines/nvidia-h200.json"] = there
    command = ["baseline", "--folder", str(folder), "--moved", str(moved), "--branch", "b"]
    assert comment.main([*command, "--against", str(against)]) == 1
    told = "baselines/nvidia-h200.json on main is not the one that was measured against: run the"
    assert told in capsys.readouterr().err
    assert fake.sent == []


def test_no_baseline_is_no_pull_request(fake: FakeGitHub, tmp_path: Path) -> None:
    (tmp_path / "moved.md").write_text("")
    command = ["baseline", "--folder", str(tmp_path / "none"), "--branch", "b"]
    command += ["--against", str(tmp_path)]
    assert comment.main([*command, "--moved", str(tmp_path / "moved.md")]) == 0
    assert fake.sent == []


@pytest.mark.parametrize("name", ["Gpu.json", "a b.json", "workflow.yml.json", ".json"])
def test_a_file_that_is_no_baseline_stops_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="is no name of a baseline"):
        comment.baselines_in(tmp_path)
