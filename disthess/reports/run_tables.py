"""Sections of a run's page with tables and pictures: spectrum, blocks, kinks, activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from disthess.pictures.drawings import Curve, Words, density_drawing, map_drawing
from disthess.reduce.hessian_store import HessianStore
from disthess.reports.independence import coupling_of, independence, strongest_pairs
from disthess.reports.names import short_names
from disthess.reports.numerals import cell, count, number, share
from disthess.reports.page import Cell, Column, Picture, Pictures, Section, Table, Text
from disthess.reports.run_findings import RunFindings

WIDE, NARROW = (820, 340), (358, 300)
"""Sizes of the picture of a density."""

_MOST_ROWS = 500
_ABSENT = Cell("–")


def density_picture(
    name: str, title: str, description: str, curves: list[Curve], ticks: np.ndarray, caption: str
) -> Picture:
    """A density for wide and for narrow screens."""
    drawn = [
        density_drawing(Words(f"{name}-{kind}", title, description), curves, ticks, size)
        for kind, size in (("wide", WIDE), ("narrow", NARROW))
    ]
    return Picture(drawn[0], caption, drawn[1])


def moments(grid: np.ndarray, density: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a density."""
    mass = float(np.trapezoid(density, grid))
    if mass <= 0:
        return math.nan, math.nan
    mean = float(np.trapezoid(density * grid, grid)) / mass
    return mean, math.sqrt(max(float(np.trapezoid(density * (grid - mean) ** 2, grid)) / mass, 0.0))


def spectrum_section(found: RunFindings, top: int) -> Section | None:
    """Density and extreme eigenvalues."""
    parts: list[Any] = []
    values = np.sort(found.pairs.values) if found.pairs is not None else np.zeros(0)
    if found.density is not None:
        curve = found.density
        mean, spread = moments(curve.grid, curve.density)
        says = (
            f"Density of all eigenvalues from {number(float(curve.grid[0]), 3)} to {number(float(curve.grid[-1]), 3)}: mean "
            f"{number(mean, 3)}, standard deviation {number(spread, 3)}"
        )
        if len(values):
            says += f"; extreme eigenvalues {number(float(values[0]), 4)} and {number(float(values[-1]), 4)}"
        caption = (
            f"{says}. The band is two standard errors over the random start vectors; {count(curve.products)} products. Lines are "
            f"smoothed with a Gaussian of width {number(curve.width, 2)}."
        )
        own = Curve("density", curve.grid, curve.density, np.broadcast_to(curve.standard_error, curve.density.shape))
        parts.append(Pictures((density_picture("density", "Spectral density", f"{says}.", [own], values, caption),)))
    if found.pairs is not None and len(values):
        order = np.argsort(-found.pairs.values, kind="stable")
        if len(order) > 2 * top:
            order = np.concatenate([order[:top], order[-top:]])
        rows = tuple(
            (
                cell(float(found.pairs.values[at]), 9),
                cell(float(found.pairs.residuals[at]), 2),
                Cell("yes") if found.pairs.converged[at] else Cell("no", tone="bad"),
            )
            for at in order
        )
        parts.append(
            Table(
                "eigenvalues",
                f"Extreme eigenvalues, largest first ({len(rows)})",
                (Column("eigenvalue λ"), Column("residual |Hv − λv|"), Column("converged", False)),
                rows,
                f"By Lanczos with full reorthogonalisation, {count(found.pairs.products)} products. An eigenvalue lies within the "
                "residual of each.",
                len(rows) > 40,
            )
        )
    return Section("spectrum", "Spectrum", tuple(parts)) if parts else None


def block_section(store: HessianStore, found: RunFindings, top: int) -> Section:
    """Parameters, their own blocks, and how they couple."""
    names = [entry.name for entry in store.parameters]
    short = short_names(names)
    norms = coupling = None
    traces: dict[str, float] = {}
    if found.blocks is not None:
        norms = found.blocks.matrix()
        coupling = coupling_of(norms)
        traces = {row.a: row.trace for row in found.blocks.entries if row.a == row.b}
    columns = [Column("parameter", False), Column("shape"), Column("entries"), Column("uses")]
    if norms is not None:
        columns += [Column("norm |H_vv|"), Column("trace"), Column("couples most with", False), Column("C")]
    rows = []
    for at, entry in enumerate(store.parameters[:_MOST_ROWS]):
        also = f"= {', '.join(entry.aliases)}" if entry.aliases else ""
        shape = " × ".join(map(str, entry.shape)) or "1"
        line = [Cell(entry.name, note=also), Cell(shape), Cell(count(entry.numel)), Cell(str(len(entry.uses)))]
        if norms is not None and coupling is not None:
            line += [
                cell(float(norms[at, at])),
                cell(traces.get(entry.name, math.nan)),
                *_partner(at, coupling, names, short),
            ]
        rows.append(tuple(line))
    more = f"{len(names) - _MOST_ROWS:,} more parameters are left out." if len(names) > _MOST_ROWS else ""
    parts: list[Any] = [
        Table("parameters", f"Parameters ({count(len(names))})", tuple(columns), tuple(rows), more, len(rows) > 16)
    ]
    if norms is not None and coupling is not None and len(names) > 1:
        parts = [*_couplings(names, short, norms, coupling, top), *parts]
    return Section("blocks", "Blocks", tuple(parts))


