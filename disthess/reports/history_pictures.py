"""Courses over training, and the latest density beside the first."""

from __future__ import annotations

import math

import numpy as np

from disthess.audits.metrics import METRICS
from disthess.audits.record import WHOLE, AuditRecord
from disthess.pictures.drawings import Course, Curve, Words, course_drawing
from disthess.reports.history_numbers import SHARES
from disthess.reports.names import anchor
from disthess.reports.numerals import count, number
from disthess.reports.ordering import Ordered
from disthess.reports.page import Picture, Pictures, Section, Text
from disthess.reports.run_tables import density_picture, moments

_SIZE = (340, 210)
_NOT_DRAWN = frozenset({"stop"})


def courses_section(found: Ordered) -> Section:
    """A picture per metric over step, date, or number of the audit."""
    if len(found.records) == 1:
        return Section("courses", "Over training", (Text("One audit so far: courses begin with the second."),))
    drawn = []
    for name, metric in METRICS.items():
        course = _course(found, name)
        if name not in _NOT_DRAWN and np.isfinite(course.values).any():
            words = Words(f"course-{anchor(name)}", f"{metric.title} over training", _words_of(found, course))
            drawn.append(Picture(course_drawing(words, course, _SIZE), words.description, title=course.label))
    about = (
        "Bands are the intervals of the numbers; diamonds mark audits in which a rule about the number was broken. Rules about "
        "blocks are in the table of alerts."
    )
    parts: list[Text | Pictures] = [Text(about), Pictures(tuple(drawn), beside=True)]
    if len({record.facts.get("data") for record in found.records}) > 1:
        parts.insert(
            1,
            Text("Not all audits are on the same data: a jump may be theirs. Facts says where they change.", "warning"),
        )
    return Section("courses", "Over training", tuple(parts))


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


def _course(found: Ordered, metric: str) -> Course:
    entries = found.values(metric)
    columns = np.array(
        [[math.nan] * 3 if entry is None else [entry.value, entry.low, entry.high] for entry in entries], dtype=float
    )
    columns[~np.isfinite(columns)] = math.nan
    if metric in SHARES:
        columns *= 100
    alarmed = tuple(
        at
        for at, record in enumerate(found.records)
        if any(alert.metric == metric and alert.block == WHOLE for alert in record.alerts)
    )
    label = f"{METRICS[metric].title}{', %' if metric in SHARES else ''}"
    value, low, high = columns.T
    return Course(label, found.places, value, low, high, alarmed, found.axis)


def _words_of(found: Ordered, course: Course) -> str:
    known = np.flatnonzero(np.isfinite(course.values))
    first, last = int(known[0]), int(known[-1])
    low, high = (int(known[at(course.values[known])]) for at in (np.argmin, np.argmax))

    def value(index: int) -> str:
        return number(float(course.values[index]), 3)

    def at(index: int) -> str:
        return f"{value(index)} at {found.label(index)}"

    if course.values[low] == course.values[high]:
        text = f"{value(low)} in all audits" if len(known) > 1 else at(first)
    else:
        text = f"From {at(first)} to {at(last)}"
        inner = [
            f"{word} {at(index)}" for word, index in (("lowest", low), ("highest", high)) if index not in (first, last)
        ]
        text += f"; {', '.join(inner)}" if inner else ""
    if len(known) < len(course.values):
        text += f"; measured in {count(len(known))} of {count(len(course.values))} audits"
    if course.alerts:
        text += f"; {count(len(course.alerts))} audit{'s' if len(course.alerts) > 1 else ''} with alerts"
    return f"{text}."
