"""Where panel blocks of one tile add up, over microbatches, batches and uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from disthess.errors import ProblemError
from disthess.store.layout import PanelSpec
from disthess.types import Span


@dataclass(frozen=True, slots=True)
class Triangle:
    """Entries ``(o, a, (j, b))`` with ``j <= b`` of a block ``[(o, j), (a, b)]`` that is symmetric in j and b.

    Attributes:
        sums: ``[units, outputs - skip, width (width + 1) / 2]``.
        columns: Of the whole block.
        width: Inputs.
        skip: Leading outputs left out.
    """

    sums: Tensor
    columns: int
    width: int
    skip: int

    def add_to(self, block: Tensor) -> None:
        """Add the unfolded entries to ``[units * width, columns]``."""
        low, high = torch.triu_indices(self.width, self.width, device=self.sums.device)
        place = torch.empty(self.width, self.width, dtype=torch.long, device=self.sums.device)
        place[low, high] = torch.arange(len(low), device=self.sums.device)
        place[high, low] = place[low, high]
        where = block.view(-1, self.width, self.columns // self.width, self.width)
        for row in range(self.width):
            where[:, row, self.skip :] += self.sums.index_select(2, place[row])


@dataclass(frozen=True, slots=True)
class Swapped:
    """Entries of a block ``[(u, j), (a, b)]`` in the order in which one product of matrices leaves them.

    Attributes:
        sums: ``[units, outputs, inputs j * inputs b]``: ``(u, a, (j, b))``.
        columns: Of the whole block.
        width: Inputs j.
    """

    sums: Tensor
    columns: int
    width: int

    def add_to(self, block: Tensor) -> None:
        """Add the entries to ``[units * width, columns]``."""
        units, outputs, _ = self.sums.shape
        where = block.view(units, self.width, outputs, -1)
        where += self.sums.view(units, outputs, self.width, -1).transpose(1, 2)


@final
class Buffers:
    """Blocks ``[rows, p_target]`` of one tile and part, by target key, zero until something is added.

    A key is a use name where uses are stored apart, else a parameter name.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self._rows = rows
        self._like = like
        self._blocks: dict[str, Tensor] = {}
        self._triangles: dict[str, Triangle] = {}
        self._swapped: dict[str, Swapped] = {}

    def block(self, key: str, columns: int) -> Tensor:
        """The block of a target, ``[rows, columns]``, to be added to in place."""
        if key not in self._blocks:
            self._blocks[key] = self._like.new_zeros(self._rows, columns)
        return self._blocks[key]

    def triangle(self, key: str, columns: int, width: int, skip: int) -> Tensor:
        """Sums for a diagonal block that is symmetric in its inputs, ``[units, outputs - skip, width (width + 1) / 2]``.

        Args:
            key: The target.
            columns: Of its block.
            width: Inputs of the layer.
            skip: Leading output units whose columns are not needed.
        """
        if key not in self._triangles:
            pairs = width * (width + 1) // 2
            sums = self._like.new_zeros(self._rows // width, columns // width - skip, pairs)
            self._triangles[key] = Triangle(sums, columns, width, skip)
        return self._triangles[key].sums

    def swapped(self, key: str, columns: int, width: int, outputs: int) -> Tensor:
        """Sums for a block of two layers, ``[units, outputs, columns / outputs * width]``.

        Args:
            key: The target.
            columns: Of its block.
            width: Inputs of the source.
            outputs: Of the target.
        """
        if key not in self._swapped:
            sums = self._like.new_zeros(self._rows // width, outputs, width * (columns // outputs))
            self._swapped[key] = Swapped(sums, columns, width)
        return self._swapped[key].sums

    def unfold(self) -> None:
        """Turn what was summed in another order into blocks."""
        held: list[tuple[str, Triangle | Swapped]] = [*self._triangles.items(), *self._swapped.items()]
        self._triangles.clear()
        self._swapped.clear()
        while held:
            key, sums = held.pop()
            sums.add_to(self.block(key, sums.columns))

    def assemble(
        self, panel: PanelSpec, span: Span, drop: int, members: Mapping[str, tuple[str, ...]], decay: float = 0.0
    ) -> np.ndarray:
        """The tile's array for one panel: ``[span.size, columns - first_column]``.

        Args:
            panel: The panel.
            span: The tile's rows.
            drop: Buffer rows before the tile's first row (units that straddle its boundary).
            members: Keys that add up to each target of the panel.
            decay: Added to the diagonal of the source's own block.

        Raises:
            ProblemError: A block holds NaN or infinity.
        """
        first = panel.first_column(span.start)
        result = np.zeros((span.size, panel.columns - first), dtype=str(self._like.dtype).removeprefix("torch."))
        offset = 0
        for name, size in panel.targets:
            skip = max(0, first - offset)
            for key in members.get(name, ()):
                if skip < size and key in self._blocks:
                    piece = self._blocks[key][drop : drop + span.size, skip:].cpu().numpy()
                    where = result[:, offset + skip - first : offset + size - first]
                    np.add(where, piece, out=where)
            offset += size
        if decay:
            rows = np.arange(span.size)
            result[rows, rows + span.start - first] += decay
        if not np.isfinite(result).all():
            raise ProblemError(
                f"rows {span.start} to {span.stop} of {panel.source} hold NaN or infinity: second derivatives overflow or are "
                "undefined at this point (a square root or norm at 0, a division by 0). Use float64, or move off that point."
            )
        return result
