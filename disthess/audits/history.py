"""The audits of one training, one after another, in a Zarr group; `disthess.store.audit_group` says how it lies on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, final

import numpy as np
from typing_extensions import override

from disthess.audits.encode import record_from_json, record_to_json
from disthess.audits.record import AuditRecord
from disthess.errors import StoreError
from disthess.store.audit_group import AuditGroup, at_once, damaged_entry
from disthess.store.place import AbstractPlace

_NAMES = "array_names"
_KINDS = ("density", "block_density", "coupling", "norm", "trace")


@final
class History:
    """An open history. ``History.open`` and ``History.open_or_create`` make one.

    Reading is safe at any time and from anywhere, and sees what others append. Each array of a record is read, and checked,
    when it is asked for; a record without them costs a few kilobytes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     history = History.open_or_create(folder + "/audits.zarr")
    ...     history.append(AuditRecord("ab12", "step_10.pt", 10, "2026-01-01T00:00:00+00:00", 1.5, 40, {}, ()))
    ...     [record.checkpoint for record in history.records()], history.has("ab12")
    (['step_10.pt'], True)
    """

    def __init__(self, group: AuditGroup) -> None:
        self._group = group
        self._known: dict[str, AuditRecord] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str] | AbstractPlace) -> History:
        """Open a history, at a path or the URL of an object store.

        Raises:
            StoreError: Nothing is there, it is something else, damaged, or of a newer version.
        """
        return cls(AuditGroup.open(path))

    @classmethod
    def open_or_create(cls, path: str | os.PathLike[str] | AbstractPlace) -> History:
        """Open a history, or make an empty one where nothing is.

        Raises:
            StoreError: Something else is there, it is damaged, or cannot be written.
        """
        return cls(AuditGroup.open_or_create(path))

    @property
    def path(self) -> str:
        """Where it is: a path or a URL."""
        return self._group.path

    def records(self) -> tuple[AuditRecord, ...]:
        """All audits in the order in which they were appended; one that replaced another has its place.

        Raises:
            StoreError: One of them is damaged; the message says which, and what to do.
        """
        return tuple(self._by_name().values())

    def has(self, key: str) -> bool:
        """Whether there is an audit of that key: of that checkpoint, on those data, by those settings.

        Raises:
            StoreError: As for `records`.
        """
        return any(record.key == key for record in self._by_name().values())

    def append(self, record: AuditRecord, *, replace: bool = False) -> None:
        """Add an audit at the end: whole, or not at all.

        Args:
            record: The audit. Its arrays are kept as float64.
            replace: Whether an audit of the same key is replaced, in its place, and not refused.

        Raises:
            StoreError: There is an audit of that key already, the history cannot be written, or others have been writing it
                for two minutes.
            ValueError: The record is not one that can be read again.
        """
        arrays = {name: np.asarray(value, dtype=np.float64) for name, value in record.arrays.items()}
        names = _stored_names(list(arrays))
        attributes = {**record_to_json(record), _NAMES: names}
        with self._group.writer():
            before = [name for name, known in self._by_name().items() if known.key == record.key]
            if before and not replace:
                raise StoreError(
                    f"The history {self.path} has an audit of {record.checkpoint} on the same data with the same settings "
                    f"already (key {record.key}). Nothing was changed; ask for it to be replaced to measure it again."
                )
            stored = {stored: arrays[name] for stored, name in names.items()}
            self._group.add(stored, attributes, before[-1] if before else None)

    def _by_name(self) -> dict[str, AuditRecord]:
        """Records by the names of their entries, in order."""
        while True:
            names = self._group.names()
            try:
                new = [name for name in names if name not in self._known]
                known = {**self._known, **dict(zip(new, at_once(self._record, new), strict=True))}
                found = {name: known[name] for name in names}
            except StoreError:
                # An entry that was replaced while it was read is gone, and not damaged.
                if self._group.names() == names:
                    raise
            else:
                self._known = found
                return dict(found)

    def _record(self, name: str) -> AuditRecord:
        attributes = self._group.attributes(name)
        try:
            names = attributes.get(_NAMES)
            if not isinstance(names, Mapping) or not all(isinstance(text, str) for text in names.values()):
                raise ValueError(f"{_NAMES} is {names!r:.80}, not a mapping of texts")
            arrays = _StoredArrays(self._group, name, {text: stored for stored, text in names.items()})
            return record_from_json(attributes, arrays)
        except ValueError as error:
            raise damaged_entry(self.path, name, error) from error


@final
class _StoredArrays(Mapping[str, np.ndarray]):
    """The arrays of one entry, each read when it is asked for."""

    def __init__(self, group: AuditGroup, name: str, keys: dict[str, str]) -> None:
        self._group = group
        self._name = name
        self._keys = keys

    @override
    def __getitem__(self, key: str) -> np.ndarray:
        return self._group.array(self._name, self._keys[key])

    @override
    def __contains__(self, key: Any) -> bool:
        return key in self._keys

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    @override
    def __len__(self) -> int:
        return len(self._keys)


def _stored_names(names: list[str]) -> dict[str, str]:
    """What each array is called in the store, and its own name: names of blocks may have any letters in them.

    >>> _stored_names(["density/grid", "tile/../a", "tile/b"])
    {'density_grid': 'density/grid', 'tile_0': 'tile/../a', 'tile_1': 'tile/b'}
    """
    stored: dict[str, str] = {}
    for name in names:
        kind, _, rest = name.partition("/")
        if kind in _KINDS and rest.isascii() and rest.isalpha():
            stored[f"{kind}_{rest}"] = name
        else:
            stored[f"tile_{sum(key.startswith('tile_') for key in stored)}"] = name
    return stored
