"""What differs between two audits, or between two stores, and whether it is more than chance or rounding."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from disthess.api import open_store
from disthess.audits.array_difference import (
    PairDifference,
    TileDifference,
    missing_notes,
    pair_differences,
    tile_differences,
)
from disthess.audits.encode import number_to_json
from disthess.audits.history import History
from disthess.audits.record import AuditRecord, Estimate
from disthess.audits.selection import find_record, is_history, split_selector
from disthess.audits.significance import SHOWN_CONFIDENCE, asserted, change_between
from disthess.audits.store_numbers import compared_stores
from disthess.errors import ConfigError
from disthess.reduce.difference import BlockDifference
from disthess.reduce.hessian_store import HessianStore

Comparable: TypeAlias = AuditRecord | HessianStore | str | os.PathLike[str]
"""An audit, a store, or where one is: the path or URL of a store, of a history (its last audit), or ``HISTORY@SELECTOR``."""

ROUNDING = {"float32": 1e-5, "float64": 1e-12}
"""Relative difference up to which exact numbers of two audits are one number, computed twice."""


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """One number of both.

    Attributes:
        metric: Which.
        block: Of which block; "" for the whole model.
        a: Of the first; NaN where it has none.
        b: Of the second.
        difference: ``b - a``.
        relative: ``(b - a) / |a|``.
        low: Lower end of the interval of the difference.
        high: Upper end.
        p: Probability of such a difference by chance alone; 0 or 1 where only bounds count.
        verdict: ``rose``, ``fell``, ``equal`` (to rounding), ``chance`` (no more than that), ``undefined`` (a number is not
            finite), ``only A`` or ``only B``.
    """

    metric: str
    block: str
    a: float
    b: float
    difference: float
    relative: float
    low: float
    high: float
    p: float
    verdict: str


@dataclass(frozen=True, slots=True)
class Difference:
    """Two audits or stores side by side.

    Attributes:
        a: What the first is called.
        b: The second.
        significance: Probability that any ``rose`` or ``fell`` of the table is a false one, by chance.
        confidence: Of the intervals.
        rows: Numbers of both.
        blocks: Distances of blocks, of two stores; empty of audits.
        pairs: Couplings of pairs of blocks, of two audits with maps; their ``rose`` and ``fell`` are a family of their own.
        tiles: Exact blocks, of two audits.
        floor: Of the same stores: the distance up to which blocks may differ by rounding, by both certificates.
        notes: Sentences on what else differs: data, settings, parameters.
    """

    a: str
    b: str
    significance: float
    confidence: float
    rows: tuple[DifferenceRow, ...]
    blocks: tuple[BlockDifference, ...]
    floor: float
    notes: tuple[str, ...]
    pairs: tuple[PairDifference, ...] = ()
    tiles: tuple[TileDifference, ...] = ()

    def find(self, metric: str, block: str = "") -> DifferenceRow | None:
        """The row of that metric and block; None where there is none."""
        return next((row for row in self.rows if (row.metric, row.block) == (metric, block)), None)

    def pair(self, first: str, second: str) -> PairDifference | None:
        """The couplings of two blocks, in either order; None where both maps do not have them."""
        return next((row for row in self.pairs if {row.first, row.second} == {first, second}), None)

    def tile(self, name: str) -> TileDifference | None:
        """The exact block of that name; None where there is none."""
        return next((tile for tile in self.tiles if tile.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """All of it; numbers that are not finite are the texts ``NaN``, ``Infinity`` and ``-Infinity``."""
        return {
            "a": self.a,
            "b": self.b,
            "significance": self.significance,
            "confidence": self.confidence,
            "rows": [_plain(row) for row in self.rows],
            "blocks": [_plain(block) for block in self.blocks],
            "floor": number_to_json(self.floor),
            "pairs": [_plain(row) for row in self.pairs],
            "tiles": [_plain(tile) for tile in self.tiles],
            "notes": list(self.notes),
        }

    def to_csv(self) -> str:
        """A header and one line per number.

        Distances of blocks are rows of the metric ``distance``, block ``A x B``, and those of exact blocks of ``tile``. Couplings
        are rows of ``log_coupling``, so that the interval is that of the difference, as everywhere.
        """
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(DifferenceRow.__slots__)
        for row in self.rows:
            writer.writerow(_plain(row).values())
        for block in self.blocks:
            name = f"{block.a} x {block.b}"
            numbers = (block.norm_a, block.norm_b, block.distance, block.relative)
            verdict = "equal" if block.distance <= self.floor else "differs"
            writer.writerow(["distance", name, *map(number_to_json, numbers), "", "", "", verdict])
        for pair in self.pairs:
            logs = [_log(number) for number in (pair.a, pair.b, pair.ratio, pair.low, pair.high)]
            plain = [*map(number_to_json, logs[:3]), "", *map(number_to_json, (*logs[3:], pair.p))]
            writer.writerow(["log_coupling", f"{pair.first} x {pair.second}", *plain, pair.verdict])
        for tile in self.tiles:
            numbers = (tile.norm_a, tile.norm_b, tile.distance, tile.relative)
            writer.writerow(["tile", tile.name, *map(number_to_json, numbers), "", "", "", tile.verdict])
        return out.getvalue()


def diff(a: Comparable, b: Comparable, *, significance: float = 0.01) -> Difference:
    """What differs between two audits of checkpoints, or between two stores, number by number and block by block.

    Numbers with intervals are compared by `disthess.audits.significance`, their errors taken as independent. By Holm's rule,
    ``significance`` is the probability that any change that the table asserts is chance. Exact numbers are compared to rounding.
    Couplings of audits are judged likewise, by the same rule among themselves: with both tables at 0.01, one or the other asserts a
    change that is none in at most 2 of 100 comparisons. Exact blocks of audits differ where ``|B - A|`` is beyond rounding. Of
    stores, everything is exact up to their certificates: an error ``e`` relative to ``|H|`` moves an eigenvalue by at most
    ``e |H|_F``, a trace by ``sqrt(n) e |H|_F``.

    Args:
        a: An audit, a store, or where one is: a path or URL; of a history with ``@STEP``, ``@-1`` (the last), or ``@CHECKPOINT``.
        b: The same kind of thing.
        significance: See above.

    Returns:
        The table; ``found.find("lambda_max").verdict``, ``found.to_csv()``.

    Raises:
        ConfigError: One is an audit and the other a store, or a selector selects none.
        StoreError: One is not there, incomplete or damaged.
    """
    if not 0 < significance < 1:
        raise ConfigError(f"significance is {significance}; give a probability between 0 and 1, such as 0.01.")
    (name_a, first), (name_b, second) = _resolved(a), _resolved(b)
    if isinstance(first, AuditRecord) and isinstance(second, AuditRecord):
        return _of_audits(name_a, first, name_b, second, significance)
    if isinstance(first, HessianStore) and isinstance(second, HessianStore):
        pair = compared_stores(first, second)
        rows = _rows(pair.first, pair.second, significance, 0.0)
        return Difference(name_a, name_b, significance, SHOWN_CONFIDENCE, rows, pair.blocks, pair.floor, pair.notes)
    raise ConfigError(
        f"{name_a} and {name_b} are an audit and a store, which have too little in common. Compare two audits or two stores."
    )


def _of_audits(name_a: str, a: AuditRecord, name_b: str, b: AuditRecord, significance: float) -> Difference:
    rounding = _rounding(a, b)
    sides = [(*record.estimates, *record.map_traces()) for record in (a, b)]
    # The variance of a trace of the map is known by as many degrees of freedom as there are vectors, at least.
    probes = min((record.map_facts.probes for record in (a, b) if record.map_facts is not None), default=math.inf)
    rows = _rows(sides[0], sides[1], significance, rounding, {"map_trace": probes})
    pairs = pair_differences(a, b, significance, SHOWN_CONFIDENCE, rounding)
    notes = (*_other_facts(a, b), *missing_notes(a, b))
    tiles = tile_differences(a, b, rounding)
    return Difference(name_a, name_b, significance, SHOWN_CONFIDENCE, rows, (), 0.0, notes, pairs, tiles)


def _resolved(given: Comparable) -> tuple[str, AuditRecord | HessianStore]:
    if isinstance(given, AuditRecord):
        return given.checkpoint, given
    if isinstance(given, HessianStore):
        return given.path, given
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigError(
            f"expected an audit, a store, or where one is, got {type(given).__name__}. Give a path, such as runs/digits.zarr, or "
            f"audits.zarr@-1 for the last audit of a history."
        )
    path, selector = split_selector(os.fspath(given))
    if selector is None and not is_history(path):
        return path, open_store(path)
    record = find_record(History.open(path), selector or "-1")
    return f"{record.checkpoint} in {Path(path).name}", record


def _rows(
    first: Sequence[Estimate],
    second: Sequence[Estimate],
    significance: float,
    rounding: float,
    freedom: Mapping[str, float] | None = None,
) -> tuple[DifferenceRow, ...]:
    by_name = [{(entry.metric, entry.block): entry for entry in side} for side in (first, second)]
    keys = list(dict.fromkeys([*by_name[0], *by_name[1]]))
    freedom = freedom or {}
    rows = [
        _row(key, by_name[0].get(key), by_name[1].get(key), rounding, freedom.get(key[0], math.inf)) for key in keys
    ]
    judged = [index for index, row in enumerate(rows) if row.verdict == "chance"]
    for place in asserted([rows[index].p for index in judged], significance):
        index = judged[place]
        rows[index] = replace(rows[index], verdict=_direction(rows[index].difference))
    return tuple(rows)


def _row(
    key: tuple[str, str], a: Estimate | None, b: Estimate | None, rounding: float, freedom: float
) -> DifferenceRow:
    nan = math.nan
    if a is None or b is None:
        values = (nan if a is None else a.value, nan if b is None else b.value)
        return DifferenceRow(*key, *values, nan, nan, nan, nan, nan, "only B" if a is None else "only A")
    change = change_between(a, b, freedom=freedom)
    verdict = "chance"
    if math.isnan(change.p):
        verdict = "equal" if a.value == b.value else "undefined"
    elif a.confidence == b.confidence == 1 or (a.exact and b.exact):
        near = abs(change.difference) <= rounding * max(abs(a.value), abs(b.value))
        verdict = "equal" if near or change.p == 1 else _direction(change.difference)
    return DifferenceRow(
        *key, a.value, b.value, change.difference, change.relative, change.low, change.high, change.p, verdict
    )


def _log(value: float) -> float:
    return math.log(value) if value > 0 else (-math.inf if value == 0 else math.nan)


def _direction(difference: float) -> str:
    return "rose" if difference > 0 else "fell"


def _rounding(a: AuditRecord, b: AuditRecord) -> float:
    """The coarser of both."""
    return max(ROUNDING.get(record.facts.get("dtype", ""), ROUNDING["float32"]) for record in (a, b))


def _other_facts(a: AuditRecord, b: AuditRecord) -> tuple[str, ...]:
    keys = dict.fromkeys([*a.facts, *b.facts])
    notes = [
        f"{key}: {_short(a.facts.get(key, 'not said'))} in A, {_short(b.facts.get(key, 'not said'))} in B"
        for key in keys
        if a.facts.get(key) != b.facts.get(key)
    ]
    if a.key == b.key:
        notes.insert(0, "A and B are the same audit: the same checkpoint, data and settings")
    return tuple(notes)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> dict[str, Any]:
    fields = {name: getattr(value, name) for name in type(value).__slots__}
    return {name: number_to_json(field) if isinstance(field, float) else field for name, field in fields.items()}
