"""The numbers of two stores that can be compared, each with the bounds that its certificate gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from disthess.audits.record import Estimate
from disthess.errors import StoreError
from disthess.reduce.arrays import PanelReader
from disthess.reduce.difference import BlockDifference, block_differences
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.results import eigenvalues
from disthess.store.fingerprint import differences

EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}


@dataclass(frozen=True, slots=True)
class StorePair:
    """Two stores, measured.

    Attributes:
        first: Numbers of the first.
        second: Of the second.
        blocks: Distances of the blocks that both have.
        floor: Distance up to which blocks may differ by rounding.
        notes: What else differs.
    """

    first: tuple[Estimate, ...]
    second: tuple[Estimate, ...]
    blocks: tuple[BlockDifference, ...]
    floor: float
    notes: tuple[str, ...]


def compared_stores(first: HessianStore, second: HessianStore) -> StorePair:
    """Loss, gradient, norms, traces and extreme eigenvalues of two stores, and the distances of their blocks.

    Raises:
        StoreError: One is incomplete, has no Hessian, or they have no parameter of one name and shape in common.
    """
    readers = [PanelReader(store.store, "hessian") for store in (first, second)]
    shapes = [{parameter.name: parameter.shape for parameter in store.parameters} for store in (first, second)]
    common = [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]
    if not common:
        raise StoreError(
            f"The stores {first.path} and {second.path} have no parameter of one name and shape in common, so there is nothing to "
            f"compare. Compare stores of one model."
        )
    blocks = block_differences(readers[0], readers[1])
    notes = _notes(first, second)
    numbers = []
    bounds = []
    for side, store in enumerate((first, second)):
        norms = store.blocks()
        error, said = _relative_error(store)
        notes += [said] if said else []
        bounds.append(error * norms.frobenius)
        numbers.append(
            (
                *_whole(store, norms.frobenius, norms.trace, error),
                *_per_block(store, blocks, common, side, error, norms.frobenius),
            )
        )
    return StorePair(numbers[0], numbers[1], blocks, sum(bounds), tuple(notes))


def _whole(store: HessianStore, norm: float, trace: float, error: float) -> list[Estimate]:
    found = eigenvalues(store, k=1)
    low, high = int(np.argmin(found.values)), int(np.argmax(found.values))
    gradient = float(np.linalg.norm(store.gradient))
    how = "from the store; the bound is its certificate's"
    moved = error * norm
    return [
        _bounded("loss", "", store.loss, error * abs(store.loss), how),
        _bounded("gradient_norm", "", gradient, error * gradient, how),
        _bounded("lambda_max", "", float(found.values[high]), float(found.residuals[high]) + moved, how),
        _bounded("lambda_min", "", float(found.values[low]), float(found.residuals[low]) + moved, how),
        _bounded("trace", "", trace, math.sqrt(store.numel) * moved, how),
        _bounded("frobenius", "", norm, moved, how),
    ]


def _per_block(
    store: HessianStore, blocks: Sequence[BlockDifference], common: Sequence[str], side: int, error: float, norm: float
) -> list[Estimate]:
    gradients = _gradient_norms(store)
    own = {block.a: block for block in blocks if block.a == block.b}
    how = "from the store; the bound is its certificate's"
    found = []
    for name in common:
        block = own[name]
        size = math.sqrt(math.isqrt(block.entries))
        found += [
            _bounded("gradient_norm", name, gradients[name], error * gradients[name], how),
            _bounded("trace", name, (block.trace_a, block.trace_b)[side], size * error * norm, how),
            _bounded("frobenius", name, (block.norm_a, block.norm_b)[side], error * norm, how),
        ]
    return found


def _gradient_norms(store: HessianStore) -> dict[str, float]:
    ends = np.cumsum([parameter.numel for parameter in store.parameters])[:-1]
    parts = np.split(store.gradient, ends)
    return {
        parameter.name: float(np.linalg.norm(part)) for parameter, part in zip(store.parameters, parts, strict=True)
    }


def _bounded(metric: str, block: str, value: float, bound: float, how: str) -> Estimate:
    return Estimate(metric, block, value, value - bound, value + bound, 1.0, how)


def _relative_error(store: HessianStore) -> tuple[float, str]:
    """Of the whole matrix, in its own norm; and a note where nobody measured it."""
    dtype = store.layout.dtype
    certificate = store.certificate()
    if certificate is None:
        return 100 * EPSILON[dtype], (
            f"{store.path} has no certificate; its numbers are taken to be right to {100 * EPSILON[dtype]:.1g}, relatively"
        )
    said = "" if certificate.passed else f"the certificate of {store.path} did not pass: its numbers are in doubt"
    return max(certificate.worst, 10 * EPSILON[dtype]), said


def _notes(first: HessianStore, second: HessianStore) -> list[str]:
    sides: list[Mapping[str, Any]] = [store.attributes.get("fingerprint", {}) for store in (first, second)]
    if not all(isinstance(side, Mapping) for side in sides):
        return []
    return [
        sentence.replace("the store", "A").replace("this problem", "B") for sentence in differences(sides[0], sides[1])
    ]
