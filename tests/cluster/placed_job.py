"""A toy job whose workers write down where Ray has put them, and whose tiles take as long as they are told."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "execute"))
import toy_job as toys

from disthess.execute.task import AbstractWorker
from disthess.store.layout import Tile, TileRecord


class PlacedWorker(toys.ToyWorker):
    """Sleeps, then computes; notes which worker wrote a tile."""

    def __init__(self, folder: Path, weights: Mapping[str, np.ndarray], worker: int, seconds: float) -> None:
        super().__init__(folder, weights, worker, {})
        self.seconds, self.folder = seconds, folder

    def compute(self, tile: Tile, split: int = 0) -> TileRecord:
        time.sleep(self.seconds)
        return super().compute(tile, split)


class PlacedJob(toys.ToyJob):
    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        super().__init__(folder)
        self.folder, self.seconds = folder, seconds

    def open(self, weights: Mapping[str, np.ndarray], worker: int, device: str, threads: int) -> AbstractWorker:
        import ray

        context = ray.get_runtime_context()
        place = {"node": context.get_node_id(), "gpus": ray.get_gpu_ids(), "device": device}
        (self.folder / f"place-{worker}-{os.getpid()}.json").write_text(json.dumps(place))
        return PlacedWorker(self.folder, weights, worker, self.seconds)


def places(folder: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("place-*.json"))]
