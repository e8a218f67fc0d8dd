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
from disthess.linalg.kronecker import KroneckerResult
from disthess.linalg.lanczos import extreme_eigenpairs
from disthess.linalg.lowrank import low_rank
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.matrixfree import HessianOperator
from disthess.prepare import Options, prepare
from disthess.problem import Problem
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.results import low_rank_blocks
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
        self._exact = store
        self._operator = store.symmetric_operator()
        self._frobenius = store.blocks().frobenius
        self._spectral = self._norm(None)
        item = np.dtype(store.layout.dtype).itemsize
        whole = item * store.numel * (store.numel + 1) // 2
        rows = [ComparisonRow("exact", 0.0, 0.0, whole, seconds, "disthess.compute, certified")]
        rows += self._gauss_newton(whole)
        groups = _groups(store)
        blocks, block_seconds = self._diagonal_blocks(groups)
        rows += self._of_blocks(blocks, block_seconds, item)
        rows += self._products(groups, blocks)
        rows += [self._low_rank(rank) for rank in ranks]
        rows.append(self._truncated(min(ranks), seconds))
        return Comparison(
            tuple(rows), tuple(self._left_out), store.numel, self._frobenius, self._spectral, store.layout.dtype
        )

    def _store(self, name: str, part: Part, parameters: Any, certify: bool = False) -> tuple[HessianStore, float]:
        self._watch(name)
        started = time.perf_counter()
        options = {**self._options, "parameters": parameters, "parts": (part,)}
        store = compute(self._problem, self._place / f"{name}.zarr", progress=False, certify=certify, **options)
        return store, time.perf_counter() - started

    def _gauss_newton(self, whole: int) -> list[ComparisonRow]:
        try:
            store, seconds = self._store("ggn", "ggn", self._options["parameters"])
        except ConfigError:
            self._left_out.append("ggn: the model's outputs are not known (an objective without output=)")
            return []
        names = [parameter.name for parameter in store.parameters]
        squared = 0.0
        for i, a in enumerate(names):
            for b in names[i:]:
                left = self._exact.block(a, b).astype(np.float64) - store.block(a, b, part="ggn")
                squared += float(np.vdot(left, left)) * (1 if a == b else 2)
        operator = store.symmetric_operator("ggn")
        return [self._row("ggn", squared, operator.matmat, whole, seconds, "generalised Gauss-Newton, exact")]

    def _diagonal_blocks(self, groups: dict[str, tuple[str, ...]]) -> tuple[dict[str, np.ndarray], float]:
        blocks, seconds = {}, 0.0
        for number, (group, names) in enumerate(groups.items()):
            store, spent = self._store(f"layer-{number}", "hessian", list(names))
            blocks[group] = store.dense().astype(np.float64)
            seconds += spent
        return blocks, seconds

    def _of_blocks(self, blocks: dict[str, np.ndarray], seconds: float, item: int) -> list[ComparisonRow]:
        inside = sum(float(np.vdot(block, block)) for block in blocks.values())
        triangles = sum(len(block) * (len(block) + 1) // 2 for block in blocks.values())
        places = self._places(blocks)
        diagonal = np.zeros(self._exact.numel)
        for group, block in blocks.items():
            diagonal[places[group]] = np.diag(block)
        whole = self._frobenius**2
        return [
            self._row(
                "block-diagonal", whole - inside, _by_group(places, {g: b.__matmul__ for g, b in blocks.items()}),
                item * triangles, seconds, f"{len(blocks)} layers, each weight with its bias",
            ),
            self._row(
                "diagonal", whole - float(diagonal @ diagonal), lambda x: diagonal[:, None] * x, item * len(diagonal), seconds,
                "of the same blocks",
            ),
        ]  # fmt: skip

    def _products(self, groups: dict[str, tuple[str, ...]], blocks: dict[str, np.ndarray]) -> list[ComparisonRow]:
        wanted: list[tuple[str, str, Part, str]] = [
            ("kronecker, nearest", "nearest", "hessian", "of each layer's block, which is not formed"),
            ("kronecker, expectation", "expectation", "hessian", "mean H (x) mean x x^T of each layer"),
            ("kronecker, K-FAC", "expectation", "ggn", "the same of the Gauss-Newton blocks"),
        ]
        rows = []
        for name, kind, part, how in wanted:
            self._watch(name)
            try:
                rows.append(self._product(name, kind, part, how, groups, blocks))
            except (GraphError, ConfigError, PlanError) as reason:
                self._left_out.append(f"{name}: {reason}")
        return rows

    def _product(
        self,
        name: str,
        kind: Any,
        part: Part,
        how: str,
        groups: dict[str, tuple[str, ...]],
        blocks: dict[str, np.ndarray],
    ) -> ComparisonRow:
        shapes = {p.name: p.shape for p in self._exact.parameters}
        squared, stored, kept = self._frobenius**2, 0, 0
        applied: dict[str, Apply] = {}
        layers = {
            group: group if len(names) == 2 else names[0]
            for group, names in groups.items()
            if len(shapes[names[0]]) == 2 and len(names) <= 2
        }
        if not layers:
            raise GraphError("no layer is linear")
        started = time.perf_counter()
        found = dict(
            zip(layers, kronecker_layers(self._problem, list(layers.values()), kind=kind, part=part), strict=True)
        )
        spent = time.perf_counter() - started
        for group, names in groups.items():
            inside = float(np.vdot(blocks[group], blocks[group]))
            if group not in found:
                squared -= inside
                stored += blocks[group].nbytes
                applied[group] = blocks[group].__matmul__
                kept += 1
                continue
            product = found[group]
            error, _ = layer_block(self._exact, layers[group]).residual(product.outer, product.inner)
            squared += error**2 - inside
            stored += product.nbytes
            applied[group] = _in_parameter_order(product, [math.prod(shapes[n]) for n in names])
        exact = f"; {kept} others exact" if kept else ""
        places = self._places(blocks)
        return self._row(name, squared, _by_group(places, applied), stored, spent, how + exact)

    def _low_rank(self, rank: int) -> ComparisonRow:
        name = f"low rank {rank}"
        self._watch(name)
        started = time.perf_counter()
        prepared = prepare(self._problem, Options(**self._options), checked=False)
        operator = HessianOperator(prepared.problem, prepared.names, self._exact.numel)
        found = low_rank(operator, rank)
        seconds = time.perf_counter() - started
        # Its own error is measured against the stored matrix, as all others are: |H - V L V^T|^2 by V^T H V.
        image = np.asarray(self._operator.matmat(found.vectors), dtype=np.float64)
        along = float((np.einsum("pk,pk->k", found.vectors, image) * found.values).sum())
        squared = self._frobenius**2 - 2 * along + float((found.values**2).sum())
        return self._row(name, squared, found.apply, found.nbytes, seconds, f"{found.products} Hessian-vector products")

    def _truncated(self, rank: int, exact_seconds: float) -> ComparisonRow:
        name = f"blocks of rank {rank}"
        self._watch(name)
        started = time.perf_counter()
        found = low_rank_blocks(self._exact, rank=rank)
        seconds = time.perf_counter() - started + exact_seconds
        how = f"{len(found.blocks)} blocks of the exact store, each truncated"
        return self._row(name, found.error**2, found.apply, found.nbytes, seconds, how)

    def _row(self, name: str, squared: float, apply: Apply, stored: int, seconds: float, how: str) -> ComparisonRow:
        error = math.sqrt(max(squared, 0.0)) / self._frobenius if self._frobenius else 0.0
        spectral = self._norm(apply) / self._spectral if self._spectral else 0.0
        return ComparisonRow(name, error, spectral, stored, seconds, how)

    def _norm(self, apply: Apply | None) -> float:
        difference = _Difference(self._operator, apply)
        return float(np.abs(extreme_eigenpairs(difference, 1, tolerance=SPECTRAL_TOLERANCE).values).max())

    def _places(self, groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Places of each group's entries in user order."""
        found: dict[str, list[np.ndarray]] = {}
        start = 0
        for parameter in self._exact.parameters:
            found.setdefault(_module(parameter.name), []).append(np.arange(start, start + parameter.numel))
            start += parameter.numel
        return {group: np.concatenate(found[group]) for group in groups}


def _groups(store: HessianStore) -> dict[str, tuple[str, ...]]:
    """Parameters by the module they belong to, weight first."""
    found: dict[str, tuple[str, ...]] = {}
    for parameter in store.parameters:
        found[_module(parameter.name)] = (*found.get(_module(parameter.name), ()), parameter.name)
    return found


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _by_group(places: dict[str, np.ndarray], applied: dict[str, Apply]) -> Apply:
    def apply(block: np.ndarray) -> np.ndarray:
        total = np.zeros(block.shape)
        for group, function in applied.items():
            total[places[group]] = function(block[places[group]])
        return total

    return apply


def _in_parameter_order(product: KroneckerResult, sizes: Sequence[int]) -> Apply:
    """The product on a weight's entries followed by its bias's, in place of outputs by (inputs, 1)."""
    outputs, inputs = len(product.outer), len(product.inner)
    grid = np.arange(outputs * inputs).reshape(outputs, inputs)
    order = np.concatenate([grid[:, :-1].ravel(), grid[:, -1]]) if len(sizes) == 2 else grid.ravel()

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
