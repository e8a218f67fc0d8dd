"""Reductions over a stored Hessian against the speed of reading it: products, extreme eigenpairs, spectral density.

A store of a known matrix, a diagonal and a few outliers, is written to a temporary folder (2 GB of upper triangle by default) and
read from the page cache. Nothing of it is kept in memory between products.

Reading is timed in four ways, all of the chunk files that a product needs, whole, with as many threads as products have:
``reader`` is that of products, into memory that is used again, checksums verified; ``zarr`` is the same regions by zarr's arrays,
checksums verified; ``bands`` is the reader of the other reductions, whole rows at a time; ``fromfile`` is ``numpy.fromfile`` of
each file, nothing verified.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import machine
import numpy as np
import psutil
import settings
from known_matrix import Model, write_store
from rich.console import Console
from rich.table import Table

from disthess.linalg.density import spectral_density
from disthess.linalg.lanczos import BLOCK, basis_bytes, extreme_eigenpairs
from disthess.reduce.arrays import Band, PanelReader
from disthess.reduce.chunks import Chunk, ChunkFiles, needed_chunks
from disthess.reduce.operator import StoreOperator
from disthess.types import Span

QUICK_GIGABYTES = 0.1
COLUMNS = 8
PAIRS = 10
STEPS = 40
QUICK_STEPS = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: What was timed.
        seconds: Of each round, for one pass over the store.
        cpu_seconds: Of all threads, of each round; less than seconds times threads where others use the cores.
        bytes: Of the files of one pass.
    """

    name: str
    seconds: list[float]
    cpu_seconds: list[float]
    bytes: int

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """GB of files per second."""
        return self.bytes / self.median / 1e9

    @property
    def cpu_rate(self) -> float:
        """GB of files per second of processor time."""
        return self.bytes / statistics.median(self.cpu_seconds) / 1e9


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this verb alone."""
    parser.add_argument(
        "--gigabytes", type=float, help="size of the store's upper triangle in float32 (default 2, --quick: 0.1)"
    )


def main(options: argparse.Namespace) -> None:
    """Run the benchmark."""
    chosen = settings.settings_of(options)
    gigabytes = options.gigabytes or (QUICK_GIGABYTES if chosen.quick else 2.0)
    size = int(math.sqrt(2e9 * gigabytes / np.dtype(chosen.dtype).itemsize))
    with tempfile.TemporaryDirectory() as folder:
        model = Model(size)
        begin = time.perf_counter()
        store = write_store(Path(folder) / "known.zarr", model, chosen.dtype)
        print(f"P = {size}, {store.nbytes_on_disk() / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s", flush=True)
        reader = PanelReader(store, "hessian")
        rows = time_passes(reader, chosen.threads, chosen.rounds)
        print_passes(rows)
        values: dict[str, Any] = {
            "problem": {
                "size": size,
                "dtype": chosen.dtype,
                "upper_triangle_bytes": size * (size + 1) // 2 * np.dtype(chosen.dtype).itemsize,
            },
            "load_average": os.getloadavg(),
            "columns": COLUMNS,
            "passes": [as_json(row, rows) for row in rows],
            "errors": product_errors(reader, model, chosen.threads),
        }
        reading = {row.name: row for row in rows}
        values["arithmetic"] = arithmetic(reader, chosen.threads, reading)
        values["eigenpairs"] = eigenpairs(reader, model, chosen.threads, reading)
        steps = QUICK_STEPS if chosen.quick else STEPS
        values["density"] = density(reader, chosen.threads, steps, reading)
    for name in ("errors", "arithmetic", "eigenpairs", "density"):
        print_values(name, values[name])
    settings.keep(chosen, f"reductions_{chosen.dtype}", values)


# -- one pass over the store


def time_passes(reader: PanelReader, threads: int, rounds: int) -> list[Row]:
    """Seconds of reading in four ways and of products, turn about, after one pass that warms up."""
    vectors = np.random.default_rng(1).standard_normal((reader.store.layout.numel, COLUMNS))
    fast = operator(reader, "float32", threads)
    contenders: dict[str, Callable[[], object]] = {
        "read: reader": lambda: read_pieces(reader, threads),
        "read: zarr": lambda: read_zarr(reader, threads),
        "read: bands": lambda: read_bands(reader, threads),
        "read: fromfile": lambda: read_files(reader, threads),
        f"product of {COLUMNS}": lambda: fast.matmat(vectors),
        "product of 1": lambda: fast.matmat(vectors[:, :1]),
    }
    if reader.store.layout.dtype == "float32":
        exact = operator(reader, "float64", threads)
        contenders[f"product of {COLUMNS} in float64"] = lambda: exact.matmat(vectors)
    contenders["read: reader"]()
    rows = {name: Row(name, [], [], fast.read_bytes) for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            begin, busy = time.perf_counter(), time.process_time()
            contender()
            rows[name].seconds.append(time.perf_counter() - begin)
            rows[name].cpu_seconds.append(time.process_time() - busy)
    return list(rows.values())


def operator(reader: PanelReader, multiply: str, threads: int) -> StoreOperator:
    """An operator that keeps nothing between products."""
    return StoreOperator(reader, 0, multiply=multiply, threads=threads)  # type: ignore[arg-type]


def read_pieces(reader: PanelReader, threads: int) -> None:
    """The reader of products: each thread into its own memory, checksums verified."""
    files, chunks = ChunkFiles(reader), needed_chunks(reader)
    desks: SimpleQueue[list[np.ndarray]] = SimpleQueue()
    for _ in range(threads):
        desks.put(files.buffers(chunks))

    def read(chunk: Chunk) -> None:
        desk = desks.get()
        for _ in files.pieces(chunk, desk):
            pass
        desks.put(desk)

    on_threads(read, chunks, threads)


def read_zarr(reader: PanelReader, threads: int) -> None:
    """zarr's arrays, chunk by chunk."""

    def read(chunk: Chunk) -> None:
        array, (row, column) = reader.store.array(chunk.panel, "hessian"), chunk.place
        height, width = chunk.panel.row_chunk, chunk.panel.column_chunk
        array[row * height : (row + 1) * height, column * width : (column + 1) * width]

    on_threads(read, needed_chunks(reader), threads)


