"""The probe that looks for coupled samples sees changes beside infinite entries, and none in empty values."""

from __future__ import annotations

import math

import torch

from disthess.graph.ir import BatchAxis, Node, Ref
from disthess.graph.probe import _changed


def summed(columns: int) -> tuple[Node, Node]:
    """An input ``[3, columns]``, and its sum over samples, which passes over NaN."""
    value = Node(0, "x", "input", "0", (), (), None, (3, columns), "float64", BatchAxis(0, 1, 1), "sample")
    total = Node(1, "total", "op", "aten.nansum.default", (Ref(0), (0,)), (), None, (columns,), "float64")
    return value, total


def test_a_leak_beside_an_infinite_entry_is_seen() -> None:
    nodes = summed(2)
    x = torch.tensor([[1.0, -math.inf], [2.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    _, changed = _changed(nodes, nodes[1], [x, x.nansum(0)], 1, 3)
    assert changed.tolist() == [True, False]


def test_an_empty_value_does_not_change() -> None:
    nodes = summed(0)
    x = torch.zeros(3, 0, dtype=torch.float64)
    _, changed = _changed(nodes, nodes[1], [x, x.nansum(0)], 1, 3)
    assert changed.numel() == 0


def test_rounding_near_zero_is_no_leak() -> None:
    nodes = summed(2)
    x = torch.tensor([[1.0, 0.0], [0.0, 1e-17], [1.0, 0.0]], dtype=torch.float64)
    _, changed = _changed(nodes, nodes[1], [x, x.nansum(0)], 1, 3)
    assert changed.tolist() == [False, False]
