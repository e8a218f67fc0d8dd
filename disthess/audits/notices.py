"""Telling others of alerts: a line of JSON for each in a file, and a command of the user's."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disthess.audits.encode import number_to_json
from disthess.audits.record import Alert, AuditRecord

COMMAND_SECONDS = 60.0
"""How long a command may take."""

_LOG = logging.getLogger("disthess")


def tell(
    alerts: Sequence[Alert],
    record: AuditRecord,
    *,
    command: str | Sequence[str] | None = None,
    json_path: str | os.PathLike[str] | None = None,
    seconds: float = COMMAND_SECONDS,
) -> tuple[str, ...]:
    """Tell of alerts; nothing happens where there are none. What fails is logged as a warning, and never raised.

    Args:
        alerts: The alerts.
        record: The audit that raised them.
        command: Run once, with one JSON object on its standard input: the audit's ``key``, ``checkpoint``, ``step`` and
            ``taken``, and ``alerts``. A text is split into words as a shell does it, and no shell is started.
        json_path: A file to which one JSON object is appended per alert, each in one line, with the same fields.
        seconds: After which the command, and what it started, is killed.

    Returns:
        A sentence for each thing that failed.
    """
    if not alerts:
        return ()
    about = {"key": record.key, "checkpoint": record.checkpoint, "step": record.step, "taken": record.taken}
    entries = [_entry(alert) for alert in alerts]
    failed = []
    if json_path is not None:
        lines = "".join(json.dumps({**about, **entry}) + "\n" for entry in entries)
        failed.append(_append(Path(json_path).expanduser(), lines.encode()))
    if command is not None:
        failed.append(_run(command, json.dumps({**about, "alerts": entries}).encode(), seconds))
    said = tuple(sentence for sentence in failed if sentence)
    for sentence in said:
        _LOG.warning("%s", sentence)
    return said


def _entry(alert: Alert) -> dict[str, Any]:
    return {
        "rule": alert.rule,
        "metric": alert.metric,
        "block": alert.block,
        "value": number_to_json(alert.value),
        "limit": number_to_json(alert.limit),
        "message": alert.message,
    }


def _append(path: Path, lines: bytes) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write at the end of the file: lines of two audits do not mix.
        with path.open("ab", buffering=0) as file:
            file.write(lines)
    except (OSError, ValueError) as error:
        return f"The alerts could not be appended to {path} ({_said(error)}). The audit itself is kept."
    return ""


def _run(command: str | Sequence[str], data: bytes, seconds: float) -> str:
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError as error:
        return (
            f"The command of the alerts, {command!r}, cannot be split into words ({error}). The audit itself is kept."
        )
    if not words:
        return "The command of the alerts is empty. The audit itself is kept."
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
        except (OSError, ValueError) as error:
            return (
                f"The command of the alerts, {words[0]}, cannot be started ({_said(error)}). The audit itself is kept."
            )
        try:
            process.communicate(data, timeout=seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            late = f"took longer than {seconds:g} s and was killed"
            return f"The command of the alerts, {words[0]}, {late}. The audit itself is kept."
        if process.returncode == 0:
            return ""
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - 2000))
        said = " ".join(errors.read().decode(errors="replace").split())[-300:]
        return (
            f"The command of the alerts, {words[0]}, ended with exit code {process.returncode}{f': {said}' if said else ''}. "
            f"The audit itself is kept."
        )


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
