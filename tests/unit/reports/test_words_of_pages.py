"""Numbers with intervals and shortened names: what people read must not say more or other than what was found."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disthess.pictures.vector import plain_text
from disthess.reports.independence import WEAK, coupling_of, independence, off_diagonal, strongest_pairs
from disthess.reports.names import short_names
from disthess.reports.numerals import number, share, with_interval

SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def read(text: str) -> float:
    """The number that a text shows."""
    mantissa, _, power = text.partition(" × 10")
    exponent = int(power.translate(SUPERSCRIPTS)) if power else 0
    return float(mantissa.replace("−", "-").replace(",", "")) * 10.0**exponent


finite = st.floats(-1e30, 1e30, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-30)


@given(finite)
def test_a_number_reads_back_to_its_digits(value: float) -> None:
    assert read(number(value)) == pytest.approx(value, rel=6e-4)


@given(finite, st.floats(1e-9, 10.0))
def test_an_interval_reads_back_to_its_value_and_width(value: float, relative: float) -> None:
    half = abs(value) * relative
    text = with_interval(value, value - half, value + half)
    if value == 0:
        assert text == "0"
        return
    found = re.fullmatch(r"\((.*) ± (.*)\)( × 10.*)|(.*) ± (.*)", text)
    assert found, text
    power = found[3] or ""
    shown, width = (found[1] + power, found[2] + power) if power else (found[4], found[5])
    assert read(width) == pytest.approx(half, rel=0.06)
    assert abs(read(shown) - value) <= 0.06 * half + 1e-8 * abs(value)


@given(finite, st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_uneven_intervals_hold_what_they_should(value: float, below: float, above: float) -> None:
    low, high = value - below * abs(value), value + above * abs(value)
    text = with_interval(value, low, high)
    if "[" in text:
        ends = re.fullmatch(r".* \[(.*), (.*)\]", text)
        assert ends, text
        assert read(ends[1]) == pytest.approx(low, rel=6e-4, abs=1e-30)
        assert read(ends[2]) == pytest.approx(high, rel=6e-4, abs=1e-30)


def test_what_is_not_a_number_is_never_shown_as_one() -> None:
    assert number(math.nan) == share(math.nan) == with_interval(math.nan, 0.0, 1.0) == "–"
    assert number(math.inf) == "∞"
    assert "∞" in with_interval(1.0, 0.0, math.inf)


PIECES = ("encoder", "layer", "0", "11", "self_attn", "in_proj_weight", "bias", "w" * 40, "$x")
dotted = st.lists(st.sampled_from(PIECES), min_size=1, max_size=7)


@given(st.lists(dotted.map(".".join), min_size=1, max_size=12, unique=True))
def test_short_names_differ_where_names_do(names: list[str]) -> None:
    short = short_names(names)
    assert len(set(short)) == len(names)
    assert all(short)


def test_three_hundred_names_of_a_transformer_are_short_and_different() -> None:
    kinds = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.bias", "norm1.weight")
    names = [f"model.encoder.layers.{layer}.{kind}" for layer in range(60) for kind in kinds]
    short = short_names(names)
    assert len(set(short)) == 300
    assert max(map(len, short)) <= 26


def test_text_with_dollars_is_drawn_as_it_is() -> None:
    assert plain_text("$x_1$") == r"\$x_1\$"
    assert plain_text("a\x00b\ud800") == "a\ufffdb\ufffd"


def test_couplings_and_what_a_block_diagonal_form_leaves_out() -> None:
    norms = np.array([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    coupling = coupling_of(norms)
    assert coupling[0, 1] == pytest.approx(0.5)
    assert np.isnan(coupling[:, 2]).all()
    assert off_diagonal(norms) == pytest.approx(math.sqrt(2 / 19))
    assert strongest_pairs(coupling, 5) == [(0, 1)]


def test_independence_is_said_only_where_intervals_show_it() -> None:
    norms = np.eye(2)
    names = ("a", "b")

    def answer(value: float, low: float, high: float) -> str:
        made = [np.array([[1.0, end], [end, 1.0]]) for end in (value, low, high)]
        return independence(names, norms, *made).text.partition(":")[0]

    assert answer(0.02, 0.01, 0.05) == "Nearly"
    assert answer(0.05, 0.01, 0.5) == "Undecided"
    assert answer(0.3, 0.2, 0.5) == "No"
    assert answer(0.02, 0.01, math.nan) == "Undecided"
    assert WEAK == 0.1


def test_blocks_that_are_zero_themselves_may_still_be_coupled() -> None:
    norms = np.array([[0.0, 1.0], [1.0, 0.0]])
    coupling = coupling_of(norms)
    assert coupling[0, 1] == math.inf
    assert independence(("a", "b"), norms, coupling, coupling, coupling).text.startswith(
        "No: the strongest pair is a and b, C = ∞"
    )
    three = np.array([[1.0, 0.01, 0.5], [0.01, 1.0, 0.5], [0.5, 0.5, 0.0]])
    unknown = np.where(three == 0.5, math.nan, three)
    assert independence(("a", "b", "c"), three, unknown, unknown, unknown).text.startswith("Undecided")
