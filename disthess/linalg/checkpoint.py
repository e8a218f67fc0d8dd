"""The state of a long iteration on disk: written whole or not at all, and taken up again by the same question alone."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from disthess.linalg.operator import AbstractSymmetricOperator

EVERY_SECONDS = 30.0
"""Least time between two savings."""

WRITING_SHARE = 0.1
"""Most of the time that savings may take."""

FORMAT = 1
_PROBE_SEED = 20_25


@dataclass(frozen=True, slots=True)
class IterationState:
    """Where an iteration stands between two steps.

    Attributes:
        vectors: The basis as rows, ``[m, P]``.
        images: Its image, ``[m, P]``.
        small: ``V^T H V``, ``[m, m]``.
        fresh: The next block, ``[P, b]``.
        generator: State of the random numbers.
        products: So far.
        limit: Most vectors of the basis.
    """

    vectors: np.ndarray
    images: np.ndarray
    small: np.ndarray
    fresh: np.ndarray
    generator: dict[str, Any]
    products: int
    limit: int


def operator_fingerprint(operator: AbstractSymmetricOperator) -> str:
    """A hash of ``H v`` for a fixed random v, to the last bit; takes one product.

    >>> from disthess.linalg.operator import DenseOperator
    >>> operator_fingerprint(DenseOperator(np.eye(3))) == operator_fingerprint(DenseOperator(2 * np.eye(3)))
    False
    """
    vector = np.random.default_rng(_PROBE_SEED).standard_normal((operator.size, 1))
    image = np.ascontiguousarray(operator.matmat(vector), dtype=np.float64)
    return hashlib.sha256(image.tobytes()).hexdigest()


@final
class Checkpoint:
    """A file that holds the state of one iteration.

    Args:
        path: Of the file; its folder must be there.
        question: What is asked, as JSON: operator and settings. Another question's state is refused.

    Raises:
        ValueError: The folder is not there.
    """

    def __init__(self, path: str | os.PathLike[str], question: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self._question = {"format": FORMAT, **question}
        self._due = time.monotonic() + EVERY_SECONDS
        if not self._path.parent.is_dir() or self._path.is_dir():
            raise ValueError(
                f"checkpoint={str(path)!r} cannot be written: give the name of a file in a folder that is there"
            )

    def load(self) -> IterationState | None:
        """The saved state, or None where there is no file.

        Raises:
            ValueError: The file is none of ours, is damaged, or belongs to another question.
        """
        if not self._path.exists():
            return None
        try:
            with np.load(self._path, allow_pickle=False) as held:
                found = json.loads(str(held["question"]))
                arrays = {name: held[name] for name in ("vectors", "images", "small", "fresh")}
                about = json.loads(str(held["about"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as reason:
            raise ValueError(
                f"{self._path} is no checkpoint of an iteration, or is damaged ({type(reason).__name__}); delete it, or give "
                "another name"
            ) from reason
        differing = sorted(key for key in {*found, *self._question} if found.get(key) != self._question.get(key))
        if differing:
            shown = "; ".join(
                "H times a fixed vector differs: another problem, other parameters, threads or hardware"
                if key == "operator"
                else f"{key} was {found.get(key)!r} and is {self._question.get(key)!r}"
                for key in differing
            )
            raise ValueError(
                f"{self._path} is the checkpoint of another question: {shown}. Delete it, or give another name"
            )
        return IterationState(**arrays, **about)

    def save_if_due(self, state: IterationState) -> None:
        """Save where the last time is long enough ago, also against the time that saving takes."""
        if time.monotonic() >= self._due:
            self.save(state)

    def save(self, state: IterationState) -> None:
        """Write beside the file, then put it in its place at once."""
        begin = time.monotonic()
        about = {"generator": state.generator, "products": state.products, "limit": state.limit}
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        try:
            with beside.open("wb") as out:
                np.savez(
                    out,
                    question=np.array(json.dumps(self._question)),
                    about=np.array(json.dumps(about)),
                    vectors=state.vectors,
                    images=state.images,
                    small=state.small,
                    fresh=state.fresh,
                )
                out.flush()
                os.fsync(out.fileno())
            os.replace(beside, self._path)
        finally:
            beside.unlink(missing_ok=True)
        now = time.monotonic()
        self._due = now + max(EVERY_SECONDS, (now - begin) / WRITING_SHARE)
