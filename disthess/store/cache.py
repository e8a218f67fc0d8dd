"""A cache of single blocks of a Hessian too large to be stored: one sparse array, and a record for each chunk that is there.

```
model.zarr/         attrs: cache (the schema), dtype, chunk, parameters, fingerprint, checksum of these
  hessian           [P, P] in user order, square chunks, NaN where nothing is; of two chunks (i, j) and (j, i) the one with i <= j
  ledger/{i}.{j}    a group without members; attrs: crc32c of the chunk, error of its certificate, seconds
```
What nobody asked for takes no space: neither a chunk nor a record. A chunk is data first, record after.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import zarr

from disthess.errors import StoreError
from disthess.store.encode import from_json, to_json
from disthess.store.found import Damage
from disthess.store.layout import Attributes, ParameterSpec
from disthess.store.lock import StoreLock
from disthess.store.make import refuse_existing, writing
from disthess.store.place import ROOT, AbstractPlace, first_line, place_of
from disthess.store.raw import MOST_METADATA_BYTES
from disthess.store.seal import SEAL, is_unbroken, sealed
from disthess.store.verify import VerifyReport
from disthess.store.zarrays import checksum_rows, create_plain, create_root, open_group
from disthess.types import DType, Span

CACHE_SCHEMA = 1
ARRAY = "hessian"
LEDGER = "ledger"
MOST_CHUNK = 1 << 14
MOST_ROWS = 1 << 40

_OWN = frozenset({"cache", "dtype", "chunk", "parameters", "fingerprint", SEAL})
_RECORD = re.compile(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """What is known of a chunk that is there.

    Attributes:
        row: Number of its rows on the grid of chunks.
        column: Number of its columns; not less.
        crc32c: Over its bytes.
        error: Of the certificate: ``|H x - y| / (|H|_F |x| / sqrt(n))`` where ``y`` is the eager model's product; see ``against``.
        against: Which product that was.
        dtype: What it was computed in, the store's dtype or wider.
        seconds: Of computing all the chunks that were computed with it.
    """

    row: int
    column: int
    crc32c: int
    error: float
    against: str
    dtype: str
    seconds: float


@final
class CacheStore:
    """An open cache. ``CacheStore.create`` and ``CacheStore.open`` make one.

    Reading is safe from several threads and processes; writing belongs to one at a time, which holds a ``StoreLock``.
    """

    def __init__(self, place: AbstractPlace, root: zarr.Group, *, writable: bool) -> None:
        self._place = place
        self._root = root
        self._writable = writable
        self._lease: StoreLock | None = None
        attributes = root.attrs.asdict()
        self.chunk, self.dtype, self.parameters = _trusted(attributes, place.name)
        self.numel = sum(parameter.numel for parameter in self.parameters)
        self._array = self._checked_array()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | AbstractPlace,
        parameters: Sequence[ParameterSpec],
        dtype: DType,
        chunk: int,
        attributes: Mapping[str, Any],
    ) -> CacheStore:
        """Make an empty cache, whole or not at all, and open it for writing.

        Args:
            path: Where.
            parameters: In user order; of each name, aliases, shape and weight decay are kept.
            dtype: Of the entries.
            chunk: Rows and columns of a chunk.
            attributes: ``fingerprint``, and what else should be said of it.

        Raises:
            StoreError: Something is at ``path`` already, or it cannot be written there.
        """
        place = place_of(path)
        if not place.is_free():
            refuse_existing(place)
        numel = sum(parameter.numel for parameter in parameters)
        told = [
            {"name": p.name, "aliases": list(p.aliases), "shape": list(p.shape), "weight_decay": p.weight_decay}
            for p in parameters
        ]
        fixed = {"cache": CACHE_SCHEMA, "dtype": dtype, "chunk": chunk, "parameters": told}

        def build(target: Any) -> None:
            root = create_root(target, sealed({**to_json(attributes), **fixed}))
            root.require_group(LEDGER)
            create_plain(root, ARRAY, (numel, numel), np.dtype(dtype), (chunk, chunk), float("nan"))

        with writing(place.name, "its metadata", 0):
            place.make(build)
        return cls.open(place, writable=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str] | AbstractPlace, writable: bool = False) -> CacheStore:
        """Open what ``create`` made.

        Raises:
            StoreError: Nothing is there, it is no cache, damaged, of a newer schema, or not writable.
        """
        place = place_of(path)
        place.check_group()
        try:
            root = open_group(place, writable=writable)
            schema = root.attrs.asdict().get("cache")
        except Exception as error:
            raise StoreError(
                f"The cache {place.name} cannot be opened: its zarr.json is damaged or is no Zarr group of format 3 "
                f"({first_line(error)}). Remove it and ask again."
            ) from error
        if not isinstance(schema, int) or schema < 1:
            raise StoreError(
                f"{place.name} is no cache of blocks. If 'disthess run' has written it, open it by disthess.open_store; else "
                f"choose another path."
            )
        if schema > CACHE_SCHEMA:
            raise StoreError(
                f"The cache {place.name} has schema {schema}; this version of disthess reads {CACHE_SCHEMA}. Install a newer one."
            )
        if writable and not place.is_writable():
            raise StoreError(f"The cache {place.name} cannot be written by this user. Change its permissions.")
        return cls(place, root, writable=writable)

    @property
    def path(self) -> str:
        """Where it is: a path or a URL."""
        return self._place.name

    @property
    def place(self) -> AbstractPlace:
        """The same, as what it is read and written by."""
        return self._place

    @property
    def attributes(self) -> Attributes:
        """What the root says."""
        return {key: from_json(value) for key, value in self._root.attrs.asdict().items() if key != SEAL}

    @property
    def chunks(self) -> int:
        """How many chunks a row of the whole matrix has."""
        return -(-self.numel // self.chunk)

    def hold(self, lease: StoreLock | None) -> None:
        """Write only while the lease is ours, from now on; None: no longer ask it."""
        self._lease = lease

    def span(self, number: int) -> Span:
        """Rows (or columns) of a chunk of that number."""
        return Span(number * self.chunk, min((number + 1) * self.chunk, self.numel))

    # -- chunks

    def has(self, row: int, column: int) -> bool:
        """Whether a chunk is there, or its transpose."""
        return self._place.has(f"{LEDGER}/{min(row, column)}.{max(row, column)}/{ROOT}")

    def read(self, row: int, column: int) -> np.ndarray:
        """A chunk, from its transpose where ``row > column``; what nobody asked for is refused.

        Raises:
            StoreError: It is not there, or damaged.
        """
        if row > column:
            return self.read(column, row).T
        if not self.has(row, column):
            raise StoreError(f"{self._where(row, column)} of {self.path} has not been computed.")
        values, message = self._load(row, column)
        if values is None or message:
            raise StoreError(
                f"{self._where(row, column)} of {self.path} is damaged: {message}. Run 'disthess verify {self.path} --repair', "
                f"which forgets it, and ask again."
            )
        return values

    def write(self, row: int, column: int, values: np.ndarray) -> int:
        """Write a chunk, and say nothing of it in the ledger; returns its crc32c.

        Raises:
            StoreError: The disk is full or cannot be written, or the lease was lost.
            ValueError: Shape or dtype is not the chunk's, or a value is not finite.
        """
        self._check_writable()
        rows, columns = self.span(row), self.span(column)
        if row > column or values.shape != (rows.size, columns.size) or values.dtype != np.dtype(self.dtype):
            raise ValueError(f"chunk {row}, {column} cannot hold {values.shape} of {values.dtype}")
        if not np.isfinite(values).all():
            raise ValueError(f"chunk {row}, {column} has values that are not finite")
        with writing(self.path, self._where(row, column), values.nbytes):
            self._array[rows.start : rows.stop, columns.start : columns.stop] = values
        return checksum_rows(0, values)

    def mark(self, record: ChunkRecord) -> None:
        """Say that a chunk is there, whose data has been written.

        Raises:
            StoreError: The disk is full or cannot be written, or the lease was lost.
        """
        self._check_writable()
        told = {name: value for name, value in dataclasses.asdict(record).items() if name not in ("row", "column")}
        tree = {"zarr_format": 3, "node_type": "group", "attributes": sealed(told)}
        with writing(self.path, "the ledger", 0):
            self._place.write(f"{LEDGER}/{record.row}.{record.column}/{ROOT}", json.dumps(tree).encode())

    def forget(self, row: int, column: int) -> None:
        """Take a chunk for one that nobody asked for."""
        self._check_writable()
        name = f"{LEDGER}/{row}.{column}"
        self._place.remove(f"{name}/{ROOT}")
        if self._place.holds(name):
            self._place.withdraw(name)
        self._place.remove(f"{ARRAY}/c/{row}/{column}")

    def record(self, row: int, column: int) -> ChunkRecord:
        """What is known of a chunk.

        Raises:
            StoreError: It is not there, or its record is damaged.
        """
        data = self._place.read(f"{LEDGER}/{row}.{column}/{ROOT}")
        if data is None:
            raise StoreError(f"{self._where(row, column)} of {self.path} has not been computed.")
        try:
            found = json.loads(data)["attributes"] if len(data) < MOST_METADATA_BYTES else None
            if not isinstance(found, dict) or not is_unbroken(found, needed=True):
                raise ValueError("it does not have the checksum that it was written with")
            told = {key: from_json(value) for key, value in found.items() if key != SEAL}
            return ChunkRecord(row=row, column=column, **told)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StoreError(
                f"The record of {self._where(row, column)} of {self.path} is damaged ({first_line(error)}). Run 'disthess verify "
                f"{self.path} --repair', which forgets it, and ask again."
            ) from error

    def present(self) -> tuple[tuple[int, int], ...]:
        """Numbers (row, column) of all chunks that are there, sorted."""
        found = [_RECORD.fullmatch(name) for name in self._place.children(LEDGER)]
        pairs = [(int(match[1]), int(match[2])) for match in found if match]
        return tuple(sorted(pair for pair in pairs if pair[0] <= pair[1] < self.chunks and self.has(*pair)))

    def verify(self, repair: bool = False, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read every chunk again and compare it with its record.

        Args:
            repair: Forget what is damaged, so that asking again computes it. Only while nobody else writes.
            progress: Called with (chunks read, chunks to read) after each.
        """
        if repair:
            self._check_writable()
        damaged, pairs = [], self.present()
        for count, (row, column) in enumerate(pairs, start=1):
            try:
                self.read(row, column)
            except StoreError as error:
                damaged.append(
                    Damage(-1, self._where(row, column), first_line(error), where=f"{ARRAY}/c/{row}/{column}")
                )
                if repair:
                    self.forget(row, column)
            if progress is not None:
                progress(count, len(pairs))
        unmarked = [pair for pair in self._written() if not self.has(*pair)]
        if repair:
            for row, column in unmarked:
                self.forget(row, column)
            self._place.remove_leftovers([])
        side = self.chunk * self.chunk * np.dtype(self.dtype).itemsize
        return VerifyReport(
            checked=len(pairs),
            missing=0,
            damaged=tuple(damaged),
            repaired=repair and bool(damaged),
            checked_bytes=len(pairs) * side,
            unmarked=len(unmarked),
        )

    def _written(self) -> Iterator[tuple[int, int]]:
        """Chunks that have data, marked or not."""
        for row in self._place.children(f"{ARRAY}/c"):
            for column in self._place.children(f"{ARRAY}/c/{row}"):
                if row.isdecimal() and column.isdecimal():
                    yield int(row), int(column)

    def _load(self, row: int, column: int) -> tuple[np.ndarray | None, str]:
        rows, columns = self.span(row), self.span(column)
        try:
            record = self.record(row, column)
            values = np.asarray(self._array[rows.start : rows.stop, columns.start : columns.stop])
        except (StoreError, ValueError, OSError) as error:
            return None, first_line(error)
        checksum = checksum_rows(0, values)
        if np.isnan(values).any():
            return None, "its data is not there"
        if checksum != record.crc32c:
            return None, f"its crc32c is {checksum:#010x}, its record says {record.crc32c:#010x}"
        return values, ""

    def _where(self, row: int, column: int) -> str:
        rows, columns = self.span(row), self.span(column)
        return f"rows {rows.start} to {rows.stop - 1}, columns {columns.start} to {columns.stop - 1}"

    def _checked_array(self) -> Any:
        try:
            array = self._root[ARRAY]
            form = (array.shape, array.chunks, array.dtype)  # type: ignore[union-attr]
        except Exception as error:
            raise StoreError(
                f"The array of the cache {self.path} cannot be used ({first_line(error)}). Remove the cache and ask again."
            ) from error
        if form != ((self.numel,) * 2, (self.chunk,) * 2, np.dtype(self.dtype)):
            raise StoreError(
                f"The array of the cache {self.path} is not what its zarr.json says. Remove the cache and ask again."
            )
        return array

    def _check_writable(self) -> None:
        if not self._writable:
            raise StoreError(f"The cache {self.path} is open for reading only.")
        if self._lease is not None:
            self._lease.check()


