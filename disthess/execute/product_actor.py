"""What runs inside a Ray actor that multiplies: the products of its pieces, exceptions as values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
import torch

from disthess.errors import DisthessError
from disthess.execute.attempt import Failure, failure_of
from disthess.execute.memory import PeakMemory
from disthess.execute.product_job import PieceProducts, ProductJob, is_large
from disthess.execute.ray_actor import own_device
from disthess.execute.tile_job import DeviceSettings


@final
class ProductActor:
    """Opened once, then asked for product after product. Ray makes an actor of it."""

    def __init__(self) -> None:
        self._products: PieceProducts | None = None
        self._settings: DeviceSettings | None = None
        self._peak = PeakMemory()

    def open(
        self, job: ProductJob, weights: Mapping[str, np.ndarray], device: str | None, threads: int
    ) -> Failure | None:
        """Load the problem; None if that went well."""
        self._peak = PeakMemory()
        try:
            self._settings = DeviceSettings(own_device(device), threads, large=is_large(job.size))
            self._products = job.open(weights, self._settings.device)
        except Exception as error:
            return failure_of(error, None)
        return None

    def product(self, piece: int, vectors: np.ndarray) -> np.ndarray | Failure:
        """``H_b v_k`` of a piece, ``[K, P]`` from ``[K, P]``."""
        if self._products is None or self._settings is None:
            return Failure("the worker was asked for a product before it was opened")
        try:
            self._settings.enter_thread()
            # A copy: the object store's arrays must not be written to, and torch wants them aligned as its own.
            given = torch.tensor(vectors, device=self._settings.device)
            return self._products.product(piece, given).cpu().numpy()
        except DisthessError as error:
            return Failure(str(error), error)
        except Exception as error:
            return failure_of(error, None)

    def peak_bytes(self) -> int:
        """Highest resident memory since it was opened, less that before."""
        return self._peak.rise_bytes()
