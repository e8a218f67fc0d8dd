"""Blocks in the latest audit: their numbers, how they couple, and the exact ones that were kept."""

from __future__ import annotations

import math

import numpy as np

from disthess.audits.metrics import METRICS
from disthess.audits.record import WHOLE, AuditRecord
from disthess.pictures.drawings import Words, map_drawing, tile_drawing
from disthess.reports.history_numbers import shown
from disthess.reports.independence import independence, strongest_pairs
from disthess.reports.names import short_names
from disthess.reports.numerals import count, number, with_interval
from disthess.reports.ordering import Ordered
from disthess.reports.page import Cell, Column, Picture, Pictures, Section, Table, Text

_MOST_BLOCKS = 500
_MOST_TILES = 6


def block_section(found: Ordered) -> Section | None:
    """One row per block with all that was measured of it."""
    latest = found.found[-1]
    names = list(dict.fromkeys(block for _, block in latest if block != WHOLE))
    metrics = [
        name for name, metric in METRICS.items() if metric.per_block and any((name, block) in latest for block in names)
    ]
    if not names or not metrics:
        return None
    first = {} if found.baseline is None else found.found[found.baseline]
    compared = "lambda_max" in metrics and any(("lambda_max", block) in first for block in names)
    rows = []
    for block in names[:_MOST_BLOCKS]:
        line = [Cell(block), *(shown(latest.get((metric, block))) for metric in metrics)]
        if compared:
            line.append(_ratio(latest.get(("lambda_max", block)), first.get(("lambda_max", block))))
        rows.append(tuple(line))
    columns = [Column("block", False), *(Column(METRICS[metric].title) for metric in metrics)]
    if compared:
        columns.append(Column("largest eigenvalue, to the first audit's"))
    more = f"{len(names) - _MOST_BLOCKS:,} more blocks are left out." if len(names) > _MOST_BLOCKS else ""
    table = Table(
        "block-table",
        f"Blocks of the latest audit ({count(len(names))})",
        tuple(columns),
        tuple(rows),
        more,
        len(rows) > 16,
    )
    about = "Of a block, H is the part of the Hessian within it: the other parameters are held fixed."
    return Section("blocks", "Blocks", (Text(about), table))


def coupling_section(latest: AuditRecord, top: int) -> Section | None:
    """The coupling map and what it says."""
    names, arrays = latest.blocks, latest.arrays
    if len(names) < 2 or "coupling/value" not in arrays:
        return None
    value = np.asarray(arrays["coupling/value"])
    low, high = (
        np.asarray(arrays[f"coupling/{end}"]) if f"coupling/{end}" in arrays else value for end in ("low", "high")
    )
    norms = np.asarray(arrays["norm/value"]) if "norm/value" in arrays else np.full_like(value, math.nan)
    if value.shape != (len(names), len(names)):
        return None
    answer = independence(names, norms, value, low, high)
    short = short_names(names)
    pictures = [
        Picture(
            map_drawing(
                Words("coupling", "Couplings of pairs of blocks", answer.text), short, value, "coupling C", False
            ),
            "Couplings C of pairs of blocks in the latest audit.",
        )
    ]
    if np.isfinite(norms).any():
        own = np.nan_to_num(np.diag(norms))
        largest = int(np.argmax(own))
        says = f"The largest own block is that of {names[largest]}, norm {number(float(own[largest]))}."
        pictures.append(
            Picture(
                map_drawing(Words("norms", "Frobenius norms of blocks", says), short, norms, "Frobenius norm", True),
                f"Frobenius norms of blocks, colours by their logarithm. {says}",
            )
        )
    rows = tuple(
        (
            Cell(names[i]),
            Cell(names[j]),
            Cell(with_interval(float(value[i, j]), float(low[i, j]), float(high[i, j])), float(value[i, j])),
            Cell(number(float(norms[i, j])), float(norms[i, j]) if math.isfinite(norms[i, j]) else None),
        )
        for i, j in strongest_pairs(value, top)
    )
    columns = (Column("block", False), Column("block", False), Column("coupling C"), Column("norm |H_vw|"))
    traces = _traces(latest)
    about = "C = |H_vw| / √(|H_vv| |H_ww|), with Frobenius norms: 0 where two blocks are independent, no upper bound in general."
    parts = (
        Text(f"May these blocks be treated as independent? {answer.text}"),
        Text(about),
        Pictures(tuple(pictures)),
        Table("pairs", f"Strongest couplings ({len(rows)})", columns, rows),
        *(() if traces is None else (traces,)),
    )
    return Section("couplings", "Couplings", parts)


def _traces(latest: AuditRecord) -> Table | None:
    """Traces of the map's blocks."""
    made, found = latest.map_facts, latest.map_traces()
    if made is None or not found:
        return None
    rows = tuple((Cell(entry.block), shown(entry)) for entry in found[:_MOST_BLOCKS])
    more = f"{len(found) - _MOST_BLOCKS:,} more blocks are left out. " if len(found) > _MOST_BLOCKS else ""
    note = (
        f"{more}{100 * made.confidence:g} % intervals from {count(made.probes)} random vectors of each block, seed {made.seed}; "
        f"{count(made.products)} Hessian-vector products for all of the map."
    )
    caption = f"Traces of the map's blocks ({count(len(found))})"
    return Table("map-traces", caption, (Column("block", False), Column("trace")), rows, note, len(rows) > 16)


def tile_section(latest: AuditRecord) -> Section | None:
    """Exact blocks that the latest audit kept."""
    names = sorted(name for name in latest.arrays if name.startswith("tile/"))
    if not names:
        return None
    drawn = []
    for at, name in enumerate(names[:_MOST_TILES]):
        values = np.asarray(latest.arrays[name])
        if values.ndim != 2 or not values.size:
            continue
        size = f"{values.shape[0]:,} × {values.shape[1]:,}"
        norm = float(np.linalg.norm(values))
        ends = f"from {number(float(values.min()), 3)} to {number(float(values.max()), 3)}"
        says = f"{size} entries {ends}, Frobenius norm {number(norm)}."
        title = name.removeprefix("tile/")
        words = Words(f"tile-{at + 1}", f"Exact block {title}", says)
        drawn.append(Picture(tile_drawing(words, values), f"{title}: {says}"))
    more = [Text(f"{len(names) - _MOST_TILES} more are in the history.")] if len(names) > _MOST_TILES else []
    return Section("tiles", "Exact blocks", (Pictures(tuple(drawn)), *more))


def _ratio(now: object, then: object) -> Cell:
    before, after = getattr(then, "value", math.nan), getattr(now, "value", math.nan)
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return Cell("–")
    return Cell(f"× {number(after / before, 3)}", after / before)
