"""Audits checkpoints one after another, in the order of training: each that the history does not have yet.

1. Every file is hashed; with the hashes of data and settings that is the audit's key.
2. A checkpoint whose key is new is loaded into the model, measured, judged by the rules against the audits before it, appended to
   the history, and then told of. Nothing is appended of one that fails; the others go on.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch

from disthess.audit_config import AuditConfig, load_audit
from disthess.audits.alerts import AlertRule, judge, tell
from disthess.audits.checkpoints import FoundCheckpoint, find_checkpoints
from disthess.audits.earlier import earlier_audit
from disthess.audits.forecast import AuditPlan, make_plan
from disthess.audits.history import History
from disthess.audits.identity import checkpoint_hash, facts_of, key_of, settings_hash
from disthess.audits.measure import measure
from disthess.audits.meter import Meter, Progress
from disthess.audits.record import Alert, AuditRecord
from disthess.audits.subject import Subject, make_subject
from disthess.errors import DisthessError
from disthess.fingerprint import data_hash
from disthess.loading import Checkpoint, load_checkpoint, load_problem

FACTORY = "the factory's weights"
"""What tables call an audit without checkpoints."""


@dataclass(frozen=True, slots=True)
class AuditOutcome:
    """What came of one call of `audit`.

    Attributes:
        history: Where the audits are.
        records: Audits made by this call, in their order, with their alerts.
        known: Names of checkpoints that the history had already.
        failures: Name of each checkpoint that could not be audited, and why.
        notes: What could not be judged, or nobody could be told.
    """

    history: str
    records: tuple[AuditRecord, ...]
    known: tuple[str, ...]
    failures: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """Raised by this call."""
        return tuple(alert for record in self.records for alert in record.alerts)

    @property
    def exit_code(self) -> int:
        """1 if a checkpoint failed, else 3 if there is an alert, else 0."""
        return 1 if self.failures else 3 if self.alerts else 0


def audit(
    config: AuditConfig | str | Path,
    *,
    history: str | Path | None = None,
    force: bool = False,
    address: str | None = None,
    seen: Callable[[AuditRecord], object] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> AuditOutcome:
    """Measure the curvature of every checkpoint that the history does not have, and judge it.

    Args:
        config: An audit file, or its contents.
        history: Append here, a path or a URL, in place of the file's own history.
        force: Measure those again that the history has; their audits are replaced.
        address: Of a running Ray cluster, whose actors take the products, whatever executor the file names; ``auto`` finds it.
        seen: Called with each audit as soon as it is in the history.
        progress: Called as products are taken.

    Returns:
        The audits made, and what was known, failed or could not be judged.

    Raises:
        ConfigError: The file is wrong, a name in it matches nothing, or there is no checkpoint.
        StoreError: The history cannot be read or written.
        ProblemError: The factory failed, or the model has no usable parameters.
    """
    session = _Session.of(config, history, address)
    with session.threads():
        return session.run(force, seen, progress)


def plan_audit(config: AuditConfig | str | Path, *, history: str | Path | None = None) -> AuditPlan:
    """What `audit` would cost. Nothing is measured or written.

    Where the history has an audit by the same settings, its products are what is expected; if it was of the same data on the same
    device by the same processes, its seconds too. Otherwise one product is timed.

    Args:
        config: As for `audit`.
        history: As for `audit`.

    Raises:
        ConfigError: As for `audit`.
    """
    session = _Session.of(config, history)
    with session.threads():
        return session.plan()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A checkpoint with its hash, or why it cannot be read."""

    found: FoundCheckpoint | None
    hash: str
    key: str
    trouble: str

    @property
    def name(self) -> str:
        return FACTORY if self.found is None else self.found.name


