"""A plan by the last audit of the same subject, and a meter that waits for nothing that cannot be measured."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from clocks import Clock
from typer.testing import CliRunner

import disthess
from disthess.audits.encode import record_from_json, record_to_json
from disthess.audits.history import History
from disthess.audits.meter import Meter, Part, Progress
from disthess.audits.run import plan_audit
from disthess.cli.main import app

FACTORY = """
import disthess, torch
from torch import nn

def problem(samples=16, whole=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).double()
    x, y = torch.randn(samples, 20).double(), torch.randint(0, 4, (samples,))
    if whole:
        return disthess.Problem(model, loss="cross_entropy", batches=[(x, y)])
    return disthess.Problem(model, objective=lambda net, batch: net(batch).square().mean(), batches=[x])
"""


def write(place: Path, **sections: Any) -> str:
    tree = {
        "problem": {"factory": "net.py:problem"},
        "measure": {"metrics": ["lambda_max", "trace", "ggn_share", "newton_decrement"], "threads": 1, "krylov": 20},
        "history": "audits.zarr",
    }
    (place / "audit.yaml").write_text(yaml.safe_dump({**tree, **sections}))
    return "audit.yaml"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a factory and an audit file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    write(tmp_path)
    return tmp_path


def test_a_plan_expects_what_the_last_audit_took_and_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan_audit("audit.yaml")
    assert first.earlier is None
    assert first.to_json()["expected"] is None
    assert "as the last time" not in first.describe()
    seen: list[Progress] = []
    (record,) = disthess.audit("audit.yaml", progress=seen.append).records
    assert sum(record.parts.values()) == seen[-1].products == record.products + record.parts["GGN share"]
    assert {part.name for part in first.parts} == set(record.parts)
    # As if another checkpoint had been audited, in two minutes: the factory's own is new then.
    Path("audits.zarr").rename("other.zarr")
    History.open_or_create("audits.zarr").append(dataclasses.replace(record, key="0" * 32, seconds=120.0))

    def refuse(*_: object) -> None:
        raise AssertionError("a product was timed though the history knows how long it takes")

    monkeypatch.setattr("disthess.audits.forecast._product_seconds", refuse)
    plan = plan_audit("audit.yaml")
    assert plan.expected_products == sum(record.parts.values()) < plan.products
    assert plan.expected_seconds == pytest.approx(120.0)
    assert plan.seconds == pytest.approx(120.0 * plan.products / plan.expected_products)
    said = CliRunner().invoke(app, ["plan", "audit.yaml"]).stdout
    assert "expected, as the last time" in said
    assert f"{record.parts['model: extreme eigenvalues']} the last time" in said
    assert "by that audit's seconds" in said
    expected = json.loads(CliRunner().invoke(app, ["plan", "audit.yaml", "--json"]).stdout)["expected"]
    assert expected["parts"] == dict(record.parts)
    assert expected["seconds_by"] == "the earlier audit"


def test_seconds_of_other_data_are_not_taken_over_and_those_of_other_settings_count_for_nothing(place: Path) -> None:
    (record,) = disthess.audit("audit.yaml").records
    history = History.open("audits.zarr")
    history.append(
        dataclasses.replace(record, key="1" * 32, seconds=1e6, facts={**record.facts, "data": "other"}), replace=False
    )
    plan = plan_audit("audit.yaml")
    assert plan.earlier is not None
    assert math.isnan(plan.earlier.seconds)
    assert plan.product_seconds < 100
    assert plan.to_json()["expected"]["seconds_by"] == "a timed product"
    assert "one is timed" in plan.describe()
    write(place, measure={"metrics": ["trace"], "threads": 1})
    assert plan_audit("audit.yaml").earlier is None


def test_an_audit_from_before_parts_were_kept_tells_all_the_same(place: Path) -> None:
    (record,) = disthess.audit("audit.yaml").records
    old = {key: value for key, value in json.loads(json.dumps(record_to_json(record))).items() if key != "parts"}
    History.open_or_create("old.zarr").append(record_from_json(old, {}))
    new, before = (plan_audit("audit.yaml", history=path).earlier for path in ("audits.zarr", "old.zarr"))
    assert new is not None
    assert before is not None
    assert (before.products, before.share) == (new.products, new.share)
    assert before.parts == {}
    with pytest.raises(ValueError, match=r"parts\.a is -1"):
        record_from_json({**old, "parts": {"a": -1}}, {})
    with pytest.raises(ValueError, match="parts is"):
        record_from_json({**old, "parts": [1]}, {})


def test_nothing_waits_for_a_share_that_cannot_be_measured(place: Path) -> None:
    # Nobody says where that model ends, so that there is no Gauss-Newton matrix.
    write(place, problem={"factory": "net.py:problem", "arguments": {"whole": False}})
    seen: list[Progress] = []
    (record,) = disthess.audit("audit.yaml", progress=seen.append).records
    assert math.isnan(record.value("ggn_share"))
    assert "GGN share" not in record.parts
    inside = [progress for progress in seen if progress.part == "stopping criteria"]
    assert inside[0].expected == seen[-1].products
    again: list[Progress] = []
    disthess.audit("audit.yaml", progress=again.append, force=True)
    assert again[0].expected == again[-1].products == sum(record.parts.values())
    plan = plan_audit("audit.yaml")
    assert plan.expected_products == plan.products - 32 - (
        plan.parts[1].products - record.parts["model: extreme eigenvalues"]
    )
    assert "0 the last time" in plan.describe()


def test_a_part_that_was_skipped_or_ended_early_is_expected_to_again() -> None:
    clock = Clock()
    meter = Meter([Part("a", 10), Part("b", 20), Part("c", 30)], 2, clock=clock)
    meter.begin_checkpoint()
    assert meter.progress().expected == 120
    with meter.part("a"):
        meter.count(4)
    assert meter.progress().expected == 4 + 50 + 54
    meter.skip("b")
    assert meter.progress().expected == 4 + 30 + 34
    with meter.part("c"):
        meter.count(30)
    assert meter.spent == {"a": 4, "c": 30}
    meter.begin_checkpoint()
    assert meter.spent == {}
    assert meter.progress().expected == 68
    with meter.part("b"):
        meter.count(5)
        # More than the last time: it may be as many as the plan says.
        assert meter.progress().expected == 34 + 20 + 34
    told = Meter([Part("a", 10), Part("b", 20)], clock=clock, before={"a": 3})
    told.begin_checkpoint()
    assert told.progress().expected == 23


def test_what_an_error_cut_short_says_nothing_about_the_next_time() -> None:
    meter = Meter([Part("a", 10)], 2, clock=Clock())
    meter.begin_checkpoint()

    def fail() -> None:
        with meter.part("a"):
            meter.count(2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    meter.begin_checkpoint()
    assert meter.progress().expected == 12
