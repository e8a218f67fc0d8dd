"""A region of a Hessian by autograd on the eager model: chosen rows of one against chosen columns, and nothing else differentiated.

The gradient by the parameters of the rows is taped and pulled back to those of the columns, for many unit vectors at once. All
other parameters are constants, so that torch keeps nothing of what lies before both. The check beside it takes no second pull back:
it pushes a vector of columns through the gradient in forward mode.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.autograd.forward_ad as forward
from torch import Tensor
from torch.utils import _pytree as pytree

from disthess.hvp import twice
from disthess.problem import Problem
from disthess.types import Span


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of one parameter's entries, row-major.

    Attributes:
        name: First name of the parameter.
        span: Which entries.
    """

    name: str
    span: Span


@dataclass(frozen=True, slots=True)
class TapeBytes:
    """What a region's tape holds and what each unit vector adds to it.

    Attributes:
        tape: Tensors kept for the second derivative, and the gradient.
        vector: Bound of what one unit vector adds while it is pulled back.
    """

    tape: int
    vector: int


@final
class RegionTape:
    """Second derivatives of one batch's weighted objective, ``rows`` by ``columns``.

    Args:
        problem: In the dtype and on the device of the computation.
        index: Which batch.
        rows: Pieces of the rows, one after the other.
        columns: Pieces of the columns.
    """

    def __init__(self, problem: Problem, index: int, rows: Sequence[Piece], columns: Sequence[Piece]) -> None:
        self._rows, self._columns = tuple(rows), tuple(columns)
        tensors = {parameter.name: parameter.tensor.detach() for parameter in problem.parameters()}
        self._leaves = {name: tensors[name].clone().requires_grad_() for name in _names(rows, columns)}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = problem.weights[index] * problem.value(problem.batches[index], {**tensors, **self._leaves})
            self._gradient = _gradient(value, self._leaves, rows)
        item = self._gradient.element_size()
        pulled = sum(self._leaves[name].numel() for name in {piece.name for piece in columns})
        gradient = sum(self._leaves[name].numel() for name in {piece.name for piece in rows})
        saved = sum(kept.values())
        self.nbytes = TapeBytes(saved + 2 * item * gradient, saved + 2 * item * (pulled + gradient))

    def products(self, first: int, count: int, *, batched: bool) -> Tensor:
        """Rows ``first`` to ``first + count`` of the region, ``[count, columns]``."""
        width = sum(piece.span.size for piece in self._columns)
        if not self._gradient.requires_grad:
            return self._gradient.new_zeros(count, width)
        seeds = self._gradient.new_zeros(count, len(self._gradient))
        seeds[torch.arange(count), torch.arange(first, first + count)] = 1
        names = _names(self._columns)
        if not batched:
            return torch.stack([self._row(seed, names) for seed in seeds])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an operation is batched by a loop of torch's own
            found = torch.autograd.grad(
                self._gradient,
                [self._leaves[name] for name in names],
                seeds,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        return self._cut(dict(zip(names, found, strict=True)), count)

    def _row(self, seed: Tensor, names: Sequence[str]) -> Tensor:
        with twice():
            found = torch.autograd.grad(
                self._gradient, [self._leaves[name] for name in names], seed, retain_graph=True, allow_unused=True
            )
        return self._cut(dict(zip(names, found, strict=True)), 1)[0]

    def _cut(self, found: Mapping[str, Tensor | None], count: int) -> Tensor:
        parts = []
        for piece in self._columns:
            value = found[piece.name]
            if value is None:
                parts.append(self._gradient.new_zeros(count, piece.span.size))
            else:
                parts.append(value.reshape(count, -1)[:, piece.span.start : piece.span.stop])
        return torch.cat(parts, dim=1)


@final
class RegionEngine:
    """Regions of a problem's Hessian, all batches and weight decay, within a budget of memory.

    Args:
        problem: In the dtype and on the device of the computation.
        memory_bytes: What tape and vectors may take together.

    Attributes:
        products: Unit vectors pulled back so far, each through all batches.
    """

    def __init__(self, problem: Problem, memory_bytes: int) -> None:
        self.problem = problem
        self.products = 0
        self._budget = memory_bytes
        self._batched: dict[int, bool] = {}

    def region(self, rows: Sequence[Piece], columns: Sequence[Piece]) -> Tensor:
        """``d2 L / d rows d columns``, on the problem's device.

        Raises:
            SecondDerivativeError: Torch cannot differentiate the objective twice.
        """
        height, width = (sum(piece.span.size for piece in side) for side in (rows, columns))
        total = self.problem.parameters()[0].tensor.detach().new_zeros(height, width)
        for index in range(len(self.problem.batches)):
            tape = RegionTape(self.problem, index, rows, columns)
            stack = max(1, min(STACK, (self._budget - tape.nbytes.tape) // max(1, tape.nbytes.vector)))
            start = 0
            while start < height:
                count = min(stack, height - start)
                total[start : start + count] += self._best(tape, start, count)
                start += count
            del tape
        self.products += height
        return self._with_decay(total, rows, columns)

    def push(self, rows: Sequence[Piece], columns: Sequence[Piece], vector: Tensor) -> tuple[Tensor, str, bool]:
        """``H vector`` at the rows for a vector of columns, by another way than `region`.

        Returns:
            The product; which way it was; whether that shares no formula of a second pull back with `region`.
        """
        total = vector.new_zeros(sum(piece.span.size for piece in rows))
        way, independent = "forward mode over the eager gradient", True
        for index in range(len(self.problem.batches)):
            try:
                found = _pushed(self.problem, index, rows, columns, vector)
            except (RuntimeError, NotImplementedError):
                way, independent = "the eager gradient pulled back from the columns", False
                found = _pulled(self.problem, index, rows, columns, vector)
            total = total + found
        decay = _decay(self.problem, rows, columns)
        return total + decay.to(vector) @ vector if decay is not None else total, way, independent

    def difference(self, rows: Sequence[Piece], columns: Sequence[Piece], vector: Tensor, step: float) -> Tensor:
        """The same by central differences of the gradient, of ``step`` times the norm of the columns' parameters."""
        tensors = {parameter.name: parameter.tensor.detach() for parameter in self.problem.parameters()}
        spread = _spread(self.problem, columns, vector)
        norm = math.sqrt(sum(float(tensors[name].square().sum()) for name in spread))
        length = step * max(1.0, norm) / max(float(vector.norm()), 1e-300)
        ends = []
        for sign in (1.0, -1.0):
            moved = {name: tensors[name].add(tangent, alpha=sign * length) for name, tangent in spread.items()}
            total = vector.new_zeros(sum(piece.span.size for piece in rows))
            for index in range(len(self.problem.batches)):
                leaves = {name: moved.get(name, tensors[name]).clone().requires_grad_() for name in _names(rows)}
                value = self.problem.value(self.problem.batches[index], {**tensors, **moved, **leaves})
                total += _gradient(self.problem.weights[index] * value, leaves, rows).detach()
            ends.append(total)
        decay = _decay(self.problem, rows, columns)
        found = (ends[0] - ends[1]) / (2 * length)
        return found if decay is None else found + decay.to(vector) @ vector

    def _best(self, tape: RegionTape, start: int, count: int) -> Tensor:
        """Many vectors at once, or one after the other: what is faster for so many, as the first time showed."""
        if count == 1:
            return tape.products(start, 1, batched=False)
        if count not in self._batched:
            begin = time.perf_counter()
            tape.products(start, 1, batched=False)
            single = (time.perf_counter() - begin) * count
            begin = time.perf_counter()
            try:
                values = tape.products(start, count, batched=True)
            except RuntimeError:
                self._batched[count] = False
            else:
                self._batched[count] = time.perf_counter() - begin < single
                return values
        return tape.products(start, count, batched=self._batched[count])

    def _with_decay(self, values: Tensor, rows: Sequence[Piece], columns: Sequence[Piece]) -> Tensor:
        decay = _decay(self.problem, rows, columns)
        return values if decay is None else values + decay.to(values)


STACK = 64
"""Most unit vectors that are pulled back at once."""


def needed_bytes(problem: Problem, rows: Sequence[Piece], columns: Sequence[Piece]) -> TapeBytes:
    """The most that any batch's tape takes; costs one gradient per batch."""
    found = [RegionTape(problem, index, rows, columns).nbytes for index in range(len(problem.batches))]
    return TapeBytes(max(entry.tape for entry in found), max(entry.vector for entry in found))


def _names(*sides: Sequence[Piece]) -> list[str]:
    return list(dict.fromkeys(piece.name for side in sides for piece in side))


def _gradient(value: Tensor, leaves: Mapping[str, Tensor], pieces: Sequence[Piece]) -> Tensor:
    """The gradient at the entries of the pieces, differentiable."""
    names = _names(pieces)
    if not value.requires_grad:
        return value.new_zeros(sum(piece.span.size for piece in pieces))
    with twice():
        found = torch.autograd.grad(
            value, [leaves[name] for name in names], create_graph=True, allow_unused=True, materialize_grads=True
        )
    flat = {name: gradient.reshape(-1) for name, gradient in zip(names, found, strict=True)}
    return torch.cat([flat[piece.name][piece.span.start : piece.span.stop] for piece in pieces])


def _spread(problem: Problem, pieces: Sequence[Piece], vector: Tensor) -> dict[str, Tensor]:
    """A vector of the pieces' entries as one tensor per parameter."""
    tensors = {parameter.name: parameter.tensor for parameter in problem.parameters()}
    spread = {name: torch.zeros_like(tensors[name]).detach().reshape(-1) for name in _names(pieces)}
    start = 0
    for piece in pieces:
        spread[piece.name][piece.span.start : piece.span.stop] = vector[start : start + piece.span.size]
        start += piece.span.size
    return {name: value.reshape(tensors[name].shape) for name, value in spread.items()}


def _pushed(problem: Problem, index: int, rows: Sequence[Piece], columns: Sequence[Piece], vector: Tensor) -> Tensor:
    tensors = {parameter.name: parameter.tensor.detach() for parameter in problem.parameters()}
    tangents = _spread(problem, columns, vector)
    with forward.dual_level():
        # Those of the columns too: a module may take a fused kernel without derivatives where nothing asks for a gradient.
        leaves = {name: tensors[name].clone().requires_grad_() for name in _names(rows, columns)}
        given = {**tensors, **leaves}
        for name in _names(rows, columns):
            given[name] = forward.make_dual(given[name], tangents[name]) if name in tangents else _still(given[name])
        value = problem.weights[index] * problem.value(pytree.tree_map(_still, problem.batches[index]), given)
        if not value.requires_grad:
            return vector.new_zeros(sum(piece.span.size for piece in rows))
        names = _names(rows)
        root = _still(torch.ones_like(value).detach())
        found = torch.autograd.grad(value, [leaves[name] for name in names], root, allow_unused=True)
        pushed = {}
        for name, gradient in zip(names, found, strict=True):
            tangent = None if gradient is None else forward.unpack_dual(gradient).tangent
            pushed[name] = (torch.zeros_like(tensors[name]) if tangent is None else tangent.detach()).reshape(-1)
    return torch.cat([pushed[piece.name][piece.span.start : piece.span.stop] for piece in rows])


def _still(leaf: Any) -> Any:
    """A tensor whose tangent is zeros written out: some kernels cannot take torch's own mark for zero."""
    moves = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return forward.make_dual(leaf, torch.zeros_like(leaf).detach()) if moves else leaf


def _pulled(problem: Problem, index: int, rows: Sequence[Piece], columns: Sequence[Piece], vector: Tensor) -> Tensor:
    tensors = {parameter.name: parameter.tensor.detach() for parameter in problem.parameters()}
    leaves = {name: tensors[name].clone().requires_grad_() for name in _names(rows, columns)}
    value = problem.weights[index] * problem.value(problem.batches[index], {**tensors, **leaves})
    slope = _gradient(value, leaves, columns) @ vector
    if not slope.requires_grad:
        return vector.new_zeros(sum(piece.span.size for piece in rows))
    return _gradient(slope, leaves, rows).detach()


def _decay(problem: Problem, rows: Sequence[Piece], columns: Sequence[Piece]) -> Tensor | None:
    """What weight decay adds, where rows and columns meet; None for nothing."""
    if not any(problem.weight_decay.get(name, 0.0) for name in _names(rows)):
        return None
    height, width = (sum(piece.span.size for piece in side) for side in (rows, columns))
    found = torch.zeros(height, width, dtype=problem.dtype)
    top = 0
    for row in rows:
        left = 0
        for column in columns:
            low, high = max(row.span.start, column.span.start), min(row.span.stop, column.span.stop)
            if row.name == column.name and low < high:
                places = torch.arange(low, high)
                found[top + places - row.span.start, left + places - column.span.start] = problem.weight_decay.get(
                    row.name, 0.0
                )
            left += column.span.size
        top += row.span.size
    return found
