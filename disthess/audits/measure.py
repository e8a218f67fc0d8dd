"""Measures one checkpoint: every number that the audit file asks for, with its interval and how it was made."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from typing_extensions import override

from disthess import hvp
from disthess.audits.gauss_newton import AbstractForms, GaussNewtonForms, ggn_share, share_of
from disthess.audits.meter import Meter, MeteredOperator
from disthess.audits.metrics import METRICS
from disthess.audits.operators import make_operator
from disthess.audits.record import BlockDensity, MapFacts
from disthess.audits.subject import COUPLINGS, GGN, KRYLOV, STOPPING, Subject, entries, part_name
from disthess.errors import DisthessError, ProblemError
from disthess.formalism.report import kinks_of_problem
from disthess.graph.program import build_programs
from disthess.linalg.block_map import Places, estimate_block_map
from disthess.linalg.estimate import WHOLE, Estimate
from disthess.linalg.model import krylov_model
from disthess.linalg.moments import Ranged
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.linalg.quadrature import Spread
from disthess.linalg.stopping import judge
from disthess.linalg.summary import Summary, summarise_operator
from disthess.preflight import check_problem
from disthess.problem import Problem
from disthess.summaries import summarise_block

KINK_NUMEL = 1 << 20
"""Parameters up to which the model is captured to look for kinks."""

TOGETHER = 32
"""Unit vectors multiplied at once for an exact block."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found of one checkpoint.

    Attributes:
        estimates: The numbers.
        blocks: Of the coupling map.
        arrays: As `disthess.audits.record.AuditRecord` has them.
        products: Hessian-vector products taken.
        densities: Of blocks.
        map_facts: Of the coupling map.
    """

    estimates: tuple[Estimate, ...]
    blocks: tuple[str, ...]
    arrays: dict[str, np.ndarray]
    products: int
    densities: tuple[BlockDensity, ...]
    map_facts: MapFacts | None


def measure(subject: Subject, problem: Problem, meter: Meter) -> Measured:
    """Measure a problem at its parameters as they are now.

    Args:
        subject: What to find.
        problem: `Subject.bound` of it.
        meter: Counts products.

    Raises:
        ProblemError: The objective is not finite, random, or cannot be differentiated twice.
    """
    check_problem(problem, subject.names)
    loss, gradient = hvp.gradient(problem, subject.names)
    with make_operator(problem, subject.names, subject.config.measure) as operator:
        return _Run(subject, problem, meter, operator, loss, gradient.double().cpu().numpy()).everything()


@final
class _Run:
    """One checkpoint's numbers as they are made."""

    def __init__(
        self,
        subject: Subject,
        problem: Problem,
        meter: Meter,
        operator: AbstractSymmetricOperator,
        loss: float,
        gradient: np.ndarray,
    ) -> None:
        self._subject = subject
        self._problem = problem
        self._meter = meter
        self._operator = MeteredOperator(operator, meter)
        self._loss = loss
        self._gradient = gradient
        self._section = subject.config.measure
        self._estimates: list[Estimate] = []
        self._arrays: dict[str, np.ndarray] = {}
        self._spreads: dict[str, Spread] = {}
        self._map_facts: MapFacts | None = None

    def everything(self) -> Measured:
        """All that is asked for, cheap numbers first."""
        self._exact("loss", self._loss, "all batches, once")
        self._exact("gradient_norm", float(np.linalg.norm(self._gradient)), "all batches, once")
        summary = self._whole()
        self._ggn_share(summary)
        self._kinks()
        self._stopping(summary)
        for name, places in self._subject.blocks.items():
            self._block(name, places)
        self._densities()
        self._couplings()
        self._tiles()
        blocks = tuple(self._subject.coupled) if self._subject.config.couplings is not None else ()
        order = list(METRICS)
        # Python's sort is stable: the whole first, then blocks in their order, each by the table of metrics.
        names = [WHOLE, *self._subject.blocks]
        found = sorted(self._estimates, key=lambda one: (names.index(one.block), order.index(one.metric)))
        densities = tuple(
            BlockDensity(name, made.products, made.seed, made.how) for name, made in self._spreads.items()
        )
        return Measured(tuple(found), blocks, self._arrays, self._operator.products, densities, self._map_facts)

    def _whole(self) -> Summary:
        wanted = self._subject.summary_metrics()
        summary = summarise_operator(
            self._operator,
            effort=self._section.effort(),
            metrics=wanted,
            watch=self._meter.watch,
            phase=self._phases(WHOLE),
        )
        self._estimates += [found for found in summary.estimates if found.metric in self._subject.metrics]
        if summary.spread is not None:
            self._arrays.update(_density(summary.spread))
        if "rate_limit" in self._subject.metrics:
            self._rate_limit(next(found for found in summary.estimates if found.metric == "lambda_max"))
        return summary

    def _rate_limit(self, largest: Estimate) -> None:
        if largest.value <= 0:
            self._undefined("rate_limit", "the largest eigenvalue is not positive: no rate is too large for it")
            return
        low, high = 2 / largest.high, 2 / largest.low if largest.low > 0 else math.inf
        self._add(
            "rate_limit", Ranged(2 / largest.value, low, high), f"2 / lambda_max; {largest.how}", largest.confidence
        )

    def _ggn_share(self, summary: Summary) -> None:
        if "ggn_share" not in self._subject.metrics:
            return
        try:
            forms = GaussNewtonForms(self._problem, self._subject.names)
        except ProblemError as reason:
            self._meter.skip(GGN)
            self._undefined("ggn_share", str(reason))
            return
        metered = _MeteredForms(forms, self._meter)
        with self._meter.part(GGN):
            if summary.moments is None:
                trace = float(metered.forms(np.eye(self._subject.size)).sum())
                self._exact("ggn_share", share_of(trace, summary.value("trace")), "both traces, entry by entry")
                return
            found = ggn_share(metered, summary.moments, confidence=self._section.confidence)
        how = f"both traces by Hutch++ on the same {2 * len(summary.moments.forms)} vectors"
        self._add("ggn_share", found, how)

    def _kinks(self) -> None:
        if "kinks" not in self._subject.metrics:
            return
        if self._subject.size > KINK_NUMEL:
            self._undefined("kinks", f"more than {KINK_NUMEL:,} parameters: the model is not captured")
            return
        if self._problem.dtype not in (torch.float32, torch.float64):
            self._undefined("kinks", "only float32 and float64 tell near from equal")
            return
        try:
            programs = build_programs(self._problem, frozenset(self._subject.names))
            found = kinks_of_problem(self._problem, programs, self._subject.names)
        except (DisthessError, RuntimeError, NotImplementedError) as reason:
            self._undefined("kinks", f"the model cannot be captured: {' '.join(str(reason).split())[:200]}")
            return
        nodes = f"; {', '.join(f'{report.op} at {report.node}' for report in found[:3])}" if found else ""
        self._exact("kinks", float(sum(report.entries for report in found)), f"the captured model, all batches{nodes}")

    def _stopping(self, summary: Summary) -> None:
        wanted = [metric for metric in STOPPING if metric in self._subject.metrics]
        if not wanted:
            return
        if not np.any(self._gradient):
            self._meter.skip(KRYLOV)
            values, coefficients, taken = np.empty(0), np.empty(0), 0
        else:
            with self._meter.part(KRYLOV):
                model = krylov_model(self._operator, self._gradient, size=self._subject.krylov_products())
            values, coefficients, taken = model.eigenvalues, model.coefficients, model.products
        ends = np.array([summary.value("lambda_min"), summary.value("lambda_max")])
        report = judge(
            np.concatenate([ends, values]),
            np.concatenate([[0.0, 0.0], coefficients]),
            self._gradient,
            self._point(),
            self._loss,
        )
        how = f"Krylov space of {taken} vectors and both extreme eigenvalues, shift {report.shift:.2g}"
        hows = {"scaled_gradient": "gradient, parameters and loss", "newton_decrement": how, "stop": how}
        for metric in wanted:
            self._exact(metric, report.metrics()[metric], hows[metric])

    def _block(self, name: str, places: Places) -> None:
        wanted = self._subject.block_metrics
        if "gradient_norm" in wanted:
            own = float(np.linalg.norm(self._gradient[places]))
            self._estimates.append(Estimate("gradient_norm", name, own, own, own, 1.0, "all batches, once"))
        found = summarise_block(
            self._operator,
            name,
            places,
            self._section.effort(),
            wanted,
            watch=self._meter.watch,
            phase=self._phases(name),
        )
        self._estimates += found.estimates
        if found.density is not None:
            self._spreads[name] = found.density

    def _densities(self) -> None:
        """Of all blocks in three arrays, however many there are."""
        if self._spreads:
            rows = [_density(spread) for spread in self._spreads.values()]
            self._arrays.update({f"block_{name}": np.stack([row[name] for row in rows]) for name in rows[0]})

    def _couplings(self) -> None:
        section = self._subject.config.couplings
        if section is None:
            return
        with self._meter.part(COUPLINGS):
            found = estimate_block_map(
                self._operator,
                list(self._subject.coupled.values()),
                probes=section.probes,
                confidence=self._section.confidence,
                seed=self._section.seed,
            )
        self._map_facts = MapFacts(found.confidence, section.probes, self._section.seed, found.products)
        for name, interval in (("coupling", found.coupling), ("norm", found.norm), ("trace", found.trace)):
            for end in ("value", "low", "high"):
                self._arrays[f"{name}/{end}"] = getattr(interval, end)

    def _tiles(self) -> None:
        for name, (rows, columns) in self._subject.tiles.items():
            with self._meter.part(f"exact block {name}"):
                self._arrays[f"tile/{name}"] = exact_block(self._operator, rows, columns)

    def _point(self) -> np.ndarray:
        names = set(self._subject.names)
        tensors = [entry.tensor.detach().reshape(-1) for entry in self._problem.parameters() if entry.name in names]
        return torch.cat(tensors).double().cpu().numpy()

    def _phases(self, block: str) -> Callable[[str], AbstractContextManager[None]]:
        tolerance = self._section.tolerance
        return lambda part: self._meter.part(part_name(block, part), tolerance if part == "ends" else None)

    def _exact(self, metric: str, value: float, how: str) -> None:
        if metric in self._subject.metrics:
            self._estimates.append(Estimate(metric, WHOLE, value, value, value, 1.0, how))

    def _add(self, metric: str, ranged: Ranged, how: str, confidence: float | None = None) -> None:
        held = self._section.confidence if confidence is None else confidence
        self._estimates.append(Estimate(metric, WHOLE, ranged.value, ranged.low, ranged.high, held, how))

    def _undefined(self, metric: str, why: str) -> None:
        self._estimates.append(Estimate(metric, WHOLE, math.nan, math.nan, math.nan, 1.0, f"not measured: {why}"))


