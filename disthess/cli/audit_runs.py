"""The verb ``audit``: measures checkpoints and raises alerts; and what ``plan`` says of audit files."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer
from typer.core import TyperGroup

from disthess.cli.audit_reading import history as read_history
from disthess.cli.errors import termination_as_interrupt
from disthess.cli.options import JsonOption, print_json
from disthess.units import human_seconds

if TYPE_CHECKING:
    from disthess.audits.meter import Progress

_LINE_SECONDS = 5.0


@final
class AuditGroup(TyperGroup):
    """``disthess audit CONFIG`` is short for ``disthess audit run CONFIG``; a file named as a verb is given as ``./NAME``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put in the word that was left out."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


audit = typer.Typer(
    cls=AuditGroup,
    help="Audit checkpoints: curvature with intervals, kept in a history, and alerts. `disthess audit CONFIG` audits.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

AuditArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="An audit file (YAML), as configs/digits_audit.yaml.")
]
HistoryOption = Annotated[
    str | None,
    typer.Option("--history", metavar="H", help="Append to this history, a path or URL, not to the file's own."),
]


@audit.command(
    epilog="Examples: `disthess audit configs/digits_audit.yaml`; what it would cost: `disthess plan configs/digits_audit.yaml`"
)
def run(
    config: AuditArgument,
    history: HistoryOption = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what the history has.")] = False,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="A", help="Take the products on this running Ray cluster, such as auto."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every checkpoint that the history does not have yet, append it, and judge it by the file's alerts.

    Exit code 3 if an alert was raised by this call, 1 if a checkpoint could not be audited; the others are audited all the same.
    """
    from disthess.audits.run import audit as audit_all
    from disthess.cli import audit_tables

    with termination_as_interrupt():
        made = audit_all(
            config,
            history=history,
            force=force,
            address=address,
            seen=None if as_json else audit_tables.print_record,
            progress=progress_line(),
        )
    if as_json:
        print_json(audit_tables.outcome_summary(made))
    else:
        audit_tables.print_outcome(made)
    for name, why in made.failures:
        typer.echo(f"disthess: {name} was not audited: {why}", err=True)
    if made.exit_code:
        raise typer.Exit(made.exit_code)


audit.command(
    "history",
    epilog="Example: `disthess audit history runs/digits_audit.zarr --metric lambda_max --plot history.png`",
)(read_history)


def print_audit_plan(config: Path, as_json: bool) -> None:
    """What ``disthess plan`` says of an audit file."""
    from disthess.audits.run import plan_audit

    made = plan_audit(config)
    if as_json:
        print_json(made.to_json())
    else:
        typer.echo(made.describe())


def progress_line(clock: Callable[[], float] = time.monotonic) -> Callable[[Progress], None]:
    """A line on standard error every few seconds; on a terminal it is written over."""
    said = clock()

    def tell(progress: Progress) -> None:
        nonlocal said
        if clock() - said < _LINE_SECONDS:
            return
        said = clock()
        left = progress.remaining_seconds
        rest = "time left not known yet" if math.isnan(left) else f"{human_seconds(left)} left"
        text = f"{progress.part}: {progress.products:,} of about {progress.expected:,} products, {rest}"
        typer.echo(text, err=True) if not sys.stderr.isatty() else typer.echo(f"\r\033[K{text}", err=True, nl=False)

    return tell
