"""What an audit would cost: products by what they are for, seconds, bytes; before anything is measured.

At most so many, and as many as the last audit of the same subject took, where there is one. Seconds are its own, or by a product
that is timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from disthess import hvp
from disthess.audits.earlier import EarlierAudit
from disthess.audits.meter import Part
from disthess.audits.operators import make_operator
from disthess.audits.subject import KRYLOV, Subject
from disthess.units import human_bytes, human_seconds

TOGETHER = 8
"""Vectors of a timed product."""

TURNS = 2
"""Products timed; the first of them warms up."""


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """The cost of an audit.

    Attributes:
        title: Model and objective.
        size: Parameters audited, P.
        checkpoints: Names of those that would be audited.
        known: How many more are in the history already.
        parts: Products of one checkpoint, at most.
        product_seconds: Of one product, as timed here, or by an earlier audit with all that is done between.
        gradient_seconds: Of loss, gradient and tape; 0 where an earlier audit's seconds have them.
        vector_bytes: Memory for vectors at most.
        product_bytes: Memory of those who take products, at most: libraries, model, batches and tapes.
        earlier: The last audit of the same subject, by which products and perhaps seconds are expected; None where there is none.
    """

    title: str
    size: int
    checkpoints: tuple[str, ...]
    known: int
    parts: tuple[Part, ...]
    product_seconds: float
    gradient_seconds: float
    vector_bytes: int
    product_bytes: int
    earlier: EarlierAudit | None = None

    @property
    def exact(self) -> bool:
        """Whether that many products are taken, and not at most."""
        return not any(map(_may_end, self.parts))

    @property
    def products(self) -> int:
        """Of one checkpoint, at most."""
        return sum(part.products for part in self.parts)

    @property
    def seconds(self) -> float:
        """Of all checkpoints, at most, but for loading and what is done between products."""
        return len(self.checkpoints) * (self.products * self.product_seconds + self.gradient_seconds)

    @property
    def expected_products(self) -> int:
        """Of one checkpoint, as many as the last time; at most where nothing is known."""
        return self.products if self.earlier is None else self.earlier.products

    @property
    def expected_seconds(self) -> float:
        """Of all checkpoints."""
        return len(self.checkpoints) * (self.expected_products * self.product_seconds + self.gradient_seconds)

    @property
    def bytes(self) -> int:
        """Memory at most, all processes together."""
        return self.vector_bytes + self.product_bytes

    def describe(self) -> str:
        """A table for people."""
        rows = [
            f"audit of {self.title}, P = {self.size:,}",
            f"{'checkpoints':<34}{len(self.checkpoints):>12,}   {self._which()}",
        ]
        before = {} if self.earlier is None else self.earlier.parts
        for part in self.parts:
            most = "at most " if _may_end(part) else ""
            last = before.get(part.name, part.products)
            said = f", {last:,} the last time" if last != part.products else ""
            rows.append(f"{part.name:<34}{f'{most}{part.products:,}':>20} products{said}")
        most, around = ("", "about ") if self.exact else ("at most ", "at most ")
        per = f", each {self.product_seconds:.2g} s"
        rows.append(f"{'one checkpoint':<34}{f'{most}{self.products:,}':>20} products{per}")
        if self.earlier is None:
            rows.append(f"{'time':<34}{f'{around}{human_seconds(self.seconds)}':>20}")
        else:
            rows += self._expected(self.earlier, around)
        rows.append(
            f"{'memory':<34}{f'at most {human_bytes(self.bytes)}':>20}: vectors {human_bytes(self.vector_bytes)}, "
            f"products {human_bytes(self.product_bytes)}"
        )
        return "\n".join(rows)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; what was not timed is None."""
        return {
            "title": self.title,
            "parameters": self.size,
            "checkpoints": list(self.checkpoints),
            "known": self.known,
            "parts": {part.name: part.products for part in self.parts},
            "products": self.products,
            "exact": self.exact,
            "product_seconds": self.product_seconds,
            "gradient_seconds": self.gradient_seconds,
            "seconds": self.seconds,
            "expected": None if self.earlier is None else self._expected_json(self.earlier),
            "vector_bytes": self.vector_bytes,
            "product_bytes": self.product_bytes,
            "bytes": self.bytes,
        }

    def _expected(self, earlier: EarlierAudit, around: str) -> list[str]:
        said = f"{earlier.checkpoint} of {earlier.taken[:16].replace('T', ' ')}"
        speed = "seconds" if self._by_history else "products alone: other data, machine or processes; one is timed"
        return [
            f"{'expected, as the last time':<34}{f'{earlier.products:,}':>20} products: {said}",
            f"{'time':<34}{f'about {human_seconds(self.expected_seconds)}':>20}, {around}{human_seconds(self.seconds)}; "
            f"by that audit's {speed}",
        ]

    def _expected_json(self, earlier: EarlierAudit) -> dict[str, Any]:
        return {
            "checkpoint": earlier.checkpoint,
            "taken": earlier.taken,
            "parts": dict(earlier.parts),
            "products": earlier.products,
            "seconds": self.expected_seconds,
            "seconds_by": "the earlier audit" if self._by_history else "a timed product",
        }

    @property
    def _by_history(self) -> bool:
        return self.earlier is not None and not math.isnan(self.earlier.seconds)

    def _which(self) -> str:
        shown = ", ".join(self.checkpoints[:4]) + (", ..." if len(self.checkpoints) > 4 else "")
        known = f"{self.known} more in the history" if self.known else ""
        return "; ".join(text for text in (shown, known) if text)


def _may_end(part: Part) -> bool:
    """Before all of its products: where residuals are small enough, or the gradient's Krylov space is exhausted."""
    return part.until_converged or part.name == KRYLOV


def make_plan(
    subject: Subject,
    names: tuple[str, ...],
    known: int,
    earlier: EarlierAudit | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> AuditPlan:
    """Plan the audit of some checkpoints.

    Where no earlier audit says how long a product takes, one is timed at the factory's weights.

    Args:
        subject: What is to be found.
        names: Of the checkpoints.
        known: How many are in the history already.
        earlier: The last audit of the same subject.
        clock: Seconds.
    """
    problem = subject.bound()
    gradient_seconds = 0.0
    by_history = earlier is not None and not math.isnan(earlier.seconds)
    if not by_history:
        begin = clock()
        hvp.gradient(problem, subject.names)
        gradient_seconds = clock() - begin
    with make_operator(problem, subject.names, subject.config.measure) as operator:
        seconds = (
            earlier.seconds / earlier.products
            if earlier is not None and by_history
            else _product_seconds(operator.matmat, subject.size, operator.dtype, clock)
        )
        plan = operator.plan
    return AuditPlan(
        title=f"{type(problem.model).__name__}, {problem.recipe.title}",
        size=subject.size,
        checkpoints=names,
        known=known,
        parts=subject.parts(),
        product_seconds=seconds,
        gradient_seconds=2 * gradient_seconds,
        vector_bytes=subject.vector_bytes(),
        product_bytes=plan.workers * plan.worker_bytes,
        earlier=earlier,
    )


def _product_seconds(
    matmat: Callable[[np.ndarray], np.ndarray], size: int, dtype: np.dtype, clock: Callable[[], float]
) -> float:
    vectors = np.random.default_rng(0).standard_normal((size, TOGETHER)).astype(dtype, copy=False)
    found = []
    for _ in range(TURNS):
        begin = clock()
        matmat(vectors)
        found.append((clock() - begin) / vectors.shape[1])
    return min(found)
