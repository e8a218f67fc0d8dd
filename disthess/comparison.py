"""Approximations of a Hessian beside the exact one: how far off, how many bytes, how many seconds."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from typing_extensions import override

from disthess.api import compute
from disthess.errors import ConfigError, GraphError, PlanError
from disthess.factors import kronecker_layers, layer_block
from disthess.linalg.kronecker import Kind, KroneckerResult
from disthess.linalg.lanczos import extreme_eigenpairs
from disthess.linalg.lowrank import low_rank
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.matrixfree import HessianOperator
from disthess.prepare import Options, prepare
from disthess.problem import Problem
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.results import low_rank_blocks
from disthess.store.place import is_url
from disthess.types import DType, Part

Apply = Callable[[np.ndarray], np.ndarray]

SPECTRAL_TOLERANCE = 1e-3
"""Of the spectral norms of errors, relative to them."""


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One approximation ``A`` of the exact Hessian H.

    Attributes:
        name: What it is.
        frobenius_error: ``|H - A|_F / |H|_F``.
        spectral_error: ``|H - A|_2 / |H|_2``, to three digits: how far an eigenvalue can move.
        stored_bytes: Of its numbers; of symmetric matrices one triangle.
        seconds: From the problem to the approximation, capture and files included.
        how: In a few words.
    """

    name: str
    frobenius_error: float
    spectral_error: float
    stored_bytes: int
    seconds: float
    how: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of them, the exact one first.

    Attributes:
        rows: The table.
        left_out: Approximations that this problem does not have, and why.
        numel: ``P``.
        frobenius: ``|H|_F``.
        spectral: ``|H|_2``.
        dtype: Of the computation.
    """

    rows: tuple[ComparisonRow, ...]
    left_out: tuple[str, ...]
    numel: int
    frobenius: float
    spectral: float
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return dataclasses.asdict(self)


def compare(
    problem: Problem,
    folder: str | os.PathLike[str] | None = None,
    *,
    ranks: Sequence[int] = (10, 50),
    parameters: str | Sequence[str] | None = None,
    dtype: DType | None = None,
    threads: int | None = None,
    watch: Callable[[str], object] | None = None,
) -> Comparison:
    """Compute the exact Hessian and what people use in its place, and say what each is worth.

    The Gauss-Newton matrix; the diagonal blocks of layers (a weight with its bias); the diagonal; Kronecker products of these
    blocks (nearest, by expectation, and by expectation of the Gauss-Newton blocks, as K-FAC does; what is no linear layer
    stays exact); low rank from products alone; and every block truncated to low rank.

    Args:
        problem: One that can be captured.
        folder: Where the stores go, a new folder; default a temporary one that is removed.
        ranks: Of the low-rank forms.
        parameters: Globs; default all trainable ones.
        dtype: ``float32`` or ``float64``; default the model's.
        threads: Of the computation.
        watch: Called with the name of each approximation before it is computed.

    Returns:
        Errors relative to the exact Hessian (which is stored and certified), bytes and seconds.

    Raises:
        ConfigError: The folder is not empty, or a rank is not positive.
        DisthessError: As `disthess.compute`.
    """
    if not ranks or min(ranks) < 1:
        raise ConfigError(f"ranks must be positive, got {list(ranks)!r}.")
    if folder is not None and is_url(folder):
        raise ConfigError(
            f"{folder} is a URL; the stores of a comparison lie in a folder, since their seconds are compared."
        )
    if folder is not None and Path(folder).exists() and any(Path(folder).iterdir()):
        raise ConfigError(f"{folder} is not empty; name a new folder, since seconds are those of computing everything.")
    options = {"parameters": parameters, "dtype": dtype, "threads": threads}
    with _place(folder) as place:
        prepare(problem, Options(**options))  # type: ignore[arg-type]  # what a first capture loads is nobody's cost
        return _Comparing(problem, place, options, watch or (lambda name: None)).run(tuple(sorted(set(ranks))))


@final
class _Difference(AbstractSymmetricOperator):
    def __init__(self, exact: AbstractSymmetricOperator, other: Apply | None) -> None:
        self._exact = exact
        self._other = other

    @property
    @override
    def size(self) -> int:
        return self._exact.size

    @property
    @override
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64)

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        image = np.asarray(self._exact.matmat(block), dtype=np.float64)
        return image if self._other is None else image - self._other(block)


@final
class _Yardstick:
    """The exact Hessian, and how far others are from it."""

    def __init__(self, store: HessianStore) -> None:
        self.store = store
        self.operator = store.symmetric_operator()
        self.frobenius = store.blocks().frobenius
        self.spectral = self._norm(None)

    def row(self, name: str, squared: float, apply: Apply, stored: int, seconds: float, how: str) -> ComparisonRow:
        """Of an approximation whose error in Frobenius norm is the root of ``squared``."""
        error = math.sqrt(max(squared, 0.0)) / self.frobenius if self.frobenius else 0.0
        spectral = self._norm(apply) / self.spectral if self.spectral else 0.0
        return ComparisonRow(name, error, spectral, stored, seconds, how)

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Parameters by the module they belong to, in user order."""
        found: dict[str, tuple[str, ...]] = {}
        for parameter in self.store.parameters:
            module = _module(parameter.name)
            found[module] = (*found.get(module, ()), parameter.name)
        return found

    def by_group(self, applied: dict[str, Apply]) -> Apply:
        """What acts on each group's entries by itself."""
        places: dict[str, list[np.ndarray]] = {}
        start = 0
        for parameter in self.store.parameters:
            places.setdefault(_module(parameter.name), []).append(np.arange(start, start + parameter.numel))
            start += parameter.numel
        where = {group: np.concatenate(places[group]) for group in applied}

        def apply(block: np.ndarray) -> np.ndarray:
            total = np.zeros(block.shape)
            for group, function in applied.items():
                total[where[group]] = function(block[where[group]])
            return total

        return apply

    def _norm(self, apply: Apply | None) -> float:
        difference = _Difference(self.operator, apply)
        return float(np.abs(extreme_eigenpairs(difference, 1, tolerance=SPECTRAL_TOLERANCE).values).max())


