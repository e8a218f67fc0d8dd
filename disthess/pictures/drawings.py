"""What a report draws: densities, courses over training, and heat maps of pairs of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from disthess.pictures.vector import ALERT, FIRST, GRID, MUTED, SECOND, new_figure, page_style, plain_text, svg_text

MOST_LABELS = 48
"""Blocks that a heat map names; beyond that it says their order."""

MOST_CELLS = 400
"""Cells of a side of a heat map; beyond that neighbours share one, which shows the largest of them."""

LOGARITHMIC_FROM = 30.0
"""A course whose largest value is so many times its smallest gets a logarithmic axis."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class Curve:
    """A spectral density.

    Attributes:
        label: Whose.
        grid: ``[G]``.
        density: ``[G]``.
        error: One standard error, ``[G]``.
    """

    label: str
    grid: np.ndarray
    density: np.ndarray
    error: np.ndarray


@dataclass(frozen=True, slots=True)
class Course:
    """One number over training.

    Attributes:
        label: What it is.
        places: Steps, or days since 1970, or numbers of audits, ``[n]`` ascending.
        values: ``[n]``; NaN where it was not measured.
        low: Lower ends of intervals, ``[n]``.
        high: Upper ends.
        alerts: Indices into these at which a rule was broken.
        axis: What ``places`` are; ``date`` for days.
    """

    label: str
    places: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    alerts: tuple[int, ...]
    axis: str


@dataclass(frozen=True, slots=True)
class Words:
    """How a picture is called.

    Attributes:
        name: On its page: letters, digits and dashes.
        title: What it is.
        description: What is to be seen, with numbers.
    """

    name: str
    title: str
    description: str


def density_drawing(words: Words, curves: Sequence[Curve], eigenvalues: np.ndarray, size: tuple[int, int]) -> str:
    """Densities on a logarithmic axis with bands of two standard errors, and single eigenvalues as ticks below.

    Args:
        words: Name and description.
        curves: One or two; the first is drawn over the second.
        eigenvalues: Ticks, ``[k]``; may be empty.
        size: Width and height in pixels.
    """
    with page_style():
        figure = new_figure(*size)
        axes = figure.add_subplot()
        top = max((float(np.max(curve.density)) for curve in curves), default=1.0)
        # Most of the range of a Hessian's spectrum is nearly empty: a logarithmic axis needs a floor.
        floor = max(top * 1e-6, float(np.finfo(float).tiny) * 1e6)
        for curve, colour in reversed(list(zip(curves, (FIRST, SECOND), strict=False))):
            low, high = (np.maximum(curve.density + side * 2 * curve.error, floor) for side in (-1, 1))
            axes.fill_between(curve.grid, low, high, color=colour, alpha=0.22, linewidth=0)
            axes.plot(curve.grid, np.maximum(curve.density, floor), color=colour, label=plain_text(curve.label))
        axes.set_yscale("log")
        axes.set_ylim(floor, top * 3)
        if len(eigenvalues):
            axes.plot(
                eigenvalues, np.full(len(eigenvalues), floor), linestyle="none", marker="|", markersize=14,
                markeredgewidth=1.4, color=SECOND if len(curves) < 2 else MUTED, label="extreme eigenvalues", clip_on=False,
            )  # fmt: skip
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("density")
        axes.grid(True, axis="y")
        axes.yaxis.set_major_formatter(_power)
        axes.yaxis.set_minor_formatter(_nothing)
        figure.legend(loc="outside upper left", ncols=1 if size[0] < 500 else 3)
        return svg_text(figure, words.name, words.title, words.description, size)


def course_drawing(words: Words, course: Course, size: tuple[int, int]) -> str:
    """One number over training: a line, its interval as a band, and a mark where a rule was broken.

    Args:
        words: Name and description.
        course: What is drawn.
        size: Width and height in pixels.
    """
    with page_style():
        figure = new_figure(*size, layout=None)
        axes = figure.add_axes((70 / size[0], 48 / size[1], 1 - 84 / size[0], 1 - 62 / size[1]))
        scale = _scale_of(course.values)
        if scale == "symlog":
            axes.set_yscale("symlog", linthresh=float(np.min(np.abs(course.values[np.isfinite(course.values)]))))
        else:
            axes.set_yscale(scale)
        low, high = _drawable(course, scale)
        few = len(course.places) <= 60
        if len(course.places) == 1:
            axes.vlines(course.places, low, high, color=FIRST, alpha=0.5, linewidth=5)
        else:
            axes.fill_between(course.places, low, high, color=FIRST, alpha=0.22, linewidth=0)
        axes.plot(
            course.places, course.values, color=FIRST, marker="o" if few else "", markersize=4 if few else 0,
        )  # fmt: skip
        marked = list(course.alerts)
        axes.plot(
            course.places[marked], course.values[marked], linestyle="none", marker="D", markersize=7 if few else 4,
            markerfacecolor="none" if few else ALERT, markeredgecolor=ALERT, markeredgewidth=1.6, zorder=4,
        )  # fmt: skip
        _set_limits(axes, course, scale, low, high)
        _name_places(axes, course)
        axes.grid(True, axis="y")
        return svg_text(figure, words.name, words.title, words.description, size)


