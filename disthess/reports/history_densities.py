"""The spectral density, the latest beside the first."""

from __future__ import annotations

import numpy as np

from disthess.audits.record import AuditRecord
from disthess.pictures.drawings import Curve
from disthess.reports.numerals import number
from disthess.reports.ordering import Ordered
from disthess.reports.page import Pictures, Section
from disthess.reports.run_tables import density_picture, moments


def density_section(found: Ordered) -> Section | None:
    """The latest density, and that of the first audit on the same data under it."""
    latest = _density(found.latest, f"latest, {found.label(len(found.records) - 1)}")
    if latest is None:
        return None
    curves = [latest]
    if found.baseline is not None:
        first = _density(found.records[found.baseline], f"first, {found.label(found.baseline)}")
        curves += [] if first is None else [first]
    says = []
    for curve in curves:
        mean, spread = moments(curve.grid, curve.density)
        says.append(
            f"{curve.label}: from {number(float(curve.grid[0]), 3)} to {number(float(curve.grid[-1]), 3)}, mean {number(mean, 3)}, "
            f"standard deviation {number(spread, 3)}"
        )
    text = "; ".join(says)
    caption = f"{text}. Bands are two standard errors."
    title = "Spectral density, latest audit and first on the same data" if len(curves) > 1 else "Spectral density"
    picture = density_picture("density", title, f"{text}.", curves, np.zeros(0), caption)
    return Section("density", "Spectral density", (Pictures((picture,)),))


def _density(record: AuditRecord, label: str) -> Curve | None:
    arrays = record.arrays
    if not {"density/grid", "density/value"} <= set(arrays):
        return None
    grid, value = np.asarray(arrays["density/grid"]), np.asarray(arrays["density/value"])
    if not len(grid) or not np.isfinite(value).all() or not np.isfinite(grid).all():
        return None
    error = np.asarray(arrays["density/error"]) if "density/error" in arrays else np.zeros_like(value)
    return Curve(label, grid, value, np.nan_to_num(error))
