"""Pictures of a spectrum and of block norms, as PNG (or whatever the file's ending says).

Drawn on figures of their own, not through pyplot: no window, no state shared with the caller's plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

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
    from matplotlib.colors import LogNorm

    shown, labels = _shrunk(np.asarray(norms, dtype=float), list(names))
    positive = shown[np.isfinite(shown) & (shown > 0)]
    side = min(14.0, 4.0 + 0.35 * len(labels))
    figure = _figure(side + 1.5, side)
    axes = figure.add_subplot()
    masked = np.ma.masked_where(~(shown > 0), shown)
    if positive.size:
        bottom = max(float(positive.min()), float(positive.max()) * 1e-8)
        scale = LogNorm(bottom, max(float(positive.max()), bottom * 1.001))
        image = axes.imshow(masked, norm=scale, cmap="viridis")
        figure.colorbar(image, ax=axes, label="Frobenius norm of the block")
    else:
        axes.imshow(np.zeros_like(shown), cmap="Greys")
    if len(labels) <= _MOST_LABELS:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    else:
        axes.set_xlabel("parameter, in the model's order")
        axes.set_ylabel("parameter, in the model's order")
    axes.set_title(f"Blocks of the {title}")
    figure.savefig(path)


def _shrunk(norms: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """At most 512 x 512 cells: beyond that, neighbours share a cell, which shows the norm of all of them together."""
    step = -(-len(names) // _MOST_CELLS)
    if step == 1:
        return norms, names
    starts = np.arange(0, len(names), step)
    squares = np.add.reduceat(np.add.reduceat(norms**2, starts, axis=0), starts, axis=1)
    return np.sqrt(squares), names[::step]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    options: dict[str, Any] = {"layout": "constrained", "dpi": 150}
    return Figure(figsize=(width, height), **options)
