"""Kinks and ties: where the first or second derivative of an operation jumps, and what torch takes there.

Five kinds of operation have them:

* ``place``: an entry of the input lies at a fixed kink or jump (relu at 0, clamp at its bounds, floor at whole numbers);
* ``compare``: two values that are compared are equal, so that a branch is chosen by torch's convention;
* ``operand``: the operands of a maximum or minimum of two tensors are equal;
* ``winner`` and ``order``: equal entries of one tensor compete for the maximum, or for a place in an order;
* ``apex``: a Euclidean norm of 0 or a root of 0, where no smooth pieces meet: it is reported, and has none to choose from.
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

Kind = Literal["place", "compare", "operand", "winner", "order", "apex"]


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


def kind_of(node: Node) -> Kind | None:
    """How an operation can be tied; None if it cannot."""
    if node.op in _NORMS:
        order = _order_of_norm(node)
        return "place" if order == 1 else "winner" if math.isinf(order) else None if order == 0 else "apex"
    return _KINDS.get(node.op)


def torch_takes(node: Node) -> str:
    """What torch's derivatives are at a tie of an operation, in words; empty for one that has none."""
    kind = kind_of(node)
    if kind is None:
        return ""
    if node.op in _NORMS and kind != "place":
        return _EVEN if kind == "winner" else "slope 0, and no second derivative"
    return _TAKES.get(node.op, _BY_KIND[kind])


def nearest_places(node: Node, x: Tensor) -> Tensor:
    """The kink of an operation of kind ``place`` that is nearest to each entry of its input; infinite where it has none."""
    rule = _PLACES[node.op](_numbers(node))
    if callable(rule):
        return rule(x)
    kinks = x.new_tensor([place for place in rule if math.isfinite(place)])
    if not len(kinks):
        return torch.full_like(x, math.inf)
    return kinks[(x.unsqueeze(-1) - kinks).abs().argmin(-1)]


def is_smallest(node: Node) -> bool:
    """Whether the least of the competing entries wins, rather than the greatest."""
    return node.op in _SMALLEST or (node.op == "aten.aminmax.default" and node.output == 0) or _infinite_norm(node) < 0


def competing(node: Node, x: Tensor) -> Tensor:
    """What competes at an operation of kind ``winner``: the entries of its input, or their magnitudes in a norm."""
    return x.abs() if node.op in _NORMS else x


def closeness(tensors: Sequence[Tensor], tolerance: float) -> float:
    """How far apart two entries are that count as equal: relative to the largest finite magnitude."""
    scale = 0.0
    for tensor in tensors:
        size = tensor.detach().abs()
        if size.numel():
            scale = max(scale, float(torch.where(torch.isfinite(size), size, 0.0).max()))
    return tolerance * (scale or 1.0)


def operands(node: Node, values: Sequence[Any]) -> tuple[Tensor, ...]:
    """What a comparison compares, or what a maximum of tensors chooses from, broadcast to one shape."""
    count = 3 if node.op == "aten.clamp.Tensor" else 2
    given = [*node.args, *(value for _, value in node.kwargs)][:count]
    entries = [values[entry.node] if isinstance(entry, Ref) else entry for entry in given if entry is not None]
    like = next(entry for entry in entries if isinstance(entry, Tensor) and entry.is_floating_point())
    tensors = [torch.as_tensor(entry, dtype=like.dtype, device=like.device) for entry in entries]
    return tuple(torch.broadcast_tensors(*tensors))


def tied_entries(node: Node, values: Sequence[Any], tolerance: float, groups: Tensor | None = None) -> Tensor:
    """Flat mask of tied entries: of the input for ``place`` and ``order``, else of the output.

    Args:
        node: An operation with a kind.
        values: Every node's value.
        tolerance: Relative to the largest magnitude among the node's inputs.
        groups: Of kind ``winner``, the `candidates` of those outputs that are asked about; None for all.
    """
    refs = _floating(node, values)
    close = closeness([values[ref] for ref in refs], tolerance)
    kind = kind_of(node)
    first = values[refs[0]].detach()
    if kind == "place":
        return (first - nearest_places(node, first)).abs().reshape(-1) <= close
    if kind == "apex":
        return (
            first.reshape(-1).abs() <= close if node.op in _ROOTS else values[node.index].detach().reshape(-1) <= close
        )
    if kind in ("compare", "operand"):
        given = [entry.detach() for entry in operands(node, values)]
        near = torch.zeros(given[0].numel(), dtype=torch.bool, device=first.device)
        for bound in given[1:]:
            near |= (given[0] - bound).abs().reshape(-1) <= close
        return near
    if kind == "winner":
        return tied_candidates(node, first, close, groups).sum(1) > 1
    return _equal_neighbours(node, line_of(node, first.shape), first.reshape(-1), close)


