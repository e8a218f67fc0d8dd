"""Audits of checkpoints, end to end: what is found, kept, alerted on, and what happens the second time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import disthess
from disthess.audits.history import History
from disthess.cli.main import app

FACTORY = """
import disthess, torch
from torch import nn

def problem(width=6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).double()
    x, y = torch.randn(24, 4).double(), torch.randint(0, 2, (24,))
    return disthess.Problem(model, loss="cross_entropy", batches=[(x, y)])
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a factory, five checkpoints of which the fourth is spoilt, and an audit file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    for step in range(0, 50, 10):
        with torch.no_grad():
            model[0].weight += 0.01 * torch.randn(6, 4)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if step == 30:
            state["2.weight"] *= 20.0
        save_file(state, tmp_path / f"step-{step}.safetensors")
    write(tmp_path)
    return tmp_path


def write(place: Path, **sections: Any) -> None:
    tree: dict[str, Any] = {
        "problem": {"factory": "net.py:problem"},
        "checkpoints": {"paths": ["step-*.safetensors"], "pattern": "step-{step}.safetensors"},
        "measure": {"metrics": ["loss", "gradient_norm", "lambda_max", "trace"], "threads": 1},
        "blocks": "modules",
        "history": "audits.zarr",
        "alerts": [{"name": "spike", "metric": "lambda_max", "against": "baseline", "rise": 1.0}],
        "hook": {"json": "alerts.jsonl"},
    }
    (place / "audit.yaml").write_text(yaml.safe_dump({**tree, **sections}))


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["audit", *words])


def test_a_spike_is_alerted_on_alone_and_a_second_audit_finds_nothing_new(place: Path) -> None:
    first = run("audit.yaml")
    assert first.exit_code == 3, first.output
    assert first.output.count("ALERT") == 1
    records = History.open("audits.zarr").records()
    assert [record.step for record in records] == [0, 10, 20, 30, 40]
    assert [len(record.alerts) for record in records] == [0, 0, 0, 1, 0]
    assert records[3].alerts[0].rule == "spike"
    lines = [json.loads(line) for line in Path("alerts.jsonl").read_text().splitlines()]
    assert [line["checkpoint"] for line in lines] == ["step-30.safetensors"]
    second = run("audit.yaml")
    assert second.exit_code == 0, second.output
    assert "5 in the history already" in second.output
    assert len(History.open("audits.zarr").records()) == 5


def test_numbers_are_those_of_the_checkpoint_and_facts_say_what_made_them(place: Path) -> None:
    made = disthess.audit("audit.yaml")
    for record, step in zip(made.records, range(0, 50, 10), strict=True):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        model.load_state_dict(load_file(f"step-{step}.safetensors"))
        torch.manual_seed(0)
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        x, y = torch.randn(24, 4).double(), torch.randint(0, 2, (24,))
        dense = disthess.reference_hessian(disthess.Problem(model, loss="cross_entropy", batches=[(x, y)]))
        values = torch.linalg.eigvalsh(torch.as_tensor(dense))
        assert record.value("lambda_max") == pytest.approx(float(values[-1]), rel=1e-9)
        assert record.value("trace", "0") == pytest.approx(float(torch.as_tensor(dense)[:30, :30].trace()), rel=1e-9)
        assert record.facts["attention kernel"] == "MATH"
        assert record.facts["torch"] == torch.__version__
        assert len(record.facts["checkpoint"]) == len(record.facts["data"]) == 64
        assert record.products > 0
    assert len({record.facts["checkpoint"] for record in made.records}) == 5
    assert len({record.facts["settings"] for record in made.records}) == 1


def test_other_settings_are_other_audits_and_force_replaces(place: Path) -> None:
    disthess.audit("audit.yaml")
    write(place, measure={"metrics": ["loss"], "threads": 1}, alerts=[])
    assert len(disthess.audit("audit.yaml").records) == 5
    # Where and by how many an audit is made does not make it another.
    write(place, measure={"metrics": ["loss"], "memory_gib": 1.0}, alerts=[], history="audits.zarr")
    assert disthess.audit("audit.yaml").records == ()
    again = disthess.audit("audit.yaml", force=True)
    assert len(again.records) == 5
    assert len(History.open("audits.zarr").records()) == 10


