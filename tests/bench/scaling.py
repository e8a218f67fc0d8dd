"""Workers: one worker of one thread against two, Ray actors or forked processes, tiles against the plan, and a schedule of 64.

Times are from the begin of the first tile to the end of the last, and end to end (which has capture, and Ray's start and end).
The plan's FLOPs of a tile are compared with its seconds in the ledger (median of the rounds, one worker): the correlation, and
the largest factor between both after one common factor, ``exp max_t |log(seconds_t / flops_t) - mean|``.

What two workers could bring at most is measured beside them, in every round: the same run by two processes at once that know
nothing of each other, against one of them alone. Cores share caches and memory, so that it need not be 2.

The schedule is that of a real plan which is not computed. Balance is the FLOPs of the busiest owner over the mean; makespan is the
end of the last tile over the mean load where idle workers take tiles of others, as they do in a run, and time is FLOPs.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import statistics
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from hessian import warm_up
from problems import digits_mlp
from runs import Crew, Run, compute, median_stages
from settings import Settings, keep, settings_of
from table import scaling_table, schedule_table, show

import disthess
from disthess.execute.dispatch import Dispatcher
from disthess.planning.plan import Plan
from disthess.prepare import Options, prepare

CREWS = {"one": 1, "two": 2}
"""Workers of one thread each."""

BALANCE = 1.05
"""The busiest owner of the schedule may have so many times the mean."""

LARGE = 0.01
"""Share of the work from which on a tile's time matters to the schedule."""

MANY, QUICK_MANY = (512, 64), (128, 8)
"""Width of the scheduled MLP (8 and 2 times the suite's), and workers."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this verb alone."""
    parser.set_defaults(problem="mlp,gpt")
    parser.add_argument(
        "--executor", choices=("ray", "processes"), default="ray", help="what workers are (default ray)"
    )


def main(options: argparse.Namespace) -> None:
    """Measure each problem, then schedule.

    Raises:
        SystemExit: The schedule is not balanced.
    """
    settings = settings_of(options)
    warm_up(settings)
    # A run on Ray starts and ends it, which takes longer than anything else that is quick.
    names = settings.problems[:1] if settings.quick else settings.problems
    found = [measure(name, settings, options.executor) for name in names]
    show(scaling_table(found))
    schedule = schedule_many(*(QUICK_MANY if settings.quick else MANY))
    keep(settings, "scaling_schedule", schedule)
    show(schedule_table(schedule))
    if schedule["balance"] > BALANCE:
        raise SystemExit(f"the busiest of {schedule['workers']} workers has {schedule['balance']:.3f} of the mean load")


def measure(name: str, settings: Settings, executor: str) -> dict[str, Any]:
    """Both crews on one problem, turn about."""
    problem = settings.build(name)
    plan = disthess.plan(problem, dtype=settings.dtype, threads=1)
    print(f"{name}: P = {plan.layout.numel:,}, N = {plan.samples:,}, {len(plan.layout.tiles)} tiles", flush=True)
    crews = {key: Crew(executor, workers, 1) for key, workers in CREWS.items()}
    runs: dict[str, list[Run]] = {key: [] for key in crews}
    apart: list[float] = []
    for turn in range(settings.rounds):
        apart.append(apart_ratio(name, settings, CREWS["two"]))
        print(f"  round {turn + 1}  two processes apart: {apart[-1]:.2f} times one", flush=True)
        for key, crew in crews.items():
            run, _ = compute(problem, crew, settings.dtype)
            runs[key].append(run)
            print(f"  round {turn + 1}  {crew.name:28} {run.tiles:9.2f} s in tiles, {run.seconds:9.2f} s", flush=True)
    stages = {key: median_stages(found) for key, found in runs.items()}
    values = {
        "problem": {"name": name, "P": plan.layout.numel, "N": plan.samples, "dtype": settings.dtype},
        "executor": executor,
        "tiles": versus(stages, "tiles"),
        "end_to_end": versus(stages, "seconds"),
        "apart": {"ratio": statistics.median(apart), "each": apart},
        "stages": stages,
        "rounds_seconds": {key: [run.stages for run in found] for key, found in runs.items()},
        "forecast": forecast(plan, runs["one"]),
    }
    keep(settings, f"scaling_{name}_{settings.dtype}{'' if executor == 'ray' else '_' + executor}", values)
    return values


def apart_ratio(name: str, settings: Settings, count: int) -> float:
    """How many times as much so many processes compute at once, each a whole Hessian for itself, as one of them alone."""
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(tiles_alone, [name] * count, [settings] * count))
        alone = pool.submit(tiles_alone, name, settings).result()
        together = list(pool.map(tiles_alone, [name] * count, [settings] * count))
    return count * alone / statistics.mean(together)


def tiles_alone(name: str, settings: Settings) -> float:
    """Seconds in the tiles of a run without Ray, on one thread."""
    return compute(settings.build(name), Crew("serial", 1, 1), settings.dtype)[0].tiles


def versus(stages: dict[str, dict[str, float]], stage: str) -> dict[str, float]:
    """Medians of both crews, and the first over the second: 2 would be perfect."""
    one, two = stages["one"][stage], stages["two"][stage]
    return {"one": one, "two": two, "ratio": one / two}


def forecast(plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    """Seconds of tiles against their projected FLOPs.

    Returns:
        Pearson's correlation (None for fewer than three tiles), the largest |log ratio| after one common factor, the same as a
        factor, that factor over tiles of at least 1 % of the work, the common rate in FLOP/s, and both columns.
    """
    flops = np.array([tile.flops for tile in plan.layout.tiles], dtype=np.float64)
    taken = np.array([statistics.median(times) for times in zip(*(run.tile_seconds for run in runs), strict=True)])
    logs = np.log(taken / flops)
    off = np.abs(logs - logs.mean())
    largest = float(off.max())
    large = flops >= LARGE * flops.sum()
    return {
        "correlation": float(np.corrcoef(flops, taken)[0, 1]) if len(flops) > 2 else None,
        "largest_log_ratio": largest,
        "largest_factor": float(np.exp(largest)),
        "largest_factor_of_large_tiles": float(np.exp(off[large].max())) if large.any() else None,
        "flops_per_second": float(np.exp(-logs.mean())),
        "tile_flops": flops.tolist(),
        "tile_seconds": taken.tolist(),
    }


def schedule_many(width: int, workers: int) -> dict[str, Any]:
    """Plan the digits MLP at a width for many workers."""
    problem = digits_mlp.problem(hidden=width, steps=0)
    plan = prepare(problem, Options(executor="ray", workers=workers, threads=1), checked=False).plan
    load = Counter[int]()
    for tile in plan.layout.tiles:
        load[tile.owner] += tile.flops
    mean = plan.flops / workers
    return {
        "plan": f"mlp 64-{width}-{width}-10",
        "P": plan.layout.numel,
        "tiles": len(plan.layout.tiles),
        "workers": workers,
        "flops": plan.flops,
        "balance": max(load.values()) / mean,
        "makespan": makespan(plan, workers) / mean,
    }


def makespan(plan: Plan, workers: int) -> int:
    """FLOPs until the last tile ends, when workers ask the dispatcher of a run for their next tile as they become idle."""
    dispatcher = Dispatcher(plan.layout.tiles, workers)
    idle = [(0, worker) for worker in range(workers)]
    last = 0
    while idle:
        now, worker = heapq.heappop(idle)
        if dispatcher.in_flight(worker) is not None:
            dispatcher.finish(worker)
        tile = dispatcher.take(worker)
        if tile is not None:
            last = max(last, now + tile.flops)
            heapq.heappush(idle, (now + tile.flops, worker))
    return last