def tied_candidates(node: Node, x: Tensor, close: float, groups: Tensor | None = None) -> Tensor:
    """Which candidates of each output of a ``winner`` are within ``close`` of the best, ``[outputs, candidates]``."""
    groups = candidates(node, x.shape) if groups is None else groups
    sign = -1.0 if is_smallest(node) else 1.0
    padded = torch.cat([sign * competing(node, x).reshape(-1), x.new_full((1,), -math.inf)])
    rows = padded[groups.to(x.device)]
    return (rows >= rows.max(dim=1, keepdim=True).values - close) & torch.isfinite(rows)


def is_tieable(graph: Graph, node: Node, values: Sequence[Any]) -> bool:
    """Whether a node has a kind and reads a live value (a comparison has no derivative of its own, and is not live itself)."""
    if node.kind != "op" or kind_of(node) is None:
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
        # Of values and indices the values speak for both; a least and a greatest value are tied each for itself.
        if not is_tieable(graph, node, values) or not (node.output in (None, 0) or node.op == "aten.aminmax.default"):
            continue
        tied = moving(node, values, moved, tolerance)
        count = int(tied.sum())
        if count:
            found.append(KinkReport(node.name, node.op, count, _samples(node, tied, samples), torch_takes(node)))
    return tuple(found)


def moving(node: Node, values: Sequence[Any], moved: Sequence[Sequence[Any]], tolerance: float) -> Tensor:
    """Tied entries that come apart when the parameters move."""
    groups = None
    if kind_of(node) == "winner":
        groups = candidates(node, values[_floating(node, values)[0]].shape)
    tied = tied_entries(node, values, tolerance, groups)
    if not moved or not bool(tied.any()):
        return tied
    # Of groups only those that are tied here are looked at again: there may be many, and they are the same at every point.
    chosen = None if groups is None else groups[tied.cpu()]
    stay = torch.ones_like(tied[tied])
    for other in moved:
        near = tied_entries(node, other, tolerance, chosen)
        stay &= near[tied] if groups is None else near
    return tied.masked_scatter(tied, ~stay)


def _floating(node: Node, values: Sequence[Any]) -> list[int]:
    return [ref for ref in node.refs() if isinstance(values[ref], Tensor) and values[ref].is_floating_point()]


def _samples(node: Node, tied: Tensor, samples: int) -> int | None:
    if samples <= 1:
        return 1
    if node.batch is None or node.batch.dim != 0 or len(tied) % (samples * node.batch.outer):
        return None
    return int(tied.reshape(node.batch.outer, samples, -1).any(2).any(0).sum())


def _equal_neighbours(node: Node, lines: Tensor, flat: Tensor, close: float) -> Tensor:
    """Entries equal to a neighbour in the order of their line, where the operation reads that order; ``lines`` holds indices."""
    near = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    lines = lines.to(flat.device)
    ordered, rank = flat[lines].sort(dim=1)
    same = ordered.diff(dim=1) <= close
    first, last = ranks_read(node, lines.shape[1])
    # A group of equal entries matters if one of its places is read; it need not be there as a whole.
    group = torch.cat([torch.zeros_like(same[:, :1], dtype=torch.long), (~same).long()], dim=1).cumsum(1)
    read = torch.zeros_like(group, dtype=torch.bool)
    for place in range(first, last):
        read |= group == group[:, place : place + 1]
    for side in (slice(None, -1), slice(1, None)):
        near[lines.gather(1, rank)[:, side][same & read[:, side]]] = True
    return near


def ranks_read(node: Node, size: int) -> tuple[int, int]:
    """Which places of the ascending order an operation reads: from, to (not included)."""
    name = node.op.split(".")[1]
    if name == "kthvalue":
        return int(node.args[1]) - 1, int(node.args[1])
    if name == "median":
        return (size - 1) // 2, (size + 1) // 2
    if name == "topk":
        count = int(node.args[1])
        given = dict(node.kwargs)
        largest = bool(given.get("largest", node.args[3] if len(node.args) > 3 else True))
        return (size - count, size) if largest else (0, count)
    return 0, size


def _order_of_norm(node: Node) -> float:
    given = node.args[1] if len(node.args) > 1 else dict(node.kwargs).get("ord", 2)
    return float(given) if isinstance(given, (int, float)) else 2.0


