"""Audit records as JSON values, and back: types first, since a history may be damaged or made to do harm.

Numbers that are not finite are the texts ``NaN``, ``Infinity`` and ``-Infinity``, which plain JSON has not. Estimates and alerts
are rows under their column names, and what estimates say of their method is kept once:

    {"estimates": {"columns": ["metric", "block", "value", "low", "high", "confidence", "how"],
                   "rows": [["loss", "", 0.31, 0.31, 0.31, 1.0, 0], ...], "how": ["one pass over the data"]}, ...}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from disthess.audits.record import Alert, AuditRecord, BlockDensity, Estimate, MapFacts
from disthess.store.json_fields import read_entries, read_field, read_text, read_whole, said

ESTIMATE_COLUMNS = ["metric", "block", "value", "low", "high", "confidence", "how"]
ALERT_COLUMNS = ["rule", "metric", "block", "value", "limit", "message"]
DENSITY_COLUMNS = ["block", "products", "seed", "how"]

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def record_to_json(record: AuditRecord) -> dict[str, Any]:
    """All of a record but its arrays, as JSON values.

    Raises:
        TypeError: A field is of another type than a record has.
        ValueError: A whole number is out of bounds.
    """
    how = list(dict.fromkeys(estimate.how for estimate in record.estimates))
    places = {text: index for index, text in enumerate(how)}
    value: dict[str, Any] = {
        "key": record.key,
        "checkpoint": record.checkpoint,
        "step": None if record.step is None else int(record.step),
        "taken": record.taken,
        "seconds": number_to_json(record.seconds),
        "products": int(record.products),
        "facts": dict(record.facts),
        "estimates": {
            "columns": ESTIMATE_COLUMNS,
            "rows": [
                [
                    estimate.metric,
                    estimate.block,
                    *map(number_to_json, (estimate.value, estimate.low, estimate.high, estimate.confidence)),
                    places[estimate.how],
                ]
                for estimate in record.estimates
            ],
            "how": how,
        },
        "blocks": list(record.blocks),
        "alerts": {
            "columns": ALERT_COLUMNS,
            "rows": [
                [
                    alert.rule,
                    alert.metric,
                    alert.block,
                    number_to_json(alert.value),
                    number_to_json(alert.limit),
                    alert.message,
                ]
                for alert in record.alerts
            ],
        },
    }
    if record.densities:
        value["densities"] = {
            "columns": DENSITY_COLUMNS,
            "rows": [[made.block, int(made.products), made.seed, made.how] for made in record.densities],
        }
    if record.parts:
        value["parts"] = {name: int(products) for name, products in record.parts.items()}
    if record.map_facts is not None:
        made = record.map_facts
        value["couplings"] = {
            "confidence": number_to_json(made.confidence),
            "probes": int(made.probes),
            "seed": int(made.seed),
            "products": int(made.products),
        }
    # What could not be read again is not written.
    record_from_json(value, record.arrays)
    return value


def record_from_json(value: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> AuditRecord:
    """The record that ``record_to_json`` was given.

    Args:
        value: JSON, from anywhere.
        arrays: What it gets as arrays; they are not read.

    Raises:
        ValueError: Something in it is missing or of the wrong type; the message says where.
    """
    facts = read_field(value, "facts")
    if not isinstance(facts, Mapping):
        raise ValueError(f"facts is {said(facts)}, not a mapping")
    parts = value.get("parts", {})
    if not isinstance(parts, Mapping):
        raise ValueError(f"parts is {said(parts)}, not a mapping")
    how = [
        read_text(text, "estimates.how")
        for text in read_entries(read_field(read_field(value, "estimates"), "how"), "how")
    ]
    step = read_field(value, "step")
    return AuditRecord(
        key=read_text(read_field(value, "key"), "key"),
        checkpoint=read_text(read_field(value, "checkpoint"), "checkpoint"),
        step=None if step is None else read_whole(step, "step"),
        taken=read_text(read_field(value, "taken"), "taken"),
        seconds=number_from_json(read_field(value, "seconds"), "seconds"),
        products=read_whole(read_field(value, "products"), "products"),
        facts={read_text(key, "facts"): read_text(text, f"facts.{key}") for key, text in facts.items()},
        estimates=tuple(_estimate(row, how) for row in _rows(value, "estimates", ESTIMATE_COLUMNS)),
        blocks=tuple(read_text(name, "blocks") for name in read_entries(read_field(value, "blocks"), "blocks")),
        arrays=arrays,
        alerts=tuple(_alert(row) for row in _rows(value, "alerts", ALERT_COLUMNS)),
        # Older audits have none.
        densities=tuple(_density(row) for row in _rows(value, "densities", DENSITY_COLUMNS))
        if "densities" in value
        else (),
        map_facts=_map_facts(value["couplings"]) if "couplings" in value else None,
        parts={name: read_whole(products, f"parts.{name}") for name, products in parts.items()},
    )


def number_to_json(value: float) -> float | str:
    """A number, or the text that stands for one that is not finite.

    >>> number_to_json(2), number_to_json(float("-inf"))
    (2.0, '-Infinity')
    """
    number = float(value)
    if math.isnan(number):
        return "NaN"
    return number if math.isfinite(number) else ("Infinity" if number > 0 else "-Infinity")


def number_from_json(value: Any, where: str) -> float:
    """The number again.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where} is {said(value)}, not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{where} is a number of more than 308 digits") from error


def _estimate(row: list[Any], how: list[str]) -> Estimate:
    metric, block, *numbers, method = row
    value, low, high, confidence = (number_from_json(number, "a number of estimates") for number in numbers)
    place = read_whole(method, "how of estimates", len(how) - 1)
    return Estimate(read_text(metric, "metric"), read_text(block, "block"), value, low, high, confidence, how[place])


def _alert(row: list[Any]) -> Alert:
    rule, metric, block, value, limit, message = row
    texts = [read_text(text, "alerts") for text in (rule, metric, block)]
    numbers = [number_from_json(number, "a number of alerts") for number in (value, limit)]
    return Alert(texts[0], texts[1], texts[2], numbers[0], numbers[1], read_text(message, "alerts"))


def _map_facts(value: Any) -> MapFacts:
    confidence = number_from_json(read_field(value, "confidence"), "couplings.confidence")
    if not 0 < confidence < 1:
        raise ValueError(f"couplings.confidence is {said(confidence)}, not between 0 and 1")
    probes, seed, products = (
        read_whole(read_field(value, key), f"couplings.{key}") for key in ("probes", "seed", "products")
    )
    return MapFacts(confidence, probes, seed, products)


def _density(row: list[Any]) -> BlockDensity:
    block, products, seed, how = row
    number = None if seed is None else read_whole(seed, "seed of densities")
    taken = read_whole(products, "products of densities")
    return BlockDensity(read_text(block, "densities"), taken, number, read_text(how, "densities"))


def _rows(value: Mapping[str, Any], key: str, columns: list[str]) -> list[list[Any]]:
    part = read_field(value, key)
    if read_field(part, "columns") != columns:
        raise ValueError(f"{key}.columns is {said(part['columns'])}, not {columns}")
    rows = read_entries(read_field(part, "rows"), f"{key}.rows")
    for index, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(columns):
            raise ValueError(f"{key}.rows[{index}] is {said(row)}, not {len(columns)} values")
    return rows
