"""What an actor asks of Ray, and whether any node has it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from disthess.errors import ExecutionError
from disthess.execute.ray_session import Session

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker takes.

    Attributes:
        threads: Its threads.
        gpus: GPUs that it keeps to itself.
    """

    threads: int
    gpus: int = 0


def actor_options(session: Session, share: Share) -> dict[str, Any]:
    """Options of a Ray actor that is never restarted, spread over the nodes.

    Raises:
        ExecutionError: No node has room for even one.
    """
    # All of a private Ray is ours; elsewhere cores are claimed, so that other work is not crowded.
    cpus = 0 if session.private else share.threads
    nodes = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in node_resources()]
    if not rooms(nodes, cpus, share.gpus):
        largest = max(nodes, default=(0.0, 0.0), key=lambda node: (node[1], node[0]))
        raise ExecutionError(
            f"One worker takes {cpus or 'no'} cores{f' and {share.gpus} GPU' if share.gpus else ''}, and does not fit into this "
            f"Ray cluster: its {len(nodes)} node{'s' if len(nodes) != 1 else ''} have {session.cpus:.0f} cores and "
            f"{session.gpus:.0f} GPUs in all, the largest {largest[0]:.0f} cores and {largest[1]:.0f} GPUs. Use fewer threads, "
            f"device='cpu' where there is no GPU, or a cluster with larger nodes; one must be up when the run starts."
        )
    variables = {name: str(share.threads) for name in _THREAD_VARIABLES}
    if session.private:
        # On this machine workers import what the driver can import, wherever it found it.
        variables["PYTHONPATH"] = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    return {
        "num_cpus": cpus,
        "num_gpus": share.gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": 1,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": variables},
    }


def node_resources() -> list[dict[str, float]]:
    """What each node that is up offers in all."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def rooms(nodes: Sequence[tuple[float, float]], cpus: float, gpus: float) -> int:
    """How many workers fit, each whole on one node; ``nodes`` are (cores, GPUs). Workers that take nothing count as one a node.

    >>> rooms([(4.0, 0.0), (3.0, 1.0)], 2, 0), rooms([(4.0, 0.0), (3.0, 1.0)], 2, 1), rooms([(4.0, 0.0)], 0, 0)
    (3, 1, 1)
    """
    total = 0
    for node in nodes:
        ways = [int(has // takes) for has, takes in zip(node, (cpus, gpus), strict=True) if takes]
        total += min(ways, default=1)
    return total
