"""Strips of chunks of a cache: computed, checked against another product of the eager model, written, and then marked."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from disthess.errors import CertificateError, DisthessError
from disthess.execute.tied import moved, tied_operations
from disthess.problem import Problem
from disthess.store.cache import CacheStore, ChunkRecord
from disthess.sweep.region import Piece, RegionEngine
from disthess.types import Span

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
"""Largest ``|B x - y|`` that passes for a strip B, in units of ``|B|_F``; x has independent standard normal entries."""

DIFFERENCE_TOLERANCE = 1e-5
"""The same against central differences, which are asked where torch has no forward mode for the model."""

STEPS = (1e-5, 1e-6, 1e-7, 1e-8)
"""Of these differences, relative to the norm of the parameters that move: a kink may lie within one, an error is there at all."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Chunks computed together: the rows (or columns) of chunks number ``along``, against those of ``others``.

    Attributes:
        along: Number of the chunks' rows, or of their columns.
        others: Numbers of their columns, or of their rows, sorted.
    """

    along: int
    others: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """A strip that passed its check.

    Attributes:
        values: In the dtype that they were computed in.
        error: ``|B x - y| / |B|_F``.
        against: What ``y`` is.
    """

    values: Tensor
    error: float
    against: str


def strips_of(missing: Sequence[tuple[int, int]]) -> list[Strip]:
    """Chunks grouped so that few unit vectors answer for all: by rows or by columns, whichever are fewer.

    Where both are as many, by columns, which come later in the model: to pull the later gradient back took half the time.

    >>> strips_of([(0, 1), (0, 2)])
    [Strip(along=0, others=(1, 2))]
    """
    rows: dict[int, list[int]] = {}
    columns: dict[int, list[int]] = {}
    for row, column in missing:
        rows.setdefault(row, []).append(column)
        columns.setdefault(column, []).append(row)
    fewer = rows if len(rows) < len(columns) else columns
    return [Strip(along, tuple(sorted(others))) for along, others in sorted(fewer.items())]


def pieces_of(store: CacheStore, numbers: Sequence[int]) -> tuple[Piece, ...]:
    """The entries of these rows of chunks, parameter by parameter."""
    found = []
    for number in numbers:
        span, start = store.span(number), 0
        for parameter in store.parameters:
            low, high = max(span.start, start), min(span.stop, start + parameter.numel)
            if low < high:
                found.append(Piece(parameter.name, Span(low - start, high - start)))
            start += parameter.numel
    return tuple(found)


@final
class StripWorker:
    """Computes strips of chunks: data, check, then the ledger.

    Args:
        problem: In the store's dtype or wider, on the device that computes.
        store: Open for writing.
        memory_bytes: What tape and vectors may take.
    """

    def __init__(self, problem: Problem, store: CacheStore, memory_bytes: int) -> None:
        self._problem = problem
        self._store = store
        self._memory_bytes = memory_bytes
        self._engine = RegionEngine(problem, memory_bytes)
        self._wide_engine: RegionEngine | None = self._engine if problem.dtype == torch.float64 else None
        self._row_norm: float | None = None

    def compute(self, strip: Strip) -> None:
        """Compute, check and write the chunks of a strip.

        Raises:
            CertificateError: They disagree with another product; none of them is written. It says if a kink is why.
        """
        begin = time.perf_counter()
        try:
            checked = self._checked(strip)
        except CertificateError as error:
            if self._passes_beside(strip):
                raise self._kinked(strip) from error
            raise
        array = checked.values.to(getattr(torch, self._store.dtype)).cpu().numpy()
        seconds, left = time.perf_counter() - begin, 0
        dtype = str(checked.values.dtype).removeprefix("torch.")
        for other in strip.others:
            width = self._store.span(other).size
            piece = array[:, left : left + width] if strip.along <= other else array[:, left : left + width].T
            left += width
            row, column = min(strip.along, other), max(strip.along, other)
            if row == column:
                piece = np.triu(piece) + np.triu(piece, 1).T
            checksum = self._store.write(row, column, np.ascontiguousarray(piece))
            self._store.mark(ChunkRecord(row, column, checksum, checked.error, checked.against, dtype, seconds))

    def _checked(self, strip: Strip) -> Checked:
        """In the store's dtype if that passes, else in float64, to be rounded."""
        rows, columns = self._sides(strip)
        vector = torch.randn(
            sum(piece.span.size for piece in columns),
            generator=torch.Generator().manual_seed(strip.along),
            dtype=torch.float64,
        )
        if self._problem.dtype == torch.float32:
            values = self._engine.region(rows, columns)
            pushed, way, independent = self._engine.push(rows, columns, vector.to(values))
            error = _relative(values @ vector.to(values) - pushed, float(values.norm()))
            if error <= TOLERANCE["float32"]:
                self._compare_differences(independent, values, rows, columns, vector)
                return Checked(values, error, way)
        engine = self._wide()
        values = engine.region(rows, columns)
        given = vector.to(values)
        pushed, way, independent = engine.push(rows, columns, given)
        error = _relative(values @ given - pushed, float(values.norm()))
        if not error <= TOLERANCE["float64"]:
            # A block that is zero but for rounding is measured by what such a block of this Hessian has on average.
            error = _relative(values @ given - pushed, max(float(values.norm()), self._typical(values)))
        if not error <= TOLERANCE["float64"]:
            raise _disagreement(rows, columns, way, error, TOLERANCE["float64"])
        self._compare_differences(independent, values, rows, columns, vector)
        return Checked(values, error, way)

    def _sides(self, strip: Strip) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        return pieces_of(self._store, (strip.along,)), pieces_of(self._store, strip.others)

    def _names(self, strip: Strip) -> tuple[str, ...]:
        return tuple(dict.fromkeys(piece.name for side in self._sides(strip) for piece in side))

    def _passes_beside(self, strip: Strip) -> bool:
        """Whether the strip passes with its weights moved a little: a kink is left behind then, an error is not."""
        beside = StripWorker(moved(self._problem, self._names(strip)), self._store, self._memory_bytes)
        try:
            beside._checked(strip)
        except DisthessError:
            return False
        return True

    def _kinked(self, strip: Strip) -> CertificateError:
        rows, columns = self._sides(strip)
        return CertificateError(
            f"the block of {_shown(rows)} by {_shown(columns)} has no one value: the weights lie on a kink of the objective. With "
            f"these weights moved a little it passes its check; here {tied_operations(self._problem, self._names(strip))}. Nothing "
            f"of it is kept. Move the weights off the kink, or replace the operation by a smooth one (under a root or a norm of 0 "
            f"add a small constant). disthess.clarke_hessian gives the Hessian of every smooth piece that meets there."
        )

    def _compare_differences(
        self, independent: bool, values: Tensor, rows: Sequence[Piece], columns: Sequence[Piece], vector: Tensor
    ) -> None:
        """Where the other product went through the same formulas, ask differences of the gradient as well.

        Raises:
            CertificateError: They disagree.
        """
        if independent:
            return
        engine, scale = self._wide(), max(float(values.norm()), self._typical(values))
        found = values.double() @ vector.to(values.device)
        errors = []
        for step in STEPS:
            wanted = engine.difference(rows, columns, vector.to(values.device), step)
            errors.append(_relative(found - wanted, scale))
            if errors[-1] <= DIFFERENCE_TOLERANCE:
                return
        raise _disagreement(rows, columns, "central differences of its gradient", min(errors), DIFFERENCE_TOLERANCE)

    def _typical(self, values: Tensor) -> float:
        """Frobenius norm that a block of this shape has on average, from one product with the whole Hessian."""
        everything = [Piece(p.name, Span(0, p.numel)) for p in self._store.parameters]
        if self._row_norm is None:
            generator = torch.Generator().manual_seed(0)
            vector = torch.randn(self._store.numel, generator=generator, dtype=torch.float64).to(values.device)
            pushed, _, _ = self._wide().push(everything, everything, vector)
            self._row_norm = float(pushed.norm()) / math.sqrt(self._store.numel)
        return self._row_norm * math.sqrt(values.numel() / self._store.numel)

    def _wide(self) -> RegionEngine:
        if self._wide_engine is None:
            device = self._problem.parameters()[0].tensor.device
            self._wide_engine = RegionEngine(self._problem.to(torch.float64, device), self._memory_bytes)
        return self._wide_engine


def _relative(difference: Tensor, scale: float) -> float:
    """NaN stays NaN, which passes no check."""
    size = float(difference.norm())
    return 0.0 if size == 0 else size / scale if scale else math.inf


def _disagreement(
    rows: Sequence[Piece], columns: Sequence[Piece], way: str, error: float, allowed: float
) -> CertificateError:
    return CertificateError(
        f"the block of {_shown(rows)} by {_shown(columns)} disagrees with another product of the eager model ({way}): relative "
        f"error {error:.2e}, allowed {allowed:.0e}. Nothing of it is kept. An operation of the model has a wrong second derivative "
        f"in torch, or rounds to float32 inside, or the weights are not finite; replace it by elementary operations."
    )


def _shown(pieces: Sequence[Piece]) -> str:
    first = f"{pieces[0].name}[{pieces[0].span.start}:{pieces[0].span.stop}]"
    return first if len(pieces) == 1 else f"{first} and {len(pieces) - 1} more pieces"
