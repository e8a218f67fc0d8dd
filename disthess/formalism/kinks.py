"""Kinks and ties: where the first or second derivative of an operation jumps, and what torch takes there.

Four kinds of operation have them:

* ``place``: an entry of the input lies at a fixed kink (relu at 0, clamp at its bounds);
* ``compare``: two values that are compared are equal, so that a branch is chosen by torch's convention;
* ``operand``: the operands of a maximum or minimum of two tensors are equal;
* ``winner`` and ``order``: equal entries of one tensor compete for the maximum, or for a place in an order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from disthess.formalism.candidates import candidates, line_of
from disthess.graph.ir import Graph, Node, Ref

Kind = Literal["place", "compare", "operand", "winner", "order"]


@dataclass(frozen=True, slots=True)
class KinkReport:
    """A node some of whose entries are tied.

    Attributes:
        node: Its name.
        op: Its operation.
        entries: How many entries are tied, over all batches.
        samples: How many samples have one; None where samples are not told apart at that node.
        torch_takes: What torch's derivatives are at such a tie.
    """

    node: str
    op: str
    entries: int
    samples: int | None
    torch_takes: str


def kind_of(op: str) -> Kind | None:
    """How an operation can be tied; None if it cannot."""
    return _KINDS.get(op)


def torch_takes(op: str) -> str:
    """What torch's derivatives are at a tie of an operation, in words; empty for one that has none."""
    if op in _TAKES:
        return _TAKES[op]
    return "" if op not in _KINDS else _BY_KIND[_KINDS[op]]


def places(node: Node) -> tuple[float, ...]:
    """Inputs at which an operation of kind ``place`` has a kink."""
    found = _PLACES[node.op](_numbers(node))
    return tuple(place for place in found if math.isfinite(place))


def operands(node: Node, values: Sequence[Any]) -> tuple[Tensor, ...]:
    """What a comparison compares, or what a maximum of tensors chooses from, broadcast to one shape."""
    entries = [values[entry.node] if isinstance(entry, Ref) else entry for entry in node.args[:3] if entry is not None]
    like = next(entry for entry in entries if isinstance(entry, Tensor) and entry.is_floating_point())
    count = len(entries) if node.op == "aten.clamp.Tensor" else 2
    tensors = [torch.as_tensor(entry, dtype=like.dtype, device=like.device) for entry in entries[:count]]
    return tuple(torch.broadcast_tensors(*tensors))


def tied_entries(node: Node, values: Sequence[Any], tolerance: float) -> Tensor:
    """Flat mask of tied entries: of the input for ``place`` and ``order``, else of the output.

    Args:
        node: An operation with a kind.
        values: Every node's value.
        tolerance: Relative to the largest magnitude among the node's inputs.
    """
    refs = [ref for ref in node.refs() if isinstance(values[ref], Tensor) and values[ref].is_floating_point()]
    scale = max((float(values[ref].detach().abs().max()) for ref in refs if values[ref].numel()), default=0.0)
    close = tolerance * (scale if 0 < scale < math.inf else 1.0)
    kind = kind_of(node.op)
    first = values[refs[0]].detach()
    if kind == "place":
        near = torch.zeros(first.numel(), dtype=torch.bool, device=first.device)
        for place in places(node):
            near |= (first.reshape(-1) - place).abs() <= close
        return near
    if kind in ("compare", "operand"):
        given = [entry.detach() for entry in operands(node, values)]
        near = torch.zeros(given[0].numel(), dtype=torch.bool, device=first.device)
        for bound in given[1:]:
            near |= (given[0] - bound).abs().reshape(-1) <= close
        return near
    if kind == "winner":
        return tied_candidates(node, first, close).sum(1) > 1
    return _equal_neighbours(line_of(node, first.shape), first.reshape(-1), close)


