"""The Hessian of a problem by products alone, its batches spread over workers; any model that torch differentiates twice.

1. A piece is one batch. Each worker holds the model once, and the taped gradients of its pieces, as many as memory allows; tapes
   that are not kept are made again for each block of vectors.
2. A block of vectors goes to all workers; each answers with one product per piece.
3. The driver adds the answers in the order of the batches, so that the sum does not depend on who computed what.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, final, get_args

import numpy as np
import torch
from typing_extensions import override

from disthess.errors import ConfigError
from disthess.execute.heap import KeptHeap
from disthess.execute.product_job import PieceProducts, ProductJob, is_large, share_pieces, take_weights
from disthess.execute.product_plan import Executor, OperatorPlan, device_settings, piece_bytes, plan_products
from disthess.execute.product_progress import ProductProgress, product_listener
from disthess.execute.threads import default_threads
from disthess.hvp import decay_diagonal
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.preflight import check_dtype, check_parameters, check_tensors, select_parameters
from disthess.problem import Problem
from disthess.types import DType


@final
class ParallelOperator(AbstractSymmetricOperator):
    """``x -> H x`` at the parameters as they were when it was made, all batches and weight decay; made by `operator`.

    Products are the same to the last bit for any number of workers, and for ``serial``, at the same threads per worker and on
    the same hardware. Use it in a ``with`` block, or close it: its workers end with it.

    Attributes:
        plan: How it computes, and what a worker needs for it.
        names: Parameters, first names, in the order of its rows.
    """

    def __init__(
        self,
        plan: OperatorPlan,
        names: tuple[str, ...],
        decay: np.ndarray | None,
        engine: contextlib.AbstractContextManager[_Engine],
        notify: Callable[[int], None],
    ) -> None:
        self.plan = plan
        self.names = names
        self._decay = decay
        self._notify = notify
        self._products = 0
        stack = contextlib.ExitStack()
        self._engine: _Engine | None = stack.enter_context(engine)
        # Workers end with the operator, also where nobody closes it.
        self._close = weakref.finalize(self, stack.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End its workers; it cannot multiply any more."""
        self._engine = None
        self._close()

    @property
    @override
    def size(self) -> int:
        return self.plan.size

    @property
    @override
    def dtype(self) -> np.dtype:
        return np.dtype(self.plan.dtype)

    @property
    def products(self) -> int:
        """Vectors multiplied so far."""
        return self._products

    def describe(self) -> str:
        """The plan in a few lines."""
        return self.plan.describe()

    def peak_bytes(self) -> tuple[int, ...]:
        """Measured peak of each worker above what its process had before; empty for ``serial``, which has no process of its own.

        Raises:
            ConfigError: It is closed.
        """
        return self._open().peak_bytes()

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        """``H X``: ``[P, k]`` from ``[P, k]``.

        Raises:
            ConfigError: It is closed, or the block has another number of rows.
            ProblemError: The objective has no Hessian on a batch; batches are checked when they are first needed.
            ExecutionError: A product failed, or workers died too often.
        """
        engine = self._open()
        if block.ndim != 2 or block.shape[0] != self.size:
            raise ConfigError(f"this operator multiplies blocks of {self.size} rows, got shape {block.shape}.")
        rows = np.ascontiguousarray(block.T, dtype=self.dtype)
        total = np.empty_like(rows)
        for start in range(0, len(rows), self.plan.vectors):
            here = slice(start, start + self.plan.vectors)
            # A copy, so that what is shipped begins where an array begins.
            total[here] = engine.total(rows[here].copy())
            if self._decay is not None:
                total[here] += self._decay * rows[here]
            self._products += len(rows[here])
            self._notify(self._products)
        return total.T

    def _open(self) -> _Engine:
        if self._engine is None:
            raise ConfigError("this operator was closed; make another with disthess.operator.")
        return self._engine


