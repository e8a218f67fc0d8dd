"""How the work of a Hessian grows with depth, width, samples and parameters, beside what the corrected Theorem 5 says.

Plans are made and nothing is computed, but for the small ones, whose matrix products torch's own counter counts.

Run it: python examples/cost_growth.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import disthess
from disthess.prepare import Options, Prepared, prepare
from disthess.problem import batch_tensors
from disthess.sweep.engine import GraphEngine
from disthess.sweep.primal import compute_primal


@dataclass(frozen=True, slots=True)
class Network:
    """An MLP: ``depth`` hidden layers of one ``width``."""

    depth: int = 3
    width: int = 32
    inputs: int = 32
    samples: int = 128


@dataclass(frozen=True, slots=True)
class Growth:
    """One quantity grows and the others stay.

    Attributes:
        name: Field of `Network`.
        sizes: Its values.
        products: Exponent of matrix products in it, by the dominant term.
        entries: Exponent of what is done entry by entry.
        term: The term that dominates, and why.
    """

    name: str
    sizes: tuple[int, ...]
    products: float
    entries: float
    term: str


GROWTHS = (
    Growth("depth", (3, 6, 12), 2, 2, "P^2 and n^2 d^3, with P ~ n: every pair of layers has a block"),
    Growth("width", (32, 64, 128, 256), 4, 3, "P^2, with P ~ d^2; entry by entry n d P"),
    Growth("samples", (128, 256, 512), 1, 1, "every term is per sample"),
    Growth("inputs", (1024, 2048, 4096), 2, 1, "P^2, with P ~ inputs: the first layer's own block; entry by entry d P"),
)

COUNTED_FLOPS = 8e9
"""Plans of fewer are run and counted."""


def problem(network: Network | None = None) -> disthess.Problem:
    """The mean cross-entropy of ten classes on random data."""
    net = network or Network()
    widths = [net.inputs, *[net.width] * net.depth]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(net.samples, net.inputs, generator=generator)
    y = torch.randint(10, (net.samples,), generator=generator)
    return disthess.Problem(nn.Sequential(*layers, nn.Linear(net.width, 10)), loss="cross_entropy", batches=[(x, y)])


def counted_flops(prepared: Prepared) -> int:
    """Compute every tile under torch's FLOP counter, which counts products of matrices."""
    parameters = {parameter.name: parameter.tensor.detach() for parameter in prepared.problem.parameters()}
    program, batch = prepared.programs[0], prepared.problem.batches[0]
    primal = compute_primal(program.graph, parameters, batch_tensors(batch), program.constants, 1.0)
    layout = prepared.plan.layout
    engine = GraphEngine([primal], parameters, layout, {source.source: source for source in prepared.plan.sources})
    # torch has no formula for the in-place forms of these two.
    with FlopCounterMode(display=False) as counter:
        for tile in layout.tiles:
            engine.compute(tile.source, tile.span)
    return int(counter.get_total_flops())


def slope(sizes: Sequence[int], work: Sequence[int]) -> float:
    """Exponent of the power of size that fits best: least squares in logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(amount) for amount in work]
    middle, level = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - middle) * (y - level) for x, y in zip(xs, ys, strict=True)) / sum((x - middle) ** 2 for x in xs)


def main() -> None:
    """Print the table."""
    print("MLP of n hidden layers of width d, P parameters, N samples; the fixed ones are", Network())
    print("corrected Theorem 5: N (n^2 k d^3 + n k d^2 P + P^2); dense layers: N (n^2 d^3 + n d P + P^2)\n")
    print(f"{'':9} {'size':>5} {'P':>9} {'products':>12} {'counted':>10} {'entries':>10}   (MFLOP)")
    for growth in GROWTHS:
        found = [planned(replace(Network(), **{growth.name: size})) for size in growth.sizes]
        for size, prepared in zip(growth.sizes, found, strict=True):
            plan = prepared.plan
            counted = f"{counted_flops(prepared) / 1e6:,.1f}" if plan.product_flops < COUNTED_FLOPS else ""
            print(
                f"{growth.name:9} {size:5} {plan.layout.numel:9,} {plan.product_flops / 1e6:12,.1f} {counted:>10} "
                f"{plan.entry_flops / 1e6:10,.1f}"
            )
        plans = [prepared.plan for prepared in found]
        numels = [plan.layout.numel for plan in plans]
        products, entries = [plan.product_flops for plan in plans], [plan.entry_flops for plan in plans]
        in_parameters = f", in P {slope(numels, products):.2f}" if len(set(numels)) > 1 else ""
        print(
            f"  exponents: products {slope(growth.sizes, products):.2f} (in the limit {growth.products:g}{in_parameters}), "
            f"entries {slope(growth.sizes, entries):.2f} (in the limit {growth.entries:g})\n  {growth.term}\n"
        )


@lru_cache
def planned(network: Network) -> Prepared:
    """Captured and planned."""
    return prepare(problem(network), Options(), checked=False)


if __name__ == "__main__":
    main()