def map_drawing(words: Words, names: Sequence[str], values: np.ndarray, label: str, logarithmic: bool) -> str:
    """One number per pair of blocks as a heat map, named along both sides while there are few enough.

    Args:
        words: Name and description.
        names: n of them, short.
        values: ``[n, n]``; what is not finite (and, on a logarithmic scale, not positive) is left empty.
        label: What the numbers are.
        logarithmic: Whether colours follow the logarithm.
    """
    shown = _coarser(np.asarray(values, dtype=float))
    named = len(names) <= MOST_LABELS and len(shown) == len(names)
    cell = min(44.0, max(15.0, 320 / max(1, len(names)))) if named else 0.0
    room = min(240.0, 6.6 * max(map(len, names), default=1) + 22) if named else 56.0
    side = cell * len(names) if named else 344.0
    size = (round(room + side + 92), round(room + side + 16))
    with page_style():
        figure = new_figure(*size, layout=None)
        axes = figure.add_axes((room / size[0], room / size[1], side / size[0], side / size[1]))
        _fill_map(figure, axes, shown, label, logarithmic, (room, (side, side), size, room))
        if named:
            axes.set_xticks(range(len(names)), [plain_text(name) for name in names], rotation=90)
            axes.set_yticks(range(len(names)), [plain_text(name) for name in names])
        else:
            axes.set_xlabel("blocks, in the model's order")
            axes.set_ylabel("blocks, in the model's order")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(True)
            spine.set_color(GRID)
        return svg_text(figure, words.name, words.title, words.description, size)


def tile_drawing(words: Words, values: np.ndarray) -> str:
    """The entries of one block, colours by sign and size.

    Args:
        words: Name and description.
        values: ``[r, c]``; a large one is shown by the entry of largest size among neighbours.
    """
    shown = _coarser_signed(values)
    scale = 300 / max(shown.shape)
    inner = (max(24.0, shown.shape[1] * scale), max(24.0, shown.shape[0] * scale))
    size = (round(56 + inner[0] + 100), round(40 + inner[1] + 16))
    with page_style():
        figure = new_figure(*size, layout=None)
        axes = figure.add_axes((56 / size[0], 40 / size[1], inner[0] / size[0], inner[1] / size[1]))
        _fill_map(figure, axes, shown, "entry", False, (56, inner, size, 40), (values.shape[1], values.shape[0]))
        axes.set_xlabel("column")
        axes.set_ylabel("row")
        return svg_text(figure, words.name, words.title, words.description, size)


def _fill_map(
    figure: Any,
    axes: Any,
    shown: np.ndarray,
    label: str,
    logarithmic: bool,
    places: tuple[float, tuple[float, float], tuple[int, int], float],
    reach: tuple[int, int] | None = None,
) -> None:
    """The cells, and their colours beside them; ``places``: left, inner size, outer size and bottom in pixels."""
    from matplotlib.colors import LogNorm, Normalize

    drawn = np.isfinite(shown) & ((shown > 0) | (not logarithmic))
    if not drawn.any():
        axes.set_xlim(-0.5, len(shown) - 0.5)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.text(0.5, 0.5, "nothing to draw", transform=axes.transAxes, ha="center", va="center")
        return
    top, bottom = float(shown[drawn].max()), float(shown[drawn].min())
    if logarithmic:
        low = max(bottom, top * 1e-6)
        ends = (low, max(top, low * 1.001))
    else:
        ends = (-max(top, -bottom), max(top, -bottom)) if bottom < 0 else (0.0, top or 1.0)
    scale = LogNorm(*ends) if logarithmic else Normalize(*ends)
    colours = "RdBu_r" if ends[0] < 0 else "viridis"
    extent = None if reach is None else (-0.5, reach[0] - 0.5, reach[1] - 0.5, -0.5)
    image = axes.imshow(
        np.ma.masked_where(~drawn, shown), norm=scale, cmap=colours, interpolation="none", aspect="auto", extent=extent
    )
    left, inner, size, bottom_room = places
    beside = figure.add_axes(
        ((left + inner[0] + 14) / size[0], bottom_room / size[1], 14 / size[0], inner[1] / size[1])
    )
    bar = figure.colorbar(image, cax=beside)
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=11)
    if logarithmic:
        bar.set_ticks(np.geomspace(*ends, 5).tolist())
        beside.yaxis.set_major_formatter(_three)
        beside.minorticks_off()


