"""Products with the Hessian of an audited problem, by whom the audit file says."""

from __future__ import annotations

from collections.abc import Sequence

from disthess.audit_config import MeasureSection
from disthess.parallel import ParallelOperator, operator
from disthess.problem import Problem


def make_operator(problem: Problem, names: Sequence[str], section: MeasureSection) -> ParallelOperator:
    """The operator of an audit; to be closed.

    `disthess.matrixfree.HessianOperator` is faster for small models, since it takes the fastest of several ways; but which, a clock
    decides, and so its last digits may differ from one audit to the next. Those of this one do not.

    Args:
        problem: In the dtype of the audit.
        names: Parameters, first names.
        section: Who computes.
    """
    return operator(
        problem,
        executor=section.executor,
        workers=section.workers,
        threads=section.threads,
        parameters=list(names),
        device=section.device,
        address=section.address,
    )
