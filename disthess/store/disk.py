"""What a layout takes on disk, and whether that is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from disthess.errors import StoreError
from disthess.store.layout import Layout, PanelSpec
from disthess.store.place import is_url
from disthess.types import ITEM_BYTES
from disthess.units import human_bytes

CHECKSUM_BYTES = 4
"""Of the crc32c at the end of every chunk."""


def panel_disk_bytes(panel: PanelSpec, item_bytes: int) -> int:
    """Bytes of all stored chunks of one panel and one part; chunks at the edges are stored whole.

    Row chunks of one tile may start further left than counted here, where tiles take several row chunks.

    >>> panel_disk_bytes(PanelSpec("panels", 0, "w", 4, (("w", 4),), 2, 2, True), 8)
    108
    """
    total = 0
    chunk_bytes = panel.row_chunk * panel.column_chunk * item_bytes + CHECKSUM_BYTES
    for start in range(0, panel.rows, panel.row_chunk):
        total += -(-(panel.columns - panel.first_column(start)) // panel.column_chunk) * chunk_bytes
    return total


def layout_disk_bytes(layout: Layout) -> int:
    """Bytes that a whole store of this layout takes, all panels and parts, without results."""
    item = ITEM_BYTES[layout.dtype]
    return len(layout.parts) * sum(panel_disk_bytes(panel, item) for panel in layout.panels)


def check_disk(path: str | os.PathLike[str], needed_bytes: int) -> None:
    """Refuse work whose output would not fit on the file system of ``path`` (which need not exist yet).

    What an object store has room for, nobody can ask.

    Raises:
        StoreError: Less than ``needed_bytes`` are free.
    """
    if is_url(path):
        return
    place = Path(path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise StoreError(
            f"The store {os.fspath(path)} needs {human_bytes(needed_bytes)} ({needed_bytes:,} bytes) and the disk of {place} has "
            f"{human_bytes(free)} left. Free some space, put the store on a larger disk, or store less: fewer "
            f"parameters, one part instead of two, or float32."
        )
