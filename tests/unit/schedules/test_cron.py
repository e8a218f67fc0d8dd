"""Cron expressions: which times they mean, on days when clocks change too; and the same times for every scheduler."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disthess.errors import ConfigError
from disthess.schedules.cron import Cron, zone_of
from disthess.schedules.machine import calendar_lines

BERLIN = ZoneInfo("Europe/Berlin")
EXPRESSIONS = [
    *("0 3 * * *", "*/7 */5 * * *", "30 6 * * MON-FRI", "5/15 1-3 * 2,7 7", "0 0 1,15 2 1-5", "0 0 1-31 * MON"),
    *("15 4 31 * 0", "@daily", "@hourly", "@Weekly", "@monthly", "@yearly", "0 12 */1 * TUE", "59 23 29 FEB *"),
]
SPECIAL = [
    "0 0 L * *",
    "0 0 * * 5L",
    "0 0 * * MON#2",
    "0 0 * * 1#5",
    "0 0 L * FRI",
    "15 0 0 * * *",
    "0 0 */2 * MON",
    "1 2 L,3 * *",
    "0 0 L * MON#2",
]


def test_days_fields_mean_what_debians_cron_means() -> None:
    """Against a plain count over every minute of a month, written from cron's manual."""
    start = datetime(2024, 2, 1, tzinfo=UTC)
    minutes = [start + timedelta(minutes=number) for number in range(29 * 1440)]

    def is_due(moment: datetime) -> bool:
        return moment.minute in (0, 30) and moment.hour == 4 and (moment.day in (1, 15) or moment.isoweekday() == 5)

    found = itertools.takewhile(
        lambda time: time < minutes[-1], Cron("*/30 4 1,15 * 5").times(start - timedelta(1), UTC)
    )
    assert list(found)[-len([*filter(is_due, minutes)]) :] == [*filter(is_due, minutes)]
    both = itertools.takewhile(lambda time: time < minutes[-1], Cron("0 0 */2 * 1").times(start, UTC))
    assert [time.day for time in both] == [5, 19]


def test_when_clocks_change_each_time_comes_once() -> None:
    gap = list(itertools.islice(Cron("0,30 2 * * *").times(datetime(2024, 3, 30, 12, tzinfo=UTC), BERLIN), 3))
    assert [time.astimezone(BERLIN).strftime("%d %H:%M %z") for time in gap] == [
        *("31 03:00 +0200", "01 02:00 +0200", "01 02:30 +0200"),
    ]
    twice = list(itertools.islice(Cron("30 2 * * *").times(datetime(2024, 10, 26, 12, tzinfo=UTC), BERLIN), 2))
    assert [time.astimezone(BERLIN).strftime("%d %H:%M %z") for time in twice] == ["27 02:30 +0200", "28 02:30 +0100"]
    # Between the two half past twos of that night, the one of the day is over.
    between = datetime(2024, 10, 27, 1, 10, tzinfo=UTC)
    assert Cron("30 2 * * *").next_time(between, BERLIN) == datetime(2024, 10, 28, 1, 30, tzinfo=UTC)
    hourly = list(itertools.islice(Cron("@hourly").times(datetime(2024, 10, 26, 23, 30, tzinfo=UTC), BERLIN), 5))
    assert {later - earlier for earlier, later in itertools.pairwise(hourly)} <= {timedelta(hours=1)}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["30 2 * * *", "0,30 2 * * *", "*/20 * * * *", "0 */3 * * *", "15 1-3 * * SUN", "0 3 L * *"]),
    st.sampled_from(["2024-03-31", "2024-10-27", "2024-06-30"]),
    st.integers(0, 2880),
    st.integers(0, 2880),
)
def test_times_go_on_from_wherever_one_starts(expression: str, day: str, before: int, after: int) -> None:
    """Started anywhere, on days when clocks change too: strictly later times, all of those of an earlier start."""
    cron = Cron(expression)
    middle = datetime.fromisoformat(day).replace(hour=4, tzinfo=UTC)
    start, stop = middle - timedelta(minutes=before), middle + timedelta(minutes=after)
    times = list(itertools.takewhile(lambda time: time <= stop, cron.times(start - timedelta(days=2), BERLIN)))
    assert times == sorted(set(times))
    later = [time for time in times if time > start]
    assert list(itertools.takewhile(lambda time: time <= stop, cron.times(start, BERLIN))) == later
    assert cron.latest_time(start, stop, BERLIN) == (later[-1] if later else None)


