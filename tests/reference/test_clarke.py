"""Hessians at kinks: worked examples with closed forms, and limits of autograd's Hessian from random directions as the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disthess
from disthess.errors import ConfigError, ProblemError
from disthess.linalg.minnorm import min_norm_weights

relu = torch.relu


class Scalars(nn.Module):
    """Parameters that are numbers."""

    def __init__(self, **values: float) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))


def scalar_problem(function: Callable[[Scalars], Tensor], **values: float) -> disthess.Problem:
    return disthess.Problem(
        Scalars(**values), objective=lambda m, x: function(m) + 0 * x.sum(), batches=[torch.zeros(1).double()]
    )


def pair(m: Scalars) -> Tensor:
    return torch.stack([m.a, m.b])


WORKED = {
    # function, point, the set, the least-norm element, distance of torch's own from the set
    "E1": (lambda m: -0.5 * m.a**2 + 0.5 * relu(m.a + m.b) ** 2, {"a": 0.0, "b": 0.0},
           [[[-1, 0], [0, 0]], [[0, 1], [1, 1]]], [[-0.75, 0.25], [0.25, 0.25]], 0.0),
    "E2": (lambda m: 0.5 * (relu(m.w) - relu(-m.w) - 1) ** 2, {"w": 0.0}, [[[1]], [[1]]], [[1]], 1.0),
    "E3": (lambda m: 0.5 * (m.u * m.w.abs() - 1) ** 2, {"u": 2.0, "w": 0.0},
           [[[0, -1], [-1, 4]], [[0, 1], [1, 4]]], [[0, 0], [0, 4]], 4.0),
    "E4 maximum": (lambda m: 0.5 * torch.maximum(m.a, m.b) ** 2, {"a": 1.0, "b": 1.0},
                   [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], [[0.5, 0], [0, 0.5]], 0.5),
    "E4 max dim": (lambda m: 0.5 * pair(m).max(0).values ** 2, {"a": 1.0, "b": 1.0},
                   [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], [[0.5, 0], [0, 0.5]], 0.0),
    "E4 amax": (lambda m: 0.5 * pair(m).amax() ** 2, {"a": 1.0, "b": 1.0},
                [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], [[0.5, 0], [0, 0.5]], 0.5),
    "E4 pool": (lambda m: 0.5 * F.max_pool1d(pair(m).reshape(1, 1, 2), 2).sum() ** 2, {"a": 1.0, "b": 1.0},
                [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], [[0.5, 0], [0, 0.5]], 0.0),
    "E4 sort": (lambda m: 0.5 * pair(m).sort().values[1] ** 2, {"a": 1.0, "b": 1.0},
                [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], [[0.5, 0], [0, 0.5]], 0.0),
    "E5 relu": (lambda m: relu(1 - m.a * m.b), {"a": 1.0, "b": 1.0},
                [[[0, 0], [0, 0]], [[0, -1], [-1, 0]]], [[0, 0], [0, 0]], 0.0),
    "E5 clamp": (lambda m: (1 - m.a * m.b).clamp(min=0), {"a": 1.0, "b": 1.0},
                 [[[0, 0], [0, 0]], [[0, -1], [-1, 0]]], [[0, 0], [0, 0]], 0.0),
    "E6": (lambda m: 0.5 * (m.u * F.leaky_relu(m.w, -0.5) - 1) ** 2, {"u": 2.0, "w": 0.0},
           [[[0, 0.5], [0.5, 1]], [[0, -1], [-1, 4]]], [[0, 0.5], [0.5, 1]], 0.0),
    "minimum": (lambda m: 0.5 * torch.minimum(m.a, 3 * m.b) ** 2, {"a": 3.0, "b": 1.0},
                [[[1, 0], [0, 0]], [[0, 0], [0, 9]]], [[81 / 82, 0], [0, 9 / 82]], None),
    "where": (lambda m: torch.where(m.a > m.b, m.a**2, m.a * m.b), {"a": 1.0, "b": 1.0},
              [[[2, 0], [0, 0]], [[0, 1], [1, 0]]], None, 0.0),
    "hardtanh": (lambda m: F.hardtanh(m.a) * m.b + m.b**2, {"a": 1.0, "b": 2.0},
                 [[[0, 1], [1, 2]], [[0, 0], [0, 2]]], [[0, 0], [0, 2]], 0.0),
    "celu": (lambda m: F.celu(m.a, 2.0), {"a": 0.0}, [[[0.5]], [[0]]], [[0]], 0.0),
    "median": (lambda m: torch.stack([m.a, m.b, 5 * m.b]).median() ** 2, {"a": 5.0, "b": 1.0},
               [[[2, 0], [0, 0]], [[0, 0], [0, 50]]], None, None),
    "sign": (lambda m: 0.5 * (m.a * torch.sign(m.a) * m.b - 1) ** 2, {"a": 0.0, "b": 2.0},
             [[[4, -1], [-1, 0]], [[4, 1], [1, 0]]], [[4, 0], [0, 0]], None),
    "equal": (lambda m: torch.where(m.a == m.b, m.a, m.a * m.b), {"a": 1.0, "b": 1.0},
              [[[0, 1], [1, 0]]], [[0, 1], [1, 0]], 2**0.5),
    "max of two": (lambda m: 0.5 * torch.max(m.a, m.b) ** 2, {"a": 1.0, "b": 1.0},
                   [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], [[0.5, 0], [0, 0.5]], 0.5),
    "clamp_min of two": (lambda m: 0.5 * torch.clamp_min(m.a, m.b) ** 2, {"a": 1.0, "b": 1.0},
                         [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], [[0.5, 0], [0, 0.5]], None),
    "clamp_max of two": (lambda m: 0.5 * torch.clamp_max(m.a, m.b) ** 2, {"a": 1.0, "b": 1.0},
                         [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], [[0.5, 0], [0, 0.5]], None),
    "infinite norm": (lambda m: 0.5 * torch.linalg.vector_norm(pair(m), float("inf")) ** 2, {"a": 1.0, "b": -1.0},
                      [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], [[0.5, 0], [0, 0.5]], None),
    "aminmax": (lambda m: 0.5 * torch.aminmax(pair(m)).min ** 2, {"a": 1.0, "b": 1.0},
                [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], [[0.5, 0], [0, 0.5]], None),
    "minus infinity": (lambda m: torch.stack([m.a, 3 * m.b, m.a - math.inf]).amax() ** 2, {"a": 2.0, "b": 1.0},
                       [[[0, 0], [0, 18]]], [[0, 0], [0, 18]], None),
    "convex and flat": (lambda m: relu(m.a**2) * m.b, {"a": 0.0, "b": 1.0}, [[[2, 0], [0, 0]]], [[2, 0], [0, 0]], 2.0),
    "no tie": (lambda m: relu(m.a) ** 2 * m.b, {"a": 1.0, "b": 2.0}, [[[4, 2], [2, 0]]], [[4, 2], [2, 0]], 0.0),
}  # fmt: skip


def same_sets(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-9) -> bool:
    near = np.abs(found[:, None] - wanted[None]).max(axis=(2, 3)) <= tolerance
    return bool(near.any(0).all() and near.any(1).all())


@pytest.mark.parametrize("name", WORKED)
def test_worked_examples(name: str) -> None:
    function, point, members, least, distance = WORKED[name]
    found = disthess.clarke_hessian(scalar_problem(function, **point))
    wanted = np.array(members, dtype=float)
    assert same_sets(found.hessians, wanted)
    assert len(found.patterns) == len(wanted)
    if least is not None:
        np.testing.assert_allclose(found.matrix, least, atol=1e-9)
    if distance is not None:
        assert found.torch_distance == pytest.approx(distance, abs=1e-8)
    np.testing.assert_allclose(np.tensordot(found.weights, found.hessians, 1), found.matrix, atol=1e-12)
    # Least norm: no corner makes an angle of more than 90 degrees with it (the projection's own condition).
    products = found.hessians.reshape(len(wanted), -1) @ found.matrix.ravel()
    assert (products >= (found.matrix**2).sum() - 1e-9).all()


BLOCKWISE = {
    # Definition 6 as printed, which minimises every block by itself: what it gives, and how far that lies from the set
    "E1": ([[0, 0], [0, 0]], 0.866),
    "E2": ([[1]], 0.0),
    "E3": ([[0, 0], [0, 4]], 0.0),
    "E4 maximum": ([[0, 0], [0, 0]], 0.707),
    "E5 relu": ([[0, 0], [0, 0]], 0.0),
    "E6": ([[0, 0], [0, 1]], 0.577),
}


@pytest.mark.parametrize("name", BLOCKWISE)
def test_minimising_block_by_block_can_leave_the_set(name: str) -> None:
    function, point, *_ = WORKED[name]
    found = disthess.clarke_hessian(scalar_problem(function, **point))
    size = found.matrix.shape[0]
    blockwise = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            entries = found.hessians[:, i, j]
            blockwise[i, j] = min_norm_weights(np.outer(entries, entries)) @ entries
    wanted, distance = BLOCKWISE[name]
    np.testing.assert_allclose(blockwise, wanted, atol=1e-9)
    apart = (found.hessians - blockwise).reshape(len(found.hessians), -1)
    nearest = np.linalg.norm(min_norm_weights(apart @ apart.T) @ apart)
    assert nearest == pytest.approx(distance, abs=5e-4)
    # One joint combination is no smaller, and is in the set.
    assert np.linalg.norm(found.matrix) >= np.linalg.norm(blockwise) - 1e-12


def test_the_hinge_of_a_triplet_loss_is_seen() -> None:
    """Margin 1, and the negative further away by exactly 1 (torch adds 1e-6 to every difference)."""
    tiny, base = 1e-6, torch.zeros(1, 3).double()
    far = torch.tensor([[1 + tiny * math.sqrt(3) + tiny, tiny, tiny]], dtype=torch.float64)

    def loss(m: Scalars, negative: Tensor) -> Tensor:
        return F.triplet_margin_loss(base + m.a, base, negative, margin=1.0)

    problem = disthess.Problem(Scalars(a=0.0), objective=loss, batches=[far])
    found = disthess.clarke_hessian(problem, tol=1e-8)
    assert len(found.units) == 1
    assert found.grad_jump > 0


def test_a_model_in_float32_has_the_tolerance_of_float32() -> None:
    """3 * 0.1 - 0.3 is no 0 there (beside another sample's -0.2): the tie is seen all the same."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, -0.3]]))
    batch = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    problem = disthess.Problem(model, objective=lambda m, x: relu(m(x)).square().sum(), batches=[batch])
    assert len(disthess.clarke_hessian(problem).units) == 1
    assert len(disthess.clarke_hessian(problem, tol=1e-12).units) == 0


def test_what_is_said_of_the_set() -> None:
    once = disthess.clarke_hessian(scalar_problem(WORKED["E1"][0], a=0.0, b=0.0))
    assert (once.label, once.grad_jump, once.first_order) == ("clarke", 0.0, False)
    assert once.spread() == pytest.approx(2.0)
    assert once.spread("a", "b") == pytest.approx(1.0)
    assert "2 of 2 patterns" in once.describe()
    two = disthess.clarke_hessian(scalar_problem(WORKED["E2"][0], w=0.0))
    assert (two.possible, len(two.patterns), two.stationarity) == (4, 2, pytest.approx(1.0))
    three = disthess.clarke_hessian(scalar_problem(WORKED["E3"][0], u=2.0, w=0.0))
    assert three.label == "piecewise"
    assert three.grad_jump == pytest.approx(4.0)
    assert three.stationarity == pytest.approx(0.0, abs=1e-12)
    smooth = disthess.clarke_hessian(scalar_problem(lambda m: m.a**3, a=1.0))
    assert (smooth.label, smooth.possible, smooth.spread()) == ("smooth", 1, 0.0)
    product = disthess.clarke_hessian(scalar_problem(lambda m: m.a.abs() * m.b.abs(), a=0.0, b=0.0))
    assert (product.grad_jump, product.label) == (0.0, "piecewise")


def test_an_objective_that_jumps_is_said_to() -> None:
    found = disthess.clarke_hessian(scalar_problem(lambda m: F.hardshrink(m.a) ** 2, a=0.5))
    assert found.label == "discontinuous"
    assert found.value_jump == pytest.approx(0.25)
    assert same_sets(found.hessians, np.array([[[0.0]], [[2.0]]]))
    assert found.grad_jump == pytest.approx(1.0)
    assert disthess.clarke_hessian(scalar_problem(lambda m: torch.floor(m.a) * m.a, a=2.0)).value_jump == pytest.approx(
        2.0
    )
    assert disthess.clarke_hessian(scalar_problem(lambda m: relu(m.a), a=0.0)).value_jump == 0.0


def test_only_places_that_are_read_are_tied() -> None:
    """A median of 1, 1, 2, 3, 4 does not see that two entries are equal; one of 0, 3, 3, 3, 4 does."""

    def median(m: Scalars) -> Tensor:
        return torch.stack([m.a, m.b, 2 + m.a, 3 + m.a, 4 + m.a]).median() ** 2

    assert disthess.clarke_hessian(scalar_problem(median, a=1.0, b=1.0)).label == "smooth"
    assert disthess.clarke_hessian(scalar_problem(median, a=1.0, b=3.0)).units


def test_ties_behind_products_of_relus() -> None:
    """max(relu(a) relu(b), 0) at 0 comes apart in one quadrant of directions only."""
    found = disthess.clarke_hessian(
        scalar_problem(lambda m: torch.maximum(relu(m.a) * relu(m.b), 0 * m.a), a=0.0, b=0.0)
    )
    assert same_sets(found.hessians, np.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]))
    assert found.first_order


