"""The body of a pull-request comment from an artifact that may be hostile.

Run by .github/workflows/comment.yml as a script with only the standard library, where the package
is not installed: `python3 -I ratchet/comment.py ARCHIVE --conclusion C --url U`.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

MARKER = "<!-- flashmoe-ratchet -->"
MEMBER = "ratchet_report.md"
# GitHub refuses comments above 65536 characters; taming makes a text longer.
MAX_BODY = 65000
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


def read_report(archive: Path) -> str:
    """The report in an artifact; empty when there is none. Never unpacks, never reads more than a
    comment can hold, whatever the archive claims."""
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(MEMBER) as member:
            return member.read(MAX_BODY).decode("utf-8", errors="replace")
    except (OSError, KeyError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError):
        return ""
    except Exception:  # noqa: BLE001 - zlib.error and whatever else a crafted archive provokes
        return ""


def tame(text: str) -> str:
    """Text that renders as a report does, but links nowhere, mentions nobody, embeds nothing and
    has no HTML besides folding."""
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    allowed = "|".join(rf"/?{tag}>" for tag in _TAGS)
    text = re.sub(rf"<(?!{allowed})", "&lt;", text)
    for pattern in _ACTIVE:
        text = re.sub(f"({pattern})", rf"\1{_INVISIBLE}", text)
    return text


def body(report: str, conclusion: str, url: str) -> str:
    """The comment: MARKER first, so that it is found and updated."""
    run = f"[The run]({url}) ended with: {conclusion}."
    if not report.strip():
        run = f"### 🔴 flashmoe ratchet has no report: the build or the measurement failed\n\n{run}"
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print the body of a pull-request comment.")
    parser.add_argument("archive", type=Path, help="the artifact; need not exist")
    parser.add_argument("--conclusion", required=True, help="what the workflow run ended with")
    parser.add_argument("--url", required=True, help="of the workflow run")
    arguments = parser.parse_args(argv)
    report = read_report(arguments.archive)
    sys.stdout.write(body(report, arguments.conclusion, arguments.url))
    return 0


if __name__ == "__main__":
    sys.exit(main())
