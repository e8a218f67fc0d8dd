"""Where panel blocks of one tile add up, over microbatches, batches and uses."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from disthess.errors import ProblemError
from disthess.store.layout import PanelSpec
from disthess.types import Span


@dataclass(frozen=True, slots=True)
class Block:
    """A target's block as it is stored, ``[rows, columns]``.

    Attributes:
        key: The target: a use's name where uses are stored apart, else a parameter's.
        columns: Of the whole block.
    """

    key: str
    columns: int

    @property
    def unit_rows(self) -> int:
        """Rows of the block that one leading entry of the sums stands for."""
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sums, but for the leading axis."""
        return (self.columns,)


@dataclass(frozen=True, slots=True)
class Triangle:
    """Entries ``(o, a, (j, b))`` with ``j <= b`` of a block ``[(o, j), (a, b)]`` that is symmetric in j and b.

    Its sums are ``[units, outputs - skip, width (width + 1) / 2]``.

    Attributes:
        key: The target.
        columns: Of the whole block.
        width: Inputs.
        skip: Leading outputs left out: an earlier tile has their columns.
    """

    key: str
    columns: int
    width: int
    skip: int

    @property
    def unit_rows(self) -> int:
        """An output unit has as many rows as the layer has inputs."""
        return self.width

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sums, but for the leading axis."""
        return (self.columns // self.width - self.skip, self.width * (self.width + 1) // 2)

    def unfold(self, sums: Tensor, block: Tensor) -> None:
        """Add the entries to ``[units * width, columns]``."""
        low, high = torch.triu_indices(self.width, self.width, device=sums.device)
        place = torch.empty(self.width, self.width, dtype=torch.long, device=sums.device)
        place[low, high] = torch.arange(len(low), device=sums.device)
        place[high, low] = place[low, high]
        where = block.view(-1, self.width, self.columns // self.width, self.width)
        for row in range(self.width):
            where[:, row, self.skip :] += sums.index_select(2, place[row])


@dataclass(frozen=True, slots=True)
class Swapped:
    """Entries of a block ``[(u, j), (a, b)]`` in the order in which one product of matrices leaves them, ``(u, a, (j, b))``.

    Its sums are ``[units, outputs, inputs j * inputs b]``.

    Attributes:
        key: The target.
        columns: Of the whole block.
        width: Inputs j of the source.
        outputs: Of the target.
    """

    key: str
    columns: int
    width: int
    outputs: int

    @property
    def unit_rows(self) -> int:
        """An output unit has as many rows as the source has inputs."""
        return self.width

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sums, but for the leading axis."""
        return (self.outputs, self.width * (self.columns // self.outputs))

    def unfold(self, sums: Tensor, block: Tensor) -> None:
        """Add the entries to ``[units * width, columns]``."""
        units = len(sums)
        block.view(units, self.width, self.outputs, -1).add_(
            sums.view(units, self.outputs, self.width, -1).transpose(1, 2)
        )


@dataclass(frozen=True, slots=True)
class Upper:
    """A source's own block, of which each unit's rows are summed from its own columns on.

    Its sums are the block's.

    Attributes:
        key: The source.
        columns: Of the whole block.
        width: Rows of a unit.
        first: Number of the first unit.
    """

    key: str
    columns: int
    width: int
    first: int

    @property
    def unit_rows(self) -> int:
        """As of the block."""
        return 1

    @property
    def block(self) -> Block:
        """Where it is summed."""
        return Block(self.key, self.columns)

    def mirror(self, block: Tensor) -> None:
        """Write what was left out among the units, its transpose, into ``[units * width, columns]``."""
        square = block[:, self.first * self.width :]
        for start in range(self.width, len(block), self.width):
            square[start : start + self.width, :start] = square[:start, start : start + self.width].T


Form = Block | Triangle | Swapped | Upper
"""How sums for a target are laid out."""


class AbstractWindow(abc.ABC):
    """The rows of a tile's sums that one stack of tangents adds to."""

    @abc.abstractmethod
    def take(self, form: Form) -> Tensor:
        """``[rows / unit_rows, *shape]`` of a form, to be added to in place."""


@final
class Buffers(AbstractWindow):
    """Sums for one tile and part, zero until something is added.

    Args:
        rows: Of the tile, in whole units.
        like: A tensor of their type, on their device.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self._rows = rows
        self._like = like
        self._sums: dict[Block | Triangle | Swapped, Tensor] = {}
        self._upper: set[Upper] = set()

    @override
    def take(self, form: Form) -> Tensor:
        if isinstance(form, Upper):
            self._upper.add(form)
            form = form.block
        if form not in self._sums:
            self._sums[form] = self._like.new_zeros(self._rows // form.unit_rows, *form.shape)
        return self._sums[form]

    def unfold(self) -> None:
        """Turn what was summed in another order into blocks, and fill in what was left out of them."""
        for form in [form for form in self._sums if not isinstance(form, Block)]:
            form.unfold(self._sums.pop(form), self.take(Block(form.key, form.columns)))
        for upper in self._upper:
            upper.mirror(self._sums[upper.block])

    def assemble(
        self,
        panel: PanelSpec,
        span: Span,
        drop: int,
        members: Mapping[str, tuple[str, ...]],
        decay: float = 0.0,
        left: int = 0,
    ) -> np.ndarray:
        """The tile's array for one panel: ``[span.size, columns - first_column]``.

        Args:
            panel: The panel.
            span: The tile's rows.
            drop: Buffer rows before the tile's first row (units that straddle its boundary).
            members: Keys that add up to each target of the panel.
            decay: Added to the diagonal of the source's own block.
            left: Columns at its left that were not computed and are NaN: an earlier tile has their transpose.

        Raises:
            ProblemError: A block holds NaN or infinity.
        """
        first = panel.first_column(span.start)
        result = np.zeros((span.size, panel.columns - first), dtype=str(self._like.dtype).removeprefix("torch."))
        offset = 0
        for name, size in panel.targets:
            skip = max(0, first - offset)
            for key in members.get(name, ()):
                block = self._sums.get(Block(key, size))
                if skip < size and block is not None:
                    piece = block[drop : drop + span.size, skip:].cpu().numpy()
                    where = result[:, offset + skip - first : offset + size - first]
                    np.add(where, piece, out=where)
            offset += size
        if decay:
            rows = np.arange(span.size)
            result[rows, rows + span.start - first] += decay
        result[:, :left] = np.nan
        if not np.isfinite(result[:, left:]).all():
            raise ProblemError(
                f"rows {span.start} to {span.stop} of {panel.source} hold NaN or infinity: second derivatives overflow or are "
                "undefined at this point (a square root or norm at 0, a division by 0). Use float64, or move off that point."
            )
        return result


@final
class Window(AbstractWindow):
    """Of buffers.

    Args:
        buffers: The sums.
        first: First row.
        rows: Their number.
    """

    def __init__(self, buffers: Buffers, first: int, rows: int) -> None:
        self._buffers = buffers
        self._span = Span(first, first + rows)

    @override
    def take(self, form: Form) -> Tensor:
        return self._buffers.take(form)[self._span.start // form.unit_rows : self._span.stop // form.unit_rows]
