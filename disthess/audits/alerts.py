"""What an audit is watched for: limits, changes against earlier audits, and the learning rate.

- ``above`` and ``below`` are limits of the number itself: an alert as soon as the *value* lies beyond, whether or not its interval
  does. The value is the best estimate, and the number that tables show; waiting for the whole interval would let the least certain
  measurements pass most easily. The message says which of the two it is.
- ``rise`` and ``fall`` are limits of the change relative to the size of an earlier number, against the first audit or the mean of
  the last few. An alert needs both: a change beyond the limit, and one that chance alone would make with a probability below
  ``significance`` (`disthess.audits.significance`). Where a rule watches n blocks, each needs ``significance / n``, so that a rule
  as a whole raises a false alarm in a share of ``significance`` of the audits, however many blocks it watches.
- ``learning_rate`` must stay below 2 / lambda_max. Here the unfavourable end of the interval counts: a run that diverges costs more
  than an alert, and Lanczos approaches lambda_max from below.

A number that is not one (NaN) breaks every rule that watches it. What could not be judged is said in notes, never passed over.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from disthess.audits.metrics import METRICS
from disthess.audits.notices import tell as tell
from disthess.audits.record import WHOLE, Alert, AuditRecord, Estimate
from disthess.audits.significance import Change, change_between, change_since
from disthess.errors import ConfigError

Against = Literal["baseline", "last"]

LEAST_EARLIER = 3
"""Earlier audits without which a scatter says too little."""

DATA = "data"
"""The fact that says which data: audits of other data are no measure of a change."""


@dataclass(frozen=True, slots=True)
class AlertRule:
    """One thing to watch.

    Attributes:
        name: What alerts call it.
        metric: One of `disthess.audits.metrics.METRICS`.
        block: A glob over names of blocks; "" for the whole model.
        above: Alert if the number is larger.
        below: Alert if it is smaller.
        against: What changes are measured from: ``baseline``, the first audit of the history on the same data, or ``last``,
            the mean of the last ``count`` of them.
        count: How many, at most; three are needed.
        rise: Alert if it has risen by more than this share of the earlier number's size, 0.5 for 50 %.
        fall: The same of a fall.
        significance: Probability of a false alarm by a change, of the whole rule, in one audit.
        learning_rate: Alert if it is not below 2 / lambda_max; for the metrics ``lambda_max`` and ``rate_limit``.

    Raises:
        ConfigError: The rule cannot be meant; the message says why.

    >>> AlertRule("sharp", "lambda_max", above=100.0).above
    100.0
    """

    name: str
    metric: str
    block: str = WHOLE
    above: float | None = None
    below: float | None = None
    against: Against | None = None
    count: int = 5
    rise: float | None = None
    fall: float | None = None
    significance: float = 0.01
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError(f"an alert has the name {self.name!r}. Give each a name, such as 'too sharp'.")
        self._check_metric()
        self._check_numbers()
        changes = self.rise is not None or self.fall is not None
        if changes != (self.against is not None):
            self._refuse(
                "has rise or fall, but not against what; add against: baseline or against: last"
                if changes
                else f"has against: {self.against}, but neither rise nor fall; add one, such as rise: 0.5 for 50 %"
            )
        if not changes and self.above is None and self.below is None and self.learning_rate is None:
            self._refuse("has nothing to compare with; give one of above, below, rise, fall and learning_rate")

    def _check_metric(self) -> None:
        if self.metric not in METRICS:
            near = difflib.get_close_matches(str(self.metric), METRICS, n=2, cutoff=0.5)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            self._refuse(f"watches the unknown metric {self.metric!r}{hint}; metrics are {', '.join(METRICS)}")
        if not isinstance(self.block, str):
            self._refuse(f"has the block {self.block!r}, which is no text")
        if self.block != WHOLE and not METRICS[self.metric].per_block:
            self._refuse(
                f"watches {self.metric} of the blocks {self.block!r}, which only the whole model has; leave block out"
            )
        if self.learning_rate is not None and (self.metric not in ("lambda_max", "rate_limit") or self.block != WHOLE):
            self._refuse(
                f"compares a learning rate with {self.metric} of {self.block or 'the whole model'}; it needs the metric "
                f"lambda_max or rate_limit, of the whole model"
            )

    def _check_numbers(self) -> None:
        for field in ("above", "below", "rise", "fall", "learning_rate", "significance"):
            value = getattr(self, field)
            if value is None and field != "significance":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                self._refuse(f"has {field}: {value!r}, which is no finite number")
            if (field in ("rise", "fall") and value < 0) or (field == "learning_rate" and value <= 0):
                self._refuse(f"has {field}: {value}; give a positive number")
        if not 0 < self.significance < 1:
            self._refuse(f"has significance: {self.significance}; give a probability between 0 and 1, such as 0.01")
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < LEAST_EARLIER:
            self._refuse(f"has count: {self.count!r}; give a whole number of earlier audits, {LEAST_EARLIER} at least")
        if self.against not in (None, "baseline", "last"):
            self._refuse(f"has against: {self.against!r}; it is baseline or last")
        if self.above is not None and self.below is not None and self.below > self.above:
            self._refuse(f"alerts below {self.below} and above {self.above}, so on every number; exchange the two")

    def _refuse(self, said: str) -> None:
        raise ConfigError(f"the alert {self.name!r} {said}.")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of the rules.

    Attributes:
        alerts: Rules that were broken, in the order of the rules, each block on its own.
        notes: Sentences on what could not be judged, and why.
    """

    alerts: tuple[Alert, ...]
    notes: tuple[str, ...]


