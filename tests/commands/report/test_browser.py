"""The page in a real browser, at a laptop's width, light and dark."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from finhpc.commands.report.command import report
from finhpc.settings.base import build
from finhpc.settings.report import ReportConfig
from tests.commands.report.store import Store

pytestmark = pytest.mark.browser

MEASURE = """<script>
const wide = [...document.querySelectorAll("svg, .scroll")].filter((e) => e.scrollWidth > e.clientWidth + 1).length;
const svg = document.querySelector("figure svg").getBoundingClientRect();
document.title = `width ${document.documentElement.scrollWidth} wide ${wide} svg ${Math.round(svg.width)} `
  + `ground ${getComputedStyle(document.body).backgroundColor}`;
</script></body>"""


@pytest.fixture(scope="module")
def page(paper_like: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    report(build(ReportConfig, {"run": {"storage": str(paper_like.folder)}, "out": str(out)}))
    return out / "report.html"


def browse(chromium: str, page: Path, *words: str) -> str:
    profile = page.parent / "profile"
    root = ["--no-sandbox"] if os.getuid() == 0 else []
    command = [chromium, "--headless", *root, "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1280,800"]
    done = subprocess.run([*command, *words, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_everything_fits_a_laptops_width(chromium: str, page: Path) -> None:
    measuring = page.with_name("measuring.html")
    measuring.write_text(page.read_text().replace("</body>", MEASURE))
    title = re.search(r"<title>width (\d+) wide (\d+) svg (\d+)", browse(chromium, measuring, "--dump-dom"))
    assert title
    width, wide, svg = (int(part) for part in title.groups())
    assert width <= 1280
    assert wide == 0  # no table that has to be scrolled sideways
    assert 700 < svg <= 1180


def test_light_and_dark_are_pictures_with_something_in_them(chromium: str, page: Path) -> None:
    from matplotlib.image import imread

    for mode, words in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        picture = page.with_name(f"{mode}.png")
        browse(chromium, page, *words, "--hide-scrollbars", f"--screenshot={picture}")
        shades = imread(picture)[:, :, :3].mean(axis=2)
        assert shades.shape == (800, 1280)
        ground = shades[5, 5]
        assert ground > 0.9 if mode == "light" else ground < 0.2
        assert 0.02 < (abs(shades - ground) > 0.2).mean() < 0.5  # text upon it
