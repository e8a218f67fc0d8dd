"""Newton's method on a problem: plain, damped, with an acceptance test, or cubic; on stores, dense or matrix-free.

    plain    s = -a H^-1 g                                 quadratic near a minimum if a = 1, H > 0 there and Lipschitz
    damped   s = -(H + m I)^-1 g, m = max(0, -lambda_min) + damping
    trust    the same, damping / 4 after a step that decreases L by more than a tenth of what the model says, * 4 after another,
             which is taken back
    cubic    s = argmin g s + s H s / 2 + M |s|^3 / 6, M adapted likewise: its limit points have no negative curvature

With a fixed damping alone the method need not converge: it may settle at a saddle (damping below |lambda_min|) or run away.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from disthess import hvp
from disthess.api import compute
from disthess.errors import ConfigError, ProblemError
from disthess.linalg.lanczos import extreme_eigenpairs
from disthess.linalg.model import QuadraticModel, complete_model, krylov_model
from disthess.linalg.newton_rule import Kind, LineSearch, NewtonRule
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.linalg.stopping import StoppingReport, has_stalled, judge
from disthess.matrixfree import HessianOperator
from disthess.prepare import select_parameters
from disthess.problem import Problem

DENSE = 1500
"""Parameters up to which the whole Hessian is decomposed at every step."""


@dataclass(frozen=True, slots=True)
class NewtonStep:
    """One step, taken or not.

    Attributes:
        loss: Before it.
        gradient_norm: Before it.
        step_norm: Of the step tried.
        shift: Added to the Hessian.
        ratio: Decrease of the loss over what the model says; NaN where the model says none.
        accepted: Whether the step was taken.
        smallest_eigenvalue: Of the Hessian (matrix-free: of the Krylov space of the gradient, an upper bound).
        decrement: Newton decrement before it.
    """

    loss: float
    gradient_norm: float
    step_norm: float
    shift: float
    ratio: float
    accepted: bool
    smallest_eigenvalue: float
    decrement: float


@dataclass(frozen=True, slots=True)
class NewtonResult:
    """Where Newton's method ended.

    Attributes:
        parameters: By name, for ``load_state_dict(..., strict=False)``.
        loss: There.
        gradient_norm: There.
        steps: Those that led there, rejected ones among them.
        converged: Whether every stopping criterion holds.
        reason: Why it ended, in a sentence.
        stopping: The criteria at the end.
        negative_curvature: The most negative eigenvalue at the end, or None.
    """

    parameters: dict[str, Tensor]
    loss: float
    gradient_norm: float
    steps: tuple[NewtonStep, ...]
    converged: bool
    reason: str
    stopping: StoppingReport
    negative_curvature: float | None

    def describe(self) -> str:
        """A table of the steps and how it ended."""
        lines = [f"{'loss':>15} {'|g|':>10} {'|s|':>10} {'shift':>10} {'ratio':>8} {'lambda_min':>11}  "]
        for step in self.steps:
            lines.append(
                f"{step.loss:15.8e} {step.gradient_norm:10.3e} {step.step_norm:10.3e} {step.shift:10.3e} {step.ratio:8.3f} "
                f"{step.smallest_eigenvalue:11.3e}  {'' if step.accepted else 'taken back'}"
            )
        lines.append(f"{self.loss:15.8e} {self.gradient_norm:10.3e}   {self.reason}")
        return "\n".join(lines)


def newton(
    problem: Problem,
    *,
    kind: Kind = "trust",
    damping: float = 1.0,
    cubic_weight: float = 1.0,
    step_size: float = 1.0,
    line_search: LineSearch = "none",
    max_steps: int = 50,
    gradient_tolerance: float = 1e-8,
    store: str | os.PathLike[str] | None = None,
    matrix_free: bool | None = None,
    krylov: int = 200,
    parameters: str | Sequence[str] | None = None,
) -> NewtonResult:
    """Minimise a problem's objective by Newton's method, in float64; the user's model is not changed.

    Args:
        problem: What to minimise; weight decay counts.
        kind: ``plain``, ``damped``, ``trust`` (the default) or ``cubic``: see the module's text.
        damping: Of ``damped``; at the start of ``trust``. 0 gives plain Newton steps where H is positive definite.
        cubic_weight: ``M`` at the start.
        step_size: Factor of ``plain`` and ``damped`` steps. Other than 1 it makes convergence linear.
        line_search: For ``plain`` and ``damped`` steps: ``armijo`` halves from ``step_size`` on, ``exact`` minimises along it.
        max_steps: Steps tried at most.
        gradient_tolerance: Of the scaled gradient: see `disthess.stopping_report`.
        store: A directory for a store of each step's Hessian (``step-000.zarr`` ...), computed by `disthess.compute`; default none.
        matrix_free: Whether steps come from Hessian-vector products on a Krylov space; default for more than 1,500 parameters.
        krylov: Most products of one step then.
        parameters: Globs; the others stay as they are. Default all trainable ones.

    Returns:
        Parameters, steps, why it ended, and whether negative curvature was left.

    Raises:
        ConfigError: An argument is wrong.
        ProblemError: A Hessian is singular under ``kind="plain"``, or the loss is not finite at the start.

    Example:
        >>> line = torch.nn.Linear(1, 1, bias=False).double()
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> found = newton(Problem(line, loss="mse", batches=[(x, 3 * x)]), kind="plain")
        >>> found.converged, round(float(found.parameters["weight"]), 9)
        (True, 3.0)
    """
    _check(kind, line_search, damping, cubic_weight, step_size, max_steps)
    loop = _Loop(problem, parameters, store, matrix_free, krylov)
    return loop.run(NewtonRule(kind, damping, cubic_weight, step_size, line_search), max_steps, gradient_tolerance)


@final
class _Loop:
    def __init__(
        self,
        problem: Problem,
        parameters: str | Sequence[str] | None,
        store: str | os.PathLike[str] | None,
        matrix_free: bool | None,
        krylov: int,
    ) -> None:
        self._problem = problem.to(torch.float64)
        self._names = select_parameters(self._problem, parameters)
        self._tensors = [p.tensor for p in self._problem.parameters() if p.name in self._names]
        self._size = sum(tensor.numel() for tensor in self._tensors)
        self._free = self._size > DENSE if matrix_free is None else matrix_free
        self._folder = None if store is None else Path(store)
        self._krylov = krylov
        self._given: AbstractSymmetricOperator | None = None

    def run(self, rule: NewtonRule, max_steps: int, tolerance: float) -> NewtonResult:
        """Step until the criteria hold."""
        steps: list[NewtonStep] = []
        loss, gradient = self._gradient()
        if not math.isfinite(loss):
            raise ProblemError(f"the loss is {loss} at the start; Newton's method needs a finite one.")
        model = self._model(gradient, 0)
        reason, converged = f"{max_steps} steps were not enough", False
        while len(steps) < max_steps:
            report = self._report(model, gradient, loss, tolerance)
            if report.first_order and report.second_order:
                reason, converged = "the gradient is within its tolerance and no curvature is negative", True
                break
            if report.first_order and rule.kind in ("plain", "damped"):
                reason = (
                    f"stationary, but a saddle: curvature {report.smallest_eigenvalue:.3g}; use kind='trust' or 'cubic'"
                )
                break
            if report.first_order:
                gradient, model = self._off_the_saddle(gradient, len(steps))
            step = self._try(rule, model, loss)
            if step is None:
                raise ProblemError(
                    "the Hessian is singular, so that a plain Newton step does not exist (rescaling of a relu layer, or softmax "
                    "logits, leave such directions). Use kind='damped', 'trust' or 'cubic', or weight decay."
                )
            move, shift, predicted = step
            new, ratio = self._moved(move, loss, predicted)
            accepted = math.isfinite(new) and (rule.kind in ("plain", "damped") or ratio > 0.1)
            steps.append(
                NewtonStep(
                    loss, float(np.linalg.norm(gradient)), float(np.linalg.norm(move)), shift, ratio, accepted,
                    report.smallest_eigenvalue, report.newton_decrement,
                )
            )  # fmt: skip
            rule.adapt(accepted)
            if not accepted:
                self._shift(-move)
                if rule.kind in ("plain", "damped"):
                    reason = "the loss was no longer finite; the last step was taken back"
                    break
                if float(np.linalg.norm(move)) <= 1e-15 * max(1.0, float(np.linalg.norm(self._point()))):
                    reason = "steps have become too small to matter"
                    break
                continue
            old = loss
            loss, gradient = self._gradient()
            model = self._model(gradient, len(steps))
            if has_stalled(old - loss, move, loss, self._point(), 1e-15) and rule.kind != "plain":
                reason = "loss and parameters no longer move"
                break
        report = self._report(model, gradient, loss, tolerance)
        converged = report.first_order and report.second_order
        if converged:
            reason = "the gradient is within its tolerance and no curvature is negative"
        return NewtonResult(
            {name: tensor.detach().clone() for name, tensor in zip(self._names, self._tensors, strict=True)},
            loss, float(np.linalg.norm(gradient)), tuple(steps), converged, reason, report,
            report.smallest_eigenvalue if report.smallest_eigenvalue < 0 else None,
        )  # fmt: skip

    def report(self, store: Any, tolerance: float) -> StoppingReport:
        """The criteria at the parameters as they are."""
        loss, gradient = self._gradient()
        if store is None:
            return self._report(self._model(gradient, 0), gradient, loss, tolerance)
        if store.numel != self._size:
            raise ConfigError(
                f"the store has {store.numel:,} parameters and the problem {self._size:,}; give the problem's own."
            )
        if not self._free:
            return self._report(complete_model(store.dense(), gradient), gradient, loss, tolerance)
        self._given = store.symmetric_operator()
        return self._report(krylov_model(self._given, gradient, size=self._krylov), gradient, loss, tolerance)

    def _try(self, rule: NewtonRule, model: QuadraticModel, loss: float) -> tuple[np.ndarray, float, float] | None:
        """A step in the parameters, its shift, and what the model says of it."""
        try:
            inside, shift = rule.propose(model)
        except ZeroDivisionError:
            return None
        factor = 1.0
        if rule.kind in ("plain", "damped"):
            factor = self._factor(rule, model.vectors @ inside, loss, float(model.coefficients @ inside))
        return model.vectors @ (factor * inside), shift, model.change(factor * inside)

    def _factor(self, rule: NewtonRule, direction: np.ndarray, loss: float, slope: float) -> float:
        if rule.line_search == "none":
            return rule.step_size
        if rule.line_search == "exact":
            found = minimize_scalar(
                lambda factor: self._loss_at(factor * direction), bracket=(0.0, rule.step_size), options={"xtol": 1e-12}
            )
            return float(found.x)
        factor = rule.step_size
        while factor > 1e-12 and not self._loss_at(factor * direction) <= loss + 1e-4 * factor * slope:
            factor /= 2
        return factor

    def _off_the_saddle(self, gradient: np.ndarray, number: int) -> tuple[np.ndarray, QuadraticModel]:
        """At a saddle the gradient says nothing: add a little of the most negative eigenvector to it."""
        ends = extreme_eigenpairs(self._operator(number), 1, which="smallest", tolerance=1e-6, vectors=True)
        direction = np.zeros_like(gradient) if ends.vectors is None else ends.vectors[:, 0]
        sign = 1.0 if float(direction @ gradient) >= 0 else -1.0
        nudged = gradient + sign * 1e-6 * abs(float(ends.values[0])) * direction
        return nudged, self._model(nudged, number)

    def _report(self, model: QuadraticModel, gradient: np.ndarray, loss: float, tolerance: float) -> StoppingReport:
        report = judge(
            model.eigenvalues, model.coefficients, gradient, self._point(), loss, gradient_tolerance=tolerance
        )
        if model.complete or not report.first_order:
            return report
        # The Krylov space of a vanishing gradient may hold no negative curvature although there is some.
        lowest = extreme_eigenpairs(self._operator(0), 1, which="smallest", tolerance=1e-6).values[:1]
        values = np.concatenate([lowest, model.eigenvalues])
        return judge(
            values,
            np.concatenate([[0.0], model.coefficients]),
            gradient,
            self._point(),
            loss,
            gradient_tolerance=tolerance,
        )

    def _moved(self, move: np.ndarray, loss: float, predicted: float) -> tuple[float, float]:
        self._shift(move)
        new = self._loss_at(np.zeros_like(move))
        small = 1e-14 * max(1.0, abs(loss))
        if abs(predicted) <= small and abs(loss - new) <= 10 * small:
            return new, 1.0  # both decreases are rounding
        return new, (loss - new) / -predicted if predicted != 0 else math.nan

    def _operator(self, number: int) -> AbstractSymmetricOperator:
        if self._given is not None:
            return self._given
        if self._folder is not None:
            return self._store(number).symmetric_operator()  # type: ignore[no-any-return]
        return HessianOperator(self._problem, self._names, self._size)

    def _model(self, gradient: np.ndarray, number: int) -> QuadraticModel:
        if self._free:
            start = gradient if np.any(gradient) else np.random.default_rng(0).standard_normal(self._size) * 1e-30
            return krylov_model(self._operator(number), start, size=self._krylov)
        if self._folder is not None:
            return complete_model(self._store(number).dense(), gradient)
        return complete_model(self._operator(number).matmat(np.eye(self._size)), gradient)

    def _store(self, number: int) -> Any:
        path = (self._folder or Path()) / f"step-{number:03d}.zarr"
        return compute(
            self._problem, path, parameters=list(self._names), dtype="float64", progress=False, certify=False
        )

    def _gradient(self) -> tuple[float, np.ndarray]:
        loss, gradient = hvp.gradient(self._problem, self._names)
        return loss, gradient.double().numpy()

    def _point(self) -> np.ndarray:
        return torch.cat([tensor.detach().reshape(-1) for tensor in self._tensors]).numpy()

    def _shift(self, move: np.ndarray) -> None:
        pieces = torch.from_numpy(np.ascontiguousarray(move)).split([tensor.numel() for tensor in self._tensors])
        for tensor, piece in zip(self._tensors, pieces, strict=True):
            tensor.data.add_(piece.reshape(tensor.shape))

    def _loss_at(self, move: np.ndarray) -> float:
        backup = [tensor.detach().clone() for tensor in self._tensors]
        self._shift(move)
        with torch.no_grad():
            total = sum(
                weight * float(self._problem.value(batch))
                for batch, weight in zip(self._problem.batches, self._problem.weights, strict=True)
            )
            for parameter in self._problem.parameters():
                decay = self._problem.weight_decay.get(parameter.name, 0.0)
                total += 0.5 * decay * float(parameter.tensor.square().sum())
        for tensor, saved in zip(self._tensors, backup, strict=True):
            tensor.data.copy_(saved)
        return total


def stopping_report(
    problem: Problem,
    *,
    store: Any = None,
    parameters: str | Sequence[str] | None = None,
    gradient_tolerance: float = 1e-6,
    krylov: int = 200,
) -> StoppingReport:
    """Whether a problem's parameters are at a minimum: scaled gradient, smallest eigenvalue, Newton decrement.

    Args:
        problem: At the parameters in question.
        store: Its Hessian, if it has been computed; default Hessian-vector products.
        parameters: Globs; default all trainable ones.
        gradient_tolerance: Of the scaled gradient; the others follow from it: see `disthess.linalg.stopping`.
        krylov: Most products, for more than 1,500 parameters.

    Returns:
        The numbers and whether each is small enough; ``report.stop`` if all are.

    Raises:
        ConfigError: The store is of other parameters.
    """
    loop = _Loop(problem, parameters, None, None, krylov)
    return loop.report(store, gradient_tolerance)


def _check(kind: Any, line_search: Any, damping: float, weight: float, step_size: float, max_steps: int) -> None:
    if kind not in ("plain", "damped", "trust", "cubic"):
        raise ConfigError(f"kind must be plain, damped, trust or cubic, got {kind!r}.")
    if line_search not in ("none", "armijo", "exact"):
        raise ConfigError(f"line_search must be none, armijo or exact, got {line_search!r}.")
    if damping < 0 or weight <= 0 or step_size <= 0 or max_steps < 1:
        raise ConfigError(
            f"damping must not be negative, cubic_weight, step_size and max_steps must be positive; got {damping!r}, {weight!r}, "
            f"{step_size!r} and {max_steps!r}."
        )
