"""Spectral densities: of the whole model in wide pictures, of blocks in small ones, each the latest over the first."""

from __future__ import annotations

import numpy as np

from disthess.audits.record import WHOLE
from disthess.pictures.drawings import Curve, Words, density_drawing
from disthess.reports.numerals import count, number
from disthess.reports.ordering import Ordered
from disthess.reports.page import Cell, Column, Picture, Pictures, Section, Table, Text
from disthess.reports.run_tables import density_picture, moments

_SMALL = (340, 260)
_MOST_DRAWN = 24
_MOST_ROWS = 500


def density_section(found: Ordered) -> Section | None:
    """The latest density, and that of the first audit on the same data under it."""
    curves = _curves(found, WHOLE)
    if not curves:
        return None
    text = _said(curves)
    caption = f"{text}. Bands are two standard errors."
    title = "Spectral density, latest audit and first on the same data" if len(curves) > 1 else "Spectral density"
    picture = density_picture("density", title, f"{text}.", curves, np.zeros(0), caption)
    return Section("density", "Spectral density", (Pictures((picture,)),))


def block_density_section(found: Ordered) -> Section | None:
    """The same of each block, and how each was made."""
    made = [(one, curves) for one in found.latest.densities if (curves := _curves(found, one.block))]
    if not made:
        return None
    drawn = []
    for at, (one, curves) in enumerate(made[:_MOST_DRAWN], 1):
        words = Words(f"block-density-{at}", f"Spectral density of block {one.block}", f"{_said(curves)}.")
        drawn.append(Picture(density_drawing(words, curves, np.zeros(0), _SMALL), words.description, title=one.block))
    rows = []
    for one, (latest, *_) in made[:_MOST_ROWS]:
        seed = "–" if one.seed is None else str(one.seed)
        mean, spread = moments(latest.grid, latest.density)
        rows.append(
            (
                Cell(one.block),
                Cell(number(mean), mean),
                Cell(number(spread), spread),
                Cell(number(error := float(np.trapezoid(latest.error, latest.grid)), 2), error),
                Cell(count(one.products), float(one.products)),
                Cell(seed),
                Cell(one.how),
            )
        )
    columns = (
        *(Column("block", False), Column("mean"), Column("standard deviation"), Column("error, integrated")),
        *(Column("products"), Column("seed"), Column("how", False)),
    )
    more = f"{len(made) - _MOST_DRAWN:,} more are in the history. " if len(made) > _MOST_DRAWN else ""
    about = (
        f"Of the part of H within each block, the latest audit over the first on the same data. Bands are two standard errors. "
        f"{more}The integrated error is about what other random vectors would change."
    )
    rest = f"{len(made) - _MOST_ROWS:,} more blocks are left out." if len(made) > _MOST_ROWS else ""
    caption = f"How the densities of blocks were made ({count(len(made))})"
    table = Table("block-density-table", caption, columns, tuple(rows), rest, len(rows) > 16)
    return Section(
        "block-densities", "Spectral density of blocks", (Text(about), Pictures(tuple(drawn), beside=True), table)
    )


def _curves(found: Ordered, block: str) -> list[Curve]:
    """The latest, and the first on the same data where it has one; none without the latest."""
    last = len(found.records) - 1
    at = [(last, "latest"), *([] if found.baseline is None else [(found.baseline, "first")])]
    curves = [_curve(found, index, word, block) for index, word in at]
    return [] if curves[0] is None else [curve for curve in curves if curve is not None]


def _curve(found: Ordered, index: int, word: str, block: str) -> Curve | None:
    curve = found.records[index].density(block)
    if curve is None:
        return None
    return Curve(f"{word}, {found.label(index)}", curve.grid, curve.value, np.nan_to_num(curve.error))


def _said(curves: list[Curve]) -> str:
    says = []
    for curve in curves:
        mean, spread = moments(curve.grid, curve.density)
        says.append(
            f"{curve.label}: from {number(float(curve.grid[0]), 3)} to {number(float(curve.grid[-1]), 3)}, mean {number(mean, 3)}, "
            f"standard deviation {number(spread, 3)}"
        )
    return "; ".join(says)
