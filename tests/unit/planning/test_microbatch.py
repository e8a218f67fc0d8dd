"""Samples swept at once: more where sums are passed over by every microbatch, if their rows stay small."""

from __future__ import annotations

import dataclasses

import pytest

from disthess.planning.source import Basis
from disthess.planning.tiling import LARGE_MICROBATCH, MICROBATCH, ROWS_BYTES, source_plan
from disthess.planning.workload import SourceCost

COST = SourceCost("w", "w", ("w@fc",), 1, 640, 64, 10, 1, 5, 2, 7, 1000, True, 30, 10, 0)


def samples(basis: Basis, columns: int, batch: int, rows: int = 1) -> int:
    cost = dataclasses.replace(COST, columns=columns, unit_tangents=rows)
    return source_plan(cost, basis, 64, batch, 4).samples


@pytest.mark.parametrize(("basis", "most"), [("output", LARGE_MICROBATCH), ("parameter", MICROBATCH)])
def test_the_output_basis_takes_more_samples_at_once(basis: Basis, most: int) -> None:
    assert samples(basis, 1000, 10 * most) == most
    assert samples(basis, 1000, most + 1) == (most + 2) // 2


def test_but_no_more_than_their_rows_have_room_for() -> None:
    columns = ROWS_BYTES // (4 * 1000)
    assert samples("output", columns, 1000) == 1000
    assert samples("output", columns, 1001) == 501
    assert samples("output", 100 * columns, 4 * MICROBATCH) == MICROBATCH
    assert samples("output", columns // 2, 1000, rows=2) == 1000
    assert samples("output", columns, 1000, rows=2) == 500
