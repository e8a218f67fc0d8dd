"""Readable, unique node names: the module a node came from, and its operation where the module has several."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from disthess.graph.ir import Node


def name_nodes(nodes: Sequence[Node], modules: Sequence[str]) -> tuple[Node, ...]:
    """Name every node.

    An operation is ``{module}.{operation}``, or ``{module}`` alone if its module holds no other; outside the model the
    module is ``loss``. A use is ``{parameter}@{node}``. Repetitions get ``_1``, ``_2`` and so on.

    Args:
        nodes: In topological order, unnamed.
        modules: Path of the module each came from, ``model`` for the model itself, empty outside it.

    Returns:
        The same nodes with names.
    """
    bases = [_base(node, module) for node, module in zip(nodes, modules, strict=True)]
    crowded = Counter(
        module for node, module in zip(nodes, modules, strict=True) if node.kind == "op" and module.startswith("model.")
    )
    taken: Counter[str] = Counter()
    names: list[str] = []
    for node, module, base in zip(nodes, modules, bases, strict=True):
        if node.kind == "op" and module.startswith("model.") and crowded[module] == 1:
            base = module.removeprefix("model.")
        if node.kind == "use":
            names.append("")
            continue
        repeats = taken[base]
        taken[base] += 1
        names.append(base if repeats == 0 else f"{base}_{repeats}")
    for node in nodes:
        for ref in node.refs():
            if nodes[ref].kind == "use":
                names[ref] = f"{nodes[ref].op}@{names[node.index]}"
    return tuple(
        dataclasses.replace(node, name=name or f"{node.op}@unused") for node, name in zip(nodes, names, strict=True)
    )


def _base(node: Node, module: str) -> str:
    if node.kind == "input":
        return f"input_{node.op}"
    if node.kind == "constant":
        return node.op.removeprefix("objective.model.")
    operation = node.op.split(".")[1].strip("_") if "." in node.op else node.op
    path = "loss" if not module else "" if module == "model" else module.removeprefix("model.")
    return f"{path}.{operation}" if path else operation
