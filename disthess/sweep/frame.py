"""A primal point restricted to a microbatch: what rules see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from disthess.graph.batch import pick_samples, take_samples
from disthess.graph.ir import Node
from disthess.graph.run import evaluate, resolve
from disthess.rules.base import AbstractRule, Call
from disthess.rules.bind import make_call
from disthess.rules.table import rule_for
from disthess.sweep.primal import Primal
from disthess.types import Span


@final
class Frame:
    """Calls of a primal's nodes on some samples, made when first asked for.

    Args:
        primal: The whole batch.
        span: The samples taken; or with ``picked`` the place of those taken among them.
        picked: Samples that are not all next to each other.

    Attributes:
        primal: The whole batch.
        span: The samples taken, or their place among those picked.
        first: Whether this microbatch is the one that accounts for curvature shared by all samples.
    """

    __slots__ = ("_calls", "_picked", "_values", "first", "primal", "span")

    def __init__(self, primal: Primal, span: Span, picked: Sequence[int] | None = None) -> None:
        self.primal = primal
        self.span = span
        self._picked = picked
        self.first = span.start == 0
        self._values: list[Any] = [None] * len(primal.values)
        self._calls: dict[int, Call] = {}

    @property
    def samples(self) -> int:
        """Number of samples taken."""
        return self.span.size

    def alone(self, sample: int) -> Frame:
        """One of its samples."""
        start = self.span.start + sample
        return Frame(self.primal, Span(start, start + 1), self._picked)

    def node(self, index: int) -> Node:
        """A node of the graph."""
        return self.primal.graph.nodes[index]

    def value(self, index: int) -> Any:
        """A node's value on these samples."""
        if self._values[index] is None:
            node, whole = self.node(index), self.primal.values[index]
            if node.kind == "size":
                for ref in node.refs():
                    self.value(ref)
                whole = evaluate(node, self._values)
            self._values[index] = self._take(node, whole)
        return self._values[index]

    def delta(self, index: int) -> Tensor:
        """``dL/df`` of a live node on these samples; of a value shared by all samples, the whole of it."""
        delta = self.primal.deltas[index]
        return torch.zeros_like(self.value(index)) if delta is None else self._take(self.node(index), delta)

    def rule(self, index: int) -> AbstractRule:
        """The rule of a node's operation."""
        return rule_for(self.node(index).op)

    def call(self, index: int) -> Call:
        """The node's call."""
        if index not in self._calls:
            node = self.node(index)
            refs = node.refs()
            for ref in refs:
                self.value(ref)
            axes = tuple(self.node(ref).batch for ref in self.slots(index))
            self._calls[index] = make_call(
                node.op,
                tuple(resolve(value, self._values) for value in node.args),
                {key: resolve(value, self._values) for key, value in node.kwargs},
                output=node.output,
                value=self.value(index),
                delta=self.delta(index),
                batch=node.batch,
                batch_inputs=axes,
                samples=self.samples,
            )
        return self._calls[index]

    def slots(self, index: int) -> tuple[int, ...]:
        """Node index of each tensor argument, in slot order."""
        return self.primal.graph.slots(index)

    def _take(self, node: Node, whole: Any) -> Any:
        if node.batch is None or not isinstance(whole, Tensor):
            return whole
        if self._picked is not None:
            return pick_samples(whole, node.batch, self._picked[self.span.start : self.span.stop], self.primal.samples)
        return take_samples(whole, node.batch, self.span, self.primal.samples)
