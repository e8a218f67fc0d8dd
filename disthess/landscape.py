"""A problem's objective around a point that moves: its values, slopes and curvature. What Newton's method walks on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from disthess import hvp
from disthess.api import run_prepared
from disthess.errors import ConfigError
from disthess.graph.program import Program
from disthess.linalg.lanczos import extreme_eigenpairs
from disthess.linalg.model import QuadraticModel, complete_model, krylov_model
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.linalg.stopping import StoppingReport, judge
from disthess.matrixfree import HessianOperator
from disthess.preflight import check_given
from disthess.prepare import Options, Prepared, prepare, select_parameters
from disthess.problem import Problem
from disthess.reduce.hessian_store import HessianStore, check_store

DENSE = 1500
"""Parameters up to which the whole Hessian is decomposed, unless told otherwise."""

BY_PRODUCTS = 150
"""Parameters up to which it is formed by products with unit vectors; the sweep is faster beyond, once the model is captured."""


@final
class Landscape:
    """``L`` in float64 at a copy of the problem's parameters; the user's model does not move.

    Args:
        problem: The problem.
        parameters: Globs of those that move; default all trainable ones.
    """

    def __init__(self, problem: Problem, parameters: str | Sequence[str] | None) -> None:
        check_given(problem)
        self.problem = problem.to(torch.float64)
        self.names = select_parameters(self.problem, parameters)
        self._tensors = [p.tensor for p in self.problem.parameters() if p.name in self.names]
        self.size = sum(tensor.numel() for tensor in self._tensors)

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the parameters that move, by name."""
        return {name: tensor.detach().clone() for name, tensor in zip(self.names, self._tensors, strict=True)}

    def point(self) -> np.ndarray:
        """Where it is, ``[P]``."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in self._tensors]).numpy()

    def gradient(self) -> tuple[float, np.ndarray]:
        """``L`` and ``dL/dtheta``, ``[P]``."""
        loss, gradient = hvp.gradient(self.problem, self.names)
        return loss, gradient.double().numpy()

    def move(self, step: np.ndarray) -> None:
        """Add a step, ``[P]``."""
        pieces = torch.from_numpy(np.ascontiguousarray(step)).split([tensor.numel() for tensor in self._tensors])
        for tensor, piece in zip(self._tensors, pieces, strict=True):
            tensor.data.add_(piece.reshape(tensor.shape))

    def loss_at(self, step: np.ndarray) -> float:
        """``L`` a step away."""
        backup = self._leave(step)
        with torch.no_grad():
            total = sum(
                weight * float(self.problem.value(batch))
                for batch, weight in zip(self.problem.batches, self.problem.weights, strict=True)
            )
            for parameter in self.problem.parameters():
                decay = self.problem.weight_decay.get(parameter.name, 0.0)
                total += 0.5 * decay * float(parameter.tensor.square().sum())
        self._return(backup)
        return total

    def slope_at(self, step: np.ndarray, direction: np.ndarray) -> float:
        """``dL/dtheta . direction`` a step away."""
        backup = self._leave(step)
        slope = float(self.gradient()[1] @ direction)
        self._return(backup)
        return slope

    def _leave(self, step: np.ndarray) -> list[Tensor]:
        backup = [tensor.detach().clone() for tensor in self._tensors]
        self.move(step)
        return backup

    def _return(self, backup: Sequence[Tensor]) -> None:
        for tensor, saved in zip(self._tensors, backup, strict=True):
            tensor.data.copy_(saved)


@final
class Curvature:
    """The Hessian at the landscape's point: from stores that are computed there, dense, or by products alone.

    Args:
        landscape: Where.
        folder: Keeps a store for every point, by its number (``step-000.zarr`` ...); default none is kept.
        matrix_free: Whether models come from a Krylov space; default for more than `DENSE` parameters.
        krylov: Most products for one.
    """

    def __init__(
        self, landscape: Landscape, folder: str | os.PathLike[str] | None, matrix_free: bool | None, krylov: int
    ) -> None:
        self._landscape = landscape
        self._folder = None if folder is None else os.fspath(folder)
        self._free = landscape.size > DENSE if matrix_free is None else matrix_free
        self._krylov = krylov
        self._prepared: Prepared | None = None
        self._programs: Sequence[Program] | None = None

    def operator(self, number: int) -> AbstractSymmetricOperator:
        """Products with it."""
        if self._folder is not None:
            return self._store(number).symmetric_operator()
        here = self._landscape
        found = HessianOperator(here.problem, here.names, here.size, self._programs)
        self._programs = found.programs
        return found

    def model(self, gradient: np.ndarray, number: int) -> QuadraticModel:
        """The quadratic model there."""
        if self._free:
            return self._model_of(self.operator(number), gradient)
        if self._folder is not None:
            return complete_model(self._store(number).dense(), gradient)
        if self._landscape.size <= BY_PRODUCTS:
            return complete_model(self.operator(number).matmat(np.eye(self._landscape.size)), gradient)
        with tempfile.TemporaryDirectory(prefix="disthess-newton-") as place:
            return complete_model(self._computed(Path(place) / "step.zarr").dense(), gradient)

    def model_of_store(
        self, store: HessianStore, gradient: np.ndarray
    ) -> tuple[QuadraticModel, AbstractSymmetricOperator]:
        """The same from a store that somebody has computed there.

        Raises:
            ConfigError: It is of other parameters, or was computed at another point.
        """
        check_store(store)
        here, there = list(self._landscape.names), [parameter.name for parameter in store.parameters]
        if store.numel != self._landscape.size:
            raise ConfigError(
                f"the store has {store.numel:,} parameters and the problem {self._landscape.size:,}; give the problem's own."
            )
        apart = float(np.linalg.norm(store.gradient - gradient))
        # Gradients tell points apart; a store in float32 knows its own to that precision.
        if here != there or apart > 1e-4 * float(np.linalg.norm(gradient)) + 1e-6:
            raise ConfigError(
                f"the store {store.path} is not of this problem at these parameters: its gradient differs by {apart:.2g} in norm. "
                "Compute the problem's own, or leave the store out."
            )
        operator: AbstractSymmetricOperator = store.symmetric_operator()
        if self._free:
            return self._model_of(operator, gradient), operator
        return complete_model(store.dense(), gradient), operator

    def _model_of(self, operator: AbstractSymmetricOperator, gradient: np.ndarray) -> QuadraticModel:
        # A vanishing gradient spans nothing: any start will do, if it adds nothing.
        start = gradient if np.any(gradient) else np.random.default_rng(0).standard_normal(len(gradient)) * 1e-30
        return krylov_model(operator, start, size=self._krylov)

    def _store(self, number: int) -> HessianStore:
        return self._computed(f"{self._folder}/step-{number:03d}.zarr")

    def _computed(self, path: str | Path) -> HessianStore:
        """By the sweep, the model captured once for all steps."""
        options = Options(parameters=list(self._landscape.names), dtype="float64")
        if self._prepared is None:
            self._prepared = prepare(self._landscape.problem, options)
        here = self._landscape.parameters()
        for parameter in self._prepared.problem.parameters():
            if parameter.name in here:
                parameter.tensor.data.copy_(here[parameter.name])
        return run_prepared(self._prepared, options, path, progress=False, certify=False)


def report_at(
    landscape: Landscape,
    model: QuadraticModel,
    operator: Callable[[], AbstractSymmetricOperator],
    gradient: np.ndarray,
    loss: float,
    tolerance: float,
) -> StoppingReport:
    """The stopping criteria at the point.

    Args:
        landscape: Where.
        model: Of the gradient there.
        operator: Made and asked for the smallest eigenvalue only where the model's subspace cannot know it.
        gradient: ``[P]``.
        loss: ``L``.
        tolerance: Of the scaled gradient.
    """
    values, coefficients = model.eigenvalues, model.coefficients
    report = judge(values, coefficients, gradient, landscape.point(), loss, gradient_tolerance=tolerance)
    if model.complete or not report.first_order:
        return report
    # The Krylov space of a vanishing gradient may hold no negative curvature although there is some.
    lowest = extreme_eigenpairs(operator(), 1, which="smallest", tolerance=1e-6).values[:1]
    return judge(
        np.concatenate([lowest, values]),
        np.concatenate([[0.0], coefficients]),
        gradient,
        landscape.point(),
        loss,
        gradient_tolerance=tolerance,
    )
