"""How large the rank of a block can be at most, by the narrowest place between two parameters.

Let w and v be uses, and a node ``a`` such that every path from w to the objective passes through it, and v's node does not
lead to it and is not it. Then ``theta_v`` sees ``theta_w`` through ``a`` alone,

    H_vw = (d^2 L / d theta_v d a) (d a / d theta_w)      rank H_vw <= entries of a, over all samples

In a chain that is ``N min d_a`` over the layers from w up to v, and for any graph at most ``N d_w``. Truncation at that
rank is free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from disthess.graph.ir import Graph, Node
from disthess.graph.waves import live_uses


def rank_bounds(graph: Graph, samples: int, sizes: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """An upper bound for the rank of every off-diagonal block, both orders of a pair.

    Args:
        graph: The captured objective of one batch.
        samples: Of that batch, as the graph tells them apart.
        sizes: Entries of each parameter, by first name.

    Returns:
        Over all uses of both parameters, no more than the block's smaller side.
    """
    uses = [node for node in live_uses(graph) if node.op in sizes]
    place = {leaf.index: _reader(graph, leaf) for leaf in uses}
    above, through = _ancestors(graph), _unavoidable(graph)
    found: dict[tuple[str, str], int] = {}
    for first in uses:
        for second in uses:
            if first.op == second.op:
                continue
            most = min(sizes[first.op], sizes[second.op])
            for w, v in ((first, second), (second, first)):
                narrow = _narrowest(graph, samples, through[place[w.index]], place[v.index], above)
                most = most if narrow is None else min(most, narrow)
            pair = (first.op, second.op)
            found[pair] = min(found.get(pair, 0) + most, sizes[first.op], sizes[second.op])
    return found


def _narrowest(graph: Graph, samples: int, through: int, target: int, above: list[int]) -> int | None:
    """Fewest entries of a node on every path, to which the target's node does not lead."""
    sizes = [
        _entries(graph, node, samples)
        for node in graph.nodes
        if through >> node.index & 1 and node.index != target and not above[node.index] >> target & 1
    ]
    return min(sizes, default=None)


def _entries(graph: Graph, node: Node, samples: int) -> int:
    size = math.prod(node.shape)
    example = graph.samples if graph.independent else 1
    return size // example * samples if node.batch is not None and graph.independent else size


def _reader(graph: Graph, leaf: Node) -> int:
    return next(node.index for node in graph.nodes if leaf.index in node.refs())


def _ancestors(graph: Graph) -> list[int]:
    """Bit sets of the nodes that lead to each node."""
    found = [0] * len(graph.nodes)
    for node in graph.nodes:
        for ref in node.refs():
            found[node.index] |= found[ref] | 1 << ref
    return found


def _unavoidable(graph: Graph) -> list[int]:
    """Bit sets of the nodes that every path from a node to the objective passes, itself among them; of dead nodes, all."""
    everything = (1 << len(graph.nodes)) - 1
    found = [everything] * len(graph.nodes)
    found[graph.loss] = 0
    for node in reversed(graph.nodes):
        # Until its turn a node has the intersection over those that read it.
        found[node.index] |= 1 << node.index
        if node.live:
            for ref in set(node.refs()):
                found[ref] &= found[node.index]
    return found
