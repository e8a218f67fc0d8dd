"""Traps of second order in torch, one test each: right to 1e-10 against the dense oracle, or refused with what to do.

Refusals of single bad values (half and complex parameters, NaN, losses that are no scalar, ...) are in test_refusals.py.
"""

from __future__ import annotations

import math
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import disthess
from disthess.errors import CertificateError, DisthessError, ProblemError, StoreError
from disthess.sweep.autograd import gauss_newton_products


def data(columns: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(5, columns, generator=g).double(), torch.randn(5, 2, generator=g).double()


def right(problem: disthess.Problem, path: Path, **options: Any) -> Any:
    store = disthess.compute(problem, path / "run.zarr", progress=False, **options)
    wanted = disthess.reference_hessian(problem, parameters=options.get("parameters"))
    assert np.linalg.norm(store.dense() - wanted) <= 1e-10 * np.linalg.norm(wanted)
    assert store.certificate().passed
    return store


def differences(problem: disthess.Problem) -> np.ndarray:
    from disthess import hvp

    bound = problem.to(torch.float64)
    names = [parameter.name for parameter in bound.parameters()]
    return hvp.gradient_difference_products(bound, names, torch.eye(bound.numel, dtype=torch.float64), 1e-5).numpy()


class Model(nn.Module):
    """Whatever is given, on three parameters of fixed names."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(0.6 * torch.randn(shape)) for shape in shapes])
        self.function = function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weights, x)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_attention_kernels_without_double_backward(tmp_path: Path) -> None:
    def attend(w: Any, x: Tensor) -> Tensor:
        h = x.reshape(5, 1, 3, 1) * w[0]
        return F.scaled_dot_product_attention(h, h * w[1], h + w[1]).mean((1, 2)) @ w[2]

    model = Model(attend, (2,), (2,), (2, 2))
    with torch.nn.attention.sdpa_kernel(
        [torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH]
    ):
        right(disthess.Problem(model, loss="mse", batches=[data()]), tmp_path)


def test_batch_norm_in_training_leaves_running_statistics(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    store = right(disthess.Problem(model, loss="mse", batches=[data()]), tmp_path)
    assert "coupled" in store.attributes["independence"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_dropout_left_on_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double().train()
    with pytest.raises(ProblemError, match=r"eval\(\)"):
        disthess.compute(disthess.Problem(model, loss="mse", batches=[data()]), tmp_path / "run.zarr", progress=False)
    right(disthess.Problem(model.eval(), loss="mse", batches=[data()]), tmp_path)


class Tied(nn.Module):
    """Encoder and decoder are one parameter object under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_tied_weights(tmp_path: Path) -> None:
    store = right(disthess.Problem(Tied().double(), loss="mse", batches=[data()]), tmp_path)
    assert store.parameters[0].aliases == ("second.weight",)
    assert store.numel == 9 + 3 + 3 + 8


def test_tied_weights_after_export_save_and_load(tmp_path: Path) -> None:
    x, y = data()
    torch.export.save(torch.export.export(Tied().double(), (x,)), tmp_path / "tied.pt2")
    loaded = torch.export.load(tmp_path / "tied.pt2").module()
    problem = disthess.Problem(loaded, loss="mse", batches=[(x, y)])
    store = right(problem, tmp_path)
    # Whether the file kept the tie is torch's business; the answer must be that of the model as it was loaded.
    assert store.numel == problem.numel


def test_a_parameter_used_twice_in_one_node(tmp_path: Path) -> None:
    model = Model(lambda w, x: torch.tanh(x @ (w[0] @ w[0] + w[0] * w[0])) @ w[1], (3, 3), (3, 2))
    right(disthess.Problem(model, loss="mse", batches=[data()]), tmp_path)


def test_unused_parameters_have_zero_blocks_and_are_named(tmp_path: Path) -> None:
    model = Model(lambda w, x: torch.tanh(x @ w[0]), (3, 2), (4,))
    problem = disthess.Problem(model, loss="mse", batches=[data()])
    assert "weights.1" in disthess.plan(problem).describe()
    store = right(problem, tmp_path)
    assert not store.block("weights.0", "weights.1").any()


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    store = right(disthess.Problem(model, loss="mse", batches=[data()]), tmp_path)
    assert [parameter.name for parameter in store.parameters] == ["0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(
    "reach",
    [
        lambda w: w.reshape(2, 3).t(),
        lambda w: w.t().contiguous().view(3, 2),
        lambda w: F.normalize(w.reshape(3, 2), dim=0),
        lambda w: (w.reshape(3, 2) - w.mean()) / w.std(),
    ],
    ids=["transpose", "view", "normalise", "standardise"],
)
def test_a_parameter_reached_only_through_another_shape(reach: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    model = Model(lambda w, x: torch.tanh(x @ reach(w[0])), (2, 3))
    right(disthess.Problem(model, loss="mse", batches=[data()]), tmp_path)


def test_in_place_operations(tmp_path: Path) -> None:
    def forward(w: Any, x: Tensor) -> Tensor:
        h = (x @ w[0]).tanh_().clone()
        h.add_(w[1]).mul_(2)
        other = h.clone()
        other[:, 0] = h[:, 1] * w[1]
        return other.sigmoid_()

    right(disthess.Problem(Model(forward, (3, 2), (1,)), loss="mse", batches=[data()]), tmp_path)


@pytest.mark.parametrize("name", ["relu", "abs", "max_pool"])
def test_kinks_hit_exactly_follow_torchs_branch(name: str, tmp_path: Path) -> None:
    kink: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": torch.relu,
        "abs": torch.abs,
        "max_pool": lambda h: F.max_pool1d(h.unsqueeze(1), 2).squeeze(1),
    }
    model = Model(lambda w, x: kink[name](x @ w[0]) @ w[1], (3, 4), (2 if name == "max_pool" else 4, 2))
    with torch.no_grad():
        model.weights[0][:, 1] = model.weights[0][:, 0]
        model.weights[0][:, 2] = 0
    right(disthess.Problem(model, loss="mse", batches=[data()]), tmp_path)


@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss], ids=["mse", "huber"])
def test_losses_without_forward_mode(loss: Any, tmp_path: Path) -> None:
    right(disthess.Problem(mlp(), loss=loss, batches=[data()]), tmp_path, parts=("hessian", "ggn"))


