"""What ``disthess verify`` does and prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from disthess.cli.options import settings_of

if TYPE_CHECKING:
    from disthess.store.cache import CacheStore
    from disthess.store.verify import VerifyReport

_DAMAGED_ROWS = 20


def verify_store(path: str, repair: bool, config: Path | None) -> dict[str, Any]:
    """Read a store again; with ``repair`` mend it, as far as can be without the problem or, with a run file, wholly."""
    from disthess.store.cache import CacheStore, is_cache

    if is_cache(path):
        return _verified_cache(path, CacheStore.open(path, writable=repair), repair, config)
    if config is not None:
        return _repaired(path, config)
    # Verifying loads torch only where sums over uses are compared; the store alone needs none.
    from disthess.store.lock import StoreLock
    from disthess.store.store import Store

    if repair:
        with StoreLock(path) as lease:
            store = Store.open(path, writable=True)
            store.hold(lease)
            report = store.verify(repair=True)
    else:
        from disthess.mend import with_sums

        store = Store.open(path)
        report = with_sums(store, store.verify())
    return _summary(path, report, len(store.layout.tiles))


def print_verification(report: Mapping[str, Any]) -> None:
    """How many tiles are whole, damaged, missing; each damage in a line; what to do."""
    damaged, path = report["damaged"], report["path"]
    tiles = sum(entry["kind"] == "tile" for entry in damaged)
    others = f", {len(damaged) - tiles} other places damaged" if len(damaged) > tiles else ""
    typer.echo(
        f"{path}: {report['checked']} of {report['tiles']} tiles read again, {tiles} damaged, {report['missing']} missing{others}"
    )
    for entry in damaged[:_DAMAGED_ROWS]:
        typer.echo(f"  {entry['place']}: {entry['message']}")
    if len(damaged) > _DAMAGED_ROWS:
        typer.echo(f"  ... and {len(damaged) - _DAMAGED_ROWS} more; --json lists all")
    if report["unmarked"]:
        typer.echo(
            f"{report['unmarked']} of the missing tiles have data that nobody marked; running again computes them"
        )
    if report["root_restored"]:
        typer.echo("the store's zarr.json was damaged and has been written again")
    if report["computed"] is not None:
        typer.echo(f"computed again: {len(report['computed'])} tiles {report['computed'] or ''}".rstrip())
    elif report["repaired"]:
        typer.echo("mended; what is missing now is computed by 'disthess run' with the same run file")
    elif damaged:
        typer.echo(
            f"'disthess verify {path} --repair --config CONFIG' computes exactly that again; without --config it is marked as "
            "missing"
        )
    if report["missing"] and not report["repaired"]:
        typer.echo("'disthess run' with the same run file computes what is missing")


def _verified_cache(path: str, cache: CacheStore, repair: bool, config: Path | None) -> dict[str, Any]:
    """The tiles of a cache are its chunks; what is damaged is forgotten, and computed again when it is asked for."""
    from disthess.errors import ConfigError
    from disthess.store.lock import StoreLock

    if config is not None:
        raise ConfigError(
            f"{path} is a cache of blocks: leave out --config. What is damaged is computed when it is asked for."
        )
    if not repair:
        report = cache.verify()
        return _summary(path, report, report.checked)
    with StoreLock(path) as lease:
        cache.hold(lease)
        report = cache.verify(repair=True)
    return _summary(path, report, report.checked)


def _repaired(path: str, config: Path) -> dict[str, Any]:
    settings = settings_of(config)
    from disthess.loading import load_problem
    from disthess.mend import repair_prepared
    from disthess.prepare import Options, prepare

    options = Options(**settings.plan_options(), address=settings.compute.address)
    prepared = prepare(load_problem(settings.source(config)), options)
    done = repair_prepared(prepared, options, path, seed=settings.compute.seed)
    tree = _summary(path, done.found, len(prepared.plan.layout.tiles))
    return {
        **tree,
        "whole": done.missing == 0,
        "missing": done.missing,
        "computed": list(done.computed),
        "root_restored": done.root_restored,
    }


def _summary(path: str, report: VerifyReport, tiles: int) -> dict[str, Any]:
    return {
        "path": path,
        "whole": report.ok and report.missing == 0,
        "tiles": tiles,
        "checked": report.checked,
        "missing": report.missing,
        "unmarked": report.unmarked,
        "damaged": [
            {"tile": entry.tile, "kind": entry.kind, "place": entry.place, "message": entry.message}
            for entry in report.damaged
        ],
        "repaired": report.repaired,
        "computed": None,
        "root_restored": False,
    }
