"""How one source is swept: integers and names, decided once and kept with the store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from disthess.store.layout import PanelSpec
from disthess.types import Span

Basis = Literal["output", "parameter", "activation", "autograd"]
"""Tangents start from unit vectors of the node's *output*, or of the *parameter*; for activation blocks from unit vectors of the
*activation* of every sample; ``autograd`` sweeps no graph."""


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """One source's sweep.

    Attributes:
        source: Parameter name; a use's name where uses are swept apart; `activation_source` of a node.
        parameter: Name of its parameter; of an activation, name of its node.
        uses: Names of the uses it starts from.
        basis: See `Basis`.
        stack: Tangents swept together (output basis: output units, each for all rows of a sample;
            activations: entries, each for all samples).
        samples: Samples per microbatch.
        unit_rows: Panel rows that one unit of the stack yields (output basis: inputs of the layer; activations kept per
            sample: samples; else 1).
        table_width: Entries of a row, where the source is a table (an embedding's weight) of which a sample reads some rows
            only: a stack then keeps to one row, and only the samples that read it are swept. Else 0.
    """

    source: str
    parameter: str
    uses: tuple[str, ...]
    basis: Basis
    stack: int
    samples: int
    unit_rows: int
    table_width: int = 0

    @property
    def halvings(self) -> int:
        """How often the sweep can be made smaller: the stack down to one tangent, then the microbatch down to one sample.

        >>> SourcePlan("w", "w", (), "parameter", stack=5, samples=2, unit_rows=1).halvings
        4
        """
        return _halvings(self.stack) + (0 if self.basis == "autograd" else _halvings(self.samples))

    def halved(self, times: int) -> SourcePlan:
        """The same sweep with less at a time: first the stack is halved, rounded up, then the microbatch.

        Sums over samples are taken in other groups then, so that numbers agree to rounding, not in every bit.

        >>> plan = SourcePlan("w", "w", (), "parameter", stack=5, samples=2, unit_rows=1)
        >>> [(plan.halved(times).stack, plan.halved(times).samples) for times in range(6)]
        [(5, 2), (3, 2), (2, 2), (1, 2), (1, 1), (1, 1)]
        """
        first = min(times, _halvings(self.stack))
        return dataclasses.replace(self, stack=_halve(self.stack, first), samples=_halve(self.samples, times - first))

    def blocks(self, units: Span) -> Iterator[Span]:
        """Units swept together, one after another.

        >>> plan = SourcePlan("table", "table", (), "parameter", stack=3, samples=8, unit_rows=1, table_width=4)
        >>> [(block.start, block.stop) for block in plan.blocks(Span(2, 9))]
        [(2, 4), (4, 7), (7, 8), (8, 9)]
        """
        first = units.start
        while first < units.stop:
            last = min(first + self.stack, units.stop)
            if self.table_width:
                last = min(last, (first // self.table_width + 1) * self.table_width)
            yield Span(first, last)
            first = last


@dataclass(frozen=True, slots=True)
class OwnColumns:
    """Which columns of its source's own block a tile computes: readers take the upper triangle alone.

    Attributes:
        first: Output unit (parameter basis: entry) from whose columns on.
        upper: Whether, where a unit's rows are multiplied apart from others', they begin with its own columns. What is left out
            inside the tile's square is its transpose.
    """

    first: int = 0
    upper: bool = False


def own_columns(plan: SourcePlan, panels: Sequence[PanelSpec], start: int) -> OwnColumns:
    """Of the tile whose first row is ``start``.

    Args:
        plan: The source's sweep.
        panels: What the tile writes. Those of uses are added up, whole chunks of them.
        start: Its first row.
    """
    if plan.basis == "output" and all(panel.kind == "panels" for panel in panels):
        return OwnColumns(start // plan.unit_rows, True)
    return OwnColumns(min(panel.first_column(start) if panel.diagonal else 0 for panel in panels) // plan.unit_rows)


def _halve(count: int, times: int) -> int:
    return max(1, -(-count // (1 << times)))


def _halvings(count: int) -> int:
    return (count - 1).bit_length()


def activation_source(node: str) -> str:
    """Name of the source that a node's activation is; a parameter's name holds no such colon.

    >>> activation_source("fc1")
    'activation:fc1'
    """
    return f"activation:{node}"
