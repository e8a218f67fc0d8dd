"""Numbers with units, for people."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Bytes with a decimal prefix.

    >>> human_bytes(321_843_600), human_bytes(12)
    ('322 MB', '12 B')
    """
    return _human(count, "B")


def human_flops(count: float) -> str:
    """Floating point operations with a decimal prefix.

    >>> human_flops(1.45e11)
    '145 GFLOP'
    """
    return _human(count, "FLOP")


def human_seconds(seconds: float | None) -> str:
    """A duration.

    >>> human_seconds(75), human_seconds(3700), human_seconds(4.26), human_seconds(None)
    ('1 min 15 s', '1 h 1 min', '4.3 s', '?')
    """
    if seconds is None:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _human(count: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 999.5:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} E{unit}"