def test_the_latest_time_is_found_quickly_over_years() -> None:
    start, stop = datetime(2000, 1, 1, tzinfo=UTC), datetime(2026, 6, 1, 0, 0, 30, tzinfo=UTC)
    assert Cron("* * * * *").latest_time(start, stop, UTC) == datetime(2026, 6, 1, tzinfo=UTC)
    assert Cron("0 0 29 2 *").latest_time(start, stop, UTC) == datetime(2024, 2, 29, tzinfo=UTC)
    assert Cron("0 0 29 2 *").latest_time(datetime(2024, 2, 29, tzinfo=UTC), stop, UTC) is None


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_plain_form_means_the_same_times(expression: str) -> None:
    cron = Cron(expression)
    plain = cron.plain()
    assert re.fullmatch(r"[0-9*,\- ]+", plain)
    assert "7" not in plain.split()[4]
    start = datetime(2024, 1, 30, 5, tzinfo=UTC)
    times = [list(itertools.islice(form.times(start, BERLIN), 40)) for form in (cron, Cron(plain))]
    assert times[0] == times[1]
    # The rule of Kubernetes: both days must hold only where one of them is a star, which then asks for nothing.
    days = plain.split()[2], plain.split()[4]
    assert "*" in days or not cron.both_days


@pytest.mark.parametrize("expression", SPECIAL)
def test_what_only_some_schedulers_know_has_no_plain_form(expression: str) -> None:
    with pytest.raises(ConfigError, match=r"seconds|L, W or #|restricts both"):
        Cron(expression).plain()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here to be asked")
@pytest.mark.parametrize("expression", [*EXPRESSIONS, *SPECIAL])
def test_systemd_means_the_same_times(expression: str) -> None:
    """Ask systemd itself: the union of its next 12 times of each line against ours."""
    cron = Cron(expression)
    base = datetime(2027, 1, 30, 5, 30, tzinfo=UTC)
    found = set()
    firsts = []
    for line in calendar_lines(cron, "UTC"):
        asked = ["systemd-analyze", "calendar", "--iterations=12", f"--base-time={base:%Y-%m-%d %H:%M:%S} UTC", line]
        said = subprocess.run(asked, capture_output=True, text=True, env={"TZ": "UTC", "PATH": "/usr/bin:/bin"})
        assert said.returncode == 0, said.stderr
        words = re.findall(r"(?:Next elapse|Iter\. #\d+): \w+ (\S+ \S+) UTC", said.stdout)
        times = [datetime.fromisoformat(word).replace(tzinfo=UTC) for word in words]
        found |= set(times)
        firsts.append(times[-1])
    assert found
    last = min(firsts)
    expected = list(itertools.takewhile(lambda time: time <= last, cron.times(base, UTC)))
    assert sorted(time for time in found if time <= last) == expected
    assert len(expected) >= 3


def test_what_systemd_cannot_express_is_refused() -> None:
    with pytest.raises(ConfigError, match="last working day"):
        calendar_lines(Cron("0 0 LW * *"))
    with pytest.raises(ConfigError, match="certain week"):
        calendar_lines(Cron("0 0 */2 * MON#2"))


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "0 3 * *",
        "60 * * * *",
        "* * * * * * *",
        "0 0 30 2 *",
        "0 0 32 * *",
        "a b c d e",
        "*/0 * * * *",
        "@noon",
        "5-1 * * * *",
        "1," * 999,
    ],
)
def test_what_is_no_expression_is_refused(expression: str) -> None:
    with pytest.raises(ConfigError, match="cron expression"):
        Cron(expression)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789*/,-L#WMONJA @", max_size=30))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    try:
        cron = Cron(text)
    except ConfigError:
        return
    assert cron.next_time(datetime(2024, 1, 1, tzinfo=UTC), BERLIN) > datetime(2024, 1, 1, tzinfo=UTC)


def test_zones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Mars/Olympus", "../../etc/passwd", "", "\0"):
        with pytest.raises(ConfigError, match="time zone"):
            zone_of(name)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert str(zone_of(None)) == "Asia/Tokyo"
    monkeypatch.delenv("TZ")
    assert datetime(2024, 1, 1, tzinfo=zone_of(None)).utcoffset() is not None
