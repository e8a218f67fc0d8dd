"""The Hessian of a problem by products alone: nothing stored but what its batches need to be multiplied."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from disthess import hvp
from disthess.errors import DisthessError
from disthess.execute.heap import KeptHeap
from disthess.graph.program import Program, build_programs
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.problem import Problem, batch_tensors
from disthess.sweep.flat import FlatProducts
from disthess.sweep.primal import compute_primal

Way = Literal["sweep", "tape", "batched tape"]

CHUNKS = (16, 8, 4, 2, 1)
"""Vectors multiplied at once: more of them fall out of cache, other numbers are sums of these."""

TAPED = 8
"""Most vectors at once where there is no recording, or one of more would not fit; more of them never go through a tape together."""

SWEEP_NUMEL = 1 << 20
"""Most parameters for which the sweep is recorded. Beyond, products of matrices take nearly all of the time, the tape is at
their number already, and capturing the model costs as much as many products."""

SWEEP_BATCHES = 16
"""Most batches for which it is: each has a recording of its own."""

CHECK = 2000
"""Largest disagreement of sweep and tape that is rounding, in units of the dtype's last place."""

PREFER = 0.8
"""Factor of the sweep's time when ways are compared."""

TURNS = 3
"""Times that every way is timed; the shortest counts."""


