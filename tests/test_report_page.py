"""The report in a real browser: opens without an error, filters, fits a narrow screen, is legible in the dark."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Browser, chromium
from lsp_jax.reporting.html_report import write_report
from reported import write_run

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(chromium() is None, reason="no Chromium here: apt-get install chromium"),
]
PICTURES = os.environ.get("LSP_JAX_PICTURES", "")
"""Where pictures are kept to be looked at; with the test's other files without."""

SETTLED = "new Promise(done => setTimeout(done, 400))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        "alarms": write_run(folder / "lsp", alarms=True),
        "healthy": write_run(folder / "lsp_zero", seed=1),
        "empty": write_run(folder / "empty", last=1),
    }
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        (runs["empty"] / name).unlink()
    found = {name: write_report([run]) for name, run in runs.items()}
    found["both"] = write_report([runs["alarms"], runs["healthy"]], folder / "both.html")
    return found


def look(browser: Browser, page: Path, folder: Path, name: str, **screen: Any) -> bytes:
    """Opens the page, checks what holds for every one, takes its picture."""
    browser.errors.clear()
    browser.open(page, **screen)
    browser.run(SETTLED)
    assert not browser.errors
    assert browser.run("document.title").startswith("Self-play: ")  # model text has not changed it
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")  # nothing runs off the side
    place = Path(PICTURES) if PICTURES else folder
    place.mkdir(parents=True, exist_ok=True)
    return browser.picture(place / f"{name}.png")


def test_everything_is_drawn(browser: Browser, reports: dict[str, Path], tmp_path: Path):
    assert len(look(browser, reports["alarms"], tmp_path, "alarms")) > 50_000
    count = "document.querySelectorAll('{}').length".format
    assert browser.run(count("#curves .main-svg")) >= 10 and browser.run(count("#times .main-svg")) >= 1
    assert browser.run(count("#curves .scatterlayer .trace path.js-line")) == 14
    assert browser.run(count("#curves .shapelayer path")) == 9  # where the alarm began
    assert browser.run(count("#alarms tr")) == 3
    assert browser.run(count("#times .barlayer .trace")) == 6
    look(browser, reports["healthy"], tmp_path, "healthy")
    assert browser.run("document.querySelector('#alarms').textContent").endswith("None.")
    look(browser, reports["empty"], tmp_path, "empty")
    assert "No iterations yet" in browser.run("document.querySelector('#curves').textContent")


def test_queries_are_filtered_and_answers_opened(browser: Browser, reports: dict[str, Path], tmp_path: Path):
    look(browser, reports["alarms"], tmp_path, "filtered")
    shown = "document.querySelectorAll('#queries details').length"
    assert browser.run(shown) == 24 * 4

    def choose(kind: str, text: str) -> int:
        browser.run(
            f"(() => {{ const [kind] = document.querySelectorAll('#queries select'); kind.value = '{kind}';"
            "kind.dispatchEvent(new Event('change'));"
            f"const find = document.querySelector('#queries input'); find.value = '{text}';"
            "find.dispatchEvent(new Event('input')); })()"
        )
        return browser.run(shown)

    assert choose("invalid", "") == 24
    assert choose("repeated", "2 + 2") == browser.run(shown) > 0
    assert choose("all", "40 + 0") == 1
    browser.run("document.querySelector('#queries summary').click()")
    browser.run(SETTLED)
    assert browser.run("document.querySelectorAll('#queries details td .token').length") > 10
    shades = browser.run("[...document.querySelectorAll('.token')].map(t => getComputedStyle(t).backgroundColor)")
    assert len(set(shades)) > 4
    assert "\\u202eright \\u001b[0m" in browser.run("document.querySelector('#queries details').textContent")
    assert browser.run("document.title").startswith("Self-play: ")


def test_a_narrow_screen_and_the_dark(browser: Browser, reports: dict[str, Path], tmp_path: Path):
    for name in ("alarms", "both"):
        look(browser, reports[name], tmp_path, f"{name}-narrow", width=390, height=844)
        look(browser, reports[name], tmp_path, f"{name}-dark", dark=True)
        assert contrast(browser, "body", "body") > 7
        for chosen in (".faint", "a", "#alarms td", ".bad", ".good"):
            assert contrast(browser, chosen, "body") > 4.5, chosen
        assert contrast(browser, "#curves .xtick text", "body", "fill") > 4.5
    look(browser, reports["both"], tmp_path, "both")
    for chosen in (".faint", "a", "#alarms td", ".bad", ".good"):
        assert contrast(browser, chosen, "body") > 4.5, chosen


def test_runs_are_compared(browser: Browser, reports: dict[str, Path], tmp_path: Path):
    look(browser, reports["both"], tmp_path, "compared")
    rows = "document.querySelectorAll('#settings tr').length"
    before = browser.run(rows)
    browser.run("document.querySelector('#settings input').click()")
    assert 1 < browser.run(rows) < 6 < before
    assert "seed" in browser.run("document.querySelector('#settings').textContent")


def contrast(browser: Browser, text: str, back: str, property_: str = "color") -> float:
    """Of the text of one element to the background of another, as WCAG 2 counts it."""
    style = "getComputedStyle(document.querySelector('{}'))['{}']".format
    lights = []
    for color in (browser.run(style(text, property_)), browser.run(style(back, "backgroundColor"))):
        channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)
