"""What computes tiles: the graph sweep, or autograd where the model cannot be captured."""

from __future__ import annotations

import abc

import numpy as np

from disthess.types import Part, Span


class AbstractEngine(abc.ABC):
    """Computes the rows of a source against all its targets."""

    @abc.abstractmethod
    def compute(self, source: str, span: Span, split: int = 0) -> dict[Part, list[np.ndarray]]:
        """Rows ``span`` of a source, for each part and each panel it writes.

        Args:
            source: Name of the source.
            span: Rows of its panels.
            split: How often the planned stack and microbatch are halved, to take less memory; numbers then agree to rounding.

        Returns:
            ``[span.size, columns - first_column(span.start)]`` per panel, in the layout's order.

        Raises:
            ProblemError: A second derivative is NaN or infinite.
        """