def test_elements() -> None:
    problem = scalar_problem(lambda m: 0.5 * m.x * m.x.abs(), x=0.0)
    assert disthess.clarke_hessian(problem).matrix.item() == pytest.approx(0.0, abs=1e-12)
    assert abs(disthess.clarke_hessian(problem, element="b").matrix.item()) == pytest.approx(1.0)
    kinked = scalar_problem(WORKED["E3"][0], u=2.0, w=0.0)
    np.testing.assert_allclose(disthess.clarke_hessian(kinked, element="torch").matrix, 0.0)
    with pytest.raises(ConfigError, match="element must be one of min_norm, b, torch"):
        disthess.clarke_hessian(problem, element="best")  # type: ignore[arg-type]


def test_a_cusp_is_said_to_be_possible() -> None:
    """relu(a) relu(b^2 - a): to first order both cannot be positive, and yet they are for a small against b^2."""
    found = disthess.clarke_hessian(scalar_problem(lambda m: relu(m.a) * relu(m.b**2 - m.a) + m.a**2, a=0.0, b=0.0))
    assert found.first_order


class Net(nn.Module):
    def __init__(self, seed: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.fc2 = nn.Linear(2, 3, bias=bias).double(), nn.Linear(3, 2).double()
        self.fc3 = nn.Linear(2, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(relu(self.fc2(relu(self.fc1(x)))))


def tied_net(seed: int, bias: bool) -> disthess.Problem:
    """A first-layer unit tied on x, -x and 2x, and a second-layer unit tied on the fourth sample."""
    model = Net(seed, bias)
    x = torch.tensor([[0.5, -0.25], [-0.5, 0.25], [1.0, -0.5], [0.3, 0.9]], dtype=torch.float64)
    with torch.no_grad():
        if bias:
            model.fc1.bias[0] = 0.0
        # Orthogonal to the first three samples, in numbers that do not round: eager torch sits on the kink itself.
        model.fc1.weight[0] = torch.tensor([0.25, 0.5], dtype=torch.float64) * (seed + 1)
        model.fc2.bias[0] += 3.0  # open for every sample, so that the first layer's ties matter
        hidden = relu(model.fc1(x))
        model.fc2.bias[1] -= model.fc2(hidden)[3, 1]
    y = torch.tensor([[0.5], [-1.0], [0.3], [0.8]], dtype=torch.float64)
    return disthess.Problem(model, loss="mse", batches=[(x, y)])


def limits(problem: disthess.Problem, tries: int, step: float) -> list[np.ndarray]:
    """Autograd's Hessians a little off the point, in random directions."""
    generator = torch.Generator().manual_seed(5)
    found: list[np.ndarray] = []
    start = [p.detach().clone() for p in problem.model.parameters()]
    for _ in range(tries):
        with torch.no_grad():
            for tensor, base in zip(problem.model.parameters(), start, strict=True):
                tensor.copy_(base + step * torch.randn(base.shape, generator=generator, dtype=torch.float64))
        here = disthess.reference_hessian(problem)
        if not any(np.abs(here - old).max() < 100 * step for old in found):
            found.append(here)
    with torch.no_grad():
        for tensor, base in zip(problem.model.parameters(), start, strict=True):
            tensor.copy_(base)
    return found


@pytest.mark.parametrize(("bias", "patterns"), [(False, 4), (True, 12)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_every_limit_is_found_and_nothing_else(seed: int, bias: bool, patterns: int) -> None:
    """Without a bias the three samples' signs go together (2 of 8), with one 6 of 8; the second layer's tie is free."""
    problem = tied_net(seed, bias)
    found = disthess.clarke_hessian(problem)
    assert found.possible == 16
    assert len(found.patterns) == patterns
    assert not found.first_order
    seen = limits(problem, 120, 1e-6)
    assert same_sets(found.hessians, np.stack(seen), 3e-4)
    # Torch takes 'all off', which no direction realises while x and -x are tied without a bias.
    assert (found.torch_distance > 1e-3) == (not bias)
    # The least norm is no larger than that of any convex combination.
    generator = np.random.default_rng(0)
    for mix in generator.dirichlet(np.ones(patterns), 50):
        assert np.linalg.norm(found.matrix) <= np.linalg.norm(np.tensordot(mix, found.hessians, 1)) + 1e-12


def test_pooling_that_overlaps_and_several_batches() -> None:
    """A window's winner competes in another window too; ties of two batches make one joint pattern."""
    torch.manual_seed(0)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 1.0, 0.5, 0.2], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool1d((x * self.w).unsqueeze(1), 3, stride=1, padding=1).squeeze(1)

    batches = [(torch.ones(1, 4).double(), torch.zeros(1, 4).double()), (2 * torch.ones(1, 4).double(),) * 2]
    problem = disthess.Problem(Pooled(), loss="mse", batches=batches)
    found = disthess.clarke_hessian(problem)
    assert len(found.patterns) == 2
    assert same_sets(found.hessians, np.stack(limits(problem, 20, 1e-7)), 1e-4)


def test_ties_that_never_come_apart_are_none() -> None:
    """Pooling over what a relu has cut off ties zeros with zeros, whatever the parameters are."""
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU(), nn.MaxPool1d(2)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.1)
    x = torch.tensor([[[-1.0, -2.0, 1.0, 2.0]]], dtype=torch.float64)
    found = disthess.clarke_hessian(disthess.Problem(model, objective=lambda m, x: m(x).square().sum(), batches=[x]))
    assert found.label == "smooth"


def test_over_the_cap_says_how_many() -> None:
    model = nn.Linear(8, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    problem = disthess.Problem(model, objective=lambda m, x: relu(m(x)).sum(), batches=[torch.eye(8).double()])
    with pytest.raises(ProblemError, match=r"at least 32 can be realised .* of at most 256 over all 8 ties"):
        disthess.clarke_hessian(problem, max_patterns=20)
    assert len(disthess.clarke_hessian(problem).patterns) == 256


def test_a_norm_of_zero_is_refused() -> None:
    problem = scalar_problem(lambda m: pair(m).norm() * relu(m.a), a=0.0, b=0.0)
    with pytest.raises(ProblemError, match="not piecewise smooth"):
        disthess.clarke_hessian(problem)


def test_a_subset_of_parameters() -> None:
    found = disthess.clarke_hessian(scalar_problem(WORKED["E3"][0], u=2.0, w=0.0), parameters="w")
    assert found.names == ("w",)
    np.testing.assert_allclose(found.hessians, 4.0)
