"""The HTML report, in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import ratchet_synthetic as synthetic

from flashmoe.ratchet.gate.decide import decide
from flashmoe.ratchet.gate.thresholds import DEFAULTS
from flashmoe.ratchet.report.html import html
from flashmoe.ratchet.report.junit import junit
from flashmoe.ratchet.results.values import Results, Series, Telemetry, slowed

SLOW, FAST, SAME = synthetic.NAMES


def mixed() -> Results:
    """One case slower, one faster, one the same, with telemetry."""
    run = slowed(slowed(synthetic.results(noise=0.002), SLOW, 1.1), FAST, 0.8)
    seen = Telemetry(1980, 3201, 51, 312.5, ("power_cap",), ())
    return replace(run, cases=tuple(replace(c, telemetry=(seen,) * 5) for c in run.cases))


def page(current: Results) -> str:
    baseline = synthetic.results(noise=0.002, seed=9)
    decision = decide(current, baseline, DEFAULTS["cuda"])
    return html(decision, current, baseline, "took 40 s of the machine")


class _Tags(HTMLParser):
    """Which elements and addresses a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [v or "" for k, v in attributes if k in ("src", "href")]


def test_it_needs_nothing_else() -> None:
    text = page(mixed())
    seen = _Tags()
    seen.feed(text)
    assert {"table", "svg", "circle"} <= seen.tags
    assert not {"script", "link", "iframe", "img"} & seen.tags
    assert seen.addresses == []
    assert "url(" not in text
    assert "@import" not in text


def test_regressions_come_first_in_the_picture_and_the_table() -> None:
    text = page(mixed())
    for part in (text[text.index("<svg") : text.index("</svg>")], text[text.index("<table") :]):
        assert part.index(SLOW) < part.index(FAST) < part.index(SAME)
    assert re.search(r"<b>-(9|10)\.\d %</b>", text)
    assert "1980 to 1980" in text


def test_text_from_outside_stays_text() -> None:
    run = synthetic.results(noise=0.002)
    broken = replace(run.cases[0], ours=Series("failed", (), "<script>alert(1)</script>"))
    text = page(replace(run, cases=(broken, *run.cases[1:])))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_browser_shows_it(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium")
    path = tmp_path / "report.html"
    path.write_text(page(mixed()), encoding="utf-8")
    shot = tmp_path / "report.png"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    done = subprocess.run(
        [browser, *options, f"--screenshot={shot}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert shot.stat().st_size > 20_000
    dom = re.sub(r"<style>.*?</style>", "", done.stdout, flags=re.DOTALL)
    # As the browser understood it: three intervals drawn, every case a row, and nothing unclosed.
    assert dom.count("<circle") == 3
    assert len(re.findall(r"<tr><td><code>fwd", dom)) == 2 * 3
    assert dom.count("<table>") == dom.count("</table>") == 3


def test_junit_is_what_ci_systems_read() -> None:
    baseline = synthetic.results()
    current = slowed(synthetic.results(seed=20), SLOW, 1.1)
    other = replace(synthetic.FINGERPRINT, torch="2.14.0")
    suite = ElementTree.fromstring(junit(decide(current, baseline, DEFAULTS["cuda"])))
    counts = {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "3", "failures": "1", "errors": "0", "skipped": "0"}
    failed = suite.find(f"testcase[@name='{SLOW}']/failure")
    assert failed is not None
    assert (failed.get("message") or "").startswith("FAIL: -10.0 %")

    foreign = replace(current, cases=current.cases[1:], fingerprint=other)
    suite = ElementTree.fromstring(junit(decide(foreign, baseline, DEFAULTS["cuda"])))
    assert (suite.get("errors"), suite.get("tests")) == ("2", "4")
    assert suite.find("testcase[@name='comparable']/error") is not None
