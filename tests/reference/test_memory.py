"""Measured peak memory of a worker stays within the plan's bound, on problems of different kinds.

Each problem runs in a process of its own, so that the peak is its own; the measurement starts before the worker loads anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from disthess.planning.memory import LIBRARY_BYTES, WORKSPACE_BYTES

SETUP = """
import json, sys, torch, disthess
from torch import nn
torch.manual_seed(0)
def mlp():
    net = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 10))
    return disthess.Problem(net, loss="cross_entropy", batches=[(torch.randn(900, 48), torch.randint(0, 10, (900,)))])
def cnn():
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
                        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    return disthess.Problem(net, loss="cross_entropy", batches=[(torch.randn(400, 1, 8, 8), torch.randint(0, 10, (400,)))])
def batch_norm():
    net = nn.Sequential(nn.Linear(20, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 5)).train()
    return disthess.Problem(net, loss="cross_entropy", batches=[(torch.randn(300, 20), torch.randint(0, 5, (300,)))])
class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(16, 32, bias=False)
    def forward(self, ids):
        return self.head(self.layer(self.embed(ids))).transpose(1, 2)
def gpt():
    ids = torch.randint(0, 32, (24, 12))
    return disthess.Problem(Gpt(), loss="cross_entropy", batches=[(ids, ids.roll(1, 1))])
def uncapturable():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 4)
        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h) if h.sum() > -1e9 else h
    return disthess.Problem(Branch(), loss="cross_entropy", batches=[(torch.randn(256, 16), torch.randint(0, 4, (256,)))])
store = disthess.compute(globals()[sys.argv[1]](), sys.argv[2], progress=False, threads=1, certify=False, **json.loads(sys.argv[3]))
peak = max(record.peak_bytes for record in store.store.records())
print(json.dumps({"peak": peak, "bound": store.attributes["projected_peak_bytes"]}))
"""


ACTIVATIONS = {"activations": "*", "activations_per_sample": True, "parameters": "4.bias", "parts": ["hessian", "ggn"]}


@pytest.mark.parametrize(
    ("problem", "options"),
    [
        pytest.param("mlp", {}, id="mlp"),
        pytest.param("cnn", {}, id="cnn", marks=pytest.mark.slow),
        pytest.param("batch_norm", {}, id="batch_norm", marks=pytest.mark.slow),
        pytest.param("gpt", {}, id="gpt", marks=pytest.mark.slow),
        pytest.param("uncapturable", {}, id="uncapturable", marks=pytest.mark.slow),
        pytest.param("mlp", ACTIVATIONS, id="activations", marks=pytest.mark.slow),
    ],
)
def test_measured_peak_is_within_the_plan(problem: str, options: dict[str, object], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SETUP, problem, str(tmp_path / "run.zarr"), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert 0 < measured["peak"] <= measured["bound"], measured
    beyond = measured["bound"] - WORKSPACE_BYTES - LIBRARY_BYTES
    assert beyond <= 10 * measured["peak"], f"the bound is too loose to be of use: {measured}"