class LastState(nn.Module):
    """torch's LSTM, which would go through mkldnn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.LSTM(1, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.unsqueeze(-1))[1][0][0]


def test_lstm(tmp_path: Path) -> None:
    problem = disthess.Problem(LastState(), loss="mse", batches=[tuple(part.float() for part in data())])
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    wanted = disthess.reference_hessian(problem)
    assert np.linalg.norm(store.dense() - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["hardsigmoid", "cdist"])
def test_operations_whose_double_backward_is_missing_are_right(name: str, tmp_path: Path) -> None:
    function = {
        "hardsigmoid": lambda w, x: F.hardsigmoid(x @ w[0]).square() @ w[1],
        "cdist": lambda w, x: torch.cdist(x @ w[0], w[1]),
    }[name]
    problem = disthess.Problem(Model(function, (3, 2), (2, 2)), loss="mse", batches=[data()])
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    wanted = differences(problem)
    assert np.linalg.norm(store.dense() - wanted) <= 1e-7 * np.linalg.norm(wanted)


def test_embedding_bag_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.EmbeddingBag(5, 2, mode="max")).double()
    batch = (torch.randint(0, 5, (4, 3)), torch.zeros(4, 2).double())
    with pytest.raises(DisthessError, match="embedding") as refusal:
        disthess.compute(disthess.Problem(model, loss="mse", batches=[batch]), tmp_path / "run.zarr", progress=False)
    assert "\n" not in str(refusal.value)


def test_embedding_scaled_by_frequency_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 2, scale_grad_by_freq=True), nn.Tanh()).double()
    batch = (torch.tensor([[0, 0, 1], [2, 2, 2]]), torch.zeros(2, 3, 2).double())
    with pytest.raises(DisthessError, match="scale_grad_by_freq=False"):
        disthess.compute(disthess.Problem(model, loss="mse", batches=[batch]), tmp_path / "run.zarr", progress=False)


def test_the_old_weight_norm_is_refused_with_the_new_one_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.utils.weight_norm(nn.Linear(3, 2)).double()
    with pytest.raises(ProblemError, match="parametrizations"):
        disthess.compute(disthess.Problem(model, loss="mse", batches=[data()]), tmp_path / "run.zarr", progress=False)


@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_weight_norms(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    norms = nn.utils.parametrizations
    model = {"weight": norms.weight_norm, "spectral": norms.spectral_norm}[kind](nn.Linear(3, 2))
    problem = disthess.Problem(nn.Sequential(model, nn.Tanh()).double().eval(), loss="mse", batches=[data()])
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    wanted = differences(problem)
    assert np.linalg.norm(store.dense() - wanted) <= 1e-7 * np.linalg.norm(wanted)


def test_parts_of_a_weight_norm_are_certified_by_differences(tmp_path: Path) -> None:
    """Its double backward is wrong in torch, and with it what autograd says of the residual."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    problem = disthess.Problem(nn.Sequential(layer, nn.Tanh()).double().eval(), loss="mse", batches=[data()])
    parts = ("hessian", "ggn", "residual")
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False, parts=parts)
    wanted = differences(problem) - disthess.reference_hessian(problem, part="ggn")
    assert np.linalg.norm(store.dense("residual") - wanted) <= 1e-6 * np.linalg.norm(wanted)
    against = {part: store.certificate(part).against for part in parts}
    assert {part for part, path in against.items() if "differences" in path} == {"hessian", "residual"}


