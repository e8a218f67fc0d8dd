"""Products of one batch's Hessian with many vectors by playing recordings of the sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from disthess.sweep.fuse import fuse
from disthess.sweep.primal import Primal
from disthess.sweep.probe import whole_products
from disthess.sweep.record import record
from disthess.sweep.replay import Player, player

RECORD_BYTES = 1 << 30
"""Most that a recording may hold while it is made."""

HELD = 8
"""Values that a recording holds per value of the graph and vector: tangent, cotangent and what is between them."""


@final
class FlatProducts:
    """``v -> H v`` of one batch: the sweep from given vectors, recorded once for each number of vectors, then played.

    Playing has no Python of rules, no autograd, and nothing that is the same for every vector in it. The parameters' values are
    those of the primal point, kept by it.

    Args:
        primal: The batch.
        parameters: Those whose Hessian it is, in the order of the vectors' entries.
    """

    def __init__(self, primal: Primal, parameters: Mapping[str, Tensor]) -> None:
        self._primal = primal
        self._parameters = {name: tensor.detach() for name, tensor in parameters.items()}
        self._players: dict[int, Player] = {}

    def fits(self, count: int) -> bool:
        """Whether recording so many vectors at once stays within `RECORD_BYTES`."""
        values = [value for value in self._primal.values if isinstance(value, Tensor) and value.is_floating_point()]
        entries = sum(value.numel() for value in values)
        width = max((value.element_size() for value in values), default=4)
        return entries * width * HELD * count <= RECORD_BYTES

    def products(self, vectors: Tensor) -> Tensor:
        """``[K, P]`` from ``[K, P]``; the first call of each K records.

        Raises:
            GraphError: The sweep of this graph cannot be recorded.
        """
        given = vectors.detach().contiguous()
        with torch.no_grad():
            if len(given) not in self._players:
                self._players[len(given)] = self._record(given)
            return self._players[len(given)](given)[0]

    def _record(self, like: Tensor) -> Player:
        # Other vectors than those to come: whatever were wrongly taken for a constant then shows when products are checked.
        generator = torch.Generator().manual_seed(0)
        point = torch.randn(like.shape, generator=generator, dtype=like.dtype)

        def sweep(vectors: Tensor) -> tuple[Tensor, ...]:
            return (whole_products(self._primal, self._parameters, vectors),)

        return player(fuse(record(sweep, [point])))
