"""Alerts: thresholds, changes that are more than chance, the learning rate; and no more false alarms than were stated."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from disthess.audits.alerts import AlertRule, judge, judge_alerts
from disthess.audits.record import AuditRecord, Estimate
from disthess.audits.significance import change_between, change_since
from disthess.errors import ConfigError

NUMBERS = itertools.count()
Z = stats.norm.ppf(0.975)


def number(
    value: float, half: float = 0.0, metric: str = "lambda_max", block: str = "", conf: float = 0.95
) -> Estimate:
    return Estimate(metric, block, value, value - half, value + half, conf, "")


def record(*estimates: Estimate, data: str = "d") -> AuditRecord:
    key = f"k{next(NUMBERS)}"
    return AuditRecord(key, f"{key}.pt", None, "", 0.0, 0, {"data": data}, estimates)


def alerts(rule: AlertRule, new: Estimate, *earlier: Estimate) -> list[str]:
    return [alert.message for alert in judge_alerts(record(new), [record(old) for old in earlier], [rule])]


def test_a_value_beyond_a_limit_alerts_and_says_whether_its_interval_does() -> None:
    rule = AlertRule("r", "lambda_max", above=10, below=-1)
    assert alerts(rule, number(10.0, 1)) == alerts(rule, number(-1.0)) == []
    assert "so is the whole interval" in alerts(rule, number(12, 1))[0]
    assert "may be chance" in alerts(rule, number(12, 3))[0]
    assert alerts(rule, number(12)) == ["lambda_max is 12, above 10"]
    found = judge_alerts(record(number(-2, 0.5)), (), [rule])[0]
    assert (found.rule, found.metric, found.block, found.value, found.limit) == ("r", "lambda_max", "", -2, -1)
    assert "below -1; so is" in found.message
    assert len(alerts(rule, number(math.inf))) == 1


def test_blocks_by_globs_and_the_whole_model_apart() -> None:
    estimates = [number(5, block=name) for name in ("", "a.weight", "a.bias", "b.weight")]
    for pattern, names in {"": [""], "*": ["a.weight", "a.bias", "b.weight"], "a.*": ["a.weight", "a.bias"]}.items():
        rule = AlertRule("r", "lambda_max", block=pattern, above=1)
        assert [alert.block for alert in judge_alerts(record(*estimates), (), [rule])] == names
    found = judge(record(*estimates), (), [AlertRule("r", "lambda_max", block="c*", above=1)])
    assert found.alerts == ()
    assert "did not measure" in found.notes[0]


def test_what_is_no_number_is_an_alert() -> None:
    for rule in (
        AlertRule("r", "lambda_max", above=10),
        AlertRule("r", "lambda_max", against="last", rise=1),
        AlertRule("r", "lambda_max", learning_rate=0.1),
    ):
        (message,) = alerts(rule, number(math.nan))
        assert "not a number" in message


def test_a_change_alerts_where_it_is_large_and_no_chance() -> None:
    rule = AlertRule("r", "lambda_max", against="baseline", rise=0.5, fall=0.2, significance=0.01)
    # The error of the difference of two estimates of half width h is sqrt(2) h / z.
    for new, half, is_alert in [
        (16, 1, True),
        (14, 1, False),
        (16, 5, False),
        (7.9, 0.5, True),
        (8.1, 0, False),
        (15.1, 0, True),
    ]:
        p = 2 * stats.norm.sf(abs(new - 10) / (math.sqrt(2) * half / Z)) if half else 0.0
        assert bool(alerts(rule, number(new, half), number(10, half), number(100))) is is_alert
        assert change_between(number(10, half), number(new, half)).p == pytest.approx(p, rel=1e-9)
        assert is_alert == ((new > 15 or new < 8) and p < 0.01)
    found = judge_alerts(record(number(16)), [record(number(10))], [rule])[0]
    assert found.limit == 15
    assert "risen by 60.0% from 10" in found.message
    # By the size of what was: a smallest eigenvalue that doubles downwards has fallen by 100 %.
    assert "fallen by 100.0% from -1" in alerts(rule, number(-2), number(-1))[0]
    assert alerts(rule, number(0.0), number(0.0)) == []
    assert "risen by 1 from 0" in alerts(rule, number(1.0), number(0.0))[0]


def test_bounds_are_bounds() -> None:
    """Of confidence 1: a difference within the sum of both is no change, one beyond it is one for certain."""
    old = number(10, 1, conf=1.0)
    assert change_between(old, number(11.9, 1, conf=1.0)).p == 1
    found = change_between(old, number(12.1, 1, conf=1.0))
    assert (found.p, found.confidence) == (0, 1)
    assert (found.low, found.high) == pytest.approx((0.1, 4.1))
    mixed = change_between(old, number(13, 1))
    assert mixed.p == pytest.approx(2 * stats.norm.sf(2 / (1 / Z)))
    assert change_between(number(10, math.inf), number(99)).p == change_between(number(10, math.nan), number(99)).p == 1


def scale(value: float, freedom: float, power: float = 1.0) -> Estimate:
    """A number whose square, or it itself, is a multiple of ``chi^2 / freedom``."""
    low, high = value * (freedom / stats.chi2.ppf([0.975, 0.025], freedom)) ** power
    return Estimate("frobenius", "", value, low, high, 0.95, "")


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("freedom", [12, 40, 400])
@pytest.mark.parametrize("p", [0.05, 0.01, 0.001])
def test_lopsided_intervals_grow_as_their_errors_do(power: float, freedom: float, p: float) -> None:
    """The ratio of two chi-squares is Fisher's F. With sides of normal errors norms of twelve degrees say 0.05 % for 0.1 %."""
    ratio = stats.f.isf(p / 2, freedom, freedom) ** power
    one, other = scale(3.0, freedom, power), scale(3.0 * ratio, freedom, power)
    assert change_between(one, other).p == pytest.approx(p, rel=0.2)
    assert change_between(other, one).p == pytest.approx(change_between(one, other).p)