def test_a_wrong_residual_is_not_certified_by_differences(tmp_path: Path) -> None:
    torch.manual_seed(0)
    problem = disthess.Problem(nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double(), loss="mse", batches=[data()])

    def wrong(*arguments: Any) -> Any:
        return 1.01 * gauss_newton_products(*arguments)

    with (
        mock.patch("disthess.certificate.gauss_newton_products", wrong),
        pytest.raises(CertificateError, match="the stored residual disagrees"),
    ):
        disthess.compute(problem, tmp_path / "run.zarr", progress=False, parts=("hessian", "residual"))


class Inputs(nn.Module):
    """Integers, keywords, several inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 2)

    def forward(self, ids: Tensor, scale: Tensor, flag: bool = True) -> Tensor:
        h = torch.tanh(self.embed(ids).mean(1) * scale)
        return self.head(h) if flag else h


@pytest.mark.parametrize("form", ["positional", "keywords", "dictionary"])
def test_integer_keyword_and_several_inputs(form: str, tmp_path: Path) -> None:
    ids, scale, y = torch.randint(0, 4, (5, 2)), torch.rand(5, 1).double(), data()[1]
    model = Inputs().double()
    if form == "positional":
        problem = disthess.Problem(model, loss="mse", batches=[((ids, scale), y)])
    elif form == "keywords":
        problem = disthess.Problem(model, loss="mse", batches=[({"ids": ids, "scale": scale, "flag": True}, y)])
    else:
        batch = {"ids": ids, "more": {"scale": scale}, "y": y}
        problem = disthess.Problem(
            model, objective=lambda m, b: F.mse_loss(m(b["ids"], scale=b["more"]["scale"]), b["y"]), batches=[batch]
        )
    right(problem, tmp_path)


class Several(nn.Module):
    """Two outputs, one an inner node."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(self.a(x))
        return self.b(h), {"inner": h}


def test_several_outputs_and_a_loss_of_an_inner_node(tmp_path: Path) -> None:
    def loss(outputs: tuple[Tensor, dict[str, Tensor]], y: Tensor) -> Tensor:
        return F.mse_loss(outputs[0], y) + (outputs[1]["inner"] * outputs[0]).pow(2).mean()

    problem = disthess.Problem(Several().double(), loss=loss, batches=[data()])
    store = right(problem, tmp_path, parts=("hessian", "ggn"))
    ggn = disthess.reference_hessian(problem, "ggn")
    assert np.linalg.norm(store.dense("ggn") - ggn) <= 1e-10 * np.linalg.norm(ggn)