def judge_alerts(record: AuditRecord, earlier: Sequence[AuditRecord], rules: Sequence[AlertRule]) -> tuple[Alert, ...]:
    """The rules that an audit breaks; `judge` says besides what could not be judged.

    Args:
        record: The audit.
        earlier: Those before it in its history, in order; it may not be among them.
        rules: What is watched.
    """
    return judge(record, earlier, rules).alerts


def judge(record: AuditRecord, earlier: Sequence[AuditRecord], rules: Sequence[AlertRule]) -> Judgement:
    """Hold an audit against rules.

    Args:
        record: The audit.
        earlier: Those before it in its history, in order. Those on other data are left out.
        rules: What is watched.

    >>> lam = Estimate("lambda_max", "", 12.0, 11.5, 12.5, 0.95, "Lanczos")
    >>> record = AuditRecord("k", "step_10.pt", 10, "", 0.0, 0, {}, (lam,))
    >>> judge(record, (), [AlertRule("sharp", "lambda_max", above=10.0)]).alerts[0].message
    'lambda_max is 12 (11.5 to 12.5), above 10; so is the whole interval'
    """
    alerts: list[Alert] = []
    notes: list[str] = []
    same = [entry for entry in earlier if entry.key != record.key and entry.facts.get(DATA) == record.facts.get(DATA)]
    others = sum(entry.key != record.key for entry in earlier) - len(same)
    if others and any(rule.against is not None for rule in rules):
        notes.append(f"{others} earlier audits were made on other data, and are no measure of a change in the alerts")
    for rule in rules:
        watched = [
            estimate
            for estimate in record.estimates
            if estimate.metric == rule.metric and _matches(estimate.block, rule.block)
        ]
        if not watched:
            where = f"the blocks {rule.block!r}" if rule.block else "the whole model"
            notes.append(f"the alert {rule.name!r} watches {rule.metric} of {where}, which this audit did not measure")
        for estimate in watched:
            alerts.extend(_judge_one(rule, estimate, len(watched), same, notes))
    return Judgement(tuple(alerts), tuple(notes))


def _judge_one(
    rule: AlertRule, estimate: Estimate, count: int, earlier: Sequence[AuditRecord], notes: list[str]
) -> list[Alert]:
    if math.isnan(estimate.value):
        limits = (rule.above, rule.below, rule.learning_rate)
        limit = next((limit for limit in limits if limit is not None), math.nan)
        return [_alert(rule, estimate, limit, f"{_what(estimate)} is not a number; the rule cannot be judged")]
    found = [
        *_beyond(rule, estimate),
        *_too_fast(rule, estimate),
        *_changed(rule, estimate, count, earlier, notes),
    ]
    return [_alert(rule, estimate, limit, message) for limit, message in found]


