"""The Hessian of a problem by products alone: nothing stored but the tapes of its batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from typing_extensions import override

from disthess import hvp
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.problem import Problem

VECTORS = 64
"""Multiplied at once: more of them fall out of cache and take longer each."""


@final
class HessianOperator(AbstractSymmetricOperator):
    """``x -> H x`` at the parameters as they are now, all batches and weight decay; gradients are taped once.

    Args:
        problem: In the dtype of the products.
        names: Parameters, first names.
        size: Their entries.
    """

    def __init__(self, problem: Problem, names: Sequence[str], size: int) -> None:
        self._tapes = [hvp.GradientTape(problem, index, names) for index in range(len(problem.batches))]
        self._decay = hvp.decay_diagonal(problem, names).numpy()
        self._size = size
        self._dtype = problem.dtype

    @property
    @override
    def size(self) -> int:
        return self._size

    @property
    @override
    def dtype(self) -> np.dtype:
        return np.dtype(str(self._dtype).removeprefix("torch."))

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        total = block * self._decay[:, None]
        rows = torch.from_numpy(np.ascontiguousarray(block.T)).to(self._dtype)
        for start in range(0, len(rows), VECTORS):
            chunk = slice(start, start + VECTORS)
            for tape in self._tapes:
                total[:, chunk] += tape.products(rows[chunk]).numpy().T
        return total