def _infinite_norm(node: Node) -> float:
    """1 for a norm that is the greatest magnitude, -1 for the least, 0 for any other operation."""
    order = _order_of_norm(node) if node.op in _NORMS else 0.0
    return math.copysign(1.0, order) if math.isinf(order) else 0.0


def _numbers(node: Node) -> list[float]:
    return [float(entry) if isinstance(entry, (int, float)) else math.nan for entry in node.args[1:]]


def _defaulted(numbers: list[float], *defaults: float) -> list[float]:
    return numbers + list(defaults)[len(numbers) :]


Rule = list[float] | Callable[[Tensor], Tensor]
"""Fixed kinks, or the nearest one to each entry."""


def _whole(x: Tensor) -> Tensor:
    return x.round()


def _half(x: Tensor) -> Tensor:
    return x.floor() + 0.5


def _multiples(numbers: list[float]) -> Rule:
    """Multiples of a divisor; none are known where it is a tensor."""
    return (lambda x: (x / numbers[0]).round() * numbers[0]) if numbers and math.isfinite(numbers[0]) else []


_ZERO: Callable[[list[float]], Rule] = lambda numbers: [0.0]  # noqa: E731
_PLACES: Mapping[str, Callable[[list[float]], Rule]] = {
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
    "aten.linalg_vector_norm.default": _ZERO,  # the 1-norm, whose kinks are those of its entries
    **{f"aten.{name}.default": lambda numbers: _whole for name in ("floor", "ceil", "trunc", "frac")},
    "aten.round.default": lambda numbers: _half,
    "aten.remainder.Scalar": _multiples,
    "aten.fmod.Scalar": _multiples,
}
_NORMS = frozenset({"aten.linalg_vector_norm.default"})
_ROOTS = frozenset({"aten.sqrt.default"})
_EQUAL = frozenset(f"aten.{name}.{form}" for name in ("eq", "ne") for form in ("Tensor", "Scalar"))
_COMPARE = _EQUAL | frozenset(
    f"aten.{name}.{form}" for name in ("gt", "ge", "lt", "le") for form in ("Tensor", "Scalar")
)
_OPERAND = frozenset(
    {f"aten.{name}.default" for name in ("maximum", "minimum", "fmax", "fmin")}
    | {f"aten.{name}.Tensor" for name in ("clamp", "clamp_min", "clamp_max")}
    | {"aten.max.other", "aten.min.other"}
)
_SMALLEST = frozenset({"aten.amin.default", "aten.min.dim", "aten.min.default", "aten.argmin.default"})
_WINNER = _SMALLEST | frozenset(
    {"aten.amax.default", "aten.max.dim", "aten.max.default", "aten.argmax.default", "aten.adaptive_max_pool1d.default",
     "aten.adaptive_max_pool2d.default", "aten.adaptive_max_pool3d.default", "aten.max_pool2d_with_indices.default",
     "aten.max_pool3d_with_indices.default", "aten.aminmax.default"}
    | {f"aten.max_pool{n}d.default" for n in (1, 2, 3)}
)  # fmt: skip
_ORDER = frozenset(
    {
        f"aten.{name}.default"
        for name in ("sort", "argsort", "msort", "topk", "kthvalue", "median", "nanmedian", "cummax", "cummin")
    }
    | {"aten.sort.stable", "aten.median.dim", "aten.nanmedian.dim", "aten.argsort.stable"}
    | {f"aten.{name}.{form}" for name in ("quantile", "nanquantile") for form in ("default", "scalar")}
)
_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(_PLACES, "place"),
    **dict.fromkeys(_COMPARE, "compare"),
    **dict.fromkeys(_OPERAND, "operand"),
    **dict.fromkeys(_WINNER, "winner"),
    **dict.fromkeys(_ORDER, "order"),
    **dict.fromkeys(_ROOTS, "apex"),
}
_BY_KIND: Mapping[Kind, str] = {
    "place": "slope 0",
    "compare": "the branch that the comparison gives for equal values",
    "operand": "half of each operand",
    "winner": "one of the equal entries",
    "order": "one order of the equal entries",
    "apex": "an infinite slope",
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
    "aten.clamp_min.Tensor": "slope 1",
    "aten.clamp_max.Tensor": "slope 1",
    "aten.aminmax.default": "equal parts of all that are equal",
    **{f"aten.{name}.default": "slope 0" for name in ("floor", "ceil", "trunc", "round")},
    "aten.frac.default": "slope 1",
    "aten.remainder.Scalar": "slope 1",
    "aten.fmod.Scalar": "slope 1",
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
    **{f"aten.max_pool{n}d_with_indices.default": "the first of the equal entries" for n in (2, 3)},
}
