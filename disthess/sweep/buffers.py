"""Where panel blocks of one tile add up, over microbatches, batches and uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
import torch
from torch import Tensor

from disthess.errors import ProblemError
from disthess.store.layout import PanelSpec
from disthess.types import Span


@final
class Buffers:
    """Blocks ``[rows, p_target]`` of one tile and part, by target key, zero until something is added.

    A key is a use name where uses are stored apart, else a parameter name.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self._rows = rows
        self._like = like
        self._blocks: dict[str, Tensor] = {}

    def block(self, key: str, columns: int) -> Tensor:
        """The block of a target, ``[rows, columns]``, to be added to in place."""
        if key not in self._blocks:
            self._blocks[key] = self._like.new_zeros(self._rows, columns)
        return self._blocks[key]

    def assemble(self, panel: PanelSpec, span: Span, drop: int, members: Mapping[str, tuple[str, ...]]) -> np.ndarray:
        """The tile's array for one panel: ``[span.size, columns - first_column]``.

        Args:
            panel: The panel.
            span: The tile's rows.
            drop: Buffer rows before the tile's first row (units that straddle its boundary).
            members: Keys that add up to each target of the panel.

        Raises:
            ProblemError: A block holds NaN or infinity.
        """
        first = panel.first_column(span.start)
        result = np.zeros((span.size, panel.columns - first), dtype=str(self._like.dtype).removeprefix("torch."))
        offset = 0
        for name, size in panel.targets:
            skip = max(0, first - offset)
            for key in members.get(name, ()):
                if skip < size and key in self._blocks:
                    piece = self._blocks[key][drop : drop + span.size, skip:].cpu().numpy()
                    where = result[:, offset + skip - first : offset + size - first]
                    np.add(where, piece, out=where)
            offset += size
        if not np.isfinite(result).all():
            raise ProblemError(
                f"rows {span.start} to {span.stop} of {panel.source} hold NaN or infinity: second derivatives overflow or are "
                "undefined at this point (a square root or norm at 0, a division by 0). Use float64, or move off that point."
            )
        return result


def default_like(tensors: Mapping[str, Tensor]) -> Tensor:
    """Any parameter, for dtype and device."""
    return next(iter(tensors.values())) if tensors else torch.zeros(())
