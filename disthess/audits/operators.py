"""Products with the Hessian of an audited problem: the same numbers for the same seed, whoever computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from typing_extensions import override

from disthess import hvp
from disthess.audit_config import MeasureSection
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.problem import Problem

BATCHED_NUMEL = 1 << 20
"""Parameters up to which several vectors are multiplied at once; beyond, one by one is as fast and takes less memory."""

TOGETHER = 8
"""Vectors at once."""


@final
class TapedOperator(AbstractSymmetricOperator):
    """``x -> H x`` by the gradient's tape, batches in their order, always in the same way.

    `disthess.matrixfree.HessianOperator` is faster for small models, because it takes the fastest of several ways; which, a clock
    decides, and so its last digits may differ from one audit to the next. These do not.

    Args:
        problem: In the dtype and on the device of the products.
        names: Parameters, first names.
    """

    def __init__(self, problem: Problem, names: Sequence[str]) -> None:
        self._tapes = [hvp.GradientTape(problem, index, names) for index in range(len(problem.batches))]
        self._decay = hvp.decay_diagonal(problem, names)
        self._dtype = problem.dtype

    @property
    @override
    def size(self) -> int:
        return len(self._decay)

    @property
    @override
    def dtype(self) -> np.dtype:
        return np.dtype(str(self._dtype).removeprefix("torch."))

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(np.ascontiguousarray(block.T)).to(self._decay.device, self._dtype)
        step = TOGETHER if self.size <= BATCHED_NUMEL else 1
        return torch.cat([self._multiply(piece) for piece in rows.split(step)]).cpu().numpy().T

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        total = rows * self._decay
        for tape in self._tapes:
            total += tape.products(rows) if len(rows) > 1 else tape.product(rows[0])
        return total


def make_operator(problem: Problem, names: Sequence[str], section: MeasureSection) -> AbstractSymmetricOperator:
    """The operator that an audit file asks for."""
    return TapedOperator(problem, names)