def exact_block(operator: AbstractSymmetricOperator, rows: Places, columns: Places) -> np.ndarray:
    """``H[rows, columns]`` by products with the unit vectors of its smaller side."""
    size = operator.size
    if entries(rows, size) < entries(columns, size):
        return exact_block(operator, columns, rows).T
    places = np.arange(size)[columns]
    found = np.empty((entries(rows, size), len(places)))
    for start in range(0, len(places), TOGETHER):
        some = places[start : start + TOGETHER]
        units = np.zeros((size, len(some)), dtype=operator.dtype, order="F")
        units[some, np.arange(len(some))] = 1
        found[:, start : start + len(some)] = operator.matmat(units)[rows]
    return found


def _density(spread: Spread) -> dict[str, np.ndarray]:
    return {"density/grid": spread.grid, "density/value": spread.value, "density/error": spread.error}


@final
class _MeteredForms(AbstractForms):
    """Forms of the Gauss-Newton matrix, counted: one costs about one product."""

    def __init__(self, inner: GaussNewtonForms, meter: Meter) -> None:
        self._inner = inner
        self._meter = meter

    @override
    def forms(self, vectors: np.ndarray) -> np.ndarray:
        found = self._inner.forms(vectors)
        self._meter.count(vectors.shape[1])
        return found
