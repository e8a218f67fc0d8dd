"""Differences of audits and of stores, against their dense matrices; and the verbs that print them."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from scipy import stats
from typer.testing import CliRunner, Result

import disthess
from disthess.audits.history import History
from disthess.audits.record import Alert, AuditRecord, Estimate
from disthess.cli import audit_reading
from disthess.cli.errors import ErrorReportingGroup
from disthess.cli.main import app
from disthess.errors import ConfigError, StoreError

Z = stats.norm.ppf(0.975)


def problem(shift: float = 0.0, seed: int = 0, width: int = 4) -> disthess.Problem:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 2)).double()
    with torch.no_grad():
        model[2].weight[0] += shift
    torch.manual_seed(seed)
    return disthess.Problem(
        model, loss="cross_entropy", batches=[(torch.randn(20, 3).double(), torch.randint(0, 2, (20,)))]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff")
    disthess.compute(problem(), folder / "same.zarr", method="graph")
    disthess.compute(problem(), folder / "a.zarr", method="autograd")
    disthess.compute(problem(0.3), folder / "b.zarr", method="autograd")
    disthess.compute(problem(width=5), folder / "wide.zarr", method="autograd")
    return folder


def test_two_stores_differ_as_their_dense_matrices_do(folder: Path) -> None:
    a, b = (disthess.open_store(folder / f"{name}.zarr") for name in "ab")
    found = disthess.diff(a, folder / "b.zarr")
    dense = [store.dense() for store in (a, b)]
    values = [np.linalg.eigvalsh(matrix) for matrix in dense]
    expected = {
        "loss": [a.loss, b.loss],
        "gradient_norm": [np.linalg.norm(a.gradient), np.linalg.norm(b.gradient)],
        "lambda_max": [values[0][-1], values[1][-1]],
        "lambda_min": [values[0][0], values[1][0]],
        "trace": [np.trace(dense[0]), np.trace(dense[1])],
        "frobenius": [np.linalg.norm(dense[0]), np.linalg.norm(dense[1])],
    }
    for metric, (first, second) in expected.items():
        row = found.find(metric)
        assert row is not None
        assert (row.a, row.b) == pytest.approx((first, second), rel=1e-9, abs=1e-12)
        assert row.relative == pytest.approx((second - first) / abs(first), rel=1e-6)
        assert row.verdict == ("rose" if second > first else "fell")
        assert row.low <= second - first <= row.high
    names = [parameter.name for parameter in a.parameters]
    assert [(block.a, block.b) for block in found.blocks] == [(v, w) for i, v in enumerate(names) for w in names[i:]]
    for block in found.blocks:
        first, second = a.block(block.a, block.b), b.block(block.a, block.b)
        numbers = (np.linalg.norm(first), np.linalg.norm(second), np.linalg.norm(first - second))
        assert (block.norm_a, block.norm_b, block.distance) == pytest.approx(numbers, rel=1e-12)
        assert block.relative == pytest.approx(numbers[2] / numbers[0], rel=1e-12)
        if block.a == block.b:
            row = found.find("trace", block.a)
            assert row is not None
            assert (row.a, row.b) == pytest.approx((np.trace(first), np.trace(second)), rel=1e-12)
    assert any("2.weight" in note and "A has" in note for note in found.notes)


def test_the_same_matrix_computed_twice_is_equal_to_rounding(folder: Path) -> None:
    found = disthess.diff(folder / "a.zarr", folder / "same.zarr")
    assert {row.verdict for row in found.rows} == {"equal"}
    assert max(block.distance for block in found.blocks) <= found.floor
    assert 0 < found.floor < 1e-9
    assert all("method" in note or "sweeps" in note or "tiles" in note for note in found.notes)
    assert len(found.notes) >= 1


def test_stores_of_other_models_share_what_has_one_shape(folder: Path) -> None:
    found = disthess.diff(folder / "a.zarr", folder / "wide.zarr")
    assert {block.a for block in found.blocks} == {"2.bias"}
    assert found.find("lambda_max") is not None
    assert found.find("trace", "0.weight") is None


def make_record(key: str, step: int, numbers: dict[tuple[str, str], tuple[float, float]], **facts: str) -> AuditRecord:
    estimates = tuple(
        Estimate(metric, block, value, value - half, value + half, 0.95, "how")
        for (metric, block), (value, half) in numbers.items()
    )
    alerts = (Alert("sharp", "lambda_max", "", 2.0, 1.0, "too sharp"),) if step == 30 else ()
    return AuditRecord(
        key, f"step_{step}.pt", step, "2026-01-02T03:04:05+00:00", 1.0, 9, facts, estimates, alerts=alerts
    )


@pytest.fixture
def audits(tmp_path: Path) -> Path:
    history = History.open_or_create(tmp_path / "h.zarr")
    for index, (step, value) in enumerate([(10, 1.0), (20, 1.5), (30, 2.0), (20, 1.6)]):
        numbers = {
            ("loss", ""): (1 / value, 0.0),
            ("lambda_max", ""): (value, 0.1),
            ("trace", "fc.weight"): (value * 3, 5.0),
            ("trace", "fc.bias"): (math.nan, math.nan),
        }
        history.append(make_record(f"abcdef{index}", step, numbers, data=f"d{index // 3}", dtype="float64"))
    return tmp_path / "h.zarr"


def test_two_audits_by_selectors(audits: Path) -> None:
    found = disthess.diff(f"{audits}@10", f"{audits}@30")
    row = found.find("lambda_max")
    assert row is not None
    error = math.sqrt(2) * 0.1 / Z
    assert row.p == pytest.approx(2 * stats.norm.sf(1 / error))
    assert (row.low, row.high) == pytest.approx((1 - Z * error, 1 + Z * error))
    verdicts = {(row.metric, row.block): row.verdict for row in found.rows}
    assert verdicts == {
        ("loss", ""): "fell",
        ("lambda_max", ""): "rose",
        ("trace", "fc.weight"): "chance",
        ("trace", "fc.bias"): "undefined",
    }
    assert found.notes == ()
    by_word = {
        selector: disthess.diff(f"{audits}@10", f"{audits}@{selector}").find("lambda_max")
        for selector in ("20", "-1", "-2", "step_30.pt", "abcdef1")
    }
    assert {selector: row.b for selector, row in by_word.items() if row} == {
        "20": 1.6,
        "-1": 1.6,
        "-2": 2.0,
        "step_30.pt": 2.0,
        "abcdef1": 1.5,
    }
    assert disthess.diff(f"{audits}@10", audits).notes == ("data: d0 in A, d1 in B",)
    for selector in ("11", "-5", "-0", "nope", "abc"):
        with pytest.raises(ConfigError, match="has no audit"):
            disthess.diff(f"{audits}@10", f"{audits}@{selector}")
    assert disthess.diff(f"{audits}@-1", f"{audits}@-1").notes[0].startswith("A and B are the same audit")


def test_exact_numbers_are_compared_to_rounding_and_missing_ones_said() -> None:
    first = make_record("a", 1, {("loss", ""): (1.0, 0.0), ("trace", ""): (1.0, 0.0)}, dtype="float64")
    for other, verdict in ((1 + 1e-13, "equal"), (1 + 1e-11, "rose"), (1 - 1e-11, "fell")):
        found = disthess.diff(first, make_record("b", 2, {("loss", ""): (other, 0.0)}, dtype="float64"))
        assert [row.verdict for row in found.rows] == [verdict, "only A"]
    found = disthess.diff(make_record("b", 2, {("loss", ""): (1 + 1e-6, 0.0)}, dtype="float32"), first)
    assert [row.verdict for row in found.rows] == ["equal", "only B"]


def test_verdicts_of_a_table_are_wrong_as_rarely_as_stated() -> None:
    """30 numbers without a change, 400 tables at 5 %: by Holm's rule at most 5 % of them assert one, and in little less."""
    generator = np.random.default_rng(5)
    wrong = 0
    for _ in range(400):
        sides = [
            make_record(
                key, 1, {("trace", f"b{i}"): (value, Z) for i, value in enumerate(generator.standard_normal(30))}
            )
            for key in "ab"
        ]
        found = disthess.diff(*sides, significance=0.05)
        wrong += any(row.verdict != "chance" for row in found.rows)
    assert abs(wrong - 400 * 0.0488) < 4 * math.sqrt(400 * 0.0488)


