"""What the ``zarr.json`` of each array and group of a store must say; and writing it again where it does not.

Reading trusts these files: a shape, a chunk grid or a codec that differs from the layout would give other numbers, or ask for
more memory than there is. So they are compared before an array is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import zarr
from zarr.storage import MemoryStore

from disthess.store.layout import Layout
from disthess.store.raw import Objects
from disthess.store.zarrays import create_plain

LEDGER_FIELDS: tuple[tuple[str, str], ...] = (
    ("checksum", "uint32"),
    ("seconds", "float64"),
    ("written_bytes", "int64"),
    ("peak_bytes", "int64"),
    ("worker", "int32"),
    ("state", "uint8"),
)
"""Columns of the ledger, in the order they are written."""

LEDGER_CHUNK = 8192
"""Rows of the ledger per chunk."""

_CODECS: list[tuple[Any, Any]] = [("bytes", {"endian": "little"}), ("crc32c", {})]
_ONE_BYTE: list[tuple[Any, Any]] = [("bytes", {}), ("crc32c", {})]
_NUMERIC = {
    f"{kind}{size}" for kind, sizes in (("int", (8, 16, 32, 64)), ("uint", (8, 16, 32, 64))) for size in sizes
} | {"float16", "float32", "float64", "complex64", "complex128", "bool"}
_NAN = ("NaN", "0x7ff8000000000000", "0x7fc00000")
_GROUP_KEYS = {"zarr_format", "node_type", "attributes", "consolidated_metadata"}
_ARRAY_KEYS = {
    *("zarr_format", "node_type", "attributes", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value"),
    *("codecs", "storage_transformers", "dimension_names"),
}
_AXES = 8
CHECKSUM_BYTES = 4
"""Of the crc32c at the end of every chunk."""


@dataclass(frozen=True, slots=True)
class ArrayForm:
    """What an array of a store must be.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        chunks: Shape of its chunks.
        fill: What reads where nothing was written: NaN or 0.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    fill: float


def arrays_of(layout: Layout) -> dict[str, ArrayForm]:
    """Every array that a store of this layout has from the start, by its path."""
    nan = float("nan")
    forms = {
        panel.path(part): ArrayForm(
            (panel.rows, panel.columns), layout.dtype, (panel.row_chunk, panel.column_chunk), nan
        )
        for panel in layout.panels
        for part in layout.parts
    }
    forms["gradient"] = ArrayForm((layout.numel,), "float64", (max(1, layout.numel),), nan)
    forms["loss"] = ArrayForm((), "float64", (), nan)
    return {**forms, **ledger_arrays(len(layout.tiles))}


def ledger_arrays(tiles: int) -> dict[str, ArrayForm]:
    """The columns of the ledger, by their paths."""
    chunks = (min(LEDGER_CHUNK, max(1, tiles)),)
    return {f"ledger/{name}": ArrayForm((tiles,), dtype, chunks, 0.0) for name, dtype in LEDGER_FIELDS}


def groups_of(layout: Layout) -> tuple[str, ...]:
    """Every group that a store of this layout has from the start, the root left out."""
    kinds = sorted({panel.kind for panel in layout.panels})
    return ("ledger", *kinds, *(f"{kind}/{part}" for kind in kinds for part in layout.parts))


def array_trouble(value: Any, form: ArrayForm | None) -> str:
    """What is wrong with an array's ``zarr.json``; empty where it is as disthess writes it.

    Args:
        value: The JSON.
        form: What the layout says; None for an array of a result, which may have any numeric form.
    """
    if not isinstance(value, Mapping) or value.get("zarr_format") != 3 or value.get("node_type") != "array":
        return "it does not describe an array of Zarr format 3"
    if not set(value) <= _ARRAY_KEYS:
        return f"it has the unknown keys {_clip(sorted(set(value) - _ARRAY_KEYS))}"
    dtype: Any = value.get("data_type")
    shape: Any = value.get("shape")
    if not isinstance(dtype, str) or dtype not in _NUMERIC:
        return f"its data type is {_clip(dtype)}, not one of numbers"
    chunks = _at(value, "chunk_grid", "configuration", "chunk_shape")
    if _at(value.get("chunk_grid"), "name") != "regular" or not _is_shape(shape, 0) or not _is_shape(chunks, 1):
        return f"its shape {_clip(shape)} or chunk grid {_clip(value.get('chunk_grid'))} is none"
    if len(shape) != len(chunks):
        return f"its shape {_clip(shape)} and its chunks {_clip(chunks)} contradict each other"
    keys = value.get("chunk_key_encoding")
    if _at(keys, "name") != "default" or _at(keys, "configuration", "separator") not in ("/", None):
        return f"its chunk keys are {_clip(keys)}"
    if value.get("storage_transformers"):
        return "it has storage transformers"
    if _codecs(value.get("codecs")) not in (_CODECS, _ONE_BYTE):
        return f"its codecs are {_clip(value.get('codecs'))}, not plain bytes with a crc32c"
    if form is None:
        return ""
    if (dtype, tuple(shape), tuple(chunks)) != (form.dtype, form.shape, form.chunks):
        return (
            f"it says {_clip(dtype)} {_clip(shape)} in chunks of {_clip(chunks)}, the layout {form.dtype} "
            f"{list(form.shape)} in chunks of {list(form.chunks)}"
        )
    fill = value.get("fill_value")
    is_right = fill in _NAN if form.fill != form.fill else fill == 0 and not isinstance(fill, str)
    return "" if is_right else f"its fill value is {_clip(fill)}"


