"""Pictures of a spectrum and of block norms, as PNG (or whatever the file's ending says).

Drawn on figures of their own, not through pyplot: no window, no state shared with the caller's plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from disthess.pictures.vector import plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 40
_MOST_CELLS = 512


class Density(Protocol):
    """A spectral density on a grid."""

    grid: np.ndarray
    density: np.ndarray
    standard_error: np.ndarray


class Eigenvalues(Protocol):
    """Eigenvalues with the residual of each."""

    values: np.ndarray
    residuals: np.ndarray


def spectrum_picture(path: Path, density: Density | None, pairs: Eigenvalues | None, title: str = "Hessian") -> None:
    """Draw the density of all eigenvalues and the extreme eigenvalues.

    Args:
        path: The file to write.
        density: Grid ``[G]``, density and its standard error over probes (shaded, two of them), or None.
        pairs: Extreme eigenvalues, drawn as ticks, or None.
        title: Whose spectrum it is.
    """
    figure = _figure(9.0, 5.0)
    axes = figure.add_subplot()
    floor = 0.0
    if density is not None:
        grid, height = np.asarray(density.grid), np.asarray(density.density)
        error = np.broadcast_to(np.asarray(density.standard_error), height.shape)
        # A logarithmic axis needs a floor: most of the range of a Hessian's spectrum is nearly empty.
        floor = max(float(height.max()) * 1e-6, np.finfo(float).tiny)
        axes.fill_between(
            grid,
            np.maximum(height - 2 * error, floor),
            np.maximum(height + 2 * error, floor),
            color="tab:blue",
            alpha=0.25,
        )
        axes.plot(grid, np.maximum(height, floor), color="tab:blue", label="density (shaded: two standard errors)")
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
        axes.set_ylabel("density of eigenvalues (integrates to 1)")
    if pairs is not None and len(pairs.values):
        values = np.asarray(pairs.values)
        axes.plot(
            values,
            np.full(values.shape, floor),
            linestyle="none",
            marker="|",
            markersize=18,
            color="tab:red",
            label=f"{len(values)} extreme eigenvalues, {values.min():.3g} to {values.max():.3g}",
            clip_on=False,
        )
    if density is None:
        axes.set_yticks([])
    axes.set_xlabel("eigenvalue")
    axes.set_title(f"Spectrum of the {title}")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path)


def block_picture(path: Path, names: Sequence[str], norms: np.ndarray, title: str = "Hessian") -> None:
    """Draw the Frobenius norm of every block as a heat map with a logarithmic colour scale.

    Args:
        path: The file to write.
        names: Parameter names, n of them.
        norms: ``[n, n]``, non-negative; zeros are left white.
        title: Whose blocks they are.
    """
    matrix_picture(path, names, norms, f"Blocks of the {title}", "Frobenius norm of the block", True)


def matrix_picture(
    path: Path, names: Sequence[str], values: np.ndarray, title: str, label: str, logarithmic: bool
) -> None:
    """Draw one number per pair of names as a heat map.

    Args:
        path: The file to write.
        names: n of them.
        values: ``[n, n]``; what is not finite (and, on a logarithmic scale, not positive) is left white.
        title: Above it.
        label: What the numbers are.
        logarithmic: Whether colours follow the logarithm.
    """
    shown, labels = _shrunk(np.asarray(values, dtype=float), list(names))
    side = min(14.0, 4.0 + 0.35 * len(labels))
    figure = _figure(side + 1.5, side)
    axes = figure.add_subplot()
    drawn = np.isfinite(shown) & ((shown > 0) | (not logarithmic))
    if drawn.any():
        scale, colours = _scale(shown[drawn], logarithmic)
        image = axes.imshow(np.ma.masked_where(~drawn, shown), norm=scale, cmap=colours)
        figure.colorbar(image, ax=axes, label=label)
    else:
        axes.imshow(np.zeros_like(shown), cmap="Greys")
    if len(labels) <= _MOST_LABELS:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    else:
        axes.set_xlabel("in the model's order")
        axes.set_ylabel("in the model's order")
    axes.set_title(title)
    figure.savefig(path)


def bar_picture(path: Path, names: Sequence[str], values: Sequence[float], title: str, label: str) -> None:
    """Draw one number per name as horizontal bars, the first on top.

    Args:
        path: The file to write.
        names: n of them.
        values: Of any sign.
        title: Above it.
        label: What the numbers are.
    """
    figure = _figure(9.0, 1.5 + 0.28 * max(1, len(names)))
    axes = figure.add_subplot()
    places = range(len(names))
    axes.barh(places, values, color=["tab:blue" if value >= 0 else "tab:red" for value in values])
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    axes.set_title(title)
    figure.savefig(path)


def trade_picture(
    path: Path, names: Sequence[str], sizes: Sequence[float], errors: Sequence[float], title: str
) -> None:
    """Draw errors over bytes, one labelled point per name, both logarithmic.

    Args:
        path: The file to write.
        names: n of them.
        sizes: Bytes, positive.
        errors: Relative errors; those of 0 are drawn at the bottom.
        title: Above it.
    """
    figure = _figure(9.0, 6.0)
    axes = figure.add_subplot()
    positive = [error for error in errors if error > 0]
    floor = min(positive, default=1.0) / 3
    shown = [max(error, floor) for error in errors]
    axes.scatter(sizes, shown, color="tab:blue", zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.18, y=0.12)
    axes.grid(True, which="major", alpha=0.3)
    axes.set_xlabel("bytes")
    axes.set_ylabel("relative error in Frobenius norm")
    axes.set_title(title)
    texts = [name if error > 0 else f"{name} (0)" for name, error in zip(names, errors, strict=True)]
    _label(axes, texts, sizes, shown)
    figure.savefig(path)


def history_picture(
    path: Path,
    title: str,
    names: Sequence[str],
    curves: Sequence[Sequence[tuple[float, float, float, float]]],
    label: str,
) -> None:
    """Draw numbers over the steps of a training, one above the other, intervals shaded.

    Args:
        path: The file to write.
        title: Above all.
        names: n of them.
        curves: Of each name (place, value, low, high) in order of place; what is not finite is left out.
        label: What places are.
    """
    figure = _figure(9.0, 1.0 + 2.2 * max(1, len(names)))
    for index, (name, points) in enumerate(zip(names, curves, strict=True)):
        axes = figure.add_subplot(max(1, len(names)), 1, index + 1)
        place, value, low, high = np.array(points, dtype=float).reshape(-1, 4).T
        known = np.isfinite(value)
        axes.plot(place[known], value[known], color="tab:blue", marker="o", markersize=3)
        known &= np.isfinite(low) & np.isfinite(high)
        axes.fill_between(place[known], low[known], high[known], color="tab:blue", alpha=0.25)
        axes.set_ylabel(name)
        axes.grid(True, alpha=0.3)
        if index == 0:
            axes.set_title(title)
        if index == len(names) - 1:
            axes.set_xlabel(label)
    figure.savefig(path)


def densities_picture(path: Path, title: str, curves: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Draw spectral densities in small pictures, side by side, two standard errors shaded.

    Args:
        path: The file to write.
        title: Above all.
        curves: Name, grid, density and standard error of each.
    """
    wide = min(3, max(1, len(curves)))
    high = -(-max(1, len(curves)) // wide)
    figure = _figure(4.0 * wide, 0.6 + 2.6 * high)
    figure.suptitle(plain_text(title))
    for index, (name, grid, value, error) in enumerate(curves):
        axes = figure.add_subplot(high, wide, index + 1)
        floor = max(float(value.max()) * 1e-6, np.finfo(float).tiny)
        low, high_end = (np.maximum(value + side * 2 * np.nan_to_num(error), floor) for side in (-1, 1))
        axes.fill_between(grid, low, high_end, color="tab:blue", alpha=0.25)
        axes.plot(grid, np.maximum(value, floor), color="tab:blue")
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
        axes.set_title(plain_text(name), fontsize="small")
    figure.supxlabel("eigenvalue")
    figure.supylabel("density of eigenvalues (integrates to 1)")
    figure.savefig(path)


def _label(axes: Any, texts: Sequence[str], x: Sequence[float], y: Sequence[float]) -> None:
    """Write beside each point, higher where another label is in the way."""
    axes.figure.draw_without_rendering()
    scale = 72.0 / axes.figure.dpi
    places = axes.transData.transform(np.column_stack([x, y])) * scale
    taken: list[tuple[float, float, float]] = []
    for index in np.argsort(places[:, 1], kind="stable"):
        left, bottom = places[index] + (7.0, 3.0)
        right = left + 5.5 * len(texts[index])
        while any(abs(bottom - b) < 11 and left < r and a < right for a, b, r in taken):
            bottom += 2.0
        taken.append((left, bottom, right))
        offset = (7.0, bottom - places[index, 1])
        axes.annotate(texts[index], (x[index], y[index]), xytext=offset, textcoords="offset points", fontsize=9)


def _scale(values: np.ndarray, logarithmic: bool) -> tuple[Any, str]:
    """Colours: one hue for numbers of one sign, two that meet at zero for others."""
    from matplotlib.colors import LogNorm, Normalize

    top, bottom = float(values.max()), float(values.min())
    if logarithmic:
        low = max(bottom, top * 1e-8)
        return LogNorm(low, max(top, low * 1.001)), "viridis"
    if bottom < 0:
        reach = max(top, -bottom)
        return Normalize(-reach, reach), "RdBu_r"
    return Normalize(0.0, top or 1.0), "viridis"


def _shrunk(norms: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """At most 512 x 512 cells: beyond that, neighbours share a cell, which shows the norm of all of them together."""
    step = -(-len(names) // _MOST_CELLS)
    if step == 1:
        return norms, names
    starts = np.arange(0, len(names), step)
    squares = np.add.reduceat(np.add.reduceat(np.nan_to_num(norms) ** 2, starts, axis=0), starts, axis=1)
    return np.sqrt(squares), names[::step]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    options: dict[str, Any] = {"layout": "constrained", "dpi": 150}
    return Figure(figsize=(width, height), **options)