def test_what_cannot_be_compared_is_refused(audits: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="an audit and a store"):
        disthess.diff(audits, folder / "a.zarr")
    with pytest.raises(StoreError, match="There is no store"):
        disthess.diff(audits.with_name("none"), audits)
    with pytest.raises(StoreError, match="no audit history"):
        disthess.diff(f"{audits.with_name('none')}@3", audits)
    with pytest.raises(ConfigError, match="probability"):
        disthess.diff(audits, audits, significance=0)


reader = typer.Typer(cls=ErrorReportingGroup)
reader.command()(audit_reading.history)


@reader.callback()
def _root(debug: bool = False) -> None:
    """Two commands, so that the first has a name."""


def read(*words: object) -> Result:
    return CliRunner().invoke(reader, ["history", *map(str, words)])


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_history_is_listed_and_drawn(audits: Path, tmp_path: Path) -> None:
    said = read(audits)
    assert said.exit_code == 0, said.output
    for words in ("4 audits", "step_10.pt", "2026-01-02 03:04", "1.5 [1.4, 1.6]", "step_30.pt: sharp: too sharp"):
        assert words in said.stdout
    found = strict(read(audits, "--json").stdout)
    assert [record["step"] for record in found] == [10, 20, 30, 20]
    read(
        audits,
        "--csv",
        tmp_path / "all.csv",
        "--plot",
        tmp_path / "p.png",
        "--metric",
        "lambda_max",
        "--metric",
        "loss",
    )
    rows = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert len(rows) == 8
    assert {row["metric"] for row in rows} == {"loss", "lambda_max"}
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    read(audits, "--csv", tmp_path / "every.csv")
    assert len((tmp_path / "every.csv").read_text().splitlines()) == 17
    blocks = read(audits, "--block", "fc.weight", "--csv", tmp_path / "block.csv")
    assert "of fc.weight" in blocks.stdout
    assert len((tmp_path / "block.csv").read_text().splitlines()) == 5
    for words, text in {("--metric", "x"): "no metric 'x'", ("--block", "x"): "has fc.weight, fc.bias"}.items():
        refused = read(audits, *words)
        assert refused.exit_code == 2
        assert text in refused.stderr
    missing = read(tmp_path / "none.zarr")
    assert missing.exit_code == 1
    assert missing.stderr.count("\n") == 1
    History.open_or_create(tmp_path / "empty.zarr")
    assert "no audits yet" in read(tmp_path / "empty.zarr", "--plot", tmp_path / "e.png").stdout


def test_the_verb_diff_prints_both_kinds(audits: Path, folder: Path, tmp_path: Path) -> None:
    def call(*words: object) -> Result:
        found = CliRunner().invoke(app, ["diff", *map(str, words)])
        assert found.exit_code == 0, found.output
        return found

    said = call(f"{audits}@10", f"{audits}@30").stdout
    assert "2 of 4 numbers changed" in said
    assert "+100.00%" in said
    stores = call(folder / "a.zarr", folder / "b.zarr", "--csv", tmp_path / "d.csv").stdout
    assert "10 of 10 blocks" in stores
    assert "differs: " in stores
    rows = list(csv.DictReader(io.StringIO((tmp_path / "d.csv").read_text())))
    assert sum(row["metric"] == "distance" for row in rows) == 10
    found = strict(call(folder / "a.zarr", folder / "b.zarr", "--json").stdout)
    assert len(found["blocks"]) == 10
    assert yaml.safe_load(json.dumps(found))["rows"][0]["metric"] == "loss"
