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


class PairsOf(enum.StrEnum):
    """Whose pairs."""

    parameters = "parameters"
    activations = "activations"
    sections = "sections"


class MetricName(enum.StrEnum):
    """A number of a pair."""

    norm = "norm"
    coupling = "coupling"
    stable_rank = "stable_rank"
    gap = "gap"
    trace = "trace"


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file (YAML), as those in configs/.")]
StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="A store that 'disthess run' has written.")]
PartOption = Annotated[PartName, typer.Option("--part", help="Which matrix; residual = hessian - ggn.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="F.npy", help="Save the block as a NumPy file.")]
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


@app.command(
    epilog="Examples: `disthess info runs/digits_mlp.zarr --json`; which layers have most to do with each other: "
    "`disthess info runs/digits_mlp.zarr --pairs --metric coupling --plot coupling.png`"
)
def info(
    store: StoreArgument,
    pairs: Annotated[bool, typer.Option("--pairs", help="A table of all pairs of blocks instead.")] = False,
    of: Annotated[PairsOf, typer.Option("--of", help="Whose pairs.")] = PairsOf.parameters,
    metric: Annotated[
        MetricName,
        typer.Option("--metric", help="Sort and draw by: Frobenius norm, coupling C, stable rank D, GN-gap, or trace."),
    ] = MetricName.norm,
    part: PartOption = PartName.hessian,
    top: Annotated[int, typer.Option("--top", min=1, metavar="K", help="How many pairs to print.")] = 20,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="F.csv", help="Write all pairs as CSV.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="F.png", help="Draw the metric as a heat map.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a store holds: parameters, uses, activations, tiles, loss, certificates; or, with --pairs, how blocks relate.

    Of each pair: Frobenius norm (resonance R), coupling C = |H_vw| / sqrt(|H_vv| |H_ww|), stable rank D = |H|_F^2 / |H|_2^2,
    GN-gap = |residual| / |ggn| (where the ggn is stored), and the trace of diagonal blocks.
    """
    from disthess import api, cli_pairs, cli_report

    opened = api.open_store(str(store))
    if pairs:
        table = opened.pairs(part=part.value, of=of.value)
        cli_pairs.write_pairs(table, metric.value, csv, plot)
        if as_json:
            _print_json(table.to_json())
        else:
            cli_pairs.print_pairs(table, metric.value, top, csv, plot)
    elif as_json:
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
    out: OutOption = None,
    use: Annotated[
        bool, typer.Option("--use", help="A and B are single uses, parameter@node, of shared parameters.")
    ] = False,
) -> None:
    """Show or save one block: d2L / dA dB, the entries of A by the entries of B.

    A and B are parameters, named sections, or ranges such as `in_proj_weight[0:64]`.
    """
    from disthess import api, cli_report

    opened = api.open_store(str(store))
    values = opened.use_block(a, b, part=part.value) if use else opened.block(a, b, part=part.value)
    if out is not None:
        cli_report.save_array(out, values)
    cli_report.print_block(values, f"{part.value} of {a} by {b}", out)


@app.command(
    epilog="Examples: `disthess activations runs/net.zarr` lists them; `disthess activations runs/net.zarr fc1 fc2 --out block.npy`"
)
def activations(
    store: StoreArgument,
    v: Annotated[str | None, typer.Argument(metavar="[V", help="Node or module of the rows.")] = None,
    w: Annotated[str | None, typer.Argument(metavar="W]", help="Node or module of the columns.")] = None,
    part: PartOption = PartName.hessian,
    per_sample: Annotated[bool, typer.Option("--per-sample", help="[n, V, W], where that was kept.")] = False,
    out: OutOption = None,
) -> None:
    """List the stored activations, or show or save one block H^f of two of them: sum over samples of d2L / dV dW."""
    from disthess import api, cli_pairs, cli_report

    opened = api.open_store(str(store))
    if v is None or w is None:
        cli_pairs.print_activations(opened)
        return
    values = opened.activation_block(v, w, part=part.value, per_sample=per_sample)
    if out is not None:
        cli_report.save_array(out, values)
    cli_pairs.print_activation_block(values, f"{part.value} of {v} by {w}", out)


@app.command(epilog="Example: `disthess curvature configs/digits_mlp.yaml --plot curvature.png`")
def curvature(
    config: ConfigArgument,
    top: Annotated[int, typer.Option("--top", min=1, metavar="K", help="How many nodes to print.")] = 20,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="F.png", help="Draw the shares.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how much of the residual (Hessian minus Gauss-Newton) each node of the model contributes. Needs no store.

    The contributions add up to the residual exactly; shares add up to 1. Takes memory for several P x P matrices.
    """
    from disthess import api, cli_pairs
    from disthess.loading import load_problem

    settings = _settings(config)
    section = settings.compute
    found = api.node_curvature(
        load_problem(settings.source(config)), parameters=section.parameters, dtype=section.dtype
    )
    if plot is not None:
        cli_pairs.draw_curvature(plot, found)
    if as_json:
        _print_json(cli_pairs.curvature_summary(found))
    else:
        cli_pairs.print_curvature(found, top, plot)


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
