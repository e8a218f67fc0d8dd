"""Metrics of pairs against numpy on the oracle's blocks; sections; the definiteness check."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import disthess
from disthess.errors import ConfigError, StoreError, UnknownNameError
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.reduce.definite import check_definite
from disthess.reduce.pairs import METRICS, spectral_norm
from disthess.reduce.sections import check_sections


class Net(nn.Module):
    """Attention whose q, k and v share a matrix; one layer is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.spare, self.head = nn.Linear(2, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.head(self.attention(h, h, h)[0].mean(1))


SECTIONS = {
    "q": "attention.in_proj_weight[0:4]",
    "k": "attention.in_proj_weight[4:8]",
    "v": "attention.in_proj_weight[8:]",
    "odd": "head.weight[:, 1:3]",
    "corner": "first.weight[-1, 0]",
}


def make() -> disthess.Problem:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 3, 3, generator=g).double(), torch.randint(0, 2, (4,), generator=g)
    return disthess.Problem(Net().double(), loss="cross_entropy", batches=[(x, y)])


@pytest.fixture(scope="module")
def problem() -> disthess.Problem:
    return make()


@pytest.fixture(scope="module")
def store(
    problem: disthess.Problem, tmp_path_factory: pytest.TempPathFactory
) -> disthess.reduce.hessian_store.HessianStore:
    path = tmp_path_factory.mktemp("pairs") / "run.zarr"
    return disthess.compute(
        problem,
        path,
        parts=("hessian", "ggn"),
        activations=["first", "attention", "head"],
        sections=SECTIONS,
        progress=False,
    )


def places(problem: disthess.Problem) -> dict[str, np.ndarray]:
    """Positions of every parameter and section in user order, by plain numpy indexing."""
    found, start = {}, 0
    for parameter in problem.parameters():
        grid = np.arange(start, start + parameter.tensor.numel()).reshape(parameter.tensor.shape)
        found[parameter.name] = grid
        start += grid.size
    weight = found["attention.in_proj_weight"]
    found |= {"q": weight[:4], "k": weight[4:8], "v": weight[8:]}
    found |= {"odd": found["head.weight"][:, 1:3], "corner": found["first.weight"][-1:, :1]}
    return {name: grid.reshape(-1) for name, grid in found.items()}


def expected(blocks: dict[str, np.ndarray], own: tuple[np.ndarray, np.ndarray], same: bool) -> dict[str, float]:
    block = blocks["hessian"]
    norm = math.sqrt((block**2).sum())
    scale = math.sqrt(math.sqrt((own[0] ** 2).sum()) * math.sqrt((own[1] ** 2).sum()))
    top = np.linalg.svd(block, compute_uv=False)[0]
    ggn = np.linalg.norm(blocks["ggn"])
    return {
        "norm": norm,
        "coupling": norm / scale if scale else math.nan,
        "stable_rank": norm**2 / top**2 if norm else math.nan,
        "gap": np.linalg.norm(block - blocks["ggn"]) / ggn if ggn else math.nan,
        "trace": np.trace(block) if same else math.nan,
    }


@pytest.mark.parametrize("of", ["parameters", "sections"])
def test_pairs_of_parameters_and_sections(problem, store, of: str) -> None:  # type: ignore[no-untyped-def]
    table = store.pairs(of=of)
    oracle = {part: disthess.reference_hessian(problem, part) for part in ("hessian", "ggn")}
    where = places(problem)
    assert len(table.rows) == len(table.names) * (len(table.names) + 1) // 2
    if of == "sections":
        assert set(SECTIONS) <= set(table.names)
        assert "attention.in_proj_weight" not in table.names
        assert "first.bias" in table.names
    for row in table.rows:
        blocks = {part: matrix[np.ix_(where[row.a], where[row.b])] for part, matrix in oracle.items()}
        own = tuple(oracle["hessian"][np.ix_(where[name], where[name])] for name in (row.a, row.b))
        wanted = expected(blocks, own, row.a == row.b)
        assert row.entries == blocks["hessian"].size
        for metric, value in wanted.items():
            if value > 1e12 or (metric == "gap" and np.linalg.norm(blocks["ggn"]) < 1e-14):
                continue
            found = getattr(row, metric)
            assert found == pytest.approx(value, rel=1e-8, abs=1e-12, nan_ok=True), (row.a, row.b, metric)


def test_pairs_of_activations(store) -> None:  # type: ignore[no-untyped-def]
    table = store.pairs(of="activations")
    assert table.names == tuple(entry.name for entry in store.activations)
    for row in table.rows:
        block = store.activation_block(row.a, row.b)
        assert row.norm == pytest.approx(np.linalg.norm(block))
        residual = np.linalg.norm(block - store.activation_block(row.a, row.b, "ggn"))
        assert row.gap == pytest.approx(
            residual / np.linalg.norm(store.activation_block(row.a, row.b, "ggn")), abs=1e-9
        )