@final
class HessianOperator(AbstractSymmetricOperator):
    """``x -> H x`` at the parameters as they are now, all batches and weight decay.

    Every number of vectors that are multiplied at once has its own way, the fastest of those that are there:

    * ``sweep``: the graph sweep from the vectors, recorded and played (`disthess.sweep.flat`). Only for models that can be
      captured, and only after a product with random vectors agrees with the tape's to rounding.
    * ``tape``: ``vjp`` of the gradient, taped once per batch, vector by vector.
    * ``batched tape``: the same for all of them, by torch's batching rules.

    Of more than `SWEEP_NUMEL` parameters all products are the tape's, and memory that this process frees stays with it until the
    operator is gone (`disthess.execute.heap`).

    Which is fastest is measured on the first block of that size. Two operators may therefore differ by rounding, as the ways
    do; one operator does not change its mind.

    Args:
        problem: In the dtype of the products.
        names: Parameters, first names.
        size: Their entries.
        programs: The captured batches, where they are known, none for a model that cannot be captured; else they are captured
            here. Their parameters are the problem's, at whatever point.

    Attributes:
        reason: Why there is no sweep; empty if there is one.
        programs: The captured batches, for an operator at another point; none where there is no sweep.
    """

    def __init__(
        self, problem: Problem, names: Sequence[str], size: int, programs: Sequence[Program] | None = None
    ) -> None:
        if size > SWEEP_NUMEL:
            # Until the operator is gone: its vectors are large blocks of the same sizes again and again.
            weakref.finalize(self, KeptHeap(large=True).restore)
        self._tapes = [hvp.GradientTape(problem, index, names) for index in range(len(problem.batches))]
        self._decay = hvp.decay_diagonal(problem, names) if any(problem.weight_decay.values()) else None
        self._size = size
        self._dtype = problem.dtype
        self._flats: list[FlatProducts] = []
        self._ways: dict[int, Way] = {}
        self.programs: Sequence[Program] = ()
        self.reason = self._capture(problem, names, programs)
        if self._flats:
            self._ways[1] = self._fastest(1)

    @property
    @override
    def size(self) -> int:
        return self._size

    @property
    @override
    def dtype(self) -> np.dtype:
        return np.dtype(str(self._dtype).removeprefix("torch."))

    @property
    def method(self) -> Literal["sweep", "tape"]:
        """Whether the sweep is there to be chosen, or all products are the tape's; see ``reason``."""
        return "sweep" if self._flats else "tape"

    @property
    def ways(self) -> Mapping[int, Way]:
        """The way of each number of vectors at once that has been chosen so far."""
        return dict(self._ways)

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        # Rows are vectors here, so that a block of columns one after the other (Fortran order) is neither copied in nor out.
        rows = torch.from_numpy(np.ascontiguousarray(block.T)).to(self._dtype)
        total = torch.empty_like(rows)
        start = 0
        while start < len(rows):
            count = next(count for count in CHUNKS if count <= len(rows) - start and self._takes(count))
            here = slice(start, start + count)
            self._multiply(rows[here], total[here])
            start += count
        if self._decay is not None:
            total.addcmul_(rows, self._decay)
        return total.numpy().T

    def _takes(self, count: int) -> bool:
        """Whether so many vectors are ever multiplied at once here."""
        return count <= TAPED or (bool(self._flats) and all(flat.fits(count) for flat in self._flats))

    def _multiply(self, vectors: Tensor, out: Tensor) -> None:
        count = len(vectors)
        if count not in self._ways:
            self._ways[count] = self._fastest(count)
        self._by(self._ways[count], vectors, out)

    def _by(self, way: Way, vectors: Tensor, out: Tensor) -> None:
        if way == "tape":
            for vector, row in zip(vectors, out, strict=True):
                self._tapes[0].product(vector, out=row)
                for tape in self._tapes[1:]:
                    row += tape.product(vector)
            return
        one = [flat.products for flat in self._flats] if way == "sweep" else [tape.products for tape in self._tapes]
        out.copy_(one[0](vectors))
        for products in one[1:]:
            out += products(vectors)

    def _capture(self, problem: Problem, names: Sequence[str], programs: Sequence[Program] | None) -> str:
        if self._size > SWEEP_NUMEL:
            return f"more than {SWEEP_NUMEL:,} parameters: the tape is as fast"
        if len(problem.batches) > SWEEP_BATCHES:
            return f"more than {SWEEP_BATCHES} batches, each of which would be recorded"
        if programs is not None and not programs:
            return "the model cannot be captured"
        # A copy: the model's own tensors may move on.
        tensors = {parameter.name: parameter.tensor.detach().clone() for parameter in problem.parameters()}
        chosen = {name: tensors[name] for name in names}
        try:
            self.programs = build_programs(problem, frozenset(names)) if programs is None else programs
            for program, batch, weight in zip(self.programs, problem.batches, problem.weights, strict=True):
                primal = compute_primal(program.graph, tensors, batch_tensors(batch), program.constants, weight)
                self._flats.append(FlatProducts(primal, chosen))
        except (DisthessError, RuntimeError, NotImplementedError) as reason:
            return self._give_up(f"the model cannot be captured: {' '.join(str(reason).split())[:300]}")
        return ""

    def _give_up(self, reason: str) -> str:
        self._flats = []
        self._ways = {}
        self.programs = ()
        return reason

    def _fastest(self, count: int) -> Way:
        """Check the sweep for so many vectors, and time all ways."""
        if self._size > SWEEP_NUMEL:
            return "tape"
        generator = torch.Generator().manual_seed(count)
        vectors = torch.randn(count, self._size, generator=generator, dtype=self._dtype)
        if self._flats and all(flat.fits(count) for flat in self._flats):
            wrong = self._disagreement(vectors, torch.randn(count, generator=generator, dtype=self._dtype))
            if wrong:
                self.reason = self._give_up(wrong)
        ways: dict[Way, Tensor] = {"tape": vectors[:1]}
        if 1 < count <= TAPED:
            ways["batched tape"] = vectors
        if self._flats and all(flat.fits(count) for flat in self._flats):
            ways["sweep"] = vectors
        best = self._seconds(ways)
        # The sweep is the fastest nearly always: a disturbed clock must not talk it out of it.
        return min(best, key=lambda way: best[way] * (PREFER if way == "sweep" else 1.0))

    def _disagreement(self, vectors: Tensor, weights: Tensor) -> str:
        """What is wrong with the sweep's products, by one of the tape's: ``H (sum w_k v_k) = sum w_k H v_k``; or empty."""
        found, wanted = torch.empty_like(vectors), vectors.new_empty(1, self._size)
        try:
            self._by("sweep", vectors, found)
        except (DisthessError, RuntimeError, NotImplementedError) as reason:
            return f"the sweep cannot be recorded: {' '.join(str(reason).split())[:300]}"
        self._by("tape", (weights @ vectors).unsqueeze(0), wanted)
        error, scale = float((weights @ found - wanted[0]).norm()), float((weights.abs() @ found.abs()).norm())
        # Written so that NaN, which compares with nothing, is a disagreement.
        if not error <= CHECK * torch.finfo(self._dtype).eps * max(scale, torch.finfo(self._dtype).tiny):
            return f"the sweep's products differ from the tape's by {error / max(scale, 1e-300):.1e} (relative)"
        return ""

    def _seconds(self, ways: Mapping[Way, Tensor]) -> dict[Way, float]:
        """Shortest of `TURNS` turns per vector; the ways take turns, so that all see the same disturbances."""
        best: dict[Way, float] = dict.fromkeys(ways, float("inf"))
        for _ in range(TURNS):
            for way, vectors in ways.items():
                out = torch.empty_like(vectors)
                begin = time.perf_counter()
                self._by(way, vectors, out)
                best[way] = min(best[way], (time.perf_counter() - begin) / len(vectors))
        return best
