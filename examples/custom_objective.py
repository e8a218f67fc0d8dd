"""Any scalar of model and batch: here a robust loss with weight decay, on batches that are dicts, one of them heavier.

Run it: python examples/custom_objective.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import disthess


def objective(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Weighted mean of ``log cosh`` errors, plus weight decay."""
    errors = model(batch["inputs"]).squeeze(-1) - batch["targets"]
    robust = (batch["importance"] * (errors.cosh().log())).sum() / batch["importance"].sum()
    return robust + 0.5e-2 * sum((parameter**2).sum() for parameter in model.parameters())


def problem(samples: int = 40, seed: int = 0) -> disthess.Problem:
    """A regression with two batches of weights 1 and 3."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 1))
    batches = [
        {"inputs": torch.randn(samples, 5), "targets": torch.randn(samples), "importance": torch.rand(samples)}
        for _ in range(2)
    ]
    return disthess.Problem(model, objective=objective, batches=batches, weights=[1.0, 3.0])


def main() -> None:
    """Print the extreme eigenvalues of the Hessian of that scalar."""
    with tempfile.TemporaryDirectory() as folder:
        store = disthess.compute(problem(), f"{folder}/custom.zarr", dtype="float64", progress=False)
        found = disthess.eigenvalues(store, k=3)
        for value, residual in zip(found.values, found.residuals, strict=True):
            print(f"{value: .6f}   ||Hv - lambda v|| = {residual:.1e}")


if __name__ == "__main__":
    main()
