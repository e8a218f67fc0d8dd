"""Reverse topological levels, the order of sources, and a printer."""

from __future__ import annotations

from collections.abc import Iterable

from disthess.errors import GraphError
from disthess.graph.ir import Graph, Node


def levels(graph: Graph) -> tuple[int, ...]:
    """Longest path from each node to the loss, counted in live nodes; -1 for nodes that are not live."""
    level = [-1] * len(graph.nodes)
    level[graph.loss] = 0
    for node in reversed(graph.nodes):
        if level[node.index] < 0:
            continue
        for ref in node.refs():
            if graph.nodes[ref].live:
                level[ref] = max(level[ref], level[node.index] + 1)
    return tuple(level)


def live_uses(graph: Graph) -> tuple[Node, ...]:
    """Use leaves that reach the loss, in topological order of the nodes they feed."""
    first: dict[int, int] = {}
    for node in graph.nodes:
        for ref in node.refs():
            if graph.nodes[ref].kind == "use" and graph.nodes[ref].live:
                first.setdefault(ref, node.index)
    return tuple(graph.nodes[leaf] for leaf in sorted(first, key=lambda leaf: (first[leaf], leaf)))


def source_leaves(graph: Graph, source: str, parameter: str) -> tuple[int, ...]:
    """Leaves of a source: all of the parameter's where it has its name, else the use of that name."""
    uses = (node for node in graph.nodes if node.kind == "use" and node.live)
    return tuple(node.index for node in uses if source == (node.op if source == parameter else node.name))


def consumer(graph: Graph, leaf: int) -> tuple[int, int]:
    """The node that a use leaf feeds, and its (first) slot there."""
    for node in graph.nodes[leaf + 1 :]:
        if leaf in node.refs():
            return node.index, graph.slots(node.index).index(leaf)
    raise GraphError(f"use {graph.nodes[leaf].name} feeds no node.")


def leading_to(graph: Graph, targets: Iterable[int]) -> tuple[int, ...]:
    """Nodes that a reverse wave passes on its way to any of ``targets`` (themselves included), from the loss down."""
    passed = set(targets)
    for node in graph.nodes[min(passed, default=len(graph.nodes)) :]:
        if node.live and node.region != "total" and any(ref in passed for ref in node.refs()):
            passed.add(node.index)
    return tuple(sorted(passed, reverse=True))


def print_graph(graph: Graph) -> str:
    """The graph as text a person can read: one line per live node, with its level, shape and what it reads."""
    level = levels(graph)
    live = [node for node in graph.nodes if node.live and node.kind != "use"]
    width = max((len(node.name) for node in live), default=4)
    lines = [
        f"{graph.why}; {len(live)} live nodes, {sum(node.kind == 'use' and node.live for node in graph.nodes)} uses"
    ]
    for node in live:
        reads = ", ".join(
            graph.nodes[ref].op if graph.nodes[ref].kind == "use" else graph.nodes[ref].name
            for ref in node.refs()
            if graph.nodes[ref].kind != "size"
        )
        shape = "x".join("N" if _is_batch(node, dim) else str(size) for dim, size in enumerate(node.shape)) or "scalar"
        operation = node.op.removeprefix("aten.").removesuffix(".default")
        lines.append(f"{level[node.index]:4d}  {node.name:<{width}}  {shape:<14}  {operation}({reads})")
    return "\n".join(lines)


def _is_batch(node: Node, dim: int) -> bool:
    return node.batch is not None and node.batch.dim == dim and node.batch.rows_per_sample == 1
