"""The page about a history of audits: what alarms, the latest numbers, and how they came about over training."""

from __future__ import annotations

from collections.abc import Sequence

from disthess import __version__
from disthess.audits.metrics import METRICS
from disthess.audits.record import WHOLE, Alert, AuditRecord
from disthess.reports.history_blocks import block_section, coupling_section, tile_section
from disthess.reports.history_densities import block_density_section, density_section
from disthess.reports.history_numbers import how_section, latest_section, shown
from disthess.reports.history_pictures import courses_section
from disthess.reports.names import anchor
from disthess.reports.numerals import cell, count
from disthess.reports.ordering import Ordered, date_of, ordered
from disthess.reports.page import Cell, Column, Facts, Page, Section, Table, Text, Verdict
from disthess.units import human_seconds

_MOST_ALERTS = 200
_MOST_ITEMS = 12
_MOST_CHANGES = 60
_TABLE_METRICS = ("loss", "gradient_norm", "lambda_max", "lambda_min", "trace", "negative_mass")


def history_page(records: Sequence[AuditRecord], title: str | None = None, top: int = 10, place: str = "") -> Page:
    """The page.

    Args:
        records: Of one history, in the order in which they were appended.
        title: Above it.
        top: Rows of tables of the largest.
        place: Where the history lies, for the footer.
    """
    footer = f"Written by disthess {__version__}{f' from the history {place}' if place else ''}."
    about = f"disthess report of {count(len(records))} audit{'s' if len(records) != 1 else ''}"
    if not records:
        empty = Verdict("warning", "No audits yet.", "This history is empty: disthess audit CONFIG adds the first.")
        return Page(title or "Audit history", about, (empty,), (), footer)
    found = ordered(records)
    sections = [
        latest_section(found),
        _alerts(found),
        courses_section(found),
        density_section(found),
        coupling_section(found.latest, top),
        block_section(found),
        block_density_section(found),
        tile_section(found.latest),
        _audits(found),
        _facts(found),
        how_section(found),
    ]
    kept = tuple(section for section in sections if section is not None)
    return Page(title or "Audit history", f"{about}, {_range(found)}", _verdicts(found), kept, footer)


def _range(found: Ordered) -> str:
    first, last = found.label(0), found.label(len(found.records) - 1)
    return first if len(found.records) == 1 else f"{first} to {last}"


def _verdicts(found: Ordered) -> tuple[Verdict, ...]:
    made = []
    latest, total = found.latest, len(found.records)
    name = found.label(total - 1)
    if latest.alerts:
        many = len(latest.alerts)
        items = [_alert_item(alert) for alert in latest.alerts[:_MOST_ITEMS]]
        if many > _MOST_ITEMS:
            items.append(Cell(f"{many - _MOST_ITEMS} more", link="alerts"))
        head = f"{many} alert{'s' if many > 1 else ''} in the latest audit."
        made.append(Verdict("bad", head, f"At {name}, checkpoint {latest.checkpoint}:", tuple(items)))
    earlier = [(at, record) for at, record in enumerate(found.records[:-1]) if record.alerts]
    if earlier:
        many = sum(len(record.alerts) for _, record in earlier)
        where = f"{len(earlier)} earlier audit{'s' if len(earlier) > 1 else ''}"
        at = Cell(f"all of them, with the audits; the last at {found.label(earlier[-1][0])}", link="alerts")
        text = "The latest audit broke no rule." if not latest.alerts else ""
        made.append(Verdict("warning", f"{many} alert{'s' if many > 1 else ''} in {where}.", text, (at,)))
    if not latest.alerts and not earlier:
        made.append(
            Verdict("good", "No alerts.", f"No rule was broken in {count(total)} audit{'s' if total > 1 else ''}.")
        )
    return tuple(made)


def _alert_item(alert: Alert) -> Cell:
    return Cell(f"{alert.rule}: {alert.message}", link=f"how-{anchor(alert.metric)}" if alert.metric in METRICS else "")


