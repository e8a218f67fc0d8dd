"""Ray clusters of several nodes on this machine: where actors go, nodes that leave, nodes that join."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import disthess
from disthess.errors import ExecutionError
from disthess.execute.events import Event, TileDone, WorkersChanged
from disthess.execute.ray_executor import RayExecutor
from disthess.execute.signals import StopFlag

sys.path.insert(0, str(Path(__file__).parent))
import placed_job
import toy_job as toys

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]
STORE_BYTES = 80 << 20
_HERE = Path(__file__).parent
_PATH = os.pathsep.join([str(_HERE), str(_HERE.parent / "unit" / "execute"), str(_HERE.parents[1])])


@pytest.fixture
def grow() -> Iterator[Callable[..., Any]]:
    """Adds a node to a cluster of its own; the first has no cores, and the driver is connected to it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cluster = cluster_utils.Cluster()
    cluster.add_node(num_cpus=0, object_store_memory=STORE_BYTES, include_dashboard=False)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": _PATH}})

    def add(**resources: float) -> Any:
        node = cluster.add_node(object_store_memory=STORE_BYTES, **{"num_cpus": 1, **resources})
        cluster.wait_for_nodes()
        return node

    add.remove = cluster.remove_node  # type: ignore[attr-defined]
    yield add
    ray.shutdown()
    cluster.shutdown()
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Acting(toys.Recorder):
    """Keeps events; does something, once, when so many tiles are done. In the main thread, since Ray sets signal handlers."""

    def __init__(self, when: int, act: Callable[[], object]) -> None:
        super().__init__()
        self._when, self._act, self._acted = when, act, False

    def notify(self, event: Event) -> None:
        super().notify(event)
        if len(self.done) >= self._when and not self._acted:
            self._acted = True
            self._act()

    @property
    def working(self) -> list[int]:
        return [event.working for event in self.events if isinstance(event, WorkersChanged)]


def check_files(folder: Path, tiles: int) -> None:
    weights = np.arange(9.0).reshape(3, 3)
    for tile in range(tiles):
        np.testing.assert_array_equal(np.load(folder / f"tile-{tile}.npy"), weights @ weights * tile)


def test_actors_are_spread_one_a_node(grow: Callable[..., Any], tmp_path: Path) -> None:
    for _ in range(3):
        grow(num_cpus=2)
    outcome = RayExecutor(3, threads=1, device="cpu").run(
        placed_job.PlacedJob(tmp_path, 1.0), toys.make_tiles(9, 3), toys.Recorder(), StopFlag()
    )
    assert (outcome.finished, outcome.failures) == (9, ())
    found = placed_job.places(tmp_path)
    assert len({place["node"] for place in found}) == len(found) == 3
    check_files(tmp_path, 9)


def test_each_actor_has_a_gpu_of_its_own_and_one_that_is_not_there_is_refused(
    grow: Callable[..., Any], tmp_path: Path
) -> None:
    """Ray counts GPUs as it is told; these do not exist, so that computing is asked of the CPU."""
    grow(num_gpus=1, num_cpus=2)
    grow(num_gpus=2, num_cpus=2)
    outcome = RayExecutor(3, device="cpu", gpus=1).run(
        placed_job.PlacedJob(tmp_path, 1.0), toys.make_tiles(6, 3), toys.Recorder(), StopFlag()
    )
    assert outcome.finished == 6
    found = placed_job.places(tmp_path)
    assert {place["device"] for place in found} == {"cpu"}
    taken = [(place["node"], *place["gpus"]) for place in found]  # type: ignore[misc]
    assert len(set(taken)) == len(taken) == 3, taken
    assert all(len(place["gpus"]) == 1 for place in found)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        for device in (None, "cuda"):
            with pytest.raises(ExecutionError, match=r"torch sees no GPU there\. Declare only GPUs that exist"):
                RayExecutor(2, device=device).run(
                    placed_job.PlacedJob(tmp_path), toys.make_tiles(2, 2), toys.Recorder(), StopFlag()
                )
    with pytest.raises(
        ExecutionError, match=r"does not fit into this Ray cluster: its 3 nodes have 4 cores and 3 GPUs"
    ):
        RayExecutor(1, threads=3, device="cpu").run(
            placed_job.PlacedJob(tmp_path), toys.make_tiles(1), toys.Recorder(), StopFlag()
        )
    with pytest.raises(ExecutionError, match="names one GPU, and with Ray each worker sees only the one"):
        RayExecutor(1, device="cuda:1")


