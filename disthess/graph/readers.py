"""Which samples read a row of a table: of an embedding's weight, all others see nothing.

A parameter is a *table* where embeddings alone read it, by indices that depend on no parameter, and samples are independent.
The derivatives of a sample's loss by a row that the sample does not read are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from disthess.graph.batch import rows_by_sample
from disthess.graph.ir import Graph, Node
from disthess.graph.run import evaluate

EMBEDDING = "aten.embedding.default"


def table_lookups(graph: Graph, leaves: Sequence[int]) -> tuple[Node, ...]:
    """The embeddings that read a parameter's use leaves, or none if the parameter is no table.

    Args:
        graph: The captured objective.
        leaves: Indices of the leaves.
    """
    found = [node for node in graph.nodes if any(ref in leaves for ref in node.refs())]
    plain = graph.independent and all(_is_lookup(graph, node, leaves) for node in found)
    return tuple(found) if plain else ()


def _is_lookup(graph: Graph, node: Node, leaves: Sequence[int]) -> bool:
    refs = node.refs()
    if node.op != EMBEDDING or node.region != "sample" or node.batch is None or len(refs) < 2:
        return False
    ids = graph.nodes[refs[1]]
    known = ids.batch is not None and ids.batch.dim >= 0 and not ids.live and not _reads_parameter(graph, ids.index)
    return known and refs[0] in leaves and refs[1] not in leaves


def _reads_parameter(graph: Graph, index: int) -> bool:
    return any(graph.nodes[other].kind == "use" for other in _before(graph, (index,)))


def _before(graph: Graph, indices: Sequence[int]) -> list[int]:
    """These nodes and all that they are computed from, in order."""
    wanted = set(indices)
    for node in reversed(graph.nodes):
        if node.index in wanted:
            wanted.update(node.refs())
    return sorted(wanted)


def lookup_indices(
    graph: Graph, lookups: Sequence[Node], inputs: Sequence[Tensor], constants: Mapping[int, Tensor]
) -> dict[int, Any] | None:
    """Value of the index argument of each lookup, by its node, computed from the batch alone.

    None where it cannot be known: a tensor that it is computed from has no values (it is on the meta device).
    """
    wanted = [lookup.refs()[1] for lookup in lookups]
    values: list[Any] = [None] * len(graph.nodes)
    for index in _before(graph, wanted):
        node = graph.nodes[index]
        if node.kind == "input":
            values[index] = inputs[int(node.op)]
        elif node.kind == "constant":
            values[index] = constants[index]
        else:
            values[index] = evaluate(node, values)
        if isinstance(values[index], Tensor) and values[index].is_meta:
            return None
    return {index: values[index] for index in wanted}


def table_readers(
    graph: Graph, lookups: Sequence[Node], values: Mapping[int, Any] | Sequence[Any], samples: int, rows: int
) -> tuple[tuple[int, ...], ...]:
    """For each row of a table the samples that read it, in order.

    Args:
        graph: The captured objective.
        lookups: From `table_lookups`.
        values: Value of each lookup's index argument, by node.
        samples: Samples of the batch.
        rows: Rows of the table.
    """
    pairs = []
    for lookup in lookups:
        node = graph.nodes[lookup.refs()[1]]
        ids = rows_by_sample(values[node.index].unsqueeze(-1), node.batch, samples).squeeze(-1)
        pairs.append((ids * samples + torch.arange(samples, device=ids.device).unsqueeze(-1)).reshape(-1))
    found: list[list[int]] = [[] for _ in range(rows)]
    for pair in torch.unique(torch.cat(pairs)).tolist():
        found[pair // samples].append(pair % samples)
    return tuple(tuple(entry) for entry in found)
