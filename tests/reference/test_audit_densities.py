"""Spectral densities of blocks in audits: those of the dense blocks, in as many products as the plan says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pages import check_page, rows_of
from torch import nn
from typer.testing import CliRunner, Result

import disthess
from disthess.audit_config import AuditConfig, parse_audit
from disthess.audits.history import History
from disthess.audits.measure import Measured, measure
from disthess.audits.meter import Meter
from disthess.audits.record import AuditRecord
from disthess.audits.subject import Subject, make_subject
from disthess.cli.main import app
from disthess.errors import ConfigError
from disthess.linalg.quadrature import smooth_eigenvalues

BLOCKS = {"first": "0.*", "middle": "2.weight", "last": "4.*"}
SPANS = {"first": slice(0, 120), "middle": slice(120, 520), "last": slice(540, 603)}


def network(samples: int = 30) -> disthess.Problem:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)]
    x, y = torch.randn(samples, 5).double(), torch.randint(0, 3, (samples,))
    return disthess.Problem(nn.Sequential(*layers).double(), loss="cross_entropy", batches=[(x, y)])


def config(**sections: Any) -> AuditConfig:
    measured = {"metrics": ["loss"], "block_metrics": ["density"], "threads": 1, **sections.pop("measure", {})}
    tree = {"problem": {"factory": "a:b"}, "history": "unused.zarr", "blocks": BLOCKS, "measure": measured, **sections}
    return parse_audit(tree, "here")


def audited(problem: disthess.Problem, **sections: Any) -> tuple[Subject, Measured]:
    subject = make_subject(problem, config(**sections))
    meter = Meter(subject.parts())
    meter.begin_checkpoint()
    return subject, measure(subject, subject.bound(), meter)


def record_of(found: Measured) -> AuditRecord:
    return AuditRecord(
        "k", "c", 1, "", 1.0, found.products, {}, found.estimates, arrays=found.arrays, densities=found.densities
    )


def test_the_density_of_each_block_is_that_of_its_eigenvalues_within_its_error_bars() -> None:
    problem = network()
    dense = np.asarray(disthess.reference_hessian(problem))
    _, found = audited(problem, measure={"density_probes": 32, "density_steps": 40})
    record = record_of(found)
    assert [made.block for made in found.densities] == list(BLOCKS)
    for name in ("first", "last"):
        curve, values = record.density(name), np.linalg.eigvalsh(dense[SPANS[name], SPANS[name]])
        assert curve is not None
        exact = smooth_eigenvalues(values)
        np.testing.assert_allclose(curve.grid, exact.grid, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(curve.value, exact.value, rtol=1e-6, atol=1e-8 * exact.value.max())
        assert not curve.error.any()
    curve, values = record.density("middle"), np.linalg.eigvalsh(dense[SPANS["middle"], SPANS["middle"]])
    assert curve is not None
    # Smoothed as the estimate is, by 1 % of its nodes' range; the grid reaches five of these widths beyond them.
    width = 0.01 * (curve.grid[-1] - curve.grid[0]) / 1.1
    lines = np.exp(-0.5 * ((curve.grid[:, None] - values) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    wanted = lines.mean(axis=1)
    seen = wanted > 1e-3 * wanted.max()
    distance = np.abs(curve.value - wanted)[seen] / curve.error[seen]
    assert seen.sum() > 40
    assert np.mean(distance <= 2) >= 0.85
    assert distance.max() <= 5
    assert np.trapezoid(curve.value, curve.grid) == pytest.approx(1.0, abs=1e-9)
    assert 0.005 < np.trapezoid(curve.error, curve.grid) < 0.2
    for block, span in SPANS.items():
        other = record.density(block)
        assert other is not None
        own = np.linalg.eigvalsh(dense[span, span])
        assert other.mean == pytest.approx(own.mean(), abs=0.1 * own.std())
        assert other.deviation == pytest.approx(own.std(), rel=0.15)


def test_products_are_those_of_the_plan_and_shared_with_the_negative_mass() -> None:
    fixed = {"density_probes": 3, "density_steps": 7, "steps": 16}
    for metrics, middle in ((["density"], 21), (["negative_mass", "density"], 21 + 402), (["negative_mass"], 21 + 402)):
        subject, found = audited(network(), measure={**fixed, "block_metrics": metrics})
        parts = {part.name: part.products for part in subject.parts()}
        assert found.products == sum(parts.values()) == 120 + middle + 63
        assert parts["middle: density"] == 21
        assert not any(part.until_converged for part in subject.parts())
        made = [(one.block, one.products, one.seed) for one in found.densities]
        wanted = [("first", 120, None), ("middle", 21, 1), ("last", 63, None)]
        assert made == (wanted if "density" in metrics else [])


def test_a_krylov_space_that_ends_takes_fewer_products_and_says_so() -> None:
    # Two samples of three classes: the middle block's rank is at most that of what the outputs see.
    subject, found = audited(network(2), measure={"density_probes": 2, "density_steps": 200})
    made = {one.block: one for one in found.densities}["middle"]
    assert made.products < {part.name: part.products for part in subject.parts()}["middle: density"]
    assert "nothing is left to see" in made.how
    assert found.products == 120 + made.products + 63


def test_the_seed_decides_and_is_recorded() -> None:
    few = {"density_probes": 2, "density_steps": 5}
    once, again, other = (audited(network(), measure={**few, "seed": seed})[1] for seed in (3, 3, 4))
    assert [made.seed for made in once.densities] == [None, 4, None]
    curves = [found.arrays["block_density/value"] for found in (once, again, other)]
    np.testing.assert_array_equal(curves[0], curves[1])
    assert not np.allclose(curves[0][1], curves[2][1])
    np.testing.assert_array_equal(curves[0][0], curves[2][0])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"blocks": None}, "there is no section blocks"),
        ({"measure": {"density_probes": 1}}, "'middle' has 400 entries.*give 2 at least"),
        ({"measure": {"block_metrics": ["densty"]}}, "did you mean density"),
    ],
)
def test_a_density_that_could_not_be_is_refused_with_the_reason(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_subject(network(), config(**sections))


def test_more_arrays_than_an_entry_holds_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, curve = network(), 3 * 400 * 8
    sections = {"couplings": {"of": "blocks"}, "tiles": {"own": ["4.bias", "4.bias"]}}
    subject, found = audited(problem, measure={"density_probes": 2, "density_steps": 5}, **sections)
    kept = sum(array.nbytes for array in found.arrays.values())
    assert subject.array_bytes() == kept > 3 * curve
    monkeypatch.setattr("disthess.audits.subject.MOST_ENTRY_BYTES", kept)
    make_subject(problem, config(**sections))
    monkeypatch.setattr("disthess.audits.subject.MOST_ENTRY_BYTES", kept - 1)
    with pytest.raises(ConfigError, match="Ask for fewer blocks"):
        make_subject(problem, config(**sections))


FACTORY = """
import disthess, torch
from torch import nn

