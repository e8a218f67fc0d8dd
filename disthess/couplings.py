"""May these blocks be treated as independent? Norms, traces and couplings of all pairs from products alone, with intervals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch

from disthess.errors import ConfigError
from disthess.linalg.block_map import LEAST_PROBES, BlockMap, Interval, Places, estimate_block_map
from disthess.matrixfree import HessianOperator
from disthess.preflight import check_dtype, check_parameters, check_problem
from disthess.prepare import select_parameters
from disthess.problem import Parameter, Problem
from disthess.reduce.sections import Sections, check_sections
from disthess.store.layout import ParameterSpec
from disthess.types import DType

BlockKind = Literal["parameters", "modules"]
KINDS: tuple[BlockKind, ...] = ("parameters", "modules")


@dataclass(frozen=True, slots=True)
class CouplingRow:
    """One pair of blocks; ``a`` is ``b`` for a block and itself. NaN where a number is not defined.

    Attributes:
        a: Earlier name.
        b: Later name, or the same.
        entries: Of the block.
        norm: ``|H_ab|``, with the ends of its interval in ``norm_low`` and ``norm_high``.
        coupling: ``|H_ab| / sqrt(|H_aa| |H_bb|)``, likewise.
        trace: Of a diagonal block, likewise.
    """

    a: str
    b: str
    entries: int
    norm: float
    norm_low: float
    norm_high: float
    coupling: float
    coupling_low: float
    coupling_high: float
    trace: float
    trace_low: float
    trace_high: float


@final
@dataclass(frozen=True, slots=True)
class CouplingMap:
    """What `coupling_map` found.

    Attributes:
        names: Of the blocks, in the model's order.
        sizes: Entries of each.
        norm: Frobenius norms, ``[n, n]``, in the objective's own scale.
        coupling: ``|H_ab| / sqrt(|H_aa| |H_bb|)``, ``[n, n]``.
        trace: Of the diagonal blocks, ``[n]``.
        confidence: Of each interval by itself.
        products: Hessian-vector products taken.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    norm: Interval
    coupling: Interval
    trace: Interval
    confidence: float
    products: int

    @property
    def off_diagonal(self) -> float:
        """``sqrt(sum_(a != b) |H_ab|^2 / sum |H_ab|^2)``: what a block-diagonal form leaves out; an estimate."""
        squares = self.norm.value**2
        total = float(squares.sum())
        return math.sqrt(max(0.0, 1.0 - float(np.trace(squares)) / total)) if total else math.nan

    def rows(self) -> tuple[CouplingRow, ...]:
        """Every pair once, ``a`` no later than ``b``."""
        found = []
        for i, a in enumerate(self.names):
            for j in range(i, len(self.names)):
                own = [float(end[i]) if i == j else math.nan for end in _ends(self.trace)]
                pair = [float(end[i, j]) for interval in (self.norm, self.coupling) for end in _ends(interval)]
                found.append(CouplingRow(a, self.names[j], self.sizes[i] * self.sizes[j], *pair, *own))
        return tuple(found)

    def largest(self, count: int) -> tuple[CouplingRow, ...]:
        """The pairs of two blocks with the largest coupling."""
        pairs = [row for row in self.rows() if row.a != row.b]
        return tuple(sorted(pairs, key=lambda row: -row.coupling if row.coupling == row.coupling else math.inf)[:count])

    def to_csv(self) -> str:
        """A header and one line per pair; undefined numbers are empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(CouplingRow.__slots__)
        for row in self.to_json()["pairs"]:
            writer.writerow(["" if value is None else value for value in row.values()])
        return out.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Numbers that are not defined are None."""
        pairs = [
            {name: None if (value := getattr(row, name)) != value else value for name in CouplingRow.__slots__}
            for row in self.rows()
        ]
        off = self.off_diagonal
        return {
            "confidence": self.confidence,
            "products": self.products,
            "off_diagonal": off if off == off else None,
            "pairs": pairs,
        }


