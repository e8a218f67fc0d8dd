"""Count what sweeping each source of a captured problem takes, from its graphs and its rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, final

from disthess.errors import ConfigError
from disthess.graph.ir import Graph, Node
from disthess.graph.program import Program
from disthess.graph.select import activation_specs
from disthess.planning.source import Basis
from disthess.planning.work import SweepWork
from disthess.planning.workload import BatchRun, SourceCost, Workload
from disthess.store.layout import ParameterSpec
from disthess.sweep.count import Errand, GraphCounter, OutputBasis
from disthess.types import PARTS, Part

Sweeps = tuple[tuple[Basis, tuple[SweepWork, ...]], ...]


@final
class SourceCounter:
    """Costs of sources of a problem.

    Args:
        graph: That of the first batch.
        others: The other batches' graphs, where they differ.
        parts: Parts to count matrix products of.
    """

    def __init__(self, graph: Graph, others: Sequence[Graph] = (), parts: Sequence[Part] = PARTS) -> None:
        self._counters = tuple(GraphCounter(each, parts) for each in (graph, *others))

    def parameters(self, named: Sequence[tuple[str, tuple[str, ...], tuple[int, ...]]]) -> tuple[ParameterSpec, ...]:
        """Specs in user order from (name, aliases, shape), with ranks by first use."""
        uses: dict[str, dict[str, None]] = {}
        for counter in self._counters:
            for node in counter.uses:
                uses.setdefault(node.op, {})[node.name] = None
        order = list(uses) + [name for name, _, _ in named if name not in uses]
        rank = {name: position for position, name in enumerate(order)}
        return tuple(
            ParameterSpec(name, aliases, shape, rank[name], tuple(uses.get(name, ()))) for name, aliases, shape in named
        )

    def use_names(self) -> tuple[str, ...]:
        """Names of all live uses of the first graph in topological order."""
        return tuple(node.name for node in self._counters[0].uses)

    def together(self, parameter: ParameterSpec, targets: frozenset[str]) -> SourceCost:
        """All uses of a parameter swept together against target parameters (itself among them)."""
        cost = self._cost(Errand(parameter.name, parameter.name, targets, apart=False))
        return dataclasses.replace(cost, uses=parameter.uses)

    def apart(self, use: str, targets: frozenset[str]) -> SourceCost:
        """One use against target uses."""
        parameter = next(node.op for node in self._counters[0].uses if node.name == use)
        return self._cost(Errand(use, parameter, targets, apart=True))

    def activation(self, name: str, targets: frozenset[str], samples: int) -> SourceCost:
        """A node's activation against target nodes (itself among them), rows kept for so many samples (0: summed)."""
        cost, *_ = found = [counter.activation(name, targets, max(1, samples)) for counter in self._counters]
        sweeps = tuple(counter.activation_sweep(name, targets) for counter in self._counters)
        return _largest(dataclasses.replace(cost, sweeps=(("activation", sweeps),)), found)

    def _cost(self, errand: Errand) -> SourceCost:
        used = [counter for counter in self._counters if counter.leaves(errand)]
        bases = [counter.output_basis(errand) for counter in used]
        # Rows of a sample may differ from graph to graph, the layer's inputs and outputs do not.
        if len({(basis.units, basis.width) for basis in bases}) > 1:
            bases = [OutputBasis()] * len(used)
        counted = [counter.count(errand, basis) for counter, basis in zip(used, bases, strict=True)]
        by_parameter = tuple(counter.parameter_sweep(errand) for counter in self._counters)
        sweeps: Sweeps = (("parameter", by_parameter),)
        if bases[0].units:
            by_output = tuple(counter.output_sweep(errand, bases[0]) for counter in self._counters)
            sweeps = (*sweeps, ("output", by_output))
        return _largest(dataclasses.replace(counted[0], sweeps=sweeps), counted)


def _largest(cost: SourceCost, others: Sequence[SourceCost]) -> SourceCost:
    """With the entries that memory is reckoned by of the graph that has most."""
    names = (
        "unit_tangents",
        "diagonal",
        "tangent_entries",
        "front_entries",
        "apart_entries",
        "kept_entries",
        "columns",
    )
    most: dict[str, Any] = {name: max(getattr(other, name) for other in others) for name in names}
    return dataclasses.replace(cost, **most)


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
    return math.prod(node.shape)
