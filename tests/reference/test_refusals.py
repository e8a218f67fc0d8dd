"""Bad input gets a clear sentence that names the trouble, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import disthess
from disthess.errors import ConfigError, DisthessError, PlanError, ProblemError, StoreError, UnknownNameError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, generator=g, dtype=torch.float64), torch.randn(5, 2, generator=g, dtype=torch.float64)


def mse(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().mean()


def nan_weight() -> disthess.Problem:
    net = model()
    with torch.no_grad():
        net[0].weight[1, 2] = float("nan")
    return disthess.Problem(net, loss="mse", batches=[batch()])


def nan_batch() -> disthess.Problem:
    x, y = batch()
    x[2, 1] = float("inf")
    return disthess.Problem(model(), loss="mse", batches=[(x, y)])


def not_scalar() -> disthess.Problem:
    return disthess.Problem(model(), loss=lambda outputs, targets: (outputs - targets).square(), batches=[batch()])


def independent_of_parameters() -> disthess.Problem:
    return disthess.Problem(model(), loss=lambda outputs, targets: targets.square().sum(), batches=[batch()])


def detached() -> disthess.Problem:
    return disthess.Problem(model(), loss=lambda outputs, targets: mse(outputs.detach(), targets), batches=[batch()])


def random_answers() -> disthess.Problem:
    net = nn.Sequential(model(), nn.Dropout(0.5))
    return disthess.Problem(net.train(), loss="mse", batches=[batch()])


def complex_parameter() -> disthess.Problem:
    net = model()
    net.extra = nn.Parameter(torch.zeros(2, dtype=torch.complex128))
    return disthess.Problem(net, loss="mse", batches=[batch()])


def half_parameter() -> disthess.Problem:
    x, y = batch()
    return disthess.Problem(model().half(), loss="mse", batches=[(x.half(), y.half())])


def integer_parameter() -> disthess.Problem:
    net = model()
    net.extra = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    return disthess.Problem(net, loss="mse", batches=[batch()])


def empty_batch() -> disthess.Problem:
    return disthess.Problem(model(), loss="mse", batches=[(torch.zeros(0, 3).double(), torch.zeros(0, 2).double())])


def no_width() -> disthess.Problem:
    net = model()
    net[0].weight = nn.Parameter(torch.zeros(0, 3).double())
    return disthess.Problem(net, loss="mse", batches=[batch()])


def frozen() -> disthess.Problem:
    return disthess.Problem(model().requires_grad_(False), loss="mse", batches=[batch()])


def wrong_shape() -> disthess.Problem:
    return disthess.Problem(model(), loss="mse", batches=[(torch.zeros(5, 7).double(), torch.zeros(5, 2).double())])


BAD = [
    (nan_weight, "parameter 0.weight holds 1 NaN"),
    (nan_batch, "index [2, 1]"),
    (not_scalar, "must be a scalar"),
    (independent_of_parameters, "does not depend on any"),
    (detached, "does not depend on any"),
    (random_answers, "differently from call to call"),
    (complex_parameter, "extra is complex"),
    (half_parameter, "dtype='float32'"),
    (integer_parameter, "extra is torch.int64"),
    (empty_batch, "0 samples"),
    (no_width, "parameter 0.weight has no entries"),
    (frozen, "no parameter that requires a gradient"),
    (wrong_shape, "failed on batch 0"),
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[make.__name__ for make, _ in BAD])
def test_a_bad_problem_is_refused_by_name(make: Callable[[], disthess.Problem], words: str, tmp_path: Path) -> None:
    with pytest.raises(ProblemError) as caught:
        disthess.compute(make(), tmp_path / "run.zarr", progress=False)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": ("hesian",)}, "parts must be"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"parameters": "0.wieght"}, "0.weight"),
        ({"workers": 2}, "executor='threads', 'processes' or 'ray'"),
        ({"threads": 0}, "positive whole number"),
        ({"colour": "red"}, "unknown option colour"),
        ({"method": "magic"}, "method must be one of"),
    ],
)
def test_a_bad_option_is_refused(options: dict[str, object], words: str, tmp_path: Path) -> None:
    problem = disthess.Problem(model(), loss="mse", batches=[batch()])
    with pytest.raises(ConfigError) as caught:
        disthess.compute(problem, tmp_path / "run.zarr", progress=False, **options)
    assert words in str(caught.value)
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": "msee", "batches": [1]},
        {"batches": [1]},
        {"loss": "mse", "objective": mse, "batches": [1]},
        {"loss": "mse", "batches": []},
        {"loss": "mse", "batches": [torch.zeros(2)]},
        {"loss": "mse", "batches": torch.zeros(2)},
        {"loss": nn.MSELoss, "batches": [1]},
        {"loss": "mse", "batches": [batch()], "reduction": "max"},
        {"loss": "mse", "batches": [batch()], "weights": [1.0, 2.0]},
    ],
)
def test_a_bad_description_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        disthess.Problem(model(), **arguments)


def test_ggn_of_an_objective_without_output_is_refused_with_advice(tmp_path: Path) -> None:
    problem = disthess.Problem(model(), objective=lambda net, b: mse(net(b[0]), b[1]), batches=[batch()])
    with pytest.raises(ConfigError, match="output="):
        disthess.compute(problem, tmp_path / "run.zarr", parts=("ggn",), progress=False)


def test_ggn_of_an_objective_with_a_named_output(tmp_path: Path) -> None:
    net = nn.Sequential(model(), nn.Identity())
    with_output = disthess.Problem(net, objective=lambda m, b: mse(m(b[0]), b[1]), batches=[batch()], output="0")
    plain = disthess.Problem(net, loss=mse, batches=[batch()])
    store = disthess.compute(with_output, tmp_path / "run.zarr", parts=("ggn",), progress=False)
    assert abs(store.dense("ggn") - disthess.reference_hessian(plain, "ggn")).max() < 1e-12


def test_another_problems_store_is_refused_with_what_differs(tmp_path: Path) -> None:
    first = disthess.Problem(model(), loss="mse", batches=[batch()])
    disthess.compute(first, tmp_path / "run.zarr", progress=False)
    net = model()
    with torch.no_grad():
        net[2].bias += 1
    with pytest.raises(StoreError, match=r"2\.bias"):
        disthess.compute(disthess.Problem(net, loss="mse", batches=[batch()]), tmp_path / "run.zarr", progress=False)
    with pytest.raises(StoreError, match="dtype"):
        disthess.compute(first, tmp_path / "run.zarr", dtype="float32", progress=False)


def test_a_directory_that_is_no_store_is_refused_and_kept(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError):
        disthess.compute(disthess.Problem(model(), loss="mse", batches=[batch()]), place, progress=False)
    with pytest.raises(StoreError):
        disthess.open_store(place)
    with pytest.raises(StoreError):
        disthess.open_store(tmp_path / "nothing")
    assert (place / "thesis.txt").read_text() == "precious"


def test_an_unknown_block_offers_near_names(tmp_path: Path) -> None:
    store = disthess.compute(
        disthess.Problem(model(), loss="mse", batches=[batch()]), tmp_path / "r.zarr", progress=False
    )
    with pytest.raises(UnknownNameError, match=r"0\.weight"):
        store.block("0.weigth", "2.bias")


def test_what_does_not_fit_is_refused_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = disthess.Problem(model(), loss="mse", batches=[batch()])
    with pytest.raises(PlanError, match="memory_bytes allows"):
        disthess.compute(problem, tmp_path / "run.zarr", memory_bytes=1000, progress=False)
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.total, 100))
    with pytest.raises(DisthessError, match=r"disk|space|free"):
        disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    assert not (tmp_path / "run.zarr").exists()


def test_plan_writes_nothing_and_knows_the_sizes(tmp_path: Path) -> None:
    problem = disthess.Problem(model(), loss="mse", batches=[batch()])
    made = disthess.plan(problem, path=tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()
    disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    panels = tmp_path / "run.zarr" / "panels"
    chunks = [file for file in panels.rglob("*") if file.is_file() and file.name != "zarr.json"]
    assert sum(file.stat().st_size for file in chunks) <= made.disk_bytes
    assert f"P = {problem.numel}" in made.describe()
    assert made.to_json()["numel"] == problem.numel


def finite_difference_hessian(problem: disthess.Problem) -> np.ndarray:
    from disthess import hvp

    bound = problem.to(torch.float64)
    names = [parameter.name for parameter in bound.parameters()]
    units = torch.eye(bound.numel, dtype=torch.float64)
    return hvp.gradient_difference_products(bound, names, units, 1e-5).numpy()


def one_layer(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2)).double()


class Distances(nn.Module):
    """Distances to learned centres, by the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.centres = nn.Linear(3, 3), nn.Parameter(torch.randn(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(self.a(x), self.centres)


class Spectrum(nn.Module):
    """Complex values on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(self.a(x)).abs()


UNDEFINED_OR_WRONG_IN_TORCH = [
    lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(one_layer(nn.Tanh())[0]), nn.Tanh(), nn.Linear(4, 2)
    ).double(),
    lambda: one_layer(nn.Hardsigmoid()),
    lambda: Distances().double(),
]


@pytest.mark.parametrize("make", UNDEFINED_OR_WRONG_IN_TORCH, ids=["weight_norm", "hardsigmoid", "cdist"])
def test_where_torchs_double_backward_is_wrong_or_missing_the_store_is_right(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    problem = disthess.Problem(make(), loss="mse", batches=[batch()])
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    wanted = finite_difference_hessian(problem)
    assert np.linalg.norm(store.dense() - wanted) <= 1e-7 * np.linalg.norm(wanted)
    assert "differences" in store.certificate().against


def test_complex_values_on_the_way_go_to_autograd(tmp_path: Path) -> None:
    problem = disthess.Problem(Spectrum().double(), loss="mse", batches=[batch()])
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    assert store.attributes["method"] == "autograd"
    wanted = disthess.reference_hessian(problem)
    assert np.linalg.norm(store.dense() - wanted) <= 1e-10 * np.linalg.norm(wanted)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bag((x.abs() * 2).long().clamp(max=4))


def test_an_operation_without_second_derivative_is_refused_with_advice(tmp_path: Path) -> None:
    problem = disthess.Problem(Bag().double(), loss="mse", batches=[batch()])
    with pytest.raises(DisthessError, match="embedding"):
        disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    assert not (tmp_path / "run.zarr").exists()


class RoundsInside(nn.Module):
    """Normalises in float32 whatever the model's dtype, as many language models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).float()
        return self.b((h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype))


def test_a_model_that_casts_to_float32_inside_is_certified_to_that_precision(tmp_path: Path) -> None:
    problem = disthess.Problem(RoundsInside().double(), loss="mse", batches=[batch()])
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    wanted = disthess.reference_hessian(problem)
    assert np.linalg.norm(store.dense() - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert "casts to float32" in store.attributes["method_reason"]
    assert store.certificate().tolerance == 1e-4


def test_training_flags_of_children_stay_as_the_user_set_them() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    model.train()
    model[1].eval()
    problem = disthess.Problem(model, loss="mse", batches=[(torch.randn(4, 3), torch.randn(4, 1))])
    objective = problem.module()
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert objective.training
    batch = problem.batches[0]
    with torch.no_grad():
        assert float(problem.value(batch)) == float(problem.value(batch)), "dropout stays off"
