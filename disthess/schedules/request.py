"""What is to be scheduled: one audit file, when, and what the scheduler is told besides."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from disthess import __version__
from disthess.errors import ConfigError
from disthess.schedules.cron import Cron, zone_of

DEADLINE_SECONDS = 24 * 3600
STOP_SECONDS = 120
"""Between the request to stop and the end by force: an audit puts away what it has."""

IMAGE = f"registry.example.com/disthess:{__version__}"

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
_DURATION = re.compile(r"(?:(\d{1,4})d)?(?:(\d{1,5})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s?)?")
_MOST_BYTES = 900_000


@dataclass(frozen=True, slots=True)
class Schedule:
    """One schedule.

    Attributes:
        config: The audit file.
        cron: When.
        name: What the scheduler calls it: lower-case letters, digits and hyphens.
        timezone: Of the expression, a name of the tz database; None for the scheduler's own.
        deadline_seconds: After which an audit is stopped.
        image: Container image with disthess and the problem's code.
        address: Of a running Ray cluster, given to the audit; None for none.
        working_dir: Folder in which the audit runs; None for the current one, in a container ``/app``.
        python: The interpreter that has disthess, for what runs on a machine and not in a container.

    Raises:
        ConfigError: The file is not there, or something cannot be told to any scheduler.
    """

    config: Path
    cron: Cron
    name: str = ""
    timezone: str | None = None
    deadline_seconds: int = DEADLINE_SECONDS
    image: str = IMAGE
    address: str | None = None
    working_dir: str | None = None
    python: str = field(default_factory=lambda: sys.executable)

    def __post_init__(self) -> None:
        if not self.config.is_file():
            raise ConfigError(
                f"there is no audit file {self.config}. Give the path of a YAML file for 'disthess audit'."
            )
        if not self.name:
            object.__setattr__(self, "name", default_name(self.config))
        if _NAME.fullmatch(self.name) is None:
            raise ConfigError(
                f"{self.name[:80]!r} cannot name a schedule: give at most 47 lower-case letters, digits and hyphens, a letter "
                f"first, as Kubernetes asks for."
            )
        for what, text in {
            "path of the audit file": str(self.config.absolute()),
            "image": self.image,
            "address": self.address,
            "working folder": self.working_dir,
            "interpreter": self.python,
        }.items():
            if text is not None and (not text.isprintable() or text.strip() != text or not text):
                raise ConfigError(
                    f"the {what} {text!r} has characters that schedulers cannot be told: a line's end, another character that is "
                    f"not printed, or a space at its start or end. Choose another."
                )
        zone_of(self.timezone)

    def text(self) -> str:
        """The audit file itself.

        Raises:
            ConfigError: It cannot be read, or is too large for a Kubernetes ConfigMap.
        """
        try:
            data = self.config.read_bytes()
            text = data.decode("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the audit file {self.config} cannot be read: {error}. Give a YAML text file."
            ) from error
        if len(data) > _MOST_BYTES:
            raise ConfigError(
                f"the audit file {self.config} has {len(data):,} bytes; {_MOST_BYTES:,} fit in a ConfigMap."
            )
        return text

    def next_times(self, count: int = 5, now: datetime | None = None) -> list[datetime]:
        """The next times, in the schedule's own zone."""
        zone = zone_of(self.timezone)
        times = self.cron.times(now or datetime.now(UTC), zone)
        return [time.astimezone(zone) for time in itertools.islice(times, count)]

    def command(self, config: str) -> list[str]:
        """Words that audit a file, after the program's own."""
        return ["audit", config, *(["--address", self.address] if self.address else [])]


def default_name(config: Path) -> str:
    """A name made of the audit file's.

    >>> default_name(Path("configs/MiniLM audit_2.yaml"))
    'disthess-minilm-audit-2'
    """
    words = "-".join(re.findall(r"[a-z0-9]+", config.stem.lower()))
    return f"disthess-{words}"[:47].rstrip("-")


def seconds_of(duration: str) -> int:
    """Seconds of a duration such as ``90m``, ``1h30m`` or ``2d``; plain numbers are seconds.

    Raises:
        ConfigError: It is none, or not between a second and a year.

    >>> seconds_of("1h30m"), seconds_of("45"), seconds_of("2d")
    (5400, 45, 172800)
    """
    found = _DURATION.fullmatch(duration.replace(" ", "").lower())
    if found is None or not any(found.groups()):
        raise ConfigError(f"{duration[:80]!r} is no duration. Give one such as 45s, 90m, 2h, 1h30m or 1d.")
    total = sum(int(part or 0) * unit for part, unit in zip(found.groups(), (86400, 3600, 60, 1)))
    if not 1 <= total <= 366 * 86400:
        raise ConfigError(f"the duration {duration[:80]!r} is {total:,} s. Give one between a second and a year.")
    return total
