"""What the ratchet writes on GitHub: a report on a pull request, a pull request for a baseline.

Run by the workflows `comment` and `baseline` as a script with only the standard library, on the
default branch with a token that may write: `python3 -I ratchet/ci/github.py comment --event FILE`.
The run that is reported on may have executed foreign code, so its artifact is hostile: it is never
unpacked, never asked which pull request it belongs to, and its text is tamed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKER = "<!-- flashmoe-ratchet -->"
MEMBER = "ratchet_report.md"
ARTIFACT = "ratchet"
# GitHub refuses comments above 65536 characters; taming makes a text longer.
MAX_BODY = 65000
# A result file is about 0.3 MB; nothing larger is looked at.
_MAX_ARCHIVE = 16_000_000
_INVISIBLE = "\u200b"
# What would link, mention, embed or open a tag, each broken by an invisible character after it.
_ACTIVE = (
    r"@",
    r"#(?=\d)",
    r"(?<=\])(?=[(\[:])",
    r"(?<=:)(?=//)",
    r"(?i:\bwww(?=\.))",
    r"GH(?=-\d)",
)
_TAGS = ("details", "summary")
_BOT = "github-actions[bot]"


def read_report(archive: bytes) -> str:
    """The report in an artifact; empty when there is none. Never unpacks, never reads more than a
    comment can hold, whatever the archive claims."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened, opened.open(MEMBER) as member:
            return member.read(MAX_BODY).decode("utf-8", errors="replace")
    except Exception:  # noqa: BLE001 - BadZipFile, zlib.error and whatever a crafted one provokes
        return ""


def tame(text: str) -> str:
    """Text that renders as a report does, but links nowhere, mentions nobody, embeds nothing and
    has no HTML besides folding."""
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    # First: an entity (`&commat;`, `&#35;`) becomes what it names when all else has been broken.
    text = text.replace("&", "&amp;")
    allowed = "|".join(rf"/?{tag}>" for tag in _TAGS)
    text = re.sub(rf"<(?!{allowed})", "&lt;", text)
    for pattern in _ACTIVE:
        text = re.sub(f"({pattern})", rf"\1{_INVISIBLE}", text)
    return text


def body(report: str, conclusion: str, url: str) -> str:
    """The comment: MARKER first, so that it is found and updated."""
    run = f"[The run]({url}) ended with: {conclusion}."
    if not report.strip():
        run = f"### ⚪ flashmoe ratchet has no report: the run ended without one\n\n{run}"
        return f"{MARKER}\n{run}\n"
    room = MAX_BODY - len(MARKER) - len(run) - 200
    tamed = tame(report)
    if len(tamed) > room:
        tamed = tamed[:room].rsplit("\n", 1)[0] + "\n\nThe rest is in the run's artifact.\n"
    # A tag left open by a cut, or by intent, must not swallow the line below.
    for tag in _TAGS[::-1]:
        missing = tamed.count(f"<{tag}>") - tamed.count(f"</{tag}>")
        tamed += f"</{tag}>" * min(max(missing, 0), 10)
    return f"{MARKER}\n{run}\n\n{tamed}"


class _Stay(urllib.request.HTTPRedirectHandler):
    """An artifact's address redirects to a storage that must not see our token."""

    def redirect_request(self, *_: Any) -> None:
        return None


class GitHub:
    """The few calls that are needed, for one repository."""

    def __init__(self, api: str, repository: str, token: str) -> None:
        self._root = f"{api}/repos/{repository}"
        self._token = token

    def get(self, path: str, **query: str) -> Any:
        asked = f"?{urllib.parse.urlencode(query)}" if query else ""
        return json.loads(self._request("GET", f"{path}{asked}"))

    def blob(self, path: str, ref: str) -> str:
        """The hash of a file's content; empty when there is no such file."""
        try:
            return str(self.get(f"contents/{path}", ref=ref)["sha"])
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return ""

    def pages(self, path: str, **query: str) -> list[Any]:
        """Every item of a list, a hundred a page."""
        items: list[Any] = []
        for page in range(1, 31):
            found = self.get(path, per_page="100", page=str(page), **query)
            items += found
            if len(found) < 100:
                break
        return items

    def send(self, method: str, path: str, data: dict[str, Any]) -> Any:
        return json.loads(self._request(method, path, json.dumps(data).encode()))

    def download(self, path: str) -> bytes:
        """What the address redirects to, without the token; at most _MAX_ARCHIVE bytes."""
        opener = urllib.request.build_opener(_Stay)
        try:
            with opener.open(self._prepared("GET", path), timeout=60) as answer:
                return bytes(answer.read(_MAX_ARCHIVE))
        except urllib.error.HTTPError as error:
            if error.code not in (301, 302, 303, 307, 308):
                raise
            target = error.headers["Location"]
        with urllib.request.urlopen(target, timeout=60) as answer:
            return bytes(answer.read(_MAX_ARCHIVE))

    def _request(self, method: str, path: str, data: bytes | None = None) -> bytes:
        with urllib.request.urlopen(self._prepared(method, path, data), timeout=60) as answer:
            return bytes(answer.read())

    def _prepared(
        self, method: str, path: str, data: bytes | None = None
    ) -> urllib.request.Request:
        headers = {
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {self._token}",
            "X-GitHub-Api-Version": "2022-11-28",
        }
        url = f"{self._root}/{path}".rstrip("/")
        return urllib.request.Request(url, data, headers, method=method)