@pytest.mark.parametrize("half", [0.0, 0.5])
def test_the_interval_of_a_difference_ends_at_zero_where_p_is_what_is_left(half: float) -> None:
    old, new = scale(3.0, 15), number(7.0, half)
    p = change_between(old, new).p
    for one, other, end in ((old, new, "low"), (new, old, "high")):
        found = change_between(one, other, 1 - p)
        assert getattr(found, end) == pytest.approx(0, abs=1e-9)
        # The far end has the far sides.
        assert (found.low + found.high) / 2 != pytest.approx(found.difference, rel=0.01)


def test_what_is_too_lopsided_grows_no_faster_than_four_to_one() -> None:
    old = Estimate("lambda_max", "", 10.0, 10.0, 11.0, 0.95, "")
    found = change_between(old, number(13.0))
    assert found.p == pytest.approx(2 * stats.norm.sf(Z * math.log(1 + 3 * 3, 4)))
    # Downwards there is no room at all.
    assert change_between(old, number(9.99)).p == 0


def test_against_the_last_few_the_scatter_counts() -> None:
    earlier = [9.0, 10, 11, 10, 9.5, 10.5]
    new = 12.0
    last = earlier[-5:]
    t = (new - np.mean(last)) / (np.std(last, ddof=1) * math.sqrt(1 + 1 / 5))
    found = change_since([number(value) for value in last], number(new))
    assert found.p == pytest.approx(2 * stats.t.sf(t, 4))
    assert found.before == pytest.approx(np.mean(last))
    olds = [number(value) for value in earlier]
    for significance, is_alert in ((found.p * 1.001, True), (found.p * 0.999, False)):
        rule = AlertRule("r", "lambda_max", against="last", rise=0.1, significance=significance)
        assert bool(alerts(rule, number(new), *olds)) is is_alert
    # A new number known less well than the earlier ones: its own error comes on top.
    wide = change_since([number(value, 0.1) for value in last], number(new, 4))
    excess = (4 / Z) ** 2 - (0.1 / Z) ** 2
    scatter = np.var(last, ddof=1) * 1.2
    freedom = 4 * ((scatter + excess) / scatter) ** 2
    assert wide.p == pytest.approx(2 * stats.t.sf((new - np.mean(last)) / math.sqrt(scatter + excess), freedom))
    assert change_since([number(3.1)] * 4, number(3.1)).p == 1
    assert change_since([number(3.1)] * 4, number(3.1000001)).p == 0


def test_too_few_earlier_audits_are_noted() -> None:
    rule = AlertRule("r", "lambda_max", against="last", rise=0.1)
    first = AlertRule("b", "lambda_max", against="baseline", rise=0.1)
    for count, notes in ((0, 2), (2, 1), (3, 0)):
        found = judge(record(number(99)), [record(number(1))] * count, [rule, first])
        assert (len(found.notes), len(found.alerts)) == (notes, 2 - notes)
    found = judge(record(number(99)), [record(number(math.nan))] * 5, [rule])
    assert found.alerts == ()
    assert "has 0 earlier numbers of lambda_max" in found.notes[0]


def test_audits_on_other_data_are_no_measure() -> None:
    rule = AlertRule("r", "lambda_max", against="baseline", rise=0.1)
    others = [record(number(1), data="other"), record(number(99))]
    found = judge(record(number(100)), others, [rule])
    assert found.alerts == ()
    assert found.notes == ("1 earlier audits were made on other data, and are no measure of a change in the alerts",)
    mine = record(number(100))
    assert judge_alerts(mine, [mine, record(number(1))], [rule])[0].limit == 1.1