def tied_candidates(node: Node, x: Tensor, close: float) -> Tensor:
    """Which candidates of each output of a ``winner`` are within ``close`` of the best, ``[outputs, candidates]``."""
    groups = candidates(node, x.shape)
    sign = -1.0 if node.op in _SMALLEST else 1.0
    padded = torch.cat([sign * x.reshape(-1), x.new_full((1,), -math.inf)])
    rows = padded[groups.to(x.device)]
    return (rows >= rows.max(dim=1, keepdim=True).values - close) & torch.isfinite(rows)


def is_tieable(graph: Graph, node: Node, values: Sequence[Any]) -> bool:
    """Whether a node has a kind and reads a live value (a comparison has no derivative of its own, and is not live itself)."""
    if node.kind != "op" or kind_of(node.op) is None:
        return False
    live = [ref for ref in node.refs() if graph.nodes[ref].live]
    return bool(live) and any(isinstance(values[ref], Tensor) and values[ref].is_floating_point() for ref in live)


def find_kinks(
    graph: Graph, values: Sequence[Any], moved: Sequence[Sequence[Any]], samples: int, tolerance: float
) -> tuple[KinkReport, ...]:
    """Nodes with tied entries, at one batch's values.

    Args:
        graph: The captured objective.
        values: Every node's value.
        moved: The same at parameters nearby. Entries tied there as well stay equal whatever the parameters are (pooling over
            what a relu has cut off): the pieces coincide, nothing jumps, and they are not counted.
        samples: How many samples the batch has.
        tolerance: See `tied_entries`.
    """
    found = []
    for node in graph.nodes:
        if not is_tieable(graph, node, values) or node.output not in (None, 0):
            continue
        tied = moving(node, values, moved, tolerance)
        count = int(tied.sum())
        if count:
            found.append(KinkReport(node.name, node.op, count, _samples(node, tied, samples), torch_takes(node.op)))
    return tuple(found)


def moving(node: Node, values: Sequence[Any], moved: Sequence[Sequence[Any]], tolerance: float) -> Tensor:
    """Tied entries that come apart when the parameters move."""
    tied = tied_entries(node, values, tolerance)
    if not moved or not bool(tied.any()):
        return tied
    stay = torch.ones_like(tied)
    for other in moved:
        stay &= tied_entries(node, other, tolerance)
    return tied & ~stay


def _samples(node: Node, tied: Tensor, samples: int) -> int | None:
    if samples <= 1:
        return 1
    if node.batch is None or node.batch.dim != 0 or len(tied) % samples:
        return None
    return int(tied.reshape(samples, -1).any(1).sum())


def _equal_neighbours(lines: Tensor, flat: Tensor, close: float) -> Tensor:
    """Entries equal to a neighbour in the order of their line; ``lines`` holds flat indices, ``[lines, entries]``."""
    near = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    lines = lines.to(flat.device)
    ordered, rank = flat[lines].sort(dim=1)
    same = ordered.diff(dim=1) <= close
    for side in (slice(None, -1), slice(1, None)):
        near[lines.gather(1, rank)[:, side][same]] = True
    return near


def _numbers(node: Node) -> list[float]:
    return [float(entry) if isinstance(entry, (int, float)) else math.nan for entry in node.args[1:]]


def _defaulted(numbers: list[float], *defaults: float) -> list[float]:
    return numbers + list(defaults)[len(numbers) :]


