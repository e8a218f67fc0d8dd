"""One place of a store that is not as it was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["tile", "sum", "plain", "ledger", "metadata", "attributes", "result"]


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that does not read as it was written, or does not agree with the rest.

    Attributes:
        tile: Number of the tile; -1 where it is no tile, or no single one.
        place: What it is, for people: source and rows, a column of the ledger, the gradient, a result.
        message: What is wrong.
        kind: ``tile`` (its data), ``sum`` (rows summed over uses), ``plain`` (gradient, loss), ``ledger``, ``metadata`` (the
            zarr.json of an array or group), ``attributes`` (what the root says), ``result``.
        where: Its path in the store, where there is one.
        mended: Whether it was put right on the spot.
    """

    tile: int
    place: str
    message: str
    kind: Kind = "tile"
    where: str = ""
    mended: bool = False
