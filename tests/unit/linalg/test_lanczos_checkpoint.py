"""A long iteration that is interrupted goes on from its file, and ends with the same bits; another question's file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from disthess.linalg import checkpoint as module
from disthess.linalg.lanczos import EigenResult, extreme_eigenpairs
from disthess.linalg.operator import AbstractSymmetricOperator

SIZE = 900


class Breakdown(Exception):
    """What stops the iteration."""


class Breaking(AbstractSymmetricOperator):
    """A dense matrix that breaks down after so many products."""

    def __init__(self, matrix: np.ndarray, after: int | None = None) -> None:
        self.matrix, self.after, self.count = matrix, after, 0

    @property
    def size(self) -> int:
        return len(self.matrix)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64)

    def matmat(self, block: np.ndarray) -> np.ndarray:
        self.count += block.shape[1]
        if self.after is not None and self.count > self.after:
            raise Breakdown
        return self.matrix @ block


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    random = np.random.default_rng(3)
    basis = np.linalg.qr(random.standard_normal((SIZE, SIZE)))[0]
    values = np.concatenate([random.normal(scale=0.5, size=SIZE - 4), [5.0, 3.0, 2.5, -2.0]])
    made = (basis * values) @ basis.T
    return 0.5 * (made + made.T)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every step, and restart often."""
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(module, "WRITING_SHARE", float("inf"))
    monkeypatch.setattr("disthess.linalg.lanczos.MAX_BASIS", 56)


def ask(matrix: np.ndarray, path: Path | None, after: int | None = None, **settings: object) -> EigenResult:
    return extreme_eigenpairs(Breaking(matrix, after), 2, vectors=True, checkpoint=path, **settings)  # type: ignore[arg-type]


def bits(found: EigenResult) -> tuple[object, ...]:
    assert found.vectors is not None
    return (found.values.tobytes(), found.residuals.tobytes(), found.vectors.tobytes(), found.products)


@pytest.mark.parametrize("large", [SIZE, 100], ids=["blocks of 8", "blocks of 2"])
def test_an_interrupted_run_ends_with_the_same_bits(
    tmp_path: Path, matrix: np.ndarray, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr("disthess.linalg.lanczos.LARGE_SIZE", large)
    whole = ask(matrix, tmp_path / "whole.npz")
    np.testing.assert_allclose(whole.values, np.linalg.eigvalsh(matrix)[[0, 1, -2, -1]], atol=1e-8)
    assert whole.products > 56 + 16, "it must have restarted"
    stopped = 0
    found = None
    while found is None:
        try:
            found = ask(matrix, tmp_path / "part.npz", whole.products // 4)
        except Breakdown:
            stopped += 1
    assert stopped >= 3
    assert bits(found) == bits(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.npz", "whole.npz"]


def test_going_on_saves_products(tmp_path: Path, matrix: np.ndarray) -> None:
    whole = ask(matrix, tmp_path / "one.npz")
    with pytest.raises(Breakdown):
        ask(matrix, tmp_path / "two.npz", whole.products // 2)
    operator = Breaking(matrix)
    again = extreme_eigenpairs(operator, 2, vectors=True, checkpoint=tmp_path / "two.npz")
    assert again.products == whole.products
    assert operator.count < 0.7 * whole.products


def test_without_a_file_the_values_are_the_same(tmp_path: Path, matrix: np.ndarray) -> None:
    with_file, without = ask(matrix, tmp_path / "one.npz"), ask(matrix, None)
    assert with_file.values.tobytes() == without.values.tobytes()
    assert with_file.products == without.products + 1, "one product tells the operator"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"which": "largest"}, "which was 'both' and is 'largest'"),
        ({"tolerance": 1e-3}, "tolerance was 1e-09 and is 0.001"),
    ],
)
def test_another_question_is_refused(tmp_path: Path, matrix: np.ndarray, change: dict[str, object], said: str) -> None:
    with pytest.raises(Breakdown):
        ask(matrix, tmp_path / "state.npz", 60)
    with pytest.raises(ValueError, match=said):
        ask(matrix, tmp_path / "state.npz", **change)


def test_another_matrix_is_refused(tmp_path: Path, matrix: np.ndarray) -> None:
    with pytest.raises(Breakdown):
        ask(matrix, tmp_path / "state.npz", 60)
    before = (tmp_path / "state.npz").read_bytes()
    other = matrix.copy()
    other[4, 4] *= 1 + 1e-10
    with pytest.raises(ValueError, match="H times a fixed vector differs"):
        ask(other, tmp_path / "state.npz")
    assert (tmp_path / "state.npz").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
def test_a_damaged_file_is_refused(tmp_path: Path, matrix: np.ndarray, damage: str) -> None:
    path = tmp_path / "state.npz"
    with pytest.raises(Breakdown):
        ask(matrix, path, 60)
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes({"cut": held[: len(held) // 2], "flipped": held, "text": b"hello", "empty": b""}[damage])
    with pytest.raises(ValueError, match="damaged"):
        ask(matrix, path)


def test_a_saving_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, matrix: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.npz"
    with pytest.raises(Breakdown):
        ask(matrix, path, 60)
    before = path.read_bytes()
    save = np.savez

    def full(out: object, **arrays: np.ndarray) -> None:
        save(out, vectors=arrays["vectors"])  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        ask(matrix, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_refused_before_any_step(tmp_path: Path, matrix: np.ndarray) -> None:
    operator = Breaking(matrix)
    with pytest.raises(ValueError, match="a folder that is there"):
        extreme_eigenpairs(operator, 2, checkpoint=tmp_path / "no" / "state.npz")
    assert operator.count <= 1


def test_savings_are_rare(tmp_path: Path, matrix: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 3600.0)
    ask(matrix, tmp_path / "state.npz")
    assert not (tmp_path / "state.npz").exists()


def test_products_are_told_as_they_are_done(matrix: np.ndarray) -> None:
    told: list[int] = []
    found = extreme_eigenpairs(Breaking(matrix), 1, notify=told.append)
    assert told == sorted(told)
    assert told[-1] == found.products