_ZERO: Callable[[list[float]], list[float]] = lambda numbers: [0.0]  # noqa: E731
_PLACES: Mapping[str, Callable[[list[float]], list[float]]] = {
    **{f"aten.{name}.default": _ZERO for name in ("relu", "abs", "leaky_relu", "elu", "celu", "selu", "prelu", "sign")},
    "aten.sgn.default": _ZERO,
    "aten.relu6.default": lambda numbers: [0.0, 6.0],
    "aten.clamp.default": lambda numbers: numbers[:2],
    "aten.clamp_min.default": lambda numbers: numbers[:1],
    "aten.clamp_max.default": lambda numbers: numbers[:1],
    "aten.hardtanh.default": lambda numbers: _defaulted(numbers, -1.0, 1.0)[:2],
    "aten.threshold.default": lambda numbers: numbers[:1],
    "aten.softshrink.default": lambda numbers: [-_defaulted(numbers, 0.5)[0], _defaulted(numbers, 0.5)[0]],
    "aten.hardshrink.default": lambda numbers: [-_defaulted(numbers, 0.5)[0], _defaulted(numbers, 0.5)[0]],
    "aten.hardswish.default": lambda numbers: [-3.0, 3.0],
    "aten.hardsigmoid.default": lambda numbers: [-3.0, 3.0],
    "aten.rrelu.default": _ZERO,
    # Only the 1-norm has its kinks entry by entry.
    "aten.linalg_vector_norm.default": lambda numbers: [0.0] if numbers[:1] == [1.0] else [],
}
_COMPARE = frozenset(f"aten.{name}.{form}" for name in ("gt", "ge", "lt", "le") for form in ("Tensor", "Scalar"))
_OPERAND = frozenset(
    {f"aten.{name}.default" for name in ("maximum", "minimum", "fmax", "fmin")} | {"aten.clamp.Tensor"}
)
_SMALLEST = frozenset({"aten.amin.default", "aten.min.dim", "aten.min.default", "aten.argmin.default"})
_WINNER = _SMALLEST | frozenset(
    {"aten.amax.default", "aten.max.dim", "aten.max.default", "aten.argmax.default", "aten.adaptive_max_pool1d.default",
     "aten.adaptive_max_pool2d.default", "aten.max_pool2d_with_indices.default"}
    | {f"aten.max_pool{n}d.default" for n in (1, 2, 3)}
)  # fmt: skip
_ORDER = frozenset(
    {
        f"aten.{name}.default"
        for name in ("sort", "argsort", "topk", "kthvalue", "median", "nanmedian", "cummax", "cummin")
    }
    | {"aten.sort.stable", "aten.median.dim", "aten.nanmedian.dim", "aten.argsort.stable"}
)
_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(_PLACES, "place"),
    **dict.fromkeys(_COMPARE, "compare"),
    **dict.fromkeys(_OPERAND, "operand"),
    **dict.fromkeys(_WINNER, "winner"),
    **dict.fromkeys(_ORDER, "order"),
}
_BY_KIND: Mapping[Kind, str] = {
    "place": "slope 0",
    "compare": "the branch that the comparison gives for equal values",
    "operand": "half of each operand",
    "winner": "one of the equal entries",
    "order": "one order of the equal entries",
}
_EVEN = "equal parts of all that are equal"
_TAKES: Mapping[str, str] = {
    "aten.abs.default": "slope 0, which is neither side's",
    "aten.sign.default": "0, which is neither side's",
    "aten.sgn.default": "0, which is neither side's",
    "aten.leaky_relu.default": "the negative slope",
    "aten.prelu.default": "the negative slope",
    "aten.rrelu.default": "the negative slope",
    "aten.clamp.default": "slope 1",
    "aten.clamp_min.default": "slope 1",
    "aten.clamp_max.default": "slope 1",
    "aten.clamp.Tensor": "slope 1",
    "aten.hardswish.default": "slope 1 at 3 and 0 at -3, second derivative 0",
    "aten.elu.default": "the positive side's slope, second derivative 0",
    "aten.celu.default": "second derivative 0",
    "aten.selu.default": "the negative side's slope",
    "aten.fmax.default": "the first operand",
    "aten.fmin.default": "the first operand",
    "aten.linalg_vector_norm.default": "slope 0, which is neither side's",
    "aten.amax.default": _EVEN,
    "aten.amin.default": _EVEN,
    "aten.max.default": _EVEN,
    "aten.min.default": _EVEN,
    "aten.median.default": _EVEN,
    "aten.nanmedian.default": _EVEN,
    **{f"aten.max_pool{n}d.default": "the first of the equal entries" for n in (1, 2, 3)},
    "aten.max_pool2d_with_indices.default": "the first of the equal entries",
}
