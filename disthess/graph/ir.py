"""The model as a DAG of single-output nodes: the intermediate representation that every later step reads.

A node is one ATen operation of the exported objective, or a leaf: an input, a constant, or one *use* of a parameter.
Every (node, parameter) occurrence has a leaf of its own, which feeds that node alone; so a panel block is what the reverse
wave leaves at a leaf, and a shared parameter is simply one with several leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

NodeKind = Literal["use", "input", "constant", "size", "op"]
"""``use``: a parameter leaf; ``input``: a tensor of the batch; ``constant``: a buffer or literal tensor;
``size``: an integer computed from shapes; ``op``: an operation that yields a tensor."""

Region = Literal["fixed", "weight", "sample", "total"]
"""How a node depends on parameters and samples: ``fixed`` is not live; ``weight`` depends on parameters but on no sample;
``sample`` has a batch axis along which samples do not mix; ``total`` mixes samples (the loss and what leads to it)."""


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is another node's value."""

    node: int


@dataclass(frozen=True, slots=True)
class BatchAxis:
    """Where samples lie in a value: axis ``dim`` has size ``outer * samples * inner``, in that order.

    ``[N, 16, D]`` flattened to ``[N * 16, D]`` has ``outer=1, inner=16``; ``[16, N, D]`` flattened has ``outer=16, inner=1``.
    ``dim=-1`` marks a shape that mixes the batch with other axes in another way.

    >>> BatchAxis(0, 1, 16).rows_per_sample
    16
    """

    dim: int
    outer: int
    inner: int

    @property
    def rows_per_sample(self) -> int:
        """Entries of the axis that belong to one sample."""
        return self.outer * self.inner


@dataclass(frozen=True, slots=True)
class Node:
    """One node.

    Attributes:
        index: Its position; arguments always have smaller indices (topological order).
        name: Readable and unique: the module it came from and the operation, ``fc1.linear``.
        kind: See `NodeKind`.
        op: ``aten.linear.default`` and so on; for leaves what it holds (parameter name, buffer name, input path).
        args: Positional arguments: `Ref`, numbers, None, or (nested) tuples of these.
        kwargs: Keyword arguments as (name, value) pairs.
        output: Which output of a multi-output operation this node is; None for single-output operations.
        shape: Shape on the captured example.
        dtype: ``float64``, ``int64``, ... ; empty for sizes.
        batch: Batch axis, or None.
        region: See `Region`.
        in_model: Whether it lies inside the model (before the model's outputs), as opposed to the loss.
        live: Whether it depends on a parameter or an activation asked for, and the objective depends on it.
        module: Path of the module it came from: ``model``, ``model.fc1``; empty outside the model.
        asked: Whether its activation Hessian is asked for.
    """

    index: int
    name: str
    kind: NodeKind
    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    output: int | None
    shape: tuple[int, ...]
    dtype: str
    batch: BatchAxis | None = None
    region: Region = "fixed"
    in_model: bool = True
    live: bool = False
    module: str = ""
    asked: bool = False

    _refs: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found: list[int] = []
        _find_refs(self.args, found)
        _find_refs(tuple(value for _, value in self.kwargs), found)
        # Asked for so often that a large graph would spend most of its plan's time looking for them.
        object.__setattr__(self, "_refs", tuple(found))

    def refs(self) -> tuple[int, ...]:
        """Indices of the nodes it reads, in argument order, with repetitions."""
        return self._refs


def _find_refs(value: Any, found: list[int]) -> None:
    if isinstance(value, Ref):
        found.append(value.node)
    elif isinstance(value, tuple):
        for entry in value:
            _find_refs(entry, found)


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured objective.

    Attributes:
        nodes: In topological order.
        loss: Index of the scalar objective.
        samples: Number of samples on the captured example (1 if samples are not told apart).
        independent: Whether samples are proved independent: every ``sample`` node keeps samples apart and the
            objective is a sum over them.
        dynamic: Whether the batch dimension is dynamic, so that the graph serves other batch sizes.
        why: One sentence on how independence was decided.
        has_model_boundary: Whether the model's outputs are known, so that ``ggn`` is defined.
    """

    nodes: tuple[Node, ...]
    loss: int
    samples: int
    independent: bool
    dynamic: bool
    why: str
    has_model_boundary: bool

    def slots(self, index: int) -> tuple[int, ...]:
        """The node that each tensor argument of a node is, in slot order."""
        return tuple(ref for ref in self.nodes[index].refs() if self.nodes[ref].kind != "size")
