"""What tests of the output basis ask of every kind of source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import disthess
from disthess.planning import tiling
from disthess.prepare import Options, Prepared, prepare
from disthess.sweep.engine import GraphEngine
from disthess.sweep.primal import compute_primals

ATOL = 1e-12


def engine_of(prepared: Prepared) -> GraphEngine:
    """An engine on its plan."""
    values = {parameter.name: parameter.tensor.detach() for parameter in prepared.problem.parameters()}
    sources = {source.source: source for source in prepared.plan.sources}
    return GraphEngine(compute_primals(prepared.problem, prepared.programs), values, prepared.plan.layout, sources)


def check_parts(problem: disthess.Problem, where: Path) -> None:
    """All parts from the outputs are autograd's."""
    store = disthess.compute(problem, where / "x.zarr", basis="output", parts=("hessian", "ggn", "residual"))
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(problem), atol=ATOL)
    np.testing.assert_allclose(store.dense("ggn"), disthess.reference_hessian(problem, part="ggn"), atol=ATOL)
    np.testing.assert_allclose(store.dense("ggn") + store.dense("residual"), store.dense(), atol=ATOL)


def check_small_tiles(problem: disthess.Problem, where: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """The same with tiles and stacks of so many bytes, and a cache that holds next to nothing."""
    for name, size in (("TILE_BYTES", nbytes), ("CHUNK_BYTES", 1), ("STACK_BYTES", nbytes)):
        monkeypatch.setattr(tiling, name, size)
    for module in ("thin", "panel", "rows"):
        monkeypatch.setattr(f"disthess.sweep.{module}.CACHE_BYTES", 300)
    plan = disthess.plan(problem, basis="output")
    assert len(plan.layout.tiles) > len(plan.sources)
    check_parts(problem, where)


def check_halved(problem: disthess.Problem) -> None:
    """Sweeps that are halved for want of memory, as often as they can be, give the same rows."""
    prepared = prepare(problem, Options(basis="output"))
    sources, engine = {source.source: source for source in prepared.plan.sources}, engine_of(prepared)
    for tile in prepared.plan.layout.tiles:
        whole = engine.compute(tile.source, tile.span)["hessian"]
        for split in range(1, sources[tile.source].halvings + 1):
            for found, wanted in zip(engine.compute(tile.source, tile.span, split)["hessian"], whole, strict=True):
                np.testing.assert_allclose(found, wanted, atol=ATOL)
