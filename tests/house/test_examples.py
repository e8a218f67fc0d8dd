"""Every example: its problem gives the dense reference Hessian, and it runs as a script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import disthess
from disthess.loading import Source, load_problem

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]
SMALL = {
    "digits_mlp": {"hidden": 3, "steps": 5, "samples": 30},
    "digits_cnn": {"channels": 2, "samples": 10},
    "tied_autoencoder": {"width": 6, "code": 3, "samples": 8},
    "custom_objective": {"samples": 10},
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*SMALL, "paper_check", "paper_architectures"}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("form", ["examples/{}.py:problem", "examples.{}:problem"])
def test_an_example_gives_the_reference_hessian(tmp_path: Path, name: str, form: str) -> None:
    problem = load_problem(Source(form.format(name), SMALL[name], folders=(str(ROOT),)))
    store = disthess.compute(problem, tmp_path / "run.zarr", dtype="float64", progress=False)
    expected = np.asarray(disthess.reference_hessian(problem.to(_float64())))
    assert np.abs(store.dense() - expected).max() <= 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["digits_cnn", "tied_autoencoder", "custom_objective", "paper_check"])
def test_an_example_runs_as_a_script(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def _float64() -> object:
    import torch

    return torch.float64
