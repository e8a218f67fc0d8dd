"""Long-running services in Ray actors, spread over the nodes of a cluster: for what Ray does not compute itself.

A service is anything with ``close()``; it is made inside its actor by a callable that Ray can ship, and says one thing (such as
its address) that is handed back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import ray

from disthess.errors import ExecutionError
from disthess.execute.attempt import describe
from disthess.execute.ray_room import Share, actor_options
from disthess.execute.ray_session import ray_session

_START_SECONDS = 120.0
_CLOSE_SECONDS = 15.0


class Service(Protocol):
    """What runs in an actor until it is closed."""

    @property
    def answer(self) -> Any:
        """What its maker wants to know of it."""
        ...

    def close(self) -> None:
        """End it."""
        ...


Make = Callable[[str], Service]
"""Given the address of its node, makes a service."""


@final
class HostActor:
    """Holds one service. Ray makes an actor of it."""

    def __init__(self) -> None:
        self._service: Service | None = None

    def open(self, make: Make) -> Any:
        """Start the service; its answer."""
        self._service = make(ray.util.get_node_ip_address())
        return self._service.answer

    def close(self) -> None:
        """End the service."""
        if self._service is not None:
            self._service.close()


@dataclass(frozen=True, slots=True)
class Hosts:
    """Actors to come on one cluster."""

    options: dict[str, Any]
    actors: list[Any]

    def start(self, makes: Sequence[Make], *, cpus: float | None = None) -> list[Any]:
        """One service per callable; their answers, in order.

        Raises:
            ExecutionError: One did not start, or Ray has no room for all of them.
        """
        options = self.options if cpus is None else {**self.options, "num_cpus": cpus}
        started: list[Any] = [ray.remote(HostActor).options(**options).remote() for _ in makes]
        self.actors.extend(started)
        answers = [actor.open.remote(make) for actor, make in zip(started, makes, strict=True)]
        _, waiting = ray.wait(answers, num_returns=len(answers), timeout=_START_SECONDS)
        if waiting:
            raise ExecutionError(
                f"{len(waiting)} of {len(makes)} services did not start on this Ray cluster in {_START_SECONDS:.0f} s; it may "
                f"lack the cores. Ask for fewer, or look at 'ray status'."
            )
        try:
            return list(ray.get(answers))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise ExecutionError(f"A service did not start in its Ray actor: {describe(cause)}.") from error

    def close(self) -> None:
        """Close all services, the last first, and end their actors."""
        for actor in reversed(self.actors):
            with contextlib.suppress(Exception):
                ray.get(actor.close.remote(), timeout=_CLOSE_SECONDS)
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self.actors.clear()


@contextlib.contextmanager
def ray_hosts(address: str | None, workers: int, threads: int) -> Iterator[Hosts]:
    """Actors on a Ray cluster for as long as one is inside; all are ended on leaving.

    Args:
        address: Of a Ray cluster; None for the one this process is connected to, or else a private one.
        workers: How many the private one should carry.
        threads: Cores that each actor claims.

    Raises:
        ExecutionError: Ray cannot be reached or started, or no node has room.
    """
    with ray_session(address, workers, 0) as session:
        hosts = Hosts(actor_options(session, Share(threads)), [])
        try:
            yield hosts
        finally:
            hosts.close()