class Noisy(nn.Module):
    """Draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x + 0.1 * torch.randn_like(x))


def test_a_model_that_is_random_from_call_to_call_is_refused(tmp_path: Path) -> None:
    problem = disthess.Problem(Noisy().double(), loss="mse", batches=[data()])
    with pytest.raises(ProblemError, match="pass it in the batch"):
        disthess.compute(problem, tmp_path / "run.zarr", progress=False)


def _hold(path: str, held: Any, release: Any) -> None:
    from disthess.store.lock import StoreLock

    with StoreLock(path):
        held.set()
        release.wait(60)


def test_two_runs_writing_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "run.zarr"), held, release))
    other.start()
    try:
        assert held.wait(60)
        problem = disthess.Problem(mlp(), loss="mse", batches=[data()])
        with pytest.raises(StoreError, match=r"run|process"):
            disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    finally:
        release.set()
        other.join(60)
    right(problem, tmp_path)


def test_a_store_of_another_model_half_written_or_with_a_flipped_byte(tmp_path: Path) -> None:
    problem = disthess.Problem(mlp(), loss="mse", batches=[data()])
    store = right(problem, tmp_path)
    other = mlp()
    other[0].bias.data += 1
    with pytest.raises(StoreError, match=r"another problem.*0\.bias"):
        disthess.compute(disthess.Problem(other, loss="mse", batches=[data()]), tmp_path / "run.zarr", progress=False)
    chunk = next(path for path in sorted((tmp_path / "run.zarr" / "panels").rglob("c/*/*")))
    whole = chunk.read_bytes()
    chunk.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(StoreError, match="damaged"):
        disthess.open_store(tmp_path / "run.zarr").dense()
    chunk.unlink()
    with pytest.raises(StoreError, match="not there"):
        disthess.open_store(tmp_path / "run.zarr").dense()
    store.store.verify(repair=False)
    from disthess.store.store import Store

    Store.open(tmp_path / "run.zarr", writable=True).verify(repair=True)
    right(problem, tmp_path)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    def forward(w: Any, x: Tensor) -> Tensor:
        h = checkpoint(lambda v: torch.tanh(v @ w[0]), x @ w[1], use_reentrant=reentrant)
        return h @ w[2]

    problem = disthess.Problem(Model(forward, (3, 3), (3, 3), (3, 2)), loss="mse", batches=[data()])
    if not reentrant:
        right(problem, tmp_path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DisthessError, match="use_reentrant=False"):
            disthess.compute(problem, tmp_path / "run.zarr", progress=False)


def test_a_compiled_model(tmp_path: Path) -> None:
    model = torch.compile(mlp(), backend="eager")
    problem = disthess.Problem(model, loss="mse", batches=[data()])
    plain = disthess.Problem(mlp(), loss="mse", batches=[data()])
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    wanted = disthess.reference_hessian(plain)
    assert np.linalg.norm(store.dense() - wanted) <= 1e-10 * np.linalg.norm(wanted)


def test_a_learnable_exponent_on_a_base_of_zero(tmp_path: Path) -> None:
    exponents, base = (2.0, 1.5, 3.0), np.array([[0.0, 1.0, 0.3], [2.0, 0.0, 0.4], [0.7, 0.9, 0.0]])
    model = Model(lambda w, x: x ** w[0], (3,))
    model.weights[0].data = torch.tensor(exponents, dtype=torch.float64)
    batch = (torch.from_numpy(base), torch.ones(3, 3, dtype=torch.float64))
    store = disthess.compute(
        disthess.Problem(model, loss="mse", batches=[batch]), tmp_path / "run.zarr", progress=False
    )
    # torch's double backward is NaN here. d2/de2 (b^e - 1)^2 = 2 (2 b^2e - b^e) log(b)^2, which is 0 at b = 0.
    log = np.log(np.where(base > 0, base, 1.0))
    power = base ** np.array(exponents)
    wanted = (2 * (2 * power**2 - power) * log**2).sum(0) / 9
    np.testing.assert_allclose(store.dense(), np.diag(wanted), atol=1e-13)


class Swallowing(nn.Module):
    """Samples that are added up by an operation that passes over NaN, beside an infinite entry; and an empty slice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        values = self.layer(x)
        beside = torch.cat([values[:, :1], torch.full_like(values[:, :1], -math.inf)], dim=1)
        total = torch.where(beside == beside, beside, torch.zeros_like(beside)).sum(0)[0]
        return torch.cat([values[:, 2:], torch.tanh(values[:, 1:]) * total], dim=1)


def test_a_leak_that_no_nan_shows_beside_infinities_and_empty_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = (torch.randn(4, 3).double(), torch.randn(4, 1).double())
    problem = disthess.Problem(Swallowing().double(), loss="mse", batches=[data])
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    assert "coupled" in store.attributes["independence"] or "mixes" in store.attributes["independence"]
    wanted = disthess.reference_hessian(problem)
    np.testing.assert_allclose(store.dense(), wanted, atol=1e-12)
