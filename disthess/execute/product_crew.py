"""The driver of products on Ray: actors that own pieces, and a sum in the order of the pieces.

Answers come in any order and wait for their turn, so that the sum is the same to the last bit whoever computed what. An actor
that dies is replaced by a fresh one, which makes its tapes anew; where none can be had, the living take over its pieces.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
import ray

from disthess.errors import ExecutionError
from disthess.execute.attempt import Failure
from disthess.execute.product_actor import ProductActor
from disthess.execute.product_job import ProductJob
from disthess.execute.ray_crew import Coroner
from disthess.execute.ray_room import Share, actor_options
from disthess.execute.ray_session import ray_connection

START_SECONDS = 300.0
"""How long an actor may take to start."""

AHEAD = 2
"""Products asked of one actor at a time, so that it need not wait for the next."""

_ATTEMPTS = 4
_POLL_SECONDS = 0.25


def shared_blocks(workers: int) -> int:
    """Blocks of vectors that lie in the object store at once: the given one, and answers under way or not yet added.

    >>> shared_blocks(2)
    5
    """
    return 1 + AHEAD * workers


@contextlib.contextmanager
def product_crew(
    job: ProductJob,
    weights: dict[str, np.ndarray],
    owned: Sequence[Sequence[int]],
    *,
    threads: int,
    device: str | None,
    address: str | None,
    block_bytes: int,
) -> Iterator[ProductCrew]:
    """Actors for as long as one is inside, one for each share of pieces.

    Args:
        job: The problem without its weights.
        weights: These.
        owned: Pieces of each actor.
        threads: Of each.
        device: Torch's name, or None for the GPU that Ray gives an actor, else the CPU.
        address: Of a Ray cluster; None for the one this process is connected to, or else a private one.
        block_bytes: Of the largest block of vectors.

    Raises:
        ExecutionError: Ray cannot be reached or started, or an actor cannot be opened.
    """
    shipped_bytes = sum(array.nbytes for array in weights.values()) + shared_blocks(len(owned)) * block_bytes
    with ray_connection(address, len(owned), shipped_bytes) as session:
        on_gpu = device == "cuda" if device is not None else session.gpus >= 1
        options = actor_options(session, Share(threads, int(on_gpu)))
        crew = ProductCrew(options, (ray.put(job), ray.put(weights), device, threads), owned)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                crew.start()
            yield crew
        finally:
            crew.dismiss()


@final
class ProductCrew:
    """Actors by worker number, and their pieces.

    Args:
        options: Of each actor, for Ray.
        opening: What each is opened with.
        owned: Pieces of each.
    """

    def __init__(self, options: dict[str, Any], opening: tuple[Any, ...], owned: Sequence[Sequence[int]]) -> None:
        self._make = ray.remote(ProductActor).options(**options)
        self._opening = opening
        self._owned = {worker: list(pieces) for worker, pieces in enumerate(owned)}
        self._actors: dict[int, Any] = {}
        self._coroner = Coroner()
        self.replaced = 0

    def start(self) -> None:
        """Open all actors.

        Raises:
            ExecutionError: One cannot be opened.
        """
        opening = {worker: self._open(worker) for worker in self._owned}
        for worker, answer in opening.items():
            failure = self._opened(answer)
            if failure is not None:
                raise ExecutionError(f"Worker {worker} could not be opened: {failure.message}.")

    def total(self, rows: np.ndarray) -> np.ndarray:
        """``sum_b H_b v_k``, piece after piece: ``[K, P]`` from ``[K, P]``.

        Raises:
            ExecutionError: A product failed, or workers died too often.
            ProblemError: The objective has no Hessian on a batch.
        """
        if not ray.is_initialized():
            raise ExecutionError(
                "the Ray that this operator started its workers on was shut down; make the operator again."
            )
        with contextlib.redirect_stdout(sys.stderr):
            return _Turn(self, self._owned).run(ray.put(rows))

    def ask(self, worker: int, piece: int, rows: Any) -> Any:
        """The answer to come."""
        return self._actors[worker].product.remote(piece, rows)

    def replace(self, worker: int, error: Exception) -> tuple[str, bool]:
        """Why an actor died, and whether a fresh one is in its place; if not, its pieces went to the living.

        Raises:
            ExecutionError: There is no fresh one and none lives.
        """
        why = self._coroner.examine(error).message
        self._forget(worker)
        self.replaced += 1
        failure = self._opened(self._open(worker))
        if failure is None:
            return why, True
        self._forget(worker)
        pieces = self._owned.pop(worker)
        if not self._owned:
            raise ExecutionError(
                f"No worker is left: {why}; and a fresh one could not be opened: {failure.message}. Use smaller batches or a "
                f"smaller memory_bytes, and look at 'ray status'."
            ) from error
        others = sorted(self._owned)
        for place, piece in enumerate(pieces):
            self._owned[others[place % len(others)]].append(piece)
        for other in others:
            self._owned[other].sort()
        return why, False

    def actor(self, worker: int) -> Any:
        """The actor of a worker."""
        return self._actors[worker]

    def peak_bytes(self) -> tuple[int, ...]:
        """Measured peak of each worker above what it had before it was opened."""
        return tuple(ray.get([actor.peak_bytes.remote() for _, actor in sorted(self._actors.items())]))

    def dismiss(self) -> None:
        """End all actors."""
        for worker in tuple(self._actors):
            self._forget(worker)

    def _open(self, worker: int) -> Any:
        self._actors[worker] = self._make.remote()
        return self._actors[worker].open.remote(*self._opening)

    def _opened(self, answer: Any) -> Failure | None:
        try:
            return ray.get(answer, timeout=START_SECONDS)
        except ray.exceptions.GetTimeoutError:
            return Failure(f"Ray found no room for it in {START_SECONDS:.0f} s")
        except ray.exceptions.RayError as error:
            return self._coroner.examine(error)

    def _forget(self, worker: int) -> None:
        with contextlib.suppress(Exception):
            ray.kill(self._actors.pop(worker))


@final
class _Turn:
    """One block of vectors on its way through all pieces."""

    def __init__(self, crew: ProductCrew, owned: dict[int, list[int]]) -> None:
        self._crew = crew
        self._owned = owned
        self._todo = {worker: deque(pieces) for worker, pieces in owned.items()}
        self._pieces = sum(map(len, owned.values()))
        self._flying: dict[Any, tuple[int, int]] = {}
        self._arrived: dict[int, np.ndarray] = {}
        self._attempts: dict[int, int] = {}
        self._next = 0
        self._total: np.ndarray | None = None

    def run(self, rows: Any) -> np.ndarray:
        while self._next < self._pieces:
            self._send(rows)
            ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=_POLL_SECONDS)
            for answer in ready:
                self._take(answer)
        return np.asarray(self._total)

    def _send(self, rows: Any) -> None:
        """Keep every actor busy, but none so far ahead that answers pile up."""
        limit = self._next + AHEAD * len(self._todo)
        for worker, pieces in self._todo.items():
            busy = sum(owner == worker for owner, _ in self._flying.values())
            while pieces and busy < AHEAD and pieces[0] < limit:
                piece = pieces.popleft()
                self._flying[self._crew.ask(worker, piece, rows)] = (worker, piece)
                busy += 1

    def _take(self, answer: Any) -> None:
        # Answers of an actor that died meanwhile are asked for again.
        if answer not in self._flying:
            return
        worker, piece = self._flying.pop(answer)
        try:
            result = ray.get(answer)
        except ray.exceptions.RayError as error:
            self._lose(worker, piece, error)
            return
        if isinstance(result, Failure) and result.hopeless is not None:
            raise result.hopeless
        if isinstance(result, Failure):
            raise ExecutionError(f"The product of batch {piece} failed: {result.message}")
        self._arrived[piece] = result
        while self._next in self._arrived:
            part = self._arrived.pop(self._next)
            if self._total is None:
                self._total = np.array(part)
            else:
                self._total += part
            self._next += 1

    def _lose(self, worker: int, piece: int, error: Exception) -> None:
        lost = [piece, *(other for owner, other in self._flying.values() if owner == worker)]
        self._flying = {answer: entry for answer, entry in self._flying.items() if entry[0] != worker}
        why, fresh = self._crew.replace(worker, error)
        self._attempts[min(lost)] = self._attempts.get(min(lost), 0) + 1
        if self._attempts[min(lost)] >= _ATTEMPTS:
            raise ExecutionError(
                f"The product of batch {min(lost)} failed: its worker died {_ATTEMPTS} times; the last time {why}. Use smaller "
                f"batches, fewer workers, or a smaller memory_bytes."
            ) from error
        waiting = [*lost, *self._todo.pop(worker)]
        if fresh:
            self._todo[worker] = deque(sorted(waiting))
            return
        wanted = set(waiting).union(*self._todo.values())
        self._todo = {other: deque(p for p in pieces if p in wanted) for other, pieces in self._owned.items()}
