"""The concrete job of a worker: load the captured problem, compute tiles, write them into the store."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from disthess.errors import ExecutionError
from disthess.execute.heap import KeptHeap
from disthess.execute.memory import PeakMemory
from disthess.execute.task import AbstractJob, AbstractWorker
from disthess.graph.program import Program, on_device
from disthess.planning.source import SourcePlan
from disthess.problem import Problem, batch_tensors
from disthess.store.layout import Layout, Tile, TileRecord
from disthess.store.store import Store
from disthess.sweep.abstract import AbstractEngine
from disthess.sweep.autograd import AutogradEngine
from disthess.sweep.engine import GraphEngine
from disthess.sweep.primal import compute_primal


@final
class GraphJob(AbstractJob):
    """Tiles by the graph sweep; needs no model, only graphs and tensors.

    Args:
        problem: In the dtype of the run, on the CPU.
        programs: One per batch.
        layout: The store's layout.
        sources: How each source is swept.
        path: The store.
    """

    def __init__(
        self, problem: Problem, programs: Sequence[Program], layout: Layout, sources: Sequence[SourcePlan], path: str
    ) -> None:
        self._graphs = tuple(program.graph for program in programs)
        self._layout = layout
        self._sources = {source.source: source for source in sources}
        self._path = path
        self._batch_weights = problem.weights
        self._tensors = _tensors(problem, programs)

    def __getstate__(self) -> dict[str, object]:
        """Without the tensors: they travel once, by ``weights``."""
        return {**self.__dict__, "_tensors": {}}

    @property
    @override
    def weights(self) -> Mapping[str, np.ndarray]:
        return self._tensors

    @override
    def halvings(self, tile: Tile) -> int:
        return self._sources[tile.source].halvings

    @override
    def open(self, weights: Mapping[str, np.ndarray], worker: int, device: str, threads: int) -> AbstractWorker:
        peak = PeakMemory()
        settings = DeviceSettings(device, threads)
        place = settings.device
        moved = {name: torch.tensor(value, device=place) for name, value in weights.items()}
        parameters = _below(moved, "parameter/")
        primals = []
        for index, graph in enumerate(self._graphs):
            constants = {int(key): value for key, value in _below(moved, f"constant/{index}/").items()}
            program = Program(graph, constants)
            if place.type != "cpu":
                program = on_device(program, place)
            inputs = _below(moved, f"input/{index}/")
            ordered = [inputs[str(number)] for number in range(len(inputs))]
            primals.append(
                compute_primal(program.graph, parameters, ordered, program.constants, self._batch_weights[index])
            )
        engine = GraphEngine(primals, parameters, self._layout, self._sources)
        return TileWorker(engine, Store.open(self._path, writable=True), worker, settings, peak)


@final
class AutogradJob(AbstractJob):
    """Tiles by autograd on the eager model, which travels with the job."""

    def __init__(self, problem: Problem, layout: Layout, sources: Sequence[SourcePlan], path: str) -> None:
        self._problem = problem
        self._layout = layout
        self._sources = {source.source: source for source in sources}
        self._path = path

    @property
    @override
    def weights(self) -> Mapping[str, np.ndarray]:
        return {}

    @override
    def halvings(self, tile: Tile) -> int:
        return self._sources[tile.source].halvings

    @override
    def open(self, weights: Mapping[str, np.ndarray], worker: int, device: str, threads: int) -> AbstractWorker:
        peak = PeakMemory()
        settings = DeviceSettings(device, threads)
        problem = self._problem.to(self._problem.dtype, settings.device)
        engine = AutogradEngine(problem, self._layout, self._sources)
        return TileWorker(engine, Store.open(self._path, writable=True), worker, settings, peak)


@final
class DeviceSettings:
    """Threads, precision and heap for the time a worker lives; `restore` puts back what was there.

    Args:
        device: Torch's name.
        threads: Of linear algebra.
        large: Of `KeptHeap`.

    Raises:
        ExecutionError: A GPU was asked for and torch sees none.
    """

    def __init__(self, device: str, threads: int, *, large: bool = False) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ExecutionError(
                f"device {device!r} was asked for, but torch sees no GPU on {socket.gethostname()}. Use device='cpu', or a "
                f"torch built for the GPU that is there."
            )
        self.device = torch.device(device)
        self._wanted = threads
        self._threads = torch.get_num_threads()
        self._precision = torch.get_float32_matmul_precision()
        self._tf32 = torch.backends.cudnn.allow_tf32
        self._heap = KeptHeap(large=large)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False

    def enter_thread(self) -> None:
        """Set the number of threads in the calling thread: torch keeps it for each of them."""
        if torch.get_num_threads() != self._wanted:
            torch.set_num_threads(self._wanted)

    def free(self) -> None:
        """Give back what is free: a tile did not fit and will be tried again in smaller pieces."""
        self._heap.give_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Undo what the constructor set."""
        self._heap.restore()
        torch.set_num_threads(self._threads)
        torch.set_float32_matmul_precision(self._precision)
        torch.backends.cudnn.allow_tf32 = self._tf32


@final
class TileWorker(AbstractWorker):
    """Computes a tile and writes it; returns a record of a few bytes."""

    def __init__(
        self, engine: AbstractEngine, store: Store, worker: int, settings: DeviceSettings, peak: PeakMemory
    ) -> None:
        self._engine = engine
        self._store = store
        self._worker = worker
        self._settings = settings
        self._peak = peak

    @override
    def compute(self, tile: Tile, split: int = 0) -> TileRecord:
        started = time.perf_counter()
        self._settings.enter_thread()
        if split:
            self._settings.free()
        arrays = self._engine.compute(tile.source, tile.span, split)
        checksum, written = self._store.write_tile(tile, arrays)
        seconds = time.perf_counter() - started
        return TileRecord(tile.index, checksum, seconds, written, self._peak.rise_bytes(), self._worker, split)

    @override
    def close(self) -> None:
        self._settings.restore()


def _tensors(problem: Problem, programs: Sequence[Program]) -> dict[str, np.ndarray]:
    held: dict[str, Tensor] = {f"parameter/{p.name}": p.tensor for p in problem.parameters()}
    for index, (batch, program) in enumerate(zip(problem.batches, programs, strict=True)):
        held.update({f"input/{index}/{number}": tensor for number, tensor in enumerate(batch_tensors(batch))})
        held.update({f"constant/{index}/{node}": value for node, value in program.constants.items()})
    return {name: tensor.detach().cpu().numpy() for name, tensor in held.items()}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
