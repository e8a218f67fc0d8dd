"""Spectra of a store against the dense matrix; what was found is kept and found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_store import Made, make_store
from scipy.sparse.linalg import aslinearoperator

from disthess.errors import ConfigError, PlanError, StoreError
from disthess.linalg.lanczos import basis_bytes
from disthess.linalg.operator import AbstractSymmetricOperator, DenseOperator
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.operator import StoreOperator
from disthess.reduce.results import Target, eigenvalues, low_rank, spectral_density, trace
from disthess.reduce.shared import reduce_shared
from disthess.store.store import Store


@pytest.fixture
def made(tmp_path: Path) -> Made:
    found = make_store(tmp_path / "run.zarr")
    reduce_shared(found.store)
    found.store.mark_reduced()
    return found


def test_a_store_and_any_operator_give_the_dense_numbers(made: Made) -> None:
    dense = made.dense["hessian"]
    targets: list[Target] = [HessianStore(made.store), aslinearoperator(dense), DenseOperator(dense)]
    wanted = np.linalg.eigvalsh(dense)
    for target in targets:
        np.testing.assert_allclose(eigenvalues(target, 2).values, wanted[[0, 1, -2, -1]], atol=1e-10)
        assert abs(trace(target).value - np.trace(dense)) <= 4 * trace(target).standard_error + 1e-9
        np.testing.assert_allclose(low_rank(target, 41).error, 0, atol=1e-9)
        density = spectral_density(target, probes=41, steps=2)
        np.testing.assert_allclose(density.nodes, wanted, atol=1e-9)


def test_results_are_found_again_without_a_product(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HessianStore(made.store)
    first = [eigenvalues(store, 3, vectors=True), spectral_density(store, steps=4), low_rank(store, 5)]
    assert made.store.result_names() == (
        "lowrank/hessian/randomised-5",
        "spectrum/hessian/both-3",
        "spectrum/hessian/density",
    )

    def refuse(self: StoreOperator, block: np.ndarray) -> np.ndarray:
        raise AssertionError("a product was asked for")

    monkeypatch.setattr(StoreOperator, "matmat", refuse)
    again = HessianStore(Store.open(made.store.path))
    second = [eigenvalues(again, 3, vectors=True), spectral_density(again, steps=4), low_rank(again, 5)]
    for one, two in zip(first, second):
        for name in one.__slots__:  # type: ignore[attr-defined]
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
            assert type(getattr(one, name)) is type(getattr(two, name))
    for other in (
        lambda: eigenvalues(again, 3),
        lambda: eigenvalues(again, 3, vectors=True, part="ggn"),
        lambda: spectral_density(again, steps=5),
        lambda: low_rank(again, 5, seed=1),
    ):
        with pytest.raises(AssertionError, match="product"):
            other()


def test_a_store_that_cannot_be_written_still_answers(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disthess.store.place.os.access", lambda *_: False)
    found = eigenvalues(HessianStore(made.store), 1)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(made.dense["hessian"])[[0, -1]], atol=1e-10)
    assert made.store.result_names() == ()


def test_vectors_are_bounded_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    basis = np.linalg.qr(random.standard_normal((700, 700)))[0]
    matrix = (basis * np.concatenate(([-9.0, 12.0], random.uniform(-3, 3, 698)))) @ basis.T
    asked: list[int] = []
    inner = DenseOperator.matmat

    def counted(self: DenseOperator, block: np.ndarray) -> np.ndarray:
        asked.append(block.shape[1])
        return inner(self, block)

    monkeypatch.setattr(DenseOperator, "matmat", counted)
    found = eigenvalues(DenseOperator(0.5 * (matrix + matrix.T)), 1, memory_bytes=1)
    np.testing.assert_allclose(found.values, [-9, 12], rtol=1e-9)
    assert basis_bytes(700, 1, memory_bytes=1) < basis_bytes(700, 1)
    few = len(asked)
    eigenvalues(DenseOperator(0.5 * (matrix + matrix.T)), 1)
    assert few >= len(asked) - few


def test_kept_results_do_not_hide_a_missing_tile(made: Made) -> None:
    store = HessianStore(made.store)
    eigenvalues(store, 1)
    made.store.mark_missing([0])
    made.store.mark_reduced(False)
    with pytest.raises(StoreError, match="Run the same again"):
        eigenvalues(store, 1)


@pytest.mark.parametrize(
    "question",
    [
        lambda target: eigenvalues(target, 0),
        lambda target: eigenvalues(target, which="top"),
        lambda target: low_rank(target, 0),
        lambda target: spectral_density(target, probes=0),
        lambda target: trace(target, probes=1),
    ],
)
def test_bad_settings_are_configuration_errors(question) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError):
        question(DenseOperator(np.eye(4)))


def test_anything_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a store"):
        eigenvalues(np.eye(3))  # type: ignore[arg-type]


class Vast(AbstractSymmetricOperator):
    """As many rows as no machine has memory for."""

    size = 10**13
    dtype = np.dtype(np.float32)

    def matmat(self, block: np.ndarray) -> np.ndarray:
        raise AssertionError("a product was asked for")


@pytest.mark.parametrize(
    "question",
    [
        lambda target: eigenvalues(target, 1),
        lambda target: low_rank(target, 1),
        lambda target: spectral_density(target),
        lambda target: trace(target),
    ],
)
def test_what_does_not_fit_into_memory_is_refused_with_the_size(question) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=r"[TP]B.* free\. Ask for fewer"):
        question(Vast())
