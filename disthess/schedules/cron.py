"""Cron expressions: checked, their times told, and written out so that every scheduler takes them for the same times.

Expressions are those of Debian's cron and some more: five fields (minute, hour, day of month, month, day of week), or six with
seconds first; names of months and days; ``L`` (last day), ``LW`` (last working day), ``MON#2`` (second Monday) and ``5L`` (last
Friday); and ``@hourly``, ``@daily``, ``@weekly``, ``@monthly``, ``@yearly``. Where both day fields are given, either is enough,
unless one of them starts with a star: then both must hold.

When clocks go forward, a time that does not exist is replaced by the first one after the gap; when they go back, a time of day
comes once. Expressions with a star in minute or hour go by elapsed time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import final
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from disthess.errors import ConfigError

ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
LAST = CronSim.LAST
LAST_WEEKDAY = CronSim.LAST_WEEKDAY
DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")

_MOST_LETTERS = 500
_SOME_TIME = datetime(2024, 1, 1, tzinfo=UTC)
_WINDOWS = tuple(timedelta(days=days) for days in (1 / 24, 1, 32, 366, 4 * 366, 51 * 366))


@dataclass(frozen=True, slots=True)
class Days:
    """Which days a day field means.

    Attributes:
        plain: Numbers: of the month from 1, of the week from 0 for Sunday.
        special: Of the month `LAST` and `LAST_WEEKDAY`; of the week pairs (day, which of the month, or `LAST`).
        all: Whether it means every day.
    """

    plain: tuple[int, ...]
    special: tuple[int | tuple[int, int], ...]
    all: bool


@final
class Cron:
    """One expression.

    Args:
        expression: Five or six fields, or an alias such as ``@daily``.

    Raises:
        ConfigError: It is none, or no time satisfies it.

    >>> Cron("0 3 * * MON-FRI").plain()
    '0 3 * * 1-5'
    """

    def __init__(self, expression: str) -> None:
        text = " ".join(expression.split()) if len(expression) <= _MOST_LETTERS else ""
        self._text = ALIASES.get(text.lower(), text)
        self._given = expression
        try:
            parsed = CronSim(self._text, _SOME_TIME)
            next(parsed)
        except StopIteration as error:
            raise ConfigError(
                f"no time satisfies the cron expression {expression[:80]!r}. Check its day and month."
            ) from error
        except (CronSimError, ValueError, AssertionError, IndexError) as error:
            raise ConfigError(
                f"{expression[:80]!r} is no cron expression ({str(error).lower() or 'it cannot be read'}). Give minute, hour, day "
                f'of month, month and day of week, such as "0 3 * * *" for every day at three, or "30 6 * * MON-FRI"; or @daily.'
            ) from error
        fields = parsed.parts
        self._fields = fields
        self.has_seconds = len(self._text.split()) == 6
        """Whether the first field is seconds."""
        self.both_days = parsed.day_and
        """Whether both day fields must hold; else either is enough."""
        self.seconds = tuple(sorted(parsed.seconds))
        self.minutes = tuple(sorted(parsed.minutes))
        self.hours = tuple(sorted(parsed.hours))
        self.months = tuple(sorted(parsed.months))
        days = sorted(parsed.days)
        self.month_days = Days(
            tuple(day for day in days if day > 0), tuple(day for day in days if day < 0), set(days) >= set(range(1, 32))
        )
        week = parsed.weekdays
        plain = tuple(sorted({day % 7 for day in week if isinstance(day, int)}))
        pairs = sorted({(day[0] % 7, day[1]) for day in week if not isinstance(day, int)})
        self.week_days = Days(plain, tuple(pairs), len(plain) == 7)

    @property
    def text(self) -> str:
        """The expression, aliases replaced."""
        return self._text

    def times(self, after: datetime, zone: tzinfo) -> Iterator[datetime]:
        """Its times after a moment, in order, each once, in UTC.

        >>> from zoneinfo import ZoneInfo
        >>> cron = Cron("30 2 * * *")
        >>> before = datetime(2024, 3, 30, 12, tzinfo=UTC)
        >>> [str(time) for time in itertools.islice(cron.times(before, ZoneInfo("Europe/Berlin")), 2)]
        ['2024-03-31 01:00:00+00:00', '2024-04-01 00:30:00+00:00']
        """
        last = after.astimezone(UTC)
        for found in CronSim(self._text, last.astimezone(zone)):
            # Wall clocks go back: what the expression means there may lie before the moment, or be told twice.
            moment = found.astimezone(UTC)
            if moment > last:
                last = moment
                yield moment

    def next_time(self, after: datetime, zone: tzinfo) -> datetime:
        """The first of them."""
        return next(self.times(after, zone))

    def latest_time(self, after: datetime, until: datetime, zone: tzinfo) -> datetime | None:
        """The last of its times after a moment and not after another; None where there is none between.

        >>> Cron("0 3 * * *").latest_time(datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 5, 1, tzinfo=UTC), UTC)
        datetime.datetime(2024, 4, 30, 3, 0, tzinfo=datetime.timezone.utc)
        """
        for window in _WINDOWS:
            start = max(after, until - window)
            found = None
            for time in self.times(start, zone):
                if time > until:
                    break
                found = time
            if found is not None or start == after:
                return found
        return None

    def plain(self) -> str:
        """Five fields of numbers, which Kubernetes and every cron take for the same times.

        They differ in what they allow (Kubernetes has no day 7, some crons no names and no ``5/15``) and in whether ``*/2`` is
        a star.

        Raises:
            ConfigError: There is none; the message says why.
        """
        if self.has_seconds:
            raise ConfigError(
                f"the cron expression {self._given!r} has seconds, which cron and Kubernetes do not know. Leave the first "
                f"of its six fields out."
            )
        if self.month_days.special or self.week_days.special:
            raise ConfigError(
                f"the cron expression {self._given!r} uses L, W or #, which cron and Kubernetes do not know. Use --emit systemd or "
                f"--watch, or name the days by numbers."
            )
        month_days, week_days = self.month_days, self.week_days
        days, week = _ranges(month_days.plain), _ranges(week_days.plain)
        if month_days.all or (week_days.all and not self.both_days):
            days = "*"
        if week_days.all or (month_days.all and not self.both_days):
            week = "*"
        if self.both_days and "*" not in (days, week):
            raise ConfigError(
                f"the cron expression {self._given!r} restricts both days of month and days of week, one of them by a step from a "
                f"star. Some schedulers then ask for both and others for either. Use --emit systemd or --watch, which ask for both."
            )
        minutes = "*" if len(self.minutes) == 60 else _ranges(self.minutes)
        hours = "*" if len(self.hours) == 24 else _ranges(self.hours)
        months = "*" if len(self.months) == 12 else _ranges(self.months)
        return f"{minutes} {hours} {days} {months} {week}"


def zone_of(name: str | None) -> tzinfo:
    """A time zone by its name in the tz database; None for that of this machine.

    Raises:
        ConfigError: There is none of that name, or no database.

    >>> str(zone_of("Europe/Berlin"))
    'Europe/Berlin'
    """
    if name is None:
        return _machine_zone()
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # ZoneInfoNotFoundError is a KeyError
        raise ConfigError(
            f"there is no time zone {name[:80]!r} on this machine. Give a name such as Europe/Berlin or UTC; if that is one, "
            f"install the package tzdata."
        ) from error


def _machine_zone() -> tzinfo:
    # The zone, with its rules, and not the offset of today.
    given = os.environ.get("TZ", "").removeprefix(":")
    if given:
        return zone_of(given)
    try:
        with Path("/etc/localtime").open("rb") as file:
            return ZoneInfo.from_file(file)
    except (OSError, ValueError):
        return UTC


def _ranges(numbers: tuple[int, ...]) -> str:
    """Numbers as cron writes them.

    >>> _ranges((0, 1, 2, 3, 5, 7, 8))
    '0-3,5,7,8'
    """
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts += [f"{values[0]}-{values[-1]}"] if len(values) > 2 else [str(value) for value in values]
    return ",".join(parts)
