"""Verifying a whole store, and mending exactly what is damaged with the problem at hand.

`Store.verify` reads everything again; here come the sums over uses, which only reading the uses can prove, and computing again
what was damaged: those tiles, the sums, gradient and loss, certificates. Nothing else is touched.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from disthess.api import compute_tiles, finish, options_of, root_attributes
from disthess.errors import StoreError
from disthess.fingerprint import fingerprint
from disthess.prepare import Options, Prepared, prepare
from disthess.problem import Problem
from disthess.reduce.shared import wrong_sums
from disthess.store.fingerprint import differences
from disthess.store.lock import StoreLock
from disthess.store.place import place_of
from disthess.store.restore import restore_root
from disthess.store.store import Store
from disthess.store.verify import VerifyReport

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair found and did.

    Attributes:
        found: What was damaged.
        computed: Numbers of the tiles that were computed again.
        missing: Tiles that are not done, because an earlier run was not finished; `compute` resumes them.
        removed: Paths of damaged results, which were removed; of them certificates were made again.
        root_restored: Whether the store's own ``zarr.json`` was written again.
    """

    found: VerifyReport
    computed: tuple[int, ...]
    missing: int
    removed: tuple[str, ...]
    root_restored: bool


def verify(path: str | os.PathLike[str], *, progress: Progress | None = None) -> VerifyReport:
    """Read everything in a store again: metadata, ledger, tiles, sums over uses, gradient, loss, results.

    Raises:
        StoreError: There is no store, or its own ``zarr.json`` is damaged.
    """
    store = Store.open(path)
    return with_sums(store, store.verify(progress=progress))


def repair(
    problem: Problem,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool | None = None,
    certify: bool = True,
    **options: Any,
) -> RepairReport:
    """Verify a store and compute again exactly what is damaged; the arrays are then those of the undisturbed store.

    Bytes are equal on the same hardware at equal threads per worker. A damaged result is removed.

    Args:
        problem: The problem that the store belongs to.
        path: The store.
        seed: Of the certificates, where they are made again.
        progress: As for `compute`.
        certify: As for `compute`.
        **options: Those that the store was computed with, as for `compute`.

    Returns:
        What was found and done.

    Raises:
        StoreError: The store belongs to another problem, or cannot be written.
        DisthessError: As `compute`.
    """
    chosen = options_of(options)
    return repair_prepared(prepare(problem, chosen), chosen, path, seed=seed, progress=progress, certify=certify)


def repair_prepared(
    prepared: Prepared,
    options: Options,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool | None = None,
    certify: bool = True,
) -> RepairReport:
    """`repair` for a problem that has been prepared."""
    place = place_of(path)
    identity = fingerprint(prepared.problem, prepared.names, prepared.plan)
    with StoreLock(place) as lease:
        restored = restore_root(place, prepared.plan.layout, root_attributes(prepared.plan, identity, options.sections))
        store = Store.open(place, writable=True)
        store.hold(lease)
        differing = differences(store.attributes.get("fingerprint", {}), identity)
        if differing:
            raise StoreError(
                f"{place.name} holds the Hessian of another problem: {'; '.join(differing[:5])}. Nothing was changed; give the run "
                f"file that it was computed from."
            )
        if restored and store.is_reduced():
            # What a run adds to the root in the end was lost with it.
            store.mark_reduced(False)
        found = store.verify(repair=True)
        wrong = wrong_sums(store) if store.is_reduced() and not store.missing_tiles() else []
        if wrong:
            store.mark_reduced(False)
            for name in [name for name in store.result_names() if name.startswith("certificate/")]:
                store.remove_result(name)
        found = dataclasses.replace(found, damaged=(*found.damaged, *wrong))
        tiles = tuple(sorted({entry.tile for entry in found.damaged if entry.kind == "tile"}))
        compute_tiles(store, prepared, options, progress, tiles)
        missing = len(store.missing_tiles())
        if not missing and (found.damaged or restored):
            finish(store, prepared, seed=seed, certify=certify)
        store.hold(None)
    removed = tuple(entry.where for entry in found.damaged if entry.kind == "result")
    return RepairReport(found, tiles, missing, removed, restored)


def with_sums(store: Store, report: VerifyReport) -> VerifyReport:
    """A report with the sums over uses compared too, where what they are made of is whole."""
    if report.missing or any(entry.kind in ("tile", "sum", "metadata", "ledger") for entry in report.damaged):
        return report
    wrong = wrong_sums(store) if store.is_reduced() else []
    return dataclasses.replace(report, damaged=(*report.damaged, *wrong))
