"""Symbolic links inside a store: read, and never written through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import disthess
from disthess.errors import StoreError


def test_nothing_is_written_through_a_symbolic_link(tmp_path: Path) -> None:
    problem = disthess.Problem(torch.nn.Linear(3, 2), loss="mse", batches=[(torch.ones(2, 3), torch.zeros(2, 2))])
    path = tmp_path / "run.zarr"
    whole = disthess.compute(problem, path, progress=False).dense()
    (tmp_path / "elsewhere").mkdir()
    (path / "ledger").rename(tmp_path / "ledger")
    (path / "ledger").symlink_to(tmp_path / "ledger")
    before = {file: file.read_bytes() for file in (tmp_path / "ledger").rglob("*") if file.is_file()}
    with pytest.raises(StoreError, match="symbolic link inside"):
        disthess.compute(problem, path, progress=False)
    found = disthess.open_store(path)
    np.testing.assert_array_equal(found.dense(), whole)
    assert disthess.eigenvalues(found, k=1).values.size == 2
    assert before == {file: file.read_bytes() for file in (tmp_path / "ledger").rglob("*") if file.is_file()}
    # The store as a whole may be reached by a link.
    (path / "ledger").unlink()
    (tmp_path / "ledger").rename(path / "ledger")
    (tmp_path / "alias.zarr").symlink_to(path)
    disthess.compute(problem, tmp_path / "alias.zarr", progress=False)
