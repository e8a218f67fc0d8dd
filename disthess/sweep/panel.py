"""From what the reverse wave leaves at leaves to panel rows, in the two bases.

*Parameter basis*: unit vectors of theta; a leaf's cotangent, summed over samples, is the block.

*Output basis*, for a use ``z[n, r, o] = sum_j W[o, j] x[n, r, j]``: unit vectors of the output suffice. With the
per-sample rows ``M[n, (o, r), :]`` that the wave leaves at a target,

    H[(o, j), :] = sum_{n, r} x[n, r, j] M[n, (o, r), :]

one GEMM per unit; samples must be independent, or be one. On the use's own diagonal block ``M[n, (o, r), (a, b)] = sum_s
Hzz[n, (o, r), (s, a)] x[n, s, b]``, for those outputs a only whose columns no earlier tile has. With one row per sample that sum
is symmetric in (j, b): half of the products suffice. With several, unit o has the columns of a >= o alone; the buffers fill in the
rest of the tile's square, which is its transpose.

A target that x depends on, as earlier uses of a parameter are, also has what ``W`` gives back to x: with ``J[n, (j, r), :]`` the
derivatives of ``x[n, r, j]`` and ``delta = dL/dz``

    H[(o, j), :] += sum_{n, r} delta[n, r, o] J[n, (j, r), :]
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
from disthess.rules.products import add_product
from disthess.sweep.buffers import AbstractWindow, Swapped, Triangle, Upper
from disthess.sweep.frame import Frame
from disthess.sweep.rows import AbstractRowsSink, Targets
from disthess.sweep.rowwise import Rowwise
from disthess.sweep.thin import add_first, add_own, add_pairs, contracts_first, keeps_units
from disthess.sweep.wave import AbstractSink
from disthess.types import Span


@dataclass(frozen=True, slots=True)
class SweptLayer:
    """A layer whose output units are swept.

    Attributes:
        index: Its node.
        leaf: The source's leaf.
        inputs: Its rows ``x``, ``[n, R, i]``.
        units: The units (the stack is units x R tangents, unit-major).
        pooled: Where tangents start behind a pooling (`disthess.sweep.pooled`): what rows are multiplied by in place of x,
            ``[U, n, places, i]``, and the stack is units x places tangents.
    """

    index: int
    leaf: int
    inputs: Tensor
    units: Span
    pooled: Tensor | None = None

    @property
    def one_row(self) -> bool:
        """Whether it meets one row a sample."""
        return self.inputs.shape[1] == 1

    @property
    def multipliers(self) -> Tensor:
        """What rows are multiplied by."""
        return self.inputs if self.pooled is None else self.pooled


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
class OutputSink(AbstractRowsSink):
    """Multiplies per-sample rows by the source's input rows and adds them to a window.

    Args:
        targets: The targets.
        window: Where rows add up.
        layer: The source.
        rowwise: Where rows are taken for samples: so are those of the layer's inputs.
    """

    def __init__(
        self, targets: Targets, window: AbstractWindow, layer: SweptLayer, rowwise: Rowwise | None = None
    ) -> None:
        super().__init__(targets, layer.multipliers, layer.units.size, rowwise)
        self._window = window
        self._layer = layer

    @override
    def _sums(self, leaf: int) -> Tensor:
        block, own = self._targets.block(leaf), self._targets.own
        form = Upper(block.key, block.columns, self._width, own.first)
        upper = own.upper and block.key == self._targets.own_key
        return self._window.take(form if upper else block).view(self._units, self._width, -1)

    @override
    def _left_out(self, units: slice) -> int:
        own = self._targets.own
        return self._layer.units.start + units.start if own.upper else own.first

    @override
    def _without_rows(
        self, frame: Frame, index: int, call: Call, slot: int, cotangent: Stack | None, tangents: Mapping[int, Stack]
    ) -> bool:
        leaf, rule, layer = frame.slots(index)[slot], frame.rule(index), self._layer
        if leaf == layer.leaf and cotangent is not None:
            curvature = rule.source_outputs(call, cotangent)
            if layer.one_row:
                self._add_symmetric(leaf, curvature[..., self._targets.own.first :])
            else:
                self._add_own_block(leaf, curvature)
            return True
        thin = rule.thin_rows(call, cotangent, tangents, slot)
        if thin is None or not self._pays(thin, frame, index, tangents):
            return False
        self._add_thin(leaf, thin)
        return True

    def _pays(self, thin: ThinRows, frame: Frame, index: int, tangents: Mapping[int, Stack]) -> bool:
        """Whether to do without rows."""
        if self._layer.one_row:
            return keeps_units(frame.primal.graph, self._layer.index, _places(frame, index, tangents))
        shape = (thin.deltas.shape[1], thin.inputs.shape[1])
        return contracts_first(self._rows, self._width, shape, thin.bent is not None, thin.moved is not None)

    def _add_thin(self, leaf: int, thin: ThinRows) -> None:
        """`disthess.sweep.thin`."""
        key, size, outputs = self._targets.keys[leaf], self._targets.sizes[leaf], thin.deltas.shape[1]
        if not self._layer.one_row:
            block = self._sums(leaf).view(self._units, self._width, outputs, size // outputs)
            add_first(block, thin, self._layer.multipliers)
            return
        if thin.bent is not None:
            sums = self._window.take(Swapped(key, size, self._width, outputs))
            add_pairs(sums, thin.bent, self._multipliers, thin.inputs)
        if thin.moved is not None:
            block = self._sums(leaf).view(self._units, self._width, outputs, size // outputs)
            add_own(block, thin.moved, self._multipliers, thin.deltas, self._layer.units.start)

    def _add_own_block(self, leaf: int, curvature: Stack) -> None:
        """``sum_(n, r, s) x[n, r, j] Hzz[(o, r), n, s, a] x[n, s, b]`` from ``Hzz``, ``[K, n, R, a]``."""
        inputs = self._layer.inputs
        block = self._sums(leaf)
        by_sample = self._layer.multipliers.flatten(-3, -2).transpose(-1, -2).expand(self._units, -1, -1)
        bent = curvature.unflatten(0, (self._units, self._rows)).permute(0, 2, 1, 4, 3)  # [u, n, r, a, s]
        for unit, each in enumerate(bent):
            skip = self._left_out(slice(unit, unit + 1))
            rows = torch.bmm(each[:, :, skip:].flatten(1, 2), inputs).view(by_sample.shape[2], -1)
            add_product(block[unit, :, skip * self._width :], by_sample[unit], rows)

    def _add_symmetric(self, leaf: int, curvature: Stack) -> None:
        """``sum_n Hzz[o, n, a] x[j, n] x[b, n]`` for the pairs ``j <= b``; the buffers unfold it once, at the end."""
        outputs = curvature.shape[-1]
        flat = curvature[:, :, 0].transpose(1, 2).reshape(-1, self._samples)
        form = Triangle(self._targets.keys[leaf], self._targets.sizes[leaf], self._width, self._targets.own.first)
        where = self._window.take(form).view(self._units * outputs, -1)
        low, high = torch.triu_indices(self._width, self._width, device=curvature.device)
        step = max(1, CACHE_BYTES // (self._samples * self._multipliers.element_size()))
        for start in range(0, len(low), step):
            chunk = slice(start, start + step)
            pairs = self._multipliers[low[chunk]] * self._multipliers[high[chunk]]
            add_product(where[:, chunk], flat, pairs.T)


@final
class InputSink(AbstractRowsSink):
    """Multiplies the rows of a source's inputs by ``delta``, for all its units at once.

    Args:
        targets: The targets.
        buffers: Sums of all units.
        deltas: ``dL/dz`` of those units, ``[n, R, o]``.
        inputs: Which inputs j the stack has.
        width: Number of all inputs.
    """

    def __init__(self, targets: Targets, buffers: AbstractWindow, deltas: Tensor, inputs: Span, width: int) -> None:
        super().__init__(targets, deltas, inputs.size)
        self._buffers = buffers
        self._inputs = inputs
        self._all = width

    @override
    def _sums(self, leaf: int) -> Tensor:
        rows = self._buffers.take(self._targets.block(leaf)).view(self._width, self._all, -1)
        return rows.transpose(0, 1)[self._inputs.start : self._inputs.stop]

    @override
    def _left_out(self, units: slice) -> int:
        return self._targets.own.first

    @override
    def _without_rows(
        self, frame: Frame, index: int, call: Call, slot: int, cotangent: Stack | None, tangents: Mapping[int, Stack]
    ) -> bool:
        return False


def _places(frame: Frame, index: int, slots: Iterable[int]) -> list[int]:
    refs = frame.slots(index)
    return [refs[slot] for slot in slots]
