"""What differs between the coupling maps and the exact blocks of two audits.

A coupling ``C`` is an estimate whose interval is symmetric in ``log C``, of Student's distribution with one degree of freedom less
than there are random vectors of a block (`disthess.linalg.block_map`). Two of them are compared by ``log C_B - log C_A``, their
errors taken as independent, with degrees of freedom by Welch and Satterthwaite. A map of n blocks has ``n (n - 1) / 2`` such pairs:
Holm's rule is applied to all that are estimates, as a family of their own, so that the significance is the probability that any
pair is falsely said to have changed, however they depend on each other.

Exact blocks have no error but rounding: any difference beyond it is a change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from disthess.audits.record import AuditRecord, MapFacts
from disthess.audits.significance import LogEstimate, asserted, ratio_between

TILE = "tile/"
NOT_JUDGED = "not judged"


@dataclass(frozen=True, slots=True)
class PairDifference:
    """The coupling of one pair of blocks in both audits.

    Attributes:
        first: One block.
        second: The other.
        a: Its coupling C in the first audit.
        b: In the second.
        ratio: ``b / a``.
        low: Lower end of the interval of the ratio.
        high: Upper end.
        p: Probability of such a ratio by chance alone; 0 or 1 where both are exact, NaN where it is not judged.
        verdict: ``rose``, ``fell``, ``equal`` (to rounding), ``chance`` (no more than that), ``undefined`` (a block that is zero
            has no coupling), or ``not judged`` (an older audit that does not say what its intervals are worth).
    """

    first: str
    second: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    p: float
    verdict: str


@dataclass(frozen=True, slots=True)
class TileDifference:
    """An exact block of both audits.

    Attributes:
        name: In the audit files.
        rows: Of the block in the first audit; in the second where that has it alone.
        columns: Likewise.
        norm_a: Frobenius norm in the first.
        norm_b: In the second.
        distance: Frobenius norm of ``B - A``.
        relative: ``|B - A| / |A|``; 0 where both are zero, infinite where A alone is.
        verdict: ``equal`` (to rounding), ``differs``, ``other shape``, ``undefined`` (an entry is not finite), ``only A`` or
            ``only B``.
    """

    name: str
    rows: int
    columns: int
    norm_a: float
    norm_b: float
    distance: float
    relative: float
    verdict: str


def pair_differences(
    a: AuditRecord, b: AuditRecord, significance: float, confidence: float, rounding: float
) -> tuple[PairDifference, ...]:
    """Every pair of blocks that both maps have, in the order of the first.

    Args:
        a: The first audit.
        b: The second.
        significance: Probability that any ``rose`` or ``fell`` is a false one.
        confidence: Of the intervals of ratios.
        rounding: Couplings up to that are zero; exact ones that differ by no more, relatively, are equal.
    """
    maps = [_map(record) for record in (a, b)]
    if not all(maps):
        return ()
    names = [name for name in a.blocks if name in b.blocks]
    rows = [
        _pair(pair, maps[0][pair], maps[1][pair], confidence, rounding) for pair in itertools.combinations(names, 2)
    ]
    judged = [index for index, row in enumerate(rows) if row.verdict == "chance"]
    for place in asserted([rows[index].p for index in judged], significance):
        index = judged[place]
        rows[index] = replace(rows[index], verdict=_direction(rows[index]))
    return tuple(rows)


def tile_differences(a: AuditRecord, b: AuditRecord, rounding: float) -> tuple[TileDifference, ...]:
    """Every exact block of either audit; ``rounding`` is relative to the larger norm."""
    names = dict.fromkeys(name for record in (a, b) for name in record.arrays if name.startswith(TILE))
    return tuple(_tile(name, a.arrays, b.arrays, rounding) for name in names)


def missing_notes(a: AuditRecord, b: AuditRecord) -> tuple[str, ...]:
    """Sentences on what of the maps could not be compared."""
    notes = []
    for word, own, other in (("A", a, b), ("B", b, a)):
        if not _has_map(own):
            continue
        alone = [name for name in own.blocks if name not in other.blocks]
        if not _has_map(other) or alone:
            which = f"{', '.join(alone[:4])}{' ...' if len(alone) > 4 else ''}" if _has_map(other) else "all of it"
            notes.append(f"couplings: in the map of {word} alone, {which}")
        elif own.map_facts is None:
            notes.append(
                f"couplings: {word} is of a version that did not keep what its intervals are worth, so that they are not judged; "
                f"audit its checkpoint again with --force"
            )
    return tuple(notes)


def _has_map(record: AuditRecord) -> bool:
    return bool(record.blocks) and "coupling/value" in record.arrays


def _map(record: AuditRecord) -> Mapping[tuple[str, str], LogEstimate]:
    """Couplings by pair, in both orders; none where the arrays are not those of a map."""
    names = [f"coupling/{end}" for end in ("value", "low", "high")]
    if not record.blocks or not set(names) <= set(record.arrays):
        return {}
    count = len(record.blocks)
    arrays = [np.asarray(record.arrays[name]) for name in names]
    if any(array.shape != (count, count) for array in arrays):
        return {}
    value, low, high = arrays
    confidence, freedom = _worth(record.map_facts)
    return {
        (record.blocks[i], record.blocks[j]): LogEstimate(
            float(value[i, j]), float(low[i, j]), float(high[i, j]), confidence, freedom
        )
        for i, j in itertools.permutations(range(count), 2)
    }


def _worth(facts: MapFacts | None) -> tuple[float, float]:
    """Confidence of intervals, and degrees of freedom of what they are made of; NaN where nobody knows."""
    return (math.nan, math.nan) if facts is None else (facts.confidence, facts.probes - 1.0)


def _pair(pair: tuple[str, str], a: LogEstimate, b: LogEstimate, confidence: float, rounding: float) -> PairDifference:
    nan = math.nan
    if not (math.isfinite(a.value) and math.isfinite(b.value)):
        return PairDifference(*pair, a.value, b.value, nan, nan, nan, nan, "undefined")
    # A block that is zero is seen to be by any vector: nothing is uncertain about it.
    zero = [one.value <= rounding for one in (a, b)]
    if any(zero) or (a.exact and b.exact):
        ratio = b.value / a.value if a.value > 0 else (math.inf if b.value > 0 else nan)
        equal = all(zero) or abs(b.value - a.value) <= rounding * max(a.value, b.value)
        row = PairDifference(*pair, a.value, b.value, ratio, ratio, ratio, float(equal), "equal")
        return row if equal else replace(row, verdict=_direction(row))
    found = ratio_between(a, b, confidence)
    verdict = NOT_JUDGED if math.isnan(found.p) else "chance"
    return PairDifference(*pair, a.value, b.value, found.value, found.low, found.high, found.p, verdict)


def _direction(row: PairDifference) -> str:
    return "rose" if row.b > row.a else "fell"


def _tile(name: str, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], rounding: float) -> TileDifference:
    nan, title = math.nan, name.removeprefix(TILE)
    sides = [np.asarray(side[name]) if name in side else None for side in (a, b)]
    norm_a, norm_b = (nan if side is None else float(np.linalg.norm(side)) for side in sides)
    shape = next(side.shape for side in sides if side is not None)
    high, wide = (shape[0], shape[1]) if len(shape) == 2 else (math.prod(shape), 1)
    row = TileDifference(title, high, wide, norm_a, norm_b, nan, nan, "undefined")
    first, second = sides
    if first is None or second is None:
        return replace(row, verdict="only B" if first is None else "only A")
    if first.shape != second.shape:
        return replace(row, verdict="other shape")
    distance = float(np.linalg.norm(second - first))
    if not math.isfinite(distance):
        return row
    relative = distance / norm_a if norm_a else (math.inf if distance else 0.0)
    verdict = "equal" if distance <= rounding * max(norm_a, norm_b) else "differs"
    return replace(row, distance=distance, relative=relative, verdict=verdict)
