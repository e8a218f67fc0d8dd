"""How fast matrix products run here: the rate that bounds every plan's time from below."""

from __future__ import annotations

import time

import torch

SIZE = 1024
REPEATS = 5


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
            float((left @ left)[0, 0])
            best = min(best, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return 2 * SIZE**3 / best
