"""Verbs that read a store: info, block, activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from disthess.cli.options import (
    JsonOption,
    MetricName,
    OutOption,
    PairsOf,
    PartName,
    PartOption,
    StoreArgument,
    print_json,
)
from disthess.errors import ConfigError


def info(
    store: StoreArgument,
    pairs: Annotated[bool, typer.Option("--pairs", help="A table of all pairs of blocks instead.")] = False,
    of: Annotated[PairsOf, typer.Option("--of", help="Whose pairs.")] = PairsOf.parameters,
    metric: Annotated[
        MetricName,
        typer.Option("--metric", help="Sort and draw by: Frobenius norm, coupling C, stable rank D, GN-gap, or trace."),
    ] = MetricName.norm,
    part: PartOption = PartName.hessian,
    top: Annotated[int, typer.Option("--top", min=1, metavar="K", help="How many pairs to print.")] = 20,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="F.csv", help="Write all pairs as CSV.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="F.png", help="Draw the metric as a heat map.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a store holds: parameters, uses, activations, tiles, loss, certificates; or, with --pairs, how blocks relate.

    Of each pair: Frobenius norm (resonance R), coupling C = |H_vw| / sqrt(|H_vv| |H_ww|), stable rank D = |H|_F^2 / |H|_2^2,
    GN-gap = |residual| / |ggn| (where the ggn is stored), and the trace of diagonal blocks.
    """
    from disthess import api
    from disthess.cli import blocks, pair_tables, tables
    from disthess.store.cache import is_cache

    if is_cache(store):
        if pairs:
            raise ConfigError(f"{store} is a cache of single blocks; --pairs needs a store of all of them.")
        blocks.print_cache(store, as_json)
        return
    opened = api.open_store(store)
    if pairs:
        table = opened.pairs(part=part.value, of=of.value)
        pair_tables.write_pairs(table, metric.value, csv, plot)
        if as_json:
            print_json(table.to_json())
        else:
            pair_tables.print_pairs(table, metric.value, top, csv, plot)
    elif as_json:
        print_json(tables.store_summary(opened))
    else:
        tables.print_store(opened)


def block(
    store: StoreArgument,
    a: Annotated[str, typer.Argument(metavar="A", help="Parameter of the rows.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Parameter of the columns.")],
    part: PartOption = PartName.hessian,
    out: OutOption = None,
    use: Annotated[
        bool, typer.Option("--use", help="A and B are single uses, parameter@node, of shared parameters.")
    ] = False,
    rows: Annotated[str, typer.Option("--rows", metavar="I:J", help="Which entries of A, flattened.")] = "",
    cols: Annotated[str, typer.Option("--cols", metavar="I:J", help="Which entries of B, flattened.")] = "",
    compute: Annotated[
        bool, typer.Option("--compute", help="Compute what is not there, check it, and keep it; needs --config.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="CONFIG", help="With --compute: the run file of the problem.")
    ] = None,
) -> None:
    """Show or save one block: d2L / dA dB, the entries of A by the entries of B.

    A and B are parameters, named sections, or ranges such as `in_proj_weight[0:64]`. With --compute a STORE that is not there is
    made, as a cache of single blocks, for models whose Hessian nobody could store; what it will cost is said first.
    """
    from disthess import api
    from disthess.cli import blocks, tables

    if compute != (config is not None):
        raise ConfigError("--compute and --config CONFIG go together: the run file says of which problem.")
    if use and (compute or rows or cols):
        raise ConfigError("--use reads whole blocks of a store that is done; leave out --rows, --cols and --compute.")
    if use:
        values = api.open_store(store).use_block(a, b, part=part.value)
    else:
        sides = blocks.side_of(a, rows), blocks.side_of(b, cols)
        values = blocks.read_block(store, *sides, part.value, config)
    if out is not None:
        tables.save_array(out, values)
    shown = [f"{name}, entries {given}," if given else name for name, given in ((a, rows), (b, cols))]
    tables.print_block(values, f"{part.value} of {shown[0]} by {shown[1]}".rstrip(","), out)


def activations(
    store: StoreArgument,
    v: Annotated[str | None, typer.Argument(metavar="[V", help="Node or module of the rows.")] = None,
    w: Annotated[str | None, typer.Argument(metavar="W]", help="Node or module of the columns.")] = None,
    part: PartOption = PartName.hessian,
    per_sample: Annotated[bool, typer.Option("--per-sample", help="[n, V, W], where that was kept.")] = False,
    out: OutOption = None,
) -> None:
    """List the stored activations, or show or save one block H^f of two of them: sum over samples of d2L / dV dW."""
    from disthess import api
    from disthess.cli import pair_tables, tables

    opened = api.open_store(store)
    if v is None or w is None:
        pair_tables.print_activations(opened)
        return
    values = opened.activation_block(v, w, part=part.value, per_sample=per_sample)
    if out is not None:
        tables.save_array(out, values)
    pair_tables.print_activation_block(values, f"{part.value} of {v} by {w}", out)
