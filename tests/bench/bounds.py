"""What bounds the time of a whole Hessian: counts of what its tiles do, and how fast torch does each of these alone.

One run on one thread, in which every operation of every tile is noted: its name, shapes, strides and numbers. Then each distinct
one is timed alone, in a hot cache, again and again; the least time counts, times how often it was asked for. That is a floor for
a sweep of the same operations by torch's kernels: nothing between them, every input in cache. Three floors per problem, each
with the seconds of capture and certificate (``fixed``), over the threads:

    peak        the plan's product FLOPs at the speed of a square torch.mm
    products    the products alone, as torch multiplies these very shapes
    operations  all operations alone

The best peer over such a floor is the most times that disthess could be faster with no work but that, and a target above it is
out of reach for these operations. The peer here is torch.func with its best chunk, in the same process.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final
from unittest import mock

import machine
import torch
from hessian import warm_up
from peers import CHUNKS, Peer, spread_columns, time_peer, torch_func_columns
from runs import Crew, compute
from settings import Settings, keep, settings_of
from table import bounds_table, show
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import disthess
from disthess.execute.heap import KeptHeap
from disthess.sweep.engine import GraphEngine

TARGETS = {"mlp": 10.0, "cnn": 6.0, "rnn": 8.0, "gpt": 8.0}
"""Times faster than the best peer that were aimed at in float32; two thirds of it in float64."""

PRODUCTS = ("_linear_pointwise", "mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward")
ENOUGH_SECONDS, FEWEST, MOST = 0.02, 3, 200
"""An operation is repeated for so long, at least and at most so often."""


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor as an operation sees it; ``kept`` holds one of whole numbers, which are places and need be in range."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    kept: int | None = None


@final
class Tally(TorchDispatchMode):
    """Counts operations by name and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, ...]] = Counter()
        self.calls: dict[tuple[Any, ...], tuple[Callable[..., Any], Any]] = {}
        self.whole: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation, and do it."""
        leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        forms = tuple(self._form(leaf) for leaf in leaves)
        key = (func, str(spec), *map(str, forms))
        self.counts[key] += 1
        if key not in self.calls:
            self.calls[key] = (func, (forms, spec))
        return func(*args, **(kwargs or {}))

    def _form(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point():
            return Form(tuple(leaf.shape), leaf.stride(), leaf.dtype)
        # By value: the same places in another tensor are the same work.
        key = hash((tuple(leaf.shape), leaf.stride(), int(leaf.sum()), int(leaf.reshape(-1)[:1].sum())))
        self.whole.setdefault(key, leaf)
        return Form(tuple(leaf.shape), leaf.stride(), leaf.dtype, key)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this verb alone."""
    parser.add_argument("--columns", type=int, help="columns that the peer is timed on (default 256)")


def main(options: argparse.Namespace) -> None:
    """Find the floors of each problem, and print the table."""
    settings = settings_of(options)
    wanted = options.columns or (32 if settings.quick else 256)
    warm_up(settings)
    show(bounds_table([bounds(name, settings, wanted) for name in settings.problems]))


