"""Workers under a real limit of memory, set by the kernel: tiles that do not fit are computed in smaller pieces, truly."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import disthess
from disthess.api import finish, root_attributes
from disthess.execute.events import Event, TileDone
from disthess.execute.executor import AbstractExecutor
from disthess.execute.marks import LedgerMarks
from disthess.execute.ray_executor import RayExecutor
from disthess.execute.signals import StopFlag
from disthess.execute.task import AbstractJob, AbstractWorker
from disthess.execute.tile_job import GraphJob
from disthess.fingerprint import fingerprint
from disthess.prepare import Options, prepare
from disthess.store.layout import Tile, TileRecord
from disthess.store.place import place_of
from disthess.store.store import Store


class LimitedWorker(AbstractWorker):
    """The tile's own worker in a process that may take so many bytes more while it computes."""

    def __init__(self, inner: AbstractWorker, allowance: int) -> None:
        self._inner = inner
        self._allowance = allowance

    def compute(self, tile: Tile, split: int = 0) -> TileRecord:
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (address_bytes() + self._allowance, before[1]))
        try:
            return self._inner.compute(tile, split)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def close(self) -> None:
        self._inner.close()


class LimitedJob(AbstractJob):
    """A job whose workers are limited."""

    def __init__(self, inner: AbstractJob, allowance: int) -> None:
        self._inner = inner
        self._allowance = allowance

    @property
    def weights(self) -> Mapping[str, np.ndarray]:
        return self._inner.weights

    def halvings(self, tile: Tile) -> int:
        return self._inner.halvings(tile)

    def open(self, weights: Mapping[str, np.ndarray], worker: int, device: str, threads: int) -> AbstractWorker:
        return LimitedWorker(self._inner.open(weights, worker, device, threads), self._allowance)


class Seen:
    """Keeps the records of tiles."""

    def __init__(self) -> None:
        self.splits: list[int] = []

    def notify(self, event: Event) -> None:
        if isinstance(event, TileDone):
            self.splits.append(event.record.split)


def address_bytes() -> int:
    """Address space of this process, which is what the limit counts."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize:"))
    return int(line.split()[1]) * 1024


def make_problem() -> disthess.Problem:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(40, 50), torch.nn.Tanh(), torch.nn.Linear(50, 20), torch.nn.Tanh(), torch.nn.Linear(20, 5)
    )
    batch = (torch.randn(2000, 40), torch.randint(0, 5, (2000,)))
    return disthess.Problem(model, loss="cross_entropy", batches=[batch]).to(torch.float64)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="limits of this kind are Linux's")
def test_tiles_that_do_not_fit_a_real_limit_are_halved_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each tensor gets and gives back memory of its own, so that the limit counts what is in use and no reserves.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    problem = make_problem()
    prepared = prepare(problem, Options(executor="ray", workers=2, threads=1))
    plan = prepared.plan
    identity = fingerprint(prepared.problem, prepared.names, plan)
    store = Store.create(place_of(tmp_path / "run.zarr"), plan.layout, root_attributes(plan, identity, {}))
    largest = max(tile.memory_bytes for tile in plan.layout.tiles)
    job = LimitedJob(
        GraphJob(prepared.problem, prepared.programs, plan.layout, plan.sources, store.path), int(0.14 * largest)
    )
    seen = Seen()
    executor: AbstractExecutor = RayExecutor(2, 1, "cpu", None)
    outcome = executor.run(job, plan.layout.tiles, LedgerMarks(store, seen), StopFlag())
    assert outcome.failures == ()
    assert outcome.split == sum(split > 0 for split in seen.splits) > 0
    assert outcome.finished == len(plan.layout.tiles)
    result = finish(store, prepared, seed=0)
    wanted = disthess.reference_hessian(problem)
    error = np.linalg.norm(result.dense() - wanted) / np.linalg.norm(wanted)
    assert error < 1e-12, error
