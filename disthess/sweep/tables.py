"""Tell the planner which sources are tables, and how many samples read each of their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from disthess.graph.ir import Graph, Node
from disthess.graph.program import Program
from disthess.graph.readers import lookup_indices, table_lookups, table_readers
from disthess.graph.waves import source_leaves
from disthess.planning.workload import SourceCost, Workload


def with_tables(
    workload: Workload, programs: Sequence[Program], inputs: Sequence[Sequence[Tensor]], unprobed: bool = False
) -> Workload:
    """The workload with ``table_width`` and ``readers`` of every source that is a table, of which some samples leave rows out.

    Args:
        workload: Of these programs.
        programs: One per batch.
        inputs: Tensors of each batch, in tree order. Where indices have no values, every sample counts as a reader of every row.
        unprobed: Whether it is not known which of an axis's entries belong to which sample, where a sample has several.
    """
    sizes = [run.samples for run in workload.batch_runs()]

    def marked(cost: SourceCost) -> SourceCost:
        readers: list[tuple[int, ...]] = []
        width, spared = 0, False
        for program, tensors, samples in zip(programs, inputs, sizes, strict=True):
            graph = program.graph
            leaves = source_leaves(graph, cost.source, cost.parameter)
            if not leaves or len(graph.nodes[leaves[0]].shape) != 2:
                return cost
            lookups = table_lookups(graph, leaves)
            if not lookups:
                readers.append((samples,) * graph.nodes[leaves[0]].shape[0])
                continue
            rows, width = graph.nodes[leaves[0]].shape
            values = lookup_indices(graph, lookups, tensors, program.constants)
            if values is None or (unprobed and not _plain(graph, lookups)):
                readers.append((samples,) * rows)
                continue
            found = tuple(len(entry) for entry in table_readers(graph, lookups, values, samples, rows))
            spared = spared or min(found) < samples
            readers.append(found)
        return dataclasses.replace(cost, table_width=width, readers=tuple(readers)) if spared else cost

    return dataclasses.replace(
        workload,
        sources=tuple(marked(cost) for cost in workload.sources),
        use_sources=tuple(marked(cost) for cost in workload.use_sources),
    )


def _plain(graph: Graph, lookups: Sequence[Node]) -> bool:
    """Whether the batch axis of every lookup's indices has one entry per sample."""
    axes = [graph.nodes[lookup.refs()[1]].batch for lookup in lookups]
    return all(axis is not None and axis.rows_per_sample == 1 for axis in axes)
