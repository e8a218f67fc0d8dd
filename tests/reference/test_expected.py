"""Hessians of expected losses: closed forms, exact and by Monte Carlo; unbiased within their own standard errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Exponential,
    Gamma,
    Geometric,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    Pareto,
    Poisson,
    TransformedDistribution,
    Uniform,
    kl_divergence,
)

import disthess
from disthess.errors import ConfigError, ProblemError

ONE = [torch.zeros(1, dtype=torch.float64)]


class Numbers(nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))


def expected(objective: Any, options: dict[str, Any] | None = None, **values: Any) -> Any:
    return disthess.expected_hessian(Numbers(**values), objective, ONE, **(options or {}))


def normal(m: Any) -> Normal:
    return Normal(m.mu, m.rho.exp())


def phi(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# S1: E (mu + e^rho xi)^3
def cube(m: Any, _: Any, draw: Any) -> Tensor:
    return draw("z", normal(m)) ** 3


MU, RHO = 0.7, -0.3
VAR = math.exp(2 * RHO)
S1 = np.array([[6 * MU, 6 * VAR], [6 * VAR, 12 * MU * VAR]])


def test_s1_exactly_by_gauss_hermite() -> None:
    found = expected(cube, mu=MU, rho=RHO)
    assert (found.how, found.ways, found.count) == ("exact", {"z": "quadrature"}, 8)
    np.testing.assert_allclose(found.matrix, S1, rtol=1e-12)
    assert found.quadrature_error <= 1e-12
    assert found.loss == pytest.approx(MU**3 + 3 * MU * VAR, rel=1e-12)


# S2: a Bernoulli that cannot be reparametrised
def coin(m: Any, _: Any, draw: Any) -> Tensor:
    z = draw("z", Bernoulli(logits=m.theta))
    return 2 * z - (1 - z)


def test_s2_enumerated_and_not_the_naive_surrogate() -> None:
    p = sigmoid(0.4)
    found = expected(coin, theta=0.4)
    assert found.matrix[0, 0] == pytest.approx(3 * p * (1 - p) * (1 - 2 * p), abs=1e-14)
    assert found.matrix[0, 0] == pytest.approx(-0.142265, abs=5e-7)
    assert found.ways == {"z": "enumerated"}
    # E[L hess log p], the surrogate L log p differentiated twice, is another number.
    naive = -p * (1 - p) * (2 * p - (1 - p))
    assert naive == pytest.approx(-0.191263, abs=5e-7)


# S2b: the cost depends on parameters too
def mixed(m: Any, _: Any, draw: Any) -> Tensor:
    z = draw("z", Bernoulli(logits=m.theta))
    return z * torch.sin(m.phi) + (1 - z) * m.phi**2


def mixed_truth(theta: float, angle: float) -> np.ndarray:
    p = sigmoid(theta)
    cross = p * (1 - p) * (math.cos(angle) - 2 * angle)
    first = (math.sin(angle) - angle**2) * p * (1 - p) * (1 - 2 * p)
    return np.array([[first, cross], [cross, -p * math.sin(angle) + 2 * (1 - p)]])


def test_s2b_cross_terms() -> None:
    found = expected(mixed, theta=0.4, phi=0.9)
    np.testing.assert_allclose(found.matrix, mixed_truth(0.4, 0.9), atol=1e-14)
    assert found.block("theta", "phi")[0, 0] == pytest.approx(mixed_truth(0.4, 0.9)[0, 1])


# S3: a kink in the sampled value
def kinked(m: Any, _: Any, draw: Any) -> Tensor:
    return torch.relu(draw("z", Normal(m.theta, 1.0)))


@pytest.mark.slow
def test_s3_the_pathwise_estimator_is_refused_at_kinks() -> None:
    with pytest.raises(ProblemError, match=r"kinks in the draw 'z' \(relu\)"):
        expected(kinked, {"how": "monte_carlo", "estimator": "pathwise"}, theta=0.5)
    with pytest.raises(ProblemError, match="kinks"):
        expected(kinked, {"how": "exact"}, theta=0.5)
    forced = expected(
        kinked, {"how": "monte_carlo", "estimator": "pathwise", "samples": 20, "allow_kinks": True}, theta=0.5
    )
    assert forced.matrix[0, 0] == 0.0  # what is missed: phi(theta) = .352065
    found = expected(kinked, {"samples": 2000}, theta=0.5)
    assert found.ways == {"z": "score"}
    assert abs(found.matrix[0, 0] - phi(0.5)) <= 4 * found.standard_error[0, 0]
    assert phi(0.5) == pytest.approx(0.352065, abs=5e-7)


def test_s4_elbo() -> None:
    """-ELBO with a unit normal prior: KL + E (z - x)^2 / 2 has Hessian diag(2, 4 e^(2 rho))."""

    def objective(m: Any, _: Any, draw: Any) -> Tensor:
        q = normal(m)
        return kl_divergence(q, Normal(0.0, 1.0)) + 0.5 * (draw("z", q) - 1.3) ** 2

    found = expected(objective, mu=MU, rho=RHO)
    np.testing.assert_allclose(found.matrix, np.diag([2, 4 * VAR]), atol=1e-13)


@pytest.mark.slow
def test_s5_marginal_likelihood_by_louis() -> None:
    """-log(p c1 + (1 - p) c0) at theta = .4, c1 = .7, c0 = .2; the mean of -log p(y | z) would give 0.059408."""

    def likelihood(m: Any, _: Any, draw: Any) -> Tensor:
        z = draw("z", Bernoulli(logits=m.theta))
        return z * math.log(0.7) + (1 - z) * math.log(0.2)

    found = expected(likelihood, {"marginal": True}, theta=0.4)
    assert found.matrix[0, 0] == pytest.approx(0.105361, abs=5e-7)
    p = sigmoid(0.4)
    assert found.loss == pytest.approx(-math.log(0.7 * p + 0.2 * (1 - p)))
    wrong = expected(lambda m, b, draw: -likelihood(m, b, draw), theta=0.4)
    assert wrong.matrix[0, 0] == pytest.approx(0.059408, abs=5e-7)
    sampled = expected(likelihood, {"marginal": True, "how": "monte_carlo", "samples": 2000}, theta=0.4)
    assert abs(sampled.matrix[0, 0] - found.matrix[0, 0]) <= 4 * sampled.standard_error[0, 0]


def test_s6_policy_reward() -> None:
    rewards = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)

    def objective(m: Any, _: Any, draw: Any) -> Tensor:
        return -rewards[draw("action", Categorical(logits=m.logits)).long()]

    logits = [0.2, -0.4, 0.1]
    found = expected(objective, logits=logits)
    policy = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0).numpy()
    wanted = np.zeros((3, 3))
    for place, reward in enumerate(rewards.tolist()):
        gap = np.eye(3)[place] - policy
        wanted += reward * policy[place] * (np.outer(gap, gap) - np.diag(policy) + np.outer(policy, policy))
    np.testing.assert_allclose(found.matrix, -wanted, atol=1e-14)


@pytest.mark.slow
def test_s7_squared_kinks_are_pathwise() -> None:
    def objective(m: Any, _: Any, draw: Any) -> Tensor:
        return 0.5 * torch.relu(draw("z", Normal(m.theta, 1.0))) ** 2

    found = expected(objective, {"how": "monte_carlo", "samples": 2000, "estimator": "pathwise"}, theta=0.5)
    assert found.ways == {"z": "pathwise"}
    assert abs(found.matrix[0, 0] - stats.norm.cdf(0.5)) <= 4 * found.standard_error[0, 0]


class Chain:
    """A discrete draw, then a continuous one whose mean depends on it, then costs of both."""

    @staticmethod
    def costs(m: Any, _: Any, draw: Any) -> list[Any]:
        b = draw("b", Bernoulli(logits=m.theta))
        z = draw("z", Normal(m.mu * (1 + b), 0.5))
        return [(b * m.mu, ("b",)), (z**2, ("b", "z"))]


def test_chains_exactly_and_in_both_estimators() -> None:
    """E [b mu + z^2] = p mu + mu^2 (1 + 3 p) + 1/4."""
    theta, mu = 0.3, 0.8
    p = sigmoid(theta)
    dp, ddp = p * (1 - p), p * (1 - p) * (1 - 2 * p)
    wanted = np.array([[ddp * (mu + 3 * mu**2), dp * (1 + 6 * mu)], [dp * (1 + 6 * mu), 2 * (1 + 3 * p)]])
    exact = expected(Chain.costs, theta=theta, mu=mu)
    np.testing.assert_allclose(exact.matrix, wanted, atol=1e-13)
    assert exact.ways == {"b": "enumerated", "z": "quadrature"}
    for estimator, way in (("auto", "pathwise"), ("score", "score")):
        found = expected(
            Chain.costs, {"how": "monte_carlo", "samples": 500, "estimator": estimator}, theta=theta, mu=mu
        )
        assert found.ways == {"b": "score", "z": way}
        assert (np.abs(found.matrix - wanted) <= 4 * found.standard_error + 1e-12).all()


def gamma_cost(m: Any, _: Any, draw: Any) -> Tensor:
    return draw("z", Gamma(m.a.exp(), m.b.exp())) ** 2


def counted(m: Any, _: Any, draw: Any) -> Tensor:
    return draw("z", Poisson(m.a.exp())) ** 2 * m.b


def waited(m: Any, _: Any, draw: Any) -> Tensor:
    return draw("z", Geometric(logits=m.a))


def scaled(m: Any, _: Any, draw: Any) -> Tensor:
    return draw("z", Laplace(m.a, m.b.exp())) ** 2


def steered(m: Any, _: Any, draw: Any) -> Tensor:
    """A normal draw whose mean hangs on a Bernoulli one: score and pathwise in one graph."""
    z = draw("z", Bernoulli(logits=m.a))
    return draw("y", Normal(m.b * z, 1.0)) ** 2


A, B = 0.3, -0.2
SHAPE, RATE = math.exp(A), math.exp(B)
MOMENT = SHAPE * (SHAPE + 1) / RATE**2
GAMMA = np.array([[SHAPE * (4 * SHAPE + 1), -2 * SHAPE * (2 * SHAPE + 1)], [0.0, 4 * SHAPE * (SHAPE + 1)]]) / RATE**2
GAMMA[1, 0] = GAMMA[0, 1]
POISSON = np.array([[B * (SHAPE + 4 * SHAPE**2), SHAPE + 2 * SHAPE**2], [SHAPE + 2 * SHAPE**2, 0.0]])
STEER = sigmoid(A) * (1 - sigmoid(A))
STEERED = np.array([[B**2 * STEER * (1 - 2 * sigmoid(A)), 2 * B * STEER], [2 * B * STEER, 2 * sigmoid(A)]])

UNBIASED = {
    "gamma": (gamma_cost, "auto", {"a": A, "b": B}, GAMMA),
    "poisson": (counted, "auto", {"a": A, "b": B}, POISSON),
    "geometric": (waited, "auto", {"a": A}, np.array([[math.exp(-A)]])),
    "laplace": (scaled, "auto", {"a": A, "b": B}, np.diag([2.0, 8 * math.exp(2 * B)])),
    "mixed graph": (steered, "auto", {"a": A, "b": B}, STEERED),
    "S1 pathwise": (cube, "pathwise", {"mu": MU, "rho": RHO}, S1),
    "S1 score": (cube, "score", {"mu": MU, "rho": RHO}, S1),
    "S2": (coin, "auto", {"theta": 0.4}, np.array([[-0.142265]])),
    "S2b": (mixed, "auto", {"theta": 0.4, "phi": 0.9}, mixed_truth(0.4, 0.9)),
    "S3": (kinked, "auto", {"theta": 0.5}, np.array([[phi(0.5)]])),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name: str) -> None:
    """Means of forty independent runs: a t test per entry, p > 0.01 shared between the entries."""
    objective, estimator, values, wanted = UNBIASED[name]
    options = {"how": "monte_carlo", "estimator": estimator, "samples": 100}
    runs = np.stack([expected(objective, {**options, "seed": seed}, **values).matrix for seed in range(1, 41)])
    varying = runs.std(0) > 1e-12
    np.testing.assert_allclose(runs.mean(0)[~varying], wanted[~varying], atol=1e-6)
    p_values = stats.ttest_1samp(runs[:, varying], wanted[varying], axis=0).pvalue
    assert p_values.min() * varying.sum() > 0.01


@pytest.mark.slow
def test_intervals_cover() -> None:
    """95 % intervals of one entry hold the truth about 95 times in 100."""
    truth = 6 * MU
    hits = 0
    for seed in range(1, 201):
        found = expected(cube, {"how": "monte_carlo", "samples": 60, "seed": seed}, mu=MU, rho=RHO)
        low, high = found.interval(0.95)
        hits += bool(low[0, 0] <= truth <= high[0, 0])
    assert stats.binomtest(hits, 200, 0.95).pvalue > 0.01


def test_common_random_numbers_are_the_hessian_of_one_function() -> None:
    """With the same seed the estimate is exactly the derivative of its own gradient."""
    options = {"how": "monte_carlo", "estimator": "pathwise", "samples": 30, "seed": 3}
    step = 1e-5
    here = expected(cube, options, mu=MU, rho=RHO)
    high = expected(cube, options, mu=MU + step, rho=RHO).gradient
    low = expected(cube, options, mu=MU - step, rho=RHO).gradient
    np.testing.assert_allclose((high - low) / (2 * step), here.matrix[0], rtol=1e-7)
    assert np.array_equal(here.matrix, expected(cube, options, mu=MU, rho=RHO).matrix)


def test_rows_have_their_own_draws() -> None:
    """Costs of one entry per row use that row's log-probability alone: the same mean, less variance."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(-1, 1)

    def rows(m: Any, x: Tensor, draw: Any) -> Tensor:
        return (draw("z", Bernoulli(logits=m(x).squeeze(1))) - 0.3) ** 2 * 5

    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(0.2)
    options: dict[str, Any] = {"how": "monte_carlo", "samples": 300}
    apart = disthess.expected_hessian(model, rows, [x], **options)
    joint = disthess.expected_hessian(model, lambda m, b, d: rows(m, b, d).sum(), [x], **options)
    assert apart.standard_error[0, 0] < 0.6 * joint.standard_error[0, 0]
    exact = sum(disthess.expected_hessian(model, rows, [row.reshape(1, 1)]).matrix for row in x)
    assert (np.abs(apart.matrix - exact) <= 4 * apart.standard_error).all()
    whole = disthess.expected_hessian(model, rows, [row.reshape(1, 1) for row in x])
    np.testing.assert_allclose(whole.matrix, exact, atol=1e-12)


