"""Count what sweeping each source of a captured problem takes, from its graphs and its rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import final

from disthess.errors import ConfigError
from disthess.graph.ir import Graph, Node
from disthess.graph.program import Program
from disthess.graph.select import activation_specs
from disthess.graph.waves import leading_to, levels, live_uses
from disthess.planning.source import Basis, activation_source
from disthess.planning.work import SweepWork
from disthess.planning.workload import BatchRun, SourceCost, Workload
from disthess.rules.table import rule_for
from disthess.store.layout import ParameterSpec
from disthess.sweep.tally import OutputSource, SweepTally
from disthess.types import PARTS, Part

Sweeps = tuple[tuple[Basis, tuple[SweepWork, ...]], ...]


@final
class SourceCounter:
    """Costs of sources of a problem.

    Args:
        graph: That of the first batch; its totals are divided into one sample's share.
        others: The other batches' graphs, where they differ: their matrix products are counted as well.
        parts: Parts to count matrix products of.
    """

    def __init__(self, graph: Graph, others: Sequence[Graph] = (), parts: Sequence[Part] = PARTS) -> None:
        self._graph = graph
        self._per = graph.samples if graph.independent else 1
        self._levels = levels(graph)
        self._uses = live_uses(graph)
        self._tallies = [(each, SweepTally(each, parts)) for each in (graph, *others)]
        self._consumer: dict[int, Node] = {}
        for node in graph.nodes:
            for ref in node.refs():
                if graph.nodes[ref].kind == "use":
                    self._consumer.setdefault(ref, node)

    def parameters(self, named: Sequence[tuple[str, tuple[str, ...], tuple[int, ...]]]) -> tuple[ParameterSpec, ...]:
        """Specs in user order from (name, aliases, shape), with ranks by first use."""
        uses: dict[str, list[str]] = {}
        for node in self._uses:
            uses.setdefault(node.op, []).append(node.name)
        order = list(uses) + [name for name, _, _ in named if name not in uses]
        rank = {name: position for position, name in enumerate(order)}
        return tuple(
            ParameterSpec(name, aliases, shape, rank[name], tuple(uses.get(name, ()))) for name, aliases, shape in named
        )

    def use_names(self) -> tuple[str, ...]:
        """Names of all live uses in topological order."""
        return tuple(node.name for node in self._uses)

    def together(self, parameter: ParameterSpec, targets: frozenset[str]) -> SourceCost:
        """All uses of a parameter swept together against target parameters (itself among them)."""
        leaves = [node for node in self._uses if node.op == parameter.name]
        wanted = [node for node in self._uses if node.op in targets]
        cost = self._count(parameter.name, parameter.name, leaves, wanted, self._output_basis(leaves))
        return self._with_sweeps(cost, lambda leaf: leaf.op == parameter.name, lambda leaf: leaf.op in targets)

    def apart(self, use: str, targets: frozenset[str]) -> SourceCost:
        """One use against target uses."""
        leaves = [node for node in self._uses if node.name == use]
        wanted = [node for node in self._uses if node.name in targets]
        cost = self._count(use, leaves[0].op, leaves, wanted, self._output_basis(leaves))
        return self._with_sweeps(cost, lambda leaf: leaf.name == use, lambda leaf: leaf.name in targets)

    def activation(self, name: str, targets: frozenset[str], samples: int) -> SourceCost:
        """A node's activation against target nodes (itself among them), rows kept for so many samples (0: summed)."""
        nodes = [node for node in self._graph.nodes if node.asked and node.name in targets]
        source = [node for node in nodes if node.name == name]
        entries = _size(source[0]) // self._per
        cost = self._count(activation_source(name), name, source, nodes, (entries, max(1, samples), 1))
        found = []
        for graph, tally in self._tallies:
            asked = [node for node in graph.nodes if node.asked and node.name in targets]
            seeds = [node.index for node in asked if node.name == name]
            found.append(tally.sweep(seeds, asked, None))
        sweeps: Sweeps = (("activation", tuple(found)),)
        return dataclasses.replace(cost, uses=(), rows=entries * max(1, samples), sweeps=sweeps)

    def _with_sweeps(
        self, cost: SourceCost, is_source: Callable[[Node], bool], is_target: Callable[[Node], bool]
    ) -> SourceCost:
        """The cost with the matrix products of its sweeps on every graph."""
        by_parameter, by_output = [], []
        for graph, tally in self._tallies:
            leaves = live_uses(graph)
            seeds = [leaf.index for leaf in leaves if is_source(leaf)]
            targets = [leaf for leaf in leaves if is_target(leaf)]
            by_parameter.append(tally.sweep(seeds, targets, None))
            if cost.units:
                seed = next(node.index for node in graph.nodes if seeds[0] in node.refs())
                found = tally.source_rows(seed, seeds[0])
                rows = found[0] if found is not None else cost.unit_tangents
                source = OutputSource(seed, seeds[0], cost.unit_rows, rows)
                by_output.append(tally.sweep([seed], targets, source))
        sweeps: Sweeps = (("parameter", tuple(by_parameter)),)
        return dataclasses.replace(cost, sweeps=(*sweeps, ("output", tuple(by_output))) if by_output else sweeps)

    def _count(
        self,
        source: str,
        parameter: str,
        leaves: Sequence[Node],
        targets: Sequence[Node],
        basis: tuple[int, int, int],
    ) -> SourceCost:
        graph = self._graph
        reached = self._reached(leaves)
        passed = frozenset(leading_to(graph, [node.index for node in targets]))
        propagation = summed = apart = held = 0
        for node in graph.nodes[min(min(passed), min(reached)) :]:
            if not node.live or node.region == "total" or node.kind != "op":
                continue
            share = self._entries(node)
            bent = 2 * share if node.index in reached else share
            for ref in node.refs():
                other = graph.nodes[ref]
                if not other.live:
                    continue
                if ref in reached:
                    propagation += share
                if ref not in passed:
                    continue
                if other.kind == "use":
                    summed += bent
                    apart += _size(other) * self._per * (2 if node.index in reached else 1)
                else:
                    propagation += bent
                    if other.region == "weight" and node.region == "sample":
                        held += _size(other) * self._per
        per = self._per
        return SourceCost(
            source=source,
            parameter=parameter,
            uses=tuple(node.name for node in leaves),
            level=max(self._levels[node.index] for node in leaves),
            rows=_size(leaves[0]),
            units=basis[0],
            unit_rows=basis[1],
            unit_tangents=basis[2],
            propagation=-(-propagation // per),
            summed_targets=-(-summed // per),
            apart_targets=-(-apart // per),
            columns=sum(_size(node) for node in targets),
            diagonal=basis[2] == 1,
            tangent_entries=-(
                -sum(_size(graph.nodes[index]) for index in reached if graph.nodes[index].region != "total") // per
            ),
            front_entries=-(
                -max((_size(node) for node in graph.nodes if node.live and node.kind == "op"), default=1) // per
            ),
            apart_entries=held // per,
        )

    def _reached(self, leaves: Sequence[Node]) -> set[int]:
        reached = {node.index for node in leaves}
        for node in self._graph.nodes[min(reached) :]:
            if node.live and node.region != "total" and any(ref in reached for ref in node.refs()):
                reached.add(node.index)
        return reached

    def _entries(self, node: Node) -> int:
        shapes = tuple(self._graph.nodes[ref].shape for ref in node.refs() if self._graph.nodes[ref].kind != "size")
        return rule_for(node.op).entry_multiply_adds(shapes, node.shape)

    def _output_basis(self, leaves: Sequence[Node]) -> tuple[int, int, int]:
        """(units, unit_rows, rows per sample) of the weight of a linear layer or a convolution, else zeros.

        A source of several uses has none: a use's rows multiply its input, which an earlier use of the same parameter moves.
        """
        leaf = leaves[0]
        node = self._consumer[leaf.index]
        told_apart = node.region == "sample" or not self._graph.independent
        if len(leaves) > 1 or not told_apart or len(leaf.shape) < 2:
            return 0, 0, 0
        found = self._tallies[0][1].source_rows(node.index, leaf.index)
        return (leaf.shape[0], found[1], found[0]) if found is not None else (0, 0, 0)


def with_activations(workload: Workload, programs: Sequence[Program], per_sample: bool) -> Workload:
    """The workload with the activation blocks that the graphs' asked nodes stand for.

    Raises:
        ConfigError: A node is no activation, or the batches do not agree in its shape.
    """
    found = [activation_specs(program.graph) for program in programs]
    for number, specs in enumerate(found):
        # By size, not by shape: a batch of one sample keeps an axis that others do without.
        if [(entry.name, entry.numel) for entry in specs] != [(entry.name, entry.numel) for entry in found[0]]:
            here, first = (
                ", ".join(f"{entry.name} {list(entry.shape)}" for entry in entries) for entries in (specs, found[0])
            )
            raise ConfigError(
                f"activation blocks add up over batches, which needs activations of one shape; batch 0 has {first} and batch "
                f"{number} has {here}. Give batches of equal shapes (of equal size where samples are coupled), or one batch."
            )
    samples = workload.samples if per_sample else 0
    if not found[0]:
        return workload
    graphs = distinct_graphs(programs) if workload.runs else [programs[0].graph]
    counter = SourceCounter(graphs[0], graphs[1:])
    names = [entry.name for entry in found[0]]
    costs = tuple(counter.activation(name, frozenset(names[place:]), samples) for place, name in enumerate(names))
    return dataclasses.replace(workload, activations=found[0], activation_sources=costs, activation_samples=samples)


def distinct_graphs(programs: Sequence[Program]) -> list[Graph]:
    """The graphs that the batches run on, each once, the first batch's first."""
    found: dict[int, Graph] = {}
    for program in programs:
        found.setdefault(id(program.graph), program.graph)
    return list(found.values())


def batch_runs(programs: Sequence[Program], sizes: Sequence[int]) -> tuple[BatchRun, ...]:
    """Every batch: which of the `distinct_graphs` it runs on, and its samples as the user counts them."""
    place = {id(graph): number for number, graph in enumerate(distinct_graphs(programs))}
    captured: dict[int, int] = {}
    runs = []
    for program, size in zip(programs, sizes, strict=True):
        number = place[id(program.graph)]
        first = captured.setdefault(number, size)
        runs.append(BatchRun(number, size) if program.graph.independent else BatchRun(number, 1, size, first))
    return tuple(runs)


def primal_entries(graph: Graph, held: frozenset[str] = frozenset()) -> int:
    """Entries of all values and deltas of the captured example, but for constants named in ``held``: the model's own tensors."""
    return sum(
        _size(node) * (2 if node.live else 1)
        for node in graph.nodes
        if node.kind != "size" and not (node.kind == "constant" and node.op in held)
    )


def parameter_targets(parameters: Sequence[ParameterSpec]) -> Mapping[str, frozenset[str]]:
    """For each parameter that is used: those of the same or a later rank."""
    used = [parameter for parameter in parameters if parameter.uses]
    return {source.name: frozenset(target.name for target in used if target.rank >= source.rank) for source in used}


def _size(node: Node) -> int:
    count = 1
    for size in node.shape:
        count *= size
    return count