def group_trouble(value: Any) -> str:
    """What is wrong with a group's ``zarr.json``; empty where nothing is."""
    if not isinstance(value, Mapping) or value.get("zarr_format") != 3 or value.get("node_type") != "group":
        return "it does not describe a group of Zarr format 3"
    if not set(value) <= _GROUP_KEYS:
        return f"it has the unknown keys {_clip(sorted(set(value) - _GROUP_KEYS))}"
    return "" if isinstance(value.get("attributes", {}), Mapping) else "its attributes are no mapping"


def checked_array(root: zarr.Group, path: str, form: ArrayForm | None) -> Any:
    """The zarr array at a path, once its ``zarr.json`` has been found right.

    Raises:
        ValueError: It is not; the message says what.
    """
    trouble = array_trouble(Objects(root).json(f"{path}/zarr.json"), form)
    if trouble:
        raise ValueError(trouble)
    try:
        # The setting is no part of the file: without it zarr leaves out chunks that equal the fill value.
        return cast("Any", root[path]).with_config({"write_empty_chunks": True})
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"zarr cannot use it ({type(error).__name__}: {str(error)[:120]})") from error


def read_whole(root: zarr.Group, path: str, form: ArrayForm) -> np.ndarray:
    """A small array of one chunk; a single NaN where its chunk was never written.

    Raises:
        ValueError: Its ``zarr.json`` is wrong, or its chunk is damaged.
        OSError: It cannot be read.
    """
    array = checked_array(root, path, form)
    found = Objects(root).nbytes(f"{path}/{array.metadata.encode_chunk_key((0,) * len(form.shape))}")
    wanted = int(np.prod(form.chunks, dtype=np.int64)) * np.dtype(form.dtype).itemsize + CHECKSUM_BYTES
    if found < 0 and 0 not in form.shape:
        return np.array(np.nan)
    if found not in (wanted, -1):
        raise ValueError(f"its chunk has {found:,} bytes, and {wanted:,} were written")
    return np.asarray(array[...])


def write_array_metadata(objects: Objects, path: str, form: ArrayForm) -> None:
    """Write an array's ``zarr.json`` as it was when the store was made; its chunks are left alone."""
    memory = MemoryStore()
    create_plain(
        zarr.create_group(memory, zarr_format=3), "a", form.shape, np.dtype(form.dtype), form.chunks, form.fill
    )
    objects.write(f"{path}/zarr.json", _bytes_of(memory, "a/zarr.json"))


def write_group_metadata(objects: Objects, path: str, attributes: Mapping[str, Any]) -> None:
    """Write a group's ``zarr.json``."""
    memory = MemoryStore()
    zarr.create_group(memory, zarr_format=3, attributes=dict(attributes))
    objects.write(f"{path}/zarr.json".lstrip("/"), _bytes_of(memory, "zarr.json"))


def _bytes_of(memory: MemoryStore, key: str) -> bytes:
    return bytes(memory._store_dict[key].to_bytes())


def _codecs(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value[:3]) or len(value) > 3:
        return []
    return [(entry.get("name"), entry.get("configuration") or {}) for entry in value]


def _is_shape(value: Any, least: int) -> bool:
    if not isinstance(value, list) or len(value) > _AXES:
        return False
    return all(isinstance(size, int) and not isinstance(size, bool) and least <= size < 2**40 for size in value)


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _clip(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."