def _beyond(rule: AlertRule, estimate: Estimate) -> list[tuple[float, str]]:
    """By the number itself."""
    found = []
    for limit, word, sign in ((rule.above, "above", 1.0), (rule.below, "below", -1.0)):
        if limit is not None and sign * estimate.value > sign * limit:
            near = estimate.low if sign > 0 else estimate.high
            if estimate.exact:
                sure = ""
            elif sign * near > sign * limit:
                sure = "; so is the whole interval"
            else:
                sure = "; the interval reaches it, so this may be chance"
            found.append((limit, f"{_number(estimate)}, {word} {limit:.6g}{sure}"))
    return found


def _too_fast(rule: AlertRule, estimate: Estimate) -> list[tuple[float, str]]:
    """By the learning rate, at the unfavourable end of the interval."""
    rate = rule.learning_rate
    if rate is None:
        return []
    ends = (estimate.low, estimate.value, estimate.high)
    if rule.metric == "lambda_max":
        limits = [2 / end if end > 0 else math.inf for end in reversed(ends)]
    else:
        limits = list(ends)
    smallest, limit, largest = (limit if not math.isnan(limit) else estimate.value for limit in limits)
    if rate < smallest:
        return []
    if rate >= largest:
        sure = "gradient descent with it diverges along the steepest direction"
    elif rate >= limit:
        sure = "that is so at the measured value, and not on all of its interval"
    else:
        sure = f"the measured value allows it ({limit:.6g}), the far end of its interval does not"
    return [
        (
            smallest,
            f"the learning rate {rate:.6g} is not below 2/lambda_max = {smallest:.6g} ({_number(estimate)}); {sure}",
        )
    ]


def _changed(
    rule: AlertRule, estimate: Estimate, count: int, earlier: Sequence[AuditRecord], notes: list[str]
) -> list[tuple[float, str]]:
    """By what came before."""
    if rule.against is None:
        return []
    known = [
        (entry.checkpoint, found)
        for entry in earlier
        if (found := entry.find(estimate.metric, estimate.block)) is not None and math.isfinite(found.value)
    ]
    needed = 1 if rule.against == "baseline" else LEAST_EARLIER
    if len(known) < needed:
        notes.append(
            f"the alert {rule.name!r} has {len(known)} earlier numbers of {_what(estimate)} to compare with, and needs {needed}"
        )
        return []
    if rule.against == "baseline":
        where, change = f"{known[0][0]}, the first audit", change_between(known[0][1], estimate)
    else:
        last = [found for _, found in known[-rule.count :]]
        where, change = f"the mean of the last {len(last)} audits", change_since(last, estimate)
    limit = _broken_limit(rule, change)
    if limit is None or not (math.isinf(estimate.value) or change.p * count < rule.significance):
        return []
    among = f", among {count} blocks" if count > 1 else ""
    allowed = rule.rise if change.difference > 0 else rule.fall
    moved = "risen" if change.difference > 0 else "fallen"
    message = (
        f"{_number(estimate)}, {moved} by {_size(change)} from {change.before:.6g}, {where}; allowed are {allowed:.1%} "
        f"(by chance: p = {change.p:.2g}{among})"
    )
    return [(limit, message)]


def _size(change: Change) -> str:
    if not math.isfinite(change.relative):
        return f"{abs(change.difference):.6g}"
    share = abs(change.relative)
    return f"{share:.3g} times its size" if share > 10 else f"{share:.1%}"


def _broken_limit(rule: AlertRule, change: Change) -> float | None:
    """The number that the change should not have passed; None where it has not."""
    size = abs(change.before)
    if rule.rise is not None and change.difference > rule.rise * size:
        return change.before + rule.rise * size
    if rule.fall is not None and -change.difference > rule.fall * size:
        return change.before - rule.fall * size
    return None


def _matches(block: str, pattern: str) -> bool:
    return block == WHOLE if pattern == WHOLE else block != WHOLE and fnmatchcase(block, pattern)


def _what(estimate: Estimate) -> str:
    return f"{estimate.metric} of {estimate.block}" if estimate.block else estimate.metric


def _number(estimate: Estimate) -> str:
    interval = "" if estimate.exact else f" ({estimate.low:.6g} to {estimate.high:.6g})"
    return f"{_what(estimate)} is {estimate.value:.6g}{interval}"


def _alert(rule: AlertRule, estimate: Estimate, limit: float, message: str) -> Alert:
    return Alert(rule.name, rule.metric, estimate.block, estimate.value, limit, message)
