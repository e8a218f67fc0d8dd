"""How time grows with parameters, samples and depth, beside how the planned work does.

Three sizes each of the digits MLP, serial, medians of the rounds. Exponents are least squares slopes in logarithms, of the
seconds in tiles, of the seconds end to end, and of the plan's FLOPs. Depth is fitted against the number of hidden layers of
width 32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hessian import warm_up
from runs import Crew, Run, compute, median_stages
from settings import Settings, keep, settings_of
from table import growth_table, show
from variants import build, deep_mlp

import disthess
from disthess.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Growth:
    """One quantity grows.

    Attributes:
        name: What; ``P`` is fitted against the number of parameters, others against ``sizes``.
        sizes: Its values (of ``P``: factors of the width).
        make: The problem at a size.
    """

    name: str
    sizes: tuple[float, ...]
    make: Callable[[float], disthess.Problem]


GROWTHS = (
    Growth("P", (0.5, 1, 2), lambda scale: build("mlp", scale)),
    Growth("N", (450, 900, 1797), lambda samples: build("mlp", 1, int(samples))),
    Growth("depth", (2, 4, 8), lambda depth: deep_mlp(int(depth))),
)
QUICK = (
    Growth("P", (0.125, 0.25, 0.5), lambda scale: build("mlp", scale, 64)),
    Growth("N", (50, 100, 200), lambda samples: build("mlp", 0.25, int(samples))),
    Growth("depth", (1, 2, 4), lambda depth: deep_mlp(int(depth), 8, 64)),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """No option but the common ones, of which problem, scale and samples have no meaning here."""
    parser.set_defaults(problem="mlp")


def main(options: argparse.Namespace) -> None:
    """Measure and fit."""
    settings = settings_of(options)
    if settings.problems != ("mlp",) or settings.scale or settings.samples:
        print("growth has its own sizes of the mlp; --problem, --scale and --samples are not used")
    warm_up(settings)
    found = {growth.name: measure(growth, settings) for growth in (QUICK if settings.quick else GROWTHS)}
    values = {"dtype": settings.dtype, "growth": found}
    keep(settings, f"growth_{settings.dtype}", values)
    show(growth_table(values))


def measure(growth: Growth, settings: Settings) -> dict[str, Any]:
    """Every size, turn about, and the slopes."""
    crew = Crew("serial", 1, settings.threads)
    problems = [growth.make(size) for size in growth.sizes]
    plans = [disthess.plan(problem, dtype=settings.dtype, threads=settings.threads) for problem in problems]
    runs: list[list[Run]] = [[] for _ in problems]
    for turn in range(settings.rounds):
        for place, problem in enumerate(problems):
            run, _ = compute(problem, crew, settings.dtype)
            runs[place].append(run)
            print(
                f"  round {turn + 1}  {growth.name} {growth.sizes[place]:<8} {run.busy:9.2f} s in tiles, {run.seconds:9.2f} s",
                flush=True,
            )
    return fitted(growth, plans, [median_stages(found) for found in runs])


def fitted(growth: Growth, plans: Sequence[Plan], stages: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Columns and their exponents."""
    numels = [plan.layout.numel for plan in plans]
    sizes: Sequence[float] = numels if growth.name == "P" else growth.sizes
    columns: dict[str, list[float]] = {
        "sweep_seconds": [found["busy"] for found in stages],
        "seconds": [found["seconds"] for found in stages],
        "product_flops": [plan.product_flops for plan in plans],
        "flops": [plan.flops for plan in plans],
    }
    slopes = {key: slope(sizes, column) for key, column in columns.items()}
    return {"sizes": list(sizes), "P": numels, **columns, "slopes": slopes}


def slope(sizes: Sequence[float], amounts: Sequence[float]) -> float:
    """Exponent of the power of size that fits best: least squares in logarithms.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(amounts), 1)[0])
