"""The few calls of zarr that every part of the store makes: one kind of array, one way of opening a group.

Arrays are uncompressed little-endian chunks, each followed by its crc32c, so that a flipped byte is an error and not a
number. Consolidated metadata is not used: it would hide arrays written later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.sync import sync

from disthess.store.place import AbstractPlace
from disthess.types import Span

_PIECE_BYTES = 16 << 20


def create_root(store: ZarrStore, attributes: dict[str, Any]) -> zarr.Group:
    """A new group at the root of a Zarr store that holds none."""
    return zarr.create_group(store, zarr_format=3, attributes=attributes)


def open_group(place: AbstractPlace, *, writable: bool, name: str = "") -> zarr.Group:
    """The group of that name at a place, the root for ""; zarr's own errors where there is none."""
    return zarr.open_group(
        place.zarr_store(writable=writable),
        path=name,
        mode="r+" if writable else "r",
        zarr_format=3,
        use_consolidated=False,
    )


def create_plain(
    group: zarr.Group, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: tuple[int, ...], fill: float
) -> Any:
    """An array of uncompressed chunks with crc32c; chunks that equal the fill value are written as well."""
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        fill_value=fill,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        config={"write_empty_chunks": True},
    )


def write_value(group: zarr.Group, name: str, value: np.ndarray) -> None:
    """A new array with its values; large ones in chunks along the first axis."""
    rows = value.shape[0] if value.ndim else 1
    row_bytes = max(1, value.nbytes // max(1, rows))
    chunks = tuple(max(1, size) for size in value.shape)
    if value.ndim:
        chunks = (max(1, min(rows, _PIECE_BYTES // row_bytes)), *chunks[1:])
    fill = float("nan") if value.dtype.kind in "fc" else 0
    array = create_plain(group, name, value.shape, value.dtype, chunks, fill)
    if value.size:
        array[...] = value


def write_entries(writes: Sequence[tuple[Any, np.ndarray, np.ndarray]]) -> None:
    """Write entries of several arrays of one axis side by side, those of one array in order.

    Args:
        writes: Array, places in ascending order, and their values.
    """
    sync(_side_by_side(writes))


async def _side_by_side(writes: Sequence[tuple[Any, np.ndarray, np.ndarray]]) -> None:
    await asyncio.gather(*(_in_order(array, index, values) for array, index, values in writes))


async def _in_order(array: Any, index: np.ndarray, values: np.ndarray) -> None:
    # Runs of neighbours: one chunk may hold many, and is read and written again for each write.
    starts = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist()]
    for start, stop in zip(starts, [*starts[1:], len(index)], strict=True):
        if start < stop:
            await array.async_array.setitem(slice(int(index[start]), int(index[stop - 1]) + 1), values[start:stop])


def checksum_rows(checksum: int, values: np.ndarray) -> int:
    """The crc32c of the bytes of ``values`` in C order and little-endian, going on from ``checksum``; few copies."""
    little = values.dtype.newbyteorder("<")
    rows = max(1, _PIECE_BYTES // max(1, values[:1].nbytes))
    for start in range(0, values.shape[0], rows):
        piece = np.ascontiguousarray(values[start : start + rows], dtype=little)
        checksum = google_crc32c.extend(checksum, piece.reshape(-1).view(np.uint8))
    return checksum


def chunk_spans(region: tuple[Span, Span], chunks: tuple[int, int]) -> list[tuple[int, int]]:
    """Numbers (row, column) of the chunks that meet a region.

    >>> chunk_spans((Span(0, 3), Span(4, 5)), (2, 4))
    [(0, 1), (1, 1)]
    """
    rows, columns = region
    return [
        (row, column)
        for row in range(rows.start // chunks[0], -(-rows.stop // chunks[0]))
        for column in range(columns.start // chunks[1], -(-columns.stop // chunks[1]))
        if rows.size and columns.size
    ]
