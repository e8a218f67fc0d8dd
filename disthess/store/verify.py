"""What reading a whole store again says about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Damage:
    """A tile or a summed panel that does not read as it was written.

    Attributes:
        tile: Number of the tile; -1 where rows of a reduced panel are damaged.
        place: Source and rows, for people.
        message: What is wrong.
    """

    tile: int
    place: str
    message: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of ``Store.verify``.

    Attributes:
        checked: Tiles read again and compared with the ledger.
        missing: Tiles that are not done (nothing is known of them; that is no damage).
        damaged: What does not read as it was written.
        repaired: Whether damaged tiles were marked missing, so that running again computes them.
        checked_bytes: Bytes read.
    """

    checked: int
    missing: int
    damaged: tuple[Damage, ...]
    repaired: bool
    checked_bytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged
