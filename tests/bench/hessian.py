"""The whole Hessian: disthess from the problem to the certified store, against torch.func and curvlinops.

Contenders run in one process, turn about, and medians over the rounds count.

disthess runs end to end: capture, tiles, store in a temporary folder, certificate. It runs as one worker with all threads, and
as many workers of one thread: threads of the process, forked processes, Ray actors. The best of these counts. Ray is started
and ended inside the clock, as for anybody who gives no address. Peers fill a dense array in memory and write nothing; the best
chunk of the best tool counts. They are timed on some columns at equal distances over all parameters, after a chunk off the
clock, and scaled up by P over these columns (``--columns all``: on all). A tiny problem warms disthess up.

All must agree: where one differs by more than the tolerance, relative to the largest entry, autograd twice over the eager model
in float64 decides on the worst column. If it is against disthess, the benchmark fails. If it is against the peer, that is
printed and kept, and the peer is not the best one, however fast.

GEMM peak is a square torch.mm on the same threads, measured in every round. The sweep's rate is the plan's product FLOPs over
the seconds in tiles (ledger: computing and writing them; of several workers their mean), so that entry by entry work and
writing count against it. Writes: the store's bytes per second of tiles; the same bytes by ``Store.write_tile`` alone; and by
numpy.tofile into one file of the same folder, without fsync (a store asks for none) and with.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import machine
import torch
from agreement import TOLERANCES, Agreement
from peers import CHUNKS, Peer, peers_of, spread_columns, time_peer
from runs import Crew, Run, compute, median_stages
from settings import Settings, keep, settings_of
from table import hessian_table, show
from variants import build

import disthess
from disthess.execute.forked import why_not
from disthess.planning.plan import Plan

QUICK_COLUMNS, QUICK_GEMM = 32, 512


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this verb alone."""
    parser.add_argument("--columns", help="columns that peers are timed on, or all (default 512)")
    parser.add_argument(
        "--ray", action=argparse.BooleanOptionalAction, help="run the form with Ray workers (default, but for --quick)"
    )


def main(options: argparse.Namespace) -> None:
    """Benchmark each problem, and print the table."""
    settings = settings_of(options)
    wanted = options.columns or (QUICK_COLUMNS if settings.quick else 512)
    columns = None if wanted == "all" else int(wanted)
    crews = crews_of(settings.threads, ray=not settings.quick if options.ray is None else options.ray)
    warm_up(settings)
    found = [benchmark(name, settings, columns, crews) for name in settings.problems]
    show(hessian_table(found))


def crews_of(threads: int, *, ray: bool) -> tuple[Crew, ...]:
    """The forms of disthess on so many cores; with and without Ray."""
    serial = Crew("serial", 1, threads)
    here = (serial, Crew("threads", threads, 1)) if threads > 1 else (serial,)
    if threads > 1 and not why_not():
        here = (*here, Crew("processes", threads, 1))
    return (*here, Crew("ray", threads, 1)) if ray else here


def warm_up(settings: Settings) -> None:
    """Load what a first run loads, off the clock: torch's exporter and the like. Not where nobody will read the times."""
    if not settings.quick:
        compute(build("mlp", 1 / 16, 8), Crew("serial", 1, settings.threads), settings.dtype)


@dataclass(slots=True)
class Measured:
    """What the rounds of one problem gave, by contender; ``peaks`` in FLOP/s."""

    agreement: Agreement
    peaks: list[float] = field(default_factory=list)
    runs: dict[Crew, list[Run]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    timed_seconds: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, seconds: float, turn: int) -> None:
        """Keep and print one time."""
        self.seconds.setdefault(name, []).append(seconds)
        print(f"  round {turn + 1}  {name:28} {seconds:9.2f} s", flush=True)


def benchmark(name: str, settings: Settings, wanted: int | None, crews: Sequence[Crew]) -> dict[str, Any]:
    """All rounds of one problem; returns what was kept."""
    problem = settings.build(name)
    plan = disthess.plan(problem, dtype=settings.dtype, threads=settings.threads)
    numel = plan.layout.numel
    columns = spread_columns(numel, wanted)
    peers = peers_of(problem, settings.dtype, [chunk for chunk in CHUNKS if chunk <= len(columns)] or [len(columns)])
    print(
        f"{name}: P = {numel:,}, N = {plan.samples:,}, {settings.dtype}; peers on {len(columns):,} columns", flush=True
    )
    measured = Measured(Agreement(problem, columns, settings.dtype))
    for turn in range(settings.rounds):
        size = QUICK_GEMM if settings.quick else machine.GEMM_SIZE
        measured.peaks.append(machine.gemm_flops_per_second(settings.dtype, settings.threads, size))
        for crew in crews:
            run_disthess(problem, crew, settings, measured, turn)
        for peer in peers:
            run_peer(peer, settings, columns, numel, measured, turn)
    values = summary(name, plan, settings, columns, measured, peers)
    keep(settings, f"hessian_{name}_{settings.dtype}", values)
    return values


