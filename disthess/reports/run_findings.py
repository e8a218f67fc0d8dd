"""What a report says of a run: read where it is stored, computed where that is quick, else left out and said so."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import final

import numpy as np

from disthess.api import eigenvalues, psd_check, spectral_density
from disthess.linalg.density import DensityResult
from disthess.linalg.lanczos import EigenResult
from disthess.reduce.definite import DENSE_SIZE, ROUNDING, Definiteness
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.norms import BlockTable
from disthess.types import Part

PASSES = {"eigenvalues": 60, "density": 40, "blocks": 1, "definite": 60}
"""Times that a store is read for each, about."""

BYTES_PER_SECOND = 1e9
"""Assumed of a pass, so that what is left out does not depend on how busy the machine is."""

MOST_ACTIVATION_ENTRIES = 40_000_000


@final
class Budget:
    """How long what is not stored may take.

    Args:
        store: Of what.
        seconds: In all, estimated.
    """

    def __init__(self, store: HessianStore, seconds: float) -> None:
        # Half of a symmetric matrix is stored.
        self._pass_seconds = store.numel**2 * np.dtype(store.layout.dtype).itemsize / 2 / BYTES_PER_SECOND
        self._left = seconds
        self.left_out: list[str] = []

    def allows(self, what: str, kind: str, instead: str) -> bool:
        """Take the time of one of `PASSES`, or say that it was left out and how to have it."""
        needed = PASSES[kind] * self._pass_seconds
        if needed <= self._left:
            self._left -= needed
            return True
        self.left_out.append(f"{what}: about {needed:,.0f} s, and {max(self._left, 0):,.0f} s were left. {instead}")
        return False


@dataclass(frozen=True, slots=True)
class Negative:
    """Share of eigenvalues that are negative beyond rounding.

    Attributes:
        share: Of all.
        tolerance: What counts as rounding.
        exact: Whether the whole matrix was diagonalised; else it is an estimate from the density, without an interval.
    """

    share: float
    tolerance: float
    exact: bool


@dataclass(frozen=True, slots=True)
class RunFindings:
    """All of it; None where it is not known.

    Attributes:
        part: The stored part that the numbers are about: the Hessian, where it is stored.
        missing: Tiles that are not done.
        loss: The objective.
        gradient_norm: Euclidean.
        pairs: Extreme eigenvalues.
        density: Of all eigenvalues.
        blocks: Norms and traces.
        negative: Share of negative eigenvalues.
        ggn_trace: Trace of the Gauss-Newton part.
        definite: Whether that part has a negative eigenvalue.
        activations: Norms of activation blocks, ``[n, n]``.
        left_out: What was not computed, and how to have it.
    """

    part: Part
    missing: tuple[int, ...]
    loss: float | None = None
    gradient_norm: float | None = None
    pairs: EigenResult | None = None
    density: DensityResult | None = None
    blocks: BlockTable | None = None
    negative: Negative | None = None
    ggn_trace: float | None = None
    definite: Definiteness | None = None
    activations: np.ndarray | None = None
    left_out: list[str] = field(default_factory=list)

    @property
    def largest(self) -> float | None:
        """Largest eigenvalue."""
        return None if self.pairs is None or not len(self.pairs.values) else float(self.pairs.values.max())

    @property
    def smallest(self) -> float | None:
        """Smallest eigenvalue."""
        return None if self.pairs is None or not len(self.pairs.values) else float(self.pairs.values.min())

    @property
    def ggn_share(self) -> float | None:
        """``tr G / (|tr G| + |tr (H - G)|)``."""
        if self.ggn_trace is None or self.blocks is None or self.part != "hessian":
            return None
        total = abs(self.ggn_trace) + abs(self.blocks.trace - self.ggn_trace)
        return self.ggn_trace / total if total else None


def find_run(store: HessianStore, top: int, seconds: float) -> RunFindings:
    """Read and compute.

    Args:
        store: Complete or not.
        top: Eigenvalues wanted at each end.
        seconds: What may be spent on what is not stored, estimated.
    """
    part: Part = "hessian" if "hessian" in store.parts else store.parts[0]
    missing = store.missing_tiles()
    if missing or not store.store.is_reduced():
        return RunFindings(part, missing)
    budget = Budget(store, seconds)
    blocks = (
        store.blocks(part)
        if budget.allows("norms of blocks", "blocks", "disthess info STORE --pairs computes them.")
        else None
    )
    pairs = _eigenvalues(store, part, top, budget)
    density = _density(store, part, budget)
    ggn_trace = definite = None
    if "ggn" in store.parts:
        if part != "ggn" and budget.allows("the trace of the ggn", "blocks", "disthess info STORE --pairs --part ggn."):
            ggn_trace = store.blocks("ggn").trace
        kept = store.store.has_result("psd/ggn")
        quick = "definite" if store.numel > DENSE_SIZE else "blocks"
        if kept or budget.allows("the sign of the ggn", quick, "disthess info STORE says it."):
            definite = psd_check(store)
    return RunFindings(
        part,
        missing,
        store.loss,
        float(np.linalg.norm(store.gradient)),
        pairs,
        density,
        blocks,
        _negative(store, part, pairs, density),
        ggn_trace,
        definite,
        _activation_norms(store, part, budget),
        budget.left_out,
    )


def _eigenvalues(store: HessianStore, part: Part, top: int, budget: Budget) -> EigenResult | None:
    """Stored ones of enough, else computed (and kept in the store), else fewer stored ones."""
    if top < 1:
        return None
    found = {}
    for name in store.store.result_names():
        match = re.fullmatch(rf"spectrum/{part}/both-(\d+)", name)
        if match:
            found[int(match[1])] = name
    enough = [k for k in found if k >= min(top, store.numel)]
    if not enough and budget.allows(
        f"{top} extreme eigenvalues", "eigenvalues", f"disthess spectrum STORE --top {top} computes and keeps them."
    ):
        return eigenvalues(store, k=top, part=part)
    if not found:
        return None
    return eigenvalues(store, **store.store.read_result(found[min(enough) if enough else max(found)])[1]["settings"])


def _density(store: HessianStore, part: Part, budget: Budget) -> DensityResult | None:
    name = f"spectrum/{part}/density"
    if store.store.has_result(name):
        return spectral_density(store, **store.store.read_result(name)[1]["settings"])
    if budget.allows("the spectral density", "density", "disthess spectrum STORE --density computes and keeps it."):
        return spectral_density(store, part=part)
    return None


def _negative(
    store: HessianStore, part: Part, pairs: EigenResult | None, density: DensityResult | None
) -> Negative | None:
    def tolerance(largest: float) -> float:
        return ROUNDING * float(np.finfo(store.layout.dtype).eps) * math.sqrt(store.numel) * largest

    if store.numel <= DENSE_SIZE:
        values = np.linalg.eigvalsh(store.dense(part).astype(np.float64))
        least = tolerance(float(np.abs(values).max()))
        return Negative(float(np.mean(values < -least)), least, True)
    if density is None:
        return None
    ends = [density.nodes] + ([pairs.values] if pairs is not None else [])
    least = tolerance(float(max(np.abs(end).max() for end in ends if len(end))))
    return Negative(float(density.weights[density.nodes < -least].sum()), least, False)


def _activation_norms(store: HessianStore, part: Part, budget: Budget) -> np.ndarray | None:
    nodes = store.activations
    if not nodes:
        return None
    if sum(node.numel for node in nodes) ** 2 > MOST_ACTIVATION_ENTRIES:
        budget.left_out.append(
            "norms of activation blocks: they have too many entries. disthess info STORE --pairs --of activations."
        )
        return None
    found = np.zeros((len(nodes), len(nodes)))
    for i, v in enumerate(nodes):
        for j in range(i, len(nodes)):
            block = store.activation_block(v.name, nodes[j].name, part=part)
            found[i, j] = found[j, i] = float(np.linalg.norm(block.astype(np.float64)))
    return found
