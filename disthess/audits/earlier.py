"""What the last audit of the same subject took: what the next is expected to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disthess.audits.meter import share_needed
from disthess.audits.record import AuditRecord
from disthess.audits.subject import GGN, Subject

SPEED = ("data", "device", "executor", "workers", "threads", "torch")
"""Facts in which two audits agree if one says how fast the other will be."""


@dataclass(frozen=True, slots=True)
class EarlierAudit:
    """One.

    Attributes:
        checkpoint: Its name.
        taken: When.
        products: It took, forms of the Gauss-Newton matrix included.
        parts: By what they are for, 0 where it could not be measured; empty of audits that did not keep that.
        share: Of their limit that products needed until they converged; None where none are of that kind.
        seconds: It took; NaN where it was of other data, elsewhere or by other processes.
    """

    checkpoint: str
    taken: str
    products: int
    parts: Mapping[str, int]
    share: float | None
    seconds: float


def earlier_audit(records: Sequence[AuditRecord], subject: Subject, facts: Mapping[str, str]) -> EarlierAudit | None:
    """The last audit by the same settings; None where there is none.

    Args:
        records: Of the history.
        subject: What is to be measured.
        facts: As the next audit will have them.
    """
    same = [record for record in records if record.facts.get("settings") == facts["settings"]]
    if not same:
        return None
    last, planned = same[-1], subject.parts()
    if last.parts:
        # What could not be measured is not among its parts.
        parts = {part.name: last.parts.get(part.name, 0) for part in planned}
        limits = {part.name: part.products for part in planned if part.until_converged}
        share = sum(parts[name] for name in limits) / sum(limits.values()) if limits else None
        products = sum(parts.values())
    else:
        parts = {}
        share = share_needed([part for part in planned if part.name != GGN], last.products)
        has_forms = math.isfinite(last.value("ggn_share"))
        products = last.products + sum(part.products for part in planned if part.name == GGN and has_forms)
    alike = all(last.facts.get(name) == facts.get(name) for name in SPEED)
    seconds = last.seconds if alike and products else math.nan
    return EarlierAudit(last.checkpoint, last.taken, products, parts, share, seconds)
