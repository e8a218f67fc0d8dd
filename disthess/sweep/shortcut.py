"""Why a layer's outputs need fewer tangents than they are: what follows them, looked up in the graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from disthess.graph.ir import Graph
from disthess.graph.waves import consumer
from disthess.rules.table import rule_for
from disthess.sweep.pooled import Apart, Pooling, pooling_behind
from disthess.sweep.rowwise import Rowwise, rowwise_behind


@dataclass(frozen=True, slots=True)
class Shortcut:
    """Of the two at most one: rows that do not meet take one tangent, pooled ones as many as there are places.

    Attributes:
        rowwise: How rows lie behind the outputs that do not meet.
        pooling: What the outputs pass through before tangents start.
    """

    rowwise: Rowwise | None = None
    pooling: Pooling | None = None


NONE = Shortcut()
"""Tangents are as many as the outputs."""


def shortcut_behind(
    graph: Graph, leaves: Sequence[int], passed: Collection[int], keeps_apart: Apart, takes: Callable[[int, int], bool]
) -> Shortcut:
    """The shortcut of a source.

    Args:
        graph: The captured objective.
        leaves: The source's: there is none where it has several uses.
        passed: Nodes on the way to targets.
        keeps_apart: What operations do to an axis.
        takes: Whether they take rows along an axis of their output for samples.
    """
    if len(leaves) != 1:
        return NONE
    (leaf,), members = leaves, frozenset(passed)
    index, _ = consumer(graph, leaf)
    axis = rule_for(graph.nodes[index].op).source_axis
    rowwise = rowwise_behind(graph, (index, leaf), members, keeps_apart, takes) if axis == -1 else None
    if rowwise is not None:
        return Shortcut(rowwise)
    return Shortcut(None, pooling_behind(graph, (index, leaf, axis), members, keeps_apart))