def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(24, 4).double(), torch.randint(0, 2, (24,))
    return disthess.Problem(model, loss="cross_entropy", batches=[(x, y)])
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an audit of two blocks in a history."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY)
    tree = {
        "problem": {"factory": "net.py:problem"},
        "measure": {"metrics": ["loss", "density"], "block_metrics": ["lambda_max", "density"], "threads": 1},
        "blocks": "modules",
        "history": "audits.zarr",
    }
    Path("audit.yaml").write_text(yaml.safe_dump(tree))
    disthess.audit("audit.yaml")
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["audit", "history", "audits.zarr", *words])


def test_a_history_keeps_the_curves_and_tables_pictures_and_pages_show_them(place: Path) -> None:
    (record,) = History.open("audits.zarr").records()
    assert [made.block for made in record.densities] == ["0", "2"]
    curve = record.density("2")
    assert curve is not None
    assert curve.grid.shape == (400,)
    assert record.density("3") is None
    said = run("--metric", "density", "--csv", "d.csv", "--plot", "d.png")
    assert said.exit_code == 0, said.output
    assert "all 14 eigenvalues" in " ".join(said.stdout.split())
    rows = list(csv.DictReader(Path("d.csv").read_text().splitlines()))
    assert {row["block"] for row in rows} == {"", "0", "2"}
    assert [float(row["density"]) for row in rows if row["block"] == "2"] == curve.value.tolist()
    assert Path("d.png").read_bytes()[:4] == b"\x89PNG"
    one = run("--metric", "density", "--block", "2", "--csv", "one.csv")
    assert len(Path("one.csv").read_text().splitlines()) == 401, one.output
    page = check_page(disthess.report("audits.zarr", "r.html").read_text())
    words = {svg.all("title")[0].text: svg.all("desc")[0].text for svg in page.all("svg")}
    assert f"mean {curve.mean:.3g}"[:9] in words["Spectral density of block 2"]
    assert [row[0] for row in rows_of(page, "block-density-table")] == ["0", "2"]
    assert json.loads(run("--json").stdout)[0]["densities"]["rows"][1][:3] == ["2", 14, None]


def test_what_is_not_there_or_no_number_is_refused_in_words(place: Path) -> None:
    beside = run("--metric", "density", "--metric", "loss")
    assert beside.exit_code == 2
    assert "shown by itself" in beside.stderr
    none = run("--metric", "density", "--block", "9")
    assert none.exit_code == 2
    assert "no audit of the history has a spectral density of the block '9'" in none.stderr
