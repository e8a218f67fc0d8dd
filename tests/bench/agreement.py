"""Whether contenders computed the same matrix. Speed without truth is nothing."""

from __future__ import annotations

from typing import final

import numpy as np
from peers import autograd_column, spread_columns
from torch import Tensor

import disthess
from disthess.reduce.hessian_store import HessianStore

TOLERANCES = {"float32": 1e-3, "float64": 1e-9}
"""Largest difference of any entry, over the largest entry."""

CHECKED = 512
"""Columns that are compared, at most."""


@final
class Agreement:
    """Compares columns of the Hessian with those of disthess's first run.

    Where a peer differs, autograd decides on the worst column.

    Args:
        problem: The problem.
        columns: Numbers of the columns that peers compute; up to 512 of them, at equal distances, are compared.
        dtype: Of the contenders.

    Attributes:
        differences: By contender: largest ``|difference|`` over the largest entry of the columns.
        wrong: Peers that autograd contradicts.
    """

    def __init__(self, problem: disthess.Problem, columns: Tensor, dtype: str) -> None:
        self.differences: dict[str, float] = {}
        self.wrong: list[str] = []
        self._problem = problem
        self._places = spread_columns(len(columns), CHECKED)
        self._numbers = columns[self._places]
        self._tolerance = TOLERANCES[dtype]
        self._expected: np.ndarray | None = None

    def read(self, store: HessianStore) -> np.ndarray:
        """The compared columns of a store, as rows: ``[K, P]``."""
        basis = np.zeros((store.numel, len(self._numbers)), dtype=store.layout.dtype)
        basis[self._numbers.numpy(), np.arange(len(self._numbers))] = 1
        return np.asarray(store.operator() @ basis).T

    def note_run(self, name: str, rows: np.ndarray) -> None:
        """Take the first run as what others are compared with, and compare later forms with it.

        Raises:
            SystemExit: Two forms of disthess differ.
        """
        if self._expected is None:
            self._expected = rows
        elif not self._agrees(name, rows):
            raise SystemExit(
                f"{name} differs from disthess's first form by {self.differences[name]:.1e} of the largest entry"
            )

    def note_peer(self, name: str, matrix: Tensor) -> None:
        """Compare a peer's columns, ``[columns, P]``.

        Raises:
            SystemExit: They differ, and autograd contradicts disthess.
        """
        rows = matrix[self._places].numpy()
        if self._agrees(name, rows) or self._expected is None:
            return
        worst = int(np.abs(rows - self._expected).max(axis=1).argmax())
        truth = autograd_column(self._problem, int(self._numbers[worst])).numpy()
        ours = float(np.abs(self._expected[worst] - truth).max() / np.abs(self._expected).max())
        message = (
            f"{name} differs from disthess by {self.differences[name]:.1e} of the largest entry; autograd in float64"
        )
        if not ours <= self._tolerance:
            raise SystemExit(f"{message} differs from disthess by {ours:.1e}: no time of disthess counts")
        self.wrong.append(name)
        print(f"WRONG: {message} agrees with disthess to {ours:.1e}. Its times do not count.", flush=True)

    def _agrees(self, name: str, rows: np.ndarray) -> bool:
        difference = float(np.abs(rows - self._expected).max() / np.abs(self._expected).max())
        self.differences[name] = difference
        return difference <= self._tolerance
