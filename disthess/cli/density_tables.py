"""What ``audit history --metric density`` prints, writes and draws: the curves of the last audit that has any."""

from __future__ import annotations

import csv as csv_files
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer

from disthess.audits.metrics import METRICS
from disthess.audits.record import WHOLE, AuditRecord, BlockDensity, DensityCurve
from disthess.cli.tables import draw, save_text, show, table
from disthess.errors import ConfigError
from disthess.linalg.summary import DENSITY

_DRAWN = 24


def is_density(metric: Sequence[str] | None) -> bool:
    """Whether the curves are asked for; they are no numbers to be listed beside others.

    Raises:
        ConfigError: They are, beside others.
    """
    if DENSITY not in (metric or ()):
        return False
    if list(metric or ()) != [DENSITY]:
        raise ConfigError(
            f"--metric {DENSITY} is a curve and is shown by itself. Ask for numbers in another call: {', '.join(METRICS)}."
        )
    return True


def print_densities(records: Sequence[AuditRecord], block: str, csv: Path | None, plot: Path | None) -> None:
    """The densities of the last audit that has them, of one block alone where it is named.

    Raises:
        ConfigError: No audit has any.
    """
    record, curves = _last(records, block)
    where = "" if record.step is None else f", step {record.step:,}"
    title = f"spectral densities of {record.checkpoint}{where}"
    columns = ("from", "to", "mean", "standard deviation", "error", "products", "seed", "how")
    shown = table(title, "block", *columns, left=1)
    shown.columns[-1].justify = "left"
    made = {one.block: one for one in record.densities}
    for name, curve in curves.items():
        shown.add_row(name or "(all)", *_numbers(curve), *_ways(made.get(name)))
    show(shown)
    if csv is not None:
        save_text(csv, densities_csv(record, curves))
    if plot is not None:
        from disthess.pictures import files as pictures

        some = [(name or "all parameters", c.grid, c.value, c.error) for name, c in list(curves.items())[:_DRAWN]]
        draw(pictures.densities_picture, plot, title, some)
        if len(some) < len(curves):
            typer.echo(f"drawn: the first {len(some)} of {len(curves)}; --block draws another")
    for file in (csv, plot):
        if file is not None:
            typer.echo(f"saved: {file}")


def densities_csv(record: AuditRecord, curves: dict[str, DensityCurve]) -> str:
    """A header and one line per point of every curve."""
    out = io.StringIO()
    writer = csv_files.writer(out, lineterminator="\n")
    writer.writerow(["step", "checkpoint", "block", "eigenvalue", "density", "error"])
    step = "" if record.step is None else record.step
    for name, curve in curves.items():
        for point in zip(curve.grid, curve.value, curve.error, strict=True):
            writer.writerow([step, record.checkpoint, name, *map(float, point)])
    return out.getvalue()


def _last(records: Sequence[AuditRecord], block: str) -> tuple[AuditRecord, dict[str, DensityCurve]]:
    for record in reversed(records):
        names = [block] if block else [WHOLE, *(one.block for one in record.densities)]
        curves = {name: curve for name in names if (curve := record.density(name)) is not None}
        if curves:
            return record, curves
    of = f" of the block {block!r}" if block else ""
    key = "measure.block_metrics" if block else "measure.metrics or, for blocks, measure.block_metrics"
    raise ConfigError(f"no audit of the history has a spectral density{of}. Name density in {key} and audit again.")


def _numbers(curve: DensityCurve) -> list[str]:
    numbers = (float(curve.grid[0]), float(curve.grid[-1]), curve.mean, curve.deviation)
    return [*(f"{number:.4g}" for number in numbers), f"{np.trapezoid(curve.error, curve.grid):.2g}"]


def _ways(made: BlockDensity | None) -> list[str]:
    if made is None:
        return ["", "", ""]
    return [f"{made.products:,}", "" if made.seed is None else str(made.seed), made.how]
