"""A forecast of products that take seconds each: after one minute few have come back, and the rest is told all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clocks import Clock, TimedOperator, spectrum

from disthess.audit_config import parse_audit
from disthess.audits.meter import Meter, MeteredOperator, Part, Progress, share_needed
from disthess.audits.run import audit, plan_audit
from disthess.errors import ConfigError
from disthess.linalg.block_map import estimate_block_map
from disthess.linalg.lanczos import extreme_eigenpairs
from disthess.linalg.operator import DenseOperator
from disthess.linalg.summary import Effort, ends_open, summarise_operator, summary_products

SIZE = 640
EIGHTHS = [slice(start, start + SIZE // 8) for start in range(0, SIZE, SIZE // 8)]
FREE = Effort(probes=36, density_probes=2, density_steps=12, tolerance=1e-2, max_products=48)
FIXED = Effort(probes=36, density_probes=2, density_steps=12, tolerance=1e-2, steps=48)


class Model(TimedOperator):
    """Products take 6 s each, a tenth more or less; the first of them four times that."""

    def __init__(self, matrix: np.ndarray, clock: Clock, seed: int) -> None:
        super().__init__(matrix, clock)
        self.random = np.random.default_rng(seed)
        self.warming = 24.0

    def seconds(self, count: int) -> float:
        warming, self.warming = self.warming, 0.0
        return warming + float((6.0 * (1 + 0.1 * self.random.uniform(-1, 1, count))).sum())


def parts_of(effort: Effort) -> list[Part]:
    counts = summary_products(SIZE, effort)
    return [
        *(Part(name, count, name == "ends" and ends_open(SIZE, effort)) for name, count in counts.items()),
        Part("couplings", 64),
    ]


class Alone(Model):
    """The same, but a vector alone takes half as long again, as where Lanczos sets it against all before it."""

    def seconds(self, count: int) -> float:
        return (1.5 if count == 1 else 1.0) * super().seconds(count)


def run(
    kind: str, effort: Effort, seed: int, guess: float | None = None, make: type[Model] = Model
) -> tuple[list[Progress], float]:
    """All that was told of one checkpoint like that of a large model, and when it was through."""
    clock, seen = Clock(), []
    meter = Meter(parts_of(effort), 1, seen.append, clock, guess)
    operator = MeteredOperator(make(spectrum(kind, SIZE), clock, seed), meter)
    meter.begin_checkpoint()
    clock.now += 5.0
    summarise_operator(
        operator,
        effort=effort,
        watch=meter.watch,
        phase=lambda part: meter.part(part, effort.tolerance if part == "ends" else None),
    )
    with meter.part("couplings"):
        estimate_block_map(operator, EIGHTHS, probes=8)
    return seen, clock.now


def after_a_minute(seen: list[Progress]) -> list[Progress]:
    return [progress for progress in seen if progress.seconds >= 60]


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model of more than a million parameters: Lanczos vectors one by one, what is left told every two products."""
    monkeypatch.setattr("disthess.audits.meter.LARGE", SIZE - 1)
    monkeypatch.setattr("disthess.linalg.lanczos.LARGE_SIZE", SIZE - 1)


@pytest.mark.parametrize("guess", [None, 0.1])
@pytest.mark.parametrize("kind", ["power law", "outliers", "flat"])
def test_with_steps_the_remaining_time_is_right_from_the_first_minute_on(kind: str, guess: float | None) -> None:
    parts = parts_of(FIXED)
    assert share_needed(parts, 174) is None
    seen, end = run(kind, FIXED, 1, guess)
    late = after_a_minute(seen)
    assert late[0].products <= 8
    assert late[0].remaining_seconds > 900
    for progress in late:
        left = end - progress.seconds
        assert abs(progress.remaining_seconds - left) <= 0.25 * left, progress
        assert progress.expected == sum(part.products for part in parts) == 174


def test_products_of_a_kind_tell_of_their_kind() -> None:
    seen, end = run("outliers", FIXED, 1, make=Alone)
    for progress in after_a_minute(seen):
        left = end - progress.seconds
        assert abs(progress.remaining_seconds - left) <= 0.25 * left, progress
    ends = [progress for progress in seen if progress.part == "ends"]
    assert len(ends) > 20
    for progress in [*ends[15:], *(progress for progress in seen if progress.part == "couplings")]:
        left = end - progress.seconds
        assert abs(progress.remaining_seconds - left) <= 0.1 * left + 1.0, progress


def test_what_follows_a_parts_products_is_not_the_next_ones() -> None:
    clock, seen = Clock(), []
    meter = Meter([Part("a: ends", 10), Part("a: moments", 10)], 2, seen.append, clock)
    for checkpoint in range(2):
        clock.now += 40  # loading
        meter.begin_checkpoint()
        for part, each, tail in (("a: ends", 2.0, 30.0), ("a: moments", 1.0, 0.0)):
            with meter.part(part):
                for _ in range(10):
                    clock.now += each
                    meter.count(1)
                clock.now += tail
        if checkpoint == 0:
            second = [entry for entry in seen if entry.part == "a: moments"]
            first = clock.now
    rest = clock.now - first
    assert rest == 40 + 20 + 30 + 10
    # With FEW products of the other kind at its pace, a tail included, and no loading seen before the second checkpoint.
    told = second[-1].remaining_seconds
    assert told == pytest.approx(20 + 30 + 10, rel=0.25)
    assert [entry.remaining_seconds for entry in seen][-1] == 0


