"""From what the reverse wave leaves at leaves to panel rows, in the two bases.

*Parameter basis*: unit vectors of theta; a leaf's cotangent, summed over samples, is the block.

*Output basis*, for a use ``z[n, r, o] = sum_j W[o, j] x[n, r, j]``: unit vectors of the output suffice. With the
per-sample rows ``M[n, (o, r), :]`` that the wave leaves at a target,

    H[(o, j), :] = sum_{n, r} x[n, r, j] M[n, (o, r), :]

one GEMM per unit; samples must be independent, or be one. On the diagonal block of a use with one row per sample,
``M = Hzz[n, o, a] x[n, b]`` and the sum is symmetric in (j, b): half of the products suffice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from disthess.planning.memory import CACHE_BYTES
from disthess.rules.base import Call, Stack, ThinRows
from disthess.rules.products import add_product, add_products
from disthess.sweep.buffers import AbstractWindow, Block, Swapped, Triangle
from disthess.sweep.frame import Frame
from disthess.sweep.thin import add_own, add_pairs, keeps_units
from disthess.sweep.wave import AbstractSink, per_sample_rows
from disthess.types import Span


@dataclass(frozen=True, slots=True)
class Targets:
    """Which leaves are targets, and the buffer key of each.

    Attributes:
        keys: Buffer key by leaf index.
        sizes: Number of entries by leaf index.
    """

    keys: Mapping[int, str]
    sizes: Mapping[int, int]

    def block(self, leaf: int) -> Block:
        """Where a leaf's rows add up."""
        return Block(self.keys[leaf], self.sizes[leaf])


@dataclass(frozen=True, slots=True)
class SymmetricBlock:
    """The source's own diagonal block, where it is symmetric in the inputs.

    Attributes:
        leaf: The source's leaf.
        skip: Output units whose columns are not needed (an earlier tile's transpose).
    """

    leaf: int
    skip: int


@dataclass(frozen=True, slots=True)
class SweptLayer:
    """A layer whose output units are swept.

    Attributes:
        index: Its node.
        inputs: Its rows ``x``, ``[n, R, i]``.
        units: The units (the stack is units x R tangents, unit-major).
    """

    index: int
    inputs: Tensor
    units: Span


@final
class ParameterSink(AbstractSink):
    """Adds summed cotangents to the K rows of a window."""

    def __init__(self, targets: Targets, window: AbstractWindow) -> None:
        self._targets = targets
        self._window = window

    @property
    @override
    def per_sample(self) -> bool:
        return False

    @override
    def take(self, leaf: int, rows: Stack) -> None:
        self._window.take(self._targets.block(leaf)).add_(rows.reshape(len(rows), -1))


@final
class OutputSink(AbstractSink):
    """Multiplies per-sample rows by the source's input rows and adds them to a window.

    Args:
        targets: The targets.
        window: Where rows add up.
        layer: The source.
        symmetric: The source's own diagonal block, if it is symmetric as above, else None.
    """

    def __init__(
        self,
        targets: Targets,
        window: AbstractWindow,
        layer: SweptLayer,
        symmetric: SymmetricBlock | None,
    ) -> None:
        self._targets = targets
        self._window = window
        self._samples, self._rows, self._width = layer.inputs.shape
        self._inputs = layer.inputs.permute(2, 1, 0).reshape(self._width, self._rows * self._samples).contiguous()
        self._layer = layer
        self._units = layer.units.size
        self._symmetric = symmetric

    @property
    @override
    def per_sample(self) -> bool:
        return True

    @override
    def take(self, leaf: int, rows: Stack) -> None:
        flat = rows.reshape(self._units, self._rows * self._samples, -1)
        self._add(leaf, slice(0, self._units), flat)

    @override
    def take_call(
        self, frame: Frame, index: int, call: Call, slot: int, cotangent: Stack | None, tangents: Mapping[int, Stack]
    ) -> None:
        leaf = frame.slots(index)[slot]
        if self._symmetric is not None and leaf == self._symmetric.leaf and cotangent is not None:
            self._add_symmetric(leaf, cotangent, self._symmetric.skip)
            return
        if self._rows == 1 and keeps_units(frame.primal.graph, self._layer.index, _places(frame, index, tangents)):
            thin = frame.rule(index).thin_rows(call, cotangent, tangents, slot)
            if thin is not None:
                self._add_thin(leaf, thin)
                return
        size = self._targets.sizes[leaf]
        per_unit = self._rows * self._samples * size * self._inputs.element_size()
        step = max(1, CACHE_BYTES // max(1, per_unit))
        for first in range(0, self._units, step):
            units = slice(first, min(first + step, self._units))
            stack = slice(units.start * self._rows, units.stop * self._rows)
            part = None if cotangent is None else cotangent[stack]
            parts = {key: value[stack] for key, value in tangents.items()}
            rows = per_sample_rows(frame, index, call, slot, part, parts)
            self._add(leaf, units, rows.reshape(units.stop - units.start, self._rows * self._samples, size))

    def _add(self, leaf: int, units: slice, rows: Tensor) -> None:
        """``block[(o, j), :] += sum_(r, n) x[j, (r, n)] rows[o, (r, n), :]``."""
        block = self._window.take(self._targets.block(leaf)).view(self._units, self._width, -1)
        add_products(block[units], self._inputs, rows)

    def _add_thin(self, leaf: int, thin: ThinRows) -> None:
        """`disthess.sweep.thin`."""
        key, size, outputs = self._targets.keys[leaf], self._targets.sizes[leaf], thin.deltas.shape[1]
        if thin.bent is not None:
            sums = self._window.take(Swapped(key, size, self._width, outputs))
            add_pairs(sums, thin.bent, self._inputs, thin.inputs)
        if thin.moved is not None:
            block = self._window.take(Block(key, size)).view(self._units, self._width, outputs, size // outputs)
            add_own(block, thin.moved, self._inputs, thin.deltas, self._layer.units.start)

    def _add_symmetric(self, leaf: int, cotangent: Stack, skip: int) -> None:
        """``sum_n Hzz[o, n, a] x[j, n] x[b, n]`` for the pairs ``j <= b``; the buffers unfold it once, at the end."""
        curvature = cotangent.reshape(self._units, self._samples, -1)[:, :, skip:].transpose(1, 2)
        outputs = curvature.shape[1]
        flat = curvature.reshape(-1, self._samples)
        form = Triangle(self._targets.keys[leaf], self._targets.sizes[leaf], self._width, skip)
        where = self._window.take(form).view(self._units * outputs, -1)
        low, high = torch.triu_indices(self._width, self._width, device=cotangent.device)
        step = max(1, CACHE_BYTES // (self._samples * self._inputs.element_size()))
        for start in range(0, len(low), step):
            chunk = slice(start, start + step)
            pairs = self._inputs[low[chunk]] * self._inputs[high[chunk]]
            add_product(where[:, chunk], flat, pairs.T)


def _places(frame: Frame, index: int, slots: Iterable[int]) -> list[int]:
    refs = frame.slots(index)
    return [refs[slot] for slot in slots]
