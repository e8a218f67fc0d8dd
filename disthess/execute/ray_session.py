"""Connecting to Ray, or starting a private one that ends with the run."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import ray_constants

from disthess.errors import ExecutionError
from disthess.execute.attempt import describe
from disthess.execute.signals import handlers_kept

_STORE_FLOOR_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to Ray.

    Attributes:
        private: Whether this run started it, and may use all of it.
        cpus: Cores that it offers.
        gpus: GPUs that it offers.
    """

    private: bool
    cpus: float
    gpus: float


@contextlib.contextmanager
def ray_session(address: str | None, workers: int, shared_bytes: int) -> Iterator[Session]:
    """`ray_connection` with standard output kept for results: Ray prints what it says about dead workers."""
    with ray_connection(address, workers, shared_bytes) as session, contextlib.redirect_stdout(sys.stderr):
        yield session


@contextlib.contextmanager
def ray_connection(address: str | None, workers: int, shared_bytes: int) -> Iterator[Session]:
    """Ray for the time of a run: the one this process is connected to, that at ``address``, or a private one.

    Only what was started here is shut down; environment and signal handlers are put back.

    Args:
        address: Of a cluster; None for the connected one or else a private one on this machine.
        workers: Workers that the private one should carry.
        shared_bytes: Size of what is shipped to all workers.

    Raises:
        ExecutionError: Ray cannot be reached or started.
    """
    if ray.is_initialized():
        yield _session(private=False)
        return
    private = address is None
    with _environment(_auth() if private else {}):
        try:
            with handlers_kept(), _quiet():
                if private:
                    _start(workers, shared_bytes)
                else:
                    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except Exception as error:
            where = "A private Ray could not be started" if private else f"Ray at {address} could not be reached"
            raise ExecutionError(
                f"{where}: {describe(error)}. Check that the address is right and the cluster is up, or compute with "
                f"executor='serial'."
            ) from error
        try:
            yield _session(private=private)
        finally:
            with handlers_kept():
                ray.shutdown()


def _start(workers: int, shared_bytes: int) -> None:
    with _on_loopback():
        ray.init(
            address="local",
            num_cpus=max(1, workers),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            object_store_memory=_STORE_FLOOR_BYTES + 2 * shared_bytes,
        )


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that starts meanwhile take the loopback address for its own; all its servers then listen there alone.

    ``_node_ip_address="127.0.0.1"`` does not do it: Ray turns that into the address towards the network, and its servers
    listen on all. This constant is Ray's own way for systems on which it never spans machines; a test looks at the sockets.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _session(*, private: bool) -> Session:
    resources = ray.cluster_resources()
    return Session(private, float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))


def _auth() -> dict[str, str]:
    """Variables that let a private Ray keep its token authentication where it cannot write its token.

    Ray makes a token in the home directory by itself; that is left alone. Where the home
    directory is not writable, Ray would fail, and gets a token of this process instead.
    """
    if any(name.startswith("RAY_AUTH_") for name in os.environ) or _can_keep_token():
        return {}
    return {"RAY_AUTH_TOKEN": _process_token()}


def _can_keep_token() -> bool:
    folder = Path.home() / ".ray"
    if (folder / "auth_token").exists():
        return os.access(folder / "auth_token", os.R_OK)
    place = folder if folder.exists() else folder.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


@functools.cache
def _process_token() -> str:
    """One token per process: Ray reads it once and keeps it, however often it is started."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray says at every start that it uses tokens."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables while inside, then put back what Ray and we changed."""
    before = _ray_variables()
    os.environ.update(values)
    try:
        yield
    finally:
        for name in {*before, *_ray_variables()}:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def _ray_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_") or name == "PYTHONBREAKPOINT"}
