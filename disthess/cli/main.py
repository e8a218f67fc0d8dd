"""The command ``disthess``: each verb parses, calls the library, prints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from disthess import __version__
from disthess.cli import audit_reading, audit_runs, jobs, reading, reporting, runs, scheduling, spectra
from disthess.cli.errors import ErrorReportingGroup

app = typer.Typer(
    cls=ErrorReportingGroup,
    name="disthess",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A first run: `disthess run configs/digits_mlp.yaml`, then `disthess info runs/digits_mlp.zarr`. "
    "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 an audit raised an alert.",
)


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


VERBS: dict[Callable[..., None], str] = {
    runs.plan: "Example: `disthess plan configs/digits_mlp.yaml --json | jq .tiles`",
    runs.run: "Examples: `disthess run configs/digits_mlp.yaml`; on two Ray actors of one thread each: "
    "`disthess run configs/digits_mlp.yaml --executor ray --workers 2 --threads 1`",
    jobs.submit: "Examples: `disthess submit configs/digits_mlp_2ray.yaml --address http://head:8265`; without waiting, "
    "`disthess submit configs/digits_mlp_2ray.yaml --workers 8 --threads 4 --no-follow`",
    reading.info: "Examples: `disthess info runs/digits_mlp.zarr --json`; which layers have most to do with each other: "
    "`disthess info runs/digits_mlp.zarr --pairs --metric coupling --plot coupling.png`",
    reading.block: "Examples: `disthess block runs/digits_mlp.zarr 2.weight 2.bias --out block.npy` ('disthess info' lists the "
    "names); of a model too large to store, `disthess block blocks.zarr '2.weight[0:8]' 2.bias --compute --config "
    "configs/digits_mlp.yaml`",
    reading.activations: "Examples: `disthess activations runs/net.zarr` lists them; "
    "`disthess activations runs/net.zarr fc1 fc2 --out block.npy`",
    runs.curvature: "Example: `disthess curvature configs/digits_mlp.yaml --plot curvature.png`",
    runs.stopping: "Example: `disthess stopping configs/digits_mlp.yaml --json`",
    runs.couplings: "Example: `disthess couplings configs/digits_mlp.yaml --of modules --plot couplings.png`",
    spectra.spectrum: "Example: `disthess spectrum runs/digits_mlp.zarr --top 20 --density --plot spectrum.png`",
    spectra.lowrank: "Example: `disthess lowrank runs/digits_mlp.zarr --rank 50 --out lowrank.npz`",
    spectra.kronecker: "Examples: `disthess kronecker runs/digits_mlp.zarr`; "
    "`disthess kronecker runs/digits_mlp.zarr 0 2 --config configs/digits_mlp.yaml --out factors`",
    scheduling.schedule: "Examples: `disthess schedule audit.yaml --cron '0 3 * * *' --emit systemd`; on a machine without a "
    "scheduler, `disthess schedule audit.yaml --cron @hourly --watch`",
    audit_reading.diff: "Examples: `disthess diff runs/a.zarr runs/b.zarr`; two audits of a history: "
    "`disthess diff runs/audits.zarr@1000 runs/audits.zarr@-1 --csv diff.csv`",
    runs.compare: "Example: `disthess compare configs/digits_mlp.yaml --rank 50 --plot compare.png`",
    reporting.report: "Examples: `disthess report runs/digits_mlp.zarr --out digits.html`; of audits, "
    "`disthess report audits/minilm.zarr --out audits.html --title MiniLM`",
    runs.verify: "Examples: `disthess verify runs/digits_mlp.zarr`; after damage, `disthess verify "
    "runs/digits_mlp.zarr --repair --config configs/digits_mlp.yaml`",
}
"""Every verb, in the order of the help, and how it is used."""

for _verb, _examples in VERBS.items():
    app.command(epilog=_examples)(_verb)
app.add_typer(audit_runs.audit, name="audit", epilog="Example: `disthess audit configs/digits_audit.yaml`")
app.add_typer(jobs.job, name="job", epilog="Example: `disthess job status --address http://head:8265` lists all jobs.")


def main() -> None:
    """Entry point of the command ``disthess``."""
    app()