def test_the_learning_rate_is_held_against_the_unfavourable_end() -> None:
    rule = AlertRule("r", "lambda_max", learning_rate=0.1)
    assert alerts(rule, number(19.9)) == alerts(rule, number(-3, 1)) == alerts(rule, number(18, 1.9)) == []
    assert "diverges" in alerts(rule, number(20.0))[0]
    assert "diverges" in alerts(rule, number(25, 5))[0]
    assert "not on all of its interval" in alerts(rule, number(21, 2))[0]
    assert "the measured value allows it" in alerts(rule, number(18, 2.1))[0]
    limit = AlertRule("r", "rate_limit", learning_rate=0.1)
    assert alerts(limit, number(math.inf, metric="rate_limit")) == []
    assert "allows it" in alerts(limit, number(0.11, 0.01, metric="rate_limit"))[0]
    assert "diverges" in alerts(limit, number(0.1, 0, metric="rate_limit"))[0]


@pytest.mark.parametrize("against", ["baseline", "last"])
@pytest.mark.parametrize("drifts", [False, True])
def test_false_alarms_are_as_rare_as_stated(against: Any, drifts: bool) -> None:
    """Nothing changes but by chance, of measurement or (for the last few) of training as well: 4,000 audits each.

    At 5 % the number of alarms is binomial; it must lie within 4 standard deviations. Against a baseline all chance is in the
    intervals, so there the audits do not drift.
    """
    generator = np.random.default_rng(7)
    rule = AlertRule("r", "trace", against=against, rise=0.0, fall=0.0, significance=0.05)
    count, spread = 4000, (2.0 if drifts and against == "last" else 0.0)
    alarms = 0
    for _ in range(count):
        true = 100 + spread * generator.standard_normal(6)
        found = [number(value, 3.0 * Z, "trace") for value in true + 3.0 * generator.standard_normal(6)]
        alarms += bool(alerts(rule, found[-1], *found[:-1]))
    assert abs(alarms - 0.05 * count) < 4 * math.sqrt(count * 0.05 * 0.95)


def test_false_alarms_of_many_blocks_are_as_rare_as_those_of_one() -> None:
    """20 blocks watched by one rule at 5 %: an audit without a change alerts in 5 % at most, and in little less."""
    generator = np.random.default_rng(3)
    rule = AlertRule("r", "trace", block="*", against="baseline", rise=0.0, fall=0.0, significance=0.05)
    count, alarms = 1000, 0
    for _ in range(count):
        first, new = (
            record(*(number(value, Z, "trace", f"b{i}") for i, value in enumerate(generator.standard_normal(20))))
            for _ in range(2)
        )
        alarms += bool(judge_alerts(new, [first], [rule]))
    expected = count * (1 - (1 - 0.05 / 20) ** 20)
    assert abs(alarms - expected) < 4 * math.sqrt(expected)


def test_a_true_change_is_found() -> None:
    """Power: a rise by six standard errors of the difference is found at 1 % in all but 1 of some 3,000."""
    generator = np.random.default_rng(1)
    rule = AlertRule("r", "trace", against="baseline", rise=0.01, significance=0.01)
    missed = 0
    for _ in range(500):
        old, new = generator.standard_normal(2) + np.array([100, 100 + 6 * math.sqrt(2)])
        missed += not alerts(rule, number(new, Z, "trace"), number(old, Z, "trace"))
    assert missed <= 3


REFUSED: dict[str, dict[str, Any]] = {
    "unknown metric": {"metric": "lamda_max", "above": 1},
    "did you mean lambda_max": {"metric": "lamda_max", "above": 1},
    "nothing to compare": {},
    "but not against what": {"rise": 0.5},
    "neither rise nor fall": {"against": "last"},
    "give a positive number": {"against": "last", "rise": -0.5},
    "learning_rate: 0": {"learning_rate": 0},
    "no finite number": {"above": math.nan},
    "above: 'x'": {"above": "x"},
    "above: True": {"above": True},
    "between 0 and 1": {"above": 1, "significance": 1.0},
    "whole number of earlier audits": {"above": 1, "count": 2},
    "baseline or last": {"against": "first", "rise": 1},
    "on every number": {"above": 1, "below": 2},
    "leave block out": {"metric": "loss", "block": "a*", "above": 1},
    "of the whole model": {"block": "a*", "learning_rate": 1},
    "needs the metric": {"metric": "trace", "learning_rate": 1},
    "Give each a name": {"name": " ", "above": 1},
}


@pytest.mark.parametrize("words", REFUSED)
def test_rules_that_cannot_be_meant_are_refused(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AlertRule(**{"name": "r", "metric": "lambda_max", **REFUSED[words]})
    assert words in str(caught.value)
