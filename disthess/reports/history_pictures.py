"""Courses over training."""

from __future__ import annotations

import math

import numpy as np

from disthess.audits.metrics import METRICS
from disthess.audits.record import WHOLE
from disthess.pictures.drawings import Course, Words, course_drawing
from disthess.reports.history_numbers import SHARES
from disthess.reports.names import anchor
from disthess.reports.numerals import count, number
from disthess.reports.ordering import Ordered
from disthess.reports.page import Picture, Pictures, Section, Text

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
