"""Arguments and options that several verbs share, and how they become settings."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from disthess.config import RunConfig


class ExecutorName(enum.StrEnum):
    """Who computes the tiles."""

    serial = "serial"
    threads = "threads"
    processes = "processes"
    ray = "ray"


class PartName(enum.StrEnum):
    """Which matrix."""

    hessian = "hessian"
    ggn = "ggn"
    residual = "residual"


class RankMethod(enum.StrEnum):
    """How a low-rank form is found."""

    randomised = "randomised"
    exact = "exact"
    nystrom = "nystrom"


class PairsOf(enum.StrEnum):
    """Whose pairs."""

    parameters = "parameters"
    activations = "activations"
    sections = "sections"


class BlocksOf(enum.StrEnum):
    """What the blocks of a problem are."""

    parameters = "parameters"
    modules = "modules"


class MetricName(enum.StrEnum):
    """A number of a pair."""

    norm = "norm"
    coupling = "coupling"
    stable_rank = "stable_rank"
    gap = "gap"
    trace = "trace"


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file (YAML), as those in configs/.")]
StoreArgument = Annotated[
    str,
    typer.Argument(metavar="STORE", help="A store that 'disthess run' has written: a path, or a URL such as s3://..."),
]
PartOption = Annotated[PartName, typer.Option("--part", help="Which matrix; residual = hessian - ggn.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="F.npy", help="Save the block as a NumPy file.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random start vectors.")]
StoreOption = Annotated[
    str | None, typer.Option("--store", metavar="S", help="Write to this path or URL, not to the run file's store.")
]
ExecutorOption = Annotated[
    ExecutorName | None,
    typer.Option(
        "--executor", help="Tile by tile, or workers: threads of this process, forked processes, or Ray actors."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="D", help="Torch's name of the workers' device; it need not be here.")
]
RateOption = Annotated[
    float | None,
    typer.Option("--tflops", metavar="X", help="Matrix products of one worker, in 10^12 operations per second."),
]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, metavar="N", help="How many Ray actors.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="T", help="Threads per worker. Equal threads, equal bytes."),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="A", help="A running Ray cluster, such as 'auto'; else a private local one."),
]


def settings_of(config: Path, **overrides: Any) -> RunConfig:
    """The run file, with the options that were given in place of its keys."""
    from disthess.config import load

    plain = {key: str(value) if isinstance(value, (Path, enum.Enum)) else value for key, value in overrides.items()}
    return load(config).with_overrides(**plain)


def print_json(tree: Any) -> None:
    """One JSON object."""
    typer.echo(json.dumps(tree, indent=2))