def run_disthess(problem: disthess.Problem, crew: Crew, settings: Settings, measured: Measured, turn: int) -> None:
    """One run of disthess; its columns are looked at after the clock, in the first round."""
    first = crew not in measured.runs
    run, rows = compute(problem, crew, settings.dtype, measured.agreement.read if first else lambda _: None)
    measured.runs.setdefault(crew, []).append(run)
    measured.note(crew.name, run.seconds, turn)
    if first:
        measured.agreement.note_run(crew.name, rows)


def run_peer(peer: Peer, settings: Settings, columns: torch.Tensor, numel: int, measured: Measured, turn: int) -> None:
    """One timing of a peer, compared in the first round."""
    timing = time_peer(peer, columns, numel, settings.dtype, settings.threads)
    measured.note(peer.name, timing.scaled, turn)
    measured.timed_seconds.setdefault(peer.name, []).append(timing.seconds)
    if turn == 0:
        measured.agreement.note_peer(peer.name, timing.matrix)


def summary(
    name: str, plan: Plan, settings: Settings, columns: torch.Tensor, measured: Measured, peers: Sequence[Peer]
) -> dict[str, Any]:
    """Everything that was measured, as JSON values.

    Raises:
        SystemExit: No peer is right.
    """
    medians = {contender: statistics.median(values) for contender, values in measured.seconds.items()}
    best_disthess = min((crew.name for crew in measured.runs), key=medians.__getitem__)
    right = [peer.name for peer in peers if peer.name not in measured.agreement.wrong]
    if not right:
        raise SystemExit(f"all peers are wrong on {name}: there is nothing to compare with")
    best_peer = min(right, key=medians.__getitem__)
    peak = statistics.median(measured.peaks)
    scale, _ = settings.size(name)
    numel = plan.layout.numel
    return {
        "problem": {"name": name, "scale": scale, "P": numel, "N": plan.samples, "dtype": settings.dtype},
        "columns": {"timed": len(columns), "of": numel, "peers_scaled_up": len(columns) < numel},
        "seconds": measured.seconds,
        "seconds_of_timed_columns": measured.timed_seconds,
        "medians": medians,
        "best_disthess": best_disthess,
        "best_peer": best_peer,
        "best_of_tools": {tool: best_of(tool, peers, medians) for tool in {peer.tool: None for peer in peers}},
        "ratio": medians[best_disthess] / medians[best_peer],
        "differences": measured.agreement.differences,
        "wrong_peers": measured.agreement.wrong,
        "tolerance": TOLERANCES[settings.dtype],
        "gemm_flops_per_second": {"rounds": measured.peaks, "median": peak},
        "sweeps": {crew.name: sweep(plan, crew, runs, peak) for crew, runs in measured.runs.items()},
        "writes": writes(plan, settings, measured),
    }


def best_of(tool: str, peers: Sequence[Peer], medians: dict[str, float]) -> dict[str, Any]:
    """The best chunk of a tool."""
    best = min((peer for peer in peers if peer.tool == tool), key=lambda peer: medians[peer.name])
    return {"name": best.name, "chunk": best.chunk, "seconds": medians[best.name]}


def sweep(plan: Plan, crew: Crew, runs: Sequence[Run], peak: float) -> dict[str, Any]:
    """Stages of a form of disthess, and the rate of its matrix products while it was in tiles."""
    stages = median_stages(runs)
    rate = plan.product_flops * crew.workers / stages["busy"]
    return {
        "workers": crew.workers,
        "threads": crew.threads,
        "stages": stages,
        "product_flops": plan.product_flops,
        "entry_flops": plan.entry_flops,
        "flops_per_second": rate,
        "fraction_of_peak": rate / peak,
    }


def writes(plan: Plan, settings: Settings, measured: Measured) -> dict[str, Any]:
    """Bytes per second: of the runs, of a store's writes alone, and of one raw file."""
    nbytes = next(iter(measured.runs.values()))[0].written_bytes
    seconds: dict[str, list[float]] = {"store_alone": [], "raw": [], "raw_fsync": []}
    for _ in range(settings.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds["store_alone"].append(machine.store_write_seconds(folder, plan.layout))
        with tempfile.TemporaryDirectory() as folder:
            seconds["raw"].append(machine.raw_write_seconds(folder, nbytes, fsync=False))
            seconds["raw_fsync"].append(machine.raw_write_seconds(folder, nbytes, fsync=True))
    rates = {kind: nbytes / statistics.median(values) for kind, values in seconds.items()}
    running = {crew.name: nbytes / median_stages(runs)["tiles"] for crew, runs in measured.runs.items()}
    return {"bytes": nbytes, "seconds": seconds, "bytes_per_second": {**rates, "while_computing": running}}
