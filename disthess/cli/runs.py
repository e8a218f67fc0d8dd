"""Verbs that take a run file, or mend its store: plan, run, verify, curvature, stopping, compare."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from disthess.cli.errors import termination_as_interrupt
from disthess.cli.options import (
    AddressOption,
    BlocksOf,
    ConfigArgument,
    DeviceOption,
    ExecutorOption,
    JsonOption,
    RateOption,
    SeedOption,
    StoreArgument,
    StoreOption,
    ThreadsOption,
    WorkersOption,
    print_json,
    settings_of,
)
from disthess.errors import ConfigError
from disthess.units import human_bytes, human_seconds


def plan(
    config: ConfigArgument,
    store: StoreOption = None,
    executor: ExecutorOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    tflops: RateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would compute: tiles, operations, bytes, memory, hours. Computes nothing, writes nothing.

    The workers need not be here: `--executor ray --workers 256 --device cuda --tflops 40` plans for 256 GPUs of that rate. Without
    --tflops the rate is measured, or assumed where the device is not here. Models on torch's meta device are planned by shapes.
    Of an audit file it says how many products each number takes; one product is timed.
    """
    if _is_audit_file(config):
        given = {"--store": store, "--executor": executor, "--workers": workers, "--threads": threads, "--device": device,
                 "--tflops": tflops}  # fmt: skip
        for option, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"{option} is for run files, and {config} is an audit file. Set it in its section measure."
                )
        from disthess.cli.audit_runs import print_audit_plan

        print_audit_plan(config, as_json)
        return
    if tflops is not None and not 0 < tflops < float("inf"):
        raise typer.BadParameter(f"must be a positive number, got {tflops}", param_hint="--tflops")
    settings = settings_of(config, store=store, executor=executor, workers=workers, threads=threads, device=device)
    from disthess import api
    from disthess.execute.memory import peak_process_bytes
    from disthess.loading import load_problem

    begin = time.perf_counter()
    problem = load_problem(settings.source(config))
    made = api.plan(problem, path=settings.compute.store, **settings.plan_options(), address=settings.compute.address)
    taken = time.perf_counter() - begin
    rate, origin = api.products_speed(made, None if tflops is None else tflops * 1e12)
    peak = peak_process_bytes()
    if as_json:
        own = {"planning_seconds": taken, "planning_peak_bytes": peak}
        pace = {"flops_per_second": rate, "rate": origin, "seconds": made.seconds(rate)}
        print_json({**made.to_json(), **pace, **own})
        return
    typer.echo(made.describe(flops_per_second=rate, rate=origin))
    size = "" if peak is None else f" and {human_bytes(peak)} of memory, libraries included"
    typer.echo(f"\nThis plan took {human_seconds(taken)}{size}.")


def _is_audit_file(config: Path) -> bool:
    from disthess.audit_config import is_audit
    from disthess.config_text import read_tree

    return is_audit(read_tree(config, "run file", "configs/digits_mlp.yaml"))


def run(
    config: ConfigArgument,
    store: StoreOption = None,
    executor: ExecutorOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    address: AddressOption = None,
) -> None:
    """Compute the Hessian that a run file describes into its store, or go on where an earlier run stopped.

    Ctrl-C finishes the tiles in flight; the same command resumes. Then prints the certificate, extreme eigenvalues and
    the largest blocks, and draws the spectrum and the block norms beside the store.
    """
    settings = settings_of(config, store=store, executor=executor, workers=workers, threads=threads, address=address)
    from disthess import api
    from disthess.cli import tables
    from disthess.loading import load_problem
    from disthess.prepare import Options, prepare

    with termination_as_interrupt():
        problem = load_problem(settings.source(config))
        path = settings.compute.store
        options = Options(**settings.plan_options(), address=settings.compute.address)
        prepared = prepare(problem, options)
        rate, origin = api.products_speed(prepared.plan)
        typer.echo(prepared.plan.describe(flops_per_second=rate, rate=origin))
        typer.echo("")
        made = api.run_prepared(prepared, options, path, seed=settings.compute.seed, progress=True)
        tables.print_run(made, settings.report, path)


