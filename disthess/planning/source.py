"""How one source is swept: integers and names, decided once and kept with the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    """

    source: str
    parameter: str
    uses: tuple[str, ...]
    basis: Basis
    stack: int
    samples: int
    unit_rows: int


def activation_source(node: str) -> str:
    """Name of the source that a node's activation is; a parameter's name holds no such colon.

    >>> activation_source("fc1")
    'activation:fc1'
    """
    return f"activation:{node}"