@final
class _Comparing:
    def __init__(self, problem: Problem, place: Path, options: dict[str, Any], watch: Callable[[str], object]) -> None:
        self._problem = problem
        self._place = place
        self._options = options
        self._watch = watch
        self._left_out: list[str] = []

    def run(self, ranks: Sequence[int]) -> Comparison:
        """Everything, one after another."""
        store, seconds = self._store("exact", "hessian", self._options["parameters"], certify=True)
        exact = _Yardstick(store)
        item = np.dtype(store.layout.dtype).itemsize
        whole = item * store.numel * (store.numel + 1) // 2
        rows = [ComparisonRow("exact", 0.0, 0.0, whole, seconds, "disthess.compute, certified")]
        rows += self._gauss_newton(exact, whole)
        blocks, spent = self._diagonal_blocks(exact)
        rows += self._of_blocks(exact, blocks, spent, item)
        rows += self._products(exact, blocks)
        rows += [self._low_rank(exact, rank) for rank in ranks]
        rows.append(self._truncated(exact, min(ranks), seconds))
        return Comparison(
            tuple(rows), tuple(self._left_out), store.numel, exact.frobenius, exact.spectral, store.layout.dtype
        )

    def _store(self, name: str, part: Part, parameters: Any, certify: bool = False) -> tuple[HessianStore, float]:
        self._watch(name)
        started = time.perf_counter()
        options = {**self._options, "parameters": parameters, "parts": (part,)}
        store = compute(self._problem, self._place / f"{name}.zarr", progress=False, certify=certify, **options)
        return store, time.perf_counter() - started

    def _gauss_newton(self, exact: _Yardstick, whole: int) -> list[ComparisonRow]:
        try:
            store, seconds = self._store("ggn", "ggn", self._options["parameters"])
        except ConfigError:
            self._left_out.append("ggn: the model's outputs are not known (an objective without output=)")
            return []
        names = [parameter.name for parameter in store.parameters]
        squared = 0.0
        for i, a in enumerate(names):
            for b in names[i:]:
                left = exact.store.block(a, b).astype(np.float64) - store.block(a, b, part="ggn")
                squared += float(np.vdot(left, left)) * (1 if a == b else 2)
        operator = store.symmetric_operator("ggn")
        return [exact.row("ggn", squared, operator.matmat, whole, seconds, "generalised Gauss-Newton, exact")]

    def _diagonal_blocks(self, exact: _Yardstick) -> tuple[dict[str, np.ndarray], float]:
        blocks, seconds = {}, 0.0
        for number, (group, names) in enumerate(exact.groups().items()):
            store, spent = self._store(f"layer-{number}", "hessian", list(names))
            blocks[group] = store.dense().astype(np.float64)
            seconds += spent
        return blocks, seconds

    def _of_blocks(
        self, exact: _Yardstick, blocks: dict[str, np.ndarray], seconds: float, item: int
    ) -> list[ComparisonRow]:
        inside = sum(float(np.vdot(block, block)) for block in blocks.values())
        on_diagonal = sum(float(np.square(np.diag(block)).sum()) for block in blocks.values())
        triangles = sum(len(block) * (len(block) + 1) // 2 for block in blocks.values())
        whole = exact.frobenius**2
        by_block = exact.by_group({group: block.__matmul__ for group, block in blocks.items()})
        by_entry = exact.by_group({group: _scaling(np.diag(block)) for group, block in blocks.items()})
        how = f"{len(blocks)} layers, each weight with its bias"
        return [
            exact.row("block-diagonal", whole - inside, by_block, item * triangles, seconds, how),
            exact.row(
                "diagonal", whole - on_diagonal, by_entry, item * exact.store.numel, seconds, "of the same blocks"
            ),
        ]

    def _products(self, exact: _Yardstick, blocks: dict[str, np.ndarray]) -> list[ComparisonRow]:
        wanted: list[tuple[str, Kind, Part, str]] = [
            ("kronecker, nearest", "nearest", "hessian", "of each layer's block, which is not formed"),
            ("kronecker, expectation", "expectation", "hessian", "mean H (x) mean x x^T of each layer"),
            ("kronecker, K-FAC", "expectation", "ggn", "the same of the Gauss-Newton blocks"),
        ]
        rows = []
        for name, kind, part, how in wanted:
            self._watch(name)
            try:
                rows.append(self._product(exact, blocks, name, kind, part, how))
            except (GraphError, ConfigError, PlanError) as reason:
                self._left_out.append(f"{name}: {reason}")
        return rows

    def _product(
        self, exact: _Yardstick, blocks: dict[str, np.ndarray], name: str, kind: Kind, part: Part, how: str
    ) -> ComparisonRow:
        axes = {p.name: len(p.shape) for p in exact.store.parameters}
        layers = {
            group: group if len(names) == 2 else names[0]
            for group, names in exact.groups().items()
            if axes[names[0]] == 2 and len(names) <= 2
        }
        if not layers:
            raise GraphError("no layer is linear")
        started = time.perf_counter()
        products = kronecker_layers(self._problem, list(layers.values()), kind=kind, part=part)
        seconds = time.perf_counter() - started
        found = dict(zip(layers, products, strict=True))
        squared, stored = exact.frobenius**2, 0
        applied: dict[str, Apply] = {}
        for group, block in blocks.items():
            squared -= float(np.vdot(block, block))
            if group not in found:
                stored += block.nbytes
                applied[group] = block.__matmul__
                continue
            product = found[group]
            error, _ = layer_block(exact.store, layers[group]).residual(product.outer, product.inner)
            squared += error**2
            stored += product.nbytes
            applied[group] = _in_parameter_order(product)
        others = len(blocks) - len(found)
        how += f"; {others} others exact" if others else ""
        return exact.row(name, squared, exact.by_group(applied), stored, seconds, how)

    def _low_rank(self, exact: _Yardstick, rank: int) -> ComparisonRow:
        name = f"low rank {rank}"
        self._watch(name)
        started = time.perf_counter()
        prepared = prepare(self._problem, Options(**self._options), checked=False)
        operator = HessianOperator(prepared.problem, prepared.names, exact.store.numel, prepared.programs)
        found = low_rank(operator, rank)
        seconds = time.perf_counter() - started
        # Its own error is measured against the stored matrix, as all others are: |H - V L V^T|^2 by V^T H V.
        image = np.asarray(exact.operator.matmat(found.vectors), dtype=np.float64)
        along = float((np.einsum("pk,pk->k", found.vectors, image) * found.values).sum())
        squared = exact.frobenius**2 - 2 * along + float((found.values**2).sum())
        how = f"{found.products} Hessian-vector products"
        return exact.row(name, squared, found.apply, found.nbytes, seconds, how)

    def _truncated(self, exact: _Yardstick, rank: int, exact_seconds: float) -> ComparisonRow:
        name = f"blocks of rank {rank}"
        self._watch(name)
        started = time.perf_counter()
        found = low_rank_blocks(exact.store, rank=rank)
        seconds = time.perf_counter() - started + exact_seconds
        how = f"{len(found.blocks)} blocks of the exact store, each truncated"
        return exact.row(name, found.error**2, found.apply, found.nbytes, seconds, how)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _scaling(factors: np.ndarray) -> Apply:
    return lambda block: factors[:, None] * block


def _in_parameter_order(product: KroneckerResult) -> Apply:
    """The product on a weight's entries followed by its bias's, in place of outputs by (inputs, 1)."""
    grid = np.arange(len(product.outer) * len(product.inner)).reshape(len(product.outer), -1)
    biased = len(product.names[0]) == 2
    order = np.concatenate([grid[:, :-1].ravel(), grid[:, -1]]) if biased else grid.ravel()

    def apply(block: np.ndarray) -> np.ndarray:
        joint = np.empty(block.shape)
        joint[order] = block
        return product.apply(joint)[order]

    return apply


@contextmanager
def _place(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="disthess-compare-") as made:
        yield Path(made)
