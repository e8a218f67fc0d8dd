"""What schedules an audit on one machine: a line of a crontab, or a systemd service with its timer."""

from __future__ import annotations

import shlex
from pathlib import Path

from disthess.errors import ConfigError
from disthess.schedules.cron import DAYS, LAST, LAST_WEEKDAY, Cron
from disthess.schedules.request import STOP_SECONDS, Schedule

_LINE = """\
# `disthess audit {config}` at {cron}, by this machine's clock; add the line to `crontab -e`.
# Never two at once (flock), {seconds} s at most (timeout). What it prints goes to the log beside the audit file. Exit code 3 is
# an alert; set one of the alerts' own hooks in the audit file, since cron does not look at exit codes.
"""
_SERVICE = """\
# {name}.service
# Put into ~/.config/systemd/user/ (or /etc/systemd/system/) with the timer, then: systemctl --user daemon-reload;
# systemctl --user enable --now {name}.timer; loginctl enable-linger keeps it going after you log out.
# Exit code 3 is an alert: the service then counts as failed, which OnFailure= and `systemctl --failed` see, and the timer goes on.
# A timer does not start a service that is still running, so there are never two at once.
[Unit]
Description=disthess audit {name}

[Service]
Type=exec
WorkingDirectory={folder}
ExecStart=:{command}
RuntimeMaxSec={seconds}
TimeoutStopSec={stop}
"""
_TIMER = """\
# {name}.timer
[Unit]
Description=disthess audit {name} at {cron}

[Timer]
{calendar}
Persistent=true
AccuracySec=1s

[Install]
WantedBy=timers.target
"""


def crontab_line(schedule: Schedule) -> str:
    """A line for a crontab, with comments above.

    Raises:
        ConfigError: cron cannot be told that time, or that time zone.
    """
    if schedule.timezone is not None:
        raise ConfigError(
            f"a crontab goes by its machine's clock; CRON_TZ is known to some crons only, and Debian's ignores it. Write the hours "
            f"of that machine and leave --timezone {schedule.timezone} out, or use --emit systemd."
        )
    config = str(schedule.config.absolute())
    audit = shlex.join([schedule.python, "-m", "disthess", *schedule.command(config)])
    log, lock = shlex.quote(f"{config}.log"), shlex.quote(f"{config}.lock")
    command = (
        f"cd {shlex.quote(_folder(schedule))} && flock -n {lock} timeout -k {STOP_SECONDS} {schedule.deadline_seconds} {audit} "
        f">> {log} 2>&1"
    )
    comment = _LINE.format(config=config, cron=schedule.cron.text, seconds=schedule.deadline_seconds)
    # cron takes a bare % for the end of the command.
    return f"{comment}{schedule.cron.plain()} {command.replace('%', chr(92) + '%')}\n"


def systemd_units(schedule: Schedule) -> dict[str, str]:
    """A service and its timer, by their file names.

    Raises:
        ConfigError: systemd cannot be told that time.
    """
    config = str(schedule.config.absolute())
    words = [schedule.python, "-m", "disthess", *schedule.command(config)]
    name = schedule.name
    service = _SERVICE.format(
        name=name,
        folder=_folder(schedule).replace("%", "%%"),
        command=" ".join(unit_word(word) for word in words),
        seconds=schedule.deadline_seconds,
        stop=STOP_SECONDS,
    )
    calendar = "\n".join(f"OnCalendar={line}" for line in calendar_lines(schedule.cron, schedule.timezone))
    timer = _TIMER.format(name=name, cron=schedule.cron.text.replace("%", "%%"), calendar=calendar)
    return {f"{name}.service": service, f"{name}.timer": timer}


def unit_word(word: str) -> str:
    r"""A word of a systemd command line, quoted: no specifier is expanded in it.

    >>> print(unit_word('50% "a b"'))
    "50%% \"a b\""
    """
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"'


def calendar_lines(cron: Cron, timezone: str | None = None) -> list[str]:
    """The times of a cron expression as systemd's calendar events; several stand for any of them.

    Raises:
        ConfigError: systemd cannot express it.

    >>> calendar_lines(Cron("30 6 1 * MON-FRI"))
    ['*-*-01 06:30:00', 'Mon,Tue,Wed,Thu,Fri *-*-* 06:30:00']
    """
    clock = ":".join(
        _numbers(values, size) for values, size in ((cron.hours, 24), (cron.minutes, 60), (cron.seconds, 60))
    )
    months = _numbers(cron.months, 12)
    month_days, week_days = _month_days(cron), _week_days(cron)
    if cron.both_days:
        pairs = []
        for day in month_days:
            for week, dates in week_days:
                if dates and day != "-*":
                    _refuse(cron, "both a day of the month and a certain week's day of the month")
                pairs.append((week, dates or day))
    elif cron.month_days.all or cron.week_days.all:
        pairs = [("", "-*")]
    else:
        pairs = [*(("", day) for day in month_days), *((week, dates or "-*") for week, dates in week_days)]
    zone = f" {timezone}" if timezone else ""
    return [f"{week} *-{months}{day} {clock}{zone}".strip() for week, day in pairs]


def _month_days(cron: Cron) -> list[str]:
    """Days of the month with the sign before them: ``-`` counts from the first, ``~`` from the last."""
    if LAST_WEEKDAY in cron.month_days.special:
        _refuse(cron, "the last working day of a month (LW)")
    if cron.month_days.all:
        return ["-*"]
    plain = [f"-{_numbers(cron.month_days.plain, 31)}"] if cron.month_days.plain else []
    return plain + (["~01"] if LAST in cron.month_days.special else [])


def _week_days(cron: Cron) -> list[tuple[str, str]]:
    """Names of days of the week, each with the days of the month that it is restricted to."""
    if cron.week_days.all:
        return [("", "")]
    plain = ",".join(DAYS[day] for day in cron.week_days.plain)
    found = [(plain, "")] if plain else []
    for entry in cron.week_days.special:
        if isinstance(entry, int):
            raise TypeError(f"a day of the week is a pair, got {entry}")
        day, which = entry
        first = 7 * (which - 1) + 1
        dates = "~07/1" if which == LAST else f"-{first:02d}..{min(first + 6, 31):02d}"
        found.append((DAYS[day], dates))
    return found


def _numbers(values: tuple[int, ...], size: int) -> str:
    return "*" if len(values) == size else ",".join(f"{value:02d}" for value in values)


def _refuse(cron: Cron, what: str) -> None:
    raise ConfigError(
        f"systemd has no calendar event for the cron expression {cron.text!r}: it asks for {what}. Use --watch, or another time."
    )


def _folder(schedule: Schedule) -> str:
    return str(Path(schedule.working_dir or ".").absolute())
