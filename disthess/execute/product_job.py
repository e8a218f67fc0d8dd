"""Products of one worker: tapes of the gradients of some batches, each applied to many vectors.

A piece is one batch. How pieces are spread over workers, and which tapes are kept, changes no bit of a piece's product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from disthess.execute.live_bytes import LiveBytes
from disthess.hvp import GradientTape
from disthess.preflight import check_batch
from disthess.problem import Problem

BATCHED_NUMEL = 1 << 17
"""Most parameters of models whose vectors go through a tape together on a CPU. Of larger ones the stacks fall out of its cache:
8 vectors of 22 million entries take 1.2 to 2 times as long together as one after the other."""


@final
class PieceProducts:
    """``H_b X`` of any batch b of a problem, weight decay left out.

    Args:
        problem: A copy of its own, in the dtype and on the device of the products.
        names: Parameters, first names.
        kept: How many tapes are kept from one call to the next; others are made again for each call.
    """

    def __init__(self, problem: Problem, names: Sequence[str], kept: int) -> None:
        self._problem = problem
        self._names = tuple(names)
        self._kept = kept
        by_name = {parameter.name: parameter.tensor for parameter in problem.parameters()}
        self._leaves = [by_name[name].detach().requires_grad_() for name in self._names]
        self._tapes: dict[int, GradientTape] = {}
        self._checked: set[int] = set()

    def product(self, piece: int, vectors: Tensor) -> Tensor:
        """``H_b v_k``: ``[K, P]`` from ``[K, P]``; a piece is checked when it is first asked for.

        Raises:
            ProblemError: The objective has no Hessian on that batch.
        """
        if piece not in self._checked:
            check_batch(self._problem, piece, self._names)
            self._checked.add(piece)
        tape = self._tapes.get(piece)
        if tape is None:
            tape = GradientTape(self._problem, piece, self._names, self._leaves)
            if len(self._tapes) < self._kept:
                self._tapes[piece] = tape
        return apply_tape(tape, vectors)


def apply_tape(tape: GradientTape, vectors: Tensor) -> Tensor:
    """One vector after the other, or all at once where that is faster: on a GPU, and for small models.

    Which of both does not depend on the clock, so that a product has the same bits whenever it is taken.
    """
    if len(vectors) > 1 and (vectors.is_cuda or not is_large(vectors.shape[1])):
        return tape.products(vectors)
    out = torch.empty_like(vectors)
    for vector, row in zip(vectors, out, strict=True):
        tape.product(vector, out=row)
    return out


def is_large(size: int) -> bool:
    """Whether a model of so many parameters has its vectors multiplied one after the other on a CPU.

    >>> is_large(1000), is_large(10_000_000)
    (False, True)
    """
    return size > BATCHED_NUMEL


@dataclass(frozen=True, slots=True)
class TapeBytes:
    """What one tape takes, counted on a real one.

    Attributes:
        held: Bytes of tensors that live as long as the tape does.
        making: The most while it is made.
        product: The most that a product with a block of vectors adds to ``held``, vectors and result included.
    """

    held: int
    making: int
    product: int


def measure_tape(problem: Problem, names: Sequence[str], piece: int, vectors: int) -> TapeBytes:
    """Make the tape of a piece, apply it to so many vectors, and count.

    Raises:
        ProblemError: The objective cannot be differentiated twice.
    """
    by_name = {parameter.name: parameter.tensor for parameter in problem.parameters()}
    leaves = [by_name[name].detach().requires_grad_() for name in names]
    with LiveBytes() as live:
        tape = GradientTape(problem, piece, names, leaves)
        held, making = live.now, live.most
    size = sum(leaf.numel() for leaf in leaves)
    with LiveBytes() as live:
        block = torch.ones(vectors, size, dtype=problem.dtype)
        apply_tape(tape, block)
        product = live.most
    return TapeBytes(held, making, product)


@dataclass(frozen=True, slots=True)
class ProductJob:
    """What a worker needs besides the weights.

    Attributes:
        problem: On the CPU, its parameters emptied by `take_weights`.
        names: Parameters, first names.
        kept: Tapes that each worker keeps.
        size: Entries of a vector.
    """

    problem: Problem
    names: tuple[str, ...]
    kept: int
    size: int

    def open(self, weights: Mapping[str, np.ndarray], device: torch.device) -> PieceProducts:
        """Put the weights back and go to the device."""
        for name, tensor in self.problem.model.named_parameters():
            tensor.data = torch.tensor(weights[name])
        problem = self.problem if device.type == "cpu" else self.problem.to(self.problem.dtype, device)
        return PieceProducts(problem, self.names, self.kept)


def take_weights(problem: Problem) -> dict[str, np.ndarray]:
    """The values of all parameters by name; the problem's own are left empty, so that they travel once, as numpy arrays."""
    taken = {name: tensor.detach().cpu().numpy() for name, tensor in problem.model.named_parameters()}
    for _, tensor in problem.model.named_parameters():
        tensor.data = tensor.data.new_empty(0)
    return taken


def share_pieces(costs: Sequence[int], workers: int) -> tuple[tuple[int, ...], ...]:
    """Pieces of each worker, ascending: the dearest first to whoever has least.

    >>> share_pieces([1, 1, 1, 3], 2)
    ((3,), (0, 1, 2))
    """
    shares: list[list[int]] = [[] for _ in range(workers)]
    load = [0] * workers
    for piece in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        worker = min(range(workers), key=lambda place: (load[place], place))
        shares[worker].append(piece)
        load[worker] += costs[piece]
    return tuple(tuple(sorted(share)) for share in shares)
