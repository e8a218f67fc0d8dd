"""The forecast: counts, and a remaining time that is right while the work goes on."""

from __future__ import annotations

import numpy as np
import pytest
from clocks import Clock, TimedOperator, spectrum

from disthess.audits.meter import Meter, MeteredOperator, Part, Progress
from disthess.linalg.summary import Effort, summarise_operator, summary_products


class Slow(TimedOperator):
    """Products cost the same each."""

    def __init__(self, matrix: np.ndarray, clock: Clock, each: float) -> None:
        super().__init__(matrix, clock)
        self.each = each

    def seconds(self, count: int) -> float:
        return self.each * count


@pytest.mark.parametrize("kind", ["power law", "outliers"])
def test_after_the_first_minute_the_rest_is_foretold_within_a_quarter(kind: str) -> None:
    clock = Clock()
    effort = Effort(density_probes=4, density_steps=30, tolerance=1e-4, max_products=200)
    matrix = spectrum(kind, 640)
    counts = summary_products(len(matrix), effort)
    parts = [Part(name, count, name == "ends") for name, count in counts.items()]
    seen: list[Progress] = []
    meter = Meter(parts, 6, seen.append, clock)
    operator = MeteredOperator(Slow(matrix, clock, 0.15), meter)
    for _ in range(6):
        meter.begin_checkpoint()
        summarise_operator(
            operator,
            effort=effort,
            watch=meter.watch,
            phase=lambda part: meter.part(part, effort.tolerance if part == "ends" else None),
        )
    end = clock.now
    assert end > 150
    late = [progress for progress in seen if progress.seconds >= 60]
    for progress in late:
        total = progress.seconds + progress.remaining_seconds
        assert abs(total - end) <= 0.25 * end, (progress, end)
    assert seen[-1].products == operator.products
    assert seen[-1].remaining_seconds <= 0.05 * end


def test_before_anything_was_measured_nothing_is_foretold() -> None:
    meter = Meter([Part("a", 10)], 2, clock=Clock())
    assert np.isnan(meter.progress().remaining_seconds)
    meter.begin_checkpoint()
    with meter.part("a"):
        meter.count(4)
        assert meter.progress().expected == 20
    assert meter.progress().products == 4


def test_residuals_foretell_where_products_end() -> None:
    clock = Clock()
    meter = Meter([Part("ends", 1000, until_converged=True)], clock=clock)
    meter.begin_checkpoint()
    with meter.part("ends", 1e-6):
        for step in range(1, 7):
            clock.now += 8
            meter.count(8)
            meter.watch(8 * step, 10.0 ** (-step / 2))
        assert meter.progress().expected == pytest.approx(96, abs=1)
        assert meter.progress().remaining_seconds == pytest.approx(48, abs=1)


def test_of_a_large_model_a_long_block_is_told_of_while_it_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disthess.audits.meter.LARGE", 4)
    clock, seen = Clock(), []
    matrix = np.diag(np.arange(6.0))
    meter = Meter([Part("all", 5, False)], 1, seen.append, clock)
    meter.begin_checkpoint()
    operator = MeteredOperator(Slow(matrix, clock, 1.0), meter)
    block = np.random.default_rng(0).standard_normal((6, 5))
    with meter.part("all"):
        np.testing.assert_array_equal(operator.matmat(block), matrix @ block)
    assert operator.products == 5
    assert [progress.products for progress in seen][:3] == [2, 4, 5]
