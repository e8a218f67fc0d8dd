"""How products with the Hessian of a problem are computed, and what a worker needs for it; measured on one tape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from disthess.errors import PlanError
from disthess.execute.memory import available_memory_bytes
from disthess.execute.product_job import TapeBytes, measure_tape, share_pieces
from disthess.execute.tile_job import DeviceSettings
from disthess.planning.memory import LIBRARY_BYTES, WORKSPACE_BYTES
from disthess.preflight import check_batch
from disthess.problem import Problem, batch_tensors
from disthess.types import DType
from disthess.units import human_bytes

Executor = Literal["ray", "serial"]

VECTORS = 8
"""Most vectors multiplied at once."""

BLOCK_BYTES = 128 << 20
"""Most bytes of a block of vectors; a single vector may take more."""

FREE_SHARE = 0.8
"""Of the memory that is free, what the workers of this machine may plan with where no ``memory_bytes`` is given."""


@dataclass(frozen=True, slots=True)
class OperatorPlan:
    """How products are computed, and what a worker needs for it.

    Attributes:
        executor: ``ray`` or ``serial``.
        size: ``P``.
        dtype: Of the products.
        pieces: Batches.
        workers: Actors, or 1.
        threads: Of each.
        vectors: Multiplied at once.
        tape: Bytes of the tape of the largest piece, counted on a real one.
        kept: Tapes that a worker keeps; less than its pieces where they do not fit.
        held: Tapes that a worker holds at once: one more while it makes one that is not kept.
        model_bytes: Parameters and buffers.
        batch_bytes: All batches.
    """

    executor: Executor
    size: int
    dtype: DType
    pieces: int
    workers: int
    threads: int
    vectors: int
    tape: TapeBytes
    kept: int
    held: int
    model_bytes: int
    batch_bytes: int

    @property
    def block_bytes(self) -> int:
        """Of a block of vectors."""
        return self.vectors * self.size * np.dtype(self.dtype).itemsize

    @property
    def fixed_bytes(self) -> int:
        """What a worker takes besides tapes.

        The model and the batches twice (as they came, and in place), a block of vectors four times (given and answered, each
        shared and private), what a product needs on the way, and allowances for libraries.
        """
        return (
            2 * (self.model_bytes + self.batch_bytes)
            + 4 * self.block_bytes
            + max(self.tape.product, self.tape.making - self.tape.held)
            + LIBRARY_BYTES
            + WORKSPACE_BYTES
        )

    @property
    def worker_bytes(self) -> int:
        """Upper bound of what one worker adds to its process: `fixed_bytes` and ``held`` tapes of the largest piece."""
        return self.fixed_bytes + self.held * self.tape.held

    def describe(self) -> str:
        """A few lines for people."""
        own = -(-self.pieces // self.workers)
        kept = "all kept" if self.kept >= own else f"{self.kept} kept, the others made again for each block of vectors"
        return "\n".join(
            (
                f"operator      {self.size:,} x {self.size:,}, {self.dtype}, {self.executor}",
                f"pieces        {self.pieces} batch{'es' if self.pieces > 1 else ''} over {self.workers} "
                f"worker{'s' if self.workers > 1 else ''} of {self.threads} thread{'s' if self.threads > 1 else ''}",
                f"vectors       {self.vectors} at once, {human_bytes(self.block_bytes)}",
                f"tapes         up to {human_bytes(self.tape.held)} each; {kept}",
                f"memory        up to {human_bytes(self.worker_bytes)} per worker",
            )
        )


def plan_products(
    problem: Problem,
    names: tuple[str, ...],
    executor: Executor,
    workers: int,
    threads: int,
    memory_bytes: int | None,
    address: str | None,
    device: str | None,
) -> OperatorPlan:
    """Make the tape of the largest batch to count its bytes, and keep as many tapes as fit.

    Args:
        problem: In the dtype of the products, on the CPU.
        names: Parameters, first names.
        executor: As given.
        workers: Actors, or 1.
        threads: Of each.
        memory_bytes: What a worker may take; None for its share of what is free on this machine, if it computes here.
        address: Of a Ray cluster, whose memory is not known.
        device: As given.

    Raises:
        ProblemError: The objective has no Hessian on the largest batch.
        PlanError: Not even one tape fits.
    """
    chosen = set(names)
    size = sum(entry.tensor.numel() for entry in problem.parameters() if entry.name in chosen)
    dtype: DType = "float64" if problem.dtype == torch.float64 else "float32"
    vectors = max(1, min(VECTORS, BLOCK_BYTES // (size * np.dtype(dtype).itemsize)))
    costs = piece_bytes(problem)
    with device_settings("cpu", threads):
        largest = costs.index(max(costs))
        check_batch(problem, largest, names)
        tape = measure_tape(problem, names, largest, vectors)
    own = max(map(len, share_pieces(costs, workers)))
    tensors = [*problem.model.parameters(), *problem.model.buffers()]
    model_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    bare = OperatorPlan(
        executor, size, dtype, len(costs), workers, threads, vectors, tape, own, own, model_bytes, sum(costs)
    )
    room = memory_bytes
    if room is None and address is None and (device or "cpu") == "cpu":
        room = int(FREE_SHARE * available_memory_bytes()) // workers
    if room is None or bare.worker_bytes <= room:
        return bare
    held = (room - bare.fixed_bytes) // max(tape.held, 1)
    if held < 1:
        least = bare.fixed_bytes + tape.held
        allowed = "memory_bytes allows" if memory_bytes is not None else "each may take"
        raise PlanError(
            f"one of {workers} worker{'s' if workers > 1 else ''} would need up to {human_bytes(least)}: "
            f"{human_bytes(tape.held)} for the tape of one batch, {human_bytes(bare.fixed_bytes)} for the model, "
            f"{vectors} vector{'s' if vectors > 1 else ''} and what a product needs on the way; and {allowed} "
            f"{human_bytes(room)}. Use fewer workers, smaller batches, or fewer parameters."
        )
    return replace(bare, kept=held - 1, held=held)


def piece_bytes(problem: Problem) -> list[int]:
    """Bytes of each batch, at least 1."""
    return [
        max(1, sum(tensor.numel() * tensor.element_size() for tensor in batch_tensors(batch)))
        for batch in problem.batches
    ]


@contextlib.contextmanager
def device_settings(device: str, threads: int) -> Iterator[torch.device]:
    """Threads and precision of a worker while inside; its device."""
    settings = DeviceSettings(device, threads)
    try:
        yield settings.device
    finally:
        settings.restore()
