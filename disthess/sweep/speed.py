"""How fast matrix products run: the rate that bounds every plan's time from below. Measured here, or assumed."""

from __future__ import annotations

import time

import torch

from disthess.errors import ConfigError
from disthess.rules.products import product

SIZE = 1024
REPEATS = 5

ASSUMED_FLOPS_PER_SECOND = 10e12
"""Of a worker on a device that is not here: a round number, for whoever reads a plan to scale by."""


def is_device_here(device: str) -> bool:
    """Whether torch can compute on a device of that name on this machine.

    >>> is_device_here("cpu")
    True

    Raises:
        ConfigError: Torch knows no such kind of device.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as reason:
        raise ConfigError(
            f"device={device!r} is no device that torch knows; give cpu, cuda, or one GPU such as cuda:1."
        ) from reason
    backend = getattr(torch, kind, None)
    return kind == "cpu" or bool(backend is not None and hasattr(backend, "is_available") and backend.is_available())


def product_flops_per_second(dtype: str, threads: int, device: str = "cpu") -> float:
    """Best rate of a square matrix product over a few short tries, in floating point operations per second.

    Args:
        dtype: ``float32`` or ``float64``.
        threads: To use; put back afterwards.
        device: Where.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        place = torch.device(device)
        left = torch.ones(SIZE, SIZE, dtype=getattr(torch, dtype), device=place)
        best = float("inf")
        for _ in range(REPEATS):
            begin = time.perf_counter()
            with torch.no_grad():
                float(product(left, left)[0, 0])
            best = min(best, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return 2 * SIZE**3 / best
