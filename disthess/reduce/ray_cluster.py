"""A Dask cluster inside Ray actors: one scheduler, one worker per actor, and a Client in this process.

For stores larger than one machine reads well. Connections are encrypted with a certificate made for this cluster, which travels
through Ray alone: whoever does not have it cannot hand tasks to the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, final

from disthess.errors import ConfigError
from disthess.execute.ray_hosts import ray_hosts

_CLOSE_SECONDS = 10.0


@contextlib.contextmanager
def dask_cluster(address: str | None = None, *, workers: int = 2, threads: int = 1) -> Iterator[Any]:
    """A ``dask.distributed`` Client whose workers are Ray actors; all of them end on leaving.

    While inside, it is also Dask's default, so that ``store.dask()`` is computed by its workers.

    Args:
        address: Of a Ray cluster; None for the one this process is connected to, or else a private one.
        workers: Number of workers, spread over the nodes. Each node must be able to read the store.
        threads: Of each worker.

    Yields:
        The Client.

    Raises:
        ConfigError: A number is not positive.
        ExecutionError: Ray cannot be reached, or has no room.

    Example:
        >>> with dask_cluster("auto", workers=8) as client:  # doctest: +SKIP
        ...     table = store.blocks(client=client)
    """
    if workers < 1 or threads < 1:
        raise ConfigError(f"workers and threads must be positive, got {workers} and {threads}.")
    # Only a cluster of Dask workers loads distributed.
    from distributed import Client
    from distributed.security import Security

    security = Security.temporary()
    with ray_hosts(address, workers + 1, threads) as hosts:
        (place,) = hosts.start([functools.partial(_serve, _scheduler(security))], cpus=0)
        hosts.start([functools.partial(_serve, _worker(security, place, threads, name)) for name in range(workers)])
        with Client(place, security=security, set_as_default=True) as client:
            client.wait_for_workers(workers, timeout=120)
            yield client


Server = Callable[[str], AbstractAsyncContextManager[str]]
"""Given a node's address, runs a server while inside, and says where."""


def _serve(server: Server, node: str) -> _Served:
    return _Served(functools.partial(server, node))


def _scheduler(security: Any) -> Server:
    @contextlib.asynccontextmanager
    async def run(node: str) -> AsyncIterator[str]:
        from distributed import Scheduler

        async with Scheduler(host=node, port=0, protocol="tls", security=security, dashboard=False) as scheduler:
            yield scheduler.address

    return run


def _worker(security: Any, scheduler: str, threads: int, name: int) -> Server:
    @contextlib.asynccontextmanager
    async def run(node: str) -> AsyncIterator[str]:
        from distributed import Worker

        async with Worker(
            scheduler,
            host=node,
            nthreads=threads,
            name=f"disthess-{name}-{os.getpid()}",
            security=security,
            dashboard=False,
        ) as worker:
            yield worker.address

    return run


@final
class _Served:
    """A server in a thread with an event loop of its own, until it is closed.

    Args:
        server: The server; what it says is the answer.
    """

    def __init__(self, server: Callable[[], AbstractAsyncContextManager[str]]) -> None:
        self._server = server
        self._up = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="disthess-dask", daemon=True)
        self._thread.start()
        self._up.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:
            self._failure = error
        finally:
            self._up.set()

    async def _live(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with self._server() as answer:
            self.answer = answer
            self._up.set()
            await self._end.wait()

    def close(self) -> None:
        """End the server."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(_CLOSE_SECONDS)
