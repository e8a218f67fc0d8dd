"""Blocks of a Hessian that nobody could store, computed when they are asked for and kept in a cache.

`open_cache` gives a `HessianCache`. Asking it for rows and columns reads the chunks that are there; with ``compute=True`` it
computes the others, checks them against another product of the eager model, and writes them, so that asking again takes none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from disthess.errors import ConfigError, PlanError, StoreError
from disthess.execute.memory import available_memory_bytes
from disthess.execute.strips import Strip, StripWorker, pieces_of, strips_of
from disthess.fingerprint import problem_fingerprint
from disthess.preflight import check_dtype, check_parameters, check_problem
from disthess.prepare import select_parameters
from disthess.problem import Problem
from disthess.reduce.places import Places, find_places
from disthess.store.cache import CacheStore, ChunkRecord
from disthess.store.fingerprint import differences
from disthess.store.layout import ParameterSpec
from disthess.store.lock import StoreLock
from disthess.store.place import place_of
from disthess.sweep.region import TapeBytes, needed_bytes
from disthess.types import ITEM_BYTES, DType
from disthess.units import human_bytes

CHUNK = 256
"""Rows and columns of a chunk: what is asked for is rounded outwards to whole ones."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What reading a region with ``compute=True`` would cost.

    Attributes:
        rows: Rows asked for.
        columns: Columns asked for.
        chunks: Chunks that they meet; of two that are each other's transposes one.
        missing: Those of them that have to be computed.
        products: Unit vectors to be multiplied by the Hessian, each through all batches.
        batches: Batches.
        written_bytes: What is added to the cache.
        result_bytes: What the answer takes in memory.
        peak_bytes: Bound of the memory that computing takes beside the model, at the narrowest: one vector at a time.
        budget_bytes: What it may take; many vectors at once where they fit.
    """

    rows: int
    columns: int
    chunks: int
    missing: int
    products: int
    batches: int
    written_bytes: int
    result_bytes: int
    peak_bytes: int
    budget_bytes: int

    def describe(self) -> str:
        """For people."""
        chunks = f"{self.chunks:,} chunk{'s' if self.chunks > 1 else ''}"
        head = f"{self.rows:,} x {self.columns:,} entries ({human_bytes(self.result_bytes)}) in {chunks}"
        if not self.missing:
            return f"{head}, all of which are there: nothing to compute"
        many = f" through {self.batches} batches" if self.batches > 1 else ""
        return (
            f"{head}, {self.missing:,} of which have to be computed: {self.products:,} Hessian-vector products{many}, "
            f"{human_bytes(self.written_bytes)} written, at least {human_bytes(self.peak_bytes)} and at most "
            f"{human_bytes(self.budget_bytes)} of memory beside the model"
        )


@final
class HessianCache:
    """Blocks of ``H = d2 L / d theta2`` that somebody asked for. ``disthess.open_cache`` gives one.

    Everything is in the objective's own scale, in ``named_parameters()`` order, each parameter flattened row-major. Rows and
    columns are given as a slice, a range or a number in ``range(P)``; as text, a parameter or ranges of one,
    ``"in_proj_weight[0:64]"`` or ``"weight[:, 64:128]"``; or as such a text and a slice of its entries,
    ``("in_proj_weight", slice(0, 1024))``.

    Args:
        store: The raw store.
        problem: In the store's dtype, for computing; None to read alone.
        memory_bytes: What computing may take beside the model; None for half of what is free.

    Attributes:
        products: Unit vectors multiplied by this object so far.
    """

    def __init__(self, store: CacheStore, problem: Problem | None = None, memory_bytes: int | None = None) -> None:
        self.store = store
        self.products = 0
        self._problem = problem
        self._memory_bytes = memory_bytes
        self._checked = False

    def __repr__(self) -> str:
        there = len(self.store.present())
        return f"HessianCache({self.path!r}, P={self.numel:,}, {self.dtype}, {there} chunks of {self.store.chunk})"

    @property
    def path(self) -> str:
        """Where it is."""
        return self.store.path

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """Parameters in user order."""
        return self.store.parameters

    @property
    def numel(self) -> int:
        """``P``."""
        return self.store.numel

    @property
    def dtype(self) -> DType:
        """Of the entries."""
        return self.store.dtype

    def block(self, a: Any, b: Any, *, compute: bool = False, progress: Progress | None = None) -> np.ndarray:
        """``d2 L / d a d b``, by the names that `read` takes; the same as ``read(a, b)``."""
        return self.read(a, b, compute=compute, progress=progress)

    def read(self, rows: Any, cols: Any, *, compute: bool = False, progress: Progress | None = None) -> np.ndarray:
        """Entries ``H[rows, cols]``.

        Args:
            rows: Which rows; see the class.
            cols: Which columns.
            compute: Compute what is not there yet, check it and keep it. While one process computes into a cache, another
                that wants to is refused.
            progress: Called with (products done, products).

        Returns:
            ``[rows, cols]`` in the cache's dtype; ``read(a, b)`` is exactly the transpose of ``read(b, a)``.

        Raises:
            UnknownNameError: No such parameter; near names are offered.
            ConfigError: Rows or columns are none.
            PlanError: The answer, or computing it, would take more memory than is allowed; with the sizes.
            StoreError: Something is not there and ``compute`` is False, a chunk is damaged, or another process computes.
            CertificateError: What was computed disagrees with another product of the eager model; nothing of it is kept. Where the
                weights lie on a kink, and the products therefore differ, it says so and names the operation.
        """
        top, left = find_places(self.parameters, rows), find_places(self.parameters, cols)
        self._check_result(top, left)
        pairs = self._pairs(top, left)
        missing = self._missing(pairs)
        if missing and not compute:
            raise StoreError(
                f"{len(missing)} of {len(pairs)} chunks of rows {top.text} by columns {left.text} are not in {self.path}. Ask with "
                f"compute=True (on the command line --compute --config CONFIG) to compute them: it takes "
                f"{self._products(missing):,} Hessian-vector products."
            )
        if missing:
            self._compute(top, left, progress)
        return self._assemble(top, left)

    def plan(self, rows: Any, cols: Any) -> ReadPlan:
        """What ``read(rows, cols, compute=True)`` would cost; computes at most one gradient per batch, to see what it keeps.

        Raises:
            DisthessError: As `read`.
        """
        top, left = find_places(self.parameters, rows), find_places(self.parameters, cols)
        pairs = self._pairs(top, left)
        missing = self._missing(pairs)
        item = ITEM_BYTES[self.dtype]
        need = self._needed(missing) if missing and self._problem is not None else TapeBytes(0, 0)
        sizes = [self.store.span(i).size * self.store.span(j).size for i, j in missing]
        largest = max((self._strip_bytes(strip) for strip in strips_of(missing)), default=0)
        return ReadPlan(
            top.count,
            left.count,
            len(pairs),
            len(missing),
            self._products(missing),
            len(self._problem.batches) if self._problem is not None else 0,
            sum(sizes) * item,
            top.count * left.count * item,
            need.tape + need.vector + largest,
            self._budget(),
        )

    def records(self) -> tuple[ChunkRecord, ...]:
        """What is known of every chunk that is there."""
        return tuple(self.store.record(*pair) for pair in self.store.present())

    # -- what is asked for

    def _pairs(self, top: Places, left: Places) -> tuple[tuple[int, int], ...]:
        size = self.store.chunk
        return tuple(sorted({(min(i, j), max(i, j)) for i in top.chunks(size) for j in left.chunks(size)}))

    def _missing(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [pair for pair in pairs if not self.store.has(*pair)]

    def _products(self, missing: Sequence[tuple[int, int]]) -> int:
        return sum(self.store.span(strip.along).size for strip in strips_of(missing))

    def _check_result(self, top: Places, left: Places) -> None:
        needed, free = top.count * left.count * ITEM_BYTES[self.dtype], available_memory_bytes()
        if needed > 0.8 * free:
            raise PlanError(
                f"rows {top.text} by columns {left.text} are {top.count:,} x {left.count:,} entries, which take "
                f"{human_bytes(needed)}; {human_bytes(free)} of memory are free. Ask for fewer at a time, for example "
                f"slice(0, 1024)."
            )

    def _assemble(self, top: Places, left: Places) -> np.ndarray:
        size = self.store.chunk
        found = np.empty((top.count, left.count), dtype=self.dtype)
        columns = [(j, *left.inside(self.store.span(j))) for j in left.chunks(size)]
        for i in top.chunks(size):
            to_rows, from_rows = top.inside(self.store.span(i))
            for j, to_columns, from_columns in columns:
                values = self.store.read(i, j)
                found[np.ix_(to_rows, to_columns)] = values[np.ix_(from_rows, from_columns)]
        return found

    # -- computing

    def _compute(self, top: Places, left: Places, progress: Progress | None) -> None:
        problem = self._bound()
        place = self.store.place
        with StoreLock(place) as lease:
            store = CacheStore.open(place, writable=True)
            store.hold(lease)
            # Whoever held the lock before may have computed some of it.
            missing = self._missing(self._pairs(top, left))
            need = self._needed(missing)
            strips = strips_of(missing)
            budget = self._budget()
            taken = max((self._strip_bytes(strip) for strip in strips), default=0)
            if need.tape + need.vector + taken > budget:
                raise PlanError(
                    f"one Hessian-vector product of these parameters would take up to "
                    f"{human_bytes(need.tape + need.vector + taken)} of memory beside the model, and {human_bytes(budget)} are "
                    f"allowed. Allow more by memory_bytes, give smaller batches, or make the cache with a smaller chunk."
                )
            worker = StripWorker(problem, store, budget - taken)
            total, done = self._products(missing), 0
            for strip in strips:
                worker.compute(strip)
                done += store.span(strip.along).size
                self.products += store.span(strip.along).size
                if progress is not None:
                    progress(done, total)

    def _bound(self) -> Problem:
        if self._problem is None:
            raise ConfigError(
                f"computing blocks needs the problem: open {self.path} by disthess.open_cache(path, problem), or give --config "
                f"on the command line."
            )
        if not self._checked:
            check_problem(self._problem, tuple(parameter.name for parameter in self.parameters))
            self._checked = True
        return self._problem

    def _needed(self, missing: Sequence[tuple[int, int]]) -> TapeBytes:
        """The most that any strip takes; strips of the same parameters take the same."""
        problem = self._bound()
        seen: dict[tuple[frozenset[str], frozenset[str]], TapeBytes] = {}
        for strip in strips_of(missing):
            rows, columns = pieces_of(self.store, (strip.along,)), pieces_of(self.store, strip.others)
            key = (frozenset(piece.name for piece in rows), frozenset(piece.name for piece in columns))
            if key not in seen:
                seen[key] = needed_bytes(problem, rows, columns)
        # A float32 strip that does not pass its check is computed again in float64, beside a copy of the model.
        wider = 2 if self.dtype == "float32" else 1
        return TapeBytes(
            wider * max((entry.tape for entry in seen.values()), default=0),
            wider * max((entry.vector for entry in seen.values()), default=0),
        )

    def _strip_bytes(self, strip: Strip) -> int:
        width = sum(self.store.span(other).size for other in strip.others)
        return 3 * 8 * self.store.span(strip.along).size * width

    def _budget(self) -> int:
        return self._memory_bytes if self._memory_bytes is not None else available_memory_bytes() // 2


def open_cache(
    path: str | os.PathLike[str],
    problem: Problem | None = None,
    *,
    parameters: str | Sequence[str] | None = None,
    dtype: DType | None = None,
    chunk: int = CHUNK,
    device: str = "cpu",
    memory_bytes: int | None = None,
) -> HessianCache:
    """Open a cache of blocks of a Hessian, or make an empty one: for models of any size, blocks are computed when asked for.

    Args:
        path: Directory of the cache, or its URL on an object store.
        problem: The problem, for computing; without it the cache must be there, and is read alone.
        parameters: Globs of the parameters that may be asked for; default all trainable ones.
        dtype: ``float32`` or ``float64``; default the model's, or that of the cache.
        chunk: Rows and columns of a chunk, of a cache that is made: what is asked for is rounded outwards to whole ones.
        device: Torch's name of the device that computes.
        memory_bytes: What computing may take beside the model; None for half of what is free.

    Returns:
        The cache.

    Raises:
        ConfigError: An argument is wrong.
        ProblemError: The problem has no Hessian as given.
        StoreError: The cache belongs to another problem, or something else is at ``path``.

    Example:
        >>> import tempfile
        >>> problem = Problem(torch.nn.Linear(300, 2), loss="mse", batches=[(torch.ones(1, 300), torch.zeros(1, 2))])
        >>> cache = open_cache(tempfile.mkdtemp() + "/model.zarr", problem)
        >>> cache.read(slice(0, 2), "bias", compute=True).tolist()     # 2 / N times the input
        [[1.0, 0.0], [1.0, 0.0]]
    """
    place = place_of(path)
    there = place.exists()
    if problem is None:
        return HessianCache(CacheStore.open(place), None, memory_bytes)
    if not isinstance(chunk, int) or not 1 <= chunk <= 4096:
        raise ConfigError(f"chunk must be a whole number from 1 to 4096, got {chunk!r}.")
    check_parameters(problem)
    store = CacheStore.open(place) if there else None
    wanted = dtype or (store.dtype if store is not None else None)
    check_dtype(problem, wanted)
    name: DType = "float64" if (wanted or str(problem.dtype).removeprefix("torch.")) == "float64" else "float32"
    bound = problem.to(getattr(torch, name), device)
    names = select_parameters(bound, parameters)
    identity = {**problem_fingerprint(bound, names), "dtype": name}
    if store is None:
        specs = [
            ParameterSpec(
                p.name, p.aliases, tuple(p.tensor.shape), rank, (p.name,), bound.weight_decay.get(p.name, 0.0)
            )
            for rank, p in enumerate(p for p in bound.parameters() if p.name in set(names))
        ]
        side = min(chunk, sum(spec.numel for spec in specs))
        store = CacheStore.create(place, specs, name, side, {"fingerprint": identity, "title": bound.recipe.title})
    differing = differences(store.attributes.get("fingerprint", {}), identity)
    if differing:
        raise StoreError(
            f"{place.name} holds blocks of the Hessian of another problem: {'; '.join(differing[:5])}. Choose another path, or "
            f"delete that cache."
        )
    return HessianCache(store, bound, memory_bytes)
