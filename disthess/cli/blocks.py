"""What ``disthess block`` reads or computes, and what ``disthess info`` says of a cache of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from disthess.cli.errors import termination_as_interrupt
from disthess.cli.options import print_json, settings_of
from disthess.errors import ConfigError
from disthess.units import human_bytes

if TYPE_CHECKING:
    import numpy as np

    from disthess.types import Part

Side = str | tuple[str, slice]
"""A parameter or section, and which of its entries."""

_PARAMETER_ROWS = 40


def side_of(name: str, given: str) -> Side:
    """A parameter or section with the range ``I:J`` of its entries, where one is given.

    Raises:
        ConfigError: It is no range.
    """
    if not given:
        return name
    left, colon, right = given.partition(":")
    try:
        if not colon:
            raise ValueError(given)
        return name, slice(*(int(end) if end.strip() else None for end in (left, right)))
    except ValueError as error:
        raise ConfigError(f"{given!r} is no range of the entries of {name}; write I:J, for example 0:1024.") from error


def read_block(path: str, a: Side, b: Side, part: Part, config: Path | None) -> np.ndarray:
    """The entries; with a run file those that are missing are computed, after having said what that costs.

    Raises:
        DisthessError: As `disthess.open_cache` or `disthess.open_store`, and their `read`.
    """
    from disthess import api
    from disthess.ondemand import open_cache
    from disthess.store.cache import is_cache

    if is_cache(path) or (config is not None and not api.has_store(path)):
        if part != "hessian":
            raise ConfigError(f"a cache of blocks holds the hessian, not its {part}. Compute a store with that part.")
        if config is None:
            return open_cache(path).read(a, b)
        settings = settings_of(config)
        from disthess.loading import load_problem

        options = settings.plan_options()
        device = options["device"] or "cpu"
        chosen = {key: options[key] for key in ("parameters", "dtype", "memory_bytes")}
        cache = open_cache(path, load_problem(settings.source(config)), device=device, **chosen)
        typer.echo(cache.plan(a, b).describe())
        with termination_as_interrupt():
            return cache.read(a, b, compute=True)
    if config is None:
        return api.open_store(path).read(a, b, part)
    settings = settings_of(config)
    from disthess.loading import load_problem

    options = {**settings.plan_options(), "address": settings.compute.address}
    store = api.open_store(path, load_problem(settings.source(config)), **options)
    with termination_as_interrupt():
        return store.read(a, b, part, compute=True)


def cache_summary(path: str) -> dict[str, Any]:
    """What a cache holds, as JSON."""
    from disthess.ondemand import open_cache

    cache = open_cache(path)
    records, store = cache.records(), cache.store
    item = 8 if cache.dtype == "float64" else 4
    entries = sum(store.span(entry.row).size * store.span(entry.column).size for entry in records)
    return {
        "path": cache.path,
        "kind": "cache",
        "numel": cache.numel,
        "dtype": cache.dtype,
        "chunk": store.chunk,
        "chunks": len(records),
        "entries": entries,
        "nbytes": entries * item,
        "largest_error": max((entry.error for entry in records), default=None),
        "parameters": [
            {"name": entry.name, "shape": list(entry.shape), "numel": entry.numel, "aliases": list(entry.aliases)}
            for entry in cache.parameters
        ],
    }


def print_cache(path: str, as_json: bool) -> None:
    """What a cache holds, for people or as JSON."""
    tree = cache_summary(path)
    if as_json:
        print_json(tree)
        return
    from disthess.cli import tables

    typer.echo(f"cache      {tree['path']}: blocks of the hessian, {tree['dtype']}")
    typer.echo(f"parameters {tree['numel']:,} in {len(tree['parameters'])} tensors")
    typer.echo(
        f"chunks     {tree['chunks']:,} of {tree['chunk']} x {tree['chunk']} are there: {human_bytes(tree['nbytes'])}"
    )
    if tree["largest_error"] is not None:
        typer.echo(f"certificate |B x - y| / |B| at most {tree['largest_error']:.1e}, against the eager model")
    shown = tables.table("", "parameter", "shape", "entries", left=2)
    for entry in tree["parameters"][:_PARAMETER_ROWS]:
        names = entry["name"] + "".join(f" = {alias}" for alias in entry["aliases"])
        shown.add_row(names, " x ".join(map(str, entry["shape"])), f"{entry['numel']:,}")
    tables.show(shown)
    if len(tree["parameters"]) > _PARAMETER_ROWS:
        typer.echo(f"... and {len(tree['parameters']) - _PARAMETER_ROWS} more; --json lists all")
