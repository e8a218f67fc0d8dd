"""Verbs that reduce a store: spectrum, lowrank, kronecker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from disthess.cli.options import (
    JsonOption,
    PartName,
    PartOption,
    RankMethod,
    SeedOption,
    StoreArgument,
    print_json,
    settings_of,
)


def spectrum(
    store: StoreArgument,
    top: Annotated[int, typer.Option("--top", min=0, metavar="K", help="How many eigenvalues at each end.")] = 10,
    density: Annotated[bool, typer.Option("--density", help="Estimate the density of all eigenvalues too.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="F.png", help="Draw them.")] = None,
    part: PartOption = PartName.hessian,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Extreme eigenvalues with the residual ||Hv - lambda v|| of each, and the spectral density."""
    from disthess import api
    from disthess.cli import tables
    from disthess.pictures import files as pictures

    opened = api.open_store(store)
    pairs = api.eigenvalues(opened, k=top, part=part.value, seed=seed) if top else None
    curve = api.spectral_density(opened, part=part.value, seed=seed) if density or plot else None
    if plot is not None and curve is not None:
        tables.draw(pictures.spectrum_picture, plot, curve, pairs)
    if as_json:
        print_json(tables.spectrum_summary(part.value, pairs, curve if density else None))
        return
    tables.print_spectrum(part.value, pairs, curve if density else None)
    if plot is not None:
        typer.echo(f"picture: {plot}")


def lowrank(
    store: StoreArgument,
    rank: Annotated[int, typer.Option("--rank", min=1, metavar="R", help="How many eigenpairs to keep.")] = 50,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="F.npz", help="Save values [R] and vectors [P, R].")
    ] = None,
    method: Annotated[
        RankMethod, typer.Option("--method", help="Random range; all eigenpairs of largest size; or one pass.")
    ] = RankMethod.randomised,
    part: PartOption = PartName.hessian,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """The matrix as V diag(values) V^T of low rank, with what that leaves out and bounds of it."""
    from disthess import api
    from disthess.cli import tables

    found = api.low_rank(api.open_store(store), rank, method=method.value, part=part.value, seed=seed)
    if out is not None:
        tables.save_arrays(out, values=found.values, vectors=found.vectors)
    if as_json:
        print_json(tables.low_rank_summary(part.value, found))
    else:
        tables.print_low_rank(part.value, found, out)


def kronecker(
    store: StoreArgument,
    layers: Annotated[
        list[str] | None,
        typer.Argument(metavar="LAYER", help="Modules (with their biases) or weights; default all layers."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="CONFIG", help="Its run file: factors by expectation (K-FAC's) beside the nearest."
        ),
    ] = None,
    part: PartOption = PartName.hessian,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write the factors as safetensors, as K-FAC libraries do."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Kronecker factors of each layer's own block, nearest in Frobenius norm, and how far from it they are.

    With --config also those by expectation, from the problem; --out then writes these, else the nearest. A Kronecker
    product that is far away is printed as readily as a near one: read the error.
    """
    from disthess import api, factors
    from disthess.cli import point_tables
    from disthess.loading import load_problem

    opened = api.open_store(store)
    names = layers or factors.layer_names(opened)
    found = [factors.kronecker(opened, name, part=part.value) for name in names]
    expected = []
    if config is not None:
        problem = load_problem(settings_of(config).source(config))
        expected = [
            factors.kronecker(problem, name, kind="expectation", part=part.value, store=opened) for name in names
        ]
    if out is not None:
        factors.save_factors(out, expected or found)
    if as_json:
        print_json([point_tables.kronecker_summary(entry) for entry in (*found, *expected)])
    else:
        point_tables.print_kronecker(found, expected, out)