def read_bands(reader: PanelReader, threads: int) -> None:
    """Whole rows from the diagonal on."""

    def read(band: Band) -> None:
        reader.read(band.panel, band.rows, Span(band.rows.start, band.panel.columns))

    on_threads(read, tuple(reader.bands()), threads)


def read_files(reader: PanelReader, threads: int) -> None:
    """numpy.fromfile, nothing verified."""
    root = Path(reader.store.path)

    def read(chunk: Chunk) -> None:
        np.fromfile(
            root / chunk.panel.path("hessian") / "c" / str(chunk.place[0]) / str(chunk.place[1]), dtype=np.uint8
        )

    on_threads(read, needed_chunks(reader), threads)


def on_threads(function: Callable[[Any], None], items: Sequence[Any], threads: int) -> None:
    """Call a function of each item, results dropped."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(function, items):
            pass


# -- what products are for


def arithmetic(reader: PanelReader, threads: int, reading: dict[str, Row]) -> dict[str, float]:
    """How near the product of some columns could come to its own reader if it multiplied as fast as a square ``torch.mm``."""
    entries = sum(chunk.entries for chunk in needed_chunks(reader))
    # A multiply-add for each of both triangles.
    operations = 4.0 * COLUMNS * entries
    peak = machine.gemm_flops_per_second(reader.store.layout.dtype, threads)
    alone = reading["read: reader"].median
    product = reading[f"product of {COLUMNS}"].median
    return {
        "torch.mm, operations per second": peak,
        "product, operations per second": operations / product,
        "product, of the speed of its reader": alone / product,
        "the same if it multiplied like torch.mm": alone / (alone + operations / peak),
    }


def product_errors(reader: PanelReader, model: Model, threads: int) -> dict[str, float]:
    """Relative errors, in the norm of the product, of a random block and of the largest eigenvector's direction."""
    found = {}
    random = np.random.default_rng(2).standard_normal((model.size, COLUMNS))
    for name, block in (("random", random), ("outliers", model.outer)):
        wanted = model.matmat(block)
        fast, exact = (operator(reader, dtype, threads).matmat(block) for dtype in ("float32", "float64"))
        size = np.linalg.norm(wanted, axis=0)
        found[f"{name}: float32 products against float64"] = float((np.linalg.norm(fast - exact, axis=0) / size).max())
        found[f"{name}: float64 products of the store against the model"] = float(
            (np.linalg.norm(exact - wanted, axis=0) / size).max()
        )
    return found


