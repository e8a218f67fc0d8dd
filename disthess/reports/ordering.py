"""Audits in the order of training, and where each lies on the axis of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from disthess.audits.record import WHOLE, AuditRecord, Estimate


@dataclass(frozen=True, slots=True)
class Ordered:
    """Audits with the latest last.

    Attributes:
        records: By step where all have one, else by date where all have one, else as they were appended.
        places: On the axis of a picture, ``[n]`` ascending.
        axis: ``step``, ``date`` or ``audit``.
        found: The estimates of each by metric and block.
    """

    records: tuple[AuditRecord, ...]
    places: np.ndarray
    axis: str
    found: tuple[Mapping[tuple[str, str], Estimate], ...]

    @property
    def latest(self) -> AuditRecord:
        """The last of them."""
        return self.records[-1]

    def values(self, metric: str, block: str = WHOLE) -> list[Estimate | None]:
        """That metric in every audit; None where it was not measured."""
        return [estimates.get((metric, block)) for estimates in self.found]

    @property
    def baseline(self) -> int | None:
        """The first audit on the same data as the latest, which it is compared with; None where that is the latest itself."""
        data, last = self.latest.facts.get("data"), len(self.records) - 1
        return next((at for at, record in enumerate(self.records[:last]) if record.facts.get("data") == data), None)

    def label(self, index: int) -> str:
        """Which audit, for people."""
        record = self.records[index]
        return record.checkpoint if record.step is None else f"step {record.step:,}"


def ordered(records: Sequence[AuditRecord]) -> Ordered:
    """At least one audit, in order."""
    steps = [record.step for record in records]
    days = [_days(record.taken) for record in records]
    if all(step is not None for step in steps):
        axis, places = "step", np.array(steps, dtype=float)
    elif all(day is not None for day in days) and len(set(days)) > 1:
        axis, places = "date", np.array(days, dtype=float)
    else:
        axis, places = "audit", np.arange(1.0, len(records) + 1)
    order = np.argsort(places, kind="stable")
    chosen = tuple(records[at] for at in order)
    found = tuple({(entry.metric, entry.block): entry for entry in record.estimates} for record in chosen)
    return Ordered(chosen, places[order], axis, found)


def date_of(taken: str) -> str:
    """A date as tables show it, in UTC; the text itself where it is none.

    >>> date_of("2026-01-02T03:04:05.678+00:00"), date_of("never")
    ('2026-01-02 03:04', 'never')
    """
    days = _days(taken)
    return taken if days is None else datetime.fromtimestamp(days * 86400.0, UTC).strftime("%Y-%m-%d %H:%M")


def _days(taken: str) -> float | None:
    try:
        when = datetime.fromisoformat(taken)
    except ValueError:
        return None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() / 86400.0
