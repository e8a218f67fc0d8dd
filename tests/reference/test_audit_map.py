"""The coupling map that an audit keeps: traces of its blocks against the dense matrix, and how it was made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from pages import check_page, rows_of
from typer.testing import CliRunner

import disthess
from disthess.audits.encode import record_from_json, record_to_json
from disthess.audits.history import History
from disthess.audits.record import MapFacts
from disthess.cli.main import app
from disthess.loading import Source, load_problem

FACTORY = """
import disthess, torch
from torch import nn

def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2)).double()
    x, y = torch.randn(24, 4).double(), torch.randint(0, 2, (24,))
    return disthess.Problem(model, loss="cross_entropy", batches=[(x, y)])
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a factory and an audit file that asks for a map of parameters."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY)
    tree = {
        "problem": {"factory": "net.py:problem"},
        "measure": {"metrics": ["loss"], "threads": 1, "confidence": 0.99, "seed": 5},
        "couplings": {"of": "parameters", "probes": 12},
        "history": "audits.zarr",
    }
    Path("audit.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_traces_of_the_map_are_kept_with_their_intervals_and_shown(place: Path) -> None:
    said = CliRunner().invoke(app, ["audit", "audit.yaml"])
    assert said.exit_code == 0, said.output
    assert "4 of 4 blocks of the coupling map, 99% intervals" in said.stdout
    (record,) = History.open("audits.zarr").records()
    assert record.map_facts == MapFacts(0.99, 12, 5, 12 + 9 + 12 + 2)
    dense = np.asarray(disthess.reference_hessian(load_problem(Source("net.py:problem", {}, None, (".",)))))
    traces = {entry.block: entry for entry in record.map_traces()}
    starts = np.cumsum([0, 36, 9, 18, 2])
    for at, name in enumerate(("0.weight", "0.bias", "2.weight", "2.bias")):
        own = dense[starts[at] : starts[at + 1], starts[at] : starts[at + 1]]
        wanted, found = np.trace(own), traces[name]
        # A block of at most 12 entries is multiplied by its unit vectors.
        assert found.exact == name.endswith("bias")
        assert found.low - 1e-12 <= wanted <= found.high + 1e-12
        assert found.confidence == 0.99
        # The variance of x^T H x is 2 |H|^2, and 99 % are some three standard errors.
        if not found.exact:
            assert 2.5 < found.half_width / (np.sqrt(2 / 12) * np.linalg.norm(own)) < 5
    page = check_page(disthess.report("audits.zarr", "r.html").read_text())
    rows = rows_of(page, "map-traces")
    assert [row[0] for row in rows] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert "±" in rows[0][1]
    assert "±" not in rows[1][1]
    assert "12 random vectors of each block, seed 5; 35 Hessian-vector products" in " ".join(page.text.split())


def test_an_audit_from_before_maps_kept_traces_is_still_read_and_shown(place: Path) -> None:
    made = disthess.audit("audit.yaml").records[0]
    old = {key: value for key, value in json.loads(json.dumps(record_to_json(made))).items() if key != "couplings"}
    arrays = {name: value for name, value in made.arrays.items() if not name.startswith("trace/")}
    record = record_from_json(old, arrays)
    assert record.map_facts is None
    assert record.map_traces() == ()
    History.open_or_create("old.zarr").append(record)
    page = check_page(disthess.report("old.zarr", "r.html").read_text())
    assert rows_of(page, "pairs")
    assert not [table for table in page.all("table") if table.attributes.get("id") == "map-traces"]


@pytest.mark.parametrize("harm", [{"confidence": 1.5}, {"confidence": "0.9"}, {"probes": -1}, {"seed": None}])
def test_facts_of_a_map_that_cannot_be_are_refused(place: Path, harm: dict[str, object]) -> None:
    value = record_to_json(disthess.audit("audit.yaml").records[0])
    value["couplings"].update(harm)
    with pytest.raises(ValueError, match=f"couplings.{next(iter(harm))}"):
        record_from_json(value, {})
