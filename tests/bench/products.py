"""Hessian-vector products without a stored Hessian, against PyHessian, hessian-eigenthings and curvlinops.

    python tests/bench products [--problem mlp,gpt,encoder] [--vectors 1,8,64] [--rounds 5] [--quick] [--out FOLDER]

Every contender takes flat vectors and gives flat ones, of the same model, tensors and loss, in one process, turn about. What is
done once (tapes, captures, recordings; torch's graph of the gradient for PyHessian) is timed apart. One warm-up call of
each number of vectors is off the clock. A gradient is a plain forward and backward pass of the eager model.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import encoder
import numpy as np
import settings
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import disthess
from disthess.hvp import gradient_difference_products
from disthess.matrixfree import HessianOperator

NAMES = (*settings.NAMES, "encoder")
OURS = "disthess"
MOST_ENTRIES = 1 << 28
"""Entries of a block of vectors beyond which it is left out: 1 GiB in float32."""

TOLERANCE = 1e-3
"""Largest relative difference between contenders. Beyond, central differences of float64 gradients say who is wrong."""

STEP = 1e-4
"""Length of the step of those differences."""

Product = Callable[[Tensor], Tensor]
"""``[K, P]`` from ``[K, P]``."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to multiply.

    Attributes:
        product: The way.
        construction: Seconds to make it.
        about: What it says of itself.
    """

    product: Product
    construction: float
    about: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, slots=True)
class Measured:
    """A problem's times in seconds: of a gradient, and of a product by number of vectors and contender, per vector.

    ``errors``: where somebody disagrees with disthess, everybody's relative error against central differences.
    """

    name: str
    numel: int
    gradients: list[float]
    construction: dict[str, float]
    products: dict[int, dict[str, list[float]]]
    differences: dict[int, dict[str, float]]
    skipped: dict[str, str]
    errors: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("--problem", default=",".join(NAMES), help="names with commas between (default %(default)s)")
    parser.add_argument("--vectors", help="numbers of vectors at once (default 1,8,64; with --quick 1,8)")
    parser.add_argument("--rounds", type=int, help="turns of every contender; medians count (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="small problems, one round: to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the JSON file (default tests/bench/results, --quick: none)")


def main(options: argparse.Namespace) -> None:
    """Measure, print, keep.

    Raises:
        SystemExit: A problem is not known, or disthess is wrong.
    """
    names = tuple(options.problem.split(","))
    if unknown := [name for name in names if name not in NAMES]:
        raise SystemExit(f"no problem is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    quick = bool(options.quick)
    chosen = settings.Settings(
        problems=names,
        dtype=options.dtype,
        rounds=options.rounds or (1 if quick else 5),
        threads=options.threads,
        scale=None,
        samples=None,
        quick=quick,
        out=options.out or (None if quick else settings.RESULTS),
    )
    counts = [int(count) for count in (options.vectors or ("1,8" if quick else "1,8,64")).split(",")]
    torch.set_num_threads(chosen.threads)
    found = []
    for name in names:
        if name == "encoder" and not chosen.quick and encoder.missing():
            print(f'encoder is left out: {encoder.missing()} not installed (pip install -e ".[bench]")')
            continue
        problem = encoder.build(quick) if name == "encoder" else chosen.build(name)
        found.append(measure(name, problem.to(getattr(torch, chosen.dtype)), counts, chosen.rounds))
    show(found)
    settings.keep(chosen, f"products_{chosen.dtype}", {"dtype": chosen.dtype, "problems": [kept(it) for it in found]})
    wrong = [f"{it.name} by {it.errors[OURS]:.1e}" for it in found if it.errors.get(OURS, 0.0) > TOLERANCE]
    if wrong:
        raise SystemExit("central differences of the gradient contradict disthess: " + "; ".join(wrong))


def measure(name: str, problem: disthess.Problem, counts: list[int], rounds: int) -> Measured:
    """All contenders on one problem."""
    contenders, skipped = contenders_of(problem)
    size = problem.numel
    found = Measured(name, size, [], {it: contenders[it].construction for it in contenders}, {}, {}, skipped)
    gradient = gradient_of(problem)
    gradient()
    for count in counts:
        if count * size > MOST_ENTRIES:
            print(f"{name}: {count} vectors of {size:,} entries are left out", flush=True)
            continue
        vectors = torch.randn(count, size, generator=torch.Generator().manual_seed(count), dtype=problem.dtype)
        results: dict[str, Tensor] = {}
        for title, contender in tuple(contenders.items()):
            try:
                results[title] = contender.product(vectors)
            except (RuntimeError, NotImplementedError) as reason:
                skipped[title] = " ".join(str(reason).split())[:200]
                print(f"{name}: {title} is left out: {skipped[title]}", flush=True)
                del contenders[title]
        found.differences[count] = {
            title: float((result - results[OURS]).norm() / result.norm())
            for title, result in results.items()
            if title != OURS
        }
        results.clear()
        found.products[count] = {title: [] for title in contenders}
        for _ in range(rounds):
            found.gradients.append(seconds(gradient))
            for title, contender in contenders.items():
                found.products[count][title].append(seconds(partial(contender.product, vectors)) / count)
    if any(not it <= TOLERANCE for row in found.differences.values() for it in row.values()):
        found.errors.update(errors_of(problem, contenders))
        print(f"{name}: relative errors against central differences: {found.errors}", flush=True)
    found.about.update(contenders[OURS].about())
    return found


def errors_of(problem: disthess.Problem, contenders: dict[str, Contender]) -> dict[str, float]:
    """Of one product each, against float64 differences of the gradient, which need no second derivative of anybody's."""
    vector = torch.randn(1, problem.numel, generator=torch.Generator().manual_seed(0), dtype=problem.dtype)
    names = [parameter.name for parameter in problem.parameters()]
    wanted = gradient_difference_products(problem.to(torch.float64), names, vector.double(), STEP)
    return {
        title: float((contender.product(vector).double() - wanted).norm() / wanted.norm())
        for title, contender in contenders.items()
    }


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def loss_of(problem: disthess.Problem) -> nn.Module:
    """The problem's loss as a module of outputs and targets."""
    return {"cross_entropy": nn.CrossEntropyLoss(), "mse": nn.MSELoss()}[str(problem.recipe.loss)]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by its formula, which peers need too: torch's fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gradient_of(problem: disthess.Problem) -> Callable[[], object]:
    """A plain forward and backward pass."""
    (inputs, targets), loss = problem.batches[0], loss_of(problem)
    parameters = list(problem.model.parameters())

    def gradient() -> object:
        with plain_attention():
            return torch.autograd.grad(loss(problem.model(inputs), targets), parameters)

    return gradient


