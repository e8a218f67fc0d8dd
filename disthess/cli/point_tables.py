"""What the command line prints of a problem at a point: what bends it, whether it is a minimum, what is near it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from disthess.cli.tables import draw, show, table
from disthess.units import human_bytes, human_seconds


def print_curvature(found: Any, top: int, plot: Path | None) -> None:
    """Nodes by their share."""
    rows = sorted(found.rows, key=lambda row: -abs(row.share))[:top]
    shown = table(
        f"{len(rows)} of {len(found.rows)} nodes that make up the {found.part}", "node", "operation", "norm", "trace", "share",
        left=2,
    )  # fmt: skip
    for row in rows:
        shown.add_row(row.name, row.op, f"{row.norm:.4e}", f"{row.trace: .4e}", f"{row.share: .2%}")
    show(shown)
    typer.echo(
        f"norm of the {found.part} {found.total_norm:.6e}; the nodes add up to it within {found.defect:.1e} of it. "
        "share = <node, whole> / <whole, whole>"
    )
    if plot is not None:
        typer.echo(f"saved: {plot}")


def curvature_summary(found: Any) -> dict[str, Any]:
    """As JSON."""
    rows: Sequence[Any] = found.rows
    return {
        "part": found.part,
        "norm": found.total_norm,
        "defect": found.defect,
        "nodes": [
            {"name": row.name, "op": row.op, "norm": row.norm, "trace": row.trace, "share": row.share} for row in rows
        ],
    }


def draw_curvature(path: Path, found: Any) -> None:
    """Shares as bars."""
    from disthess.pictures import files as pictures

    rows = sorted(found.rows, key=lambda row: -abs(row.share))[:40]
    title = f"What the {found.part} is made of"
    draw(
        pictures.bar_picture, path, [row.name for row in rows], [row.share for row in rows], title, "share of the whole"
    )


def print_stopping(found: Any) -> None:
    """Each criterion, its number, its bound and whether it holds."""
    shown = table("stopping criteria", "criterion", "value", "allowed", "holds", left=1)
    for row in found.rows():
        shown.add_row(row.name, f"{row.value:.4e}", f"{row.sign} {row.allowed:.1e}", "yes" if row.holds else "no")
    show(shown)
    if found.shift:
        typer.echo(f"decrement of H + {found.shift:.3e} I: H itself is not positive definite")
    typer.echo("stop: every criterion holds" if found.stop else "go on: not every criterion holds")


def stopping_summary(found: Any) -> dict[str, Any]:
    """As JSON."""
    return {**dataclasses.asdict(found), "stop": found.stop}


def print_kronecker(found: Sequence[Any], expected: Sequence[Any], out: Path | None) -> None:
    """One line per layer."""
    shown = table(
        "blocks of layers by Kronecker products", "layer", "outputs x inputs", "norm", "error, nearest", "by expectation",
        left=1,
    )  # fmt: skip
    for index, entry in enumerate(found):
        other = f"{expected[index].relative_error:.2%}" if expected else ""
        sides = f"{len(entry.outer)} x {len(entry.inner)}"
        shown.add_row(" + ".join(entry.names[0]), sides, f"{entry.norm:.4e}", f"{entry.relative_error:.2%}", other)
    show(shown)
    if out is not None:
        typer.echo(f"saved: {out} ({'by expectation' if expected else 'nearest'})")


def kronecker_summary(found: Any) -> dict[str, Any]:
    """As JSON."""
    return {
        "layer": list(found.names[0]),
        "kind": found.kind,
        "part": found.part,
        "outputs": len(found.outer),
        "inputs": len(found.inner),
        "norm": found.norm,
        "error": found.error,
        "relative_error": found.relative_error,
    }


def print_comparison(found: Any, plot: Path | None) -> None:
    """The table, its scale, and what is missing from it."""
    shown = table(
        f"approximations of the Hessian, P = {found.numel:,}, {found.dtype}",
        "approximation", "error, Frobenius", "error, spectral", "bytes", "seconds", "how", left=1,
    )  # fmt: skip
    shown.columns[-1].justify = "left"
    for row in found.rows:
        shown.add_row(
            row.name, f"{row.frobenius_error:.2%}", f"{row.spectral_error:.2%}", human_bytes(row.stored_bytes),
            human_seconds(row.seconds), row.how,
        )  # fmt: skip
    show(shown)
    typer.echo(
        f"errors relative to |H|_F = {found.frobenius:.6g} and |H|_2 = {found.spectral:.4g} of the exact Hessian"
    )
    for line in found.left_out:
        typer.echo(f"left out: {line}")
    if plot is not None:
        typer.echo(f"picture: {plot}")
