"""What the paper's printed formulas give, and what the corrected ones give, on eighteen small networks.

    python examples/paper_check.py

Columns: relative Frobenius error of the parameter Hessian against autograd. ``lit``: formulas (1) and (2) as printed; ``lit diag``:
its diagonal parameter blocks alone; ``char``: (2) read kindly; ``Alg1``: that with Algorithm 1's double count; ``P+char``: (2)
read kindly on correct activation blocks; ``E``, ``P``, ``path``: the corrected methods; ``Hf``: worst error of any activation
block of E and P; ``mixed``: of any block of a parameter and an activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from paper_architectures import ARCHITECTURES
from torch import Tensor

from disthess.formalism.dag import Blocks, Dag
from disthess.formalism.eliminate import eliminate
from disthess.formalism.local import differentiate
from disthess.formalism.oracle import autograd_elimination, autograd_hessian, autograd_perturbations
from disthess.formalism.paths import split_paths
from disthess.formalism.perturb import activation_hessian, mixed_hessian, parameter_hessian
from disthess.formalism.printed import (
    charitable_parameter_hessian,
    printed_activation_blocks,
    printed_parameter_hessian,
)


@dataclass(frozen=True, slots=True)
class Row:
    """Errors on one network: of parameter Hessians by column, and of printed (1) alone."""

    numel: int
    errors: Mapping[str, float]
    printed_activations: tuple[float, float, float]


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in Frobenius norm; absolute where the right answer is zero."""
    scale = float(wanted.norm())
    return float((found - wanted).norm()) / (scale or 1.0)


def check(dag: Dag) -> Row:
    """Every column for one network."""
    local = differentiate(dag)
    truth = autograd_hessian(dag)
    by_autograd, mixed_truth = autograd_perturbations(dag)
    elimination_truth = autograd_elimination(dag)
    eliminated, activations = eliminate(local), activation_hessian(local)
    printed = printed_activation_blocks(local)
    doubled = printed_activation_blocks(local, count_pure_twice=True)
    literal = printed_parameter_hessian(local, printed)
    errors = {
        "lit": error(literal, truth),
        "lit diag": error(diagonal(literal, dag), diagonal(truth, dag)),
        "char": error(charitable_parameter_hessian(local, printed), truth),
        "Alg1": error(charitable_parameter_hessian(local, doubled), truth),
        "P+char": error(charitable_parameter_hessian(local, activations), truth),
        "E": error(eliminated.hessian, truth),
        "P": error(parameter_hessian(local, activations), truth),
        "path": error(split_paths(local).hessian, truth),
        "Hf": max(worst(eliminated.activations, elimination_truth), worst(activations, by_autograd)),
        "mixed": worst(mixed_hessian(local, activations), mixed_truth),
    }
    own = {pair: block for pair, block in by_autograd.items() if pair[0] == pair[1]}
    off_p = {pair: block for pair, block in by_autograd.items() if pair[0] != pair[1]}
    off_e = {pair: block for pair, block in elimination_truth.items() if pair[0] != pair[1]}
    alone = (together(printed, own), together(printed, off_e), together(printed, off_p))
    return Row(sum(dag.sizes.values()), errors, alone)


def diagonal(matrix: Tensor, dag: Dag) -> Tensor:
    """The blocks of each parameter with itself, the rest zero."""
    owner = torch.cat([torch.full((size,), place) for place, size in enumerate(dag.sizes.values())])
    return matrix * (owner[:, None] == owner[None, :])


def worst(found: Blocks, wanted: Blocks) -> float:
    """Largest norm of an error of a block, relative to the largest block."""
    scale = max(float(block.norm()) for block in wanted.values()) or 1.0
    return max(float((found.get(pair, 0) - block).norm()) for pair, block in wanted.items()) / scale


def together(found: Blocks, wanted: Blocks) -> float:
    """Relative error over all the blocks."""
    total = sum(float(block.square().sum()) for block in wanted.values())
    wrong = sum(float((found.get(pair, 0) - block).square().sum()) for pair, block in wanted.items())
    return (wrong / total) ** 0.5 if total else wrong**0.5


def shown(value: float) -> str:
    """Rounding as a power of ten, errors as a fraction."""
    return "0" if value == 0 else f"{value:.0e}" if value < 1e-9 else f"{value:.2g}"


def main() -> None:
    """Print the table."""
    rows = {name: check(make()) for name, make in ARCHITECTURES.items()}
    columns = list(next(iter(rows.values())).errors)
    print(f"{'architecture':<38}{'P':>4}" + "".join(f"{column:>10}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<38}{row.numel:>4}" + "".join(f"{shown(row.errors[column]):>10}" for column in columns))
    print()
    print("Printed (1) alone: error of diagonal blocks; of off-diagonal ones against E; against P")
    for name, row in rows.items():
        print(f"{name:<38}    " + "".join(f"{shown(value):>10}" for value in row.printed_activations))
    exact = [name for name, row in rows.items() if row.errors["lit"] < 1e-12]
    print()
    print(f"As printed, the formulas are right on {len(exact)} of {len(rows)} networks ({'; '.join(exact)}).")
    right = all(row.errors[column] < 1e-12 for row in rows.values() for column in ("E", "P", "path", "Hf", "mixed"))
    print(f"The corrected ones agree with autograd to rounding on {'all' if right else 'NOT ALL'} of them.")


if __name__ == "__main__":
    main()
