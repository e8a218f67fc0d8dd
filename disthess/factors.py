"""Kronecker factors of the blocks of linear layers, from a store or straight from a problem; and their files."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final, get_args

import numpy as np

from disthess.errors import ConfigError, PlanError, UnknownNameError
from disthess.execute.memory import available_memory_bytes
from disthess.linalg.kronecker import Kind, KroneckerResult, expected_product, nearest_product
from disthess.linalg.rearranged import BlockRearranged, CrossRearranged, FlippedRearranged, SumRearranged
from disthess.prepare import Options, prepare
from disthess.problem import Problem
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.keep import keep, kept
from disthess.sweep.layers import Layer, cross_curvature, own_curvature
from disthess.sweep.primal import compute_primals
from disthess.types import PARTS, Part
from disthess.units import human_bytes


def kronecker(
    target: HessianStore | Problem,
    a: str,
    b: str | None = None,
    *,
    kind: Kind = "nearest",
    part: Part = "hessian",
    store: HessianStore | None = None,
) -> KroneckerResult:
    """``H_ab ~ outer (x) inner`` for linear layers, with the error ``|H_ab - outer (x) inner|_F``, which is always measured.

    ``nearest`` is the best such product in Frobenius norm. ``expectation`` is K-FAC's: ``outer = sum_n H^n`` at the
    outputs (with the objective's 1/N in it) and ``inner = mean x x^T``; its error is the covariance of the two over
    samples, zero only where they are uncorrelated. Of samples with several rows (positions) it leaves the products between
    rows out; and it is a product for the block without weight decay, which is a damping (the error is measured there).

    Args:
        target: A store, whose block is read; or a problem, from which the product is found (in float64) without forming the block.
        a: Of the rows: a weight, ``[o, i]`` or ``[o, ...]``, or a module, whose bias is then its last input.
        b: Of the columns, likewise; default ``a``.
        kind: ``nearest`` or ``expectation`` (from a problem, and a layer against itself).
        part: ``hessian``, ``ggn`` or ``residual``.
        store: Where to keep the result, if ``target`` is a problem. A store keeps its own, under ``kronecker/``.

    Returns:
        Factors and error: ``.dense()``, ``.apply(vectors)``, ``.solve(vector, damping)``.

    Raises:
        UnknownNameError: No such parameter or module; near names are offered.
        ConfigError: An argument is wrong, or expectations were asked of a store.
        GraphError: Not a linear layer with one use; the message says what to do instead.
        PlanError: It does not fit in memory.
        StoreError: The block is not stored.

    Example:
        >>> import torch
        >>> data = (torch.randn(1, 3).double(), torch.tensor([0]))
        >>> one_sample = Problem(torch.nn.Linear(3, 2).double(), loss="cross_entropy", batches=[data])
        >>> kronecker(one_sample, "weight").relative_error < 1e-14
        True
    """
    if kind not in get_args(Kind) or part not in PARTS:
        raise ConfigError(
            f"kind must be one of {', '.join(get_args(Kind))} and part one of {', '.join(PARTS)}, got {kind!r} and {part!r}."
        )
    names = _names(target)
    first = _layer(a, names)
    second = first if b is None else _layer(b, names)
    if kind == "expectation" and (isinstance(target, HessianStore) or first != second):
        raise ConfigError(
            "kind='expectation' needs the samples' own curvatures and inputs, and one layer against itself: give the problem in "
            "place of the store, and no second name."
        )
    home = target if isinstance(target, HessianStore) else store
    place, settings = _place(first, second, kind, part, tuple(names.values()), isinstance(target, HessianStore))
    old = kept(home, place, settings)
    if old is not None:
        arrays, values = old
        return KroneckerResult(
            arrays["outer"], arrays["inner"], kind, values["error"], values["norm"], (first.names, second.names), part
        )
    if isinstance(target, HessianStore):
        found = nearest_product(_stored(target, first, second, part))
    else:
        found = _from_problem(target, first, second, kind, part)
    named = KroneckerResult(found.outer, found.inner, kind, found.error, found.norm, (first.names, second.names), part)
    arrays = {"outer": named.outer, "inner": named.inner}
    keep(home, place, settings, arrays, {"error": named.error, "norm": named.norm})
    return named


def kronecker_layers(
    problem: Problem, layers: Sequence[str], *, kind: Kind = "nearest", part: Part = "hessian"
) -> tuple[KroneckerResult, ...]:
    """`kronecker` of each layer against itself, from one capture of the problem."""
    names = _names(problem)
    wanted = [_layer(layer, names) for layer in layers]
    captured = _Captured(problem, [name for layer in wanted for name in layer.names], part)
    return tuple(
        dataclasses.replace(captured.own(layer, kind), names=(layer.names, layer.names), part=part) for layer in wanted
    )


def layer_names(store: HessianStore) -> tuple[str, ...]:
    """Modules whose weight a store holds with two axes or more; or the weight, where it is nobody's ``weight``."""
    weights = [parameter.name for parameter in store.parameters if len(parameter.shape) > 1]
    return tuple(name.removesuffix(".weight") if name.endswith(".weight") else name for name in weights)


def layer_block(store: HessianStore, a: str, part: Part = "hessian") -> BlockRearranged:
    """A layer's own stored block, the bias as its last input: what errors of products are measured against.

    Raises:
        UnknownNameError: No such parameter or module.
        PlanError: It does not fit in memory.
        StoreError: It is not stored.
    """
    layer = _layer(a, _names(store))
    return _stored(store, layer, layer, part)


def save_factors(folder: str | os.PathLike[str], factors: Sequence[KroneckerResult]) -> tuple[Path, ...]:
    """Write factors as safetensors, in the layout of K-FAC libraries that keep covariances by module (kronfluence's).

    ``activation_covariance.safetensors`` holds ``inner`` and ``gradient_covariance.safetensors`` holds ``outer`` of every
    layer under its module's name, the bias's row and column last; ``num_activation_covariance_processed.safetensors``
    and ``num_gradient_covariance_processed.safetensors`` hold what they are to be divided by: 1. The block is
    ``outer (x) inner`` with row-major ``vec(W)``, in the objective's own scale. Errors are in the files' metadata, under
    ``disthess``.

    Args:
        folder: Made if need be; files of these names are replaced.
        factors: Of layers against themselves, each once.

    Returns:
        The four files.

    Raises:
        ConfigError: No factors, a block between two layers, a layer twice, or the folder cannot be written.
    """
    from safetensors.numpy import save_file

    if not factors:
        raise ConfigError("save_factors got no factors; give at least one result of kronecker.")
    by_module = {_module(found): found for found in factors}
    if len(by_module) != len(factors) or any(found.names[0] != found.names[1] for found in factors):
        raise ConfigError(
            "save_factors takes blocks of layers against themselves, each layer once; got another selection."
        )
    ones = {module: np.ones(1, dtype=np.int64) for module in by_module}
    said = {
        module: {"kind": found.kind, "part": found.part, "error": found.error, "norm": found.norm, "parameters": found.names[0]}
        for module, found in by_module.items()
    }  # fmt: skip
    contents: dict[str, dict[str, np.ndarray]] = {
        "activation_covariance": {module: np.ascontiguousarray(found.inner) for module, found in by_module.items()},
        "gradient_covariance": {module: np.ascontiguousarray(found.outer) for module, found in by_module.items()},
        "num_activation_covariance_processed": ones,
        "num_gradient_covariance_processed": ones,
    }
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, tensors in contents.items():
            save_file(tensors, place / f"{name}.safetensors", metadata={"disthess": json.dumps(said)})
    except OSError as error:
        raise ConfigError(f"{place} cannot be written: {error}. Name a folder that can be.") from error
    return tuple(place / f"{name}.safetensors" for name in contents)


def _names(target: HessianStore | Problem) -> dict[str, str]:
    """First names by every name."""
    if isinstance(target, HessianStore):
        return {name: p.name for p in target.parameters for name in (p.name, *p.aliases)}
    if isinstance(target, Problem):
        return {name: p.name for p in target.parameters() for name in (p.name, *p.aliases)}
    raise ConfigError(f"expected a store or a Problem, got {type(target).__name__}.")


def _layer(name: str, names: Mapping[str, str]) -> Layer:
    if name in names:
        return Layer(names[name], None)
    weight = names.get(f"{name}.weight" if name else "weight")
    if weight is not None:
        return Layer(weight, names.get(f"{name}.bias" if name else "bias"))
    modules = {known.removesuffix(".weight") for known in names if known.endswith(".weight")}
    near = difflib.get_close_matches(name, [*names, *modules], n=3, cutoff=0.4) or list(names)[:5]
    raise UnknownNameError(f"there is no parameter and no layer {name!r}; near names: {', '.join(near)}.")


def _module(found: KroneckerResult) -> str:
    weight = found.names[0][0]
    return weight.removesuffix(".weight")


def _place(
    first: Layer, second: Layer, kind: Kind, part: Part, order: Sequence[str], stored: bool
) -> tuple[str, dict[str, Any]]:
    """Name of the result in a store, by the places of the parameters in user order, and its settings."""
    distinct = list(dict.fromkeys(order))
    a, b = ("+".join(str(distinct.index(name)) for name in layer.names) for layer in (first, second))
    settings = {
        "rows": list(first.names), "columns": list(second.names), "kind": kind, "part": part,
        "from": "store" if stored else "problem",
    }  # fmt: skip
    return f"kronecker/{part}/{kind}/{a}-{b}", settings


def _stored(store: HessianStore, first: Layer, second: Layer, part: Part) -> BlockRearranged:
    shapes = {p.name: p.shape for p in store.parameters}
    size = 1
    for layer in (first, second):
        size *= sum(int(np.prod(shapes[name])) for name in layer.names)
    if 24 * size > available_memory_bytes():
        raise PlanError(
            f"the block takes up to {human_bytes(24 * size)} of memory and {human_bytes(available_memory_bytes())} are available. "
            "Give the problem in place of the store, which does not form it."
        )
    bands = []
    for a in first.names:
        row = [
            store.block(a, b, part=part).astype(np.float64).reshape(shapes[a][0], -1, shapes[b][0], _width(shapes[b]))
            for b in second.names
        ]
        bands.append(np.concatenate(row, axis=3))
    return BlockRearranged(np.concatenate(bands, axis=1), first == second)


def _width(shape: Sequence[int]) -> int:
    return int(np.prod(shape[1:]))


def _from_problem(problem: Problem, first: Layer, second: Layer, kind: Kind, part: Part) -> KroneckerResult:
    captured = _Captured(problem, sorted({*first.names, *second.names}), part)
    return captured.own(first, kind) if first == second else captured.between(first, second)


@final
class _Captured:
    """A problem's values and cotangents in float64, and what layers' blocks are made of there."""

    def __init__(self, problem: Problem, names: Sequence[str], part: Part) -> None:
        prepared = prepare(problem, Options(parts=(part,), parameters=list(names), dtype="float64", method="graph"))
        bound = prepared.problem
        self._part: Part = part
        self._primals = compute_primals(bound, prepared.programs)
        self._decay = {name: bound.weight_decay.get(name, 0.0) * (part != "residual") for name in names}

    def own(self, layer: Layer, kind: Kind) -> KroneckerResult:
        found = own_curvature(self._primals, layer, self._part, available_memory_bytes())
        decay = np.full(found.rows.shape[2], self._decay[layer.weight])
        if layer.bias is not None:
            decay[-1] = self._decay[layer.bias]
        if kind == "nearest":
            return nearest_product(SumRearranged(found.curvature.numpy(), found.rows.numpy(), decay))
        bare = SumRearranged(found.curvature.numpy(), found.rows.numpy(), np.zeros(len(decay)))
        return expected_product(bare, *bare.expectation())

    def between(self, first: Layer, second: Layer) -> KroneckerResult:
        found, swapped = cross_curvature(self._primals, first, second, self._part, available_memory_bytes())
        pieces = (found.curvature, found.deltas, found.moved, found.later, found.earlier)
        matrix = CrossRearranged(*(piece.numpy() for piece in pieces))
        return nearest_product(matrix if swapped else FlippedRearranged(matrix))
