"""The coupling map of problems against norms and traces of their dense Hessians."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import disthess
from disthess.cli.main import app
from disthess.errors import ConfigError


def problem(width: int = 12) -> disthess.Problem:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 5)).double()
    return disthess.Problem(
        model, loss="cross_entropy", batches=[(torch.randn(30, 6, dtype=torch.float64), torch.randint(5, (30,)))]
    )


def spans(model: nn.Module) -> dict[str, slice]:
    found, start = {}, 0
    for name, parameter in model.named_parameters():
        found[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return found


def test_with_as_many_vectors_as_entries_it_is_exact() -> None:
    data = problem()
    matrix = np.asarray(disthess.reference_hessian(data))
    where = spans(data.model)
    found = disthess.coupling_map(data, probes=80)
    assert found.names == tuple(where)
    norms = np.array([[np.linalg.norm(matrix[a, b]) for b in where.values()] for a in where.values()])
    np.testing.assert_allclose(found.norm.value, norms, rtol=1e-10, atol=1e-14)
    np.testing.assert_array_equal(found.norm.low, found.norm.high)
    own = np.diagonal(norms)
    np.testing.assert_allclose(found.coupling.value, norms / np.sqrt(np.outer(own, own)), rtol=1e-10)
    np.testing.assert_allclose(found.trace.value, [np.trace(matrix[a, a]) for a in where.values()], rtol=1e-10)
    squares = norms**2
    assert found.off_diagonal == pytest.approx(math.sqrt(1 - np.trace(squares) / squares.sum()), rel=1e-10)
    assert found.products == len(matrix)
    assert found.largest(1)[0].coupling == pytest.approx(np.max(found.coupling.value - np.eye(len(where))))


@pytest.mark.slow
def test_intervals_hold_the_truth_of_a_network() -> None:
    data = problem(16)
    matrix = np.asarray(disthess.reference_hessian(data))
    where = list(spans(data.model).values())
    norms = np.array([[np.linalg.norm(matrix[a, b]) for b in where] for a in where])
    below = np.tril_indices(len(where), -1)
    own = np.diagonal(norms)
    couplings = norms / np.sqrt(np.outer(own, own))
    held: dict[str, list[bool]] = {"norm": [], "coupling": []}
    for seed in range(25):
        found = disthess.coupling_map(data, probes=12, seed=seed)
        for key, interval, truth in (("norm", found.norm, norms), ("coupling", found.coupling, couplings)):
            apart = (interval.high > interval.low)[below]
            held[key] += ((interval.low <= truth) & (truth <= interval.high))[below][apart].tolist()
    for key, flags in held.items():
        assert 0.88 <= np.mean(flags) <= 0.99, (key, np.mean(flags), len(flags))


def test_modules_and_sections_are_blocks_of_their_own() -> None:
    data = problem()
    matrix = np.asarray(disthess.reference_hessian(data))
    modules = disthess.coupling_map(data, of="modules", probes=90)
    assert modules.names == ("0", "2", "3")
    assert modules.sizes == (6 * 12 + 12, 24, 12 * 5 + 5)
    assert modules.norm.value[0, 0] == pytest.approx(np.linalg.norm(matrix[:84, :84]), rel=1e-10)
    cut = disthess.coupling_map(data, sections={"top": "0.weight[0:4]", "left": "0.weight[:, 0:2]"}, probes=80)
    assert "0.weight" not in cut.names
    grid = np.arange(72).reshape(12, 6)
    left = grid[:, :2].ravel()
    assert cut.trace.value[cut.names.index("left")] == pytest.approx(np.trace(matrix[left][:, left]), rel=1e-9)
    assert cut.norm.value[cut.names.index("top"), cut.names.index("3.bias")] == pytest.approx(
        np.linalg.norm(matrix[:24, -5:]), rel=1e-9
    )


def test_what_the_loss_does_not_reach_has_no_coupling() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(2, 2)}).double()
    data = disthess.Problem(
        model,
        objective=lambda m, x: m["used"](x).square().sum(),
        batches=[torch.randn(5, 3, dtype=torch.float64)],
    )
    found = disthess.coupling_map(data)
    rows = {(row.a, row.b): row for row in found.rows()}
    assert rows["idle.weight", "idle.weight"].norm == 0
    assert math.isnan(rows["used.weight", "idle.weight"].coupling)
    tree = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert any(pair["coupling"] is None for pair in tree["pairs"])
    assert found.to_csv().count("\n") == len(found.rows()) + 1


@pytest.mark.parametrize(
    "options",
    [{"of": "layers"}, {"probes": 2}, {"confidence": 1.5}, {"of": "modules", "sections": {"a": "0.weight[0:1]"}}],
)
def test_wrong_arguments_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        disthess.coupling_map(problem(), **options)  # type: ignore[arg-type]


def test_the_verb_prints_saves_and_draws(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(
        "import disthess, torch\n"
        "def problem():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))\n"
        "    return disthess.Problem(model, loss='mse', batches=[(torch.randn(8, 3), torch.randn(8, 2))])\n"
    )
    config = tmp_path / "toy.yaml"
    config.write_text(
        f"problem: {{factory: '{tmp_path}/toy.py:problem'}}\ncompute: {{store: {tmp_path}/toy.zarr, dtype: float64}}\n"
    )
    runner = CliRunner()
    shown = runner.invoke(
        app, ["couplings", str(config), "--csv", str(tmp_path / "c.csv"), "--plot", str(tmp_path / "c.png")]
    )
    assert shown.exit_code == 0, shown.output
    assert "block-diagonal form leaves out" in shown.output
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert not (tmp_path / "toy.zarr").exists()
    found = runner.invoke(app, ["couplings", str(config), "--of", "modules", "--json"])
    assert [pair["a"] for pair in json.loads(found.stdout)["pairs"]] == ["0", "0", "2"]
