"""Which audit of a history is meant: ``HISTORY@SELECTOR``."""

from __future__ import annotations

import re

from disthess.audits.history import History
from disthess.audits.record import AuditRecord
from disthess.errors import ConfigError, StoreError
from disthess.store.audit_group import AuditGroup
from disthess.store.place import place_of


def split_selector(text: str) -> tuple[str, str | None]:
    """Path and selector; a path that is there with its at sign has none.

    >>> split_selector("runs/audits.zarr@-1"), split_selector("s3://bucket/audits.zarr")
    (('runs/audits.zarr', '-1'), ('s3://bucket/audits.zarr', None))
    """
    path, sign, selector = text.rpartition("@")
    if not sign or not path or not selector or place_of(text).exists():
        return text, None
    return path, selector


def is_history(path: str) -> bool:
    """Whether a history is there."""
    try:
        AuditGroup.open(path)
    except StoreError:
        return False
    return True


def find_record(history: History, selector: str) -> AuditRecord:
    """The audit that a selector means: a step (its last audit), a place counted from the end (``-1``), a checkpoint, or a key.

    Raises:
        ConfigError: None is.
        StoreError: The history is damaged.
    """
    records = history.records()
    found: list[AuditRecord] = []
    if re.fullmatch(r"-\d{1,9}", selector):
        found = list(records[int(selector) :][:1]) if int(selector) and -int(selector) <= len(records) else []
    if re.fullmatch(r"\d{1,18}", selector):
        found = [record for record in records if record.step == int(selector)]
    found = found or [record for record in records if record.checkpoint == selector]
    if not found and len(selector) >= 6:
        found = [record for record in records if record.key.startswith(selector)]
    if not found:
        known = [record.checkpoint if record.step is None else str(record.step) for record in records]
        shown = ", ".join([*(["..."] if len(known) > 8 else []), *known[-8:]]) or "none"
        raise ConfigError(
            f"the history {history.path} has no audit {selector!r}. Give a step, -1 for the last, the checkpoint's name or the "
            f"start of the audit's key; it has {shown}."
        )
    return found[-1]
