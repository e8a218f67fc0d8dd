"""A Zarr v3 group of entries that are only ever added, each whole or not there; a history of audits lies in one.

    history.zarr/zarr.json       attributes: {"audits": {"schema": 1}, "checksum": crc32c of the other attributes}
    history.zarr/000000-0/       the first entry. attributes: "audit" (see below), "arrays" (names of its arrays), "checksum"
    history.zarr/000000-0/NAME   an array: little-endian chunks, uncompressed, each with its crc32c
    history.zarr/000001-0/       the second entry ...

The number before the hyphen is the place in the order, the one after it the revision: an entry that replaces another has its
place and the next revision, and of several revisions the highest counts. So no entry that is there is ever changed, and one
that is being replaced is there until its successor is. The attribute ``audit`` is JSON; numbers that are not finite are the
texts ``NaN``, ``Infinity`` and ``-Infinity``. Any Zarr v3 reader can open all of it:

    zarr.open_group("history.zarr", mode="r")["000000-0"].attrs["audit"]["checkpoint"]

An entry becomes visible by one last step: the move of its folder, on an object store the write of its ``zarr.json``. What a
killed writer leaves is no entry, and the next writer removes it. Writers take the lock of the group, as those of a store do.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, final

import numpy as np
from zarr.abc.store import Store as ZarrStore

from disthess.errors import HeldError, StoreError
from disthess.store.check_results import ARRAYS, check_whole
from disthess.store.hostile import check_depth
from disthess.store.lock import StoreLock
from disthess.store.make import writing
from disthess.store.metadata import checked_array, group_trouble
from disthess.store.place import ROOT, AbstractPlace, first_line, place_of
from disthess.store.raw import Objects
from disthess.store.seal import is_unbroken, sealed
from disthess.store.zarrays import create_root, open_group, write_value

SCHEMA = 1
ROOT_MARK = "audits"
ENTRY_MARK = "audit"
MOST_ENTRY_BYTES = 256 << 20
"""All arrays of one entry together."""

READERS = 8
"""Entries that are looked at at a time."""

Answer = TypeVar("Answer")

_ENTRY = re.compile(r"(\d{6,12})-(\d{1,6})")
_PATIENCE_SECONDS = 120.0


@final
class AuditGroup:
    """An open group of entries. ``AuditGroup.open`` and ``AuditGroup.open_or_create`` make one."""

    def __init__(self, place: AbstractPlace) -> None:
        self._place = place
        self._whole: set[str] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str] | AbstractPlace) -> AuditGroup:
        """Open one.

        Raises:
            StoreError: Nothing is there, it is something else, damaged, or of a newer schema.
        """
        place = place_of(path)
        if not place.exists():
            raise StoreError(
                f"There is no audit history at {place.name}. Check the path, or make one with 'disthess audit CONFIG'."
            )
        _check_root(place)
        return cls(place)

    @classmethod
    def open_or_create(cls, path: str | os.PathLike[str] | AbstractPlace) -> AuditGroup:
        """Open one, or make it where nothing is.

        Raises:
            StoreError: Something else is there, or it cannot be written.
        """
        place = place_of(path)
        if not place.exists():
            with _held(place, _PATIENCE_SECONDS), writing(place.name, "the history", 0):
                if place.is_free():
                    place.make(lambda store: create_root(store, sealed({ROOT_MARK: {"schema": SCHEMA}})))
        return cls.open(place)

    @property
    def path(self) -> str:
        """Where it is: a path or a URL."""
        return self._place.name

    def names(self) -> tuple[str, ...]:
        """Names of the entries that count, in order."""
        newest: dict[int, tuple[int, str]] = {}
        for place, revision, name in self._entries():
            newest[place] = max(newest.get(place, (-1, "")), (revision, name))
        return tuple(newest[place][1] for place in sorted(newest))

    def attributes(self, name: str) -> Mapping[str, Any]:
        """What an entry says of itself, as JSON; checked to be what was written.

        Raises:
            StoreError: It is damaged.
        """
        return self._explained(name, lambda: self._checked(name)[0])

    def array(self, name: str, key: str) -> np.ndarray:
        """One of its arrays.

        Raises:
            StoreError: It is damaged, or there is none of that name.
        """

        def read() -> np.ndarray:
            if key not in self._checked(name)[1]:
                raise ValueError(f"it has no array {key!r}")
            root = open_group(self._place, writable=False)
            check_whole(Objects(root), f"{name}/{key}")
            return np.asarray(checked_array(root, f"{name}/{key}", None)[...])

        return self._explained(name, read)

    @contextlib.contextmanager
    def writer(self, patience_seconds: float = _PATIENCE_SECONDS) -> Iterator[None]:
        """Hold the lock while entries are added; what killed writers left is removed first.

        Raises:
            StoreError: Others hold the lock for longer than the patience, or it cannot be written.
        """
        with _held(self._place, patience_seconds):
            self._sweep()
            yield

    def add(self, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any], replaced: str | None = None) -> str:
        """Add an entry at the end, or in place of another; within ``writer``. Returns its name.

        Raises:
            StoreError: The disk is full, or cannot be written; there is then no new entry.
            ValueError: The arrays are more than one entry may have.
        """
        size = sum(array.nbytes for array in arrays.values())
        if size > MOST_ENTRY_BYTES:
            raise ValueError(f"the arrays of one entry have {size:,} bytes, and {MOST_ENTRY_BYTES:,} are allowed")
        if replaced is None:
            name = f"{max((place for place, _, _ in self._entries()), default=-1) + 1:06d}-0"
        else:
            before, revision = replaced.split("-")
            name = f"{before}-{int(revision) + 1}"

        def build(store: ZarrStore) -> None:
            group = create_root(store, sealed({ENTRY_MARK: dict(attributes), ARRAYS: sorted(arrays)}))
            for key, value in arrays.items():
                write_value(group, key, value)

        with writing(self.path, f"the audit {name}", size):
            self._place.publish(name, build)
            if replaced is not None:
                self._place.withdraw(replaced)
        return name

    def _entries(self) -> list[tuple[int, int, str]]:
        """Place, revision and name of every entry that is whole."""
        found = [match for child in self._place.children() if (match := _ENTRY.fullmatch(child)) is not None]
        # What was whole once stays so for as long as it is there: on an object store each question takes its time.
        new = [match[0] for match in found if match[0] not in self._whole]
        self._whole |= {name for name, whole in zip(new, at_once(self._is_whole, new), strict=True) if whole}
        return [(int(match[1]), int(match[2]), match[0]) for match in found if match[0] in self._whole]

    def _is_whole(self, name: str) -> bool:
        return self._place.has(f"{name}/{ROOT}")

    def _sweep(self) -> None:
        entries = {name for _, _, name in self._entries()}
        counted = set(self.names())
        begun = [name for name in self._place.children() if _ENTRY.fullmatch(name) and name not in entries]
        with writing(self.path, "the history", 0):
            self._place.remove_leftovers(begun)
            for name in sorted(entries - counted):
                self._place.withdraw(name)

    def _checked(self, name: str) -> tuple[Mapping[str, Any], list[str]]:
        value = Objects(self._place.zarr_store(writable=False)).json(f"{name}/{ROOT}")
        check_depth(value)
        trouble = group_trouble(value)
        attributes = {} if trouble else value.get("attributes", {})
        if trouble or not isinstance(attributes.get(ENTRY_MARK), Mapping):
            raise ValueError(trouble or "its zarr.json does not say that it is an audit")
        if not is_unbroken(attributes, needed=True):
            raise ValueError("its attributes do not have the checksum that they were written with")
        arrays = attributes.get(ARRAYS)
        if not isinstance(arrays, list) or not all(isinstance(key, str) and "/" not in key for key in arrays):
            raise ValueError(f"its arrays are {arrays!r:.80}, not a list of names")
        return attributes[ENTRY_MARK], arrays

    def _explained(self, name: str, read: Any) -> Any:
        try:
            return read()
        except (ValueError, OSError) as error:
            raise damaged_entry(self.path, name, error) from error


def at_once(ask: Callable[[str], Answer], names: Sequence[str]) -> list[Answer]:
    """The answer for each name, several asked at a time; the first error is raised."""
    if len(names) < 4:
        return [ask(name) for name in names]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(ask, names))


def damaged_entry(path: str, name: str, error: Exception) -> StoreError:
    """What to do about an entry that cannot be trusted."""
    return StoreError(
        f"The audit {name} in the history {path} is damaged ({first_line(error)}). Remove the folder {name} in it and run "
        f"the audit again; the other audits are whole."
    )


def _check_root(place: AbstractPlace) -> None:
    place.check_group()
    try:
        value = Objects(place.zarr_store(writable=False)).json(ROOT)
        check_depth(value)
        trouble = group_trouble(value)
        if trouble:
            raise ValueError(trouble)
        attributes = value.get("attributes", {})
    except (ValueError, OSError) as error:
        raise StoreError(
            f"The audit history {place.name} cannot be opened: its zarr.json is damaged ({first_line(error)}). Its audits lie "
            f"in the numbered folders beside that file; a zarr.json of a new history can be copied there."
        ) from error
    mark = attributes.get(ROOT_MARK)
    schema = mark.get("schema") if isinstance(mark, Mapping) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise StoreError(
            f"{place.name} is a Zarr group, but no audit history. Give the path of a history that 'disthess audit' has "
            f"written, or one where nothing is."
        )
    if schema > SCHEMA:
        raise StoreError(
            f"The audit history {place.name} has schema {schema}; this version of disthess reads schema {SCHEMA}. Install a "
            f"newer one."
        )


@contextlib.contextmanager
def _held(place: AbstractPlace, patience_seconds: float) -> Iterator[None]:
    """The lock, waited for: an entry is written in seconds, and an audit that took an hour should not be lost to another."""
    until = time.monotonic() + patience_seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(StoreLock(place))
                break
            except HeldError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        yield