def test_what_has_to_warm_up_foretells_nothing() -> None:
    seen, _ = run("flat", FIXED, 1)
    assert np.isnan(seen[0].remaining_seconds)
    assert not np.isnan(seen[1].remaining_seconds)


@pytest.mark.parametrize("kind", ["power law", "outliers", "flat"])
def test_without_steps_an_earlier_audit_says_how_many_products_convergence_takes(kind: str) -> None:
    parts = parts_of(FREE)
    before = run(kind, FREE, 7)[0][-1].products
    guess = share_needed(parts, before)
    seen, end = run(kind, FREE, 1, guess)
    assert abs(seen[-1].products - before) <= 2
    for progress in after_a_minute(seen):
        left = end - progress.seconds
        assert abs(progress.remaining_seconds - left) <= 0.25 * left, progress


@pytest.mark.parametrize("rank", [1, 3, SIZE])
@pytest.mark.parametrize("width", [1, 8])
def test_steps_are_all_taken_and_residuals_tell_the_truth(
    rank: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disthess.linalg.lanczos.LARGE_SIZE", SIZE - 1 if width == 1 else SIZE)
    random = np.random.default_rng(3)
    axes = np.linalg.qr(random.standard_normal((SIZE, rank)))[0]
    values = np.linspace(-1.0, 2.0, rank) if rank > 1 else np.array([2.0])
    whole = axes * values @ axes.T
    found = extreme_eigenpairs(DenseOperator(whole), 1, tolerance=1e-3, steps=30)
    assert found.products == (32 if width == 1 else 34) == summary_products(SIZE, Effort(steps=30))["ends"]
    known = np.linalg.eigvalsh(whole)
    assert found.values[1] <= known[-1] + 1e-12
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert np.abs(known - value).min() <= residual + 1e-12
    if rank <= 3:
        np.testing.assert_allclose(found.values[1], known[-1], atol=1e-12)
        assert found.converged.all()


def test_fewer_steps_than_convergence_needs_are_said_not_to_be_within_the_tolerance() -> None:
    whole = spectrum("flat", SIZE)
    made = summarise_operator(DenseOperator(whole), effort=Effort(steps=8), metrics=["lambda_max", "lambda_min"])
    known = np.linalg.eigvalsh(whole)
    assert made.products == 10
    for one in made.estimates:
        assert "not within its tolerance" in one.how
        near = known[(known >= one.low) & (known <= one.high)]
        assert len(near) > 0


def test_steps_and_a_limit_are_two_answers_to_one_question() -> None:
    tree = {"problem": {"factory": "a:b"}, "history": "h.zarr"}
    with pytest.raises(ConfigError, match="give one"):
        parse_audit({**tree, "measure": {"steps": 48, "max_products": 48}}, "here")
    assert parse_audit({**tree, "measure": {"steps": 48}}, "here").measure.effort().steps == 48
    with pytest.raises(ValueError, match="steps must be positive"):
        summarise_operator(DenseOperator(np.eye(2)), effort=Effort(steps=0))


FACTORY = """
import disthess, torch
from torch import nn

def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).double()
    x, y = torch.randn(16, 20).double(), torch.randint(0, 4, (16,))
    return disthess.Problem(model, loss="cross_entropy", batches=[(x, y)])
"""


def test_with_steps_the_plan_is_what_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY)
    measure = {"metrics": ["lambda_max", "trace", "density"], "density_probes": 2, "density_steps": 5, "threads": 1}
    tree = {"problem": {"factory": "net.py:problem"}, "measure": {**measure, "steps": 20}, "history": "audits.zarr"}
    config = parse_audit(tree, "here")
    plan = plan_audit(config)
    assert plan.exact
    assert "at most" not in plan.describe().split("memory")[0]
    seen: list[Progress] = []
    made = audit(config, progress=seen.append)
    assert made.records[0].products == plan.products == seen[0].expected == seen[-1].products
    free = plan_audit(parse_audit({**tree, "measure": measure}, "here"))
    assert not free.exact
    assert "at most" in free.describe().split("memory")[0]


def test_an_audit_foretells_by_the_last_of_its_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY)
    tree = {
        "problem": {"factory": "net.py:problem"},
        "measure": {"metrics": ["lambda_max", "trace"], "threads": 1, "tolerance": 1e-6},
        "history": "audits.zarr",
    }
    config = parse_audit(tree, "here")
    first: list[Progress] = []
    second: list[Progress] = []
    made = audit(config, progress=first.append)
    audit(config, progress=second.append, force=True)
    end = made.records[0].products
    assert end == first[-1].products == second[-1].products
    # Known from the history before the first eigenvalue converges, where the first audit could only guess.
    assert second[0].part == "model: trace and norm"
    assert second[0].expected == end
    assert abs(first[0].expected - end) > 2