@pytest.mark.slow
def test_other_distributions() -> None:
    uniform = expected(lambda m, b, draw: draw("u", Uniform(0.0 * m.a, m.a)) ** 4, a=2.0)
    assert uniform.matrix[0, 0] == pytest.approx(12 * 4 / 5, rel=1e-12)
    waiting = expected(lambda m, b, draw: draw("t", Exponential(m.rate)) ** 2, rate=1.5)
    assert waiting.matrix[0, 0] == pytest.approx(12 / 1.5**4, rel=1e-10)
    pair = expected(lambda m, b, draw: draw("z", Independent(Normal(m.mu, 1.0), 1)).prod(), mu=[0.5, 2.0])
    np.testing.assert_allclose(pair.matrix, [[0, 1], [1, 0]], atol=1e-12)
    # No rule: Monte Carlo by itself, through rsample or log_prob.
    gamma = expected(lambda m, b, draw: draw("g", Gamma(m.a, 1.0)), {"estimator": "score", "samples": 1500}, a=2.0)
    assert gamma.how == "monte_carlo"
    assert abs(gamma.matrix[0, 0]) <= 4 * gamma.standard_error[0, 0]


def test_refusals() -> None:
    with pytest.raises(ProblemError, match="no exact expectation here: its support is not finite"):
        expected(lambda m, b, draw: draw("x", Beta(m.a, 2.0)), {"how": "exact"}, a=2.0)
    with pytest.raises(ProblemError, match="draws 'z' twice"):
        expected(lambda m, b, draw: draw("z", normal(m)) * draw("z", normal(m)), mu=0.0, rho=0.0)
    with pytest.raises(ProblemError, match="max_points allows 10"):
        expected(
            lambda m, b, draw: draw("z", Bernoulli(logits=m.a)).sum(), {"how": "exact", "max_points": 10}, a=[0.0] * 5
        )
    with pytest.raises(ProblemError, match="names the draw 'y', which was not made"):
        expected(lambda m, b, draw: [(draw("z", Bernoulli(logits=m.a)), ("y",))], {"how": "monte_carlo"}, a=0.0)
    with pytest.raises(ConfigError, match="how must be"):
        expected(cube, {"how": "quickly"}, mu=0.0, rho=0.0)


