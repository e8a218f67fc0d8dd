"""Newton's method on a problem: plain, damped, with an acceptance test, or cubic; on stores, dense or matrix-free.

plain    s = -a (H + damping I)^-1 g, damping 0 unless given: quadratic near a minimum if a = 1, damping = 0, H > 0 and
         Lipschitz there. A fixed damping alone is not safe: it may settle at a saddle, cycle, or run away
damped   s = -a (H + m I)^-1 g, m = max(0, -lambda_min) + damping. Monotone once damping > L_g / 2, with L_g the Lipschitz
         constant of the gradient
trust    the same, damping / 4 after a step that decreases L by more than a tenth of what the model says, * 4 after another,
         which is taken back
cubic    s = argmin g s + s H s / 2 + M |s|^3 / 6, M adapted likewise: its limit points have no negative curvature
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final, get_args

import numpy as np
from scipy.optimize import brentq
from torch import Tensor

from disthess.errors import ConfigError, ProblemError
from disthess.landscape import Curvature, Landscape, report_at
from disthess.linalg.lanczos import extreme_eigenpairs
from disthess.linalg.model import QuadraticModel
from disthess.linalg.newton_rule import DAMPING, Damping, Kind, LineSearch, NewtonRule
from disthess.linalg.stopping import StoppingReport, has_stalled
from disthess.problem import Problem

_CONVERGED = "the gradient is within its tolerance and no curvature is negative"


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
        residual: ``|(H + shift I) s + g|`` of the step before any line search: what the Krylov space leaves unsolved; 0 where the
            whole matrix was decomposed.
    """

    loss: float
    gradient_norm: float
    step_norm: float
    shift: float
    ratio: float
    accepted: bool
    smallest_eigenvalue: float
    decrement: float
    residual: float


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
    damping: Damping | None = None,
    cubic_weight: float = 1.0,
    step_size: float = 1.0,
    line_search: LineSearch = "none",
    max_steps: int = 50,
    gradient_tolerance: float = 1e-8,
    store: str | os.PathLike[str] | None = None,
    matrix_free: bool | None = None,
    krylov: int = 200,
    parameters: str | Sequence[str] | None = None,
    watch: Callable[[NewtonStep], object] | None = None,
) -> NewtonResult:
    """Minimise a problem's objective by Newton's method, in float64; the user's model is not changed.

    Args:
        problem: What to minimise; weight decay counts.
        kind: ``plain``, ``damped``, ``trust`` (the default) or ``cubic``: see the module's text.
        damping: Of ``plain`` (default 0) and ``damped`` (default 1), a number or a function of the step's number; at the start of
            ``trust`` (default 1). In the units of the Hessian.
        cubic_weight: ``M`` at the start.
        step_size: Factor of ``plain`` and ``damped`` steps. Other than 1 it makes convergence linear.
        line_search: For ``plain`` and ``damped`` steps: ``armijo`` halves from ``step_size`` on, ``exact`` goes to the first point
            along the step where the slope vanishes.
        max_steps: Steps tried at most.
        gradient_tolerance: Of the scaled gradient: see `disthess.stopping_report`.
        store: A directory for a store of the Hessian at each point (``step-000.zarr`` ...), computed as `disthess.compute` does;
            default none.
        matrix_free: Whether steps come from products (of the stores, or by autograd) on a Krylov space; default for more than 1,500
            parameters.
        krylov: Most products of one step then.
        parameters: Globs; the others stay as they are. Default all trainable ones.
        watch: Called with each step as soon as it was tried.

    Returns:
        Parameters, steps, why it ended, and whether negative curvature was left.

    Raises:
        ConfigError: An argument is wrong.
        ProblemError: A Hessian is singular under ``kind="plain"``, or the loss is not finite at the start.

    Example:
        >>> import torch
        >>> line = torch.nn.Linear(1, 1, bias=False).double()
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> found = newton(Problem(line, loss="mse", batches=[(x, 3 * x)]), kind="plain")
        >>> found.converged, round(float(found.parameters["weight"]), 9)
        (True, 3.0)
    """
    _check(kind, line_search, damping, cubic_weight, step_size, max_steps)
    _check_krylov(krylov)
    landscape = Landscape(problem, parameters)
    walk = _Walk(landscape, Curvature(landscape, store, matrix_free, krylov), watch)
    chosen = DAMPING[kind] if damping is None else damping
    return walk.run(NewtonRule(kind, chosen, cubic_weight, step_size, line_search), max_steps, gradient_tolerance)