def report_of(github: GitHub, run: dict[str, Any]) -> str:
    """The run's report, raw; empty when there is none, or none small enough."""
    listed = github.get(f"actions/runs/{int(run['id'])}/artifacts", per_page="100")
    for artifact in listed["artifacts"]:
        if artifact["name"] == ARTIFACT and artifact["size_in_bytes"] < _MAX_ARCHIVE:
            return read_report(github.download(f"actions/artifacts/{int(artifact['id'])}/zip"))
    return ""


def pull_request_of(github: GitHub, run: dict[str, Any]) -> int | None:
    """The open pull request whose head is the commit that ran, by the event and not the artifact;
    one that has moved on gets no old figures. (The event's own list is empty for forks.)"""
    head = f"{run['head_repository']['owner']['login']}:{run['head_branch']}"
    for pull in github.pages("pulls", state="open", head=head):
        if pull["head"]["sha"] == run["head_sha"]:
            return int(pull["number"])
    return None


def post(github: GitHub, number: int, text: str) -> str:
    """Updates our comment, or makes it; says which."""
    for comment in github.pages(f"issues/{number}/comments"):
        if comment["user"]["login"] == _BOT and comment["body"].startswith(MARKER):
            github.send("PATCH", f"issues/comments/{int(comment['id'])}", {"body": text})
            return "updated"
    github.send("POST", f"issues/{number}/comments", {"body": text})
    return "posted"


def blob_hash(file: Path) -> str:
    """git's hash of a file's content; empty when there is no such file."""
    if not file.exists():
        return ""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def propose(github: GitHub, files: Sequence[Path], against: Path, branch: str, text: str) -> str:
    """A pull request that puts `files` into baselines/ on the default branch; its address. Raises
    ValueError when one there is no longer the one in `against`, the folder of those that were
    measured against: it would undo what moved meanwhile."""
    main = github.get("")["default_branch"]
    before = {file: github.blob(f"baselines/{file.name}", main) for file in files}
    for file, blob in before.items():
        if blob != blob_hash(against / file.name):
            raise ValueError(
                f"baselines/{file.name} on {main} is not the one that was measured against: run "
                "the workflow `baseline` again"
            )
    start = github.get(f"git/ref/heads/{main}")["object"]["sha"]
    github.send("POST", "git/refs", {"ref": f"refs/heads/{branch}", "sha": start})
    for file in files:
        path = f"baselines/{file.name}"
        content = base64.b64encode(file.read_bytes()).decode()
        data = {"message": f"Baseline of {file.stem}", "content": content, "branch": branch}
        if before[file]:
            data["sha"] = before[file]
        github.send("PUT", f"contents/{path}", data)
    title = "Ratchet baseline: " + ", ".join(file.stem for file in files)
    request = {"title": title, "head": branch, "base": main, "body": tame(text)[:MAX_BODY]}
    return str(github.send("POST", "pulls", request)["html_url"])


def baselines_in(folder: Path) -> list[Path]:
    """Files that may be baselines and their history, by name and size, and are JSON, the history a
    line at a time. Raises ValueError otherwise."""
    files = sorted(folder.glob("*.json*"))
    for file in files:
        if not re.fullmatch(r"[a-z0-9-]+\.jsonl?", file.name) or file.is_symlink():
            raise ValueError(f"{file.name} is no name of a baseline")
        if file.stat().st_size > _MAX_ARCHIVE:
            raise ValueError(f"{file.name} is too large for a baseline")
        text = file.read_text(encoding="utf-8")
        for document in text.splitlines() if file.suffix == ".jsonl" else [text]:
            json.loads(document)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 done, or nothing to do; 1 a baseline may not be proposed, and why; 2 "
        "bad usage. GH_TOKEN, GITHUB_API_URL and GITHUB_REPOSITORY as GitHub's runners have them.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    comment = commands.add_parser("comment", help="post a run's report on its pull request")
    comment.add_argument("--event", type=Path, required=True, help="the workflow_run event's JSON")
    comment.add_argument("--dry-run", action="store_true", help="print it, post nothing")
    baseline = commands.add_parser("baseline", help="open a pull request with new baselines")
    baseline.add_argument("--folder", type=Path, required=True, help="with DEVICE.json files")
    baseline.add_argument("--against", type=Path, required=True, help="folder measured against")
    baseline.add_argument("--moved", type=Path, required=True, help="what moved, as text")
    baseline.add_argument("--branch", required=True, help="to make")
    arguments = parser.parse_args(argv)
    github = GitHub(
        os.environ.get("GITHUB_API_URL") or "https://api.github.com",
        os.environ["GITHUB_REPOSITORY"],
        os.environ["GH_TOKEN"],
    )
    if arguments.command == "comment":
        return _comment(github, arguments.event, arguments.dry_run)
    try:
        files = baselines_in(arguments.folder)
        if not files:
            print("no baseline moved")
            return 0
        text = arguments.moved.read_text(encoding="utf-8")
        print(propose(github, files, arguments.against, arguments.branch, text))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _comment(github: GitHub, event: Path, dry_run: bool) -> int:
    run = json.loads(event.read_text(encoding="utf-8"))["workflow_run"]
    number = pull_request_of(github, run)
    if number is None:
        print(f"no open pull request has {run['head_sha']} as its head")
        return 0
    text = body(report_of(github, run), run["conclusion"], run["html_url"])
    if dry_run:
        sys.stdout.write(text)
        return 0
    print(f"{post(github, number, text)} the comment on pull request {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
