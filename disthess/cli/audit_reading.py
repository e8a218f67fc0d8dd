"""Verbs that read audits: the history of one training, and what differs between two audits or stores."""

from __future__ import annotations

import csv as csv_files
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from disthess.cli.options import JsonOption, print_json
from disthess.errors import ConfigError

if TYPE_CHECKING:
    from disthess.audits.array_difference import PairDifference
    from disthess.audits.difference import Difference, DifferenceRow
    from disthess.audits.record import AuditRecord, Estimate

SHOWN = ("loss", "gradient_norm", "lambda_max", "lambda_min", "trace")
"""Metrics of the table, where none are named."""

_MOST_ROWS = 40

CsvOption = Annotated[Path | None, typer.Option("--csv", metavar="F.csv", help="Write all numbers as CSV.")]


def history(
    path: Annotated[str, typer.Argument(metavar="HISTORY", help="A history that 'disthess audit' has written.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", metavar="M", help="Which numbers; may be repeated. `density`: the curves of the last audit."
        ),
    ] = None,
    block: Annotated[str, typer.Option("--block", metavar="B", help="Of this block, not of the whole model.")] = "",
    csv: CsvOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="F.png", help="Draw them over the steps.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the audits of a history: checkpoint, date, key numbers with their intervals, alerts."""
    from disthess.audits.encode import record_to_json
    from disthess.audits.history import History
    from disthess.cli import density_tables
    from disthess.cli.tables import draw, save_text
    from disthess.pictures import files as pictures

    opened = History.open(path)
    records = opened.records()
    if records and not as_json and density_tables.is_density(metric):
        density_tables.print_densities(records, block, csv, plot)
        return
    metrics = _metrics(metric, block, records)
    if csv is not None:
        save_text(csv, history_csv(records, metrics if metric else None, block if block or metric else None))
    if plot is not None:
        title = f"{Path(path).name}{f', {block}' if block else ''}"
        draw(pictures.history_picture, plot, title, *_curves(records, metrics, block))
    if as_json:
        print_json([record_to_json(record) for record in records])
        return
    _print_history(opened.path, records, metrics, block)
    for file in (csv, plot):
        if file is not None:
            typer.echo(f"saved: {file}")


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A store, or an audit: HISTORY@STEP, HISTORY@-1 for the last.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it, of the same kind.")],
    csv: CsvOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two audits, or two stores: each number of both, the difference, and whether it is more than chance.

    An audit is HISTORY@STEP, HISTORY@-1 (the last) or HISTORY@CHECKPOINT. A verdict is `rose` or `fell` where the
    difference is more than chance and rounding explain, `equal` or `chance` where it is not. Couplings of pairs of
    blocks are judged likewise, by their ratio; exact blocks are `equal` to rounding, or `differs`.
    """
    from disthess.audits import difference
    from disthess.cli.tables import save_text

    found = difference.diff(a, b)
    if csv is not None:
        save_text(csv, found.to_csv())
    if as_json:
        print_json(found.to_json())
        return
    _print_difference(found)
    if csv is not None:
        typer.echo(f"saved: {csv}")


def history_csv(records: Sequence[AuditRecord], metrics: Sequence[str] | None, block: str | None) -> str:
    """A header and one line per number of every audit, those of some metrics and one block alone where they are given."""
    out = io.StringIO()
    writer = csv_files.writer(out, lineterminator="\n")
    writer.writerow(["step", "checkpoint", "taken", "metric", "block", "value", "low", "high", "confidence"])
    for record in records:
        for entry in record.estimates:
            if (metrics is None or entry.metric in metrics) and (block is None or entry.block == block):
                step = "" if record.step is None else record.step
                numbers = [entry.value, entry.low, entry.high, entry.confidence]
                writer.writerow([step, record.checkpoint, record.taken, entry.metric, entry.block, *numbers])
    return out.getvalue()


def _metrics(given: list[str] | None, block: str, records: Sequence[AuditRecord]) -> list[str]:
    from disthess.audits.metrics import METRICS

    for name in given or ():
        if name not in METRICS:
            raise ConfigError(f"there is no metric {name!r}; metrics are {', '.join(METRICS)}.")
    blocks = dict.fromkeys(entry.block for record in records for entry in record.estimates if entry.block)
    if block and block not in blocks:
        shown = ", ".join(list(blocks)[:8]) or "none"
        raise ConfigError(f"no audit of the history has the block {block!r}; it has {shown}.")
    return given or [name for name in SHOWN if not block or METRICS[name].per_block]


def _curves(
    records: Sequence[AuditRecord], metrics: Sequence[str], block: str
) -> tuple[list[str], list[list[tuple[float, float, float, float]]], str]:
    """Names of the metrics, of each (place, value, low, high), and what places are."""
    stepped = all(record.step is not None for record in records)
    curves = []
    for metric in metrics:
        points = []
        for index, record in enumerate(records):
            found = record.find(metric, block)
            if found is not None:
                place = float(record.step) if stepped and record.step is not None else float(index)
                points.append((place, found.value, found.low, found.high))
        curves.append(sorted(points))
    return list(metrics), curves, "step" if stepped else "audit"


def _print_history(path: str, records: Sequence[AuditRecord], metrics: Sequence[str], block: str) -> None:
    from disthess.audits.metrics import METRICS
    from disthess.cli.tables import show, table

    if not records:
        typer.echo(f"{path} has no audits yet.")
        return
    titles = [METRICS[metric].title for metric in metrics]
    of = f" of {block}" if block else ""
    made = table(f"{len(records)} audits in {path}{of}", "step", "checkpoint", "taken", *titles, "alerts", left=3)
    for record in records:
        cells = [_cell(record.find(metric, block)) for metric in metrics]
        step = "" if record.step is None else f"{record.step:,}"
        taken = record.taken[:16].replace("T", " ")
        made.add_row(step, record.checkpoint, taken, *cells, str(len(record.alerts)) if record.alerts else "")
    show(made)
    for record in records[-5:]:
        for alert in record.alerts:
            typer.echo(f"{record.checkpoint}: {alert.rule}: {alert.message}")


def _cell(found: Estimate | None) -> str:
    if found is None or math.isnan(found.value):
        return ""
    return f"{found.value:.4g}" if found.exact else f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"


def _print_difference(found: Difference) -> None:
    from disthess.cli.tables import show, table

    typer.echo(f"A: {found.a}\nB: {found.b}")
    whole = [row for row in found.rows if not row.block]
    blocks = sorted((row for row in found.rows if row.block), key=_by_change)
    for title, rows in (("the whole model", whole), ("blocks", blocks)):
        if rows:
            words = ("number", "block") if rows is blocks else ("number",)
            shown = rows[:_MOST_ROWS]
            rest = f", {len(shown)} of {len(rows)} by relative change" if len(shown) < len(rows) else ""
            share = f"{found.confidence:.0%} intervals"
            columns = ("A", "B", "B - A", "from", "to", "relative", "p", "verdict")
            made = table(f"{title}, {share}{rest}", *words, *columns, left=len(words))
            for row in shown:
                names = (row.metric, row.block) if rows is blocks else (row.metric,)
                numbers = (row.a, row.b, row.difference, row.low, row.high)
                made.add_row(*names, *map(_number, numbers), _share(row.relative), _p(row.p), row.verdict)
            show(made)
    if found.blocks:
        distances = sorted(found.blocks, key=lambda row: -row.distance)
        made = table(
            f"{min(len(distances), _MOST_ROWS)} of {len(distances)} blocks by |A - B|; up to {found.floor:.2g} is rounding",
            *("rows", "columns", "|A|", "|B|", "|A - B|", "|A - B| / |A|"),
            left=2,
        )
        for entry in distances[:_MOST_ROWS]:
            norms = (entry.norm_a, entry.norm_b, entry.distance)
            made.add_row(entry.a, entry.b, *map(_number, norms), _share(entry.relative).lstrip("+"))
        show(made)
    _print_pairs(found)
    _print_tiles(found)
    for note in found.notes:
        typer.echo(f"differs: {note}")
    changed = sum(row.verdict in ("rose", "fell") for row in found.rows)
    typer.echo(
        f"{changed} of {len(found.rows)} numbers changed by more than chance and rounding (at most {found.significance:.2g} "
        f"that any of these is chance)"
    )


def _print_pairs(found: Difference) -> None:
    from disthess.cli.tables import show, table

    if not found.pairs:
        return
    changed = [row for row in found.pairs if row.verdict in ("rose", "fell")]
    rest = [row for row in found.pairs if row.verdict not in ("rose", "fell")]
    ordered = [*sorted(changed, key=_by_ratio), *sorted(rest, key=_by_ratio)]
    title = f"couplings of {min(len(ordered), _MOST_ROWS)} of {len(ordered)} pairs by their ratio, {found.confidence:.0%} intervals"
    made = table(title, "block", "block", "A", "B", "B / A", "from", "to", "p", "verdict", left=2)
    for row in ordered[:_MOST_ROWS]:
        numbers = (row.a, row.b, row.ratio, row.low, row.high)
        made.add_row(row.first, row.second, *map(_number, numbers), _p(row.p), row.verdict)
    show(made)
    typer.echo(
        f"{len(changed)} of {len(found.pairs)} couplings changed by more than chance and rounding (at most "
        f"{found.significance:.2g} that any of these is chance)"
    )


def _print_tiles(found: Difference) -> None:
    from disthess.cli.tables import show, table

    if not found.tiles:
        return
    columns = ("block", "size", "|A|", "|B|", "|B - A|", "|B - A| / |A|", "verdict")
    made = table("exact blocks; what is beyond rounding differs", *columns, left=1)
    for tile in found.tiles:
        norms = (tile.norm_a, tile.norm_b, tile.distance)
        share = _share(tile.relative).lstrip("+")
        made.add_row(tile.name, f"{tile.rows:,} x {tile.columns:,}", *map(_number, norms), share, tile.verdict)
    show(made)


def _by_ratio(row: PairDifference) -> float:
    return -abs(math.log(row.ratio)) if row.ratio > 0 else -math.inf if row.ratio == 0 else math.inf


def _by_change(row: DifferenceRow) -> float:
    return math.inf if math.isnan(row.relative) else -abs(row.relative)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.2%}" if abs(value) < 10 else f"{value:+.3g}x"


def _p(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}"
