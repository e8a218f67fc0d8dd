"""The operator against the dense oracle, and what runs on it against dense eigenvalues; refusals. In one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Case, cases
from torch import Tensor, nn

import disthess
from disthess.errors import ConfigError, PlanError, ProblemError, SecondDerivativeError
from disthess.execute import product_job
from disthess.execute.live_bytes import LiveBytes
from disthess.hvp import GradientTape
from disthess.linalg.operator import to_scipy
from disthess.matrixfree import HessianOperator


def mlp(**options: object) -> disthess.Problem:
    """Five batches of unequal size, 83 parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batches = [(torch.randn(4 + i, 6).double(), torch.randint(0, 3, (4 + i,))) for i in range(5)]
    return disthess.Problem(net, loss="cross_entropy", batches=batches, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", cases(("tied_autoencoder", "branch_on_value", "batch_norm_train", "contrastive")))
def test_products_equal_those_of_the_dense_hessian(case: Case) -> None:
    problem = case.make()
    dense = np.asarray(disthess.reference_hessian(problem))
    block = np.random.default_rng(0).standard_normal((len(dense), 9))
    with disthess.operator(problem, executor="serial", threads=1) as operator:
        assert operator.dtype == np.float64
        found = operator.matmat(block)
        assert operator.products == 9
    assert np.abs(found - dense @ block).max() <= 1e-10 * max(1.0, float(np.abs(dense @ block).max()))


def test_weight_decay_and_a_choice_of_parameters_count() -> None:
    problem = mlp(weight_decay={"*.weight": 0.3}, weights=[0.1, 0.5, 2.0, -1.0, 0.7])
    names = [entry.name for entry in problem.parameters()]
    dense = np.asarray(disthess.reference_hessian(problem))
    places = np.concatenate(
        [
            np.full(entry.tensor.numel(), name in ("0.weight", "2.bias"))
            for name, entry in zip(names, problem.parameters())
        ]
    )
    with disthess.operator(problem, executor="serial", threads=1, parameters=["0.weight", "2.bias"]) as operator:
        assert operator.names == ("0.weight", "2.bias")
        np.testing.assert_allclose(operator.matmat(np.eye(51)), dense[np.ix_(places, places)], atol=1e-12)


def test_the_problem_is_copied_and_left_alone() -> None:
    problem = mlp()
    before = [entry.tensor.detach().clone() for entry in problem.parameters()]
    with disthess.operator(problem, executor="serial", threads=1) as operator:
        first = operator.matmat(np.eye(83))
        for entry in problem.parameters():
            entry.tensor.data.zero_()
        assert operator.matmat(np.eye(83)).tobytes() == first.tobytes()
        for entry, value in zip(problem.parameters(), before, strict=True):
            entry.tensor.data.copy_(value)
    np.testing.assert_allclose(first, disthess.reference_hessian(problem), atol=1e-12)


def test_float32_products_are_close_to_the_dense_hessian() -> None:
    problem = mlp()
    dense = np.asarray(disthess.reference_hessian(problem))
    with disthess.operator(problem, executor="serial", threads=1, dtype="float32") as operator:
        found = operator.matmat(np.eye(83))
        assert found.dtype == operator.dtype == np.float32
    assert 0 < np.abs(found - dense).max() <= 1e-6 * np.abs(dense).max()


def test_tapes_that_do_not_fit_are_made_again_with_the_same_bits() -> None:
    problem, block = mlp(), np.random.default_rng(1).standard_normal((83, 20))
    with disthess.operator(problem, executor="serial", threads=1) as operator:
        whole, plan = operator.matmat(block), operator.plan
    assert plan.kept == plan.held == 5
    for held in (1, 3):
        allowed = plan.fixed_bytes + held * plan.tape.held
        with disthess.operator(problem, executor="serial", threads=1, memory_bytes=allowed) as operator:
            assert (operator.plan.kept, operator.plan.held) == (held - 1, held)
            assert operator.plan.worker_bytes <= allowed
            assert f"{held - 1} kept" in operator.describe()
            assert operator.matmat(block).tobytes() == whole.tobytes()
    with pytest.raises(PlanError, match=r"would need up to 369 MB: .* memory_bytes allows 300 MB"):
        disthess.operator(problem, executor="serial", threads=1, memory_bytes=300_000_000)


@pytest.mark.parametrize(
    "kind",
    ["operator", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("hessian operator", "scipy"))],
)
def test_every_question_has_an_error_bar_that_holds(kind: str) -> None:
    problem = mlp(weight_decay=0.05)
    dense = np.asarray(disthess.reference_hessian(problem))
    values = np.linalg.eigvalsh(dense)
    with disthess.operator(problem, executor="serial", threads=1) as operator:
        names = [entry.name for entry in problem.parameters()]
        target = {
            "operator": operator,
            "hessian operator": HessianOperator(problem, names, 83),
            "scipy": to_scipy(operator),
        }[kind]
        ends = disthess.eigenvalues(target, k=3)
        np.testing.assert_allclose(ends.values, values[[0, 1, 2, -3, -2, -1]], atol=1e-10)
        assert ends.converged.all()
        for low, high in ends.intervals:
            assert ((values >= low - 1e-12) & (values <= high + 1e-12)).any()
        total = disthess.trace(target, probes=24)
        assert abs(total.value - values.sum()) <= 5 * total.standard_error
        assert total.converged == (total.standard_error <= total.tolerance * abs(total.value))
        curve = disthess.spectral_density(target, probes=8, steps=5)
        assert np.isclose(np.trapezoid(curve.density, curve.grid), 1)
        assert curve.truncation >= 0
        assert curve.sampling > 0
        low = disthess.low_rank(target, rank=6)
        left = dense - low.vectors @ np.diag(low.values) @ low.vectors.T
        assert np.linalg.norm(left) <= low.frobenius_bound
        assert np.linalg.norm(left, 2) <= low.spectral_bound
        assert abs(low.error - np.linalg.norm(left)) <= 5 * low.standard_error + 1e-12
        right = np.random.default_rng(2).standard_normal(83)
        solved = disthess.solve(target, right, damping=1.0)
        np.testing.assert_allclose(solved.solution, np.linalg.solve(dense + np.eye(83), right), rtol=1e-7)
        assert solved.converged


