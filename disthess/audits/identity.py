"""What an audit is of, and what made it: the hashes that tell two audits apart, and the facts kept beside the numbers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from disthess.audit_config import AuditConfig
from disthess.fingerprint import weights_hash
from disthess.problem import Problem

_PIECE = 1 << 22

_ELSEWHERE = ("executor", "address", "workers", "threads", "memory_gib")
"""Keys of ``measure`` that say where and how fast, not what."""


def checkpoint_hash(path: str | Path | None, problem: Problem) -> str:
    """SHA-256 of a checkpoint's bytes; of the problem's own weights where there is no file.

    Raises:
        OSError: It cannot be read.
    """
    if path is None:
        return weights_hash(problem)
    found = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while piece := stream.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def settings_hash(config: AuditConfig) -> str:
    """Of what an audit file asks for; not of where its checkpoints lie, who computes, and who is told."""
    kept = config.model_dump(exclude={"history", "alerts", "hook"})
    kept["measure"] = {key: value for key, value in kept["measure"].items() if key not in _ELSEWHERE}
    if kept["measure"]["steps"] is None:
        # Audits older than this setting stay known.
        del kept["measure"]["steps"]
    kept["checkpoints"] = {
        key: value for key, value in (kept["checkpoints"] or {}).items() if key in ("format", "prefix", "key")
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def key_of(checkpoint: str, data: str, settings: str) -> str:
    """The audit's key.

    >>> len(key_of("a", "b", "c"))
    32
    """
    return hashlib.sha256("\n".join((checkpoint, data, settings)).encode()).hexdigest()[:32]


def facts_of(problem: Problem, config: AuditConfig, size: int, hashes: dict[str, str]) -> dict[str, str]:
    """Texts that an audit keeps.

    Args:
        problem: In the dtype and on the device of the audit.
        config: The audit file.
        size: Parameters audited.
        hashes: ``checkpoint``, ``data`` and ``settings``.
    """
    section = config.measure
    own: dict[str, Any] = {
        **hashes,
        "factory": config.problem.factory,
        "objective": problem.recipe.title,
        "parameters": size,
        "seed": section.seed,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": section.device,
        "executor": section.executor,
        "threads": section.threads or torch.get_num_threads(),
        # As everywhere in disthess: other kernels have no second derivative.
        "attention kernel": "MATH",
        "disthess": importlib.metadata.version("disthess"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    if section.executor == "ray":
        own["workers"] = section.workers or "by the machine"
    return {name: str(value) for name, value in own.items()}
