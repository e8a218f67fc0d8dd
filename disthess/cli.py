"""The command ``disthess``: each verb parses, calls the library, prints."""

from __future__ import annotations

import enum
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from disthess import __version__
from disthess.cli_errors import ErrorReportingGroup, termination_as_interrupt

if TYPE_CHECKING:
    from disthess.config import RunConfig

app = typer.Typer(
    cls=ErrorReportingGroup,
    name="disthess",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A first run: `disthess run configs/digits_mlp.yaml`, then `disthess info runs/digits_mlp.zarr`. "
    "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.",
)


class ExecutorName(enum.StrEnum):
    """Who computes the tiles."""

    serial = "serial"
    ray = "ray"


class PartName(enum.StrEnum):
    """Which matrix."""

    hessian = "hessian"
    ggn = "ggn"
    residual = "residual"


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file (YAML), as those in configs/.")]
StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="A store that 'disthess run' has written.")]
PartOption = Annotated[PartName, typer.Option("--part", help="Which matrix; residual = hessian - ggn.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random start vectors.")]
StoreOption = Annotated[
    Path | None, typer.Option("--store", metavar="S", help="Write here, not to the run file's store.")
]
ExecutorOption = Annotated[ExecutorName | None, typer.Option("--executor", help="In this process, or Ray actors.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, metavar="N", help="How many Ray actors.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="T", help="Threads per worker. Equal threads, equal bytes."),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="A", help="A running Ray cluster, such as 'auto'; else a private local one."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"disthess {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere.")] = False,
) -> None:
    """The exact Hessian of a PyTorch model, block by block, in a Zarr store.

    `plan` says what a run would cost, `run` computes it or goes on where it stopped; the other verbs read the
    store. A Hessian of P parameters has P x P entries: ask for the plan first.
    """
    # Torch says this when its oneDNN kernels are switched off, on any machine without an Intel GPU; it concerns nobody here.
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN", category=UserWarning)


def main() -> None:
    """Entry point of the command ``disthess``."""
    app()