def test_a_node_that_leaves_takes_no_tile_with_it(grow: Callable[..., Any], tmp_path: Path) -> None:
    nodes = [grow() for _ in range(3)]
    recorder = Acting(3, lambda: grow.remove(nodes[1], allow_graceful=False))  # type: ignore[attr-defined]
    outcome = RayExecutor(3, device="cpu").run(
        placed_job.PlacedJob(tmp_path, 1.0), toys.make_tiles(24, 3), recorder, StopFlag()
    )
    assert (outcome.finished, outcome.failures) == (24, ())
    assert recorder.done == list(range(24))
    assert 1 <= len(recorder.failed) <= 1 + 1, "the tile in flight there, and no other, is tried again"
    assert recorder.working[-1] == 2
    check_files(tmp_path, 24)


def test_a_node_that_joins_is_used_where_there_were_too_few(grow: Callable[..., Any], tmp_path: Path) -> None:
    grow()
    recorder = Acting(2, grow)
    outcome = RayExecutor(2, device="cpu").run(
        placed_job.PlacedJob(tmp_path, 1.0), toys.make_tiles(30, 2), recorder, StopFlag()
    )
    assert (outcome.finished, outcome.failures) == (30, ())
    assert recorder.working == [1, 2]
    assert len({place["node"] for place in placed_job.places(tmp_path)}) == 2
    by_worker = [event.record.worker for event in recorder.events if isinstance(event, TileDone)]
    assert min(by_worker.count(0), by_worker.count(1)) >= 1


def test_a_node_that_joins_after_all_were_lost_is_used(grow: Callable[..., Any], tmp_path: Path) -> None:
    first = grow()

    def replace() -> None:
        grow.remove(first, allow_graceful=False)  # type: ignore[attr-defined]
        time.sleep(2.0)
        grow()

    recorder = Acting(2, replace)
    outcome = RayExecutor(1, device="cpu").run(
        placed_job.PlacedJob(tmp_path, 0.5), toys.make_tiles(8), recorder, StopFlag()
    )
    assert (outcome.finished, outcome.failures) == (8, ())
    assert recorder.working[:3] == [1, 0, 1]
    assert len({place["node"] for place in placed_job.places(tmp_path)}) == 2


def test_where_no_node_comes_the_run_ends_and_says_so(grow: Callable[..., Any], tmp_path: Path) -> None:
    first = grow()
    recorder = Acting(1, lambda: grow.remove(first, allow_graceful=False))  # type: ignore[attr-defined]
    executor = RayExecutor(1, device="cpu", start_seconds=5.0)
    outcome = executor.run(placed_job.PlacedJob(tmp_path, 1.0), toys.make_tiles(4), recorder, StopFlag())
    assert outcome.finished == len(recorder.done) < 4
    assert len(outcome.failures) == 4 - outcome.finished
    assert all("Ray found no room for one in 5 s" in message for _, message in outcome.failures)


def test_a_store_has_the_same_bytes_though_a_node_left(grow: Callable[..., Any], tmp_path: Path) -> None:
    """A real problem; the node goes when the first tiles are written."""
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (torch.nn.Linear(12, 12, bias=False), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(12, 3))
    data = (torch.randn(400, 12), torch.randint(0, 3, (400,)))
    problem = disthess.Problem(model, loss="cross_entropy", batches=[data])
    options: dict[str, Any] = {"threads": 1, "dtype": "float64"}
    disthess.compute(problem, tmp_path / "serial.zarr", **options)
    nodes = [grow() for _ in range(3)]
    path = tmp_path / "ray.zarr"

    def leave() -> None:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not list(path.glob("panels/hessian/*/c/*/*")):
            time.sleep(0.01)
        grow.remove(nodes[0], allow_graceful=False)  # type: ignore[attr-defined]

    thread = threading.Thread(target=leave)
    thread.start()
    store = disthess.compute(problem, path, executor="ray", workers=3, **options)
    thread.join()
    assert store.missing_tiles() == ()
    for kind in ("panels", "gradient", "loss"):
        wanted = {f.relative_to(tmp_path / "serial.zarr"): f for f in (tmp_path / "serial.zarr" / kind).rglob("*")}
        assert {f.relative_to(path) for f in (path / kind).rglob("*")} == set(wanted)
        for name, file in wanted.items():
            assert not file.is_file() or (path / name).read_bytes() == file.read_bytes(), name