def is_cache(path: str | os.PathLike[str]) -> bool:
    """Whether a cache of blocks is there; no error where nothing is."""
    place = place_of(path)
    try:
        data = place.read(ROOT)
        return data is not None and len(data) < MOST_METADATA_BYTES and "cache" in json.loads(data)["attributes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _trusted(attributes: Mapping[str, Any], path: str) -> tuple[int, DType, tuple[ParameterSpec, ...]]:
    """Chunk, dtype and parameters, once they are certain."""
    try:
        if not is_unbroken(attributes, needed=True):
            raise ValueError("its attributes do not have the checksum that they were written with")
        chunk, dtype = attributes["chunk"], attributes["dtype"]
        specs = tuple(
            ParameterSpec(
                str(entry["name"]),
                tuple(map(str, entry["aliases"])),
                tuple(_size(size) for size in entry["shape"]),
                rank,
                (str(entry["name"]),),
                float(entry["weight_decay"]),
            )
            for rank, entry in enumerate(attributes["parameters"])
        )
        if not isinstance(chunk, int) or not 1 <= chunk <= MOST_CHUNK or dtype not in ("float32", "float64"):
            raise ValueError(f"chunks of {chunk!r} of {dtype!r}")
        if not 0 < sum(spec.numel for spec in specs) <= MOST_ROWS:
            raise ValueError("the sizes of its parameters are out of bounds")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(
            f"The cache {path} cannot be trusted ({first_line(error)}): it is damaged, or disthess has not written it. Remove it "
            f"and ask again."
        ) from error
    return chunk, dtype, specs


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= MOST_ROWS:
        raise ValueError(f"{value!r} is no size")
    return value
