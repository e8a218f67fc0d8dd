"""The verb schedule: what other schedulers are to be told, or a loop that is one."""

from __future__ import annotations

import enum
import signal
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from disthess.errors import ConfigError

if TYPE_CHECKING:
    from disthess.schedules.request import Schedule
    from disthess.schedules.watch import Watch


class Scheduler(enum.StrEnum):
    """Who is to run the audits."""

    k8s = "k8s"
    kuberay = "kuberay"
    crontab = "crontab"
    systemd = "systemd"


CONTAINERS = (Scheduler.k8s, Scheduler.kuberay)


def schedule(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="An audit file (YAML).")],
    cron: Annotated[
        str,
        typer.Option("--cron", metavar="CRON", help="When: minute, hour, day of month, month, day of week; or @daily."),
    ],
    emit: Annotated[Scheduler | None, typer.Option("--emit", help="Print what this scheduler is to be told.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and run the audit whenever it is due.")] = False,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="F.json", help="With --watch: what it remembers; default beside CONFIG."),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="With --watch: end after one audit, with its exit code.")
    ] = False,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What the scheduler calls it; default by CONFIG's name.")
    ] = "",
    image: Annotated[
        str | None, typer.Option("--image", metavar="I", help="Container image, for k8s and kuberay.")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="A", help="A running Ray cluster, given to the audit.")
    ] = None,
    working_dir: Annotated[
        str | None,
        typer.Option("--working-dir", metavar="DIR", help="Where the audit runs; default here, in containers /app."),
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option(
            "--timezone", metavar="TZ", help="Of CRON, such as Europe/Berlin; default the machine's, in containers UTC."
        ),
    ] = None,
    deadline: Annotated[
        str, typer.Option("--deadline", metavar="T", help="An audit is stopped after it: 90m, 2h, 1d.")
    ] = "1d",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write files instead of printing.")] = None,
) -> None:
    """Run `disthess audit CONFIG` again and again: by another scheduler, or by this process.

    With --emit, what to give to that scheduler goes to standard output, and the next five times to standard error. With
    --watch, due times that nobody watched are made up for once; SIGTERM and Ctrl-C end it after the audit in flight, a
    second one stops that too.
    """
    from disthess.audit_config import load_audit
    from disthess.schedules.cron import Cron
    from disthess.schedules.request import IMAGE, Schedule, seconds_of

    if (emit is None) is not watch:
        raise ConfigError("give either --emit k8s, kuberay, crontab or systemd, or --watch.")
    if (state is not None or once) and not watch:
        raise ConfigError("--state and --once belong to --watch. Add it, or leave them out.")
    if image is not None and emit not in CONTAINERS:
        raise ConfigError("--image belongs to --emit k8s and --emit kuberay; elsewhere no container is started.")
    if out is not None and emit is None:
        raise ConfigError("--out belongs to --emit. Leave it out.")
    load_audit(config)  # which refuses a wrong file now, and not at three in the morning
    wanted = Schedule(
        config=config,
        cron=Cron(cron),
        name=name,
        timezone=timezone or ("Etc/UTC" if emit in CONTAINERS else None),
        deadline_seconds=seconds_of(deadline),
        image=image or IMAGE,
        address=address,
        working_dir=working_dir,
    )
    if emit is not None:
        _emit(wanted, emit, out)
        return
    _watch(wanted, state or config.with_name(f"{config.stem}.schedule.json"), once)


def _emit(wanted: Schedule, emit: Scheduler, out: Path | None) -> None:
    from disthess.cli.tables import save_text
    from disthess.schedules import kubernetes, machine

    if emit is Scheduler.systemd:
        files = machine.systemd_units(wanted)
    elif emit is Scheduler.crontab:
        files = {f"{wanted.name}.crontab": machine.crontab_line(wanted)}
    else:
        manifest = kubernetes.cron_job if emit is Scheduler.k8s else kubernetes.ray_cron_job
        files = {f"{wanted.name}.yaml": manifest(wanted)}
    for file, text in files.items():
        if out is None:
            typer.echo(text, nl=len(files) > 1)
        else:
            save_text(out / file, text)
            typer.echo(f"written: {out / file}")
    for time in wanted.next_times():
        typer.echo(f"next: {_shown(time)}", err=True)


def _watch(wanted: Schedule, state: Path, once: bool) -> None:
    from disthess.schedules.cron import zone_of
    from disthess.schedules.runner import ProcessRunner
    from disthess.schedules.watch import SystemClock, Watch

    words = wanted.command(str(wanted.config.absolute()))
    runner = ProcessRunner.of_audit(words, Path(wanted.working_dir or ".").absolute())
    zone = zone_of(wanted.timezone)
    watch = Watch(wanted.config, wanted.cron, zone, state, runner, wanted.deadline_seconds, SystemClock(), _say)
    with _Ending(watch):
        code = watch.run(once=once)
    if code:
        raise typer.Exit(code)


class _Ending:
    """SIGTERM and SIGINT end a watch, in its time."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _end(self, *_: object) -> None:
        self._watch.end()


def _say(sentence: str) -> None:
    typer.echo(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {sentence}", err=True)


def _shown(time: datetime) -> str:
    return f"{time:%a %Y-%m-%d %H:%M:%S} {time.tzname()}"
