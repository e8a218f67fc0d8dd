"""What the kinds of Newton steps differ in: how a step comes from the quadratic model, and what its success changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from disthess.linalg.model import QuadraticModel

Kind = Literal["plain", "damped", "trust", "cubic"]
LineSearch = Literal["none", "armijo", "exact"]


@dataclass(slots=True)
class NewtonRule:
    """A kind with its numbers; ``damping`` and ``weight`` move with success."""

    kind: Kind
    damping: float
    weight: float
    step_size: float
    line_search: LineSearch

    def propose(self, model: QuadraticModel) -> tuple[np.ndarray, float]:
        """A step in the model's eigenvectors, and the shift of the Hessian behind it.

        Raises:
            ZeroDivisionError: The shifted matrix is singular.
        """
        if self.kind == "cubic":
            return model.cubic(self.weight)
        shift = 0.0 if self.kind == "plain" else max(0.0, -model.smallest) + self.damping
        if self.kind != "plain" and model.smallest + shift <= 0:
            shift = -model.smallest + 1e-8 * max(1.0, float(np.abs(model.eigenvalues).max()))
        return model.newton(shift), shift

    def adapt(self, accepted: bool) -> None:
        """Trust the model more after a step that was accepted, less after another."""
        factor = 0.25 if accepted else 4.0
        if self.kind == "trust":
            self.damping = self.damping * factor if self.damping > 1e-12 or accepted else 1e-3
        elif self.kind == "cubic":
            self.weight = max(self.weight * factor, 1e-12)