def contenders_of(problem: disthess.Problem) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that are installed, and why others are not there."""
    makers = {
        "PyHessian": ("pyhessian", by_pyhessian),
        "hessian-eigenthings": ("hessian_eigenthings", by_eigenthings),
        "curvlinops": ("curvlinops", by_curvlinops),
    }
    found, skipped = {OURS: by_disthess(problem)}, {}
    for title, (module, maker) in makers.items():
        if importlib.util.find_spec(module) is None:
            skipped[title] = "not installed"
            print(f'{title} is left out: it is not installed (pip install -e ".[bench]")')
            continue
        begin = time.perf_counter()
        product = maker(problem)
        found[title] = Contender(product, time.perf_counter() - begin)
    return found, skipped


def by_disthess(problem: disthess.Problem) -> Contender:
    """`HessianOperator.matmat`, with the columns of its block one after the other in memory."""
    begin = time.perf_counter()
    operator = HessianOperator(problem, [parameter.name for parameter in problem.parameters()], problem.numel)
    construction = time.perf_counter() - begin

    def product(vectors: Tensor) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(operator.matmat(vectors.numpy().T).T))

    def about() -> dict[str, Any]:
        ways = {str(count): way for count, way in operator.ways.items()}
        return {"method": operator.method, "reason": operator.reason, "ways": ways}

    return Contender(product, construction, about)


def by_pyhessian(problem: disthess.Problem) -> Product:
    """``hessian_vector_product`` of one graph of the gradient, vector by vector."""
    from pyhessian.utils import hessian_vector_product

    (inputs, targets), parameters = problem.batches[0], list(problem.model.parameters())
    with plain_attention():
        value = loss_of(problem)(problem.model(inputs), targets)
        gradients = torch.autograd.grad(value, parameters, create_graph=True)
    sizes = [parameter.numel() for parameter in parameters]

    def one(vector: Tensor) -> Tensor:
        parts = [part.reshape(it.shape) for part, it in zip(vector.split(sizes), parameters, strict=True)]
        return torch.cat([entry.reshape(-1) for entry in hessian_vector_product(gradients, parameters, parts)])

    return lambda vectors: torch.stack([one(vector) for vector in vectors])


def by_eigenthings(problem: disthess.Problem) -> Product:
    """``HessianOperator @ vector``, vector by vector; it runs the model anew for each."""
    from hessian_eigenthings.operators.hessian import HessianOperator as Operator

    loss = loss_of(problem)
    operator = Operator(problem.model, [problem.batches[0]], lambda model, batch: loss(model(batch[0]), batch[1]))

    def product(vectors: Tensor) -> Tensor:
        with plain_attention():
            return torch.stack([operator @ vector for vector in vectors])

    return product


def by_curvlinops(problem: disthess.Problem) -> Product:
    """``HessianLinearOperator @ columns``; its check of the data belongs to its construction."""
    from curvlinops import HessianLinearOperator

    with plain_attention():
        operator = HessianLinearOperator(
            problem.model, loss_of(problem), list(problem.model.parameters()), [problem.batches[0]]
        )

    def product(vectors: Tensor) -> Tensor:
        with plain_attention():
            return (operator @ vectors.T).detach().T

    return product


def kept(it: Measured) -> dict[str, Any]:
    """For the JSON file: seconds, medians and ratios."""
    gradient = statistics.median(it.gradients)
    rows = {}
    for count, times in it.products.items():
        medians = {title: statistics.median(values) for title, values in times.items()}
        peers = {
            title: value for title, value in medians.items() if title != OURS and it.errors.get(title, 0.0) <= TOLERANCE
        }
        best = min(peers, key=peers.__getitem__, default=None)
        rows[str(count)] = {
            "seconds_per_vector": times,
            "medians": medians,
            "gradients": medians[OURS] / gradient,
            "best_peer": best,
            "ratio": medians[OURS] / peers[best] if best else None,
            "differences": it.differences[count],
        }
    return {
        "name": it.name,
        "P": it.numel,
        "gradient": gradient,
        "gradients": it.gradients,
        "construction": it.construction,
        "skipped": it.skipped,
        "errors_against_differences": it.errors,
        "disthess": it.about,
        "vectors": rows,
    }


def show(found: list[Measured]) -> None:
    """One row per problem and number of vectors; milliseconds per vector."""
    peers = sorted({title for it in found for row in it.products.values() for title in row if title != OURS})
    table = Table(title="Hessian-vector products, ms per vector (medians; !: wrong, not compared with)")
    header = ["problem", "vectors", "gradient", OURS, "way", "made in", *peers, "in gradients", "/ best peer"]
    for place, title in enumerate(header):
        table.add_column(title, justify="right" if place else "left", overflow="fold")
    for it in found:
        values = kept(it)
        for count, row in values["vectors"].items():
            medians = row["medians"]
            table.add_row(
                f"{it.name}, P={it.numel:,}",
                count,
                f"{values['gradient'] * 1e3:.2f}",
                f"{medians[OURS] * 1e3:.2f}",
                it.about["ways"].get(str(min(16, int(count))), it.about["method"]),
                f"{it.construction[OURS]:.1f} s",
                *(
                    f"{medians[peer] * 1e3:.2f}{'!' * (it.errors.get(peer, 0.0) > TOLERANCE)}"
                    if peer in medians
                    else "-"
                    for peer in peers
                ),
                f"{row['gradients']:.2f}",
                f"{row['ratio']:.2f}" if row["ratio"] else "-",
            )
    console = Console()
    Console(width=None if console.is_terminal else 150).print(table)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(_parser)
    main(_parser.parse_args())
