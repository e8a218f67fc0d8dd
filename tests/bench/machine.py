"""What the machine is and can do: names and versions, the speed of matrix products, the speed of writes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from disthess.execute.threads import usable_cores
from disthess.store.layout import Layout
from disthess.store.store import Store

PACKAGES = ("torch", "disthess", "numpy", "zarr", "ray", "curvlinops-for-pytorch")
GEMM_SIZE = 2048
GEMM_REPEATS = 5
BUFFER_BYTES = 24 << 20
"""What one tile writes, about."""


def hardware(threads: int) -> dict[str, object]:
    """Processor, cores, threads in use, bytes of memory."""
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def gemm_flops_per_second(dtype: str, threads: int, size: int = GEMM_SIZE) -> float:
    """Median rate of a square ``torch.mm`` on so many threads, 2 operations per multiply-add, after one warm-up."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(size, size, generator=generator).to(getattr(torch, dtype))
        product = torch.mm(left, left)
        seconds = []
        for _ in range(GEMM_REPEATS):
            begin = time.perf_counter()
            torch.mm(left, left, out=product)
            seconds.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / statistics.median(seconds)


def raw_write_seconds(folder: str | os.PathLike[str], nbytes: int, *, fsync: bool) -> float:
    """Seconds to write so many bytes into one new file, ``numpy.tofile`` of 24 MiB at a time; the file is removed after.

    Args:
        folder: Where.
        nbytes: How many.
        fsync: Whether the bytes must have reached the disk. A store does not ask for that, so that False compares like with
            like.
    """
    buffer = np.random.default_rng(0).integers(0, 255, min(BUFFER_BYTES, nbytes), dtype=np.uint8)
    place = Path(folder) / "raw"
    begin = time.perf_counter()
    with place.open("wb") as file:
        for start in range(0, nbytes, BUFFER_BYTES):
            buffer[: nbytes - start].tofile(file)
        file.flush()
        if fsync:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    place.unlink()
    return seconds


def store_write_seconds(folder: str | os.PathLike[str], layout: Layout) -> float:
    """Seconds to write all tiles of a layout into a new store, random numbers of the right shapes: a run without a sweep."""
    most = max(tile.written_bytes for tile in layout.tiles) // np.dtype(layout.dtype).itemsize
    numbers = np.random.default_rng(0).random(most, dtype=np.float32).astype(layout.dtype)
    store = Store.create(Path(folder) / "written.zarr", layout, {})
    seconds = 0.0
    for tile in layout.tiles:
        shapes = [
            (tile.span.size, panel.columns - panel.first_column(tile.span.start))
            for panel in layout.panels_of(tile.source)
        ]
        arrays = [numbers[: rows * columns].reshape(rows, columns) for rows, columns in shapes]
        begin = time.perf_counter()
        store.write_tile(tile, dict.fromkeys(layout.parts, arrays))
        seconds += time.perf_counter() - begin
    return seconds
