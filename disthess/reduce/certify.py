"""The certificate: does the stored matrix do to random vectors what the model's own products do?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from disthess.errors import StoreError
from disthess.reduce.arrays import PanelReader
from disthess.reduce.operator import StoreOperator
from disthess.types import Part, Span

if TYPE_CHECKING:
    from disthess.reduce.hessian_store import HessianStore


@dataclass(frozen=True, slots=True)
class Certificate:
    """Agreement of a store with an independent path.

    Attributes:
        part: Which part; ``activations`` for the activation blocks.
        errors: ``|H x - hvp(x)| / |hvp(x)|`` for each random x (absolute where the product is zero).
        worst: The largest of them.
        symmetry: Largest ``|H_ij - H_ji|`` inside diagonal squares of parameters and uses, relative to the largest entry there.
        tolerance: What was allowed.
        passed: Whether ``worst`` and ``symmetry`` are within it.
        against: What the independent path was.
        dtype: Of the store.
        seed: Of the vectors.
        seconds: It took.
    """

    part: str
    errors: tuple[float, ...]
    worst: float
    symmetry: float
    tolerance: float
    passed: bool
    against: str
    dtype: str
    seed: int
    seconds: float

    @property
    def vectors(self) -> int:
        """Number of random vectors."""
        return len(self.errors)


_WORDS = ("part", "against", "dtype")
_NUMBERS = ("worst", "symmetry", "tolerance", "seed", "seconds")


def certificate_of(values: Mapping[str, Any], name: str, path: str) -> Certificate:
    """A certificate from what a store keeps of it.

    Raises:
        StoreError: It is not what `certify` writes.
    """
    errors = values.get("errors")
    is_right = (
        set(values) == {field.name for field in dataclasses.fields(Certificate)}
        and isinstance(errors, list)
        and all(isinstance(values[key], str) for key in _WORDS)
        and all(isinstance(entry, (int, float)) for entry in [*errors, *(values[key] for key in _NUMBERS)])
        and isinstance(values["passed"], bool)
    )
    if not is_right:
        raise StoreError(
            f"The result {name!r} of the store {path} is no certificate. It is damaged, or disthess has not written it; remove "
            f"its directory and run again, which writes it anew."
        )
    return Certificate(**{**values, "errors": tuple(errors or ())})


def certify(
    store: HessianStore,
    products: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    vectors: int,
    tolerance: float,
    part: Part,
    against: str = "reverse-over-reverse products of the eager model in float64",
) -> Certificate:
    """Compare a store with products of an independent path, and keep the result in the store.

    Args:
        store: Complete.
        products: ``[P, k]`` to ``[P, k]`` in float64.
        seed: Of the random vectors.
        vectors: How many.
        tolerance: Largest relative error that passes.
        part: Which part.
        against: What ``products`` is, for the record.

    Returns:
        The certificate, saved as ``certificate/{part}``.
    """
    started = time.perf_counter()
    block = np.random.default_rng(seed).standard_normal((store.numel, vectors))
    reader = PanelReader(store.store, part)
    # One product: chunks kept for the next would be written to memory for nobody.
    found = StoreOperator(reader, cache_bytes=0).matmat(block)
    symmetry = _asymmetry(reader)
    result = _judge(found, products(block), part, symmetry, tolerance, against, store, seed, started)
    store.store.write_result(f"certificate/{part}", {}, dataclasses.asdict(result))
    return result


def certify_activations(
    store: HessianStore,
    products: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    vectors: int,
    tolerance: float,
    against: str,
) -> Certificate:
    """Compare all activation blocks, as one symmetric matrix over the nodes, with products of an independent path.

    Args:
        store: Complete, with the hessian part.
        products: ``[D, k]`` to ``[D, k]`` in float64, D the sum of the activations' sizes.
        seed: Of the random vectors.
        vectors: How many.
        tolerance: Largest relative error that passes.
        against: What ``products`` is, for the record.

    Returns:
        The certificate, saved as ``certificate/activations``; its symmetry is that of the nodes' own blocks, both triangles of
        which are computed and stored.
    """
    started = time.perf_counter()
    ends = np.cumsum([0, *(entry.numel for entry in store.activations)]).tolist()
    block = np.random.default_rng(seed).standard_normal((ends[-1], vectors))
    found = np.zeros_like(block)
    defect = largest = np.float64(0.0)
    for i, v in enumerate(store.activations):
        for j, w in enumerate(store.activations[i:], start=i):
            values = store.activation_block(v.name, w.name).astype(np.float64)
            found[ends[i] : ends[i + 1]] += values @ block[ends[j] : ends[j + 1]]
            if i == j:
                defect = np.maximum(defect, np.abs(values - values.T).max(initial=0.0))
                largest = np.maximum(largest, np.abs(values).max(initial=0.0))
            else:
                found[ends[j] : ends[j + 1]] += values.T @ block[ends[i] : ends[i + 1]]
    symmetry = float(defect / largest) if largest else 0.0
    result = _judge(found, products(block), "activations", symmetry, tolerance, against, store, seed, started)
    store.store.write_result("certificate/activations", {}, dataclasses.asdict(result))
    return result


def _judge(
    found: np.ndarray,
    wanted: np.ndarray,
    part: str,
    symmetry: float,
    tolerance: float,
    against: str,
    store: HessianStore,
    seed: int,
    started: float,
) -> Certificate:
    scale = np.linalg.norm(wanted, axis=0)
    scale[scale < 1e-12 * max(1.0, float(np.abs(found).max(initial=0.0)))] = 1.0
    errors = np.linalg.norm(found - wanted, axis=0) / scale
    worst = float(errors.max(initial=0.0))
    return Certificate(
        part=part,
        errors=tuple(float(error) for error in errors),
        worst=worst,
        symmetry=symmetry,
        tolerance=tolerance,
        passed=bool(worst <= tolerance and symmetry <= tolerance),
        against=against,
        dtype=store.store.layout.dtype,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def _asymmetry(reader: PanelReader) -> float:
    """Over the diagonal squares as stored, of parameters and of uses; NaN where one of them holds NaN.

    Readers use only the upper triangle of a square: products would not show a wrong lower one. Some entries of it a tile has not
    computed, but taken from the upper one (`disthess.sweep.buffers.Upper`); these are equal whatever they are.
    """
    defect = largest = np.float64(0.0)
    for panel in reader.store.layout.panels:
        for start in range(0, panel.rows if panel.diagonal else 0, panel.row_chunk):
            rows = Span(start, min(start + panel.row_chunk, panel.rows))
            square = reader.read(panel, rows, rows)
            # np.maximum keeps NaN, max() may drop it. What is taken of a difference and its transpose has both signs.
            defect = np.maximum(defect, (square - square.T).max(initial=0.0))
            largest = np.maximum(largest, np.maximum(square.max(initial=0.0), -square.min(initial=0.0)))
    return float(defect / largest) if largest else 0.0
