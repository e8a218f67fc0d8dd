"""Every block of a Hessian in few numbers: eigenvalues at both ends, trace, ranks, negative mass, density."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from disthess.blocks import Blocks, find_blocks
from disthess.errors import ConfigError
from disthess.linalg.block_map import Places
from disthess.linalg.estimate import Estimate
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.linalg.quadrature import Spread
from disthess.linalg.restricted import RestrictedOperator
from disthess.linalg.summary import SUMMARY, Effort, summarise_operator
from disthess.matrixfree import HessianOperator
from disthess.preflight import check_dtype, check_parameters, check_problem
from disthess.prepare import select_parameters
from disthess.problem import Problem
from disthess.types import DType


@final
@dataclass(frozen=True, slots=True)
class BlockSummary:
    """One block.

    Attributes:
        name: Of the block.
        size: Its entries, n; the numbers are of its n x n matrix.
        estimates: By metric, each with its interval and how it was made.
        density: Of its eigenvalues.
        products: Hessian-vector products taken.
    """

    name: str
    size: int
    estimates: tuple[Estimate, ...]
    density: Spread | None
    products: int

    def find(self, metric: str) -> Estimate | None:
        """The estimate; None where it was not asked for."""
        return next((found for found in self.estimates if found.metric == metric), None)

    def value(self, metric: str) -> float:
        """Its number; NaN where it was not asked for."""
        found = self.find(metric)
        return float("nan") if found is None else found.value

    def to_json(self) -> dict[str, Any]:
        """Numbers that are not defined are None."""
        numbers = {
            entry.metric: {
                "value": _plain(entry.value), "low": _plain(entry.low), "high": _plain(entry.high),
                "confidence": entry.confidence, "how": entry.how,
            }
            for entry in self.estimates
        }  # fmt: skip
        return {"block": self.name, "entries": self.size, "products": self.products, **numbers}


def summarise(
    of: Problem | AbstractSymmetricOperator,
    *,
    blocks: Blocks | Mapping[str, Places] = "parameters",
    parameters: str | Sequence[str] | None = None,
    dtype: DType | None = None,
    metrics: Sequence[str] = SUMMARY,
    effort: Effort | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[BlockSummary, ...]:
    """Largest and smallest eigenvalue, trace, norm, ranks, negative mass and density of every block, each with an interval.

    Blocks of up to 300 entries are formed and exact. Larger ones are known by products: nothing of size n x n is kept. A product
    of a block costs one of the Hessian.

    Args:
        of: A problem, or any symmetric operator.
        blocks: ``parameters``, ``modules``, ``roles`` (q, k, v, o, gate, up, down, norms, embeddings by their usual names), or
            patterns by name, such as ``{"q": "*.in_proj_weight[0:64]", "norms": ["*norm*"], "o": "@o"}``; see `disthess.blocks`.
            Of an operator: places of entries by name.
        parameters: Globs of the parameters that count at all; default all trainable ones. Others are constants.
        dtype: Of the products, default the model's.
        metrics: What to find; default everything.
        effort: Probes, steps, tolerance, confidence, seed, memory.
        progress: Called with (blocks done, blocks).

    Returns:
        One summary per block, in the order of the blocks.

    Raises:
        ConfigError: A pattern matches nothing, a metric is unknown, or the effort is none.
        ProblemError: The problem has no Hessian as given: NaN in its data, a random objective.

    Example:
        >>> model = torch.nn.Linear(2, 1).double()
        >>> problem = Problem(model, loss="mse", batches=[(torch.eye(2).double(), torch.zeros(2, 1).double())])
        >>> [(block.name, block.value("trace")) for block in summarise(problem)]
        [('weight', 2.0), ('bias', 2.0)]
    """
    effort = Effort() if effort is None else effort
    unknown = [metric for metric in metrics if metric not in SUMMARY]
    if effort.trouble() or unknown:
        raise ConfigError(f"{effort.trouble() or f'unknown metrics {unknown}; there are ' + ', '.join(SUMMARY)}.")
    if not isinstance(of, (Problem, AbstractSymmetricOperator)):
        raise ConfigError(
            f"expected a problem or a symmetric operator, got {type(of).__name__}. Make a problem as "
            "disthess.Problem(model, loss='cross_entropy', batches=[(x, y)])."
        )
    operator, places = (
        _of_problem(of, blocks, parameters, dtype) if isinstance(of, Problem) else (of, _plain_places(blocks))
    )
    found = []
    for done, (name, where) in enumerate(places.items(), 1):
        found.append(summarise_block(operator, name, where, effort, metrics))
        if progress is not None:
            progress(done, len(places))
    return tuple(found)


def summarise_block(
    operator: AbstractSymmetricOperator, name: str, places: Places, effort: Effort, metrics: Sequence[str] = SUMMARY,
    watch: Callable[[int, float], None] | None = None,
    phase: Callable[[str], AbstractContextManager[None]] = lambda part: nullcontext(),
) -> BlockSummary:  # fmt: skip
    """The summary of one block of an operator."""
    inner = RestrictedOperator(operator, places)
    made = summarise_operator(inner, block=name, effort=effort, metrics=metrics, watch=watch, phase=phase)
    return BlockSummary(name, inner.size, made.estimates, made.spread, made.products)


def _of_problem(
    problem: Problem, blocks: Any, parameters: str | Sequence[str] | None, dtype: DType | None
) -> tuple[AbstractSymmetricOperator, dict[str, Places]]:
    check_parameters(problem)
    check_dtype(problem, dtype)
    bound = problem if dtype is None else problem.to(torch.float64 if dtype == "float64" else torch.float32)
    names = select_parameters(bound, parameters)
    check_problem(bound, names)
    chosen = [parameter for parameter in bound.parameters() if parameter.name in names]
    places = find_blocks(bound.model, chosen, blocks)
    return HessianOperator(bound, names, sum(parameter.tensor.numel() for parameter in chosen)), places


def _plain_places(blocks: Any) -> dict[str, Places]:
    if not isinstance(blocks, Mapping) or not all(
        isinstance(places, (slice, np.ndarray)) for places in blocks.values()
    ):
        raise ConfigError("an operator knows no names: give blocks={'name': slice or array of places, ...}.")
    return dict(blocks)


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None
