"""Count what sweeping one source takes on one graph."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from disthess.graph.ir import Graph, Node
from disthess.graph.waves import leading_to, levels, live_uses
from disthess.planning.source import activation_source
from disthess.planning.work import ReverseWork, SweepWork, Work
from disthess.planning.workload import SourceCost
from disthess.rules.table import rule_for
from disthess.sweep.tally import OutputSource, SweepTally
from disthess.types import Part


@dataclass(frozen=True, slots=True)
class OutputBasis:
    """Of a source; zeros where there is none.

    Attributes:
        units: Outputs of the layer.
        width: Its inputs: rows of a unit.
        tangents: Of a unit and sample.
        rows: Of what is taken for a sample, at the layer.
    """

    units: int = 0
    width: int = 0
    tangents: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Errand:
    """A source and what it is swept for.

    Attributes:
        source: Name of the parameter, or of the one use of it.
        parameter: The parameter.
        wanted: Names of target parameters, or of target uses.
        apart: Whether uses are swept, and their rows kept, each for itself.
    """

    source: str
    parameter: str
    wanted: frozenset[str]
    apart: bool


@final
class GraphCounter:
    """Costs of sources on one graph, a sample's share each.

    Args:
        graph: The captured objective.
        parts: Parts to count matrix products of.

    Attributes:
        graph: The same.
        uses: Its live uses in topological order.
    """

    def __init__(self, graph: Graph, parts: Sequence[Part]) -> None:
        self.graph = graph
        self.uses = live_uses(graph)
        self._per = graph.samples if graph.independent else 1
        self._levels = levels(graph)
        self._tally = SweepTally(graph, parts)
        self._consumer: dict[int, Node] = {}
        for node in graph.nodes:
            for ref in node.refs():
                if graph.nodes[ref].kind == "use":
                    self._consumer.setdefault(ref, node)

    def leaves(self, errand: Errand) -> list[Node]:
        """The source's."""
        return [node for node in self.uses if errand.source == (node.name if errand.apart else node.op)]

    def targets(self, errand: Errand) -> list[Node]:
        """Those that rows are wanted of."""
        return [node for node in self.uses if (node.name if errand.apart else node.op) in errand.wanted]

    def count(self, errand: Errand, basis: OutputBasis) -> SourceCost:
        """What is done entry by entry, and what is held."""
        return self._count(errand.source, errand.parameter, self.leaves(errand), self.targets(errand), basis)

    def output_basis(self, errand: Errand) -> OutputBasis:
        """Of the weight of dense layers or convolutions, all uses alike, where several have fewer rows together than inputs."""
        leaves, found = self.leaves(errand), set()
        for leaf in leaves:
            node = self._consumer[leaf.index]
            told_apart = node.region == "sample" or not self.graph.independent
            usable = told_apart and len(leaf.shape) > 1
            found.add(self._tally.source_rows(node.index, leaf.index) if usable else None)
        rows = found.pop()
        if rows is None or found or (len(leaves) > 1 and rows[0] * len(leaves) > rows[1]):
            return OutputBasis()
        source = self._output_source(errand, leaves[0], rows)
        return OutputBasis(leaves[0].shape[0], rows[1], source.tangents, source.layer_rows)

    def parameter_sweep(self, errand: Errand) -> SweepWork:
        """Matrix products from unit vectors of the parameter."""
        seeds = [leaf.index for leaf in self.leaves(errand)]
        return self._tally.sweep(seeds, self.targets(errand), None) if seeds else self._nothing()

    def output_sweep(self, errand: Errand, basis: OutputBasis) -> SweepWork:
        """Those from the output of every use, and back from its inputs."""
        targets = self.targets(errand)
        uses = Counter(node.op for node in targets)
        shared = frozenset(node.index for node in targets if uses[node.op] > 1 and not errand.apart)
        found = []
        for leaf in self.leaves(errand):
            rows = self._tally.source_rows(self._consumer[leaf.index].index, leaf.index)
            source = self._output_source(errand, leaf, (basis.rows, basis.width) if rows is None else rows)
            source = dataclasses.replace(source, shared=shared)
            found += [self._tally.sweep([source.start], targets, source), self._tally.back(targets, source)]
        return functools.reduce(operator.add, found) if found else self._nothing()

    def _output_source(self, errand: Errand, leaf: Node, rows: tuple[int, int]) -> OutputSource:
        """One use, with rows of a sample and inputs of its layer."""
        shortcut = self._tally.shortcut(self.leaves(errand), self.targets(errand))
        return OutputSource(self._consumer[leaf.index].index, leaf.index, rows[1], rows[0], shortcut=shortcut)

    def _nothing(self) -> SweepWork:
        return SweepWork(Work(), tuple(ReverseWork(part, Work(), Work()) for part in self._tally.parts))

    def activation(self, name: str, targets: frozenset[str], samples: int) -> SourceCost:
        """A node's activation against target nodes, rows kept for so many samples."""
        nodes = [node for node in self.graph.nodes if node.asked and node.name in targets]
        source = [node for node in nodes if node.name == name]
        entries = _size(source[0]) // self._per
        cost = self._count(activation_source(name), name, source, nodes, OutputBasis(entries, samples, 1, 1))
        return dataclasses.replace(cost, uses=(), rows=entries * samples)

    def activation_sweep(self, name: str, targets: frozenset[str]) -> SweepWork:
        """Its matrix products."""
        asked = [node for node in self.graph.nodes if node.asked and node.name in targets]
        return self._tally.sweep([node.index for node in asked if node.name == name], asked, None)

    def _count(
        self, source: str, parameter: str, leaves: Sequence[Node], targets: Sequence[Node], basis: OutputBasis
    ) -> SourceCost:
        graph = self.graph
        reached = self._reached(leaves)
        passed = frozenset(leading_to(graph, [node.index for node in targets]))
        propagation = summed = apart = held = kept = 0
        uses = Counter(node.op for node in targets)
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
                    kept += _size(node) if uses[other.op] > 1 else 0
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
            units=basis.units,
            unit_rows=basis.width,
            unit_tangents=basis.tangents,
            propagation=-(-propagation // per),
            summed_targets=-(-summed // per),
            apart_targets=-(-apart // per),
            columns=sum(_size(node) for node in targets),
            diagonal=basis.rows == 1 and len(leaves) == 1,
            tangent_entries=-(
                -sum(_size(graph.nodes[index]) for index in reached if graph.nodes[index].region != "total") // per
            ),
            front_entries=-(
                -max((_size(node) for node in graph.nodes if node.live and node.kind == "op"), default=1) // per
            ),
            apart_entries=held // per,
            kept_entries=kept // per,
        )

    def _reached(self, leaves: Sequence[Node]) -> set[int]:
        reached = {node.index for node in leaves}
        for node in self.graph.nodes[min(reached) :]:
            if node.live and node.region != "total" and any(ref in reached for ref in node.refs()):
                reached.add(node.index)
        return reached

    def _entries(self, node: Node) -> int:
        shapes = tuple(self.graph.nodes[ref].shape for ref in node.refs() if self.graph.nodes[ref].kind != "size")
        return rule_for(node.op).entry_multiply_adds(shapes, node.shape)


def _size(node: Node) -> int:
    return math.prod(node.shape)
