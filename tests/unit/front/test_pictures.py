"""Pictures are written, whatever the numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from disthess.pictures.files import _shrunk, block_picture, densities_picture, spectrum_picture

CURVE = SimpleNamespace(
    grid=np.linspace(-1, 5, 50), density=np.exp(-(np.linspace(-1, 5, 50) ** 2)), standard_error=np.full(50, 0.01)
)
PAIRS = SimpleNamespace(values=np.array([-0.5, 4.5]), residuals=np.array([1e-9, 1e-9]))


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("curve", "pairs"), [(CURVE, PAIRS), (CURVE, None), (None, PAIRS)])
def test_a_spectrum_is_drawn_with_either_kind_of_number(tmp_path: Path, curve: object, pairs: object) -> None:
    spectrum_picture(tmp_path / "s.png", curve, pairs)
    assert is_png(tmp_path / "s.png")


@pytest.mark.parametrize("norms", [np.array([[1.0, 1e-12], [1e-12, 0.0]]), np.zeros((2, 2)), np.ones((2, 2))])
def test_blocks_are_drawn_with_zeros_and_without_any(tmp_path: Path, norms: np.ndarray) -> None:
    block_picture(tmp_path / "b.png", ["a", "b"], norms)
    assert is_png(tmp_path / "b.png")


def test_many_blocks_are_merged_into_few_cells_of_the_same_total() -> None:
    norms = np.random.default_rng(0).random((1300, 1300))
    cells, names = _shrunk(norms, [str(index) for index in range(1300)])
    assert cells.shape == (len(names), len(names))
    assert len(names) <= 512
    assert np.linalg.norm(cells) == pytest.approx(np.linalg.norm(norms))


def test_densities_of_blocks_with_any_names_are_drawn(tmp_path: Path) -> None:
    grid = np.linspace(-1.0, 1.0, 50)
    value = np.exp(-(grid**2))
    curves = [(name, grid, value, error) for name, error in (("$x_{$", 0.1 * value), ("b", np.full(50, np.nan)))]
    densities_picture(tmp_path / "d.png", "step $1_{$", curves)
    assert is_png(tmp_path / "d.png")