def _alerts(found: Ordered) -> Section | None:
    rows = [
        (
            Cell(found.label(at), link=f"audit-{at + 1}"),
            Cell(record.checkpoint),
            Cell(alert.rule, tone="bad"),
            Cell(METRICS[alert.metric].title if alert.metric in METRICS else alert.metric),
            Cell("all" if alert.block == WHOLE else alert.block),
            cell(alert.value),
            cell(alert.limit),
            Cell(alert.message),
        )
        for at, record in reversed(list(enumerate(found.records)))
        for alert in record.alerts
    ]
    if not rows:
        return None
    columns = (
        *(Column("audit", False), Column("checkpoint", False), Column("rule", False), Column("metric", False)),
        *(Column("block", False), Column("measured"), Column("limit"), Column("message", False)),
    )
    more = f"The {len(rows) - _MOST_ALERTS:,} oldest are left out." if len(rows) > _MOST_ALERTS else ""
    table = Table(
        "alert-table",
        f"Alerts, latest first ({count(len(rows))})",
        columns,
        tuple(rows[:_MOST_ALERTS]),
        more,
        len(rows) > 16,
    )
    return Section("alerts", "Alerts", (table,))


def _audits(found: Ordered) -> Section:
    metrics = [name for name in _TABLE_METRICS if any(entry is not None for entry in found.values(name))]
    rows = []
    for record, estimates in zip(found.records, found.found, strict=True):
        alerts = Cell(str(len(record.alerts)), tone="bad") if record.alerts else Cell("0")
        line = [
            Cell("–" if record.step is None else count(record.step)),
            Cell(record.checkpoint),
            Cell(date_of(record.taken)),
            alerts,
            *(shown(estimates.get((name, WHOLE)), brief=True) for name in metrics),
            Cell(count(record.products)),
            Cell(human_seconds(record.seconds)),
        ]
        rows.append(tuple(line))
    columns = (
        *(Column("step"), Column("checkpoint", False), Column("taken (UTC)"), Column("alerts")),
        *(Column(METRICS[name].title) for name in metrics),
        *(Column("products"), Column("time")),
    )
    caption = f"All audits ({count(len(rows))})"
    places = tuple(f"audit-{at + 1}" for at in range(len(rows)))
    return Section(
        "audits", "All audits", (Table("audit-table", caption, columns, tuple(rows), "", len(rows) > 16, places),)
    )


def _facts(found: Ordered) -> Section:
    latest = found.latest
    rows: list[tuple[str, Cell]] = [
        ("checkpoint's name", Cell(latest.checkpoint)),
        ("key", Cell(latest.key)),
        ("taken (UTC)", Cell(date_of(latest.taken))),
        ("products", Cell(count(latest.products), float(latest.products))),
        ("time", Cell(human_seconds(latest.seconds), latest.seconds)),
        *((name.replace("_", " "), Cell(text)) for name, text in sorted(latest.facts.items())),
    ]
    changes = _changes(found)
    parts: list[Text | Table | Facts] = [Text("Of the latest audit:"), Facts(tuple(rows))]
    if changes:
        columns = (
            Column("audit", False),
            Column("fact", False),
            Column("before", False),
            Column("from then on", False),
        )
        more = f"The {len(changes) - _MOST_CHANGES:,} oldest are left out." if len(changes) > _MOST_CHANGES else ""
        caption = f"What changed between one audit and the next, latest first ({count(len(changes))})"
        parts.append(Table("changes", caption, columns, tuple(changes[:_MOST_CHANGES]), more, len(changes) > 16))
    elif len(found.records) > 1:
        parts.append(Text("They are the same in all audits, but for the checkpoint's own."))
    return Section("facts", "Facts", tuple(parts))


def _changes(found: Ordered) -> list[tuple[Cell, ...]]:
    """Facts that differ from one audit to the next; those that differ nearly always belong to the checkpoint."""
    times: dict[str, int] = {}
    made: list[tuple[str, tuple[Cell, ...]]] = []
    for at in range(len(found.records) - 1, 0, -1):
        before, after = found.records[at - 1].facts, found.records[at].facts
        for name in sorted({*before, *after}):
            old, new = before.get(name, "–"), after.get(name, "–")
            if old != new:
                times[name] = times.get(name, 0) + 1
                line = (
                    Cell(found.label(at), link=f"audit-{at + 1}"),
                    Cell(name.replace("_", " ")),
                    Cell(old),
                    Cell(new),
                )
                made.append((name, line))
    usual = {name for name, often in times.items() if often > 2 and often > 0.8 * (len(found.records) - 1)}
    return [line for name, line in made if name not in usual]
