"""Alerts are told by lines of JSON and by a command; what fails there is a warning and loses nothing."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest

from disthess.audits.notices import tell
from disthess.audits.record import Alert, AuditRecord

RECORD = AuditRecord("k", "step_7.pt", 7, "2026-01-01T00:00:00+00:00", 0.0, 0, {}, ())
ALERTS = (
    Alert("sharp", "lambda_max", "", 3.0, 2.0, "sharp ü\nline"),
    Alert("none", "trace", "fc.*", math.nan, math.nan, "not a number"),
)


def test_one_line_of_json_per_alert_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "alerts.jsonl"
    assert tell(ALERTS, RECORD, json_path=path) == ()
    assert tell(ALERTS[:1], RECORD, json_path=path) == ()
    assert tell((), RECORD, json_path=path, command="false") == ()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["rule"] for line in lines] == ["sharp", "none", "sharp"]
    about = {"key": "k", "checkpoint": "step_7.pt", "step": 7, "taken": RECORD.taken}
    assert lines[1] == about | {"rule": "none", "metric": "trace", "block": "fc.*"} | {
        "value": "NaN",
        "limit": "NaN",
        "message": "not a number",
    }


def test_a_command_gets_json_and_no_shell(tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[1], 'w').write(sys.argv[2] + sys.stdin.read())"
    out = tmp_path / "a b"
    assert tell(ALERTS, RECORD, command=[sys.executable, "-c", script, str(out), "$HOME;"]) == ()
    assert tell(ALERTS, RECORD, command=f"{sys.executable} -c \"{script}\" '{out} 2' '$HOME;'") == ()
    for path in (out, tmp_path / "a b 2"):
        text = path.read_text()
        assert text.startswith("$HOME;{")
        found = json.loads(text.removeprefix("$HOME;"))
        assert found["checkpoint"] == "step_7.pt"
        assert [alert["message"] for alert in found["alerts"]] == ["sharp ü\nline", "not a number"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("no-such-command-here", "cannot be started"),
        ("'unclosed", "cannot be split"),
        ("", "is empty"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"no route to host\")'", "exit code 1: no route to host"),
    ],
)
def test_what_fails_is_a_warning(command: str, words: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    said = tell(ALERTS, RECORD, command=command, json_path=tmp_path / "folder")
    assert len(said) == 2
    assert "could not be appended" in said[0]
    assert words in said[1]
    assert all(sentence.endswith("The audit itself is kept.") for sentence in said)
    assert [entry.getMessage() for entry in caplog.records] == list(said)


def test_a_command_that_does_not_read_is_no_failure() -> None:
    assert tell(ALERTS * 2000, RECORD, command=f"{sys.executable} -c pass") == ()


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 60 & echo $! > {pid}; sleep 60"]
    (said,) = tell(ALERTS, RECORD, command=command, seconds=1.0)
    assert "took longer than 1 s" in said
    until = time.monotonic() + 10
    while is_running(int(pid.read_text())):
        assert time.monotonic() < until
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there that is not merely waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