def coupling_map(
    problem: Problem,
    *,
    of: BlockKind = "parameters",
    parameters: str | Sequence[str] | None = None,
    sections: Mapping[str, str] | None = None,
    dtype: DType | None = None,
    probes: int = 24,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CouplingMap:
    """Norm, trace and coupling of every pair of blocks of a Hessian that is not computed, each with an interval.

    Random vectors of one block at a time are multiplied by the Hessian of all selected parameters; ``probes`` products per block
    answer for all pairs. A block of no more entries than that is exact. Nothing of size P x P is formed, and any model that
    torch differentiates twice will do. How intervals are made: `disthess.linalg.block_map`.

    Args:
        problem: The problem.
        of: Blocks are ``parameters``, or ``modules``: all parameters of one module together.
        parameters: Globs; default all trainable ones. Others are constants.
        sections: Names for ranges of parameters, ``{"q": "in_proj_weight[0:64]"}``: a parameter with sections is cut into these,
            and what they leave of it is no block.
        dtype: ``float32`` or ``float64`` of the products; default the model's.
        probes: Random vectors per block. Widths of intervals fall with its square root.
        confidence: Of each interval by itself; of 100 intervals at 0.95 about five miss.
        seed: Of the vectors.
        progress: Called with (blocks done, blocks).

    Returns:
        The map.

    Raises:
        ConfigError: An argument is wrong.
        ProblemError: The problem has no Hessian as given.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> found = coupling_map(Problem(model, loss="mse", batches=data), of="modules", probes=16)
        >>> found.names, found.products
        (('0', '1'), 13)
    """
    if of not in KINDS:
        raise ConfigError(f"of must be one of {', '.join(KINDS)}, got {of!r}.")
    if probes < LEAST_PROBES or not 0 < confidence < 1:
        raise ConfigError(
            f"probes must be at least {LEAST_PROBES} and confidence between 0 and 1, got {probes!r} and {confidence!r}."
        )
    if of == "modules" and sections:
        raise ConfigError("sections cut parameters; ask for them with of='parameters'.")
    check_parameters(problem)
    check_dtype(problem, dtype)
    bound = problem if dtype is None else problem.to(torch.float64 if dtype == "float64" else torch.float32)
    names = select_parameters(bound, parameters)
    check_problem(bound, names)
    chosen = [parameter for parameter in bound.parameters() if parameter.name in names]
    blocks = _modules(chosen) if of == "modules" else _parameters(chosen, sections or {})
    size = sum(parameter.tensor.numel() for parameter in chosen)
    found: BlockMap = estimate_block_map(
        HessianOperator(bound, names, size),
        list(blocks.values()),
        probes=probes,
        confidence=confidence,
        seed=seed,
        progress=progress,
    )
    sizes = tuple(len(np.arange(size)[places]) for places in blocks.values())
    return CouplingMap(tuple(blocks), sizes, found.norm, found.coupling, found.trace, found.confidence, found.products)


def _modules(chosen: Sequence[Parameter]) -> dict[str, Places]:
    """All parameters of each module; those of the model itself under its own name."""
    places: dict[str, list[np.ndarray]] = {}
    for parameter, start in zip(chosen, _starts(chosen), strict=False):
        module = parameter.name.rpartition(".")[0] or "(the model itself)"
        places.setdefault(module, []).append(np.arange(start, start + parameter.tensor.numel()))
    return {name: np.concatenate(parts) for name, parts in places.items()}


def _parameters(chosen: Sequence[Parameter], sections: Mapping[str, str]) -> dict[str, Places]:
    """Parameters, those that have sections cut into these."""
    specs = [
        ParameterSpec(entry.name, entry.aliases, tuple(entry.tensor.shape), rank, ())
        for rank, entry in enumerate(chosen)
    ]
    check_sections(specs, sections)
    finder = Sections(specs, {})
    cut = {name: finder.find(text) for name, text in sections.items()}
    found: dict[str, Places] = {}
    for spec, start in zip(specs, _starts(chosen), strict=False):
        own = {name: section for name, section in cut.items() if section.parameter.name == spec.name}
        for name, section in own.items():
            found[name] = np.arange(start, start + spec.numel)[section.indices()]
        if not own:
            found[spec.name] = slice(start, start + spec.numel)
    return found


def _starts(chosen: Sequence[Parameter]) -> list[int]:
    return np.cumsum([0, *(parameter.tensor.numel() for parameter in chosen)]).tolist()


def _ends(interval: Interval) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return interval.value, interval.low, interval.high