def eigenpairs(reader: PanelReader, model: Model, threads: int, reading: dict[str, Row]) -> dict[str, Any]:
    """Ten eigenpairs at each end: seconds, passes, memory, and values against those of the model in float64."""
    chosen = operator(reader, reader.store.layout.dtype, threads)
    with peak_memory() as peak:
        begin = time.perf_counter()
        found = extreme_eigenpairs(chosen, PAIRS)
        seconds = time.perf_counter() - begin
    wanted = extreme_eigenpairs(model, PAIRS)
    passes = found.products / BLOCK
    rate = passes * chosen.read_bytes / seconds / 1e9
    return {
        "k at each end": PAIRS,
        "converged": bool(found.converged.all()),
        "products": found.products,
        "passes": passes,
        "seconds": seconds,
        "GB per second": rate,
        **{f"of the speed of {name}": rate / row.rate for name, row in reading.items()},
        "basis bytes, bound": basis_bytes(model.size, PAIRS),
        "peak bytes, measured": peak[0],
        "largest residual over largest magnitude": float(found.residuals.max() / np.abs(found.values).max()),
        "largest error over largest magnitude": float(
            np.abs(found.values - wanted.values).max() / np.abs(found.values).max()
        ),
    }


def density(reader: PanelReader, threads: int, steps: int, reading: dict[str, Row]) -> dict[str, Any]:
    """Seconds per step of the spectral density against seconds of one pass."""
    chosen = operator(reader, reader.store.layout.dtype, threads)
    begin = time.perf_counter()
    found = spectral_density(chosen, probes=COLUMNS, steps=steps)
    seconds = time.perf_counter() - begin
    done = found.products / COLUMNS
    return {
        "probes": COLUMNS,
        "steps": done,
        "seconds": seconds,
        "seconds per step": seconds / done,
        **{f"step over {name}": seconds / done / row.median for name, row in reading.items()},
    }


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The largest rise of resident memory in a block, in the first entry after it; looked at every few milliseconds."""
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = [0]

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


# -- results


def as_json(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """One row with its speed over each way of reading."""
    ratios = {f"of {other.name}": row.rate / other.rate for other in rows if other.name.startswith("read")}
    return {
        "name": row.name,
        "seconds": row.seconds,
        "cpu_seconds": row.cpu_seconds,
        "median": row.median,
        "gb_per_second": row.rate,
        "gb_per_cpu_second": row.cpu_rate,
        **ratios,
    }


def print_passes(rows: Sequence[Row]) -> None:
    """Print the speeds."""
    reads = [row for row in rows if row.name.startswith("read")]
    table = Table(title=f"one pass over {rows[0].bytes / 1e9:.2f} GB of chunk files, nothing cached")
    table.add_column("")
    for heading in ("seconds", "GB/s", "GB/cpu s", *(f"of {row.name}" for row in reads)):
        table.add_column(heading, justify="right")
    for row in rows:
        speeds = (f"{row.median:.3f}", f"{row.rate:.2f}", f"{row.cpu_rate:.2f}")
        table.add_row(row.name, *speeds, *(f"{row.rate / other.rate:.0%}" for other in reads))
    Console().print(table)


def print_values(name: str, values: dict[str, Any]) -> None:
    """Print what else was found."""
    table = Table("", "", title=name)
    for key, value in values.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings.add_options(parser)
    add_options(parser)
    main(parser.parse_args())