def _partner(at: int, coupling: np.ndarray, names: list[str], short: tuple[str, ...]) -> list[Cell]:
    row = np.where(np.isnan(coupling[at]), -1.0, coupling[at])
    row[at] = -1.0
    other = int(np.argmax(row))
    if row[other] < 0:
        return [_ABSENT, _ABSENT]
    return [Cell(short[other], title=names[other]), cell(float(row[other]), 3)]


def _couplings(
    names: list[str], short: tuple[str, ...], norms: np.ndarray, coupling: np.ndarray, top: int
) -> list[Any]:
    answer = independence(names, norms, coupling, coupling, coupling)
    rows = tuple(
        (
            Cell(names[i]),
            Cell(names[j]),
            cell(float(coupling[i, j]), 4),
            cell(float(norms[i, j]), 4),
        )
        for i, j in strongest_pairs(coupling, top)
    )
    columns = (Column("block", False), Column("block", False), Column("coupling C"), Column("norm |H_vw|"))
    own = np.diag(norms)
    largest = int(np.argmax(own))
    return [
        Text(f"May these blocks be treated as independent? {answer.text}"),
        Text(
            "C = |H_vw| / √(|H_vv| |H_ww|), with Frobenius norms: 0 where two blocks are independent, no upper bound in general."
        ),
        Pictures(
            (
                Picture(
                    map_drawing(
                        Words("coupling", "Couplings of pairs of parameters", answer.text),
                        short,
                        coupling,
                        "coupling C",
                        False,
                    ),
                    "Couplings C of pairs of parameters.",
                ),
                Picture(
                    map_drawing(
                        Words(
                            "norms",
                            "Frobenius norms of blocks",
                            f"The largest own block is that of {names[largest]}, norm {number(float(own[largest]))}; the whole "
                            f"matrix has norm {number(float(np.sqrt((norms**2).sum())))}.",
                        ),
                        short,
                        norms,
                        "Frobenius norm",
                        True,
                    ),
                    "Frobenius norms of blocks, colours by their logarithm; blocks of zeros are left empty.",
                ),
            )
        ),
        Table("pairs", f"Strongest couplings ({len(rows)})", columns, rows),
    ]


def kink_section(store: HessianStore) -> Section | None:
    """Where the objective has no derivative at these data."""
    kinks = store.kinks
    if kinks is None:
        if store.missing_tiles():
            return None
        return Section("kinks", "Kinks", (Text("Not looked for: the model was not captured as a graph."),))
    if not kinks:
        return Section("kinks", "Kinks", (Text("None: no entry sits where the objective has no derivative."),))
    rows = tuple(
        (
            Cell(str(entry["node"])),
            Cell(str(entry["op"])),
            Cell(count(int(entry["entries"]))),
            Cell("–" if entry["samples"] is None else count(int(entry["samples"]))),
            Cell(str(entry["torch_takes"])),
        )
        for entry in kinks[:_MOST_ROWS]
    )
    columns = (
        Column("node", False),
        Column("operation", False),
        Column("entries"),
        Column("samples"),
        Column("torch takes", False),
    )
    text = "These entries sit where the objective has no derivative: the Hessian there is one of several."
    table = Table("kink-table", "Entries at kinks", columns, rows, "", len(rows) > 16)
    return Section("kinks", "Kinks", (Text(text, "warning"), table))


def activation_section(store: HessianStore, found: RunFindings) -> Section | None:
    """Nodes whose activation blocks are stored."""
    nodes = store.activations
    if not nodes:
        return None
    norms = found.activations
    columns = [Column("node", False), Column("output of", False), Column("shape of a sample"), Column("entries")]
    if norms is not None:
        columns.append(Column("norm of its own block"))
    rows = []
    for at, node in enumerate(nodes):
        shape = " × ".join(map(str, node.shape)) or "1"
        line = [Cell(node.name), Cell(", ".join(node.modules) or "–"), Cell(shape), Cell(count(node.numel))]
        if norms is not None:
            line.append(cell(float(norms[at, at])))
        rows.append(tuple(line))
    kept = store.layout.activation_samples
    how = f"kept sample by sample, {count(kept)} of them" if kept else "summed over samples"
    parts: list[Any] = [
        Text(f"Blocks H^f = Σ ∂²L / ∂v ∂w of node outputs v and w, {how}."),
        Table("activation-table", f"Activations ({len(nodes)})", tuple(columns), tuple(rows), "", len(rows) > 16),
    ]
    if norms is not None and len(nodes) > 1:
        total = float((norms**2).sum())
        off = 1 - float((np.diag(norms) ** 2).sum()) / total if total else math.nan
        says = f"Norms of {len(nodes)} × {len(nodes)} activation blocks; {share(off)} of their squares lies off the diagonal."
        drawn = map_drawing(
            Words("activation-map", "Norms of activation blocks", says),
            short_names([node.name for node in nodes]),
            norms,
            "Frobenius norm",
            True,
        )
        parts.append(Pictures((Picture(drawn, says),)))
    return Section("activations", "Activation blocks", tuple(parts))