def bounds(name: str, settings: Settings, wanted: int) -> dict[str, Any]:
    """Everything about one problem, as JSON values."""
    problem = settings.build(name)
    plan = disthess.plan(problem, dtype=settings.dtype, threads=1)
    print(f"{name}: P = {plan.layout.numel:,}, N = {plan.samples:,}, {settings.dtype}", flush=True)
    crew = Crew("threads", settings.threads, 1)
    runs = [compute(problem, crew, settings.dtype)[0] for _ in range(settings.rounds)]
    best = min(runs, key=lambda run: run.seconds)
    peer = best_peer(problem, settings, spread_columns(plan.layout.numel, wanted), plan.layout.numel)
    with counted() as tally:
        compute(problem, Crew("serial", 1, 1), settings.dtype)
    alone = alone_seconds(tally)
    peak = machine.gemm_flops_per_second(settings.dtype, 1, 512 if settings.quick else machine.GEMM_SIZE)
    products = sum(seconds for operation, seconds in alone.items() if operation in PRODUCTS)
    fixed = best.seconds - best.tiles
    work = {"peak": plan.product_flops / peak, "products": products, "operations": sum(alone.values())}
    floors = {key: fixed + seconds / settings.threads for key, seconds in work.items()}
    values = {
        "problem": {"name": name, "P": plan.layout.numel, "N": plan.samples, "dtype": settings.dtype},
        "product_flops": plan.product_flops,
        "entry_flops": plan.entry_flops,
        "gemm_flops_per_second_one_thread": peak,
        "operations": {"calls": sum(tally.counts.values()), "distinct": len(tally.counts)},
        "seconds_alone": dict(sorted(alone.items(), key=lambda entry: -entry[1])),
        "seconds_alone_of": work,
        "run": best.stages,
        "fixed": fixed,
        "peer": peer,
        "target": TARGETS[name] * (1 if settings.dtype == "float32" else 2 / 3),
        "times_faster": {**{key: peer["seconds"] / floor for key, floor in floors.items()}, "run": peer["seconds"] / best.seconds},
    }  # fmt: skip
    keep(settings, f"bounds_{name}_{settings.dtype}", values)
    return values


def best_peer(problem: disthess.Problem, settings: Settings, columns: Tensor, numel: int) -> dict[str, Any]:
    """torch.func with the chunk that is best in the median of the rounds."""
    product = torch_func_columns(problem.to(getattr(torch, settings.dtype)))
    seconds: dict[str, float] = {}
    for chunk in [chunk for chunk in CHUNKS if chunk <= len(columns)] or [len(columns)]:
        peer = Peer("torch.func", chunk, product)
        times = [
            time_peer(peer, columns, numel, settings.dtype, settings.threads).scaled for _ in range(settings.rounds)
        ]
        seconds[peer.name] = sorted(times)[len(times) // 2]
    name = min(seconds, key=seconds.__getitem__)
    return {"name": name, "seconds": seconds[name]}


@contextmanager
def counted() -> Iterator[Tally]:
    """Counts the operations of all tiles that are computed in this thread."""
    tally, work = Tally(), GraphEngine.compute

    def compute_counted(engine: GraphEngine, *arguments: Any) -> Any:
        with tally:
            return work(engine, *arguments)

    with mock.patch.object(GraphEngine, "compute", compute_counted):
        yield tally


def alone_seconds(tally: Tally) -> dict[str, float]:
    """Seconds of all calls by operation, each distinct one timed alone on one thread."""
    before, heap = torch.get_num_threads(), KeptHeap()
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    try:
        with torch.no_grad():
            for key, count in tally.counts.items():
                func, (forms, spec) = tally.calls[key]
                args, kwargs = pytree.tree_unflatten([made(form, tally.whole) for form in forms], spec)
                found[func.overloadpacket.__name__] += count * least_seconds(func, args, kwargs)
    finally:
        torch.set_num_threads(before)
        heap.restore()
    return dict(found)


def made(form: Any, whole: dict[int, Tensor]) -> Any:
    """A tensor of that form with numbers in it; anything else as it is."""
    if not isinstance(form, Form):
        return form
    if form.kept is not None:
        return whole[form.kept]
    reach = 1 + sum((size - 1) * step for size, step in zip(form.shape, form.stride, strict=True))
    return torch.randn(max(1, reach), dtype=form.dtype).as_strided(form.shape, form.stride)


def least_seconds(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    """The least time of one call."""
    func(*args, **kwargs)
    least, spent, times = float("inf"), 0.0, 0
    while times < FEWEST or (spent < ENOUGH_SECONDS and times < MOST):
        begin = time.perf_counter()
        func(*args, **kwargs)
        seconds = time.perf_counter() - begin
        least, spent, times = min(least, seconds), spent + seconds, times + 1
    return least
