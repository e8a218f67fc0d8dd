"""The verb report: a page to read or to pass on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PathArgument = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A store that 'disthess run' wrote, or a history of audits: a path or a URL."),
]
PageOption = Annotated[Path, typer.Option("--out", metavar="F.html", help="The page; what is there is replaced.")]


def report(
    path: PathArgument,
    out: PageOption = Path("report.html"),
    title: Annotated[str | None, typer.Option("--title", metavar="T", help="Above the page.")] = None,
    top: Annotated[
        int,
        typer.Option("--top", min=1, metavar="N", help="Eigenvalues at each end, and rows of tables of the largest."),
    ] = 10,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", min=0, metavar="S", help="What numbers that are not stored may take; others are left out."
        ),
    ] = 120.0,
) -> None:
    """Write one self-contained HTML page about a run, or about a history of audits.

    No scripts, no fonts, nothing from a network: it opens from a disk, on a telephone, in the dark, and prints.
    """
    from disthess.reports.write import report as write_report

    typer.echo(f"report     {write_report(path, out, title=title, top=top, seconds=seconds)}")
