"""A tile that always fails, through the command line: the rest is finished, the error names it, and another run retries it.

The failure is in the model: an operation of the user's whose derivative cannot be taken in one direction. While a file says so,
it raises (or ends its process) when it meets the unit vector of one entry, which is one row of the Hessian.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from disthess.store.store import Store

FACTORY = """
import os
from pathlib import Path

import torch
import disthess

HERE, ROW = Path(__file__).parent, 70

class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient):
        return gradient.clone()

    @staticmethod
    def backward(ctx, direction):
        flat = direction.reshape(-1)
        if flat[ROW] == 1 and flat.count_nonzero() == 1:
            with (HERE / "tries").open("a") as file:
                file.write("x")
            if (HERE / "raise").exists():
                raise ArithmeticError("no derivative in this direction")
            if (HERE / "exit").exists():
                os._exit(7)
        return direction

class Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Slope.apply(gradient)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(6, 40)
        self.outer = torch.nn.Linear(40, 3)

    def forward(self, x):
        return self.outer(torch.nn.functional.linear(x, Value.apply(self.inner.weight), self.inner.bias).tanh())

def problem():
    torch.manual_seed(0)
    return disthess.Problem(Model(), loss="cross_entropy", batches=[(torch.randn(20, 6), torch.randint(0, 3, (20,)))])
"""
CONFIG = """
problem: {factory: poison.py:problem}
compute: {store: run.zarr, dtype: float64, method: autograd, threads: 1}
report: {eigenvalues: 0, blocks: 0, density: false, pictures: false}
"""
ROOT = str(Path(__file__).parents[2])


def run(folder: Path, executor: str) -> subprocess.CompletedProcess[str]:
    workers = "1" if executor == "serial" else "2"
    return subprocess.run(
        [sys.executable, "-m", "disthess", "run", "run.yaml", "--executor", executor, "--workers", workers],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "fault", "tries"),
    [
        ("serial", "raise", 2),
        ("threads", "raise", 2),
        ("processes", "raise", 3),
        ("processes", "exit", 3),
        ("ray", "raise", 3),
        ("ray", "exit", 3),
    ],
)
def test_a_tile_that_always_fails_is_named_and_retried_by_the_next_run(
    executor: str, fault: str, tries: int, tmp_path: Path
) -> None:
    (tmp_path / "poison.py").write_text(FACTORY)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / fault).touch()
    failed = run(tmp_path, executor)
    assert failed.returncode == 1, failed.stderr[-3000:]
    store = Store.open(tmp_path / "run.zarr")
    (tile,) = (store.layout.tiles[number] for number in store.missing_tiles())
    assert tile.source == "inner.weight"
    assert tile.span.start <= 70 < tile.span.stop
    last = failed.stderr.strip().splitlines()[-1]
    place = f"tile {tile.index} (inner.weight, rows {tile.span.start} to {tile.span.stop - 1})"
    assert last.startswith(f"disthess: 1 of {len(store.layout.tiles)} tiles failed for good ({place}: ")
    assert "Traceback" not in failed.stderr
    reason = "no derivative in this direction" if fault == "raise" else "process of its worker died"
    assert reason in last
    assert list(store.quarantined()) == [tile.index]
    assert (tmp_path / "tries").stat().st_size == tries
    again = run(tmp_path, executor)
    assert (again.returncode, (tmp_path / "tries").stat().st_size) == (1, 2 * tries)
    (tmp_path / fault).unlink()
    assert run(tmp_path, executor).returncode == 0
    assert (store.missing_tiles(), store.quarantined()) == ((), {})
    check_against_torch(store)


def check_against_torch(store: Store) -> None:
    """The rows that failed at first, against the dense Hessian of the same function without its trap."""
    from disthess.reduce.hessian_store import HessianStore

    torch.manual_seed(0)
    inner, outer = torch.nn.Linear(6, 40).double(), torch.nn.Linear(40, 3).double()
    x, y = torch.randn(20, 6), torch.randint(0, 3, (20,))

    def loss(weight: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.linear(x.double(), weight.reshape(40, 6), inner.bias).tanh()
        return torch.nn.functional.cross_entropy(outer(hidden), y)

    wanted = torch.autograd.functional.hessian(loss, inner.weight.detach().reshape(-1))
    np.testing.assert_allclose(HessianStore(store).block("inner.weight", "inner.weight"), wanted.numpy(), atol=1e-12)