def test_table_as_matrix_csv_and_json(store) -> None:  # type: ignore[no-untyped-def]
    table = store.pairs()
    for metric in METRICS:
        matrix = table.matrix(metric)
        np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(np.diag(table.matrix("coupling"))[~np.isnan(np.diag(table.matrix("coupling")))], 1.0)
    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(lines) == len(table.rows)
    assert float(lines[3]["norm"]) == table.rows[3].norm
    unused = next(line for line in lines if line["a"] == line["b"] == "spare.weight")
    assert (unused["norm"], unused["coupling"]) == ("0.0", "")
    assert json.loads(json.dumps(table.to_json(), allow_nan=False))[0]["a"] == "first.weight"
    norms = [row.norm for row in table.largest(5)]
    assert norms == sorted(norms, reverse=True)
    with pytest.raises(ConfigError, match="metric"):
        table.matrix("size")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sections"):
        store.pairs(of="layers")


def test_blocks_of_sections_are_cut_out_of_the_matrix(problem, store) -> None:  # type: ignore[no-untyped-def]
    dense, where = store.dense(), places(problem)
    for a in (*SECTIONS, "first.bias"):
        for b in SECTIONS:
            wanted = dense[np.ix_(where[a], where[b])]
            np.testing.assert_array_equal(store.block(a, b), wanted)
            np.testing.assert_array_equal(store.block(b, a, lazy=True).compute(), wanted.T)
    written = store.block("attention.in_proj_weight[4:8]", "head.weight[1]")
    np.testing.assert_array_equal(written, dense[np.ix_(where["k"], where["head.weight"].reshape(2, 4)[1])])
    assert disthess.attention_sections(problem.model)["attention.k.weight"] == SECTIONS["k"]


WRONG = [
    "head.weight[0:9]",
    "head.weight[1:1]",
    "head.weight[a:b]",
    "head.weight[0:1:2]",
    "head.weight[0,0,0]",
    "hed.weight[0:1]",
]


@pytest.mark.parametrize("text", WRONG)
def test_wrong_sections_are_refused(store, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ConfigError, UnknownNameError)):
        store.block(text, "head.bias")
    with pytest.raises(ConfigError):
        check_sections(store.parameters, {"mine": text})


def test_wrong_sections_make_no_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        disthess.compute(make(), tmp_path / "run.zarr", sections={"mine": WRONG[0]}, progress=False)
    with pytest.raises(ConfigError, match="name of a parameter"):
        disthess.compute(make(), tmp_path / "run.zarr", sections={"head.bias": "head.weight[0]"}, progress=False)
    assert not (tmp_path / "run.zarr").exists()


def test_names_can_be_added_to_a_finished_store(tmp_path: Path) -> None:
    problem = make()
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    with pytest.raises(StoreError, match="sections="):
        store.pairs(of="sections")
    named = disthess.compute(problem, tmp_path / "run.zarr", sections={"row": "head.weight[0]"}, progress=False)
    np.testing.assert_array_equal(named.block("row", "row"), store.block("head.weight", "head.weight")[:4, :4])
    assert "row" in named.pairs(of="sections").names


def test_spectral_norm_of_large_blocks() -> None:
    values = np.random.default_rng(0).standard_normal((600, 700))
    values[0] += 30
    assert spectral_norm(values) == pytest.approx(np.linalg.norm(values, 2), rel=1e-6)
    assert spectral_norm(np.zeros((0, 3))) == 0.0


class Diagonal(AbstractSymmetricOperator):
    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    @property
    def size(self) -> int:
        return len(self._values)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("float64")

    def matmat(self, block: np.ndarray) -> np.ndarray:
        return self._values[:, None] * block


@pytest.mark.parametrize("size", [200, 2000])
@pytest.mark.parametrize(
    ("low", "verdict"), [(0.0, "positive semi-definite"), (0.2, "positive semi-definite"), (-0.3, "indefinite")]
)
def test_verdicts_on_known_spectra(size: int, low: float, verdict: str) -> None:
    values = np.linspace(0.5, 3.0, size)
    values[size // 2] = low
    found = check_definite(Diagonal(values), "ggn", "float64", seed=0)
    assert found.verdict == verdict
    assert found.smallest == pytest.approx(low, abs=1e-6)
    assert found.largest == pytest.approx(3.0, rel=1e-5)


def test_the_gauss_newton_part_is_checked_and_the_hessian_is_not_definite(store) -> None:  # type: ignore[no-untyped-def]
    ggn, hessian = disthess.psd_check(store), disthess.psd_check(store, part="hessian")
    assert ggn.verdict == "positive semi-definite"
    assert hessian.verdict == "indefinite"
    assert hessian.smallest == pytest.approx(np.linalg.eigvalsh(store.dense())[0], abs=1e-12)
    assert store.store.has_result("psd/ggn")
    assert disthess.psd_check(store) == ggn


def test_a_loss_that_is_not_convex_in_the_outputs_shows(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    batch = (torch.randn(6, 3, generator=g).double(), torch.randn(6, 2, generator=g).double())
    torch.manual_seed(0)
    problem = disthess.Problem(nn.Linear(3, 2).double(), loss=lambda z, y: torch.cos(z - y).mean(), batches=[batch])
    store = disthess.compute(problem, tmp_path / "run.zarr", parts=("ggn",), progress=False)
    assert disthess.psd_check(store).verdict == "indefinite"
