"""The latest numbers of a history with their intervals, and how each was computed."""

from __future__ import annotations

import math

from disthess.audits.metrics import METRICS
from disthess.audits.record import WHOLE, Estimate
from disthess.reports.names import anchor
from disthess.reports.numerals import cell, count, number, share, with_interval
from disthess.reports.ordering import Ordered, date_of
from disthess.reports.page import Cell, Entries, Entry, Figures, Section, Text

SHARES = frozenset({"negative_mass", "ggn_share"})
"""Metrics shown in per cent."""

COUNTS = frozenset({"kinks"})
"""Metrics that are whole numbers."""


def how_place(metric: str) -> str:
    """Where a page says how a metric was computed."""
    return f"how-{anchor(metric)}"


def shown(entry: Estimate | None, *, brief: bool = False, link: str = "") -> Cell:
    """A number with its interval as an entry.

    Args:
        entry: The estimate; None where it was not measured.
        brief: Without the interval.
        link: Where it leads.
    """
    if entry is None:
        return Cell("–")
    value = entry.value
    if not math.isfinite(value):
        return Cell(number(value), None, link)
    if entry.metric == "stop":
        return Cell("yes" if value == 1.0 else "no", value, link)
    if entry.metric in COUNTS and entry.exact:
        return Cell(count(round(value)), value, link)
    if entry.metric in SHARES:
        ends = "" if brief or entry.exact else _share_ends(entry)
        return Cell(f"{share(value)}{ends}", value, link)
    if brief:
        return cell(value, link=link)
    return Cell(with_interval(value, entry.low, entry.high), value, link)


def confidence_of(entry: Estimate) -> str:
    """What an interval is worth, in words."""
    if not math.isfinite(entry.value):
        return "not defined"
    if entry.exact:
        return "exact to rounding"
    if entry.confidence >= 1.0:
        return "the interval's ends are bounds"
    return f"{100 * entry.confidence:g} % interval"


def latest_section(found: Ordered) -> Section:
    """The latest audit's numbers, each with a link to how it was computed."""
    latest, estimates = found.latest, found.found[-1]
    rows = []
    for name, metric in METRICS.items():
        entry = estimates.get((name, WHOLE))
        if entry is None:
            continue
        value = shown(entry, link=how_place(name))
        rows.append((metric.title, Cell(value.text, value.value, value.link, confidence_of(entry))))
    label = found.label(len(found.records) - 1)
    text = f"Checkpoint {latest.checkpoint}{'' if latest.step is None else f', {label}'}, audited {date_of(latest.taken)} UTC. "
    parts = (Text(f"{text}Each number leads to how it was computed."), Figures(tuple(rows)))
    return Section("latest", "Latest audit", parts)


def how_section(found: Ordered) -> Section:
    """One entry per metric: formula, scale, method, interval, seed and products; from the last audit that has it."""
    entries = []
    for name, metric in METRICS.items():
        at = max((i for i, entry in enumerate(found.values(name)) if entry is not None), default=None)
        blocks = {
            entry.how for (found_name, block), entry in found.found[-1].items() if found_name == name and block != WHOLE
        }
        if at is None and not blocks:
            # An alert may be about a metric that the latest audit no longer has.
            if any(alert.metric == name for record in found.records for alert in record.alerts):
                entries.append(Entry(how_place(name), metric.title, (("what", Cell(metric.meaning)),)))
            continue
        rows: list[tuple[str, Cell]] = [("what", Cell(metric.meaning))]
        if at is not None:
            entry, record = found.found[at][name, WHOLE], found.records[at]
            rows += [
                ("how", Cell(entry.how)),
                ("value", Cell(number(entry.value, 9), entry.value if math.isfinite(entry.value) else None)),
            ]
            if not entry.exact and math.isfinite(entry.value):
                rows.append(
                    ("interval", Cell(f"[{number(entry.low, 6)}, {number(entry.high, 6)}], {confidence_of(entry)}"))
                )
            else:
                rows.append(("interval", Cell(confidence_of(entry))))
            if "seed" in record.facts:
                rows.append(("seed", Cell(record.facts["seed"])))
            rows.append(("products", Cell(f"{count(record.products)} Hessian-vector products in the whole audit")))
            rows.append(("audit", Cell(found.label(at), link=f"audit-{at + 1}")))
        rows += [("how, of blocks", Cell(text)) for text in sorted(blocks)]
        entries.append(Entry(how_place(name), metric.title, tuple(rows)))
    about = (
        "H is the Hessian of the objective with respect to the audited parameters, in the objective's own scale (1/N if it is a "
        "mean). An interval at 95 % misses about one time in twenty; where its ends are bounds it does not."
    )
    return Section("how", "How it was computed", (Text(about), Entries(tuple(entries))))


def _share_ends(entry: Estimate) -> str:
    if not (math.isfinite(entry.low) and math.isfinite(entry.high)):
        return ""
    return f" [{share(entry.low)}, {share(entry.high)}]"
