"""Kronecker factors of real layers: from problems, without the block, and from stores, with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import Tensor, nn

import disthess
from disthess.errors import ConfigError, GraphError, UnknownNameError


class Gated(nn.Module):
    """Layers that meet again, so that blocks between them have every term."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.a(x))
        return self.c(first + torch.tanh(self.b(first)) * first)


class Tokens(nn.Module):
    """Several rows per sample that interact."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        values = torch.tanh(self.embed(x))
        return self.head((values @ values.transpose(1, 2)).softmax(-1) @ values).mean(1)


class Centred(nn.Module):
    """Samples that are coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        values = self.a(x)
        return self.b(torch.tanh(values - values.mean(0)))


def gated(**options: object) -> disthess.Problem:
    torch.manual_seed(0)
    batches = [(torch.randn(n, 5), torch.randint(0, 3, (n,))) for n in (20, 7)]
    return disthess.Problem(Gated().double(), loss="cross_entropy", batches=_double(batches), **options)  # type: ignore[arg-type]


def tokens() -> disthess.Problem:
    torch.manual_seed(1)
    return disthess.Problem(Tokens().double(), loss="mse", batches=_double([(torch.randn(6, 5, 3), torch.randn(6, 2))]))


def centred() -> disthess.Problem:
    torch.manual_seed(2)
    return disthess.Problem(Centred().double(), loss="mse", batches=_double([(torch.randn(6, 3), torch.randn(6, 1))]))


def _double(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y.double() if y.is_floating_point() else y) for x, y in batches]


def wanted(problem: disthess.Problem, a: str, b: str, part: str) -> np.ndarray:
    """The joint block ``[o_v, i_v, o_w, i_w]`` of two layers, out of the dense oracle."""
    whole = disthess.reference_hessian(problem, part=part)  # type: ignore[arg-type]
    place, offset = {}, 0
    for name, tensor in problem.model.named_parameters():
        numbers = np.arange(offset, offset + tensor.numel()).reshape(tensor.shape[0], -1)
        offset += tensor.numel()
        layer = name.rsplit(".", 1)[0]
        place[layer] = np.concatenate([place[layer], numbers], axis=1) if layer in place else numbers
    rows, columns = place[a], place[b]
    return whole[np.ix_(rows.ravel(), columns.ravel())].reshape(*rows.shape, *columns.shape)


def best_error(block: np.ndarray) -> float:
    ov, iv, ow, iw = block.shape
    values = np.linalg.svd(block.transpose(0, 2, 1, 3).reshape(ov * ow, iv * iw), compute_uv=False)
    return float(np.sqrt((values[1:] ** 2).sum()))


@pytest.mark.parametrize("part", ["hessian", "ggn", "residual"])
@pytest.mark.parametrize("pair", [("a", "a"), ("b", "b"), ("c", "c"), ("a", "b"), ("c", "a")])
def test_nearest_products_from_a_problem(part: str, pair: tuple[str, str]) -> None:
    problem = gated(weight_decay={"*.weight": 0.1, "*.bias": 0.02})
    block = wanted(problem, *pair, part)
    if part != "residual" and pair[0] == pair[1]:
        decay = np.zeros(block.shape[1])
        decay[:] = 0.1
        if pair[0] != "c":
            decay[-1] = 0.02
        # The oracle's products have it too.
        assert np.trace(block.reshape(block.shape[0] * block.shape[1], -1)) > decay.sum()
    found = disthess.kronecker(problem, *pair, part=part)  # type: ignore[arg-type]
    scale = float(np.linalg.norm(block))
    assert found.error == pytest.approx(best_error(block), abs=1e-13 * scale)
    assert found.norm == pytest.approx(scale)
    left = np.linalg.norm(block.reshape(found.shape) - found.dense())
    assert left == pytest.approx(found.error, abs=1e-13 * scale)


@pytest.mark.parametrize("make", [tokens, centred])
def test_rows_that_interact(make) -> None:  # type: ignore[no-untyped-def]
    problem = make()
    for layer in {name.rsplit(".", 1)[0] for name, _ in problem.model.named_parameters()}:
        block = wanted(problem, layer, layer, "hessian")
        found = disthess.kronecker(problem, layer)
        assert found.error == pytest.approx(best_error(block), abs=1e-13 * float(np.linalg.norm(block)))
    first, last = (name.rsplit(".", 1)[0] for name in (*dict(problem.model.named_parameters()),) if "weight" in name)
    for pair in ((first, last), (last, first)):
        block = wanted(problem, *pair, "hessian")
        found = disthess.kronecker(problem, *pair)
        assert found.error == pytest.approx(best_error(block), abs=1e-13 * float(np.linalg.norm(block)))