def operator(
    problem: Problem,
    *,
    executor: Executor = "ray",
    workers: int | None = None,
    threads: int | None = None,
    parameters: str | Sequence[str] | None = None,
    dtype: DType | None = None,
    device: str | None = None,
    address: str | None = None,
    memory_bytes: int | None = None,
    progress: ProductProgress = None,
) -> ParallelOperator:
    """The Hessian of a problem as an operator: nothing is stored, and any model that torch differentiates twice will do.

    ``H x = sum_b weight_b d2 objective(batch_b) / d theta2 x + decay x``, each summand ``vjp`` of a batch's gradient, taped once
    and applied to many vectors. A batch is never split: give several to spread them. `eigenvalues`, `spectral_density`,
    `trace`, `low_rank` and `solve` take the operator; ``disthess.linalg.operator.to_scipy`` makes a SciPy ``LinearOperator``.

    Args:
        problem: The problem.
        executor: ``ray``: batches are spread over actors; ``serial``: one after the other in this process.
        workers: Actors; default one per core, and no more than batches.
        threads: Of each; default the cores over the workers.
        parameters: Globs; default all trainable ones. Others are constants.
        dtype: ``float32`` or ``float64`` of products and sums; default the model's.
        device: Torch's name; None for the GPU that Ray gives an actor, else the CPU.
        address: Of a Ray cluster; None for the one this process is connected to, or else a private one.
        memory_bytes: What a worker may take. Tapes that do not fit are made again for each block of vectors, at the price of
            about one more product each; where not even one fits, that is refused. By default the memory that is free here.
        progress: True for a line now and then, or a function that is called with the products done so far.

    Returns:
        The operator, with its workers started; use it in a ``with`` block, or close it. Until then memory that is freed in its
        processes stays with them (on glibc), since the next product wants it again.

    Raises:
        ConfigError: An argument is wrong.
        ProblemError: The problem has no Hessian as given.
        PlanError: A worker would need more memory than it may take.
        ExecutionError: Ray or its actors did not start.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> data = [(torch.eye(2), torch.zeros(2, 1)), (torch.ones(2, 2), torch.zeros(2, 1))]
        >>> with operator(Problem(model, loss="mse", batches=data), executor="serial") as found:
        ...     found.matmat(np.eye(3))[0].tolist()
        [1.5, 1.0, 1.5]
    """
    _check(executor, workers, threads, memory_bytes)
    check_parameters(problem)
    check_dtype(problem, dtype)
    bound = problem.to(problem.dtype if dtype is None else getattr(torch, dtype))
    names = select_parameters(bound, parameters)
    check_tensors(bound)
    crew = 1 if executor == "serial" else min(workers or default_threads(1), len(bound.batches))
    plan = plan_products(bound, names, executor, crew, threads or default_threads(crew), memory_bytes, address, device)
    decay = decay_diagonal(bound, names).numpy() if any(bound.weight_decay.values()) else None
    engine = _serial(plan, bound, names, device) if executor == "serial" else _ray(plan, bound, names, device, address)
    return ParallelOperator(plan, names, decay, engine, product_listener(progress))


def _check(executor: str, workers: int | None, threads: int | None, memory_bytes: int | None) -> None:
    if executor not in get_args(Executor):
        raise ConfigError(f"executor must be one of {', '.join(get_args(Executor))}, got {executor!r}.")
    for key, value in (("workers", workers), ("threads", threads), ("memory_bytes", memory_bytes)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{key} must be a positive whole number, got {value!r}.")
    if executor == "serial" and workers not in (None, 1):
        raise ConfigError(f"executor='serial' computes in one process, got workers={workers}; use executor='ray'.")


class _Engine:
    """Sums of products over all pieces, ``[K, P]`` from ``[K, P]``."""

    def __init__(
        self, total: Callable[[np.ndarray], np.ndarray], peak_bytes: Callable[[], tuple[int, ...]] = tuple
    ) -> None:
        self.total = total
        self.peak_bytes = peak_bytes


@contextlib.contextmanager
def _serial(plan: OperatorPlan, problem: Problem, names: tuple[str, ...], device: str | None) -> Iterator[_Engine]:
    place = device or "cpu"
    with device_settings(place, plan.threads) as found:
        moved = problem if found.type == "cpu" else problem.to(problem.dtype, found)
    pieces: list[PieceProducts] = [PieceProducts(moved, names, plan.kept)]
    heap = KeptHeap(large=is_large(plan.size))

    def total(rows: np.ndarray) -> np.ndarray:
        with device_settings(place, plan.threads) as here:
            given = torch.tensor(rows, device=here)
            found = pieces[0].product(0, given).cpu().numpy()
            for piece in range(1, plan.pieces):
                found += pieces[0].product(piece, given).cpu().numpy()
            return found

    try:
        yield _Engine(total)
    finally:
        pieces.clear()
        heap.restore()


@contextlib.contextmanager
def _ray(
    plan: OperatorPlan, problem: Problem, names: tuple[str, ...], device: str | None, address: str | None
) -> Iterator[_Engine]:
    # Only an operator on Ray loads ray.
    from disthess.execute.product_crew import product_crew

    weights = take_weights(problem)
    with product_crew(
        ProductJob(problem, names, plan.kept, plan.size),
        weights,
        share_pieces(piece_bytes(problem), plan.workers),
        threads=plan.threads,
        device=device,
        address=address,
        block_bytes=plan.block_bytes,
    ) as crew:
        yield _Engine(crew.total, crew.peak_bytes)