def the(function: Any) -> Any:
    """An objective of one normal draw around theta."""
    return lambda m, _, draw: function(draw("z", Normal(m.theta, 1.0)))


HIDDEN: dict[str, Any] = {
    "indicator": lambda z: (z > 0).double(),
    "mask": lambda z: (z > 0).double() * z,
    "branch": lambda z: z if z > 0 else 0 * z,
    "floor": torch.floor,
    "whole": lambda z: z.long().double(),
    "one norm": lambda z: z.reshape(1).norm(p=1),
    "norm of one": lambda z: z.reshape(1).norm(),
    "root of a square": lambda z: (z**2).sqrt(),
    "squared clamp": lambda z: z.clamp(-1, 1) ** 2,
    "where": lambda z: torch.where(z > 0, z, 0 * z),
    "in place": lambda z: torch.relu_(z.clone()),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_kinks_and_jumps_are_refused(name: str) -> None:
    with pytest.raises(ProblemError, match="kinks in the draw 'z'"):
        expected(the(HIDDEN[name]), {"how": "monte_carlo", "estimator": "pathwise", "samples": 2}, theta=0.5)
    with pytest.raises(ProblemError, match="kinks in the draw 'z'"):
        expected(the(HIDDEN[name]), {"how": "exact"}, theta=0.5)
    assert expected(the(HIDDEN[name]), {"samples": 2}, theta=0.5).ways == {"z": "score"}


SMOOTH_ENOUGH: dict[str, Any] = {
    "squared relu": lambda z: torch.relu(z) ** 2,
    "huber": lambda z: nn.functional.huber_loss(z, torch.zeros_like(z)),
    "elu": nn.functional.elu,
    "norm of two": lambda z: torch.stack([z, 1 + z]).norm(),
    "probability": lambda z: Bernoulli(probs=torch.sigmoid(z)).log_prob(torch.ones_like(z)),
}


@pytest.mark.parametrize("name", SMOOTH_ENOUGH)
def test_smooth_losses_are_pathwise(name: str) -> None:
    assert expected(the(SMOOTH_ENOUGH[name]), {"how": "monte_carlo", "samples": 2}, theta=0.5).ways == {"z": "pathwise"}


def test_a_value_jump_has_its_closed_form() -> None:
    """E 1(theta + xi > 0) = Phi(theta), whose second derivative is -theta phi(theta)."""
    found = expected(the(HIDDEN["indicator"]), {"samples": 600}, theta=0.5)
    assert abs(found.matrix[0, 0] + 0.5 * phi(0.5)) <= 4 * found.standard_error[0, 0]


def test_kinks_that_no_estimator_sees_are_refused() -> None:
    """Noise that is shifted by hand, a density with a kink, and a range that moves: each would be off without a sign of it."""
    by_hand = lambda m, _, draw: torch.relu(m.theta + draw("e", Normal(0.0, 1.0)))  # noqa: E731
    for how in ("auto", "exact", "monte_carlo"):
        with pytest.raises(ProblemError, match=r"'e' \(relu\) that move with the parameters other than"):
            expected(by_hand, {"how": how, "samples": 2}, theta=0.5)
    with pytest.raises(ProblemError, match=r"'z' \(abs\) that move"):
        expected(lambda m, _, d: d("z", Laplace(m.theta, 1.0)) ** 2, {"estimator": "score", "samples": 2}, theta=0.3)
    with pytest.raises(ProblemError, match="the range of the draw 'z' from Pareto"):
        expected(lambda m, _, d: d("z", Pareto(m.theta, 3.0)), {"estimator": "score", "samples": 2}, theta=1.2)
    options = {"how": "monte_carlo", "samples": 2}
    fixed = expected(lambda m, _, d: torch.relu(d("e", Normal(0.0, 1.0))) * m.theta**2, options, theta=0.5)
    assert fixed.ways == {"e": "pathwise"}  # a kink that stays where it is


def test_draws_without_second_derivatives_go_to_the_score_function() -> None:
    """torch's beta and Dirichlet give a diagonal Hessian that is wrong, without an error; gamma's shape gives one."""
    for distribution in (lambda m: Beta(m.a, m.b), lambda m: Gamma(m.a, m.b)):
        objective = lambda m, _, draw, made=distribution: draw("z", made(m)) ** 2  # noqa: E731
        assert expected(objective, {"samples": 2}, a=1.3, b=1.1).ways == {"z": "score"}
        with pytest.raises(ProblemError, match="no second derivative of the reparametrised draw 'z'"):
            expected(objective, {"how": "monte_carlo", "estimator": "pathwise", "samples": 2}, a=1.3, b=1.1)


def test_even_odds_of_a_binomial() -> None:
    """E z^2 = n p (1 - p) + n^2 p^2; torch's own log-probability has a hidden kink at logits 0."""
    found = expected(lambda m, _, draw: draw("z", Binomial(4, probs=m.p)) ** 2, p=0.5)
    assert found.matrix[0, 0] == pytest.approx(24.0, abs=1e-12)
    again = expected(lambda m, _, draw: draw("z", Independent(Binomial(4, logits=m.a), 1)).sum() ** 2, a=[0.0])
    assert again.matrix[0, 0] == pytest.approx(1.5, abs=1e-12)


def test_rules_for_vectors_and_transforms_and_points_that_double() -> None:
    def vector(m: Any, _: Any, draw: Any) -> Tensor:
        z = draw("z", MultivariateNormal(m.mu, torch.tensor([[1.0, 0.3], [0.3, 1.0]], dtype=torch.float64)))
        return z[0] ** 2 * z[1]  # (a^2 + 1) b + 0.6 a

    np.testing.assert_allclose(expected(vector, mu=[0.3, 0.4]).matrix, [[0.8, 0.6], [0.6, 0.0]], atol=1e-12)
    moved = expected(
        lambda m, _, d: d("z", TransformedDistribution(Normal(m.mu, 0.5), [AffineTransform(1.0, 2.0)])) ** 3, mu=0.3
    )
    assert moved.matrix[0, 0] == pytest.approx(24 * 1.6, rel=1e-12)
    wave = expected(the(lambda z: torch.sin(3 * z)), theta=0.3)
    assert wave.matrix[0, 0] == pytest.approx(-9 * math.sin(0.9) * math.exp(-4.5), rel=1e-10)
    assert (wave.count, expected(the(lambda z: torch.sin(3 * z)), {"points": 8}, theta=0.3).count) == (32, 8)


def test_ancestors_are_added_and_rows_are_proved() -> None:
    """Costs that do not name what they depend on, and costs whose entries are no rows of the draws, have the same estimate."""

    def chain(*names: tuple[str, ...]) -> Any:
        def objective(m: Any, _: Any, draw: Any) -> list[Any]:
            b = draw("b", Bernoulli(logits=m.theta))
            z = draw("z", Normal(m.mu * (1 + b), 0.5))
            return [(b * m.mu, names[0]), (z**2, names[1])]

        return objective

    options: dict[str, Any] = {"how": "monte_carlo", "samples": 20}
    full = expected(chain(("b",), ("b", "z")), options, theta=0.3, mu=0.8)
    assert np.array_equal(expected(chain((), ("z",)), options, theta=0.3, mu=0.8).matrix, full.matrix)
    mixing = torch.tensor([[1.0, 2, 3], [0, 1, 1], [2, 0, 1]], dtype=torch.float64)
    logits = [0.2, -0.3, 0.5]

    def costs(m: Any, _: Any, draw: Any) -> Tensor:
        return (mixing @ draw("z", Bernoulli(logits=m.logits))) ** 2

    apart = expected(costs, options, logits=logits)
    joint = expected(lambda m, b, draw: costs(m, b, draw).sum(), options, logits=logits)
    np.testing.assert_allclose(apart.matrix, joint.matrix, atol=1e-12)
