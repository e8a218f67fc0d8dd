"""Drawings as SVG inside a page: they take their colours from the page, so that they are legible in the light and in the dark.

Matplotlib is told colours that nothing else has, one per role; the text that it writes then gets the page's variables in their
place. The same numbers give the same text, byte for byte.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#010203", "#010204", "#010205"
FIRST, SECOND, ALERT = "#010206", "#010207", "#010208"
_ROLES = {INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second", ALERT: "alert"}

_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 12.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 12.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 12.0,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 11.0,
    "ytick.labelsize": 11.0,
    "path.simplify": True,
}


@contextmanager
def page_style() -> Iterator[None]:
    """Matplotlib's own defaults and ours on top, whatever the user's settings are; put back afterwards."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context():
        # A name may hold letters that the font for measuring lacks: the reader's browser has its own.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        matplotlib.rcdefaults()
        for name, value in _STYLE.items():
            matplotlib.rcParams[name] = value  # type: ignore[index]
        yield


def new_figure(width: int, height: int, layout: str | None = "constrained") -> Figure:
    """A figure whose units are the page's pixels."""
    from matplotlib.figure import Figure

    options: dict[str, Any] = {"layout": layout, "dpi": 72}
    return Figure(figsize=(width / 72, height / 72), **options)


def plain_text(text: str) -> str:
    r"""Text that Matplotlib shows as it is: no formulas between dollar signs, nothing that SVG cannot hold.

    >>> plain_text("a$b$")
    'a\\$b\\$'
    """
    return _UNWRITABLE.sub("\ufffd", text).replace("$", r"\$")


def svg_text(figure: Figure, name: str, title: str, description: str, size: tuple[int, int]) -> str:
    """The figure as an ``svg`` element for a page, with a name and a description for those who do not see it.

    Args:
        figure: Made inside `page_style`.
        name: Of the picture on its page, letters, digits and dashes; what it defines is named after it.
        title: What it is.
        description: What is to be seen on it, with numbers.
        size: Width and height in the page's pixels.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = _in_page(body, name)
    body = re.sub(r"\n\s*", "\n", body).strip()
    width, height = size
    return (
        f'<svg class="drawing" role="img" aria-labelledby="{name}-title {name}-desc" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">\n<title id="{name}-title">{html.escape(title)}</title>\n'
        f'<desc id="{name}-desc">{html.escape(description)}</desc>\n{body}\n</svg>'
    )


def _in_page(body: str, name: str) -> str:
    """Names made the picture's own, those that nothing refers to left out; colours and fonts of the page; short numbers.

    Only tags are touched: what is written in the picture stays as it is.
    """
    used = set(re.findall(r"url\(#([^)]+)\)", body)) | set(re.findall(r'href="#([^"]+)"', body))

    def rename(found: re.Match[str]) -> str:
        return f' id="{name}-{found[1]}"' if found[1] in used else ""

    def shorter(found: re.Match[str]) -> str:
        return re.sub(r"(\d\.\d\d)\d+", r"\1", found[0])

    def tag(found: re.Match[str]) -> str:
        text = re.sub(r'\s+id="([^"]*)"', rename, found[0])
        text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
        for colour, role in _ROLES.items():
            text = text.replace(f": {colour}", f": var(--{role})")
        text = re.sub(r"(font: (?:\d+ )?[\d.]+px) [^;\"]*", r"\1 var(--sans)", text)
        text = re.sub(r"(;base64,)([^\"]*)", lambda data: data[1] + re.sub(r"\s+", "", data[2]), text)
        return re.sub(r' d="[^"]*"', shorter, text)

    return re.sub(r"<[^<>]*>", tag, body)
