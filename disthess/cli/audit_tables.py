"""What the command line prints of audits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from disthess.audits.metrics import METRICS
from disthess.audits.record import WHOLE, AuditRecord, Estimate
from disthess.cli.tables import show, table
from disthess.units import human_seconds

if TYPE_CHECKING:
    from disthess.audits.run import AuditOutcome

_BLOCK_ROWS = 20
_COLUMNS = ("gradient_norm", "lambda_max", "lambda_min", "trace", "effective_rank", "stable_rank")


def print_record(record: AuditRecord) -> None:
    """One audit: the whole model's numbers, those of its blocks, its alerts."""
    step = "" if record.step is None else f", step {record.step:,}"
    shown = table(
        f"{record.checkpoint}{step}: {record.products:,} products, {human_seconds(record.seconds)}",
        "metric", "value", "from", "to", "how", left=1,
    )  # fmt: skip
    shown.columns[-1].justify = "left"
    for found in record.estimates:
        if found.block == WHOLE:
            ends = ("", "") if found.exact or math.isnan(found.value) else (_number(found.low), _number(found.high))
            shown.add_row(METRICS[found.metric].title, _number(found.value), *ends, found.how)
    show(shown)
    print_blocks(record)
    print_map(record)
    for alert in record.alerts:
        typer.echo(f"ALERT      {alert.rule}: {alert.message}")


def print_blocks(record: AuditRecord) -> None:
    """The blocks with the largest eigenvalues; nothing where there are none."""
    names = list(dict.fromkeys(found.block for found in record.estimates if found.block != WHOLE))
    if not names:
        return
    by_place = {(found.metric, found.block): found for found in record.estimates}
    columns = [metric for metric in _COLUMNS if any((metric, name) in by_place for name in names)]

    def size(name: str) -> float:
        found = by_place.get(("lambda_max", name))
        return 0.0 if found is None or math.isnan(found.value) else -abs(found.value)

    chosen = sorted(names, key=size)[:_BLOCK_ROWS]
    title = f"{len(chosen)} of {len(names)} blocks; ± is half of the interval"
    shown = table(title, "block", *(METRICS[metric].title for metric in columns), left=1)
    for name in chosen:
        shown.add_row(name, *(_with_half(by_place.get((metric, name))) for metric in columns))
    show(shown)


def print_map(record: AuditRecord) -> None:
    """Traces and norms of the coupling map's blocks, those of the largest trace; nothing where they were not kept."""
    made, traces = record.map_facts, record.map_traces()
    if made is None or not traces:
        return
    norms = np.diag(np.asarray(record.arrays["norm/value"])).tolist() if "norm/value" in record.arrays else []
    by_block = dict(zip(record.blocks, norms, strict=False))
    chosen = sorted(traces, key=lambda entry: -abs(entry.value))[:_BLOCK_ROWS]
    title = f"{len(chosen)} of {len(traces)} blocks of the coupling map, {made.confidence:.0%} intervals"
    shown = table(title, "block", "trace", "from", "to", "norm", left=1)
    for entry in chosen:
        ends = ("", "") if entry.exact else (_number(entry.low), _number(entry.high))
        shown.add_row(entry.block, _number(entry.value), *ends, _number(by_block.get(entry.block, math.nan)))
    show(shown)


def print_outcome(made: AuditOutcome) -> None:
    """What was done, in a few lines."""
    for note in made.notes:
        typer.echo(f"note       {note}")
    known = f", {len(made.known)} in the history already" if made.known else ""
    failed = f", {len(made.failures)} failed" if made.failures else ""
    alerts = f", {len(made.alerts)} alert{'s' if len(made.alerts) != 1 else ''}" if made.records else ""
    typer.echo(f"audited    {len(made.records)} checkpoints{known}{failed}{alerts}")
    typer.echo(f"history    {made.history}")


def outcome_summary(made: AuditOutcome) -> dict[str, Any]:
    """As JSON; numbers that are not defined are None."""
    return {
        "history": made.history,
        "audits": [_record_summary(record) for record in made.records],
        "known": list(made.known),
        "failures": [{"checkpoint": name, "why": why} for name, why in made.failures],
        "notes": list(made.notes),
    }


def _record_summary(record: AuditRecord) -> dict[str, Any]:
    return {
        "key": record.key,
        "checkpoint": record.checkpoint,
        "step": record.step,
        "taken": record.taken,
        "seconds": record.seconds,
        "products": record.products,
        "facts": dict(record.facts),
        "estimates": [
            {
                "metric": found.metric,
                "block": found.block,
                "value": _plain(found.value),
                "low": _plain(found.low),
                "high": _plain(found.high),
                "confidence": found.confidence,
                "how": found.how,
            }
            for found in record.estimates
        ],
        "densities": [
            {"block": made.block, "products": made.products, "seed": made.seed, "how": made.how}
            for made in record.densities
        ],
        "map_traces": [
            {"block": entry.block, "value": _plain(entry.value), "low": _plain(entry.low), "high": _plain(entry.high)}
            for entry in record.map_traces()
        ],
        "alerts": [
            {
                "rule": alert.rule,
                "metric": alert.metric,
                "block": alert.block,
                "value": _plain(alert.value),
                "limit": _plain(alert.limit),
                "message": alert.message,
            }
            for alert in record.alerts
        ],
    }


def _with_half(found: Estimate | None) -> str:
    if found is None:
        return ""
    return (
        _number(found.value)
        if found.exact or math.isnan(found.value)
        else f"{found.value:.4g} ± {found.half_width:.1g}"
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.5g}"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
