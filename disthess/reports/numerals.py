"""Numbers as people read them: few digits, and as many as an interval warrants."""

from __future__ import annotations

import math

from disthess.reports.page import Cell, Tone

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DASH = "–"


def number(value: float, digits: int = 4) -> str:
    """A number with that many digits, and a power of ten where it is very large or small.

    >>> number(0.0712345), number(-1.23456e-7), number(1234567.0), number(8970.0), number(0.0), number(float("nan"))
    ('0.07123', '−1.235 × 10⁻⁷', '1.235 × 10⁶', '8,970', '0', '–')
    """
    if math.isnan(value):
        return _DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    exponent = _exponent(value)
    if -4 < exponent < 6:
        decimals = max(0, digits - 1 - exponent)
        return _signed(f"{value:,.{decimals}f}") if exponent < digits else _signed(f"{value:,.0f}")
    return _times(f"{value / 10.0**exponent:.{digits - 1}f}", exponent)


def with_interval(value: float, low: float, high: float) -> str:
    """A number with its interval: ``±`` where that is even on both sides, else both ends.

    Ends that look like the number itself are given by ``±`` too, with the longer of the two sides: it holds the interval.

    >>> with_interval(12.3456, 12.3333, 12.3579), with_interval(3.0, 3.0, 3.0), with_interval(2.0, 0.5, 2.1)
    ('12.346 ± 0.012', '3.000', '2.000 [0.5000, 2.100]')
    >>> with_interval(0.8366, 0.8366, 0.8366 + 2e-15)
    '0.8366 ± 2.0 × 10⁻¹⁵'
    >>> with_interval(1.2346e-7, 1.2e-7, 1.27e-7), with_interval(float("nan"), 0.0, 1.0)
    ('(1.235 ± 0.035) × 10⁻⁷', '–')
    """
    if math.isnan(value) or low == value == high or math.isnan(low) or math.isnan(high):
        return number(value)
    half = 0.5 * (high - low)
    even = math.isfinite(half) and abs((high - value) - (value - low)) <= 0.1 * half
    longer = max(high - value, value - low)
    if not even and longer > 0 and number(low) == number(value) == number(high):
        return f"{number(value)} ± {number(longer, 2)}"
    if not even or half <= 0 or half >= 1e3 * abs(value):
        return f"{number(value)} [{number(low)}, {number(high)}]"
    scale = _exponent(value)
    power = scale if not -4 < scale < 6 else 0
    decimals = 1 - _exponent(half) + power
    if decimals > 9 + max(0, -scale):
        return f"{number(value, 9)} ± {number(half, 2)}"
    shown = [f"{part / 10.0**power:,.{max(0, decimals)}f}" for part in (value, half)]
    both = f"{_signed(shown[0])} ± {shown[1]}"
    return f"({both}) × 10{str(power).translate(_SUPERSCRIPTS)}" if power else both


def count(value: int) -> str:
    """A whole number.

    >>> count(80456650)
    '80,456,650'
    """
    return f"{value:,}"


def share(value: float) -> str:
    """A share of a whole.

    >>> share(0.41256), share(0.0), share(0.0004), share(float("nan"))
    ('41.3 %', '0 %', '0.04 %', '–')
    """
    if math.isnan(value):
        return _DASH
    text = f"{100 * value:.1f}" if abs(value) >= 0.01 or value == 0 else f"{100 * value:.2g}"
    return f"{_signed(text.removesuffix('.0'))} %"


def cell(value: float, digits: int = 4, *, link: str = "", note: str = "", tone: Tone = "plain") -> Cell:
    """A number as an entry; one that is not defined is a dash."""
    known = math.isfinite(value)
    return Cell(number(value, digits), value if known else None, link if known else "", note, tone)


def _exponent(value: float) -> int:
    return int(f"{abs(value):.3e}".partition("e")[2])


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _times(text: str, exponent: int) -> str:
    return f"{_signed(text)} × 10{str(exponent).translate(_SUPERSCRIPTS)}"
