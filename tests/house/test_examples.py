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
pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SMALL = {
    "digits_mlp": {"hidden": 3, "steps": 5, "samples": 30},
    "digits_newton": {"hidden": 2, "samples": 20},
    "digits_cnn": {"channels": 2, "samples": 10},
    "tied_autoencoder": {"width": 6, "code": 3, "samples": 8},
    "custom_objective": {"samples": 10},
    "batch_norm": {"samples": 6},
    "unrolled_rnn": {"steps": 3, "width": 3, "samples": 6},
    "vae": {"samples": 6},
    "attention": {"width": 4, "samples": 4},
    "mixture_of_experts": {"experts": 3, "samples": 8},
    "unet": {"samples": 2},
    "gpt2_tiny": {"width": 4, "samples": 2},
    "gpt2_sized": {
        "width": 4,
        "heads": 2,
        "layers": 1,
        "words": 7,
        "positions": 5,
        "samples": 2,
        "tokens": 4,
        "batches": 2,
    },
}
TABLES = ("paper_check", "cost_growth")
"""Examples that print a table of many problems."""
PLANS = ("plan_7b",)
"""Examples of problems that are planned and not computed."""
LARGE = ("minilm",)
"""Examples of problems that are only multiplied by; tests/house/test_large_examples.py."""
SAVES = ("digits_checkpoints",)
"""Examples that save checkpoints for an audit."""
QUICK = ("paper_check",)
SCRIPTS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*SMALL, *TABLES, *PLANS, *SAVES)
    if name not in ("digits_mlp", "gpt2_sized")
]


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {
        *(*SMALL, *TABLES, *PLANS, *LARGE, *SAVES, "paper_architectures")
    }


@pytest.mark.parametrize("name", SMALL)
def test_an_example_gives_the_reference_hessian(tmp_path: Path, name: str) -> None:
    problem = load_problem(Source(f"examples/{name}.py:problem", SMALL[name], folders=(str(ROOT),)))
    store = disthess.compute(problem, tmp_path / "run.zarr", dtype="float64", progress=False)
    expected = np.asarray(disthess.reference_hessian(problem.to(_float64())))
    assert np.abs(store.dense() - expected).max() <= 1e-10 * np.abs(expected).max()


def test_an_example_is_a_module_as_well() -> None:
    assert load_problem(Source("examples.vae:problem", SMALL["vae"], folders=(str(ROOT),))).numel > 0


@pytest.mark.parametrize("name", SCRIPTS)
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
