"""Chosen subsets of a small copy of the encoder that the benchmark ``subsets`` measures, against dense Hessians of autograd."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import disthess

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def subsets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    return importlib.import_module("subsets")


def tiny(subsets: ModuleType, name: str) -> tuple[disthess.Problem, list[str]]:
    return subsets.build(name, subsets.Sizes(width=16, layers=2, mlp=24, heads=4, vocabulary=30), 3, 5)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def dense(problem: disthess.Problem, patterns: list[str]) -> np.ndarray:
    return np.asarray(disthess.reference_hessian(problem.to(torch.float64), parameters=patterns))


@pytest.mark.parametrize("name", ["norms", pytest.param("adapters", marks=pytest.mark.slow)])
def test_a_subset_of_whole_parameters_is_autograds(subsets: ModuleType, name: str, tmp_path: Path) -> None:
    problem, patterns = tiny(subsets, name)
    wanted = dense(problem, patterns)
    store = disthess.compute(problem, tmp_path / "d.zarr", parameters=patterns, dtype="float64", progress=False)
    assert relative(store.dense(), wanted) < 1e-12
    columns = [0, len(wanted) // 2, len(wanted) - 1]
    exact = subsets.exact_columns(problem, [entry.name for entry in store.parameters], columns)
    assert relative(exact, wanted[:, columns]) < 1e-12


def test_the_query_rows_of_a_head_are_autograds(subsets: ModuleType, tmp_path: Path) -> None:
    problem, patterns = tiny(subsets, "head")
    assert patterns == ["layers.1.q.base.weight[4:8]"]
    wanted = dense(problem, ["layers.1.q.base.weight"])[64:128, 64:128]
    store = disthess.compute(problem, tmp_path / "d.zarr", parameters=patterns, dtype="float64", progress=False)
    assert relative(store.dense(), wanted) < 1e-12
    cache = disthess.open_cache(tmp_path / "c.zarr", problem, dtype="float64", chunk=64)
    assert relative(cache.read(patterns[0], patterns[0], compute=True), wanted) < 1e-12
    assert relative(subsets.exact_columns(problem, patterns, [5, 40]), wanted[:, [5, 40]]) < 1e-12


@pytest.mark.slow
def test_all_biases_are_autograds_in_float32(subsets: ModuleType, tmp_path: Path) -> None:
    problem, patterns = tiny(subsets, "biases")
    store = disthess.compute(problem, tmp_path / "s.zarr", parameters=patterns, dtype="float32", progress=False)
    assert relative(store.dense(), dense(problem, patterns)) < 1e-5


@pytest.mark.slow
def test_the_verb_keeps_what_it_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(BENCH),
            "subsets",
            "--quick",
            "--threads",
            "1",
            "--subset",
            "head",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "subsets_head_float32.json").read_text())
    assert (found["rows"], found["data"]) == (256, {"sentences": 4, "tokens": 8})
    assert len(found["errors"]) == 6
    assert 0 < found["worst_error"] == max(found["errors"]) < 1e-5
    assert 0 < found["tile"]["difference"] < 1e-5
    assert found["tile"]["products"] == 512  # it meets two chunks a side
    assert 0 <= found["tiles_peak_bytes"] <= found["plan"]["peak_bytes"]
    assert found["wall_seconds"] > 0 < found["processor_seconds"]
    assert {"processor", "cores", "threads", "memory_bytes"} <= set(found["hardware"])
    assert found["versions"]["torch"] == torch.__version__
