"""report.html in a real browser: it fits its window, in the light and in the dark."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
import torch
from autotune_simulated import DEFAULT, GRID, PROBLEM, SimulatedBench, bowl
from support import missing

from flashmoe.autotune.report import html as report_html
from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.schedule.budget import tune
from flashmoe.autotune.schedule.place import Options, Place
from flashmoe.autotune.schedule.result import Result, Watch
from flashmoe.autotune.schedule.suite import Group
from flashmoe.backends import BACKENDS
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.timing import Limits
from flashmoe.tiles import Tile

CPU = torch.device("cpu")
BEST = Tile("cpu", 192, 256)
WRONG = Tile("cpu", 256, 256)
# What the page says about itself, once it is laid out at a width of its own.
_ASK = """
<iframe id="page" style="width:{width}px;height:4000px;border:0" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const page = document.getElementById("page").contentDocument
  const box = e => e.getBoundingClientRect()
  document.title = JSON.stringify({{
    overflow: page.scrollingElement.scrollWidth - {width},
    background: getComputedStyle(page.body).backgroundColor,
    ink: getComputedStyle(page.body).color,
    charts: [...page.querySelectorAll("svg")].map(e => [box(e).width, box(e).right]),
    outside: [...page.querySelectorAll("svg text")].filter(e => {{
      const chart = box(e.closest("svg")), text = box(e)
      return text.right > chart.right + 2 || text.left < chart.left - 2
    }}).map(e => e.textContent),
    headings: [...page.querySelectorAll("h3")].map(e => e.textContent),
  }})
}}</script>
"""


@pytest.fixture(scope="module")
def results() -> list[Result]:
    with pytest.MonkeyPatch.context() as patch:
        backend = type(BACKENDS["cpu"])
        patch.setattr(backend, "tiles", lambda *_: GRID)
        patch.setattr(backend, "default_tile", lambda *_: DEFAULT)
        patch.setattr(
            "flashmoe.autotune.schedule.problem.default_candidate",
            lambda *_: Candidate.of_tile(DEFAULT),
        )
        bench = SimulatedBench(bowl(BEST, step=0.1), wrong={str(WRONG): "out is off by 1"})
        return list(
            tune(
                [Group((PROBLEM,), (1.0,))],
                Place(CPU, fingerprint(CPU)),
                Options(),
                Watch(),
                bench.now,
                lambda group: bench,
            )
        )


@pytest.fixture(scope="module")
def page(results: list[Result]) -> str:
    limits = {PROBLEM.dtype: Limits(5e12, 2e10)}
    return report_html.html(
        results, fingerprint(CPU), limits, command="python -m x <&>", database="/x.json"
    )


def test_it_is_one_file_without_network_or_script(page: str) -> None:
    for word in ("http://", "https://", "<script", "url(", "@import", "<link", "src="):
        assert word not in page
    assert "python -m x &lt;&amp;&gt;" in page


def test_it_holds_what_was_found(page: str, results: list[Result]) -> None:
    (result,) = results
    assert str(result.best) == str(BEST)
    for text in (
        PROBLEM.label, str(BEST), str(WRONG), "out is off by 1", "Roofline", "noise floor",
        "What matters", "Best so far", "One step away", "Environment", torch.__version__,
    ):  # fmt: skip
        assert text in page
    # Every tried tile is in a heat map.
    assert len(re.findall('class="heat"', page)) == len(GRID) - 1


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        missing("no chromium (apt-get install chromium)")
    return found


def look(page: str, width: int, dark: bool, folder: Path) -> dict[str, object]:
    file = folder / "ask.html"
    file.write_text(_ASK.format(width=width, page=escape(page)))
    done = subprocess.run(
        [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 800)},1200",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=2000", "--dump-dom", f"file://{file}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    seen: dict[str, object] = json.loads(unescape(title[1]))
    return seen


def luminance(color: object) -> float:
    return sum(map(int, re.findall(r"\d+", str(color))[:3])) / 765


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_it_fits_its_window(page: str, width: int, dark: bool, tmp_path: Path) -> None:
    seen = look(page, width, dark, tmp_path)
    assert seen["overflow"] == 0
    assert seen["outside"] == []
    charts = seen["charts"]
    assert isinstance(charts, list)
    assert len(charts) >= 5
    assert all(drawn > 100 and right <= width for drawn, right in charts)
    assert (luminance(seen["background"]) < 0.3) == dark
    assert abs(luminance(seen["background"]) - luminance(seen["ink"])) > 0.6
