"""Pages in Chromium: nothing is asked of a network, nothing overflows a telephone, pictures have names, links lead somewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from audited import audits, many_audits
from browser import Browser, browser, missing

import disthess
from disthess.reports.history_page import history_page
from disthess.reports.render import to_html, write_page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")]

PAGES = ("run", "one", "few", "many")

NAMELESS = """
return [...document.querySelectorAll('svg, img')].filter(e => {
  const named = (e.getAttribute('aria-labelledby') || '').split(' ').map(id => document.getElementById(id));
  return !(named.length && named.every(n => n && n.textContent.trim())) && !e.getAttribute('alt');
}).map(e => e.outerHTML.slice(0, 200));
"""
LOST = """
return [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))
  .filter(h => !h.startsWith('#') || !document.getElementById(decodeURIComponent(h.slice(1))));
"""
WIDE = """
const limit = document.documentElement.clientWidth;
const outside = [...document.body.querySelectorAll('*')].filter(e =>
  !e.closest('.scroll') && e.getClientRects().length && e.getBoundingClientRect().right > limit + 0.5);
return [document.documentElement.scrollWidth - limit, outside.map(e => e.outerHTML.slice(0, 120))];
"""
CONTRAST = """
const channel = c => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const light = s => {
  const [r, g, b] = s.match(/[\\d.]+/g).map(Number);
  return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
};
const behind = e => {
  for (; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (!colour.endsWith(', 0)')) return colour;
  }
  return 'rgb(255,255,255)';
};
const worst = {};
for (const e of document.querySelectorAll('p, h1, h2, h3, a, dt, dd, small, th, td, caption, figcaption, strong, li, text')) {
  const own = getComputedStyle(e), ink = light(e.tagName == 'text' ? own.fill : own.color), paper = light(behind(e));
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  worst[e.tagName] = Math.min(worst[e.tagName] || 99, ratio);
}
return worst;
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3)).double()
    data = [(torch.randn(20, 4).double(), torch.randint(0, 3, (20,)))]
    problem = disthess.Problem(model, loss="cross_entropy", batches=data)
    disthess.compute(problem, folder / "run.zarr", parts=("hessian", "ggn"), activations=["0", "2"], progress=False)
    found = {"run": disthess.report(folder / "run.zarr", folder / "run.html")}
    few = audits(6, every=60)
    for name, records in (("one", few[:1]), ("few", few), ("many", many_audits(500, blocks=200))):
        found[name] = write_page(to_html(history_page(records)), folder / f"{name}.html")
    return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        blank = tmp_path_factory.mktemp("blank") / "blank.html"
        blank.write_text("<!doctype html><title>blank</title>")
        opened.open(blank)
        yield opened


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_and_logs_nothing(chromium: Browser, pages: dict[str, Path], name: str) -> None:
    chromium.log("performance"), chromium.log("browser")
    chromium.look(1200)
    chromium.open(pages[name])
    assert chromium.log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert pages[name].as_uri() in asked
    assert [url for url in asked if not url.startswith("data:") and url != pages[name].as_uri()] == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [320, 390, 800, 1200, 1900])
def test_nothing_overflows(chromium: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    chromium.look(width)
    chromium.open(pages[name])
    assert chromium.run("return innerWidth") == width
    assert chromium.run(WIDE) == [0, []]


def test_an_overflow_would_be_noticed(chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "wide.html"
    page.write_text('<!doctype html><meta name="viewport" content="width=device-width"><p style="width:500px">x</p>')
    chromium.look(390)
    chromium.open(page)
    assert chromium.run(WIDE)[0] > 0


@pytest.mark.parametrize("name", PAGES)
def test_pictures_have_names_and_links_lead_somewhere(chromium: Browser, pages: dict[str, Path], name: str) -> None:
    chromium.look(1200)
    chromium.open(pages[name])
    assert chromium.run("return document.querySelectorAll('svg').length") >= 3
    assert chromium.run("return document.querySelectorAll('a').length") >= 5
    assert chromium.run(NAMELESS) == []
    assert chromium.run(LOST) == []


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_enough_contrast(chromium: Browser, pages: dict[str, Path], dark: bool) -> None:
    chromium.look(1200, dark=dark)
    chromium.open(pages["few"])
    paper = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(251, 251, 249)")
    worst = chromium.run(CONTRAST)
    assert {"P", "TD", "A", "text"} <= set(worst)
    assert min(worst.values()) >= 4.5, worst


def test_it_prints_black_on_white_even_in_the_dark(chromium: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    chromium.look(1200, dark=True, media="print")
    chromium.open(pages["few"])
    assert chromium.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    chromium.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    if shutil.which("pdftotext"):
        done = subprocess.run(["pdftotext", tmp_path / "page.pdf", "-"], capture_output=True, text=True, check=True)
        assert "How it was computed" in done.stdout
