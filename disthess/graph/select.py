"""Which nodes a user means by names of nodes or modules, globs included.

A pattern that matches modules stands for their outputs: the nodes inside a module that nodes outside it read. Any other
pattern stands for the nodes it matches. Globs pass over what does not depend on the inputs (a normalised weight, say). Inputs
of the problem (``input_0``) are meant only where they are named in full.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from disthess.errors import ConfigError
from disthess.graph.ir import Graph, Node
from disthess.store.layout import ActivationSpec

_FLOATING = ("float32", "float64")


def select_activations(nodes: Sequence[Node], loss: int, patterns: Sequence[str]) -> frozenset[int]:
    """Indices of the nodes that any of the patterns means.

    Args:
        nodes: Named, each with its module.
        loss: Index of the objective.
        patterns: Names or globs.

    Raises:
        ConfigError: A pattern matches nothing; near names are offered.
    """
    outputs = _module_outputs(nodes, loss)
    moved = _reached_by_inputs(nodes)
    chosen: set[int] = set()
    for pattern in patterns:
        found = _matches(nodes, outputs, pattern) - {loss}
        if any(letter in pattern for letter in "*?["):
            found &= moved
        if not found:
            names = [*outputs, *(node.name for node in nodes if node.kind == "op" and node.dtype in _FLOATING)]
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.4) or names[:6]
            raise ConfigError(
                f"activations={pattern!r} matches no module that the objective calls, and no node of its graph before the loss "
                f"itself that holds real numbers; near names: {', '.join(dict.fromkeys(near))}."
            )
        chosen |= found
    return frozenset(chosen)


def activation_specs(graph: Graph) -> tuple[ActivationSpec, ...]:
    """What is asked for, in topological order: the shape of one sample's value, and the modules each is the output of.

    Raises:
        ConfigError: A node is computed from parameters alone, or over several samples, so that it is no activation.
    """
    outputs = _module_outputs(graph.nodes, graph.loss)
    found = []
    for node in graph.nodes:
        if not node.asked:
            continue
        if graph.independent and node.region != "sample":
            what = "from parameters alone" if node.region == "weight" else "over several samples"
            raise ConfigError(
                f"{node.name} is computed {what}, so that it is no activation of a sample. Ask for nodes that hold one value per "
                "sample; the blocks of parameters are stored anyway."
            )
        modules = tuple(name for name, members in outputs.items() if members == (node.index,))
        found.append(ActivationSpec(node.name, modules, _sample_shape(graph, node)))
    return tuple(found)


def _reached_by_inputs(nodes: Sequence[Node]) -> set[int]:
    found: set[int] = set()
    for node in nodes:
        if node.kind == "input" or any(ref in found for ref in node.refs()):
            found.add(node.index)
    return found


def _matches(nodes: Sequence[Node], outputs: dict[str, tuple[int, ...]], pattern: str) -> set[int]:
    modules = [name for name in outputs if fnmatch.fnmatchcase(name, pattern)]
    if modules:
        return {index for name in modules for index in outputs[name]}
    return {
        node.index
        for node in nodes
        if node.dtype in _FLOATING
        and (
            (node.kind == "op" and fnmatch.fnmatchcase(node.name, pattern))
            or (node.kind == "input" and node.name == pattern)
        )
    }


def _module_outputs(nodes: Sequence[Node], loss: int) -> dict[str, tuple[int, ...]]:
    """By module path inside the model: its real-valued nodes that are read outside it."""
    readers: dict[int, set[str]] = {loss: {""}}
    for node in nodes:
        for ref in node.refs():
            readers.setdefault(ref, set()).add(node.module)
    found: dict[str, list[int]] = {}
    for node in nodes:
        if node.kind != "op" or node.dtype not in _FLOATING:
            continue
        for path in _prefixes(node.module):
            inside = (path, path + ".")
            if any(not (reader == inside[0] or reader.startswith(inside[1])) for reader in readers.get(node.index, ())):
                found.setdefault(path.removeprefix("model."), []).append(node.index)
    return {path: tuple(members) for path, members in found.items()}


def _prefixes(module: str) -> list[str]:
    """``model.a.b`` gives ``model.a`` and ``model.a.b``; the model itself is none of its modules."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(2, len(parts) + 1)]


def _sample_shape(graph: Graph, node: Node) -> tuple[int, ...]:
    if node.batch is None:
        return node.shape
    rows = node.batch.rows_per_sample
    others = tuple(size for dim, size in enumerate(node.shape) if dim != node.batch.dim)
    return others if rows == 1 else (rows, *others)
