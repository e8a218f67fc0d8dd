"""What the kinds of Newton steps differ in: how a step comes from the quadratic model, and what its success changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from disthess.linalg.model import QuadraticModel

Kind = Literal["plain", "damped", "trust", "cubic"]
LineSearch = Literal["none", "armijo", "exact"]
Damping: TypeAlias = float | Callable[[int], float]
"""A number, or a function of the step's number."""

DAMPING: dict[Kind, float] = {"plain": 0.0, "damped": 1.0, "trust": 1.0, "cubic": 0.0}
"""Unless given."""


@dataclass(slots=True)
class NewtonRule:
    """A kind with its numbers; ``damping`` and ``weight`` move with success."""

    kind: Kind
    damping: Damping
    weight: float
    step_size: float
    line_search: LineSearch

    @property
    def adapts(self) -> bool:
        """Whether steps are judged by the model, and taken back if they disagree with it."""
        return self.kind in ("trust", "cubic")

    @property
    def leaves_saddles(self) -> bool:
        """Whether it goes on from a stationary point with negative curvature."""
        return self.adapts

    def propose(self, model: QuadraticModel, number: int) -> tuple[np.ndarray, float]:
        """Step ``number`` in the model's eigenvectors, and the shift of the Hessian behind it.

        Raises:
            ZeroDivisionError: The shifted matrix is singular.
        """
        if self.kind == "cubic":
            return model.cubic(self.weight)
        shift = self._damping(number)
        if self.kind != "plain":
            shift += max(0.0, -model.smallest)
            if model.smallest + shift <= 0:
                shift = -model.smallest + 1e-8 * max(1.0, float(np.abs(model.eigenvalues).max()))
        return model.newton(shift), shift

    def adapt(self, accepted: bool) -> None:
        """Trust the model more after a step that was accepted, less after another."""
        factor = 0.25 if accepted else 4.0
        if self.kind == "trust":
            damping = self._damping(0)
            self.damping = damping * factor if damping > 1e-12 or accepted else 1e-3
        elif self.kind == "cubic":
            self.weight = max(self.weight * factor, 1e-12)

    def _damping(self, number: int) -> float:
        return self.damping(number) if callable(self.damping) else self.damping
