"""The store's arrays have the same bytes whoever computed them: serial, threads, processes, Ray workers, killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import disthess
from disthess.execute.forked import why_not
from disthess.problem import Problem

OPTIONS = {"threads": 1, "progress": False, "parts": ("hessian", "ggn")}


def problem() -> Problem:
    """An RNN-like net with a shared weight, so that use panels and their sums are in play too."""
    torch.manual_seed(3)
    shared = torch.nn.Linear(24, 24)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 24), torch.nn.Tanh(), shared, torch.nn.Tanh(), shared, torch.nn.Linear(24, 3)
    )
    return Problem(model, loss="cross_entropy", batches=[(torch.randn(40, 8), torch.randint(0, 3, (40,)))])


def array_bytes(path: Path) -> dict[str, bytes]:
    """Every chunk of every panel, and gradient and loss."""
    files = [
        file
        for kind in ("panels", "uses", "gradient", "loss")
        for file in sorted((path / kind).rglob("*"))
        if file.is_file()
    ]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("serial") / "run.zarr"
    disthess.compute(problem(), path, **OPTIONS)
    return array_bytes(path)


def test_the_serial_store_has_panels_and_uses(serial: dict[str, bytes]) -> None:
    assert any(name.startswith("panels/hessian/") for name in serial)
    assert any(name.startswith("uses/ggn/") for name in serial)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ray_writes_the_same_bytes(workers: int, serial: dict[str, bytes], tmp_path: Path) -> None:
    disthess.compute(problem(), tmp_path / "run.zarr", executor="ray", workers=workers, **OPTIONS)
    assert array_bytes(tmp_path / "run.zarr") == serial


def test_threads_write_the_same_bytes(serial: dict[str, bytes], tmp_path: Path) -> None:
    disthess.compute(problem(), tmp_path / "run.zarr", executor="threads", workers=3, **OPTIONS)
    assert array_bytes(tmp_path / "run.zarr") == serial


@pytest.mark.skipif(bool(why_not()), reason="no forks here")
def test_processes_write_the_same_bytes(serial: dict[str, bytes], tmp_path: Path) -> None:
    options = {key: value for key, value in OPTIONS.items() if key != "threads"}
    disthess.compute(problem(), tmp_path / "run.zarr", executor="processes", workers=3, **options)
    assert array_bytes(tmp_path / "run.zarr") == serial


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import test_same_bytes as t
import disthess
disthess.compute(t.problem(), {path!r}, **t.OPTIONS)
"""


def test_a_killed_run_resumes_to_the_same_bytes(serial: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    script = SCRIPT.format(here=str(Path(__file__).parent), path=str(path))
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (path / "panels").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert path.exists()
    store = disthess.compute(problem(), path, **OPTIONS)
    assert store.missing_tiles() == ()
    assert array_bytes(path) == serial


def test_only_missing_tiles_are_computed_again(serial: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    disthess.compute(problem(), path, **OPTIONS)
    from disthess.store.store import Store

    store = Store.open(path, writable=True)
    before = {record.tile: record.seconds for record in store.records()}
    store.mark_missing([1, 4])
    store.mark_reduced(False)
    disthess.compute(problem(), path, **OPTIONS)
    after = {record.tile: record.seconds for record in Store.open(path).records()}
    assert {tile for tile in after if after[tile] != before[tile]} == {1, 4}
    assert array_bytes(path) == serial
