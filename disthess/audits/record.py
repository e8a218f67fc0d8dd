"""What one audit of one checkpoint found: a frozen value that a history keeps, alerts judge and reports show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from disthess.linalg.estimate import WHOLE as WHOLE
from disthess.linalg.estimate import Estimate as Estimate


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule that one audit broke.

    Attributes:
        rule: The rule's name in the audit file.
        metric: Of the estimate that broke it.
        block: Its block.
        value: What was measured.
        limit: What the rule allows.
        message: One sentence: what was measured, what is allowed, against which audit.
    """

    rule: str
    metric: str
    block: str
    value: float
    limit: float
    message: str


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One audit.

    Attributes:
        key: Identity of checkpoint, data and settings, hexadecimal: an audit with a key that a history has is not made again.
        checkpoint: Name of the checkpoint, as tables show it.
        step: Of training, read from the name; None if it has none.
        taken: When, UTC, ISO 8601.
        seconds: It took.
        products: Hessian-vector products it took.
        facts: Texts by name: hashes of data and settings, seed, versions, attention kernel, device.
        estimates: The numbers.
        blocks: Names of the blocks of the coupling map, in its order; empty where there is none.
        arrays: By name, float64: ``density/grid``, ``density/value``, ``density/error`` (one-dimensional, one length);
            ``coupling/value``, ``coupling/low``, ``coupling/high`` and the same of ``norm`` (``[n, n]`` for ``n`` blocks); and
            exact blocks as ``tile/<name>`` (two-dimensional).
        alerts: Rules that it broke.
    """

    key: str
    checkpoint: str
    step: int | None
    taken: str
    seconds: float
    products: int
    facts: Mapping[str, str]
    estimates: tuple[Estimate, ...]
    blocks: tuple[str, ...] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=lambda: MappingProxyType({}))
    alerts: tuple[Alert, ...] = ()

    def find(self, metric: str, block: str = WHOLE) -> Estimate | None:
        """The estimate of that metric and block; None where it was not measured."""
        return next((found for found in self.estimates if (found.metric, found.block) == (metric, block)), None)

    def value(self, metric: str, block: str = WHOLE) -> float:
        """Its number; NaN where it was not measured."""
        found = self.find(metric, block)
        return math.nan if found is None else found.value