def test_a_problem_itself_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"disthess\.operator makes one"):
        disthess.eigenvalues(mlp())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"executor": "threads"}, "executor must be one of ray, serial"),
        ({"executor": "serial", "workers": 2}, "computes in one process"),
        ({"workers": 0}, "workers must be a positive whole number"),
        ({"executor": "serial", "threads": -1}, "threads must be"),
        ({"executor": "serial", "memory_bytes": 0.5}, "memory_bytes must be"),
        ({"executor": "serial", "parameters": "1.*"}, "matches no trainable parameter"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        disthess.operator(mlp(), **options)  # type: ignore[arg-type]


def test_a_closed_operator_and_a_wrong_block_are_refused() -> None:
    with disthess.operator(mlp(), executor="serial", threads=1) as operator:
        with pytest.raises(ConfigError, match=r"blocks of 83 rows, got shape \(82, 1\)"):
            operator.matmat(np.ones((82, 1)))
        with pytest.raises(ConfigError, match=r"got shape \(83,\)"):
            operator.matmat(np.ones(83))
    with pytest.raises(ConfigError, match="was closed"):
        operator.matmat(np.ones((83, 1)))


def test_what_has_no_hessian_is_refused() -> None:
    batch = (torch.randn(4, 6), torch.randn(4, 1))
    random = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1)).train()
    with pytest.raises(ProblemError, match="answers differently from call to call"):
        disthess.operator(disthess.Problem(random, loss="mse", batches=[batch]), executor="serial", threads=1)
    nan = (torch.full((4, 6), torch.nan), batch[1])
    with pytest.raises(ProblemError, match="NaN or infinite"):
        disthess.operator(
            disthess.Problem(nn.Linear(6, 1), loss="mse", batches=[batch, nan]), executor="serial", threads=1
        )

    def once(model: nn.Module, inputs: Tensor) -> Tensor:
        return torch.cdist(model(inputs), inputs, p=1.5).sum()

    with pytest.raises(SecondDerivativeError, match="twice"):
        disthess.operator(
            disthess.Problem(nn.Linear(6, 6), objective=once, batches=[batch[0]]), executor="serial", threads=1
        )


def test_a_later_batch_without_a_hessian_is_found_when_it_is_needed() -> None:
    def objective(model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs).log().sum()

    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    problem = disthess.Problem(model, objective=objective, batches=[torch.ones(3, 1), -torch.ones(2, 1)])
    with (
        disthess.operator(problem, executor="serial", threads=1) as operator,
        pytest.raises(ProblemError, match="the objective is nan on batch 1"),
    ):
        operator.matmat(np.ones((1, 1)))


def test_progress_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    with disthess.operator(mlp(), executor="serial", threads=1, progress=told.append) as operator:
        operator.matmat(np.ones((83, 19)))
    assert told == [8, 16, 19]
    monkeypatch.setattr("disthess.execute.product_progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr("disthess.execute.product_progress.ProductLines.__init__.__defaults__", (0.0,))
    with disthess.operator(mlp(), executor="serial", threads=1, progress=True) as operator:
        operator.matmat(np.ones((83, 1)))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("1 products, ")


def test_live_bytes_are_those_of_the_storages_made_inside() -> None:
    outside = torch.zeros(1000)
    with LiveBytes() as live:
        view = outside[:10].view(2, 5)
        one = view + 1
        several = torch.zeros(100, dtype=torch.float64)
        several.add_(1)
        parts = several.split(50)
        assert live.now == 10 * 4 + 800
        del several
        assert live.now == 840, "its parts hold it"
        del parts
        assert live.now == 40
        squared = (one @ one.T).exp()
    assert live.now == 40 + 16
    assert live.most == 840
    del squared


def test_vectors_of_a_large_model_have_the_bits_of_one_alone_and_those_of_a_small_one_are_taken_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batches = [(torch.randn(7, 5).double(), torch.randint(0, 3, (7,))) for _ in range(2)]
    problem = disthess.Problem(model, loss="cross_entropy", batches=batches)
    block = np.random.default_rng(0).standard_normal((problem.numel, 4))
    together: list[int] = []
    products = GradientTape.products

    def counted(tape: GradientTape, vectors: Tensor) -> Tensor:
        together.append(len(vectors))
        return products(tape, vectors)

    monkeypatch.setattr(GradientTape, "products", counted)
    with disthess.operator(problem, executor="serial") as hessian:
        together.clear()
        small = hessian.matmat(block)
        assert set(together) == {4}
        together.clear()
        monkeypatch.setattr(product_job, "BATCHED_NUMEL", problem.numel - 1)
        large = hessian.matmat(block)
        alone = np.concatenate([hessian.matmat(column[:, None]) for column in block.T], axis=1)
    assert not together
    np.testing.assert_array_equal(large, alone)
    np.testing.assert_allclose(large, small, rtol=1e-12, atol=1e-13)