@final
class _Session:
    def __init__(self, config: AuditConfig, path: str, history: str) -> None:
        self._config = config
        self._folders = config.folders(path)
        self._history = history
        self._rules = tuple(AlertRule(**section.model_dump()) for section in config.alerts)
        found = None if config.checkpoints is None else find_checkpoints(config.checkpoints, self._folders)
        self._subject: Subject = make_subject(load_problem(config.source(path)), config)
        self._data = data_hash(self._subject.problem)
        self._settings = settings_hash(config)
        self._candidates = tuple(self._candidate(one) for one in ((None,) if found is None else found))

    @classmethod
    def of(cls, config: AuditConfig | str | Path, history: str | Path | None, address: str | None = None) -> _Session:
        """Everything that a wrong file is refused for happens here."""
        read = config if isinstance(config, AuditConfig) else load_audit(config)
        if address is not None:
            read = read.on_cluster(address)
        path = "." + os.sep if isinstance(config, AuditConfig) else os.fspath(config)
        return cls(read, path, read.history if history is None else os.fspath(history))

    @contextmanager
    def threads(self) -> Iterator[None]:
        """As many threads as the file asks for."""
        before = torch.get_num_threads()
        if self._config.measure.threads is not None:
            torch.set_num_threads(self._config.measure.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def plan(self) -> AuditPlan:
        """Its cost."""
        readable = [one for one in self._candidates if not one.trouble]
        known = {record.key for record in self._records()}
        new = tuple(one.name for one in readable if one.key not in known)
        earlier = earlier_audit(self._records(), self._subject, self._facts())
        return make_plan(self._subject, new, len(readable) - len(new), earlier)

    def run(
        self, force: bool, seen: Callable[[AuditRecord], object] | None, progress: Callable[[Progress], None] | None
    ) -> AuditOutcome:
        """Audit what is new."""
        history = History.open_or_create(self._history)
        failures = [(one.name, one.trouble) for one in self._candidates if one.trouble]
        readable = [one for one in self._candidates if not one.trouble]
        new = [one for one in readable if force or not history.has(one.key)]
        known = tuple(one.name for one in readable if one not in new)
        earlier = earlier_audit(history.records(), self._subject, self._facts())
        guess, before = (None, None) if earlier is None else (earlier.share, earlier.parts)
        meter = Meter(self._subject.parts(), len(new), progress, guess=guess, before=before)
        records: list[AuditRecord] = []
        notes: list[str] = []
        for one in new:
            meter.begin_checkpoint()
            if any(record.key == one.key for record in records):
                notes.append(f"{one.name} has the weights of a checkpoint before it, and was not measured again")
                continue
            try:
                record = self._measure(one, meter)
            except (DisthessError, OSError, RuntimeError, MemoryError) as reason:
                failures.append((one.name, f"{' '.join(str(reason).split())}"))
                continue
            judgement = judge(record, _before(history.records(), record.key), self._rules)
            record = replace(record, alerts=judgement.alerts)
            notes += [note for note in judgement.notes if note not in notes]
            history.append(record, replace=history.has(record.key))
            hook = self._config.hook
            notes += tell(record.alerts, record, command=hook.command, json_path=hook.json_path)
            records.append(record)
            if seen is not None:
                seen(record)
        return AuditOutcome(self._history, tuple(records), known, tuple(failures), tuple(notes))

    def _measure(self, one: _Candidate, meter: Meter) -> AuditRecord:
        begin = time.monotonic()
        taken = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        section = self._config.checkpoints
        if one.found is not None and section is not None:
            wanted = Checkpoint(one.found.path, section.format, section.prefix, section.key)
            load_checkpoint(self._subject.problem.model, wanted, self._folders)
        problem = self._subject.bound()
        found = measure(self._subject, problem, meter)
        hashes = {"checkpoint": one.hash, "data": self._data, "settings": self._settings}
        return AuditRecord(
            key=one.key,
            checkpoint=one.name,
            step=None if one.found is None else one.found.step,
            taken=taken,
            seconds=time.monotonic() - begin,
            products=found.products,
            facts=facts_of(problem, self._config, self._subject.size, hashes),
            estimates=found.estimates,
            blocks=found.blocks,
            arrays=found.arrays,
            densities=found.densities,
            map_facts=found.map_facts,
            parts=meter.spent,
        )

    def _candidate(self, found: FoundCheckpoint | None) -> _Candidate:
        try:
            content = checkpoint_hash(None if found is None else found.path, self._subject.problem)
        except OSError as reason:
            return _Candidate(found, "", "", f"the file cannot be read: {reason.strerror or reason}")
        return _Candidate(found, content, key_of(content, self._data, self._settings), "")

    def _has_history(self) -> bool:
        return "://" in self._history or Path(self._history).exists()

    def _records(self) -> tuple[AuditRecord, ...]:
        return History.open(self._history).records() if self._has_history() else ()

    def _facts(self) -> dict[str, str]:
        hashes = {"data": self._data, "settings": self._settings}
        return facts_of(self._subject.bound(), self._config, self._subject.size, hashes)


def _before(records: Sequence[AuditRecord], key: str) -> Sequence[AuditRecord]:
    """Audits before that of a key; all if there is none."""
    places = [place for place, record in enumerate(records) if record.key == key]
    return records[: places[0]] if places else records