@final
class _Walk:
    def __init__(
        self, landscape: Landscape, curvature: Curvature, watch: Callable[[NewtonStep], object] | None
    ) -> None:
        self._here = landscape
        self._curvature = curvature
        self._watch = watch
        self._steps: list[NewtonStep] = []
        self._taken = 0

    def run(self, rule: NewtonRule, max_steps: int, tolerance: float) -> NewtonResult:
        """Step until the criteria hold."""
        loss, gradient = self._here.gradient()
        if not math.isfinite(loss):
            raise ProblemError(f"the loss is {loss} at the start; Newton's method needs a finite one.")
        model = self._curvature.model(gradient, 0)
        reason = f"{max_steps} steps were not enough"
        while len(self._steps) < max_steps:
            report = self._report(model, gradient, loss, tolerance)
            if report.first_order and (report.second_order or not rule.leaves_saddles):
                reason = (
                    f"stationary, but a saddle: curvature {report.smallest_eigenvalue:.3g}; use kind='trust' or 'cubic'"
                )
                break
            if report.first_order:
                gradient, model = self._off_the_saddle(gradient)
            accepted = self._step(rule, model, loss, gradient, report)
            if not accepted and not rule.adapts:
                reason = "the loss was no longer finite; the last step was taken back"
                break
            length = self._steps[-1].step_norm
            if not accepted and length <= 1e-15 * max(1.0, float(np.linalg.norm(self._here.point()))):
                reason = "steps have become too small to matter"
                break
            if not accepted:
                continue
            old = loss
            self._taken += 1
            loss, gradient = self._here.gradient()
            model = self._curvature.model(gradient, self._taken)
            size = float(np.linalg.norm(self._here.point()))
            if rule.kind != "plain" and has_stalled(old - loss, np.array([length]), loss, np.array([size]), 1e-15):
                reason = "loss and parameters no longer move"
                break
        report = self._report(model, gradient, loss, tolerance)
        converged = report.first_order and report.second_order
        return NewtonResult(
            self._here.parameters(),
            loss,
            float(np.linalg.norm(gradient)),
            tuple(self._steps),
            converged,
            _CONVERGED if converged else reason,
            report,
            report.smallest_eigenvalue if report.smallest_eigenvalue < 0 else None,
        )

    def _step(
        self, rule: NewtonRule, model: QuadraticModel, loss: float, gradient: np.ndarray, report: StoppingReport
    ) -> bool:
        """Try a step, and take it back unless it is accepted."""
        try:
            inside, shift = rule.propose(model, len(self._steps))
        except ZeroDivisionError:
            raise ProblemError(
                "the Hessian is singular, so that a plain Newton step does not exist (rescaling of a relu layer, or softmax "
                "logits, leave such directions). Use kind='damped', 'trust' or 'cubic', or weight decay."
            ) from None
        residual = model.residual(inside)
        if not rule.adapts:
            inside = inside * self._factor(rule, model.vectors @ inside, loss, float(model.coefficients @ inside))
        step, predicted = model.vectors @ inside, model.change(inside)
        self._here.move(step)
        new = self._here.loss_at(np.zeros_like(step))
        ratio = _ratio(loss, new, predicted)
        accepted = math.isfinite(new) and (not rule.adapts or ratio > 0.1)
        self._steps.append(
            NewtonStep(
                loss, float(np.linalg.norm(gradient)), float(np.linalg.norm(step)), shift, ratio, accepted,
                report.smallest_eigenvalue, report.newton_decrement, residual,
            )
        )  # fmt: skip
        if self._watch is not None:
            self._watch(self._steps[-1])
        rule.adapt(accepted)
        if not accepted:
            self._here.move(-step)
        return accepted

    def _factor(self, rule: NewtonRule, direction: np.ndarray, loss: float, slope: float) -> float:
        if rule.line_search == "none":
            return rule.step_size
        if rule.line_search == "exact":
            return _stationary(lambda a: self._here.slope_at(a * direction, direction), rule.step_size)
        factor = rule.step_size
        while factor > 1e-12 and not self._here.loss_at(factor * direction) <= loss + 1e-4 * factor * slope:
            factor /= 2
        return factor

    def _off_the_saddle(self, gradient: np.ndarray) -> tuple[np.ndarray, QuadraticModel]:
        """At a saddle the gradient says nothing: add a little of the most negative eigenvector to it."""
        operator = self._curvature.operator(self._taken)
        ends = extreme_eigenpairs(operator, 1, which="smallest", tolerance=1e-6, vectors=True)
        direction = np.zeros_like(gradient) if ends.vectors is None else ends.vectors[:, 0]
        sign = 1.0 if float(direction @ gradient) >= 0 else -1.0
        nudged = gradient + sign * 1e-6 * abs(float(ends.values[0])) * direction
        return nudged, self._curvature.model(nudged, self._taken)

    def _report(self, model: QuadraticModel, gradient: np.ndarray, loss: float, tolerance: float) -> StoppingReport:
        return report_at(self._here, model, lambda: self._curvature.operator(self._taken), gradient, loss, tolerance)


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
        ConfigError: The store is of other parameters, or of another point; or an argument is wrong.
        ProblemError: Loss or gradient are not finite.
    """
    _check_krylov(krylov)
    landscape = Landscape(problem, parameters)
    curvature = Curvature(landscape, None, None, krylov)
    loss, gradient = landscape.gradient()
    if not math.isfinite(loss) or not np.isfinite(gradient).all():
        raise ProblemError(f"the loss is {loss} or its gradient not finite; check the data and the weights.")
    if store is None:
        model = curvature.model(gradient, 0)
        return report_at(landscape, model, lambda: curvature.operator(0), gradient, loss, gradient_tolerance)
    model, operator = curvature.model_of_store(store, gradient)
    return report_at(landscape, model, lambda: operator, gradient, loss, gradient_tolerance)


def _check_krylov(krylov: int) -> None:
    if krylov < 1:
        raise ConfigError(f"krylov must be at least 1, got {krylov!r}.")


def _ratio(loss: float, new: float, predicted: float) -> float:
    """Decrease over the decrease that the model says; 1 where both are rounding."""
    small = 1e-14 * max(1.0, abs(loss))
    if abs(predicted) <= small and abs(loss - new) <= 10 * small:
        return 1.0
    return (loss - new) / -predicted if predicted != 0 else math.nan


def _stationary(slope: Callable[[float], float], first: float) -> float:
    """The first sign change of the slope at doubling distances, to rounding; where there is none, the last distance tried."""
    start = slope(0.0)
    end = first
    for _ in range(60):
        if slope(end) * start <= 0:
            return float(brentq(slope, 0.0, end, xtol=1e-300, rtol=8.9e-16, maxiter=200)) if start else 0.0
        end *= 2
    return end


def _check(
    kind: Any, line_search: Any, damping: Damping | None, weight: float, step_size: float, max_steps: int
) -> None:
    if kind not in get_args(Kind):
        raise ConfigError(f"kind must be plain, damped, trust or cubic, got {kind!r}.")
    if line_search not in get_args(LineSearch):
        raise ConfigError(f"line_search must be none, armijo or exact, got {line_search!r}.")
    if callable(damping) and kind not in ("plain", "damped"):
        raise ConfigError(
            f"damping as a function of the step is for kind='plain' and 'damped'; {kind!r} adapts its own."
        )
    if (damping is not None and not callable(damping) and damping < 0) or min(weight, step_size, max_steps) <= 0:
        raise ConfigError(
            f"damping must not be negative, cubic_weight, step_size and max_steps must be positive; got {damping!r}, {weight!r}, "
            f"{step_size!r} and {max_steps!r}."
        )