def test_a_store_and_a_problem_agree_and_the_store_keeps_what_it_found(tmp_path: Path) -> None:
    problem = gated()
    store = disthess.compute(problem, tmp_path / "a.zarr", dtype="float64", progress=False)
    for pair in (("a", None), ("b.weight", None), ("a", "c"), ("c", "a")):
        stored, free = disthess.kronecker(store, *pair), disthess.kronecker(problem, *pair, store=store)
        assert stored.error == pytest.approx(free.error, rel=1e-10)
        np.testing.assert_allclose(stored.dense(), free.dense(), atol=1e-12)
    again = disthess.kronecker(disthess.open_store(tmp_path / "a.zarr"), "c", "a")
    np.testing.assert_array_equal(again.outer, disthess.kronecker(store, "c", "a").outer)
    group = tmp_path / "a.zarr" / "kronecker" / "hessian" / "nearest"
    assert {path.name for path in group.iterdir() if path.is_dir()} == {"0+1-0+1", "2-2", "0+1-4", "4-0+1"}


def test_convolutions_from_a_store(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()
    data = [(torch.randn(5, 1, 3, 3).double(), torch.randint(0, 2, (5,)))]
    problem = disthess.Problem(model, loss="cross_entropy", batches=data)
    store = disthess.compute(problem, tmp_path / "a.zarr", progress=False)
    block = wanted(problem, "0", "0", "hessian")
    assert disthess.kronecker(store, "0").error == pytest.approx(best_error(block), rel=1e-10)
    with pytest.raises(GraphError, match="into a store"):
        disthess.kronecker(problem, "0")


def regression(samples: int) -> disthess.Problem:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(samples, 3).double()
    return disthess.Problem(model, loss="mse", batches=[(x, torch.randn(samples, 2).double())])


def test_exact_for_one_sample_and_for_the_last_layer_of_least_squares() -> None:
    for kind in ("nearest", "expectation"):
        for layer in ("0", "2"):
            assert disthess.kronecker(regression(1), layer, kind=kind).relative_error < 1e-14  # type: ignore[arg-type]
        assert disthess.kronecker(regression(30), "2", kind=kind).relative_error < 1e-14  # type: ignore[arg-type]


def test_expectations_are_further_away_and_say_how_far() -> None:
    problem = regression(32)
    block = wanted(problem, "0", "0", "hessian")
    nearest, expected = disthess.kronecker(problem, "0"), disthess.kronecker(problem, "0", kind="expectation")
    assert np.linalg.norm(block.reshape(16, 16) - expected.dense()) == pytest.approx(expected.error, rel=1e-12)
    assert 0.01 < nearest.relative_error < expected.relative_error
    inputs = torch.cat([problem.batches[0][0], torch.ones(32, 1).double()], dim=1)
    np.testing.assert_allclose(expected.inner, inputs.T @ inputs / 32, atol=1e-14)
    decayed = disthess.Problem(problem.model, loss="mse", batches=problem.batches, weight_decay=0.3)
    assert disthess.kronecker(decayed, "0", kind="expectation").error == pytest.approx(expected.error)


def test_files_in_the_layout_of_kfac_libraries(tmp_path: Path) -> None:
    problem = gated()
    factors = [disthess.kronecker(problem, layer, kind="expectation") for layer in ("a", "b", "c")]
    files = disthess.save_factors(tmp_path / "factors", factors)
    inputs, outputs, count, _ = (load_file(path) for path in files)
    assert [path.stem for path in files[:2]] == ["activation_covariance", "gradient_covariance"]
    assert set(inputs) == set(outputs) == set(count) == {"a", "b", "c"}
    assert inputs["a"].shape == (6, 6)
    assert inputs["c"].shape == (4, 4)
    np.testing.assert_array_equal(outputs["b"] / count["b"], factors[1].outer)
    with safe_open(files[0], "numpy") as opened:
        said = json.loads(opened.metadata()["disthess"])
    assert said["a"]["error"] == factors[0].error
    assert said["a"]["parameters"] == ["a.weight", "a.bias"]
    with pytest.raises(ConfigError, match="no factors"):
        disthess.save_factors(tmp_path, [])
    with pytest.raises(ConfigError, match="against themselves"):
        disthess.save_factors(tmp_path, [disthess.kronecker(problem, "a", "b")])


def test_refusals(tmp_path: Path) -> None:
    problem = gated()
    store = disthess.compute(problem, tmp_path / "a.zarr", progress=False)
    with pytest.raises(UnknownNameError, match="near names"):
        disthess.kronecker(problem, "a.wieght")
    with pytest.raises(ConfigError, match="give the problem"):
        disthess.kronecker(store, "a", kind="expectation")
    with pytest.raises(ConfigError, match="kind must be"):
        disthess.kronecker(store, "a", kind="best")  # type: ignore[arg-type]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.tanh(self.a(x)))

    shared = disthess.Problem(Twice(), loss="mse", batches=[(torch.randn(4, 3), torch.randn(4, 3))])
    with pytest.raises(GraphError, match="used 2 times"):
        disthess.kronecker(shared, "a")
