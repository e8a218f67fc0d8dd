"""The certificate that ends a run: the store against Hessian-vector products of the eager model, in float64.

The products come from reverse-over-reverse autograd on the original module, a path that shares no code with the sweep. Where
the two disagree, central differences of the gradient decide which is right: some fused kernels have a wrong double backward.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from disthess import hvp
from disthess.errors import CertificateError, SecondDerivativeError
from disthess.graph.perturb import perturbation_differences, perturbation_products
from disthess.graph.program import build_programs
from disthess.preflight import casts_down
from disthess.prepare import Prepared
from disthess.problem import Problem
from disthess.reduce.certify import Certificate, certify, certify_activations
from disthess.reduce.hessian_store import HessianStore
from disthess.sweep.autograd import gauss_newton_products
from disthess.types import Part

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
"""Largest relative error ``|H x - hvp(x)| / |hvp(x)|`` that passes."""

DIFFERENCE_TOLERANCE = 1e-5
"""The same against central differences, whose own error is about 1e-8."""

DIFFERENCE_STEPS = (1e-5, 1e-6, 1e-7)
"""Steps of the differences, relative to the parameters' norm."""

ROUNDED_TOLERANCE, ROUNDED_STEPS = 1e-2, (1e-2, 3e-3, 1e-3)
"""The same where the model casts to float32 inside: its gradient carries 1e-7 of noise, which a difference divides by its step."""

VECTORS = 2
"""Random vectors compared."""

Products = Callable[[np.ndarray], np.ndarray]


def certify_run(store: HessianStore, prepared: Prepared, seed: int) -> tuple[Certificate, ...]:
    """Certify every stored part that has an independent path; results go into the store.

    Args:
        store: Complete.
        prepared: The run.
        seed: Of the random vectors.

    Returns:
        One certificate per part.

    Raises:
        CertificateError: A part disagrees with the eager model.
    """
    problem = prepared.problem.to(torch.float64)
    found = []
    for part in store.parts:
        if store.certificate(part) is not None:
            continue
        products = _products(problem, prepared.names, part)
        if products is None:
            continue
        tolerance = TOLERANCE["float32" if prepared.rounds_inside else prepared.plan.layout.dtype]
        try:
            result = certify(store, products, seed=seed, vectors=VECTORS, tolerance=tolerance, part=part)
        except SecondDerivativeError:
            if part == "ggn":
                continue
            result = _by_differences(store, prepared, problem, seed, tolerance, part)
        # The autograd method took the same path as the products, so that only differences are independent of it.
        if part != "ggn" and (not result.passed or prepared.plan.method == "autograd"):
            result = _by_differences(store, prepared, problem, seed, tolerance, part)
        if not result.passed:
            raise CertificateError(
                f"the stored {part} disagrees with products of the eager model: relative error {result.worst:.2e}, allowed "
                f"{result.tolerance:.0e}; symmetry defect {result.symmetry:.2e}. The store must not be used. Please report "
                "the model; method='autograd' avoids the sweep, dtype='float64' shows whether it is rounding."
            )
        found.append(result)
    if store.activations and "hessian" in store.parts and store.certificate("activations") is None:
        found.append(_certify_activations(store, prepared, problem, seed))
    return tuple(found)


def _certify_activations(store: HessianStore, prepared: Prepared, problem: Problem, seed: int) -> Certificate:
    """Against autograd on the captured operations, and against differences where that disagrees."""
    tolerance = TOLERANCE["float32" if prepared.rounds_inside else prepared.plan.layout.dtype]
    programs = prepared.programs
    if prepared.plan.layout.dtype != "float64":
        programs = build_programs(problem, frozenset(prepared.names), [entry.name for entry in store.activations])

    def products(block: np.ndarray) -> np.ndarray:
        return perturbation_products(problem, programs, torch.from_numpy(np.ascontiguousarray(block.T))).numpy().T

    def differences(block: np.ndarray) -> np.ndarray:
        vectors = torch.from_numpy(np.ascontiguousarray(block.T))
        return perturbation_differences(problem, programs, vectors, DIFFERENCE_STEPS[0]).numpy().T

    def compare(path: Products, allowed: float, against: str) -> Certificate:
        return certify_activations(store, path, seed=seed, vectors=VECTORS, tolerance=allowed, against=against)

    try:
        result = compare(products, tolerance, "reverse-over-reverse products of the captured operations in float64")
    except (RuntimeError, NotImplementedError):
        result = None
    if result is None or not result.passed:
        result = compare(
            differences,
            max(DIFFERENCE_TOLERANCE, tolerance),
            "central differences of the captured operations in float64",
        )
    if not result.passed:
        raise CertificateError(
            f"the stored activation blocks disagree with derivatives of the captured operations: relative error "
            f"{result.worst:.2e}, allowed {result.tolerance:.0e}; symmetry defect {result.symmetry:.2e}. The store must not be "
            "used. Please report the model."
        )
    return result


def _products(problem: Problem, names: tuple[str, ...], part: Part) -> Products | None:
    def hessian(block: np.ndarray) -> np.ndarray:
        return hvp.hessian_vector_products(problem, names, torch.from_numpy(np.ascontiguousarray(block.T))).numpy().T

    def ggn(block: np.ndarray) -> np.ndarray:
        vectors = torch.from_numpy(np.ascontiguousarray(block.T))
        return gauss_newton_products(problem, names, vectors).numpy().T

    if part == "hessian":
        return hessian
    if problem.recipe.objective is not None:
        return None
    return ggn if part == "ggn" else lambda block: hessian(block) - ggn(block)


def _by_differences(
    store: HessianStore, prepared: Prepared, problem: Problem, seed: int, wanted: float, part: Part
) -> Certificate:
    """Against central differences at several steps: a kink may lie within one, an error is there at all of them.

    Of the residual, what they leave when Gauss-Newton products, which differentiate once only, are taken off.
    """
    names = prepared.names
    gauss_newton = _products(problem, names, "ggn") if part == "residual" else None
    rounded = prepared.plan.method == "autograd" and bool(casts_down(problem))
    scale = max(1.0, float(torch.cat([p.tensor.detach().reshape(-1) for p in problem.parameters()]).norm()))
    tolerance = max(ROUNDED_TOLERANCE if rounded else DIFFERENCE_TOLERANCE, wanted)
    against = "central differences of the eager gradient in float64"
    for step in ROUNDED_STEPS if rounded else DIFFERENCE_STEPS:

        def differences(block: np.ndarray, step: float = step) -> np.ndarray:
            vectors = torch.from_numpy(np.ascontiguousarray(block.T))
            found = hvp.gradient_difference_products(problem, names, vectors, step * scale).numpy().T
            return found if gauss_newton is None else found - gauss_newton(block)

        result = certify(
            store, differences, seed=seed, vectors=VECTORS, tolerance=tolerance, part=part, against=against
        )
        if result.passed:
            break
    return result