def test_a_checkpoint_that_cannot_be_read_is_told_and_the_others_go_on(place: Path) -> None:
    Path("step-10.safetensors").write_bytes(b"nothing like it")
    save_file({"0.weight": torch.full((6, 4), float("nan"))}, "step-20.safetensors")
    found = run("audit.yaml", "--json")
    assert found.exit_code == 1
    told = json.loads(found.stdout)
    assert [entry["checkpoint"] for entry in told["failures"]] == ["step-10.safetensors", "step-20.safetensors"]
    assert "could not be read as safetensors" in told["failures"][0]["why"]
    assert "does not match" in told["failures"][1]["why"]
    assert [entry["step"] for entry in told["audits"]] == [0, 30, 40]
    assert "step-10.safetensors was not audited" in found.stderr
    assert len(History.open("audits.zarr").records()) == 3


def test_equal_weights_are_measured_once(place: Path) -> None:
    Path("step-50.safetensors").write_bytes(Path("step-40.safetensors").read_bytes())
    made = disthess.audit("audit.yaml")
    assert len(made.records) == 5
    assert any("step-50" in note for note in made.notes)


def test_the_factory_itself_is_audited_without_checkpoints(place: Path) -> None:
    tree = yaml.safe_load(Path("audit.yaml").read_text())
    del tree["checkpoints"]
    Path("audit.yaml").write_text(yaml.safe_dump(tree))
    made = disthess.audit("audit.yaml", history="other.zarr")
    assert [record.step for record in made.records] == [None]
    assert made.history == "other.zarr"
    assert not Path("audits.zarr").exists()


def test_mistakes_end_with_two_before_anything_is_written(place: Path) -> None:
    for sections, said in (
        ({"alerts": [{"name": "a", "metric": "lambda_maximum", "above": 1.0}]}, "did you mean lambda_max"),
        ({"measure": {"metrics": ["hue"]}}, "names 'hue'"),
        ({"checkpoints": {"paths": ["none"]}}, "matches no file"),
    ):
        write(place, **sections)
        found = run("audit.yaml")
        assert found.exit_code == 2, found.output
        assert said in found.stderr
    assert not Path("audits.zarr").exists()


def test_plan_knows_audit_files(place: Path) -> None:
    found = CliRunner().invoke(app, ["plan", "audit.yaml", "--json"])
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    assert len(plan["checkpoints"]) == 5
    assert not Path("audits.zarr").exists()
    assert plan["seconds"] > 0
    assert plan["bytes"] == plan["vector_bytes"] + plan["product_bytes"] > 0
    made = disthess.audit("audit.yaml")
    assert all(record.products <= plan["products"] for record in made.records)
    text = CliRunner().invoke(app, ["plan", "audit.yaml"]).output
    assert "5 more in the history" in text
    wrong = CliRunner().invoke(app, ["plan", "audit.yaml", "--workers", "2"])
    assert wrong.exit_code == 2
    assert "is an audit file" in wrong.stderr


def test_the_word_run_may_be_left_out_and_help_is_there(place: Path) -> None:
    assert run("run", "audit.yaml").exit_code == 3
    assert "Examples" in run("run", "--help").output
    assert "run" in run("--help").output
    assert run("none.yaml").exit_code == 2


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    script = [sys.executable, str(root / "examples" / "digits_checkpoints.py"), "runs/digits_checkpoints"]
    subprocess.run(script, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    config = str(root / "configs" / "digits_audit.yaml")
    found = run(config)
    assert found.exit_code == 0, found.output
    records = History.open("runs/digits_audit.zarr").records()
    assert [record.step for record in records] == [0, 20, 40, 60]
    losses = [record.value("loss") for record in records]
    assert losses == sorted(losses, reverse=True)
    assert set(records[0].arrays) >= {"density/grid", "coupling/value", "norm/high", "tile/last biases"}
    assert records[0].blocks == ("0", "2", "4")


@pytest.mark.slow
def test_on_ray_the_numbers_are_those_of_one_process(place: Path) -> None:
    measured = {"metrics": ["loss", "lambda_max", "trace"], "threads": 1}
    write(place, measure=measured, alerts=[], checkpoints={"paths": ["step-10.safetensors"]}, history="one.zarr")
    one = disthess.audit("audit.yaml").records[0]
    ray = {**measured, "executor": "ray", "workers": 1}
    write(place, measure=ray, alerts=[], checkpoints={"paths": ["step-10.safetensors"]}, history="ray.zarr")
    other = disthess.audit("audit.yaml").records[0]
    assert other.key == one.key
    assert [found.value for found in other.estimates] == pytest.approx(
        [found.value for found in one.estimates], rel=1e-12
    )
