"""Who runs a reduction's Dask graph: threads of this process, or the workers of a Client."""

from __future__ import annotations

from typing import Any, Literal

from disthess.errors import ConfigError


def scheduler_of(client: Any) -> Any | Literal["threads"]:
    """What Dask's ``scheduler=`` takes.

    Args:
        client: A ``dask.distributed`` Client, or None for threads.

    Raises:
        ConfigError: It is something else, or closed.

    >>> scheduler_of(None)
    'threads'
    """
    if client is None:
        return "threads"
    if not hasattr(client, "get") or not hasattr(client, "scheduler_info"):
        raise ConfigError(
            f"client must be a dask.distributed Client or None, got {type(client).__name__}. disthess.dask_cluster() makes one "
            f"on Ray."
        )
    if getattr(client, "status", "running") != "running":
        raise ConfigError(f"the client is {client.status}: its scheduler cannot be asked any more. Make a new one.")
    return client