@app.command(epilog="Example: `disthess plan configs/digits_mlp.yaml --json | jq .tiles`")
def plan(
    config: ConfigArgument,
    store: StoreOption = None,
    executor: ExecutorOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would compute: tiles, operations, bytes, memory. Computes nothing, writes nothing."""
    settings = _settings(config, store=store, executor=executor, workers=workers, threads=threads)
    from disthess import api
    from disthess.loading import load_problem

    problem = load_problem(settings.source(config))
    made = api.plan(problem, path=settings.compute.store, **settings.plan_options())
    if as_json:
        _print_json(made.to_json())
        return
    typer.echo(made.describe(flops_per_second=api.products_speed(made)))


@app.command(
    epilog="Examples: `disthess run configs/digits_mlp.yaml`; on two Ray actors of one thread each: "
    "`disthess run configs/digits_mlp.yaml --executor ray --workers 2 --threads 1`"
)
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
    settings = _settings(config, store=store, executor=executor, workers=workers, threads=threads, address=address)
    from disthess import api, cli_report
    from disthess.loading import load_problem
    from disthess.prepare import Options, prepare

    with termination_as_interrupt():
        problem = load_problem(settings.source(config))
        path = settings.compute.store
        options = Options(**settings.plan_options(), address=settings.compute.address)
        prepared = prepare(problem, options)
        typer.echo(prepared.plan.describe(flops_per_second=api.products_speed(prepared.plan)))
        typer.echo("")
        made = api.run_prepared(prepared, options, path, seed=settings.compute.seed, progress=True)
        cli_report.print_run(made, settings.report, path)


@app.command(epilog="Example: `disthess info runs/digits_mlp.zarr --json`")
def info(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Say what a store holds: parameters, parts, tiles done and missing, loss, gradient norm, certificates."""
    from disthess import api, cli_report

    opened = api.open_store(str(store))
    if as_json:
        _print_json(cli_report.store_summary(opened))
    else:
        cli_report.print_store(opened)


@app.command(
    epilog="Example: `disthess block runs/digits_mlp.zarr 2.weight 2.bias --out block.npy`; 'disthess info' lists "
    "the parameter names."
)
def block(
    store: StoreArgument,
    a: Annotated[str, typer.Argument(metavar="A", help="Parameter of the rows.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Parameter of the columns.")],
    part: PartOption = PartName.hessian,
    out: Annotated[Path | None, typer.Option("--out", metavar="F.npy", help="Save the block as a NumPy file.")] = None,
) -> None:
    """Show or save one block: d2L / dA dB, the entries of A by the entries of B."""
    from disthess import api, cli_report

    values = api.open_store(str(store)).block(a, b, part=part.value)
    if out is not None:
        cli_report.save_array(out, values)
    cli_report.print_block(values, f"{part.value} of {a} by {b}", out)


@app.command(epilog="Example: `disthess spectrum runs/digits_mlp.zarr --top 20 --density --plot spectrum.png`")
def spectrum(
    store: StoreArgument,
    top: Annotated[int, typer.Option("--top", min=0, metavar="K", help="How many eigenvalues at each end.")] = 10,
    density: Annotated[bool, typer.Option("--density", help="Estimate the density of all eigenvalues too.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="F.png", help="Draw them.")] = None,
    part: PartOption = PartName.hessian,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Extreme eigenvalues with the residual ||Hv - lambda v|| of each, and the spectral density."""
    from disthess import api, cli_report, pictures

    opened = api.open_store(str(store))
    pairs = api.eigenvalues(opened, k=top, part=part.value, seed=seed) if top else None
    curve = api.spectral_density(opened, part=part.value, seed=seed) if density or plot else None
    if plot is not None and curve is not None:
        cli_report.draw(pictures.spectrum_picture, plot, curve, pairs)
    if as_json:
        _print_json(cli_report.spectrum_summary(part.value, pairs, curve if density else None))
        return
    cli_report.print_spectrum(part.value, pairs, curve if density else None)
    if plot is not None:
        typer.echo(f"picture: {plot}")


@app.command(epilog="Example: `disthess lowrank runs/digits_mlp.zarr --rank 50 --out lowrank.npz`")
def lowrank(
    store: StoreArgument,
    rank: Annotated[int, typer.Option("--rank", min=1, metavar="R", help="How many eigenpairs to keep.")] = 50,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="F.npz", help="Save values [R] and vectors [P, R].")
    ] = None,
    part: PartOption = PartName.hessian,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """The matrix as V diag(values) V^T of low rank, with an estimate of what that leaves out."""
    from disthess import api, cli_report

    found = api.low_rank(api.open_store(str(store)), rank, part=part.value, seed=seed)
    if out is not None:
        cli_report.save_arrays(out, values=found.values, vectors=found.vectors)
    if as_json:
        _print_json(cli_report.low_rank_summary(part.value, found))
    else:
        cli_report.print_low_rank(part.value, found, out)


@app.command(
    epilog="Examples: `disthess verify runs/digits_mlp.zarr`; after damage, `disthess verify "
    "runs/digits_mlp.zarr --repair` and `disthess run` again."
)
def verify(
    store: StoreArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mark damaged tiles as missing, so that running again computes them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every stored tile again and compare its checksum with the ledger; exit code 1 if any is damaged or missing."""
    from disthess import cli_report

    report = cli_report.verify_store(store, repair)
    if as_json:
        _print_json(report)
    else:
        cli_report.print_verification(report)
    if not report["whole"] and not report["repaired"]:
        raise typer.Exit(1)


def _settings(config: Path, **overrides: Any) -> RunConfig:
    from disthess.config import load

    plain = {key: str(value) if isinstance(value, (Path, enum.Enum)) else value for key, value in overrides.items()}
    return load(config).with_overrides(**plain)


def _print_json(tree: Any) -> None:
    typer.echo(json.dumps(tree, indent=2))
