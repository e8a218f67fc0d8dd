"""How one source is swept: integers and names, decided once and kept with the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Basis = Literal["output", "parameter", "autograd"]
"""Tangents start from unit vectors of the node's *output*, or of the *parameter*; ``autograd`` sweeps no graph."""


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """One source's sweep.

    Attributes:
        source: Parameter name; or a use's name where uses are swept apart.
        parameter: Name of its parameter.
        uses: Names of the uses it starts from.
        basis: See `Basis`.
        stack: Tangents swept together (output basis: output units, each for all rows of a sample).
        samples: Samples per microbatch.
        unit_rows: Panel rows that one unit of the stack yields (output basis: inputs of the layer; else 1).
    """

    source: str
    parameter: str
    uses: tuple[str, ...]
    basis: Basis
    stack: int
    samples: int
    unit_rows: int
