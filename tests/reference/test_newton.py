"""Newton's method on functions whose iterates are known, on Rosenbrock's, at saddles, and on digits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disthess
import disthess.steps
from disthess.errors import ConfigError, ProblemError


class Point(nn.Module):
    def __init__(self, start: list[float]) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start, dtype=torch.float64))


def function(value: Callable[[Tensor], Tensor], start: list[float]) -> disthess.Problem:
    return disthess.Problem(
        Point(start), objective=lambda m, b: value(m.x) + 0 * b.sum(), batches=[torch.zeros(1).double()]
    )


def iterates(value: Callable[[Tensor], Tensor], start: float, steps: int, **options: Any) -> list[float]:
    found = [start]
    for _ in range(steps):
        result = disthess.newton(function(value, [found[-1]]), max_steps=1, **options)
        found.append(float(result.parameters["x"][0]))
    return found


def test_n1_order_three_halves() -> None:
    xs = iterates(lambda x: (x**2 / 2 + 0.4 * x.abs() ** 2.5).sum(), 0.1, 1, kind="plain", gradient_tolerance=0)
    assert xs[1] == pytest.approx(0.5 * 0.1**1.5 / (1 + 1.5 * 0.1**0.5), rel=1e-9)
    assert xs[1] == pytest.approx(0.01072, abs=5e-6)


def test_n2_a_fixed_step_size_is_linear() -> None:
    xs = iterates(lambda x: (x**2 / 2 + x**3 / 6).sum(), 0.3, 8, kind="plain", step_size=0.9, gradient_tolerance=0)
    assert xs[-1] / xs[-2] == pytest.approx(0.1, abs=1e-4)


def curved(x: Tensor) -> Tensor:
    """Minimum at the origin, Hessian diag(1, 3) there, neither quadratic nor separable."""
    return x[0] ** 2 / 2 + x[0] ** 3 / 6 + 1.5 * x[1] ** 2 + x[0] * x[1] ** 2 / 2 + x[1] ** 4 / 4


def test_n6_exact_line_search_is_quadratic() -> None:
    errors, point = [], [0.25, -0.2]
    for _ in range(4):
        errors.append(math.hypot(*point))
        found = disthess.newton(
            function(curved, point), kind="plain", line_search="exact", max_steps=1, gradient_tolerance=0
        )
        point = found.parameters["x"].tolist()
    assert errors[0] > 0.3
    assert errors[-1] < 1e-9
    assert all(after <= 0.5 * before**2 + 1e-16 for before, after in itertools.pairwise(errors))


def test_exact_line_search_stops_where_the_slope_vanishes() -> None:
    xs = iterates(lambda x: (x**2 / 2 + x**3 / 6).sum(), 0.25, 1, kind="plain", line_search="exact")
    assert abs(xs[1]) < 1e-15


def test_n7_semismooth() -> None:
    xs = iterates(lambda x: (x**2 / 2 + torch.relu(x) ** 2 / 2 - x).sum(), -3.0, 2, kind="plain")
    assert xs == pytest.approx([-3.0, 1.0, 0.5])


def rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


@pytest.mark.parametrize("kind", ["trust", "cubic"])
@pytest.mark.parametrize("matrix_free", [False, True])
def test_n8_rosenbrock(kind: Any, matrix_free: bool) -> None:
    found = disthess.newton(function(rosenbrock, [-1.2, 1.0]), kind=kind, max_steps=100, matrix_free=matrix_free)
    assert found.converged
    assert len(found.steps) <= 40
    np.testing.assert_allclose(found.parameters["x"].numpy(), 1.0, atol=1e-6)
    losses = [step.loss for step in found.steps if step.accepted]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert "converged" not in found.describe()
    assert "within its tolerance" in found.describe()


def test_n9_a_rescaling_leaves_a_null_direction() -> None:
    """relu(v x) w has the null direction (w, -v): a plain step does not exist, a damped one does."""
    value: Callable[[Tensor], Tensor] = lambda x: 0.5 * (torch.relu(x[0]) * x[1] - 1) ** 2  # noqa: E731
    at = function(value, [2.0, 0.5])
    matrix = disthess.reference_hessian(at)
    np.testing.assert_allclose(matrix @ np.array([2.0, -0.5]), 0.0, atol=1e-12)
    with pytest.raises(ProblemError, match="singular"):
        disthess.newton(function(lambda x: (x[0] - x[1]) ** 2, [2.0, 0.5]), kind="plain")
    assert disthess.newton(function(value, [2.0, 0.7]), kind="trust").converged


def saddle(x: Tensor) -> Tensor:
    return x[0] ** 4 / 4 - x[1] ** 2 / 2 + x[1] ** 4 / 4


@pytest.mark.parametrize("matrix_free", [False, True])
def test_a_saddle_is_not_an_end(matrix_free: bool) -> None:
    stuck = disthess.newton(function(saddle, [0.0, 0.0]), kind="plain", matrix_free=matrix_free)
    assert not stuck.converged
    assert stuck.negative_curvature == pytest.approx(-1.0)
    assert "saddle" in stuck.reason
    for kind in ("trust", "cubic"):
        found = disthess.newton(
            function(lambda x: saddle(x) + 0.1 * x[0] ** 2, [0.0, 0.0]),
            kind=kind,
            matrix_free=matrix_free,
            max_steps=80,
        )  # type: ignore[arg-type]
        assert found.converged
        assert abs(float(found.parameters["x"][1])) == pytest.approx(1.0, abs=1e-5)


def test_a_fixed_damping_cycles_on_an_absolute_value() -> None:
    """Theorem 8 as printed: |x| with damping 2 goes .3, -.2, .3, ...; with 2 (t + 1) it converges."""
    assert iterates(lambda x: x.abs().sum(), 0.3, 3, kind="plain", damping=2.0) == pytest.approx([0.3, -0.2, 0.3, -0.2])
    for count in (5, 20, 40):
        found = disthess.newton(
            function(lambda x: x.abs().sum(), [0.3]), kind="plain", damping=lambda t: 2.0 * (t + 1), max_steps=count
        )
        assert not found.converged
        assert abs(float(found.parameters["x"])) <= 1 / (2 * count)  # the length of the last step


@pytest.mark.parametrize("damping", [0.25, 0.75])
def test_a_fixed_damping_settles_at_a_saddle_or_runs_away(damping: float) -> None:
    """(x^2 - y^2) / 2: y -> -damping / (1 - damping) y; and the saddle is not taken for a minimum."""
    found = disthess.newton(
        function(lambda x: (x[0] ** 2 - x[1] ** 2) / 2, [0.5, 0.1]), kind="plain", damping=damping, max_steps=3
    )
    assert float(found.parameters["x"][1]) == pytest.approx(0.1 * (-damping / (1 - damping)) ** 3)
    assert not found.converged
    assert found.negative_curvature == pytest.approx(-1.0)


def test_a_damping_that_cancels_curvature_is_refused() -> None:
    with pytest.raises(ProblemError, match="singular"):
        disthess.newton(function(lambda x: (x[0] ** 2 - x[1] ** 2) / 2, [0.5, 0.1]), kind="plain", damping=1.0)


def test_damped_steps_are_shifted_past_negative_curvature() -> None:
    found = disthess.newton(
        function(lambda x: (x[0] ** 2 - x[1] ** 2) / 2, [1.0, 0.1]), kind="damped", damping=0.5, max_steps=3
    )
    assert abs(float(found.parameters["x"][1])) > 0.1
    assert found.negative_curvature == pytest.approx(-1.0)


def test_cosine_descends_monotonically() -> None:
    """Damping max(0, -lambda_min) + L_g / 2 + c with L_g = 1: from .05 to pi."""
    found = disthess.newton(function(lambda x: torch.cos(x).sum(), [0.05]), kind="damped", damping=0.6, max_steps=60)
    losses = [step.loss for step in found.steps]
    assert losses == sorted(losses, reverse=True)
    assert float(found.parameters["x"][0]) == pytest.approx(math.pi, abs=1e-6)


def small_digits() -> disthess.Problem:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.data[:300] / 16.0, dtype=torch.float64)
    y = torch.tensor(data.target[:300])
    model = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10)).double()
    return disthess.Problem(model, loss="cross_entropy", batches=[(x, y)], weight_decay=0.01)


def restarted(problem: disthess.Problem, parameters: dict[str, Tensor], shift: float = 0.0) -> disthess.Problem:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in problem.model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(parameters[name] + shift * noise)
    return problem


@pytest.mark.slow
def test_quadratic_convergence_on_digits() -> None:
    """Near a minimum the gradient is squared at every step."""
    found = disthess.newton(small_digits(), kind="trust", max_steps=100, gradient_tolerance=1e-12)
    assert found.stopping.smallest_eigenvalue > 0
    near = disthess.newton(
        restarted(small_digits(), found.parameters, 0.02), kind="plain", max_steps=12, gradient_tolerance=1e-15
    )
    norms = [step.gradient_norm for step in near.steps]
    falling = [norm for norm in norms if norm > 1e-13]
    assert falling[-1] < 1e-6
    rates = [math.log(b) / math.log(a) for a, b in itertools.pairwise(falling) if a < 1e-2]
    assert rates
    constants = [b / a**2 for a, b in itertools.pairwise(falling) if a < 1e-2 and b > 1e-12]
    assert max(constants) < 1e4
    assert falling[-1] <= 1e4 * falling[-2] ** 2


def test_on_stores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(20, 2, dtype=torch.float64)
    problem = disthess.Problem(model, loss="mse", batches=[(x, x[:, :1] * x[:, 1:])], weight_decay=0.05)
    dense = disthess.newton(problem, max_steps=6)
    stored = disthess.newton(problem, max_steps=6, store=tmp_path / "steps")
    free = disthess.newton(problem, max_steps=6, store=tmp_path / "more", matrix_free=True)
    for found in (stored, free):
        assert found.loss == pytest.approx(dense.loss, rel=1e-8)
    # One store for every point: steps that were taken back have none of their own.
    taken = sum(step.accepted for step in stored.steps)
    assert sorted(path.name for path in (tmp_path / "steps").glob("*.zarr")) == [
        f"step-{number:03d}.zarr" for number in range(taken + 1)
    ]
    assert float(model[0].weight.detach().abs().sum()) == float(problem.model[0].weight.detach().abs().sum())


def test_solve_on_a_store(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(20, 2, dtype=torch.float64)
    problem = disthess.Problem(model, loss="mse", batches=[(x, x[:, :1])])
    store = disthess.compute(problem, tmp_path / "a.zarr", progress=False)
    right = np.random.default_rng(0).standard_normal(store.numel)
    wanted = np.linalg.solve(disthess.reference_hessian(problem) + 9.0 * np.eye(store.numel), right)
    dense, iterated = (
        disthess.solve(store, right, damping=9.0),
        disthess.solve(store, right, damping=9.0, dense_bytes=0),
    )
    assert (dense.method, iterated.method) == ("cholesky", "minres")
    np.testing.assert_allclose(dense.solution, wanted, rtol=1e-9)
    np.testing.assert_allclose(iterated.solution, wanted, rtol=1e-7)
    low = disthess.low_rank(store, store.numel)
    np.testing.assert_allclose(disthess.solve(low, right, damping=9.0).solution, wanted, rtol=1e-7)
    with pytest.raises(ConfigError, match="has 3 entries"):
        disthess.solve(store, right[:3])
    moved = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    with pytest.raises(ConfigError, match="not of this problem"):
        disthess.stopping_report(disthess.Problem(moved, loss="mse", batches=[(x, x[:, :1])]), store=store)
    with pytest.raises(ProblemError, match="not finite"):
        disthess.stopping_report(disthess.Problem(model, loss="mse", batches=[(x * float("nan"), x[:, :1])]))
    with pytest.raises(ConfigError, match="krylov"):
        disthess.newton(problem, krylov=0)
    with pytest.raises(ConfigError, match="finite"):
        disthess.solve(store, np.where(right > 0, right, np.nan))
    report = disthess.stopping_report(problem)
    assert report.smallest_eigenvalue == pytest.approx(np.linalg.eigvalsh(disthess.reference_hessian(problem))[0])
    assert report == disthess.stopping_report(problem, store=store) or report.newton_decrement == pytest.approx(
        disthess.stopping_report(problem, store=store).newton_decrement, rel=1e-6
    )


def test_a_krylov_space_that_is_too_small_says_so() -> None:
    def bowl(x: Tensor) -> Tensor:
        return (torch.arange(1, 41, dtype=torch.float64) * x**2).sum() / 2 + (x**4).sum()

    seen: list[disthess.steps.NewtonStep] = []
    free: dict[str, Any] = {"kind": "damped", "damping": 0.1, "matrix_free": True}
    disthess.newton(function(bowl, [1.0] * 40), **free, krylov=4, max_steps=1, watch=seen.append)
    disthess.newton(function(bowl, [1.0] * 40), **free, max_steps=1, watch=seen.append)
    disthess.newton(function(bowl, [1.0] * 40), kind="damped", damping=0.1, max_steps=1, watch=seen.append)
    small, large, whole = (step.residual for step in seen)
    assert small > 1e-3
    assert large < 1e-6
    assert whole == 0


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="kind must be"):
        disthess.newton(function(rosenbrock, [0.0, 0.0]), kind="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="adapts its own"):
        disthess.newton(function(rosenbrock, [0.0, 0.0]), damping=lambda t: 1.0)
    with pytest.raises(ConfigError, match="step_size"):
        disthess.newton(function(rosenbrock, [0.0, 0.0]), step_size=-1.0)
