"""What the command line prints of pairs of blocks and of activations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import typer

from disthess.cli.tables import draw, print_block, save_text, show, table
from disthess.errors import ConfigError

LABELS = {
    "norm": ("Frobenius norm of the block", True),
    "coupling": ("coupling |H_vw| / sqrt(|H_vv| |H_ww|)", False),
    "stable_rank": ("stable rank |H|_F^2 / |H|_2^2", True),
    "gap": ("GN-gap |residual| / |ggn|", True),
    "trace": ("trace", False),
}
"""What a metric is called, and whether its heat map has a logarithmic scale."""


def write_pairs(pairs: Any, metric: str, csv: Path | None, plot: Path | None) -> None:
    """The files that were asked for."""
    from disthess.pictures import files as pictures

    if csv is not None:
        save_text(csv, pairs.to_csv())
    if plot is not None:
        label, logarithmic = LABELS[metric]
        title = f"{metric.replace('_', ' ')} of pairs of {pairs.of}, {pairs.part}"
        draw(pictures.matrix_picture, plot, pairs.names, pairs.matrix(metric), title, label, logarithmic)


def print_pairs(pairs: Any, metric: str, top: int, csv: Path | None, plot: Path | None) -> None:
    """The pairs with the largest metric."""
    shown = pairs.largest(top, metric)
    title = f"{len(shown)} of {len(pairs.rows)} pairs of {pairs.of}, {pairs.part}, by {metric.replace('_', ' ')}"
    found = table(title, "A", "B", "entries", "norm R", "coupling C", "stable rank D", "GN-gap", "trace", left=2)
    for row in shown:
        numbers = (row.norm, row.coupling, row.stable_rank, row.gap, row.trace)
        found.add_row(row.a, row.b, f"{row.entries:,}", *(_cell(value) for value in numbers))
    show(found)
    if all(math.isnan(row.gap) for row in pairs.rows):
        typer.echo("no GN-gap: it needs a store with parts [hessian, ggn]")
    for file in (csv, plot):
        if file is not None:
            typer.echo(f"saved: {file}")


def write_couplings(found: Any, csv: Path | None, plot: Path | None) -> None:
    """The files that were asked for."""
    from disthess.pictures import files as pictures

    if csv is not None:
        save_text(csv, found.to_csv())
    if plot is not None:
        label = LABELS["coupling"][0]
        draw(pictures.matrix_picture, plot, found.names, found.coupling.value, "Couplings, estimated", label, False)


def print_couplings(found: Any, top: int, csv: Path | None, plot: Path | None) -> None:
    """The strongest pairs, the blocks themselves, and what a block-diagonal form leaves out."""
    share = f"{found.confidence:.0%} intervals"
    pairs = found.largest(top)
    blocks = [row for row in found.rows() if row.a == row.b]
    shown = table(
        f"the {len(pairs)} most coupled of {len(found.rows()) - len(blocks)} pairs, {share}",
        "A",
        "B",
        "coupling C",
        "from",
        "to",
        "norm",
        "from",
        "to",
        left=2,
    )
    for row in pairs:
        numbers = (row.coupling, row.coupling_low, row.coupling_high, row.norm, row.norm_low, row.norm_high)
        shown.add_row(row.a, row.b, *(_cell(value) for value in numbers))
    if pairs:
        show(shown)
    own = table(f"blocks, {share}", "block", "entries", "norm", "from", "to", "trace", "from", "to", left=1)
    for row, size in zip(blocks, found.sizes, strict=True):
        numbers = (row.norm, row.norm_low, row.norm_high, row.trace, row.trace_low, row.trace_high)
        own.add_row(row.a, f"{size:,}", *(_cell(value) for value in numbers))
    show(own)
    typer.echo(
        f"a block-diagonal form leaves out {found.off_diagonal:.1%} of the norm (estimated); "
        f"{found.products:,} Hessian-vector products"
    )
    for file in (csv, plot):
        if file is not None:
            typer.echo(f"saved: {file}")


def print_activations(store: Any) -> None:
    """The stored activations."""
    if not store.activations:
        raise ConfigError(
            f"the store {store.path} holds no activation blocks. Name modules or nodes under compute: activations in the run file."
        )
    kept = store.layout.activation_samples
    how = f"sample by sample, {kept:,} of them" if kept else "summed over samples"
    found = table(f"activations, blocks {how}", "node", "output of module", "shape of a sample", "entries", left=2)
    for entry in store.activations:
        shape = " x ".join(map(str, entry.shape)) or "1"
        found.add_row(entry.name, ", ".join(entry.modules), shape, f"{entry.numel:,}")
    show(found)


def print_activation_block(values: np.ndarray, title: str, out: Path | None) -> None:
    """A block as others; of per-sample blocks the shape, and the mean over samples."""
    if values.ndim == 2:
        print_block(values, title, out)
        return
    typer.echo(
        f"{title}: {values.shape[0]} samples of shape {values.shape[1]} x {values.shape[2]}, {values.dtype}; their sum:"
    )
    print_block(values.sum(axis=0), title, out)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
