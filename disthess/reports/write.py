"""The report: one page about a run's store, or about a history of audits."""

from __future__ import annotations

import os
import re
from pathlib import Path

from disthess.api import open_store
from disthess.audits.history import History
from disthess.errors import ConfigError, StoreError
from disthess.reports.history_page import history_page
from disthess.reports.page import Page
from disthess.reports.render import to_html, write_page
from disthess.reports.run_findings import find_run
from disthess.reports.run_page import run_page
from disthess.store.audit_group import ROOT_MARK
from disthess.store.place import ROOT, place_of
from disthess.store.raw import Objects


def report(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    title: str | None = None,
    top: int = 10,
    seconds: float = 120.0,
) -> Path:
    """Write one self-contained HTML page about a run's store or a history of audits.

    The page needs nothing else: no scripts, no fonts, no network; it opens from a disk, on a telephone, in the dark, and prints.
    The same store or history gives the same bytes.

    Args:
        path: A store that `disthess.compute` wrote, or a history of audits; a directory or the URL of one.
        out: The page; what is there is replaced, as a whole.
        title: Above the page; default what the store or history is called.
        top: Eigenvalues at each end, and rows of tables of the largest.
        seconds: What may be spent on numbers that the store does not hold yet, as estimated from its size. They are kept in the
            store where it can be written; what would take longer is left out, and the page says so and how to have it.

    Returns:
        Where the page is.

    Raises:
        ConfigError: An argument is wrong, or the page cannot be written there.
        StoreError: The path is neither, or damaged.
    """
    if top < 1 or not seconds >= 0:
        raise ConfigError(f"top must be at least 1 and seconds not negative, got {top!r} and {seconds!r}.")
    return write_page(to_html(page_of(path, title=title, top=top, seconds=seconds)), out)


def page_of(path: str | os.PathLike[str], *, title: str | None, top: int, seconds: float) -> Page:
    """The page as a value.

    Raises:
        StoreError: The path is neither a run's store nor a history, or damaged.
    """
    if is_history(path):
        history = History.open(path)
        name = Path(history.path).stem if "://" not in history.path else history.path
        return history_page(history.records(), title or f"Audits: {name}", top, history.path)
    if not place_of(path).exists():
        raise StoreError(
            f"There is neither a store nor a history of audits at {os.fspath(path)}. Check the path: 'disthess run' writes a "
            "store, 'disthess audit' a history."
        )
    store = open_store(path)
    return run_page(store, find_run(store, top, seconds), title, top)


def is_history(path: str | os.PathLike[str]) -> bool:
    """Whether a history of audits is there, a damaged one included."""
    place = place_of(path)
    if not place.exists():
        return False
    try:
        attributes = Objects(place.zarr_store(writable=False)).json(ROOT).get("attributes", {})
        if isinstance(attributes, dict) and attributes:
            return ROOT_MARK in attributes
    except (ValueError, OSError, AttributeError):
        pass
    return any(re.fullmatch(r"\d{6,12}-\d{1,6}", child) for child in place.children())
