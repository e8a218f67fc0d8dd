"""Are samples independent? Decided per problem, never assumed.

Samples are independent when the objective is a sum over them: no node mixes two samples before a final, linear, reduction.
Two tests, both of which must pass:

1. *Structure.* From the symbolic shapes: every live value has one batch axis, or none. A value without one that depends on
   samples (``total``) must feed only linear operations on values of its own kind, so that no sample sees it again.
2. *Probe.* Each operation with a batch axis is run once more with one sample's inputs replaced by NaN. Whatever a NaN can
   reach depends on that sample; every other sample's output must keep its exact bits. Repeated for several samples.

If either fails, the whole batch is treated as one sample: always right, and dearer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from disthess.graph.ir import Graph, Node, Region
from disthess.graph.probe import probe_samples
from disthess.graph.run import run_graph

_LINEAR_TOTALS = frozenset(
    f"aten.{name}"
    for name in (
        "sum.default", "sum.dim_IntList", "mean.default", "mean.dim", "neg.default", "view.default", "reshape.default",
        "_unsafe_view.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default", "clone.default",
        "alias.default", "select.int", "slice.Tensor", "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar",
        "stack.default", "cat.default", "permute.default", "transpose.int", "t.default", "expand.default", "_to_copy.default",
        "to.dtype", "flatten.using_ints", "rsub.Tensor",
    )
)  # fmt: skip
_LINEAR_IN_FIRST = frozenset({"aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar"})


def decide_independence(
    graph: Graph,
    parameters: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    constants: Mapping[int, Tensor],
    note: str,
) -> Graph:
    """The graph with regions set, and independence decided on the batch given.

    Args:
        graph: As captured.
        parameters: Values by first name.
        inputs: The batch's tensors.
        constants: Buffers and literals by node index.
        note: Why the batch dimension is not dynamic, or empty.

    Returns:
        The same graph, or, where samples are not independent, one in which the whole batch is one sample.
    """
    if note:
        return _as_one_sample(graph, f"samples are not told apart: {note}")
    regions, reason = _structure(graph)
    if not reason:
        with torch.no_grad():
            graph, reason = probe_samples(graph, run_graph(graph, parameters, inputs, constants))
    if reason:
        return _as_one_sample(graph, f"samples are coupled: {reason}")
    return _independent(graph, regions, "samples are independent: by structure, and by NaN probe of every operation")


def independence_by_structure(graph: Graph, note: str) -> Graph:
    """The same for a problem without values, where nothing can be probed: structure decides alone.

    An operation that mixes samples along the batch axis and keeps its size (a product across samples, say) is not seen.
    Where samples lie in an axis that holds several of a sample's rows is not known either: no count of work depends on it.

    Args:
        graph: As captured.
        note: Why the batch dimension is not dynamic, or empty.
    """
    if note:
        return _as_one_sample(graph, f"samples are not told apart: {note}")
    regions, reason = _structure(graph)
    if reason:
        return _as_one_sample(graph, f"samples are coupled: {reason}")
    return _independent(
        graph, regions, "samples are taken for independent: by structure alone, without values to probe with"
    )


def _independent(graph: Graph, regions: Sequence[Region], why: str) -> Graph:
    nodes = tuple(
        dataclasses.replace(node, region=region, batch=None if region in ("weight", "total") else node.batch)
        for node, region in zip(graph.nodes, regions, strict=True)
    )
    return dataclasses.replace(graph, nodes=nodes, independent=True, why=why)


def _as_one_sample(graph: Graph, why: str) -> Graph:
    nodes = tuple(
        dataclasses.replace(node, batch=None, region="weight" if node.live else "fixed") for node in graph.nodes
    )
    return dataclasses.replace(graph, nodes=nodes, samples=1, independent=False, why=why)


def _structure(graph: Graph) -> tuple[list[Region], str]:
    regions: list[Region] = []
    for node in graph.nodes:
        regions.append(_region(node, regions))
        if not node.live:
            continue
        reads = [graph.nodes[ref] for ref in node.refs()]
        mixed = next((other for other in (node, *reads) if other.batch is not None and other.batch.dim < 0), None)
        if mixed is not None:
            return regions, f"the shape of {mixed.name} mixes the batch with other axes"
        if regions[node.index] == "sample" and any(regions[other.index] == "total" for other in reads):
            return regions, f"{node.name} reads a value computed over several samples"
        if regions[node.index] == "total" and not _linear(node, reads, regions):
            return regions, f"{node.name} ({node.op}) is not a plain sum over samples"
    return regions, ""


def _region(node: Node, regions: Sequence[Region]) -> Region:
    if not node.live:
        return "fixed"
    if node.batch is not None:
        return "sample"
    return "total" if any(regions[ref] in ("sample", "total") for ref in node.refs()) else "weight"


def _linear(node: Node, reads: Sequence[Node], regions: Sequence[Region]) -> bool:
    if node.op in _LINEAR_TOTALS:
        return True
    live = [other for other in reads if other.live]
    first = node.refs()[:1]
    in_first = len(live) == 1 and (node.op.startswith("aten.mul") or first == (live[0].index,))
    return node.op in _LINEAR_IN_FIRST and in_first and regions[live[0].index] != "fixed"
