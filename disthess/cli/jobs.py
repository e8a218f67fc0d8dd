"""Verbs of Ray cluster jobs: submit, and job status, logs and stop."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from disthess.cli.errors import termination_as_interrupt
from disthess.cli.options import (
    ConfigArgument,
    JsonOption,
    StoreOption,
    ThreadsOption,
    WorkersOption,
    print_json,
    settings_of,
)
from disthess.errors import ConfigError

if TYPE_CHECKING:
    from disthess.execute.job import JobState
    from disthess.execute.jobs import JobClient

DashboardOption = Annotated[
    str,
    typer.Option("--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard."),
]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="A submission id, as 'disthess submit' prints it.")]
_LOCAL = "http://127.0.0.1:8265"

job = typer.Typer(no_args_is_help=True, help="Ask after jobs of a Ray cluster, read their logs, stop them.")


def submit(
    config: ConfigArgument,
    address: DashboardOption = _LOCAL,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", metavar="DIR", help="Sent to the cluster; the job runs in it.")
    ] = Path("."),
    no_upload: Annotated[
        bool, typer.Option("--no-upload", help="Send nothing: the cluster's machines have DIR under the same path.")
    ] = False,
    store: StoreOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="KEY=VALUE", help="A variable of job and workers; may be repeated."),
    ] = None,
    python: Annotated[
        str, typer.Option("--python", metavar="P", help="The interpreter on the head that has disthess.")
    ] = "python",
    submission_id: Annotated[
        str | None, typer.Option("--submission-id", metavar="ID", help="A name for the job, not used before.")
    ] = None,
    wait_seconds: Annotated[
        int, typer.Option("--wait-seconds", min=1, metavar="S", help="What a stop grants to the tiles in flight.")
    ] = 300,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Print the submission id and return.")] = False,
) -> None:
    """Run a run file as a job of a Ray cluster, follow its log, and end with its exit code.

    The store is written by the cluster's machines: a relative path means the folder of that name here, on a file system that
    they share. Files that .gitignore names are not sent. Ctrl-C ends the following, not the job.
    """
    settings = settings_of(config, store=store, executor="ray", workers=workers, threads=threads)
    from disthess.execute.job import JobRequest
    from disthess.execute.jobs import JobClient

    folder = working_dir.resolve()
    place = settings.compute.store
    numbers = (("--workers", workers), ("--threads", threads))
    request = JobRequest(
        config=_inside(config, folder),
        store=place if "://" in place else str(Path(place).expanduser().absolute()),
        working_dir=folder,
        upload=not no_upload,
        options=tuple(word for name, value in numbers if value is not None for word in (name, str(value))),
        python=python,
        variables=_variables(env or []),
        wait_seconds=wait_seconds,
        submission_id=submission_id,
    )
    client = JobClient(address)
    name = client.submit(request)
    typer.echo(f"job {name} submitted to {client.address}; it writes {request.store}", err=True)
    if no_follow:
        typer.echo(name)
        typer.echo(
            f"follow it: {_verb('logs', name, client)} --follow; stop it: {_verb('stop', name, client)}", err=True
        )
        return
    _follow(client, name)


@job.command(
    epilog="Examples: `disthess job status --address http://head:8265` lists all; `disthess job status ID --json`"
)
def status(
    name: Annotated[str | None, typer.Argument(metavar="ID", help="A submission id; all jobs if left out.")] = None,
    address: DashboardOption = _LOCAL,
    as_json: JsonOption = False,
) -> None:
    """Say how a job is, or all jobs that the cluster remembers."""
    from disthess.execute.jobs import JobClient

    client = JobClient(address)
    states = client.states() if name is None else (client.state(name),)
    if as_json:
        trees = [asdict(state) for state in states]
        print_json({"jobs": trees} if name is None else trees[0])
        return
    for state in states:
        typer.echo(_describe(state))
    if not states:
        typer.echo("no jobs")


@job.command(epilog="Example: `disthess job logs ID --follow`")
def logs(
    name: JobArgument,
    address: DashboardOption = _LOCAL,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the job ends, and end with its exit code.")
    ] = False,
) -> None:
    """Print what a job has printed."""
    from disthess.execute.jobs import JobClient

    client = JobClient(address)
    if follow:
        _follow(client, name)
    else:
        typer.echo(client.log(name), nl=False)


@job.command(
    epilog="Example: `disthess job stop ID --address http://head:8265`; to resume, submit the same run file again."
)
def stop(
    name: JobArgument,
    address: DashboardOption = _LOCAL,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return once the job has been asked to stop.")] = False,
) -> None:
    """Let a job finish its tiles in flight and end; the store resumes later."""
    from disthess.execute.jobs import JobClient

    client = JobClient(address)
    if not client.stop(name):
        typer.echo(f"job {name} had ended before: {client.state(name).status}")
        return
    typer.echo(f"job {name} was asked to stop; it finishes its tiles in flight")
    if not no_wait:
        state = client.follow(name)
        typer.echo(f"{_describe(state)}; to resume, submit the same run file and store again")


def _follow(client: JobClient, name: str) -> None:
    from disthess.execute.job import explain_failure

    kept: list[str] = []

    def write(text: str) -> None:
        kept.append(text)
        typer.echo(text, nl=False)

    try:
        with termination_as_interrupt():
            state = client.follow(name, write)
    except KeyboardInterrupt:
        typer.echo(
            f"\ndisthess: no longer following job {name}, which goes on. To stop it: {_verb('stop', name, client)}; to "
            f"follow it again: {_verb('logs', name, client)} --follow",
            err=True,
        )
        raise typer.Exit(1) from None
    if state.status == "FAILED":
        typer.echo(f"disthess: {explain_failure(state, ''.join(kept))}", err=True)
    elif state.status == "STOPPED":
        typer.echo(f"disthess: job {name} was stopped; submit the same run file and store again to resume.", err=True)
    raise typer.Exit(state.outcome)


def _verb(verb: str, name: str, client: JobClient) -> str:
    return f"disthess job {verb} {shlex.quote(name)} --address {client.address}"


def _describe(state: JobState) -> str:
    exit_code = f" (exit code {state.exit_code})" if state.exit_code is not None and state.status == "FAILED" else ""
    since = "" if state.start is None else f", started {_clock(state.start)}"
    until = "" if state.end is None else f", ended {_clock(state.end)}"
    return f"job {state.job}: {state.status}{exit_code}{since}{until}{f', store {state.store}' if state.store else ''}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _inside(config: Path, folder: Path) -> str:
    """The run file's path as the job sees it."""
    if not folder.is_dir():
        raise ConfigError(
            f"--working-dir {folder} is no folder. Give the one that holds the run file and what it names."
        )
    try:
        return str(config.resolve().relative_to(folder))
    except ValueError:
        raise ConfigError(
            f"the run file {config} does not lie in the working directory {folder}, which is what the cluster gets to see. "
            "Give a --working-dir that holds it, with the files it names."
        ) from None


def _variables(given: list[str]) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in given]
    wrong = [name for name, separator, _ in pairs if not separator or not name]
    if wrong:
        raise ConfigError(f"--env {wrong[0]} is not of the form KEY=VALUE.")
    return {name: value for name, _, value in pairs}
