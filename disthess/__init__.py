"""The exact Hessian of any PyTorch model, block by block, as an array you can query.

    problem = disthess.Problem(model, loss="cross_entropy", batches=[(x, y)])
    store = disthess.compute(problem, "run.zarr")
    store.block("fc1.weight", "fc2.bias")

The names below are loaded when first used: ``import disthess`` alone loads no torch, ray, zarr or dask.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disthess.api import compute as compute
    from disthess.api import eigenvalues as eigenvalues
    from disthess.api import low_rank as low_rank
    from disthess.api import low_rank_blocks as low_rank_blocks
    from disthess.api import open_store as open_store
    from disthess.api import plan as plan
    from disthess.api import psd_check as psd_check
    from disthess.api import reference_hessian as reference_hessian
    from disthess.api import solve as solve
    from disthess.api import spectral_density as spectral_density
    from disthess.api import trace as trace
    from disthess.audits.difference import diff as diff
    from disthess.audits.run import audit as audit
    from disthess.audits.run import plan_audit as plan_audit
    from disthess.bend import clarke_hessian as clarke_hessian
    from disthess.bend import node_curvature as node_curvature
    from disthess.bounds import rank_bounds as rank_bounds
    from disthess.comparison import compare as compare
    from disthess.couplings import coupling_map as coupling_map
    from disthess.expected import expected_hessian as expected_hessian
    from disthess.factors import kronecker as kronecker
    from disthess.factors import save_factors as save_factors
    from disthess.linalg.summary import Effort as Effort
    from disthess.mend import repair as repair
    from disthess.ondemand import open_cache as open_cache
    from disthess.parallel import operator as operator
    from disthess.problem import Problem as Problem
    from disthess.reduce.ray_cluster import dask_cluster as dask_cluster
    from disthess.reports.write import report as report
    from disthess.sections import attention_sections as attention_sections
    from disthess.steps import newton as newton
    from disthess.steps import stopping_report as stopping_report
    from disthess.summaries import summarise as summarise

__version__ = "0.1.0"

_HOMES = {
    "Problem": "disthess.problem",
    "plan": "disthess.api",
    "compute": "disthess.api",
    "open_store": "disthess.api",
    "reference_hessian": "disthess.api",
    "eigenvalues": "disthess.api",
    "spectral_density": "disthess.api",
    "low_rank": "disthess.api",
    "low_rank_blocks": "disthess.api",
    "trace": "disthess.api",
    "operator": "disthess.parallel",
    "rank_bounds": "disthess.bounds",
    "node_curvature": "disthess.bend",
    "psd_check": "disthess.api",
    "clarke_hessian": "disthess.bend",
    "expected_hessian": "disthess.expected",
    "solve": "disthess.api",
    "kronecker": "disthess.factors",
    "save_factors": "disthess.factors",
    "compare": "disthess.comparison",
    "diff": "disthess.audits.difference",
    "coupling_map": "disthess.couplings",
    "summarise": "disthess.summaries",
    "audit": "disthess.audits.run",
    "plan_audit": "disthess.audits.run",
    "Effort": "disthess.linalg.summary",
    "newton": "disthess.steps",
    "stopping_report": "disthess.steps",
    "attention_sections": "disthess.sections",
    "dask_cluster": "disthess.reduce.ray_cluster",
    "repair": "disthess.mend",
    "report": "disthess.reports.write",
    "open_cache": "disthess.ondemand",
}

__all__ = [
    "Problem",
    "plan",
    "compute",
    "open_store",
    "reference_hessian",
    "eigenvalues",
    "spectral_density",
    "low_rank",
    "low_rank_blocks",
    "trace",
    "operator",
    "rank_bounds",
    "node_curvature",
    "psd_check",
    "clarke_hessian",
    "expected_hessian",
    "solve",
    "kronecker",
    "save_factors",
    "compare",
    "diff",
    "coupling_map",
    "summarise",
    "audit",
    "plan_audit",
    "Effort",
    "newton",
    "stopping_report",
    "attention_sections",
    "dask_cluster",
    "repair",
    "report",
    "open_cache",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'disthess' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
