"""A certificate passes what is right and fails what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_store import PLAIN, TIED, Made, make_store

from disthess.reduce.certify import certify
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.shared import reduce_shared
from disthess.store.store import Store


def finished(place: Path, tied: bool = True) -> Made:
    made = make_store(place, TIED if tied else PLAIN, seed=5)
    reduce_shared(made.store)
    made.store.mark_reduced()
    return made


@pytest.mark.parametrize("tied", [True, False])
def test_the_right_matrix_passes_and_is_kept(tmp_path: Path, tied: bool) -> None:
    made = finished(tmp_path / "run.zarr", tied)
    store = HessianStore(made.store)
    assert store.certificate("ggn") is None
    found = certify(store, lambda x: made.dense["ggn"] @ x, seed=3, vectors=4, tolerance=1e-12, part="ggn")
    assert found.passed
    assert found.vectors == 4
    assert found.worst < 1e-13
    assert found.symmetry < 1e-15
    assert HessianStore(Store.open(tmp_path / "run.zarr")).certificate("ggn") == found
    assert store.certificate("hessian") is None


def test_one_wrong_entry_fails(tmp_path: Path) -> None:
    made = finished(tmp_path / "run.zarr")
    wrong = made.dense["hessian"].copy()
    wrong[0, 7] = wrong[7, 0] = wrong[0, 7] + 1e-6
    found = certify(HessianStore(made.store), lambda x: wrong @ x, seed=0, vectors=2, tolerance=1e-9, part="hessian")
    assert not found.passed
    assert 1e-9 < found.worst < 1e-5
    assert not certify(
        HessianStore(made.store), np.zeros_like, seed=0, vectors=1, tolerance=1e-9, part="hessian"
    ).passed


@pytest.mark.parametrize(("tied", "value"), [(True, 0.5), (False, 0.5), (False, np.nan)])
def test_a_wrong_lower_triangle_inside_a_tile_fails(tmp_path: Path, tied: bool, value: float) -> None:
    # Readers use upper triangles alone, so that products cannot see it.
    made = finished(tmp_path / "run.zarr", tied)
    kind, source = ("uses", "tied@2") if tied else ("panels", "w")
    panel = next(panel for panel in made.store.layout.panels if (panel.kind, panel.source) == (kind, source))
    made.store.array(panel, "hessian")[1, 0] += value
    found = certify(
        HessianStore(made.store), lambda x: made.dense["hessian"] @ x, seed=0, vectors=1, tolerance=1e-9, part="hessian"
    )
    assert found.worst < 1e-12
    assert not found.symmetry < 1e-3
    assert not found.passed


def test_a_zero_matrix_passes_by_absolute_error(tmp_path: Path) -> None:
    made = make_store(tmp_path / "run.zarr", PLAIN)
    for panel in made.store.layout.panels:
        made.store.array(panel, "hessian")[...] = 0.0
    found = certify(HessianStore(made.store), np.zeros_like, seed=0, vectors=2, tolerance=1e-9, part="hessian")
    assert found.passed
    assert found.worst == 0