def _coarser(values: np.ndarray) -> np.ndarray:
    step = -(-len(values) // MOST_CELLS)
    if step == 1:
        return values
    starts = np.arange(0, len(values), step)
    filled = np.where(np.isfinite(values), values, -np.inf)
    largest = np.maximum.reduceat(np.maximum.reduceat(filled, starts, axis=0), starts, axis=1)
    return np.where(np.isfinite(largest), largest, np.nan)


def _coarser_signed(values: np.ndarray) -> np.ndarray:
    """At most so many cells along each side, each showing the entry of largest size in it."""
    found = np.asarray(values, dtype=float)
    for axis in (0, 1):
        step = -(-found.shape[axis] // MOST_CELLS)
        starts = np.arange(0, found.shape[axis], step)
        high, low = np.maximum.reduceat(found, starts, axis=axis), np.minimum.reduceat(found, starts, axis=axis)
        found = np.where(high >= -low, high, low)
    return found


def _scale_of(values: np.ndarray) -> str:
    finite = np.abs(values[np.isfinite(values)])
    signs = set(np.sign(values[np.isfinite(values)]).tolist())
    if not len(finite) or len(signs) > 1 or 0.0 in signs or finite.max() < LOGARITHMIC_FROM * finite.min():
        return "linear"
    return "log" if signs == {1.0} else "symlog"


def _drawable(course: Course, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Ends of intervals that can be drawn: those that are not defined, or not positive on a logarithmic axis, at the value."""
    low = np.where(np.isfinite(course.low), course.low, course.values)
    high = np.where(np.isfinite(course.high), course.high, course.values)
    if scale == "log":
        least = np.nanmin(course.values) / 10
        low = np.maximum(low, least)
    return low, high


def _set_limits(axes: Any, course: Course, scale: str, low: np.ndarray, high: np.ndarray) -> None:
    """Room for the line itself; an interval much wider than all of it is cut off."""
    finite = course.values[np.isfinite(course.values)]
    if not len(finite):
        axes.set_yticks([])
        return
    if scale != "linear":
        return
    bottom, top = float(finite.min()), float(finite.max())
    reach = max(top - bottom, 1e-3 * max(abs(top), abs(bottom)), 1e-300)
    ends = (max(float(np.nanmin(low)), bottom - 2 * reach), min(float(np.nanmax(high)), top + 2 * reach))
    if len(finite) == 1:
        ends = (float(np.nanmin(low)), float(np.nanmax(high)))
        reach = max(ends[1] - ends[0], 1e-3 * abs(top), 1e-12)
    margin = 0.08 * max(ends[1] - ends[0], reach)
    axes.set_ylim(ends[0] - margin, ends[1] + margin)


def _name_places(axes: Any, course: Course) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, ScalarFormatter

    axes.set_xlabel(course.axis)
    if len(course.places) == 1:
        axes.set_xlim(course.places[0] - 1, course.places[0] + 1)
    if course.axis == "date":
        locator = AutoDateLocator(minticks=2, maxticks=4)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(4))
        formatter = ScalarFormatter(useOffset=False, useMathText=False)
        formatter.set_powerlimits((-3, 5))
        axes.yaxis.set_major_formatter(formatter)
    elif axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 60 * low else (1,), numticks=5))
        axes.yaxis.set_major_formatter(_power)
        axes.yaxis.set_minor_formatter(_nothing)
    else:
        axes.yaxis.set_major_formatter(_power)


def _thousands(value: float, _place: object = None) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def _power(value: float, _place: object = None) -> str:
    """A power of ten as people write it.

    >>> _power(1e-3), _power(-100.0), _power(20.0)
    ('10⁻³', '−10²', '20')
    """
    if value == 0:
        return "0"
    exponent = round(math.log10(abs(value)))
    if not math.isclose(abs(value), 10.0**exponent, rel_tol=1e-9):
        return f"{value:g}"
    return f"{'−' if value < 0 else ''}10{str(exponent).translate(_SUPERSCRIPTS)}"


def _three(value: float, _place: object = None) -> str:
    """Two digits, and a power of ten where that is shorter.

    >>> _three(0.123), _three(1.5e-7), _three(20000.0)
    ('0.12', '1.5·10⁻⁷', '2·10⁴')
    """
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    if -3 < int(exponent) < 4:
        return f"{value:.2g}" if int(exponent) < 2 else f"{value:.0f}"
    return f"{mantissa.removesuffix('.0')}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def _nothing(_value: float, _place: object = None) -> str:
    return ""
