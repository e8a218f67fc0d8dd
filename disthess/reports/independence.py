"""May these blocks be treated as independent? The answer in words, from norms and couplings of all pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from disthess.reports.numerals import number, share
from disthess.reports.page import Tone

WEAK = 0.1
"""A coupling below this is called weak: two blocks of equal norm then share a tenth of it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """In words.

    Attributes:
        tone: ``good`` for yes.
        text: One to three sentences.
        strongest: The pair with the largest coupling, as indices; None where no coupling is defined.
    """

    tone: Tone
    text: str
    strongest: tuple[int, int] | None


def coupling_of(norms: np.ndarray) -> np.ndarray:
    """``C = |H_vw| / sqrt(|H_vv| |H_ww|)`` of exact norms, ``[n, n]``.

    Infinite where an own block is zero and the pair is not: dependent all the same. NaN where both are zero.
    """
    own = np.diag(norms)
    scale = np.sqrt(np.outer(own, own))
    undefined = np.where(norms > 0, math.inf, math.nan)
    return np.divide(norms, scale, out=undefined, where=scale > 0)


def off_diagonal(norms: np.ndarray) -> float:
    """``sqrt(sum_(v != w) |H_vw|^2 / sum |H_vw|^2)``: what a block-diagonal form leaves out of the Frobenius norm."""
    squares = norms**2
    total = float(squares.sum())
    return math.sqrt(max(0.0, 1.0 - float(np.trace(squares)) / total)) if total else math.nan


def strongest_pairs(coupling: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Pairs of different blocks with the largest coupling first."""
    rows, columns = np.triu_indices(len(coupling), 1)
    values = coupling[rows, columns]
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values), kind="stable")[:most]
    return [(int(rows[at]), int(columns[at])) for at in order if not math.isnan(values[at])]


def independence(
    names: Sequence[str], norms: np.ndarray, coupling: np.ndarray, low: np.ndarray, high: np.ndarray
) -> Answer:
    """The answer.

    Args:
        names: n of them.
        norms: ``[n, n]``.
        coupling: ``[n, n]``.
        low: Lower ends; ``coupling`` itself where it is exact.
        high: Upper ends.
    """
    pairs = strongest_pairs(coupling, 1)
    if not pairs:
        return Answer("plain", "There is no pair of blocks to compare.", None)
    i, j = pairs[0]
    upper = np.where(np.isfinite(high), high, math.inf)
    rows, columns = np.triu_indices(len(coupling), 1)
    defined = ~np.isnan(coupling[rows, columns])
    unknown = int(np.count_nonzero(~defined & ~(norms[rows, columns] == 0)))
    most = math.inf if unknown else float(upper[rows, columns][defined].max())
    exact = low[i, j] == coupling[i, j] == high[i, j]
    ends = "" if exact else f" [{number(float(low[i, j]), 3)}, {number(float(high[i, j]), 3)}]"
    pair = f"{names[i]} and {names[j]}, C = {number(float(coupling[i, j]), 3)}{ends}"
    left = off_diagonal(norms)
    rest = f"A block-diagonal form leaves out {share(left)} of the Frobenius norm{'' if exact else ' (estimated)'}."
    if most < WEAK:
        return Answer(
            "good", f"Nearly: no pair couples with C of {WEAK} or more; the strongest is {pair}. {rest}", (i, j)
        )
    if float(low[rows, columns][defined].max()) < WEAK:
        doubt = f"{unknown} have no known value" if unknown else f"intervals reach {number(most, 3)}"
        return Answer(
            "warning",
            f"Undecided: no coupling is shown to reach {WEAK}, but {doubt}; the strongest is {pair}. {rest} More probes narrow "
            "the intervals.",
            (i, j),
        )
    return Answer("bad", f"No: the strongest pair is {pair}. {rest}", (i, j))