def verify(
    store: StoreArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend it; with --config, compute again exactly what is damaged.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="CONFIG", help="With --repair: the run file that the store was computed from."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read everything in a store again and compare it with its checksums; exit code 1 if anything is damaged or missing.

    `--repair` writes metadata and ledger again and removes damaged results. With `--config` it also computes the damaged
    tiles, sums, gradient and loss again; without, it marks them as missing for the next `disthess run`.
    """
    from disthess.cli import mending

    if config is not None and not repair:
        raise ConfigError("--config says what to compute again, and is used with --repair alone. Add --repair.")
    with termination_as_interrupt():
        report = mending.verify_store(store, repair, config)
    if as_json:
        print_json(report)
    else:
        mending.print_verification(report)
    if not report["whole"] and (config is not None or not report["repaired"]):
        raise typer.Exit(1)


def curvature(
    config: ConfigArgument,
    top: Annotated[int, typer.Option("--top", min=1, metavar="K", help="How many nodes to print.")] = 20,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="F.png", help="Draw the shares.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how much of the residual (Hessian minus Gauss-Newton) each node of the model contributes. Needs no store.

    The contributions add up to the residual exactly; shares add up to 1. Takes memory for several P x P matrices.
    """
    from disthess import bend
    from disthess.cli import point_tables
    from disthess.loading import load_problem

    settings = settings_of(config)
    section = settings.compute
    found = bend.node_curvature(
        load_problem(settings.source(config)), parameters=section.parameters, dtype=section.dtype
    )
    if plot is not None:
        point_tables.draw_curvature(plot, found)
    if as_json:
        print_json(point_tables.curvature_summary(found))
    else:
        point_tables.print_curvature(found, top, plot)


def stopping(
    config: ConfigArgument,
    store: StoreOption = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0.0, metavar="E", help="Of the scaled gradient; the others follow.")
    ] = 1e-6,
    as_json: JsonOption = False,
) -> None:
    """Say whether the parameters are at a minimum: scaled gradient, smallest eigenvalue, Newton decrement.

    Reads the run file's store if it is complete, else multiplies by the Hessian without one. A small gradient alone proves
    nothing: it is also small at saddles, on plateaus, and where one curvature dwarfs the others.
    """
    settings = settings_of(config, store=store)
    from disthess import api, steps
    from disthess.cli import point_tables
    from disthess.loading import load_problem

    section = settings.compute
    opened = api.open_store(section.store) if api.has_store(section.store) else None
    found = steps.stopping_report(
        load_problem(settings.source(config)),
        store=None if opened is None or opened.missing_tiles() else opened,
        parameters=section.parameters,
        gradient_tolerance=tolerance,
    )
    if as_json:
        print_json(point_tables.stopping_summary(found))
    else:
        point_tables.print_stopping(found)


def couplings(
    config: ConfigArgument,
    of: Annotated[BlocksOf, typer.Option("--of", help="What the blocks are.")] = BlocksOf.parameters,
    probes: Annotated[
        int, typer.Option("--probes", min=4, metavar="N", help="Products per block; intervals narrow with their root.")
    ] = 24,
    top: Annotated[int, typer.Option("--top", min=1, metavar="K", help="How many pairs to print.")] = 20,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="F.csv", help="Write all pairs as CSV.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="F.png", help="Draw the couplings as a heat map.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Say which blocks have to do with each other, from Hessian-vector products alone: norm, coupling, trace, with intervals.

    Coupling C = |H_ab| / sqrt(|H_aa| |H_bb|): 0 where two blocks may be treated as independent. Needs no store and forms nothing
    of size P x P; sections of the run file are blocks of their own.
    """
    settings = settings_of(config)
    from disthess import couplings as maps
    from disthess.cli import pair_tables
    from disthess.loading import load_problem

    section = settings.compute
    found = maps.coupling_map(
        load_problem(settings.source(config)),
        of=of.value,
        parameters=section.parameters,
        sections=section.sections if of == BlocksOf.parameters else None,
        dtype=section.dtype,
        probes=probes,
        seed=seed,
        progress=lambda done, blocks: typer.echo(f"block {done} of {blocks}", err=True),
    )
    pair_tables.write_couplings(found, csv, plot)
    if as_json:
        print_json(found.to_json())
    else:
        pair_tables.print_couplings(found, top, csv, plot)


def compare(
    config: ConfigArgument,
    rank: Annotated[
        list[int] | None, typer.Option("--rank", min=1, metavar="R", help="Of low-rank forms; may be repeated.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", metavar="DIR", help="Keep the stores in this new folder; else they are removed."),
    ] = None,
    threads: ThreadsOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="F.png", help="Draw errors over bytes.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compute the exact Hessian and what people use in its place: one table of errors, bytes and seconds.

    Gauss-Newton, block-diagonal, diagonal, Kronecker products (nearest, by expectation, K-FAC), low rank. The run file's
    store is neither read nor written; seconds are those of getting there from the problem.
    """
    settings = settings_of(config, threads=threads)
    from disthess import comparison
    from disthess.cli import point_tables, tables
    from disthess.loading import load_problem
    from disthess.pictures import files as pictures

    section = settings.compute
    found = comparison.compare(
        load_problem(settings.source(config)),
        folder,
        ranks=tuple(rank or (10, 50)),
        parameters=section.parameters,
        dtype=section.dtype,
        threads=section.threads,
        watch=lambda name: typer.echo(f"computing {name} ...", err=True),
    )
    if plot is not None:
        rows = found.rows
        sizes, errors = [row.stored_bytes for row in rows], [row.frobenius_error for row in rows]
        title = f"Approximations of the Hessian, P = {found.numel:,}"
        tables.draw(pictures.trade_picture, plot, [row.name for row in rows], sizes, errors, title)
    if as_json:
        print_json(found.to_json())
    else:
        point_tables.print_comparison(found, plot)
